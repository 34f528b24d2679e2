"""ParlAI's ids, of any text."""

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
from poly_encoders.parlai import ParlAITokenizer, convert_parlai_checkpoint
from poly_encoders.parlai.convert import take_apart
from poly_encoders.parlai.tokenizer import _FINAL_SIGMA, _WORD

CASES = ["poly_codes8", "bi_mean", "cross_first"]


@pytest.fixture(scope="module")
def originals():
    return {name: Original(FIXTURES / name) for name in CASES}


@pytest.fixture(scope="module")
def tokenizers():
    return {name: take_apart(FIXTURES / name / "model").tokenizer for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_texts_of_known_and_unknown_words(name, originals, tokenizers):
    rng = random.Random(0)
    for _ in range(200):
        text = sample_text(rng)
        ids = tokenizers[name](text, add_special_tokens=False)["input_ids"]
        assert ids == originals[name].text_ids(text), text


@given(
    text=st.text(alphabet=st.sampled_from("abhist_yoeun \n@</w>.,'0ÀΣσ\u0301\u0345ſßİ日\u001c\u00a0🙂"), max_size=30)
)
def test_any_text(text, originals, tokenizers):
    assert tokenizers["bi_mean"](text, add_special_tokens=False)["input_ids"] == originals["bi_mean"].text_ids(text)


def test_every_character_is_split_and_lowered_as_python_does():
    """Characters that this Python does not know yet may be letters to the library's newer Unicode tables."""
    split = pre_tokenizers.Split(Regex(_WORD), behavior="removed", invert=True)
    lower = normalizers.Sequence([normalizers.Replace(Regex(_FINAL_SIGMA), "ς"), normalizers.Lowercase()])
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        if unicodedata.category(character) in ("Cn", "Cs"):
            continue
        text = f"a{character}b"
        assert [word for word, _ in split.pre_tokenize_str(text)] == re.findall(r"\w+|[^\w\s]", text), hex(code)
        lowered = text.lower()
        if all(unicodedata.category(new) != "Cn" for new in lower.normalize_str(text)):
            assert lower.normalize_str(text) == lowered, hex(code)


@pytest.mark.parametrize("text", ["ΟΔΟΣ", "ΑΣ'Σ Σ", "Σ", "ΑΣ.", "ΑΣΑ", "Σ́Σ", "ΑΣᴬ ͅΣ-"])
def test_the_sigma_that_ends_a_word(text):
    lower = normalizers.Sequence([normalizers.Replace(Regex(_FINAL_SIGMA), "ς"), normalizers.Lowercase()])
    assert lower.normalize_str(text) == text.lower()


@pytest.mark.parametrize("length", [1, 2, 69, 70, 71, 72, 73, 100])
@pytest.mark.parametrize("side", ["left", "right"])
def test_long_texts_are_cut_as_the_original_cuts_them(length, side, originals, tokenizers):
    """A context keeps its end and both special tokens, a candidate its beginning, and perhaps no end token."""
    original, tokenizer = originals["bi_mean"], tokenizers["bi_mean"]
    text = " ".join(["tea", "you", "."] * 40)
    text = tokenizer.decode(original.text_ids(text)[:length])
    ids = original.text_ids(text)
    tokenizer.truncation_side = side
    try:
        cut = tokenizer(text, truncation=True, max_length=72)["input_ids"]
    finally:
        tokenizer.truncation_side = "left"
    if side == "left":
        assert cut == [original.start, *ids[-70:], original.end]
    else:
        assert cut == [original.start, *ids, original.end][:72]


def test_every_container_holds_the_same_ids(tokenizers):
    tokenizer = tokenizers["poly_codes8"]
    texts = ["a_b hello", "", "yes ! green tea is the best thing in the world .", "the"]
    for side in ("left", "right"):
        tokenizer.truncation_side = side
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
        wide = tokenizer(texts, truncation=True, max_length=12, padding="max_length", return_tensors="pt")
        assert wide["input_ids"].shape == (4, 12)
        assert wide["input_ids"].dtype == torch.int64
    tokenizer.truncation_side = "left"


def test_no_id_is_beyond_the_dictionary(tokenizers, originals):
    rng = random.Random(1)
    for _ in range(50):
        assert max(tokenizers["poly_codes8"](sample_text(rng))["input_ids"]) < len(originals["poly_codes8"].ids)


def test_an_empty_text_is_its_special_tokens(tokenizers, originals):
    original = originals["bi_mean"]
    assert tokenizers["bi_mean"]("")["input_ids"] == [original.start, original.end]
    assert tokenizers["bi_mean"](["", "hi"])["input_ids"][0] == [original.start, original.end]


def test_added_tokens_keep_their_ids(tokenizers, tmp_path):
    tokenizers["poly_codes8"].save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens(["<speaker>"])
    ids = tokenizer("<speaker> a_b", add_special_tokens=False)["input_ids"]
    assert ids[0] == len(tokenizer) - 1
    assert ids[1:] == tokenizer("a_b", add_special_tokens=False)["input_ids"]


def test_save_and_load(tokenizers, tmp_path):
    tokenizers["cross_first"].save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is ParlAITokenizer
    rng = random.Random(2)
    for text in [sample_text(rng) for _ in range(20)]:
        assert again(text)["input_ids"] == tokenizers["cross_first"](text)["input_ids"]


def test_a_plain_fast_tokenizer_leads_to_the_same_vectors(tmp_path):
    """Without this package transformers loads a plain tokenizer, whose aliases have embeddings of their own."""
    convert_parlai_checkpoint(FIXTURES / "poly_codes8" / "model", tmp_path / "poly")
    model = PolyEncoder(str(tmp_path / "poly"), device="cpu")
    plain = PreTrainedTokenizerFast.from_pretrained(tmp_path / "poly")
    rng = random.Random(3)
    texts = [sample_text(rng, 6) for _ in range(30)] + ["a_b __start__ to"]
    ours = [model.tokenizer(text)["input_ids"] for text in texts]
    theirs = [plain(text)["input_ids"] for text in texts]
    assert ours != theirs
    for encoder in (model[0].model.context_encoder, model[0].model.candidate_encoder):
        rows = encoder.get_input_embeddings().weight
        assert len(rows) == len(plain)
        for left, right in zip(ours, theirs, strict=True):
            assert torch.equal(rows[left], rows[right])


def test_the_tokenizers_of_a_bi_encoder_cut_on_their_own_side(tmp_path):
    folder = write_checkpoint(tmp_path / "parlai", "bi", text_truncate=5, label_truncate=4)
    original = Original(folder.parent)
    convert_parlai_checkpoint(folder, tmp_path / "bi")
    model = BiEncoder(str(tmp_path / "bi"), device="cpu")
    text = "yes ! green tea is the best thing in the world ."
    assert model.preprocess([text], task="query")["input_ids"][0].tolist() == original.context_ids([text])
    assert model.preprocess([text], task="document")["input_ids"][0].tolist() == original.candidate_ids(text)


def test_what_else_can_be_asked_of_a_tokenizer_that_cuts_on_the_right(tokenizers):
    tokenizer = tokenizers["bi_mean"]
    tokenizer.truncation_side = "right"
    try:
        words = tokenizer(["tea", "you", "."], is_split_into_words=True, truncation=True, max_length=3)["input_ids"]
        assert words == tokenizer("tea you .", truncation=True, max_length=3)["input_ids"]
        measured = tokenizer(["tea you ."] * 2, truncation=True, max_length=4, return_length=True)
        assert measured["length"] == [len(row) for row in measured["input_ids"]] == [4, 4]
        single = tokenizer("tea you .", truncation=True, max_length=4, return_length=True)
        assert single["length"] == [4]
        assert single["input_ids"] == measured["input_ids"][0] == tokenizer.encode("tea you .")[:4]
        masked = tokenizer(["tea you .", "."], truncation=True, max_length=3, return_special_tokens_mask=True)
        assert masked["special_tokens_mask"] == [[1, 0, 0], [1, 0, 1]]
    finally:
        tokenizer.truncation_side = "left"


def test_pairs(tokenizers, originals):
    tokenizer, original = tokenizers["bi_mean"], originals["bi_mean"]

    def framed(text):
        return [original.start, *original.text_ids(text), original.end]

    for pair in [("hi", "a_b"), ("hi", ""), ("", "hi"), ("", "")]:
        expected = framed(pair[0]) + framed(pair[1])
        segments = [0] * len(framed(pair[0])) + [1] * len(framed(pair[1]))
        for features in (tokenizer(*pair), tokenizer([pair]), tokenizer([pair[0]], [pair[1]])):
            rows = features["input_ids"]
            assert (rows[0] if isinstance(rows[0], list) else rows) == expected
            kinds = features["token_type_ids"]
            assert (kinds[0] if isinstance(kinds[0], list) else kinds) == segments
    for side in ("left", "right"):
        tokenizer.truncation_side = side
        cut = tokenizer("hi you tea", "tea you", truncation=True, max_length=7)["input_ids"]
        assert tokenizer([("hi you tea", "tea you")], truncation=True, max_length=7)["input_ids"] == [cut]
        assert len(cut) == 7
    tokenizer.truncation_side = "left"


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


def test_a_tokenizer_trained_anew_is_a_plain_one(tokenizers):
    words = ["anew", "trained", "words", "word", "train", "new"]
    tokenizer = tokenizers["poly_codes8"].train_new_from_iterator([" ".join(words)] * 5, vocab_size=90)
    for word in words:
        assert (
            tokenizer(word, add_special_tokens=False)["input_ids"]
            == tokenizer.backend_tokenizer.encode(word, add_special_tokens=False).ids
        )
