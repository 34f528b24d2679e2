"""PolyEncoderModel: vectors by the paper, invariants, and what transformers expects of a model."""

from importlib.metadata import version

import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModel

import tiny
from poly_encoders import PolyEncoderConfig, PolyEncoderModel, poly_score

KINDS = ["learnt_codes", "first_m", "last_m", "first_and_last_m"]


def both_sides(contexts, candidates):
    """The arguments of `forward`."""
    return {**contexts, **{f"candidate_{name}": tensor for name, tensor in candidates.items()}}


def assert_same_weights(model, other):
    assert model.state_dict().keys() == other.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


# --- the vectors and the scores ---------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_context_vectors_are_what_was_attended_to(kind, left):
    model = tiny.poly_model(context_vectors=kind, num_codes=6, code_attention="sqrt")
    batch = tiny.token_batch(4, 9, left=left)
    hidden, mask = model.run_encoder("context", batch).last_hidden_state, batch["attention_mask"]
    weights = model.context_attention(hidden, mask)
    torch.testing.assert_close(weights @ hidden, model.get_context_features(**batch), atol=1e-5, rtol=1e-5)
    assert (weights.masked_select(mask[:, None] == 0) == 0).all()
    taken = torch.full((4,), 6) if kind == "learnt_codes" else mask.sum(dim=1).clamp(max=6)
    assert (weights.sum(dim=-1) > 0.99).sum(dim=1).tolist() == (taken + (kind == "first_and_last_m")).tolist()


@torch.no_grad()
def test_output_scaling_multiplies_both_sides():
    batch = tiny.token_batch(3, 6)
    plain, scaled = (tiny.poly_model(context_vectors="first_m", output_scaling=factor) for factor in (1.0, 0.06))
    torch.testing.assert_close(scaled.get_context_features(**batch), 0.06 * plain.get_context_features(**batch))
    torch.testing.assert_close(scaled.get_candidate_features(**batch), 0.06 * plain.get_candidate_features(**batch))


@torch.no_grad()
@pytest.mark.parametrize("final_attention", ["basic", "sqrt"])
def test_forward_composes_its_parts(final_attention):
    model = tiny.poly_model(final_attention=final_attention)
    contexts, candidates = tiny.token_batch(3, 7), tiny.token_batch(5, 4, seed=1)
    labels = torch.tensor([4, 0, 2])
    output = model(**both_sides(contexts, candidates), labels=labels)
    context, candidate = model.get_context_features(**contexts), model.get_candidate_features(**candidates)
    scores = poly_score(context, candidate, tiny.WIDTH**-0.5 if final_attention == "sqrt" else 1.0)
    found = [output.context_vectors, output.candidate_vectors, output.scores, output.loss]
    torch.testing.assert_close(found, [context, candidate, scores, cross_entropy(scores, labels)])
    unlabelled, alone = model(**both_sides(contexts, candidates)), model(**contexts)
    assert unlabelled.loss is alone.loss is alone.scores is None
    assert torch.equal(unlabelled.scores, output.scores)
    assert torch.equal(alone.context_vectors, output.context_vectors)


@torch.no_grad()
@pytest.mark.parametrize(("b", "n"), [(1, 1), (1, 4), (3, 1), (3, 4)])
def test_candidates_per_context_equal_shared_ones(b, n):
    model = tiny.poly_model()
    contexts, candidates = tiny.token_batch(b, 7), tiny.token_batch(n, 5, seed=1)
    shared = model(**both_sides(contexts, candidates))
    own = model(**both_sides(contexts, {name: tensor.expand(b, n, 5) for name, tensor in candidates.items()}))
    assert shared.scores.shape == own.scores.shape == (b, n)
    assert own.candidate_vectors.shape == (b, n, tiny.WIDTH)
    torch.testing.assert_close(own.scores, shared.scores)


def test_calls_that_make_no_sense_are_named():
    model = tiny.poly_model()
    with pytest.raises(ValueError, match="no candidate_input_ids"):
        model(**tiny.token_batch(2, 5), labels=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="input_ids"):
        model()
    with pytest.raises(ValueError, match=r"\(batch, length\)"):
        model(torch.arange(5))
    for shape in ((2, 1), (1, 5), (2, 6), (5,)):  # torch would spread some of them over the tokens
        with pytest.raises(ValueError, match=r"the tokens' shape \(2, 5\)"):
            model(**tiny.token_batch(2, 5), turn_ids=torch.ones(shape, dtype=torch.long))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, "turns", "turns_and_codes"])
def test_padding_vectors_and_a_row_without_tokens_stay_finite(kind, normalize, dtype):
    """A vector of zeros had NaN at length 1 in half precision, where torch's smallest length is 0."""
    model = tiny.poly_model(context_vectors=kind, num_codes=6, normalize=normalize).to(dtype)
    ids = torch.full((2, 4), 7)
    mask = torch.tensor([[0, 0, 0, 0], [1, 1, 0, 0]])
    assert model.get_context_features(ids, mask).isfinite().all()
    assert model.get_candidate_features(ids, mask).isfinite().all()


def test_new_codes_start_near_zero():
    codes = PolyEncoderModel(tiny.poly_config(num_codes=256)).codes
    assert 0.045 < codes.std().item() < 0.055
    assert abs(codes.mean().item()) < 0.005


def test_gradient_checkpointing_keeps_the_gradients():
    def gradients(checkpointing):
        model = tiny.poly_model().train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable()
            layers = [*model.context_encoder.encoder.layer, *model.candidate_encoder.encoder.layer]
            assert all(layer.gradient_checkpointing for layer in layers)
        inputs = both_sides(tiny.token_batch(3, 6), tiny.token_batch(3, 5))
        model(**inputs, labels=torch.arange(3)).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    plain = gradients(False)
    assert plain["codes"].abs().sum() > 0
    torch.testing.assert_close(gradients(True), plain)
    with pytest.raises(ValueError, match=r"does not support (activation|gradient) checkpointing"):
        tiny.poly_model("mpnet").gradient_checkpointing_enable()


# --- built on checkpoints ---------------------------------------------------------------------------------------------


def test_building_on_two_checkpoints(checkpoints):
    model = PolyEncoderModel.from_encoders_pretrained(checkpoints("bert"), checkpoints("electra"), num_codes=3)
    assert model.context_encoder.config.model_type == "bert"
    assert_same_weights(model.candidate_encoder, AutoModel.from_pretrained(checkpoints("electra")))


def test_one_checkpoint_starts_two_equal_encoders_or_one(checkpoints):
    apart = PolyEncoderModel.from_encoders_pretrained(checkpoints("bert"), candidate_vector="first")
    assert apart.config.reduction == "first"
    assert_same_weights(apart.context_encoder, apart.candidate_encoder)
    towers = (apart.context_encoder, apart.candidate_encoder)
    ours, theirs = ({each.data_ptr() for each in tower.parameters()} for tower in towers)
    assert not ours & theirs
    together = PolyEncoderModel.from_encoders_pretrained(checkpoints("bert"), share_encoders=True)
    assert together.candidate_encoder is together.context_encoder


# --- saved and loaded -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model and the folder that it is saved in; read only."""
    folder, model = tmp_path_factory.mktemp("model"), tiny.poly_model()
    model.save_pretrained(folder)
    return model, folder


def test_auto_classes_know_the_type_and_a_poly_encoder_is_no_backbone(saved):
    model, folder = saved
    assert_same_weights(model, AutoModel.from_pretrained(folder, device_map="cpu"))
    assert isinstance(AutoModel.from_config(PolyEncoderConfig.from_pretrained(folder)), PolyEncoderModel)
    with pytest.raises(ValueError, match="itself a Poly-encoder"):
        PolyEncoderModel.from_encoders_pretrained(folder)


def test_shared_encoders_are_one_module_stored_once(saved, tmp_path):
    model = tiny.poly_model(share_encoders=True)
    assert model.candidate_encoder is model.context_encoder
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "model.safetensors")) == len(model.context_encoder.state_dict()) + 1
    assert len(load_file(saved[1] / "model.safetensors")) == 2 * len(model.context_encoder.state_dict()) + 1
    again = PolyEncoderModel.from_pretrained(tmp_path)
    assert again.candidate_encoder is again.context_encoder
    assert_same_weights(model, again)


def test_shards_and_what_was_there_before(tmp_path):
    model = tiny.poly_model()
    model.save_pretrained(tmp_path / "model", is_main_process=False)  # one of several processes, not the main one
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_same_weights(model, PolyEncoderModel.from_pretrained(tmp_path))
    (tmp_path / "notes.txt").write_text("mine")
    tiny.poly_model(seed=1).save_pretrained(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not list(tmp_path.glob("model-*"))
    assert_same_weights(tiny.poly_model(seed=1), PolyEncoderModel.from_pretrained(tmp_path))


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "attention"), [(torch.float16, "sdpa"), (torch.bfloat16, "eager")])
def test_options_of_the_backbones_reach_both(saved, checkpoints, dtype, attention):
    options, batch = {"dtype": dtype, "attn_implementation": attention}, tiny.token_batch(3, 6)
    half = PolyEncoderModel.from_pretrained(saved[1], **options)
    built = PolyEncoderModel.from_encoders_pretrained(checkpoints("bert"), checkpoints("roberta"), **options)
    for model in (half, built):
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        towers = (model.context_encoder, model.candidate_encoder)
        assert {tower.config._attn_implementation for tower in towers} == {attention}
    vectors = half.get_context_features(**batch)
    assert vectors.dtype == dtype
    torch.testing.assert_close(vectors.float(), saved[0].get_context_features(**batch), atol=0.1, rtol=0.1)


def test_resizing_the_vocabulary_reaches_both_encoders(tmp_path):
    model = tiny.poly_model()
    model.resize_token_embeddings(tiny.VOCAB_SIZE + 3)
    assert model.candidate_encoder.get_input_embeddings().num_embeddings == tiny.VOCAB_SIZE + 3
    model.save_pretrained(tmp_path)
    assert PolyEncoderModel.from_pretrained(tmp_path).get_input_embeddings().num_embeddings == tiny.VOCAB_SIZE + 3


def test_lora_adapters(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers.integrations.peft import MIN_PEFT_VERSION

    lora = LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=[])
    if Version(version("peft")) >= Version(MIN_PEFT_VERSION):  # a release of transformers may ask for the next of peft
        model = tiny.poly_model()
        model.add_adapter(lora)
        model.save_pretrained(tmp_path / "through transformers")
        assert (tmp_path / "through transformers" / "adapter_model.safetensors").is_file()
    batch = tiny.token_batch(3, 6)
    before = tiny.poly_model().get_context_features(**batch).detach()
    model = get_peft_model(tiny.poly_model(), lora)
    torch.testing.assert_close(model.get_context_features(**batch), before)  # an adapter starts as nothing
    trained = " ".join(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    assert "context_encoder" in trained
    assert "candidate_encoder" in trained
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path)
    after = model.get_context_features(**batch)
    again = PeftModel.from_pretrained(tiny.poly_model(), tmp_path)
    torch.testing.assert_close(again.get_context_features(**batch), after)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(again.merge_and_unload().get_context_features(**batch), after)
