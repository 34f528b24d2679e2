"""What an Inference Endpoint answers: the scores of each model's own rank, rankings, errors; and what it keeps."""

import importlib.util
import json
import logging
import threading

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from parlai_original import write_checkpoint
from poly_encoders import BiEncoder, CrossEncoder, PolyEncoder
from poly_encoders.modeling.endpoint import ENTRY_BYTES, Endpoint, VectorCache
from poly_encoders.modeling.handler import EndpointHandler
from poly_encoders.parlai import convert_parlai_checkpoint
from without_package import run_without_package

TURNS = ["hello", "hi, how are you?"]
MESSAGES = [{"role": "user", "content": turn} for turn in TURNS]
CANDIDATES = ["yes", "no", "perhaps tomorrow", "yes", "a much longer answer than the others " * 3]
INPUTS = {"context": TURNS, "candidates": CANDIDATES}

VARIANTS = {
    "poly": (PolyEncoder, {"num_codes": 4, "config_kwargs": {"code_std": 1.0}}),
    "poly-prompts": (PolyEncoder, {"num_codes": 3, "prompts": {"query": "ask: ", "document": "say: "}}),
    "bi": (BiEncoder, {}),
    "bi-lengths": (BiEncoder, {"max_context_length": 9, "max_candidate_length": 7, "max_turns": 1}),
    "bi-shared": (BiEncoder, {"share_encoders": True, "max_context_length": 12, "max_candidate_length": 8}),
    "bi-first-m": (BiEncoder, {"reduction": "first_m_mean", "m": 3, "prompts": {"query": "ask: ", "passage": "say: "}}),
    "bi-cosine": (BiEncoder, {"similarity_fn_name": "cosine"}),
    "cross": (CrossEncoder, {"turn_separator": " | "}),
    "cross-lengths": (CrossEncoder, {"max_context_length": 9, "max_candidate_length": 7}),
    "cross-sigmoid": (CrossEncoder, {"activation_fn": torch.nn.Sigmoid(), "prompts": {"p": "ask: "}}),
}


@pytest.fixture(scope="module")
def folders(checkpoints, tmp_path_factory):
    """The folders of one saved model of each variant, and of each kind converted from ParlAI."""
    root = tmp_path_factory.mktemp("endpoints")
    for name, (model_class, options) in VARIANTS.items():
        torch.manual_seed(len(name))
        options = {**options, "default_prompt_name": "p"} if name == "cross-sigmoid" else options
        model_class(checkpoints(), device="cpu", **options).save(str(root / name))
    for kind in ("poly", "bi", "cross"):
        convert_parlai_checkpoint(write_checkpoint(root / "parlai" / kind, kind), root / f"{kind}-parlai")
    return {folder.name: folder for folder in root.iterdir() if folder.name != "parlai"}


@pytest.fixture(scope="module")
def endpoint(folders):
    return Endpoint(str(folders["poly"]))


def scores_of(folder, context, candidates):
    """The scores of the model's own `rank`, in the order of the candidates."""
    model_class = {"poly": PolyEncoder, "bi": BiEncoder, "cross": CrossEncoder}[folder.name.split("-")[0]]
    ranking = model_class(str(folder), device="cpu").rank(context, candidates)
    return [entry["score"] for entry in sorted(ranking, key=lambda entry: entry["corpus_id"])]


def close(scores):
    return pytest.approx(scores, rel=1e-4, abs=1e-6)


WITHOUT = """
import builtins, importlib.util, json
def ask(*question):
    raise SystemExit("a prompt nobody answers")
builtins.input = ask
answers = {}
for name, folder in json.loads(sys.argv[1]).items():
    # As the server of Inference Endpoints does it.
    spec = importlib.util.spec_from_file_location("handler.EndpointHandler", folder + "/handler.py")
    handler = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(handler)
    handler = handler.EndpointHandler(folder)
    answers[name] = [handler(request) for request in json.loads(sys.argv[2])]
heavy = {"sentence_transformers", "datasets", "accelerate"} & {module.split(".")[0] for module in sys.modules}
print(json.dumps([answers, sorted(heavy - {"accelerate"})]))
"""


def test_every_kind_without_the_package(folders, tmp_path):
    contexts = ["hello", TURNS, MESSAGES, ["long " * 40, "d"]]
    candidates = [*CANDIDATES, "the sea is wide and the cats are small " * 4, ""]
    requests = [{"inputs": {"source_sentence": context, "sentences": candidates}} for context in contexts]
    requests.append({"inputs": {"context": []}})
    paths = {name: str(folder) for name, folder in folders.items()}
    out = run_without_package(WITHOUT, json.dumps(paths), json.dumps(requests), cache=tmp_path)
    answers, heavy = json.loads(out.splitlines()[-1])
    assert heavy == []
    assert answers.keys() == folders.keys()
    for name, (*scored, refused) in answers.items():
        for context, scores in zip(contexts, scored, strict=True):
            assert scores == close(scores_of(folders[name], context, candidates)), (name, context)
        assert refused["error"]["status"] == 400


FAMILIES = ["roberta", "distilbert", "modernbert", "mpnet", "electra", "t5", "qwen3"]


@pytest.mark.parametrize(
    ("model_class", "family"),
    [(BiEncoder, family) for family in FAMILIES] + [(CrossEncoder, family) for family in FAMILIES if family != "t5"],
)
def test_families(model_class, family, checkpoints, tmp_path):
    torch.manual_seed(0)
    folder = tmp_path / ("bi" if model_class is BiEncoder else "cross")
    model_class(checkpoints(family), device="cpu").save(str(folder))
    for context in (TURNS, "long " * 40):
        scores = Endpoint(str(folder))({"inputs": {"context": context, "candidates": CANDIDATES}})
        assert scores == close(scores_of(folder, context, CANDIDATES))


@pytest.mark.parametrize(
    "request_",
    [
        {"inputs": INPUTS},
        INPUTS,
        {"inputs": {"source_sentence": MESSAGES, "sentences": CANDIDATES}},
        {"query": TURNS, "texts": CANDIDATES, "parameters": {}},
        {"inputs": INPUTS, "parameters": None, "options": {"wait_for_model": True}},
        {"inputs": INPUTS, "parameters": {"ranked": False}},
    ],
)
def test_forms_of_a_request(endpoint, folders, request_):
    answer = endpoint(request_)
    assert answer == close(scores_of(folders["poly"], TURNS, CANDIDATES))
    assert json.loads(json.dumps(answer)) == answer
    assert answer[0] == answer[3]  # equal candidates


def test_a_ranking(endpoint):
    scores = endpoint({"inputs": INPUTS})
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    ranking = [{"index": index, "score": scores[index]} for index in order]
    with_texts = [entry | {"text": CANDIDATES[entry["index"]]} for entry in ranking]
    for parameters, expected in [
        ({"ranked": True}, ranking),
        ({"top_k": 2}, ranking[:2]),
        ({"top_k": 0}, []),
        ({"return_documents": True}, with_texts),
        ({"ranked": True, "top_k": 3, "return_documents": True}, with_texts[:3]),
        ({"ranked": True, "return_documents": False}, ranking),
    ]:
        assert endpoint({"inputs": INPUTS, "parameters": parameters}) == expected


def test_no_candidates(endpoint):
    assert endpoint({"inputs": {"context": "a", "candidates": []}}) == []
    assert endpoint({"inputs": {"context": "a", "candidates": []}, "parameters": {"ranked": True}}) == []


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (None, "JSON object"),
        ("hello", "JSON object"),
        ({}, "keys []"),
        ({"inputs": "hello"}, "str: 'hello'"),
        ({"inputs": {"context": "a"}}, "keys ['context']"),
        ({"inputs": {"context": "a", "sentences": ["b"]}}, "'sentences'"),
        ({"inputs": {"context": None, "candidates": ["b"]}}, "NoneType"),
        ({"inputs": {"context": [], "candidates": ["b"]}}, "without a single turn"),
        ({"inputs": {"context": [{"role": "user"}], "candidates": ["b"]}}, "no 'content'"),
        ({"inputs": {"context": "a", "candidates": "b"}}, "list of texts"),
        ({"inputs": {"context": "a", "candidates": ["b", None]}}, "Item 1 of the list"),
        ({"inputs": {"context": "\ud83d", "candidates": ["b"]}}, "lone surrogate"),
        ({"inputs": INPUTS, "parameters": [1]}, "'parameters' is a JSON object"),
        ({"inputs": INPUTS, "parameters": {"topk": 1}}, "no parameter 'topk'"),
        ({"inputs": INPUTS, "parameters": {"top_k": "1"}}, "top_k must be"),
        ({"inputs": INPUTS, "parameters": {"top_k": -1}}, "top_k must be"),
        ({"inputs": INPUTS, "parameters": {"ranked": "yes"}}, "true or false"),
        ({"inputs": INPUTS, "parameters": {"ranked": False, "top_k": 1}}, "belong to a ranking"),
    ],
)
def test_bad_requests_get_an_error_object(endpoint, request_, said):
    (error,) = endpoint(request_).values()
    assert (error["type"], error["status"]) == ("invalid_request", 400)
    assert said in error["message"]


def test_a_text_without_tokens_is_the_senders_fault(checkpoints, tmp_path):
    PolyEncoder(checkpoints("qwen3"), num_codes=2, device="cpu").save(str(tmp_path))  # no special tokens
    (error,) = Endpoint(str(tmp_path))({"inputs": {"context": "a", "candidates": ["b", ""]}}).values()
    assert error["status"] == 400
    assert "has no token" in error["message"]


def test_what_goes_wrong_inside_stays_inside(folders, monkeypatch, caplog):
    endpoint = Endpoint(str(folders["bi"]))

    def fail(*_):
        raise OSError("/srv/secret/token is not readable")

    monkeypatch.setattr(endpoint.scorer, "scores", fail)
    with caplog.at_level(logging.ERROR):
        (error,) = endpoint({"inputs": INPUTS}).values()
    assert (error["type"], error["status"]) == ("internal_error", 500)
    assert "secret" not in error["message"]
    assert "secret" in caplog.text


def test_broken_weights_give_no_scores(folders):
    endpoint = Endpoint(str(folders["cross"]))
    with torch.no_grad():
        endpoint.scorer.encoder.model.classifier.bias.fill_(float("nan"))
    (error,) = endpoint({"inputs": INPUTS}).values()
    assert error["status"] == 500


def test_limits(folders, monkeypatch):
    folder = str(folders["bi-shared"])
    small = Endpoint(folder, max_candidates=3, max_characters=20)
    assert len(small({"inputs": {"context": "ab", "candidates": ["x" * 6] * 3}})) == 3
    for candidates, said in ((["x"] * 4, "4 candidates; this endpoint takes at most 3"), (["x" * 19], "21 characters")):
        (error,) = small({"inputs": {"context": "ab", "candidates": candidates}}).values()
        assert error["status"] == 400
        assert said in error["message"]
    monkeypatch.setenv("POLY_ENCODERS_MAX_CANDIDATES", "1")
    monkeypatch.setenv("POLY_ENCODERS_CACHE_MB", "3")
    by_environment = Endpoint(folder)
    assert by_environment.cache.max_bytes == 3 * 2**20
    assert "error" in by_environment({"inputs": {"context": "ab", "candidates": ["x", "y"]}})
    monkeypatch.setenv("POLY_ENCODERS_CACHE_MB", "lots")
    with pytest.raises(ValueError, match=r"POLY_ENCODERS_CACHE_MB.*'lots'"):
        Endpoint(folder)


# --- the cache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["poly", "bi"])
def test_candidates_are_encoded_once(kind, folders, monkeypatch):
    endpoint = Endpoint(str(folders[kind]))
    holder, name = (
        (endpoint.scorer.pipeline, "encode_candidates") if kind == "poly" else (endpoint.scorer.document, "encode")
    )
    encode, seen = getattr(holder, name), []
    monkeypatch.setattr(holder, name, lambda texts, **options: seen.append(list(texts)) or encode(texts, **options))
    first = endpoint({"inputs": {"context": "hello", "candidates": ["a", "b", "a"]}})
    again = endpoint({"inputs": {"context": "hello", "candidates": ["c", "b", "a"]}})
    assert seen == [["a", "b"], ["c"]]
    assert (first[0], first[1]) == (again[2], again[1])
    without = Endpoint(str(folders[kind]), cache_mb=0)
    assert without({"inputs": {"context": "hello", "candidates": ["a", "b", "a"]}}) == close(first)
    assert len(without.cache) == 0


def _encode(texts):
    return torch.tensor([[float(len(text)), float(ord(text[0]))] for text in texts])


def test_the_cache_forgets_what_was_used_longest_ago():
    one = VectorCache(10**6)
    one.vectors(["a"], _encode)
    cache = VectorCache(3 * one.held_bytes)
    cache.vectors(["a", "b", "c"], _encode)
    cache.vectors(["a"], _encode)
    cache.vectors(["d"], _encode)  # in place of b
    missed = []
    cache.vectors(["a", "b", "c", "d"], lambda texts: missed.extend(texts) or _encode(texts))
    assert missed == ["b"]
    assert cache.held_bytes <= cache.max_bytes
    assert len(cache) == 3


def test_what_is_kept_is_bounded_and_holds_no_more_than_itself():
    cache = VectorCache(50_000)
    vectors = cache.vectors([f"text {number}" for number in range(200)], _encode)
    assert vectors.shape == (200, 2)
    assert 0 < cache.held_bytes <= 50_000
    assert 1 < len(cache) < 50_000 / ENTRY_BYTES  # a small vector takes far more than its numbers
    assert all(vector.untyped_storage().nbytes() == vector.nbytes for vector in cache._vectors.values())
    cache.vectors(["x" * 60_000], _encode)  # larger than all there is room for
    assert cache.held_bytes <= 50_000
    assert len(cache) > 1


def test_threads_share_the_cache():
    cache, wrong = VectorCache(6_000), []

    def work(seed):
        for step in range(60):
            texts = [f"{(seed * 7 + step * place) % 23}" for place in range(9)]
            if not torch.equal(cache.vectors(texts, _encode), _encode(texts)):
                wrong.append(texts)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    held = sum(vector.nbytes for vector in cache._vectors.values())
    assert held < cache.held_bytes <= 6_000


def test_threads_share_an_endpoint(folders):
    """The two sides of a shared Bi-encoder cut one tokenizer's texts to two lengths."""
    endpoint = Endpoint(str(folders["bi-shared"]), cache_mb=0)
    request = {"inputs": {"context": "long " * 40, "candidates": ["long answer " * 9, "no"]}}
    expected, answers = endpoint(request), []
    threads = [threading.Thread(target=lambda: answers.append(endpoint(request))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [close(expected)] * 4


# --- the files --------------------------------------------------------------------------------------------------------


def test_the_handler_is_beside_the_weights_of_every_kind(folders):
    needed = {"handler.py", "endpoint.py", "scorers.py", "sentence_modules.py", "conversations.py", "lengths.py"}
    for folder in folders.values():
        assert needed <= {file.name for file in folder.iterdir()}, folder.name


def test_the_handler_finds_its_own_folder(folders):
    spec = importlib.util.spec_from_file_location("handler.EndpointHandler", folders["bi"] / "handler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    answer = module.EndpointHandler()({"inputs": INPUTS})
    assert answer == EndpointHandler(str(folders["bi"]))({"inputs": INPUTS})
    assert answer == close(scores_of(folders["bi"], TURNS, CANDIDATES))


def test_folders_that_no_endpoint_serves(checkpoints, tmp_path):
    for folder in (checkpoints(), str(tmp_path)):
        with pytest.raises(ValueError, match="no Poly-encoder, Bi-encoder or Cross-encoder"):
            Endpoint(folder)
    AutoModelForSequenceClassification.from_pretrained(checkpoints(), num_labels=3).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(checkpoints()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="3 values for a pair"):
        Endpoint(str(tmp_path))
