"""Contexts in all their forms."""

import numpy as np
import pytest
from huggingface_hub.errors import StrictDataclassError

from poly_encoders import BiEncoder, CrossEncoder, PolyEncoder
from poly_encoders.conversations import candidate_texts, checked_text, context_text, context_texts, is_single_context

MESSAGES = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi, how are you?"}]
TURNS = ["hello", "hi, how are you?"]


def test_turns_and_messages_make_the_same_text():
    assert context_text(TURNS) == context_text(MESSAGES) == context_text("hello\nhi, how are you?")


def test_the_separator_is_put_between_turns():
    assert context_text(TURNS, " | ") == "hello | hi, how are you?"
    assert context_text(["hello"], " | ") == "hello"


def test_parts_of_a_message_are_joined():
    parts = [{"type": "text", "text": "look"}, {"type": "text", "text": "here"}]
    assert context_text([{"role": "user", "content": parts}]) == "look here"


def test_a_batch_is_the_outermost_list():
    assert context_texts(TURNS) == TURNS
    assert context_texts([TURNS, "x", MESSAGES]) == [context_text(TURNS), "x", context_text(MESSAGES)]
    assert context_texts(np.array(["a", "b"])) == ["a", "b"]
    assert context_texts(()) == []


@pytest.mark.parametrize("single", ["hello", MESSAGES, MESSAGES[0]])
def test_what_is_one_context(single):
    assert is_single_context(single)


@pytest.mark.parametrize("batch", [TURNS, [TURNS], [MESSAGES], [], ("a",)])
def test_what_is_a_batch(batch):
    assert not is_single_context(batch)


@pytest.mark.parametrize(
    ("context", "error", "said"),
    [
        (None, TypeError, "NoneType"),
        (7, TypeError, "int: 7"),
        ([], ValueError, "without a single turn"),
        (["hello", None], TypeError, "Turn 1"),
        (["hello", 3.5], TypeError, "float: 3.5"),
        ([{"role": "user"}], ValueError, "no 'content'"),
        ([{"role": "user", "content": None}], TypeError, "message 0"),
        ([{"role": "user", "content": [{"type": "image"}]}], TypeError, "part of message 0"),
        ("\ud83d", ValueError, "lone surrogate"),
        (["fine", "not \udc00"], ValueError, "Turn 1 holds a lone surrogate"),
        (b"bytes", TypeError, "bytes"),
    ],
)
def test_bad_contexts_are_named(context, error, said):
    with pytest.raises(error, match=said):
        context_text(context)


def test_a_bad_item_of_a_batch_is_named_by_its_place():
    with pytest.raises(TypeError, match=r"Item 1 of the list.*NoneType"):
        context_texts(["a", None])
    with pytest.raises(TypeError, match=r"Item 2 of the list.*must be a string.*int: 3"):
        candidate_texts(["a", "b", 3])


@pytest.mark.parametrize("candidates", ["one text", None, 5, {"a": 1}])
def test_candidates_are_a_list(candidates):
    with pytest.raises(TypeError, match="Expected a list of texts"):
        candidate_texts(candidates)


def test_real_characters_beyond_the_first_plane_are_fine():
    assert checked_text("\U0001f600 ok") == "\U0001f600 ok"


def test_the_advice_for_surrogates_works():
    broken = "\ud83d\ude00 half: \ud83d"
    assert (
        checked_text(broken.encode("utf-16", "surrogatepass").decode("utf-16", "replace")) == "\U0001f600 half: \ufffd"
    )


@pytest.mark.parametrize(
    ("max_turns", "text"), [(None, "a\nb\nc"), (1, "c"), (2, "b\nc"), (3, "a\nb\nc"), (9, "a\nb\nc")]
)
def test_the_last_turns_are_kept(max_turns, text):
    assert context_text(["a", "b", "c"], max_turns=max_turns) == text
    messages = [{"role": "user", "content": turn} for turn in "abc"]
    assert context_text(messages, max_turns=max_turns) == text
    assert context_texts([["a", "b", "c"], "d\ne\nf"], max_turns=max_turns) == [text, "d\ne\nf"]


@pytest.mark.parametrize("model_class", [PolyEncoder, BiEncoder, CrossEncoder])
def test_every_model_keeps_its_last_turns(model_class, checkpoints, tmp_path):
    turns, candidates = ["first", "second", "third"], ["yes", "no"]
    model_class(checkpoints(), device="cpu", max_turns=2).save_pretrained(str(tmp_path))
    model = model_class(str(tmp_path), device="cpu")
    assert model.max_turns == 2

    def scores(model, context):
        return [entry["score"] for entry in model.rank(context, candidates)]

    assert scores(model, turns) == scores(model, turns[1:])
    assert scores(model, turns) != pytest.approx(scores(model, turns[2:]), rel=1e-4)
    every_turn = model_class(str(tmp_path), device="cpu", max_turns=3)
    assert scores(every_turn, turns) == pytest.approx(scores(model, "first\nsecond\nthird"), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("model_class", [PolyEncoder, BiEncoder, CrossEncoder])
@pytest.mark.parametrize("value", [0, -1, True])
def test_a_number_of_turns_that_cannot_be_kept(model_class, value, checkpoints):
    with pytest.raises((ValueError, StrictDataclassError), match="max_turns"):
        model_class(checkpoints(), device="cpu", max_turns=value)


def test_a_poly_encoder_takes_over_a_bi_encoders_turns(checkpoints, tmp_path):
    BiEncoder(checkpoints(), device="cpu", max_turns=4, turn_separator=" | ").save_pretrained(str(tmp_path))
    model = PolyEncoder(str(tmp_path), device="cpu")
    assert (model.max_turns, model.turn_separator) == (4, " | ")
