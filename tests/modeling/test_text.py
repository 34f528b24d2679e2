"""From texts and conversations to tokens: every form that is taken, what is refused, and where long texts are cut."""

import json
import string
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

import tiny
from poly_encoders import BiEncoder, CrossEncoder, PolyEncoder
from poly_encoders.modeling import text_poly_encoder
from poly_encoders.modeling.pipeline_poly_encoder import by_length
from poly_encoders.modeling.text_poly_encoder import (
    NoTokensError,
    candidate_texts,
    checked_count,
    checked_text,
    context_text,
    context_texts,
    make_ready,
    tokenized,
)
from poly_encoders.two_sided import is_single_context

CLASSES = [PolyEncoder, BiEncoder, CrossEncoder]
TURNS = ["hello", "hi, how are you?"]
MESSAGES = [{"role": "user", "content": turn} for turn in TURNS]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "weather", "arguments": "{}"}}]}
WITHOUT_CONTENT = {"role": "assistant", "tool_calls": CALL["tool_calls"]}
SPOKEN_CALL = {**CALL, "content": "Let me look."}

# --- texts and conversations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turns", [TURNS, tuple(TURNS), deque(TURNS), np.array(TURNS), np.array(TURNS, dtype=object)])
def test_any_sequence_of_turns_will_do(turns):
    assert context_text(turns) == context_text(MESSAGES) == context_text(deque(MESSAGES)) == "hello\nhi, how are you?"
    assert context_text(turns, " | ") == "hello | hi, how are you?"
    assert context_texts([turns, MESSAGES], " | ") == [context_text(turns, " | ")] * 2


def test_one_turn():
    parts = [{"type": "text", "text": "look"}, {"type": "text", "text": "here"}]
    message = {"role": "user", "content": parts}
    for context in ("look here", ["look here"], message, [message]):
        assert context_text(context, " | ") == "look here"


@pytest.mark.parametrize(
    "silent",
    [CALL, WITHOUT_CONTENT, {**CALL, "content": ""}, {"role": "assistant", "content": None}, {"function_call": {}}],
)
def test_messages_that_say_nothing_are_left_out(silent):
    """A call of a tool, whose content is None, once spoilt the whole conversation."""
    conversation = [MESSAGES[0], silent, {"role": "tool", "content": "rain"}, MESSAGES[1]]
    assert context_text(conversation) == "hello\nrain\nhi, how are you?"
    assert context_text([*conversation, silent], max_turns=2) == "rain\nhi, how are you?"
    with pytest.raises(ValueError, match="without a single turn"):
        context_text([silent])


def test_a_call_that_says_something_and_an_empty_turn_stay():
    assert context_text([MESSAGES[0], SPOKEN_CALL]) == "hello\nLet me look."
    assert context_text(["hello", "", "you"]) == "hello\n\nyou"
    assert context_text([MESSAGES[0], {"role": "user", "content": ""}]) == "hello\n"


def test_a_batch_is_the_outermost_list():
    assert context_texts(TURNS) == TURNS
    assert context_texts([TURNS, "x", MESSAGES]) == [context_text(TURNS), "x", context_text(MESSAGES)]
    assert context_texts(np.array(["a", "b"])) == context_texts(text for text in "ab") == ["a", "b"]
    assert context_texts(()) == []


def test_what_is_one_context_and_what_a_batch():
    assert all(map(is_single_context, ["hello", MESSAGES, MESSAGES[0], tuple(MESSAGES), deque(MESSAGES)]))
    assert not any(map(is_single_context, [TURNS, [TURNS], [MESSAGES], [], ("a",), np.array(["a"])]))


@pytest.mark.parametrize(
    ("context", "error", "said"),
    [
        (None, TypeError, "NoneType"),
        (7, TypeError, "int: 7"),
        (b"bytes", TypeError, "bytes"),
        (bytearray(b"bytes"), TypeError, "bytearray"),
        ({"hello"}, TypeError, "set"),
        (np.array("hello"), TypeError, "ndarray"),
        ([], ValueError, "without a single turn"),
        (deque(), ValueError, "without a single turn"),
        (np.array([]), ValueError, "without a single turn"),
        (["hello", None], TypeError, "Turn 1"),
        (["hello", b"bytes"], TypeError, "Turn 1"),
        (np.array([3.5]), TypeError, "Turn 0"),
        ([{"role": "user"}], ValueError, "no 'content'"),
        ([{"role": "user", "tool_calls": None}], ValueError, "no 'content'"),
        ([{"role": "user", "content": []}], ValueError, "no content at all"),
        ([{"role": "user", "content": 3}], TypeError, "content of message 0"),
        ([{"role": "user", "content": [{"type": "image"}]}], TypeError, "part of message 0"),
        ("\ud83d", ValueError, "lone surrogate"),
        (["fine", "not \udc00"], ValueError, "Turn 1 holds a lone surrogate"),
    ],
)
def test_bad_contexts_are_named(context, error, said):
    with pytest.raises(error, match=said):
        context_text(context)
    with pytest.raises(error, match=f"Item 1 of the list.*{said}"):
        context_texts(["fine", context])


@pytest.mark.parametrize("candidates", ["one text", b"bytes", None, 5, {"a": 1}, {"a"}, np.array("a")])
def test_candidates_are_a_list(candidates):
    with pytest.raises(TypeError, match="Expected a list of texts"):
        candidate_texts(candidates)
    with pytest.raises(TypeError, match=r"Item 2 of the list.*must be a string"):
        candidate_texts(["a", "b", candidates] if not isinstance(candidates, str) else ["a", "b", 3])


def test_surrogates_can_be_repaired_as_the_error_says():
    assert checked_text("\U0001f600 ok") == "\U0001f600 ok"
    broken = "\ud83d\ude00 half: \ud83d"
    with pytest.raises(ValueError, match="lone surrogate"):
        checked_text(broken)
    assert checked_text(broken.encode("utf-16", "surrogatepass").decode("utf-16", "replace")) == "😀 half: \ufffd"


@pytest.mark.parametrize(
    ("max_turns", "text"), [(None, "a\nb\nc"), (1, "c"), (2, "b\nc"), (3, "a\nb\nc"), (9, "a\nb\nc")]
)
def test_the_last_turns_are_kept(max_turns, text):
    messages = [{"role": "user", "content": turn} for turn in "abc"]
    for turns in (["a", "b", "c"], messages, deque("abc"), np.array(["a", "b", "c"])):
        assert context_text(turns, max_turns=max_turns) == text
    assert context_texts([["a", "b", "c"], "d\ne\nf"], max_turns=max_turns) == [text, "d\ne\nf"]


def test_counts():
    assert [checked_count(value, "top_k", least=0) for value in (None, 0, 7, np.int64(2))] == [None, 0, 7, 2]
    assert type(checked_count(np.int64(2), "top_k")) is int
    for value in (0, -3, True, 1.5, "2", np.float64(2)):
        with pytest.raises(ValueError, match="max_turns must be a whole number, at least 1"):
            checked_count(value, "max_turns")


@pytest.mark.parametrize("model_class", CLASSES)
def test_every_model_keeps_its_last_turns(model_class, checkpoints, tmp_path):
    turns, candidates = ["first", "second", "third"], ["yes", "no"]
    model_class(checkpoints(), device="cpu", max_turns=np.int64(2)).save_pretrained(str(tmp_path))
    model = model_class(str(tmp_path), device="cpu")
    assert model.max_turns == 2
    assert model.rank(turns, candidates) == model.rank(deque(turns), candidates) == model.rank(turns[1:], candidates)
    assert model.rank(turns, candidates) != model.rank(turns[2:], candidates)
    every_turn = model_class(str(tmp_path), device="cpu", max_turns=3)
    assert every_turn.rank(turns, candidates) == model.rank("first\nsecond\nthird", candidates)
    with pytest.raises(ValueError, match="max_turns"):
        model_class(str(tmp_path), device="cpu", max_turns=0)


def test_a_poly_encoder_takes_over_a_bi_encoders_turns(checkpoints, tmp_path):
    BiEncoder(checkpoints(), device="cpu", max_turns=4, turn_separator=" | ").save_pretrained(str(tmp_path))
    model = PolyEncoder(str(tmp_path), device="cpu")
    assert (model.max_turns, model.turn_separator) == (4, " | ")


@pytest.mark.parametrize("model_class", CLASSES)
def test_a_text_is_looked_at_once_on_its_way(model_class, checkpoints, monkeypatch):
    """It was checked in rank, in encode, in preprocess and in the module, four times in all."""
    model, looked_at = model_class(checkpoints(), device="cpu"), []

    def counted(text, *rest):
        if type(text) is not text_poly_encoder.CheckedText:
            looked_at.append(text)
        return checked_text(text, *rest)

    monkeypatch.setattr(text_poly_encoder, "checked_text", counted)
    model.rank(TURNS, ["yes", "no", "yes"])
    assert sorted(looked_at) == sorted([*TURNS, "yes", "no", "yes"])


# --- tokens -----------------------------------------------------------------------------------------------------------


@cache
def tokenizer_of(kind):
    """A tokenizer with the special tokens that it puts before and after a text."""
    if kind == "python":  # one token a byte, and no backend that could tell where each stands
        return ByT5Tokenizer(), [], [1]
    if kind == "words":
        backend = Tokenizer(models.WordLevel({"<unk>": 0, "<pad>": 1, "</s>": 2, "a": 3, "ask": 4, "it": 5}, "<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
        return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>"), [], [2]
    specials = ([], []) if kind == "bare" else ([0], [2])
    return tiny.make_tokenizer(left=kind == "bare"), *specials


def one_by_one(kind, text, limit, side, prompt):
    """The tokens of a text, those that are too many taken off singly; None where the prompt leaves no room."""
    tokenizer, before, after = tokenizer_of(kind)
    opening = len(tokenizer.tokenize(prompt or ""))
    ids = tokenizer.convert_tokens_to_ids(tokenizer.tokenize((prompt or "") + text))
    while len(before) + len(ids) + len(after) > limit:
        if opening >= len(ids):
            return None
        del ids[opening if side == "left" else -1]
    return before + ids + after


@given(
    kind=st.sampled_from(["characters", "bare", "words", "python"]),
    texts=st.lists(st.text("aé it", max_size=15), min_size=1, max_size=4),
    limit=st.integers(1, 14),
    side=st.sampled_from(["left", "right"]),
    prompt=st.sampled_from([None, "", "q", "ask it "]),
)
@example(kind="characters", texts=["it is a text"], limit=12, side="left", prompt="ask it ")
def test_cutting_is_taking_tokens_off_one_by_one(kind, texts, limit, side, prompt):
    tokenizer, before, after = tokenizer_of(kind)
    full = len(before) + len(tokenizer.tokenize(prompt or "")) + len(after) >= limit
    expected = [one_by_one(kind, text, limit, side, prompt) for text in texts]
    if full or not all(expected):
        error, said = (ValueError, "alone fills? the") if full else (NoTokensError, "has no token")
        with pytest.raises(error, match=said):
            tokenized(tokenizer, texts, limit, side, prompt)
        return
    found = tokenized(tokenizer, texts, limit, side, prompt)
    rows = [row[mask.bool()].tolist() for row, mask in zip(found["input_ids"], found["attention_mask"], strict=True)]
    assert rows == expected
    assert found["input_ids"].dtype == found["attention_mask"].dtype == torch.int64
    assert (found["attention_mask"].diff() <= 0).all()  # padding is on the right
    assert found["input_ids"].shape[1] == max(map(len, expected))


@pytest.mark.parametrize("limit", [1, 2])
def test_no_room_beside_special_tokens(limit):
    with pytest.raises(ValueError, match=f"Special tokens alone fill the {limit} tokens"):
        tokenized(tiny.make_tokenizer(), ["hello"], limit, "right")


def test_the_space_after_a_prompt_brings_back_no_word_that_was_cut():
    """Byte-level tokenizers write a word and the space before it as one token: "ask: one" is no "ask: " and "one"."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    words = "ask: one two three four five six"
    trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    backend.train_from_iterator([words] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="!")
    assert [len(tokenizer.tokenize(text)) for text in ("ask: ", "ask:", words)] == [3, 2, 8]
    (ids,) = tokenized(tokenizer, ["one two three four five six"], 6, "left", "ask: ")["input_ids"]
    assert tokenizer.decode(ids) == "ask: three four five six"


def test_segments_and_a_mask_whatever_the_tokenizer_prefers():
    tokenizer = tiny.make_tokenizer(model_input_names=["input_ids", "token_type_ids"])
    tokenizer.padding_side = "left"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s>:3 $A:1 </s>:2", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    found = tokenized(tokenizer, ["ab", "abcdef"], 6, "right")
    assert found["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]
    assert found["token_type_ids"].tolist() == [[3, 1, 1, 2, 0, 0], [3, 1, 1, 1, 1, 2]]


def test_threads_share_a_tokenizer():
    """Each cut another one's texts, at its length and on its side, or met the tokenizer while it was borrowed."""
    tokenizer = tiny.make_tokenizer()
    texts = [string.ascii_letters[place:] * (1 + place % 4) for place in range(12)]
    asked = [
        (texts[place % 5 :][:4], 9 + 3 * (place % 7), ("left", "right")[place % 2], (None, "q: ", "a: ")[place % 3])
        for place in range(240)
    ]
    expected = [tokenized(tokenizer, *each)["input_ids"] for each in asked]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda each: tokenized(tokenizer, *each)["input_ids"], asked))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_orders_to_cut_and_pad_that_were_saved_are_cleared(tmp_path):
    tokenizer = tiny.make_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.backend_tokenizer.truncation is not None
    make_ready(loaded)
    loaded.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    assert saved["truncation"] is saved["padding"] is None
    assert len(tokenized(loaded, ["a much longer text"], 50, "left")["input_ids"][0]) == 20


def test_padding_with_the_end_token():
    tokenizer = tiny.make_tokenizer(pad=False)
    make_ready(tokenizer)
    assert tokenizer.pad_token == tokenizer.eos_token
    with pytest.raises(ValueError, match="neither a padding token nor an end token"):
        make_ready(tiny.make_tokenizer(pad=False, eos=False))


@given(st.lists(st.integers(0, 9), max_size=20), st.integers(1, 7))
def test_batches_of_like_length(lengths, batch_size):
    batches = list(by_length(["x" * length for length in lengths], batch_size))
    assert sorted(place for batch in batches for place in batch) == list(range(len(lengths)))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert [lengths[place] for batch in batches for place in batch] == sorted(lengths, reverse=True)
