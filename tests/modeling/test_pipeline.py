"""The pipeline: the scores of PolyEncoder.rank, from every form of input."""

import itertools
import json

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, pipeline

import tiny
from poly_encoders import PolyEncoder
from poly_encoders.modeling import PolyEncoderPipeline

TURNS = ["hello", "hi, how are you?"]
CANDIDATES = ["yes", "no", "perhaps tomorrow", "a much longer answer than the others", "x"]


def load(folder, **options):
    return pipeline("sentence-similarity", model=str(folder), device="cpu", **options)


@pytest.fixture(scope="module")
def model(saved_poly_encoder):
    return PolyEncoder(str(saved_poly_encoder), device="cpu")


@pytest.fixture(scope="module")
def pipe(saved_poly_encoder):
    return load(saved_poly_encoder)


def rank(model, context, candidates, **options):
    """What the pipeline should return."""
    return [
        {"index": entry["corpus_id"], "score": entry["score"], "text": candidates[entry["corpus_id"]]}
        for entry in model.rank(context, candidates, **options)
    ]


def close(rankings, expected):
    """Equal but for the last bits, which depend on what a text is padded to."""
    return [[(e["index"], e["text"], pytest.approx(e["score"], rel=1e-4)) for e in each] for each in expected] == [
        [(e["index"], e["text"], e["score"]) for e in each] for each in rankings
    ]


@pytest.mark.parametrize(
    "context",
    [
        "hello",
        TURNS,
        "hello\nhi",
        ["one turn\nof two lines", "", "hi"],
        [{"role": "user", "content": turn} for turn in TURNS],
        "long " * 40,
        ["x" * 40] * 4,
    ],
)
def test_ranks_to_the_bit_as_the_model_does(model, pipe, context):
    candidates = [*CANDIDATES, "start " + "y" * 90, *(f"answer number {number}" for number in range(40))]
    assert pipe({"context": context, "candidates": candidates}) == rank(model, context, candidates)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("bert", {"max_turns": 1, "max_candidate_length": 5}),
        ("bert", {"turn_separator": " | ", "context_vectors": "first_m", "share_encoders": True}),
        ("bert", {"turn_separator": " | ", "last_turn_share": 0.0, "config_kwargs": {"max_turn_length": 5}}),
        ("bert", {"context_vectors": "turns_and_codes", "config_kwargs": {"learn_final_temperature": True}}),
        ("bert", {"context_vectors": "learnt_codes", "config_kwargs": {"code_std": 1.0, "final_attention": "sqrt"}}),
        ("bert", {"max_context_length": 8, "context_vectors": "first_and_last_m"}),
        ("roberta", {}),  # has positions for two tokens less than rows of embeddings
    ],
)
def test_follows_the_model(family, options, checkpoints):
    torch.manual_seed(0)
    model = PolyEncoder(checkpoints(family), num_codes=3, device="cpu", **options)
    pipe = PolyEncoderPipeline(model=model[0].model, tokenizer=model.tokenizer, device="cpu")
    for context in (TURNS, "x" * (2 * tiny.POSITIONS)):
        assert pipe(context=context, candidates=CANDIDATES) == rank(model, context, CANDIDATES)


def test_the_names_of_three_conventions(pipe):
    expected = pipe(context=TURNS, candidates=CANDIDATES)
    for context, candidates in (("context", "candidates"), ("source_sentence", "sentences"), ("query", "texts")):
        assert pipe({context: TURNS, candidates: CANDIDATES}) == expected


def test_top_k(saved_poly_encoder, pipe):
    whole = pipe(context="hello", candidates=CANDIDATES)
    assert pipe(context="hello", candidates=CANDIDATES, top_k=2) == whole[:2]
    assert pipe(context="hello", candidates=CANDIDATES, top_k=0) == []
    two = load(saved_poly_encoder, top_k=2)
    assert two(context="hello", candidates=CANDIDATES) == whole[:2]
    assert two(context="hello", candidates=CANDIDATES, top_k=None) == whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_texts_have_one_score_in_the_order_given(saved_poly_encoder, dtype):
    pipe = load(saved_poly_encoder, dtype=dtype)
    assert pipe.model.dtype == dtype
    candidates = ["yes", "no", "yes", "no", "yes", *CANDIDATES] * 3
    ranking = pipe(context="hello", candidates=candidates)
    assert sorted(entry["index"] for entry in ranking) == list(range(len(candidates)))
    for text in CANDIDATES:
        own = [entry for entry in ranking if entry["text"] == text]
        assert [entry["index"] for entry in own] == [place for place, each in enumerate(candidates) if each == text]
        assert len({entry["score"] for entry in own}) == 1


@pytest.mark.parametrize("batch_size", [1, 2, 50, None])
def test_a_list_is_a_batch(model, pipe, batch_size):
    inputs = [{"context": "hello " * n, "candidates": CANDIDATES[:n]} for n in range(1, 6)]
    inputs.append({"query": TURNS, "texts": []})
    expected = [rank(model, each.get("context", TURNS), each.get("candidates", [])) for each in inputs]
    assert close(pipe(inputs, batch_size=batch_size), expected)
    assert close(pipe(tuple(inputs), batch_size=batch_size), expected)
    assert pipe([]) == pipe(iter([])) == pipe(context="hello", candidates=[]) == []


def test_streams_are_read_as_they_go_and_data_sets(model, pipe):
    rows = [{"context": f"number {n}", "candidates": CANDIDATES} for n in range(3)]

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return len(rows)

        def __getitem__(self, index):
            return rows[index]

    for inputs in (Rows(), itertools.cycle(rows)):
        rankings = list(itertools.islice(iter(pipe(inputs, batch_size=2, top_k=1)), 3))
        assert close(rankings, [rank(model, row["context"], CANDIDATES)[:1] for row in rows])


def test_candidates_of_a_batch_are_encoded_once(pipe, monkeypatch):
    seen, encode = [], pipe.model.get_candidate_features
    monkeypatch.setattr(pipe.model, "get_candidate_features", lambda **inputs: seen.append(inputs) or encode(**inputs))
    pipe([{"context": "a", "candidates": ["x", "y"]}, {"context": "b", "candidates": ["y", "z", "y"]}], batch_size=2)
    assert [each["input_ids"].shape for each in seen] == [(2, 3), (1, 3)]  # x and y, then z, two at a time


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"inputs": "hello"}, TypeError, "str: 'hello'"),
        ({"inputs": None}, ValueError, "Give inputs, or both"),
        ({"context": "hello"}, ValueError, "Give inputs, or both"),
        ({"inputs": {}, "context": "a", "candidates": []}, ValueError, "Give inputs, or both"),
        ({"inputs": {"query": "hello", "sentences": []}}, ValueError, r"keys \['query', 'sentences'\]"),
        ({"inputs": {"query": "a", "texts": [], "more": 1}}, ValueError, "'more'"),
        ({"context": [], "candidates": ["a"]}, ValueError, "without a single turn"),
        ({"context": "a", "candidates": ["b", 3]}, TypeError, "Item 1 of the list"),
        ({"context": "a", "candidates": ["b"], "top_k": -1}, ValueError, "top_k must be"),
        ({"context": "a", "candidates": ["b"], "topk": 1}, TypeError, "no option 'topk'"),
    ],
)
def test_what_is_no_input(pipe, arguments, error, said):
    with pytest.raises(error, match=said):
        pipe(**arguments)


def test_models_that_rank_nothing(checkpoints, saved_poly_encoder):
    with pytest.raises(ValueError, match="the model is a bert"):
        pipeline("sentence-similarity", model=checkpoints())
    pipe = load(saved_poly_encoder)
    with torch.no_grad():
        next(pipe.model.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN or infinite"):
        pipe(context="a", candidates=["b"])


def test_a_decoder_without_padding_token(checkpoints, tmp_path):
    torch.manual_seed(0)
    PolyEncoder(checkpoints("qwen3"), num_codes=3, device="cpu").save(str(tmp_path))
    model, tokenizer = AutoModel.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.pad_token = None
    pipe = PolyEncoderPipeline(model=model, tokenizer=tokenizer, device="cpu")
    expected = rank(PolyEncoder(str(tmp_path), device="cpu"), "hello", CANDIDATES)
    assert close(pipe([{"context": "hello", "candidates": CANDIDATES}] * 2, batch_size=2), [expected] * 2)


def test_the_configuration_names_the_pipeline(saved_poly_encoder, pipe, tmp_path):
    """`pipeline` writes classes into what it reads of the configuration, which then could not be saved."""
    written = {"sentence-similarity": {"impl": "pipeline_poly_encoder.PolyEncoderPipeline", "pt": ["AutoModel"]}}
    assert json.loads((saved_poly_encoder / "config.json").read_text())["custom_pipelines"] == written
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["custom_pipelines"] == written
    again = load(tmp_path)
    inputs = {"context": TURNS, "candidates": CANDIDATES}
    assert type(again) is type(pipe) is PolyEncoderPipeline
    assert again(inputs) == pipe(inputs)
