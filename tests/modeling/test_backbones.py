"""Every family of backbone: padding changes nothing wherever it is, loading is quiet, and saving keeps every bit."""

import itertools
import threading

import pytest
import torch
from transformers import AutoModel, BertModel, PreTrainedModel

import tiny
from poly_encoders import BiEncoder, CrossEncoder, PolyEncoder, PolyEncoderModel
from poly_encoders.modeling import configuration_poly_encoder

FAMILIES = [*tiny.FAMILIES, *tiny.MORE_FAMILIES]
KINDS = list(
    itertools.product(["learnt_codes", "first_m", "last_m", "first_and_last_m"], ["mean", "first", "first_m_mean"])
)
CLOSE = {"atol": 2e-5, "rtol": 1e-4}
# Options of a model with turns between any of a third of all tokens.
TURNS = {"turn_boundary_ids": list(range(5, tiny.VOCAB_SIZE, 3)), "max_turn_length": 2, "last_turn_share": 0.5}
TURNS |= {"normalize": True, "final_temperature": 0.1}

# Ways to place 4 rows of at most 7 tokens in a longer row: where the first of each is. "holes" has padding within rows.
PLACES = {
    "left": lambda length, width: range(width - length, width),
    "more": lambda length, width: range(length),
    "both": lambda length, width: range(2, 2 + length),
    "holes": lambda length, width: [*range(1, length), width - 1],
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


def outputs(model, batch):
    """All that a model gives: the scores, each side's vectors, and the states and attentions of each row's tokens."""
    found = model(
        **batch,
        **{f"candidate_{name}": tensor for name, tensor in batch.items()},
        output_hidden_states=True,
        output_attentions=True,
    )
    rows = [mask.bool() for mask in batch["attention_mask"]]
    layers = [[state[row][real] for row, real in enumerate(rows)] for state in found.hidden_states]
    layers += [[state[row][real] for row, real in enumerate(rows)] for state in found.candidate_hidden_states]
    attentions = [*found.attentions, *found.candidate_attentions]
    layers += [[each[row][:, real][:, :, real] for row, real in enumerate(rows)] for each in attentions]
    return [found.scores, found.context_vectors, found.candidate_vectors, *(each for layer in layers for each in layer)]


def placed(batch, width, *ways):
    """The rows of a batch among more padding, each in its way."""
    moved = {name: torch.full((len(tensor), width), tiny.PAD * (name == "input_ids")) for name, tensor in batch.items()}
    for row, mask in enumerate(batch["attention_mask"]):
        real = mask.bool()
        columns = list(PLACES[ways[row % len(ways)]](int(real.sum()), width))
        for name, tensor in batch.items():
            moved[name][row, columns] = tensor[row, real]
    return moved


@torch.no_grad()
@pytest.mark.parametrize("turns", [False, True])
def test_padding_changes_nothing(family, turns):
    """On the left it moved the positions of BERT and of others, by up to 3.1 in a number of their vectors."""
    kind, reduction = KINDS[FAMILIES.index(family) % len(KINDS)]  # each at least once
    options = {"context_vectors": ("turns", "turns_and_codes")[len(family) % 2], **TURNS} if turns else {}
    options = {"context_vectors": kind, "reduction": reduction, "attn_implementation": "eager", **options}
    model, batch = tiny.poly_model(family, **options), tiny.token_batch(4, 7)
    expected = outputs(model, batch)
    ways = [[way] for way in PLACES] + [list(PLACES)]
    for found in (outputs(model, placed(batch, 12, *way)) for way in ways):
        torch.testing.assert_close(found, expected, **CLOSE)
    embeds = {
        "inputs_embeds": model.get_input_embeddings()(batch["input_ids"]),
        "attention_mask": batch["attention_mask"],
    }
    flipped = {name: tensor.flip(1) for name, tensor in embeds.items()}
    flipped["turn_ids"] = model.turns_of({name: tensor.flip(1) for name, tensor in batch.items()})
    backwards = {name: tensor.flip(1) for name, tensor in placed(batch, 7, "left").items()}
    torch.testing.assert_close(model.get_context_features(**flipped), model.get_context_features(**backwards), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"context_vectors": "turns", **TURNS},
        {"context_vectors": "turns_and_codes", **TURNS, "learn_final_temperature": True, "learn_last_turn_share": True},
    ],
)
def test_padding_changes_nothing_in_a_compiled_model(options):
    model, batch = tiny.poly_model(attn_implementation="eager", **options), tiny.token_batch(4, 7)
    expected = outputs(model, batch)  # upstream puts its hooks for states and attentions in place on the first call
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    features = torch.compile(model.get_context_features, fullgraph=True, backend="eager")
    for ways in (["more"], PLACES):
        torch.testing.assert_close(outputs(compiled, placed(batch, 12, *ways)), expected, **CLOSE)
        torch.testing.assert_close(features(**placed(batch, 12, *ways)), expected[1], **CLOSE)


@torch.no_grad()
def test_positions_and_segments_move_with_their_tokens():
    model, batch = tiny.poly_model(), tiny.token_batch(3, 6)
    batch["token_type_ids"] = torch.arange(6).expand(3, 6) % 2
    batch["position_ids"] = torch.arange(6).flip(0).expand(3, 6).contiguous()
    left = {**placed(batch, 9, "left"), "position_ids": placed(batch, 9, "left")["position_ids"]}
    torch.testing.assert_close(model.get_context_features(**left), model.get_context_features(**batch), **CLOSE)
    without = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert not torch.allclose(model.get_context_features(**without), model.get_context_features(**batch), atol=1e-2)


@torch.no_grad()
def test_attentions_of_a_window():
    """Longformer's attention has a column for each neighbour, not for each token, so only its rows move."""
    model = tiny.poly_model("longformer", attention_window=4)
    batch = tiny.token_batch(1, 4)
    found = [
        model(**each, output_attentions=True).attentions[0][:, :, each["attention_mask"][0].bool()]
        for each in (placed(batch, 8, "more"), placed(batch, 8, "left"))
    ]
    torch.testing.assert_close(*found, **CLOSE)


TEXTS = ["yes", "no, not at all", "x", "perhaps tomorrow, and perhaps not"]


@pytest.mark.parametrize(
    ("model_class", "family"),
    [
        *((model_class, family) for model_class in (PolyEncoder, BiEncoder) for family in ("bert", "albert", "gpt2")),
        *((CrossEncoder, family) for family in ("bert", "deberta-v2", "bart", "gpt2", "qwen3")),
    ],
)
def test_the_tokenizers_side_changes_nothing(model_class, family, checkpoints):
    torch.manual_seed(0)
    options = {"share_encoders": True} if model_class is BiEncoder else {}
    model = model_class(checkpoints(family), device="cpu", **options)

    def numbers(texts, batch_size):
        if model_class is CrossEncoder:
            return [model.predict([(context, text) for text in texts], batch_size=batch_size) for context in TEXTS]
        return [encode(texts, batch_size=batch_size) for encode in (model.encode_query, model.encode_document)]

    alone = numbers(TEXTS, 1)
    for side in ("left", "right"):
        for module in model.modules():
            if getattr(module, "tokenizer", None) is not None:
                module.tokenizer.padding_side = side
        for together, each in zip(numbers(TEXTS, 32), alone, strict=True):
            torch.testing.assert_close(together, each, **CLOSE)
        ranking = {entry["corpus_id"]: entry["score"] for entry in model.rank(TEXTS[1], TEXTS)}
        assert [ranking[place] for place in range(4)] == pytest.approx(
            [model.rank(TEXTS[1], [text])[0]["score"] for text in TEXTS], rel=1e-4, abs=2e-5
        )


@torch.no_grad()
def test_saving_and_loading(family, tmp_path):
    model = tiny.poly_model(family)
    model.save_pretrained(tmp_path)
    again, info = PolyEncoderModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    batch = tiny.token_batch(3, 6)
    torch.testing.assert_close(again.get_context_features(**batch), model.get_context_features(**batch))


def test_no_parameter_is_left_without_a_gradient(family):
    """A pooler that nothing reads would stop distributed training."""
    model = tiny.poly_model(family).train()
    candidates = tiny.token_batch(3, 5)
    model(**tiny.token_batch(3, 6), candidate_input_ids=candidates["input_ids"], labels=torch.arange(3)).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_from_text(family, checkpoints):
    model = PolyEncoder(checkpoints(family), num_codes=3, device="cpu")
    contexts = model.encode_query(["hello", ["a", "longer one, of two turns"]])
    candidates = model.encode_document(["yes", "no, not at all", "x"])
    assert contexts.shape == (2, 3, tiny.WIDTH)
    assert candidates.shape == (3, tiny.WIDTH)
    torch.testing.assert_close(contexts[:1], model.encode_query(["hello"]), **CLOSE)


@pytest.mark.parametrize("family", ["bert", "qwen3"])
def test_a_very_long_text(family, checkpoints):
    model = PolyEncoder(checkpoints(family), num_codes=3, device="cpu", max_context_length=64)
    end = " the very end of a text of which the beginning is cut off, all of it"
    assert (model.encode_query(["x" * 300_000 + end]) == model.encode_query(["y" * 90 + end])).all()


@pytest.mark.parametrize(("family", "limit"), [("bert", 66), ("roberta", 64), ("xlm-roberta", 64), ("mpnet", 64)])
def test_positions_are_never_exceeded(family, limit, checkpoints):
    """RoBERTa's 66 rows of positions hold 64 tokens; its tokenizer here knows no limit."""
    model = PolyEncoder(checkpoints(family), num_codes=3, device="cpu")
    assert model.max_seq_length == limit
    assert model.preprocess(["y" * 500], task="query")["input_ids"].shape == (1, limit)
    model.encode_document(["y" * 500])


# --- loading a backbone -----------------------------------------------------------------------------------------------


def _class_state():
    return {
        (kind, name): repr(value)
        for kind in (PreTrainedModel, BertModel, *BertModel.__mro__)
        for name, value in vars(kind).items()
        if "keys_to_ignore" in name
    }


def test_loads_at_once_leave_the_classes_as_they_are(checkpoints, tmp_path, monkeypatch):
    """Which keys to be quiet about was set on upstream's class; of two loads that overlap, one left it there."""
    BertModel.from_pretrained(checkpoints("bert"), add_pooling_layer=True).save_pretrained(tmp_path)
    before, both_are_in, models = _class_state(), threading.Barrier(2, timeout=30), []
    original, one_at_a_time = PreTrainedModel.from_pretrained.__func__, threading.Lock()

    def overlapping(cls, *args, **kwargs):
        both_are_in.wait()
        try:
            with one_at_a_time:  # upstream's own loading is not made for threads, and would leave tensors without data
                return original(cls, *args, **kwargs)
        finally:
            both_are_in.wait()
            assert _class_state() == before

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(overlapping))
    load = configuration_poly_encoder.load_backbone
    threads = [threading.Thread(target=lambda: models.append(load(str(tmp_path)))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [type(model) for model in models] == [BertModel, BertModel]
    assert _class_state() == before


def test_loading_says_nothing_of_poolers_but_of_other_strangers(checkpoints, tmp_path, caplog):
    model = AutoModel.from_pretrained(checkpoints("bert"))
    model.stranger = torch.nn.Linear(2, 2)
    model.save_pretrained(tmp_path)
    configuration_poly_encoder.load_backbone(checkpoints("bert"))
    assert caplog.text == ""
    configuration_poly_encoder.load_backbone(tmp_path)
    assert "stranger" in caplog.text
    assert "pooler" not in caplog.text
