"""Cutting texts to a number of tokens."""

import threading

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tiny
from poly_encoders.lengths import last_tokens, truncating


def test_the_last_tokens():
    tokenizer = tiny.make_tokenizer()
    assert last_tokens("abcdef", tokenizer, 2) == "ef"
    assert last_tokens("abcdef", tokenizer, 6) == "abcdef"
    assert last_tokens("", tokenizer, 3) == ""


def test_a_character_may_be_several_tokens():
    """Counting characters once let byte-level texts of few characters and many tokens through uncut."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    text = "\U0001f600" * 5  # 20 tokens
    cut = last_tokens(text, tokenizer, 8)
    assert cut == "\U0001f600" * 2
    assert len(tokenizer(cut)["input_ids"]) == 8


def test_one_thread_at_a_time_says_where_to_cut():
    """Both sides of a Poly-encoder share a tokenizer: in another thread's block, texts were cut on the wrong side."""
    tokenizer = tiny.make_tokenizer()
    seen = []

    def cut_right():
        with truncating(tokenizer, "right"):
            seen.append(tokenizer.truncation_side)

    other = threading.Thread(target=cut_right)
    with truncating(tokenizer, "left"):
        other.start()
        other.join(timeout=0.2)
        assert (tokenizer.truncation_side, seen) == ("left", [])
        with truncating(tokenizer, "right"):
            assert tokenizer.truncation_side == "right"
    other.join()
    assert seen == ["right"]
