"""`PolyEncoder.explain`: the numbers behind a score, and the tokens they belong to."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForTextEncoding, ByT5Tokenizer, T5Config

from paper import dot, softmax, weighted_sum
from parlai_original import FIXTURES
from poly_encoders import PolyEncoder
from poly_encoders.parlai import convert_parlai_checkpoint

TURNS = ["hi there", "do you like tea?"]
KINDS = ["learnt_codes", "first_m", "last_m", "first_and_last_m", "turns", "turns_and_codes"]


@pytest.fixture
def make(checkpoints):
    """A function that builds a tiny model of any options."""

    def build(family="bert", **options):
        torch.manual_seed(0)
        own = {"code_std": 1.0, **options.pop("config_kwargs", {})}
        chosen = {"context_vectors": "learnt_codes", "num_codes": 4, "turn_separator": "\n", **options}
        return PolyEncoder(checkpoints(family), device="cpu", config_kwargs=own, **chosen)

    return build


def explained(model, context, candidate, **options):
    """The explanation, whose score is the one that `rank` gives."""
    why = model.explain(context, candidate, **options)
    (entry,) = model.rank(context, [candidate], **options)
    assert why.score == pytest.approx(entry["score"], rel=1e-5, abs=1e-5)
    return why


@pytest.mark.parametrize(("share_encoders", "attention"), [(True, "basic"), (False, "sqrt")])
def test_it_follows_the_paper(make, share_encoders, attention):
    """Against loops over the formula, in the model's own hidden states and codes."""
    attentions = {"code_attention": attention, "final_attention": attention}
    model = make(share_encoders=share_encoders, normalize=False, config_kwargs=attentions)
    with torch.no_grad():
        for encoder in {model[0].model.context_encoder, model[0].model.candidate_encoder}:
            for parameter in encoder.parameters():  # apart, and far from even attention
                parameter.add_(0.1 * torch.randn_like(parameter))
    why = model.explain(TURNS, "yes, green tea")
    hidden = model.encode_query([TURNS], output_value="token_embeddings")[0].tolist()
    x = model.encode_document("yes, green tea").tolist()
    scale = model[0].config.hidden_size ** -0.5 if attention == "sqrt" else 1.0
    looks = [softmax([scale * dot(code, h) for h in hidden]) for code in model[0].model.codes.tolist()]
    dots = [dot(x, weighted_sum(row, hidden)) for row in looks]
    decided = softmax([scale * number for number in dots])
    np.testing.assert_allclose(why.code_attention, looks, atol=1e-5)
    np.testing.assert_allclose(why.dots, dots, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(why.final_attention, decided, atol=1e-4)
    np.testing.assert_allclose(why.token_weights, weighted_sum(decided, looks), atol=1e-4)
    assert why.score == pytest.approx(dot(decided, dots), abs=1e-3)


@pytest.mark.parametrize(("kind", "dtype"), [*((kind, torch.float32) for kind in KINDS), (KINDS[0], torch.bfloat16)])
def test_what_always_holds(make, kind, dtype):
    model = make(context_vectors=kind, num_codes=5).to(dtype)
    rows = model[0].config.num_context_vectors
    for context in (TURNS, "a", "", [{"role": "user", "content": "hello?"}], "long " * 40):
        why = explained(model, context, "some tea")
        real = model.encode_query([context]).reshape(rows, -1).any(axis=1)
        assert why.code_attention.shape == (rows, len(why.tokens))
        assert len(why.offsets) == len(why.special) == len(why.turns) == len(why.token_weights) == len(why.tokens)
        assert [name == "padding" for name in why.vectors] == (~real).tolist()
        np.testing.assert_allclose(why.code_attention.sum(axis=1), real.astype(float), atol=1e-5)
        assert why.final_attention.sum() == pytest.approx(1, abs=1e-5)
        assert why.token_weights.sum() == pytest.approx(1, abs=1e-5)
        assert (why.final_attention @ why.dots) == pytest.approx(why.score, rel=1e-5, abs=1e-4)
        assert not why.final_attention[~real].any()
        assert not why.dots[~real].any()
        assert {array.dtype for array in vars(why).values() if isinstance(array, np.ndarray)} == {np.dtype("float32")}


@pytest.mark.parametrize(
    ("options", "context", "vectors"),
    [
        ({}, TURNS, ["turn 1: hi there", "turn 2: do you like tea?"]),
        ({}, "hi there\ndo you like tea?", ["turn 1: hi there", "turn 2: do you like tea?"]),
        ({}, ["a\nb", "c"], ["turn 1: a\nb", "turn 2: c"]),  # a separator inside a turn
        ({}, ["", "c"], ["turn 2: c"]),
        ({}, "", ["turn 1"]),
        ({}, [*"abcdef"], ["turn 3: c", "turn 4: d", "turn 5: e", "turn 6: f"]),
        ({"max_turns": 2}, [*"abc"], ["turn 1: b", "turn 2: c"]),
        ({"max_context_length": 8}, ["long one", "too", "a"], ["turn 2: too", "turn 3: a"]),
        ({"max_context_length": 9, "prompts": {"query": "q:"}}, ["long one", "ab", "c"], ["turn 2: ab", "turn 3: c"]),
        ({"config_kwargs": {"max_turn_length": 3}}, ["abcde", "f"], ["turn 1: abc", "turn 1: de", "turn 2: f"]),
        ({"context_vectors": "turns_and_codes", "num_codes": 1}, TURNS, ["turn 2: do you like tea?", "code 0"]),
    ],
)
def test_turns_have_names(make, options, context, vectors):
    why = explained(make(**{"context_vectors": "turns", "last_turn_share": 0.0, **options}), context, "tea")
    assert [name for name in why.vectors if name != "padding"] == vectors
    for name, weights in zip(why.vectors, why.code_attention, strict=True):
        turn, _, text = name.partition(": ")
        if turn.startswith("turn") and text:
            inside = [token for token, weight in zip(why.tokens, weights, strict=True) if weight]
            assert "".join(inside) == text
            assert {number for number, weight in zip(why.turns, weights, strict=True) if weight} == {int(turn[5:])}


def test_the_last_turn_has_its_share_of_each(make):
    plain, mixed = (
        make(context_vectors="turns", last_turn_share=share).explain(["ab", "c"], "x") for share in (0, 0.5)
    )
    ab, c = plain.code_attention[:2]
    np.testing.assert_allclose(mixed.code_attention[:2], [(ab + c) / 2, c])
    assert plain.vectors == mixed.vectors


def test_tokens_taken_as_they_are(make):
    for kind, rows in (("first_m", [0, 1, 2, 3]), ("last_m", [1, 2, 3, 4]), ("first_and_last_m", [0, 1, 2, 3, 4])):
        looks = make(context_vectors=kind).explain("abc", "x").code_attention  # <s> a b c </s>
        np.testing.assert_array_equal(looks, np.eye(5)[rows])
    short = make(context_vectors="first_m", num_codes=8).explain("abc", "x")
    np.testing.assert_array_equal(short.code_attention, np.eye(8, 5))
    assert short.vectors == [
        "token 0: <s>",
        "token 1: a",
        "token 2: b",
        "token 3: c",
        "token 4: </s>",
        *["padding"] * 3,
    ]


@pytest.mark.parametrize(
    ("options", "context", "text", "tokens"),
    [
        ({}, ["hi", "é?"], "hi\né?", ["<s>", "h", "i", "\n", "é", "?", "</s>"]),  # é itself, not <unk>
        ({}, "a</s>b", "a</s>b", ["<s>", "a", "</s>", "b", "</s>"]),
        ({}, "", "", ["<s>", "</s>"]),
        ({"max_context_length": 6, "max_turns": 1}, ["one", "and two"], "and two", ["<s>", *" two", "</s>"]),
        ({"max_context_length": 6, "prompts": {"query": "q:"}}, "hello", "q:hello", ["<s>", *"q:lo", "</s>"]),
        ({"family": "qwen3", "max_context_length": 64, "max_candidate_length": 64}, "hello", "hello", list("hello")),
    ],
)
def test_tokens_are_read_as_text(make, options, context, text, tokens):
    why = explained(make(**options), context, "x")
    assert why.text == text
    assert why.tokens == tokens
    assert why.special == [token in ("<s>", "</s>") for token in tokens]
    for token, (start, end) in zip(tokens, why.offsets, strict=True):
        assert text[start:end] == token or ((start, end) == (0, 0) and token in ("<s>", "</s>"))


def test_prompts(make):
    model = make(prompts={"query": "q: ", "short": "? ", "document": "d: "}, default_prompt_name="short")
    given = (({}, "q: "), ({"prompt_name": "short"}, "? "), ({"prompt": "! "}, "! "), ({"prompt": ""}, ""))
    for options, prompt in given:
        assert explained(model, "hello", "tea", **options).text == prompt + "hello"
    del model.prompts["query"]
    assert explained(model, "hello", "tea").text == "? hello"
    with pytest.raises(ValueError, match="no prompt 'query'"):
        model.explain("hello", "tea", prompt_name="query")


def test_a_tokenizer_that_cannot_tell_places(tmp_path):
    """ByT5's is written in Python: bytes, none of them with an offset."""
    config = T5Config(vocab_size=384, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    AutoModelForTextEncoding.from_config(config).save_pretrained(tmp_path)
    ByT5Tokenizer().save_pretrained(tmp_path)
    why = explained(PolyEncoder(str(tmp_path), num_codes=4, device="cpu"), ["a bc", "hé"], "x")
    assert why.vectors == ["turn 1: a bc", "turn 2: hé", "padding", "padding"]
    assert why.turns == [1, 1, 1, 1, 0, 2, 2, 2, 0]
    codes = PolyEncoder(str(tmp_path), num_codes=4, context_vectors="learnt_codes", device="cpu")
    why = explained(codes, "hé", "x")
    assert why.turns == [1, 1, 1, 0]
    assert why.offsets is None
    assert len(why.tokens) == 4
    assert (why.tokens[0], why.tokens[-1]) == ("h", "</s>")
    assert all(why.tokens)
    assert why.special == [False, False, False, True]


def test_a_checkpoint_of_parlai(tmp_path):
    model = convert_parlai_checkpoint(FIXTURES / "poly_codes8", tmp_path / "converted")
    why = explained(model, ["Hi", "i like tea"], "no")
    assert len(why.tokens) == why.code_attention.shape[1]
    assert "tea" in "".join(why.tokens)


def test_what_it_refuses(poly_encoder):
    for context, candidate, error, message in (
        ("hi", ["a", "b"], TypeError, "One candidate is explained at a time.*list"),
        ("hi", None, TypeError, "One candidate"),
        ([], "x", ValueError, "without a single turn"),
        (3, "x", TypeError, "A context is"),
        ("hi", "\ud800", ValueError, "surrogate"),
    ):
        with pytest.raises(error, match=message):
            poly_encoder.explain(context, candidate)
