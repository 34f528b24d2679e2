"""The pipeline: the scores of PolyEncoder.rank, from every form of input, with and without the package."""

import itertools
import json

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, pipeline

import tiny
from parlai_original import write_checkpoint
from poly_encoders import PolyEncoder
from poly_encoders.modeling import PolyEncoderPipeline
from poly_encoders.parlai import convert_parlai_checkpoint
from without_package import run_without_package

TURNS = ["hello", "hi, how are you?"]
CANDIDATES = ["yes", "no", "perhaps tomorrow", "a much longer answer than the others", "x"]


@pytest.fixture(scope="module")
def model(saved_poly_encoder):
    return PolyEncoder(str(saved_poly_encoder), device="cpu")


@pytest.fixture(scope="module")
def pipe(saved_poly_encoder):
    return pipeline("sentence-similarity", model=str(saved_poly_encoder), device="cpu")


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
    "context", ["hello", TURNS, [{"role": "user", "content": turn} for turn in TURNS], "long " * 40, ["x" * 40] * 4]
)
def test_ranks_to_the_bit_as_the_model_does(model, pipe, context):
    more_than_a_batch = [f"answer number {number}" for number in range(40)]
    candidates = [*CANDIDATES, "start " + "y" * 90, *more_than_a_batch]
    assert pipe({"context": context, "candidates": candidates}) == rank(model, context, candidates)


@pytest.mark.parametrize("options", [{"max_turns": 1}, {"turn_separator": " | "}, {"max_context_length": 8}])
def test_follows_the_configuration(checkpoints, options, tmp_path):
    PolyEncoder(checkpoints(), num_codes=3, max_candidate_length=5, device="cpu", **options).save(str(tmp_path))
    model = PolyEncoder(str(tmp_path), device="cpu")
    pipe = pipeline("sentence-similarity", model=str(tmp_path), device="cpu")
    assert pipe(context=TURNS, candidates=CANDIDATES) == rank(model, TURNS, CANDIDATES)


@pytest.mark.parametrize(
    ("context", "candidates"), [("context", "candidates"), ("source_sentence", "sentences"), ("query", "texts")]
)
def test_the_names_of_three_conventions(pipe, context, candidates):
    assert pipe({context: TURNS, candidates: CANDIDATES}) == pipe(context=TURNS, candidates=CANDIDATES)


def test_top_k(saved_poly_encoder, pipe):
    whole = pipe(context="hello", candidates=CANDIDATES)
    assert [entry["score"] for entry in whole] == sorted((entry["score"] for entry in whole), reverse=True)
    assert pipe(context="hello", candidates=CANDIDATES, top_k=2) == whole[:2]
    assert pipe(context="hello", candidates=CANDIDATES, top_k=0) == []
    two = pipeline("sentence-similarity", model=str(saved_poly_encoder), device="cpu", top_k=2)
    assert two(context="hello", candidates=CANDIDATES) == whole[:2]
    assert two(context="hello", candidates=CANDIDATES, top_k=None) == whole


def test_equal_scores_stay_in_the_order_given(pipe):
    ranking = pipe(context="hello", candidates=["yes", "no", "yes", "no", "yes"])
    by_text = {text: [entry["index"] for entry in ranking if entry["text"] == text] for text in ("yes", "no")}
    assert by_text == {"yes": [0, 2, 4], "no": [1, 3]}


@pytest.mark.parametrize("batch_size", [1, 2, 3, 50])
def test_a_list_is_a_batch(model, pipe, batch_size):
    inputs = [{"context": "hello " * n, "candidates": CANDIDATES[:n]} for n in range(1, 6)]
    inputs.append({"query": TURNS, "texts": []})
    expected = [rank(model, each.get("context", TURNS), each.get("candidates", [])) for each in inputs]
    assert close(pipe(inputs, batch_size=batch_size), expected)
    assert close(pipe(tuple(inputs), batch_size=batch_size), expected)
    if batch_size == 50:
        assert close(pipe(inputs), expected)


def test_nothing_to_rank(pipe):
    assert pipe([]) == []
    assert pipe(iter([])) == []
    assert pipe(context="hello", candidates=[]) == []


def test_a_stream_is_read_as_it_goes(model, pipe):
    endless = ({"context": f"number {n}", "candidates": CANDIDATES} for n in itertools.count())
    rankings = list(itertools.islice(iter(pipe(endless, batch_size=2, top_k=1)), 3))
    assert close(rankings, [rank(model, f"number {n}", CANDIDATES)[:1] for n in range(3)])


@pytest.mark.parametrize("of_torch", [True, False])
def test_data_sets(model, pipe, of_torch):
    rows = [{"context": context, "candidates": CANDIDATES} for context in ("a", "b c", "d")]

    class Rows(torch.utils.data.Dataset if of_torch else object):
        def __len__(self):
            return len(rows)

        def __getitem__(self, index):
            return rows[index]

        def __iter__(self):
            return iter(rows)

    expected = [rank(model, row["context"], CANDIDATES) for row in rows]
    assert close(list(pipe(Rows(), batch_size=2)), expected)


def test_candidates_of_a_batch_are_encoded_once(pipe, monkeypatch):
    seen = []
    encode = pipe.encode_candidates
    monkeypatch.setattr(
        pipe, "encode_candidates", lambda texts, *rest: seen.append(list(texts)) or encode(texts, *rest)
    )
    pipe([{"context": "a", "candidates": ["x", "y"]}, {"context": "b", "candidates": ["y", "z", "y"]}], batch_size=2)
    assert seen == [["x", "y", "z"]]


def test_prompts(model, pipe):
    model = PolyEncoder(modules=[model[0]], device="cpu", prompts={"query": "ask: ", "document": "say: "})
    candidates = [*CANDIDATES, "start " + "y" * 90]
    prompts = {"context_prompt": "ask: ", "candidate_prompt": "say: "}
    for context in ("hello", "long " * 40):
        ranking = pipe(context=context, candidates=candidates, **prompts)
        assert ranking == rank(model, context, candidates)
        assert ranking != pipe(context=context, candidates=candidates)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"inputs": "hello"}, TypeError, "str: 'hello'"),
        ({"inputs": None}, ValueError, "Give inputs, or both"),
        ({"context": "hello"}, ValueError, "Give inputs, or both"),
        ({"inputs": {}, "context": "a", "candidates": []}, ValueError, "Give inputs, or both"),
        ({"inputs": {"context": "hello"}}, ValueError, r"keys \['context'\]"),
        ({"inputs": {"query": "hello", "sentences": []}}, ValueError, r"keys \['query', 'sentences'\]"),
        ({"inputs": {"query": "a", "texts": [], "more": 1}}, ValueError, "'more'"),
        ({"context": [], "candidates": ["a"]}, ValueError, "without a single turn"),
        ({"context": "a", "candidates": "b"}, TypeError, "Expected a list of texts"),
        ({"context": "a", "candidates": ["b", 3]}, TypeError, "Item 1 of the list"),
        ({"context": "a", "candidates": ["b"], "top_k": -1}, ValueError, "top_k must be"),
        ({"context": "a", "candidates": ["b"], "top_k": True}, ValueError, "top_k must be"),
        ({"context": "a", "candidates": ["b"], "topk": 1}, TypeError, "no option 'topk'"),
    ],
)
def test_what_is_no_input(pipe, arguments, error, said):
    with pytest.raises(error, match=said):
        pipe(**arguments)


def test_another_model_is_refused(checkpoints):
    with pytest.raises(ValueError, match="the model is a bert"):
        pipeline("sentence-similarity", model=checkpoints())


def test_a_broken_model_gives_no_ranking(saved_poly_encoder):
    pipe = pipeline("sentence-similarity", model=str(saved_poly_encoder), device="cpu")
    with torch.no_grad():
        pipe.model.codes.fill_(float("nan"))
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


def test_half_precision(saved_poly_encoder):
    pipe = pipeline("sentence-similarity", model=str(saved_poly_encoder), device="cpu", dtype=torch.bfloat16)
    assert pipe.model.dtype == torch.bfloat16
    assert {entry["text"] for entry in pipe(context="a", candidates=CANDIDATES)} == set(CANDIDATES)


def test_the_configuration_names_the_pipeline(saved_poly_encoder, pipe, tmp_path):
    """`pipeline` writes classes into what it reads of the configuration, which then could not be saved."""
    written = {"sentence-similarity": {"impl": "pipeline_poly_encoder.PolyEncoderPipeline", "pt": ["AutoModel"]}}
    assert json.loads((saved_poly_encoder / "config.json").read_text())["custom_pipelines"] == written
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["custom_pipelines"] == written
    again = pipeline("sentence-similarity", model=str(tmp_path), device="cpu")
    inputs = {"context": TURNS, "candidates": CANDIDATES}
    assert type(again) is type(pipe) is PolyEncoderPipeline
    assert again(inputs) == pipe(inputs)


WITHOUT = """
import json
from transformers import pipeline
folders, out, inputs = json.loads(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
try:
    pipeline("sentence-similarity", model=folders[0], trust_remote_code=False)
    raise SystemExit("code was run without being asked")
except ValueError as error:
    assert "trust_remote_code" in str(error)
rankings = []
for number, folder in enumerate(folders):
    pipe = pipeline("sentence-similarity", model=folder, trust_remote_code=True, device="cpu")
    assert type(pipe).__module__.startswith("transformers_modules."), type(pipe)
    rankings.append(pipe(inputs, batch_size=1))
    pipe.save_pretrained(f"{out}/{number}")
    again = pipeline(model=f"{out}/{number}", trust_remote_code=True, device="cpu")  # the task is in config.json
    assert again(inputs, batch_size=1) == rankings[-1]
print(json.dumps(rankings))
"""


def test_without_the_package(saved_poly_encoder, tmp_path):
    """Also for a checkpoint of ParlAI, whose own way of cutting candidates the plain tokenizer does not know."""
    convert_parlai_checkpoint(write_checkpoint(tmp_path / "parlai", "poly"), tmp_path / "converted")
    candidates = [*CANDIDATES, "", "the sea is wide and the cats are small " * 4]
    inputs = [{"context": context, "candidates": candidates} for context in ("hello", TURNS, ["a b c " * 40, "d"])]
    folders = [str(saved_poly_encoder), str(tmp_path / "converted")]
    out = run_without_package(WITHOUT, json.dumps(folders), str(tmp_path), json.dumps(inputs), cache=tmp_path)
    for folder, rankings in zip(folders, json.loads(out.splitlines()[-1]), strict=True):
        model = PolyEncoder(folder, device="cpu")
        assert close(rankings, [rank(model, each["context"], candidates) for each in inputs])
    for folder in (tmp_path / "0", tmp_path / "1"):
        assert {file.name for file in folder.glob("*.py")} == {file.name for file in saved_poly_encoder.glob("*.py")}


def test_it_serves_the_shared_and_the_other_kinds(checkpoints, tmp_path):
    for kind, share in (("first_m", True), ("first_and_last_m", False)):
        folder = tmp_path / kind
        torch.manual_seed(0)
        PolyEncoder(checkpoints(), num_codes=4, context_vectors=kind, share_encoders=share, device="cpu").save(
            str(folder)
        )
        pipe = pipeline("sentence-similarity", model=str(folder), device="cpu")
        assert pipe(context="a", candidates=CANDIDATES) == rank(PolyEncoder(str(folder), device="cpu"), "a", CANDIDATES)


def test_the_family_of_the_tokenizer_limits_the_context(checkpoints):
    """RoBERTa has positions for two tokens less than rows of embeddings."""
    torch.manual_seed(0)
    model = PolyEncoder(checkpoints("roberta"), num_codes=2, device="cpu")
    pipe = PolyEncoderPipeline(model=model[0].model, tokenizer=model.tokenizer, device="cpu")
    context = "x" * (2 * tiny.POSITIONS)
    assert pipe(context=context, candidates=CANDIDATES) == rank(model, context, CANDIDATES)
