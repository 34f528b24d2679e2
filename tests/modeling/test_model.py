"""PolyEncoderModel: vectors by the paper, invariants, and what transformers expects of a model."""

import pytest
import torch
from packaging.version import Version
from torch.nn.functional import cross_entropy
from transformers import AutoModel

import tiny
from poly_encoders import PolyEncoderConfig, PolyEncoderModel, poly_score

KINDS = ["learnt_codes", "first_m", "last_m", "first_and_last_m"]
CANDIDATE_KINDS = ["first", "mean", "first_m_mean"]


def context_by_the_paper(model, hidden, mask):
    """Section 4.4 for each context by itself, over its real tokens alone."""
    config, rows = model.config, []
    for states, keep in zip(hidden, mask, strict=True):
        h = states[keep.bool()]
        m = config.num_codes
        if config.context_vectors == "learnt_codes":
            scale = config.hidden_size**-0.5 if config.code_attention == "sqrt" else 1.0
            vectors = [
                sum(w * s for w, s in zip(torch.softmax(h @ code * scale, 0), h, strict=True)) for code in model.codes
            ]
        else:
            vectors = list(h[:m] if config.context_vectors == "first_m" else h[-m:])
            vectors += [torch.zeros_like(h[0])] * (m - len(vectors))
            if config.context_vectors == "first_and_last_m":
                vectors = [h[0], *vectors]
        rows.append(torch.stack(vectors))
    return torch.stack(rows)


def candidate_by_the_paper(model, hidden, mask):
    """Section 4.2's reductions."""
    rows = []
    for states, keep in zip(hidden, mask, strict=True):
        h = states[keep.bool()]
        kind = model.config.candidate_vector
        rows.append(h[0] if kind == "first" else (h if kind == "mean" else h[: model.config.num_codes]).mean(0))
    return torch.stack(rows)


@torch.no_grad()
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("m", [1, 3, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_context_vectors_follow_the_paper(kind, m, left):
    model = tiny.poly_model(context_vectors=kind, num_codes=m, code_attention="sqrt" if left else "basic")
    batch = tiny.token_batch(4, 9, left=left)
    hidden = model.context_encoder(**batch).last_hidden_state
    vectors = model.get_context_features(**batch)
    assert vectors.shape == (4, model.config.num_context_vectors, tiny.WIDTH)
    torch.testing.assert_close(
        vectors, context_by_the_paper(model, hidden, batch["attention_mask"]), atol=1e-5, rtol=1e-5
    )


@torch.no_grad()
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("kind", CANDIDATE_KINDS)
def test_candidate_vectors_follow_the_paper(kind, left):
    model = tiny.poly_model(candidate_vector=kind, num_codes=3)
    batch = tiny.token_batch(4, 9, left=left)
    hidden = model.candidate_encoder(**batch).last_hidden_state
    expected = candidate_by_the_paper(model, hidden, batch["attention_mask"])
    torch.testing.assert_close(model.get_candidate_features(**batch), expected, atol=1e-5, rtol=1e-5)


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
    output = model(
        **contexts,
        candidate_input_ids=candidates["input_ids"],
        candidate_attention_mask=candidates["attention_mask"],
        labels=labels,
    )
    context, candidate = model.get_context_features(**contexts), model.get_candidate_features(**candidates)
    scale = tiny.WIDTH**-0.5 if final_attention == "sqrt" else 1.0
    scores = poly_score(context, candidate, scale)
    torch.testing.assert_close(output.context_vectors, context)
    torch.testing.assert_close(output.candidate_vectors, candidate)
    torch.testing.assert_close(output.scores, scores)
    torch.testing.assert_close(output.loss, cross_entropy(scores, labels))
    unlabelled = model(
        **contexts, candidate_input_ids=candidates["input_ids"], candidate_attention_mask=candidates["attention_mask"]
    )
    assert unlabelled.loss is None
    assert torch.equal(unlabelled.scores, output.scores)


@torch.no_grad()
@pytest.mark.parametrize(("b", "n"), [(1, 1), (1, 4), (3, 1), (3, 4)])
def test_candidates_per_context_equal_shared_ones(b, n):
    model = tiny.poly_model()
    contexts, candidates = tiny.token_batch(b, 7), tiny.token_batch(n, 5, seed=1)
    shared = model(
        **contexts, candidate_input_ids=candidates["input_ids"], candidate_attention_mask=candidates["attention_mask"]
    )
    own = model(
        **contexts,
        candidate_input_ids=candidates["input_ids"].expand(b, n, 5),
        candidate_attention_mask=candidates["attention_mask"].expand(b, n, 5),
    )
    assert shared.scores.shape == own.scores.shape == (b, n)
    assert own.candidate_vectors.shape == (b, n, tiny.WIDTH)
    torch.testing.assert_close(own.scores, shared.scores)


@torch.no_grad()
def test_contexts_alone_are_a_valid_call():
    output = tiny.poly_model()(**tiny.token_batch(2, 5))
    assert output.scores is None
    assert output.context_vectors.shape == (2, 4, tiny.WIDTH)


@torch.no_grad()
def test_hidden_states_and_attentions_on_request():
    model = tiny.poly_model(attn_implementation="eager")
    candidates = tiny.token_batch(3, 4)
    output = model(
        **tiny.token_batch(2, 5),
        candidate_input_ids=candidates["input_ids"],
        output_hidden_states=True,
        output_attentions=True,
    )
    assert [state.shape for state in output.hidden_states] == [(2, 5, tiny.WIDTH)] * 3
    assert [state.shape for state in output.candidate_hidden_states] == [(3, 4, tiny.WIDTH)] * 3
    assert [attention.shape for attention in output.attentions] == [(2, 4, 5, 5)] * 2
    assert [attention.shape for attention in output.candidate_attentions] == [(3, 4, 4, 4)] * 2


def test_calls_that_make_no_sense_are_named():
    model = tiny.poly_model()
    with pytest.raises(ValueError, match="no candidate_input_ids"):
        model(**tiny.token_batch(2, 5), labels=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="input_ids"):
        model()
    with pytest.raises(ValueError, match=r"\(batch, length\)"):
        model(torch.arange(5))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_batch_order_and_company_change_nothing(kind):
    model, batch = tiny.poly_model(context_vectors=kind), tiny.token_batch(5, 9)
    order = torch.tensor([3, 0, 4, 1, 2])
    together = model.get_context_features(**batch)
    shuffled = model.get_context_features(**{name: tensor[order] for name, tensor in batch.items()})
    torch.testing.assert_close(shuffled, together[order])
    alone = torch.cat([model.get_context_features(**{k: v[i : i + 1] for k, v in batch.items()}) for i in range(5)])
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_row_without_tokens_stays_finite():
    model = tiny.poly_model()
    ids = torch.full((1, 4), 7)
    assert model.get_context_features(ids, torch.zeros_like(ids)).isfinite().all()
    assert model.get_candidate_features(ids, torch.zeros_like(ids)).isfinite().all()


def test_new_codes_start_near_zero():
    codes = PolyEncoderModel(tiny.poly_config(num_codes=256)).codes
    assert 0.045 < codes.std().item() < 0.055
    assert abs(codes.mean().item()) < 0.005


def test_every_parameter_learns():
    model = tiny.poly_model().train()
    candidates = tiny.token_batch(3, 5)
    loss = model(**tiny.token_batch(3, 6), candidate_input_ids=candidates["input_ids"], labels=torch.arange(3)).loss
    loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []
    assert model.codes.grad.abs().sum() > 0


def test_shared_encoders_are_one_module(tmp_path):
    model = tiny.poly_model(share_encoders=True)
    assert model.candidate_encoder is model.context_encoder
    model.save_pretrained(tmp_path)
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = list(file.keys())
    assert not [name for name in names if name.startswith("candidate_encoder")]
    again = PolyEncoderModel.from_pretrained(tmp_path)
    assert again.candidate_encoder is again.context_encoder


def test_resizing_the_vocabulary_reaches_both_encoders(tmp_path):
    model = tiny.poly_model()
    model.resize_token_embeddings(tiny.VOCAB_SIZE + 3)
    assert model.context_encoder.get_input_embeddings().num_embeddings == tiny.VOCAB_SIZE + 3
    assert model.candidate_encoder.get_input_embeddings().num_embeddings == tiny.VOCAB_SIZE + 3
    model.save_pretrained(tmp_path)
    again = PolyEncoderModel.from_pretrained(tmp_path)
    assert again.get_input_embeddings().num_embeddings == tiny.VOCAB_SIZE + 3


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_attention_implementation_reaches_both_encoders(tmp_path, kind):
    tiny.poly_model().save_pretrained(tmp_path)
    model = PolyEncoderModel.from_pretrained(tmp_path, attn_implementation=kind)
    assert model.context_encoder.config._attn_implementation == kind
    assert model.candidate_encoder.config._attn_implementation == kind


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(tmp_path, dtype):
    model = tiny.poly_model()
    model.save_pretrained(tmp_path)
    half = PolyEncoderModel.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    batch = tiny.token_batch(3, 6)
    vectors = half.get_context_features(**batch)
    assert vectors.dtype == dtype
    torch.testing.assert_close(vectors.float(), model.get_context_features(**batch), atol=0.1, rtol=0.1)


@torch.no_grad()
def test_compiles_as_one_graph():
    model, contexts, candidates = tiny.poly_model(), tiny.token_batch(2, 6), tiny.token_batch(3, 4)
    inputs = {
        **contexts,
        "candidate_input_ids": candidates["input_ids"],
        "candidate_attention_mask": candidates["attention_mask"],
    }
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**inputs).scores, model(**inputs).scores)


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
        candidates = tiny.token_batch(3, 5)
        model(
            **tiny.token_batch(3, 6), candidate_input_ids=candidates["input_ids"], labels=torch.arange(3)
        ).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain["codes"].abs().sum() > 0
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)


def test_gradient_checkpointing_of_a_family_without_it_is_refused():
    with pytest.raises(ValueError, match=r"does not support (activation|gradient) checkpointing"):
        tiny.poly_model("mpnet").gradient_checkpointing_enable()


def test_device_map(tmp_path):
    tiny.poly_model().save_pretrained(tmp_path)
    model = PolyEncoderModel.from_pretrained(tmp_path, device_map="cpu")
    assert model.get_context_features(**tiny.token_batch(2, 5)).shape == (2, 4, tiny.WIDTH)


def test_lora_adapters(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    base = tiny.poly_model()
    batch = tiny.token_batch(3, 6)
    before = base.get_context_features(**batch).detach()
    lora = LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=[])
    model = get_peft_model(tiny.poly_model(), lora)
    torch.testing.assert_close(model.get_context_features(**batch), before)  # an adapter starts as nothing
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any("context_encoder" in name for name in trained)
    assert any("candidate_encoder" in name for name in trained)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.poly_model(), tmp_path)
    torch.testing.assert_close(again.get_context_features(**batch), model.get_context_features(**batch))
    merged = again.merge_and_unload()
    assert not torch.allclose(merged.get_context_features(**batch), before)
    torch.testing.assert_close(merged.get_context_features(**batch), model.get_context_features(**batch))


def test_adapters_through_transformers(tmp_path):
    import peft
    from transformers.integrations.peft import MIN_PEFT_VERSION

    if Version(peft.__version__) < Version(MIN_PEFT_VERSION):  # a release of transformers may ask for the next of peft
        pytest.skip(f"transformers takes adapters of peft {MIN_PEFT_VERSION} or newer, here is {peft.__version__}")
    model = tiny.poly_model()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["query"]), adapter_name="mine")
    assert any("lora" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_building_on_two_checkpoints(checkpoints):
    model = PolyEncoderModel.from_encoders_pretrained(checkpoints("bert"), checkpoints("electra"), num_codes=3)
    assert model.context_encoder.config.model_type == "bert"
    assert model.candidate_encoder.config.model_type == "electra"
    original = AutoModel.from_pretrained(checkpoints("electra")).state_dict()
    for name, tensor in model.candidate_encoder.state_dict().items():
        assert torch.equal(tensor, original[name]), name


def test_one_checkpoint_starts_two_equal_encoders_or_one(checkpoints):
    apart = PolyEncoderModel.from_encoders_pretrained(checkpoints("bert"))
    assert apart.candidate_encoder is not apart.context_encoder
    for ours, theirs in zip(apart.context_encoder.parameters(), apart.candidate_encoder.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.data_ptr() != theirs.data_ptr()
    together = PolyEncoderModel.from_encoders_pretrained(checkpoints("bert"), share_encoders=True)
    assert together.candidate_encoder is together.context_encoder


def test_options_of_the_backbones_reach_both(checkpoints):
    model = PolyEncoderModel.from_encoders_pretrained(
        checkpoints("bert"), checkpoints("roberta"), dtype=torch.bfloat16, attn_implementation="eager"
    )
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.context_encoder.config._attn_implementation == "eager"
    assert model.candidate_encoder.config._attn_implementation == "eager"


def test_a_poly_encoder_is_no_backbone(tmp_path):
    tiny.poly_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="itself a Poly-encoder"):
        PolyEncoderModel.from_encoders_pretrained(tmp_path)


def test_auto_classes_know_the_type(tmp_path):
    tiny.poly_model().save_pretrained(tmp_path)
    assert isinstance(AutoModel.from_pretrained(tmp_path), PolyEncoderModel)
    assert isinstance(AutoModel.from_config(PolyEncoderConfig.from_pretrained(tmp_path)), PolyEncoderModel)
