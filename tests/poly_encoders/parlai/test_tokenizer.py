"""ParlAI's ids, of any text."""

import contextlib
import json
import random
import re
import shutil
import sys
import unicodedata

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from parlai_original import FIXTURES, Original, sample_text, write_checkpoint
from poly_encoders import BiEncoder, PolyEncoder
from poly_encoders.modeling.text_poly_encoder import tokenized
from poly_encoders.parlai import ParlAITokenizer, convert_parlai_checkpoint
from poly_encoders.parlai.convert import take_apart
from poly_encoders.parlai.tokenizer import _FINAL_SIGMA, _WORD

CASES = ["poly_codes8", "bi_mean", "cross_first"]
LOWER = normalizers.Sequence([normalizers.Replace(Regex(_FINAL_SIGMA), "ς"), normalizers.Lowercase()])


@pytest.fixture(scope="module")
def originals():
    return {name: Original(FIXTURES / name) for name in CASES}


@pytest.fixture(scope="module")
def tokenizers():
    return {name: take_apart(FIXTURES / name / "model").tokenizer for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_texts_of_known_and_unknown_words(name, originals, tokenizers):
    rng = random.Random(0)
    texts = [sample_text(rng) for _ in range(200)]
    rows = tokenizers[name](texts, add_special_tokens=False)["input_ids"]
    assert rows == [originals[name].text_ids(text) for text in texts]
    for ids in (*rows, *tokenizers[name](texts)["input_ids"]):
        assert max(ids) < len(originals[name].ids)  # no alias


@given(
    text=st.text(alphabet=st.sampled_from("abhist_yoeun \n@</w>.,'0ÀΣσ\u0301\u0345ſßİ日\u001c\u00a0🙂"), max_size=30)
)
def test_any_text(text, originals, tokenizers):
    assert tokenizers["bi_mean"](text, add_special_tokens=False)["input_ids"] == originals["bi_mean"].text_ids(text)


def test_every_character_is_split_and_lowered_as_python_does():
    """Characters that this Python does not know yet may be letters to the library's newer Unicode tables."""
    split = pre_tokenizers.Split(Regex(_WORD), behavior="removed", invert=True)
    known = [chr(code) for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)) not in ("Cn", "Cs")]
    for start in range(0, len(known), 1000):
        words = [f"a{character}b" for character in known[start : start + 1000]]
        text = " ".join(words)
        assert [word for word, _ in split.pre_tokenize_str(text)] == re.findall(r"\w+|[^\w\s]", text)
        if LOWER.normalize_str(text) != text.lower():
            for word in words:
                found = LOWER.normalize_str(word)
                assert found == word.lower() or any(unicodedata.category(new) == "Cn" for new in found), hex(
                    ord(word[1])
                )


@pytest.mark.parametrize("text", ["ΟΔΟΣ", "ΑΣ'Σ Σ", "Σ", "ΑΣ.", "ΑΣΑ", "Σ́Σ", "ΑΣᴬ ͅΣ-"])
def test_the_sigma_that_ends_a_word(text):
    assert LOWER.normalize_str(text) == text.lower()


@contextlib.contextmanager
def cutting_on(tokenizer, side):
    tokenizer.truncation_side = side
    try:
        yield tokenizer
    finally:
        tokenizer.truncation_side = "left"


@pytest.mark.parametrize("length", [1, 2, 69, 70, 71, 72, 73, 100])
@pytest.mark.parametrize("side", ["left", "right"])
def test_long_texts_are_cut_as_the_original_cuts_them(length, side, originals, tokenizers):
    """A context keeps its end and both special tokens, a candidate its beginning, and perhaps no end token."""
    original, tokenizer = originals["bi_mean"], tokenizers["bi_mean"]
    text = tokenizer.decode(original.text_ids(" ".join(["tea", "you", "."] * 40))[:length])
    ids = original.text_ids(text)
    left, right = [original.start, *ids[-70:], original.end], [original.start, *ids, original.end][:72]
    with cutting_on(tokenizer, side):
        cut = tokenizer(text, truncation=True, max_length=72)["input_ids"]
    assert cut == (left if side == "left" else right)
    # The models of this package cut by themselves, and ask the tokenizer how.
    assert tokenized(tokenizer, [text], 72, side)["input_ids"][0].tolist() == cut


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_container_holds_the_same_ids(side, tokenizers):
    texts = ["a_b hello", "", "yes ! green tea is the best thing in the world .", "the"]
    with cutting_on(tokenizers["poly_codes8"], side) as tokenizer:
        one_by_one = [tokenizer(text, truncation=True, max_length=8)["input_ids"] for text in texts]
        rows = tokenizer(texts, truncation=True, max_length=8)["input_ids"]
        assert rows == one_by_one == [tokenizer.encode(text, truncation=True, max_length=8) for text in texts]
        assert max(map(len, rows)) == 8
        for kind in ("pt", "np"):
            features = tokenizer(texts, truncation=True, max_length=8, padding=True, return_tensors=kind)
            assert {tuple(value.shape) for value in features.values()} == {(4, 8)}
            for row, mask, ids in zip(features["input_ids"], features["attention_mask"], one_by_one, strict=True):
                assert row[mask == 1].tolist() == ids
                assert (row[mask == 0] == tokenizer.pad_token_id).all()
            single = tokenizer(texts[2], truncation=True, max_length=8, return_tensors=kind)["input_ids"]
            assert single.tolist() == [one_by_one[2]]
        wide = tokenizer(texts, truncation=True, max_length=12, padding="max_length", return_tensors="pt")
        assert wide["input_ids"].shape == (4, 12)
        assert wide["input_ids"].dtype == torch.int64


def test_what_else_can_be_asked_of_a_tokenizer_that_cuts_on_the_right(tokenizers):
    with cutting_on(tokenizers["bi_mean"], "right") as tokenizer:
        words = tokenizer(["tea", "you", "."], is_split_into_words=True, truncation=True, max_length=3)["input_ids"]
        assert words == tokenizer("tea you .", truncation=True, max_length=3)["input_ids"]
        measured = tokenizer(["tea you ."] * 2, truncation=True, max_length=4, return_length=True)
        assert measured["length"] == [len(row) for row in measured["input_ids"]] == [4, 4]
        single = tokenizer("tea you .", truncation=True, max_length=4, return_length=True)
        assert single["length"] == [4]
        assert single["input_ids"] == measured["input_ids"][0] == tokenizer.encode("tea you .")[:4]
        masked = tokenizer(["tea you .", "."], truncation=True, max_length=3, return_special_tokens_mask=True)
        assert masked["special_tokens_mask"] == [[1, 0, 0], [1, 0, 1]]


def test_an_empty_text_is_its_special_tokens(tokenizers, originals):
    original, tokenizer = originals["bi_mean"], tokenizers["bi_mean"]
    assert tokenizer("")["input_ids"] == [original.start, original.end]
    assert tokenizer(["", "hi"])["input_ids"][0] == [original.start, original.end]
    assert tokenized(tokenizer, ["", "hi"], 9, "right")["input_ids"][0, :2].tolist() == [original.start, original.end]


def test_save_and_load(tokenizers, tmp_path):
    tokenizers["cross_first"].save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is ParlAITokenizer
    rng = random.Random(2)
    texts = [sample_text(rng) for _ in range(20)]
    assert again(texts)["input_ids"] == tokenizers["cross_first"](texts)["input_ids"]
    again.add_tokens(["<speaker>"])  # keeps its id, though it comes after the aliases
    ids = again("<speaker> a_b", add_special_tokens=False)["input_ids"]
    assert ids == [len(again) - 1, *again("a_b", add_special_tokens=False)["input_ids"]]


def test_a_plain_fast_tokenizer_leads_to_the_same_vectors(tmp_path):
    """Without this package transformers loads a plain tokenizer, whose aliases have embeddings of their own."""
    convert_parlai_checkpoint(FIXTURES / "poly_codes8" / "model", tmp_path / "poly")
    model = PolyEncoder(str(tmp_path / "poly"), device="cpu")
    plain = PreTrainedTokenizerFast.from_pretrained(tmp_path / "poly")
    rng = random.Random(3)
    texts = [*(sample_text(rng, 6) for _ in range(30)), "a_b __start__ to", ""]
    for options in ((100, "left"), (9, "left"), (100, "right")):  # only cutting on the right takes our tokenizer
        ours, theirs = (tokenized(tokenizer, texts, *options)["input_ids"] for tokenizer in (model.tokenizer, plain))
        assert not torch.equal(ours, theirs)
        for encoder in (model[0].model.context_encoder, model[0].model.candidate_encoder):
            rows = encoder.get_input_embeddings().weight
            assert len(rows) == len(plain)
            assert torch.equal(rows[ours], rows[theirs])


def test_the_tokenizers_of_a_bi_encoder_cut_on_their_own_side(tmp_path):
    folder = write_checkpoint(tmp_path / "parlai", "bi", text_truncate=5, label_truncate=4)
    original = Original(folder.parent)
    convert_parlai_checkpoint(folder, tmp_path / "bi")
    model = BiEncoder(str(tmp_path / "bi"), device="cpu")
    text = "yes ! green tea is the best thing in the world ."
    assert model.preprocess([text], task="query")["input_ids"][0].tolist() == original.context_ids([text])
    assert model.preprocess([text], task="document")["input_ids"][0].tolist() == original.candidate_ids(text)


def test_pairs(tokenizers, originals):
    tokenizer, original = tokenizers["bi_mean"], originals["bi_mean"]

    for pair in [("hi", "a_b"), ("hi", ""), ("", "hi"), ("", "")]:
        left, right = ([original.start, *original.text_ids(text), original.end] for text in pair)
        expected = [left + right, [0] * len(left) + [1] * len(right)]
        single, *batches = tokenizer(*pair), tokenizer([pair]), tokenizer([pair[0]], [pair[1]])
        assert [single["input_ids"], single["token_type_ids"]] == expected
        for batch in batches:
            assert [batch["input_ids"][0], batch["token_type_ids"][0]] == expected
    for side in ("left", "right"):
        with cutting_on(tokenizer, side):
            cut = tokenizer("hi you tea", "tea you", truncation=True, max_length=7)["input_ids"]
            assert tokenizer([("hi you tea", "tea you")], truncation=True, max_length=7)["input_ids"] == [cut]
        assert len(cut) == 7


def test_a_tokenizer_that_was_not_converted_is_a_plain_one(saved_poly_encoder, tmp_path):
    """AutoTokenizer loads a Poly-encoder's tokenizer with our class where no other is named."""
    shutil.copytree(saved_poly_encoder, tmp_path / "copy")
    file = tmp_path / "copy" / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    named = settings.pop("tokenizer_class")
    file.write_text(json.dumps(settings))
    ours, plain = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "copy", saved_poly_encoder))
    assert type(ours) is ParlAITokenizer
    assert named not in ("ParlAITokenizer", None)
    for tokenizer in (ours, plain):
        tokenizer.truncation_side = "right"
    for texts in (["hello", ""], [("hello", ""), ("a", "b")], "hello there"):
        assert ours(texts)["input_ids"] == plain(texts)["input_ids"]
        cut = {"truncation": True, "max_length": 4}
        assert ours(texts, **cut)["input_ids"] == plain(texts, **cut)["input_ids"]
    text = "a text that is too long"
    assert torch.equal(*(tokenized(tokenizer, [text], 6, "right")["input_ids"] for tokenizer in (ours, plain)))


def test_a_tokenizer_trained_anew_is_a_plain_one(tokenizers):
    text = "anew trained words word train new"
    tokenizer = tokenizers["poly_codes8"].train_new_from_iterator([text] * 5, vocab_size=90)
    assert tokenizer(text)["input_ids"] == tokenizer.backend_tokenizer.encode(text).ids
