"""Contexts in all their forms."""

import numpy as np
import pytest

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
