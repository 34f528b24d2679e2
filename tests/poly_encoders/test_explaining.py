"""`PolyEncoder.explain`: the numbers behind a score, and the tokens they belong to."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForTextEncoding, ByT5Tokenizer, T5Config

import tiny
from parlai_original import FIXTURES
from poly_encoders import PolyEncoder
from poly_encoders.parlai import convert_parlai_checkpoint

TURNS = ["hi there", "do you like tea?"]
TEXT = "hi there\ndo you like tea?"
KINDS = ["learnt_codes", "first_m", "last_m", "first_and_last_m"]


@pytest.fixture
def make(checkpoints):
    """A function that builds a tiny model of any options."""

    def build(family="bert", **options):
        torch.manual_seed(0)
        own = {"code_std": 1.0, **options.pop("config_kwargs", {})}
        return PolyEncoder(checkpoints(family), device="cpu", config_kwargs=own, **{"num_codes": 4, **options})

    return build


def rank_score(model, context, candidate, **options):
    (entry,) = model.rank(context, [candidate], **options)
    return entry["score"]


def softmax(values):
    powers = [math.exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


@pytest.mark.parametrize("share_encoders", [True, False])
@pytest.mark.parametrize("attention", ["basic", "sqrt"])
def test_it_follows_the_paper(make, share_encoders, attention):
    """Against loops over the formula, in the model's own hidden states and codes."""
    attentions = {"code_attention": attention, "final_attention": attention}
    model = make(share_encoders=share_encoders, config_kwargs=attentions)
    with torch.no_grad():
        for encoder in {model[0].model.context_encoder, model[0].model.candidate_encoder}:
            for parameter in encoder.parameters():  # apart, and far from even attention
                parameter.add_(0.1 * torch.randn_like(parameter))
    why = model.explain(TURNS, "yes, green tea")
    hidden = model.encode_query([TEXT], output_value="token_embeddings")[0].double()
    x = torch.from_numpy(model.encode_document(["yes, green tea"])[0]).double()
    scale = model[0].config.hidden_size ** -0.5 if attention == "sqrt" else 1.0
    looks = [softmax([scale * float(code @ h) for h in hidden]) for code in model[0].model.codes.detach().double()]
    vectors = [sum(a * h for a, h in zip(row, hidden, strict=True)) for row in looks]
    dots = [float(x @ y) for y in vectors]
    decided = softmax([scale * dot for dot in dots])
    np.testing.assert_allclose(why.code_attention, looks, atol=1e-5)
    np.testing.assert_allclose(why.dots, dots, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(why.final_attention, decided, atol=1e-4)
    tokens = [sum(w * row[j] for w, row in zip(decided, looks, strict=True)) for j in range(len(hidden))]
    np.testing.assert_allclose(why.token_weights, tokens, atol=1e-4)
    assert why.score == pytest.approx(sum(w * d for w, d in zip(decided, dots, strict=True)), abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("context", [TURNS, "a", [{"role": "user", "content": "hello?"}], "long " * 40])
def test_what_always_holds(make, kind, context):
    model = make(context_vectors=kind, num_codes=5)
    why = model.explain(context, "some tea")
    rows, length = 5 + (kind == "first_and_last_m"), len(why.tokens)
    real = model.encode_query([context] if isinstance(context, list) else context).reshape(rows, -1).any(axis=1)
    assert why.code_attention.shape == (rows, length)
    assert len(why.offsets) == len(why.special) == len(why.token_weights) == length
    assert why.score == pytest.approx(rank_score(model, context, "some tea"), abs=1e-5)
    np.testing.assert_allclose(why.code_attention.sum(axis=1), real.astype(float), atol=1e-5)
    assert why.final_attention.sum() == pytest.approx(1, abs=1e-5)
    assert why.token_weights.sum() == pytest.approx(1, abs=1e-5)
    assert (why.final_attention @ why.dots) == pytest.approx(why.score, abs=1e-4)
    np.testing.assert_allclose(why.token_weights, why.final_attention @ why.code_attention, atol=1e-5)
    assert not why.final_attention[~real].any()
    assert not why.dots[~real].any()
    assert all(array.dtype == np.float32 for array in (why.code_attention, why.final_attention, why.dots))


def test_tokens_taken_as_they_are(make):
    first = make(context_vectors="first_m").explain("abc", "x").code_attention
    last = make(context_vectors="last_m").explain("abc", "x").code_attention
    both = make(context_vectors="first_and_last_m").explain("abc", "x").code_attention
    np.testing.assert_array_equal(first, np.eye(5)[:4])  # <s> a b c </s>
    np.testing.assert_array_equal(last, np.eye(5)[1:])
    np.testing.assert_array_equal(both, np.eye(5)[[0, 1, 2, 3, 4]])
    short = make(context_vectors="first_m", num_codes=8).explain("abc", "x").code_attention
    np.testing.assert_array_equal(short[:5], np.eye(5))
    assert not short[5:].any()


def test_tokens_are_read_as_text(make):
    why = make().explain(TURNS, "x")
    assert why.text == TEXT
    assert why.tokens == ["<s>", *TEXT, "</s>"]
    assert why.special == [True, *[False] * len(TEXT), True]
    assert why.offsets == [(0, 0), *[(i, i + 1) for i in range(len(TEXT))], (0, 0)]


def test_what_was_cut_off_is_not_there(make):
    why = make(max_context_length=6, max_turns=1).explain(["first", "and second"], "x")
    assert why.text == "and second"
    assert why.tokens == ["<s>", *"cond", "</s>"]
    assert [why.text[start:end] for start, end in why.offsets[1:-1]] == list("cond")


def test_unknown_text_and_special_tokens_in_it(make):
    why = make().explain("é</s>x", "x")
    assert why.tokens == ["<s>", "é", "</s>", "x", "</s>"]  # the piece itself, not <unk>
    assert why.special == [True, False, True, False, True]
    assert why.offsets[1:4] == [(0, 1), (1, 5), (5, 6)]


def test_padding_on_the_left_is_left_out(make):
    """A causal backbone, whose tokenizer pads to a multiple: explained are the tokens alone."""
    model = make("qwen3", max_context_length=64, max_candidate_length=64)
    plain = model.explain("hello", "x")
    assert plain.tokens == list("hello")
    call = type(model.tokenizer).__call__
    model.tokenizer.__class__ = type(
        "Padded",
        (type(model.tokenizer),),
        {"__call__": lambda self, *a, **o: call(self, *a, **o, pad_to_multiple_of=8)},
    )
    padded = model.explain("hello", "x")
    assert model.preprocess(["hello"], task="query")["input_ids"].shape == (1, 8)
    assert padded.tokens == plain.tokens
    assert padded.offsets == plain.offsets
    np.testing.assert_allclose(padded.code_attention, plain.code_attention, atol=1e-5)
    assert padded.score == pytest.approx(plain.score, abs=1e-4)


def test_prompts(make):
    model = make(prompts={"query": "q: ", "short": "? "}, default_prompt_name="short")
    candidate = "tea"
    for options, prompt in (
        ({}, "q: "),
        ({"prompt_name": "short"}, "? "),
        ({"prompt": "! "}, "! "),
        ({"prompt": ""}, ""),
    ):
        why = model.explain("hello", candidate, **options)
        assert why.text == prompt + "hello"
        assert why.score == pytest.approx(rank_score(model, "hello", candidate, **options), abs=1e-5)
    del model.prompts["query"]
    assert model.explain("hello", candidate).text == "? hello"
    assert model.explain("hello", candidate).score == pytest.approx(rank_score(model, "hello", candidate), abs=1e-5)
    with pytest.raises(ValueError, match="no prompt 'query'"):
        model.explain("hello", candidate, prompt_name="query")


def test_the_candidates_own_prompt(make):
    model = make(prompts={"document": "d: "})
    assert model.explain("hello", "tea").score == pytest.approx(rank_score(model, "hello", "tea"), abs=1e-5)
    assert model.explain("hello", "tea").score != pytest.approx(make().explain("hello", "tea").score, abs=1e-5)


def test_a_tokenizer_that_cannot_tell_places(tmp_path):
    """ByT5's is written in Python: bytes, none of them with an offset."""
    config = T5Config(vocab_size=384, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    AutoModelForTextEncoding.from_config(config).save_pretrained(tmp_path)
    ByT5Tokenizer().save_pretrained(tmp_path)
    model = PolyEncoder(str(tmp_path), num_codes=4, device="cpu")
    why = model.explain("hé", "x")
    assert why.offsets is None
    assert len(why.tokens) == 4
    assert why.tokens[0] == "h"
    assert why.tokens[-1] == "</s>"
    assert all(why.tokens)
    assert why.special == [False, False, False, True]
    assert why.score == pytest.approx(rank_score(model, "hé", "x"), abs=1e-5)


def test_a_checkpoint_of_parlai(tmp_path):
    model = convert_parlai_checkpoint(FIXTURES / "poly_codes8", tmp_path / "converted")
    why = model.explain(["Hi", "i like tea"], "no")
    assert len(why.tokens) == why.code_attention.shape[1]
    assert "tea" in "".join(why.tokens)
    assert why.score == pytest.approx(rank_score(model, ["Hi", "i like tea"], "no"), abs=1e-5)


def test_half_precision_rows_still_sum_to_one(poly_encoder):
    why = poly_encoder.bfloat16().explain(TURNS, "tea")
    np.testing.assert_allclose(why.code_attention.sum(axis=1), 1, atol=1e-5)
    assert why.score == pytest.approx(rank_score(poly_encoder, TURNS, "tea"), rel=1e-4)


def test_it_leaves_the_model_as_it_was(poly_encoder):
    poly_encoder.tokenizer.truncation_side = "right"
    poly_encoder.explain("hello", "x")
    assert poly_encoder.tokenizer.truncation_side == "right"
    assert poly_encoder[0].model.codes.grad is None


@pytest.mark.parametrize(
    ("context", "candidate", "error", "message"),
    [
        ("hi", ["a", "b"], TypeError, "One candidate is explained at a time.*list"),
        ("hi", [], TypeError, "One candidate"),
        ("hi", None, TypeError, "One candidate"),
        ([], "x", ValueError, "without a single turn"),
        (3, "x", TypeError, "A context is"),
        ("hi", "\ud800", ValueError, "surrogate"),
    ],
)
def test_what_it_refuses(poly_encoder, context, candidate, error, message):
    with pytest.raises(error, match=message):
        poly_encoder.explain(context, candidate)


def test_empty_texts_have_their_special_tokens(poly_encoder):
    why = poly_encoder.explain("", "")
    assert why.tokens == ["<s>", "</s>"]
    assert why.score == pytest.approx(rank_score(poly_encoder, "", ""), abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_times_hidden_states_is_the_reduction(kind):
    """And padding, on either side, gets nothing."""
    model = tiny.poly_model(context_vectors=kind, num_codes=6)
    batch = tiny.token_batch(5, 9)
    hidden = torch.randn(5, 9, tiny.WIDTH)
    for left in (False, True):
        mask = batch["attention_mask"].flip(1) if left else batch["attention_mask"]
        weights = model.context_attention(hidden, mask)
        torch.testing.assert_close(weights @ hidden, model.reduce_context(hidden, mask))
        assert not weights.masked_select(mask[:, None] == 0).any()
