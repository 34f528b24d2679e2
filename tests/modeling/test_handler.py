"""What an Inference Endpoint answers: scores, rankings, errors, also without the package."""

import json
import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from poly_encoders import PolyEncoder
from poly_encoders.modeling.handler import EndpointHandler
from without_package import run_without_package

TURNS = ["hello", "hi, how are you?"]
MESSAGES = [{"role": "user", "content": turn} for turn in TURNS]
CANDIDATES = ["yes", "no", "perhaps tomorrow", "yes", "a much longer answer than the others " * 3]
INPUTS = {"context": TURNS, "candidates": CANDIDATES}


@pytest.fixture(scope="module")
def handler(saved_poly_encoder):
    return EndpointHandler(str(saved_poly_encoder))


def scores_of(folder, context, candidates):
    """The scores of the model's own `rank`, in the order of the candidates."""
    ranking = PolyEncoder(str(folder), device="cpu").rank(context, candidates)
    return [entry["score"] for entry in sorted(ranking, key=lambda entry: entry["corpus_id"])]


def close(scores):
    return pytest.approx(scores, rel=1e-4, abs=1e-6)


def test_forms_of_a_request(handler, saved_poly_encoder):
    expected = scores_of(saved_poly_encoder, TURNS, CANDIDATES)
    assert expected[0] == expected[3]  # equal candidates
    for request in (
        INPUTS,
        {"inputs": {"source_sentence": MESSAGES, "sentences": CANDIDATES}},
        {"query": TURNS, "texts": CANDIDATES, "parameters": {}},
        {"inputs": INPUTS, "parameters": None, "options": {"wait_for_model": True}},
        {"inputs": INPUTS, "parameters": {"ranked": False}},
    ):
        assert json.loads(json.dumps(handler(request))) == expected


def test_a_ranking(handler):
    scores = handler({"inputs": INPUTS})
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    ranking = [{"index": index, "score": scores[index]} for index in order]
    with_texts = [entry | {"text": CANDIDATES[entry["index"]]} for entry in ranking]
    for parameters, expected in [
        ({"ranked": True}, ranking),
        ({"top_k": 2}, ranking[:2]),
        ({"top_k": 0}, []),
        ({"return_documents": True}, with_texts),
        ({"ranked": True, "top_k": 3, "return_documents": True}, with_texts[:3]),
        ({"ranked": True, "return_documents": False, "top_k": None}, ranking),
    ]:
        assert handler({"inputs": INPUTS, "parameters": parameters}) == expected
    for parameters in ({}, {"ranked": True}):
        assert handler({"inputs": {"context": "a", "candidates": []}, "parameters": parameters}) == []


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (None, "JSON object"),
        ({}, "keys []"),
        ({"inputs": "hello"}, "str: 'hello'"),
        ({"inputs": {"context": "a", "sentences": ["b"]}}, "'sentences'"),
        ({"inputs": {"context": [], "candidates": ["b"]}}, "without a single turn"),
        ({"inputs": {"context": "\ud83d", "candidates": ["b"]}}, "lone surrogate"),
        ({"inputs": INPUTS, "parameters": [1]}, "'parameters' is a JSON object"),
        ({"inputs": INPUTS, "parameters": {"topk": 1}}, "no parameter 'topk'"),
        ({"inputs": INPUTS, "parameters": {"top_k": "1"}}, "top_k must be"),
        ({"inputs": INPUTS, "parameters": {"ranked": "yes"}}, "true or false"),
        ({"inputs": INPUTS, "parameters": {"ranked": False, "top_k": 1}}, "belong to a ranking"),
    ],
)
def test_bad_requests_get_an_error_object(handler, request_, said):
    (error,) = handler(request_).values()
    assert (error["type"], error["status"]) == ("invalid_request", 400)
    assert said in error["message"]


def test_a_text_without_tokens_is_the_senders_fault(checkpoints, tmp_path):
    PolyEncoder(checkpoints("qwen3"), num_codes=2, device="cpu").save(str(tmp_path))  # no special tokens
    (error,) = EndpointHandler(str(tmp_path))({"inputs": {"context": "a", "candidates": ["b", ""]}}).values()
    assert error["status"] == 400
    assert "has no token" in error["message"]


def test_what_goes_wrong_inside_stays_inside(saved_poly_encoder, caplog):
    handler = EndpointHandler(str(saved_poly_encoder))
    with torch.no_grad():
        next(handler.pipeline.model.parameters()).fill_(float("nan"))
    (error,) = handler({"inputs": INPUTS}).values()
    assert (error["type"], error["status"]) == ("internal_error", 500)
    assert "NaN" not in error["message"]
    assert [(record.levelno, "NaN" in str(record.exc_info[1])) for record in caplog.records] == [(logging.ERROR, True)]


def test_limits(saved_poly_encoder, monkeypatch):
    monkeypatch.setenv("POLY_ENCODERS_MAX_CANDIDATES", "3")
    monkeypatch.setenv("POLY_ENCODERS_MAX_CHARACTERS", "20")
    small = EndpointHandler(str(saved_poly_encoder))
    assert len(small({"inputs": {"context": "ab", "candidates": ["x" * 6] * 3}})) == 3
    for candidates, said in ((["x"] * 4, "4 candidates; this endpoint takes at most 3"), (["x" * 19], "21 characters")):
        (error,) = small({"inputs": {"context": "ab", "candidates": candidates}}).values()
        assert error["status"] == 400
        assert said in error["message"]
    for bad in ("lots", "-1", ""):
        monkeypatch.setenv("POLY_ENCODERS_MAX_CANDIDATES", bad)
        with pytest.raises(ValueError, match=rf"POLY_ENCODERS_MAX_CANDIDATES.*'{bad}'"):
            EndpointHandler(str(saved_poly_encoder))


@pytest.mark.parametrize("prompts", [{"query": "ask: ", "passage": "say: "}, {"document": "", "default": "mind: "}])
def test_prompts_of_the_model(checkpoints, prompts, tmp_path):
    options = {"prompts": prompts, "default_prompt_name": "default" if "default" in prompts else None}
    PolyEncoder(checkpoints(), num_codes=2, device="cpu", **options).save(str(tmp_path))
    handler = EndpointHandler(str(tmp_path))
    for context in ("hello", "long " * 40):
        expected = scores_of(tmp_path, context, CANDIDATES)
        assert handler({"inputs": {"context": context, "candidates": CANDIDATES}}) == expected
    without = PolyEncoder(str(tmp_path), device="cpu", prompts={"query": "", "document": ""}).rank("hello", CANDIDATES)
    assert sorted(entry["score"] for entry in without) != pytest.approx(sorted(expected), rel=1e-4)


def test_threads_share_a_handler(handler):
    """Half of the good requests of several threads were answered with 500: each cut another one's texts."""
    requests = [
        {"inputs": {"context": "long " * place, "candidates": ["long answer " * each for each in range(place)]}}
        for place in range(1, 25)
    ]
    expected = [handler(request) for request in requests]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(handler, requests)) == expected


# --- without the package ----------------------------------------------------------------------------------------------

WITHOUT = """
import builtins, importlib.util, json
from transformers import pipeline
def ask(*question):
    raise SystemExit("a prompt nobody answers")
builtins.input = ask
folder, out, requests = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
try:
    pipeline("sentence-similarity", model=folder, trust_remote_code=False)
    raise SystemExit("code was run without being asked")
except ValueError as error:
    assert "trust_remote_code" in str(error)
# As the server of Inference Endpoints does it.
spec = importlib.util.spec_from_file_location("handler.EndpointHandler", folder + "/handler.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
handler = module.EndpointHandler()
assert type(handler.pipeline).__module__.startswith("transformers_modules."), type(handler.pipeline)
assert handler({"inputs": {"context": []}})["error"]["status"] == 400
handler.pipeline.save_pretrained(out)
with open(out + "/handler.py", "w") as file:
    file.write("import something_that_is_not_installed")  # a user's own, which the model does not need
again = pipeline(model=out, trust_remote_code=True, device="cpu")  # the task is in config.json
print(json.dumps([[handler(request), again(request, batch_size=1)] for request in requests]))
"""


def test_without_the_package(saved_poly_encoder, tmp_path):
    candidates = [*CANDIDATES, "", "the sea is wide and the cats are small " * 4]
    contexts = ["hello", TURNS, MESSAGES, ["a b c " * 40, "d"]]
    requests = [{"source_sentence": context, "sentences": candidates} for context in contexts]
    again = tmp_path / "again"
    out = run_without_package(WITHOUT, str(saved_poly_encoder), str(again), json.dumps(requests), cache=tmp_path)
    for context, (scores, ranking) in zip(contexts, json.loads(out.splitlines()[-1]), strict=True):
        assert scores == close(scores_of(saved_poly_encoder, context, candidates))
        assert [entry["score"] for entry in ranking] == close(sorted(scores, reverse=True))
    assert {file.name for file in again.glob("*.py")} == {file.name for file in saved_poly_encoder.glob("*.py")}
