"""What is pushed loads again in a fresh process with an empty cache, by every way that there is, to the last bit."""

import json

import pytest
import torch
from huggingface_hub import HfApi

from hub_client import logged_in, run_python

# Short enough for every way: plain sentence-transformers cuts long pairs elsewhere.
CONTEXT = ["Hi! Been here before?", "No."]
CANDIDATES = ["The best here.", "A plumber.", "Opens at nine."]

_START = """
import json
import torch
context, candidates, text = json.loads(sys.argv[1])
found = {}
"""
_END = """
torch.save(found, sys.argv[2])
"""

WITH_PACKAGE = (
    _START
    + """
from transformers import AutoModel, AutoTokenizer
from poly_encoders import BiEncoder, CrossEncoder, PolyEncoder, poly_score
from poly_encoders.loading import load_model

def vectors(model):
    return {
        "contexts": model.encode_query([context], convert_to_tensor=True),
        "candidates": model.encode_document(candidates, convert_to_tensor=True),
    }

found["poly"] = vectors(PolyEncoder("acme/poly", device="cpu"))
found["poly by load_model"] = vectors(load_model("acme/poly", device="cpu"))
found["poly of v1"] = vectors(PolyEncoder("acme/poly", revision="v1", device="cpu"))
found["poly of the branch"] = vectors(PolyEncoder("acme/poly", revision="longer", device="cpu"))
found["bi"] = vectors(BiEncoder("acme/bi", device="cpu"))
found["cross"] = {"scores": CrossEncoder("acme/cross", device="cpu").predict(
    [(context, candidate) for candidate in candidates], convert_to_tensor=True
)}
model, tokenizer = AutoModel.from_pretrained("acme/poly").eval(), AutoTokenizer.from_pretrained("acme/poly")
assert type(model).__module__.startswith("poly_encoders."), type(model)
with torch.no_grad():
    found["poly by AutoModel"] = {
        "contexts": model.get_context_features(**tokenizer([text], return_tensors="pt")),
        "candidates": model.get_candidate_features(**tokenizer(candidates, padding=True, return_tensors="pt")),
    }
"""
    + _END
)

WITHOUT_PACKAGE = (
    _START
    + """
try:
    import poly_encoders
    raise SystemExit("the package is not hidden")
except ModuleNotFoundError:
    pass
from huggingface_hub import snapshot_download
from sentence_transformers import CrossEncoder, SentenceTransformer
from transformers import AutoModel, AutoTokenizer, pipeline

options = {"trust_remote_code": True, "revision": "v1"}
model = AutoModel.from_pretrained("acme/poly", **options).eval()
tokenizer = AutoTokenizer.from_pretrained("acme/poly", **options)
assert type(model).__module__.startswith("transformers_modules."), type(model)
with torch.no_grad():
    found["poly of v1 by AutoModel"] = {
        "contexts": model.get_context_features(**tokenizer([text], return_tensors="pt")),
        "candidates": model.get_candidate_features(**tokenizer(candidates, padding=True, return_tensors="pt")),
    }
bi = SentenceTransformer("acme/bi", device="cpu")
found["bi"] = {
    "contexts": bi.encode_query([text], convert_to_tensor=True),
    "candidates": bi.encode_document(candidates, convert_to_tensor=True),
}
cross = CrossEncoder("acme/cross", device="cpu")
found["cross"] = {"scores": cross.predict([(text, candidate) for candidate in candidates], convert_to_tensor=True)}

ranker = pipeline("sentence-similarity", model="acme/poly", trust_remote_code=True, device="cpu")
ranked = {entry["index"]: entry["score"] for entry in ranker(context=context, candidates=candidates)}
found["poly by pipeline"] = {"scores": torch.tensor([ranked[i] for i in range(len(candidates))])}

import importlib.util
for name in ("poly", "bi", "cross"):
    folder = snapshot_download("acme/" + name)
    spec = importlib.util.spec_from_file_location("handler", folder + "/handler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    answer = module.EndpointHandler(folder)({"inputs": {"source_sentence": context, "sentences": candidates}})
    found[name + " by handler"] = {"scores": torch.tensor(answer)}
"""
    + _END
)


@pytest.fixture
def pushed(models, hub, tmp_path):
    """A private model of each kind on the Hub; the Poly-encoder has a tag of a former one, and a branch.

    The value is what each gives when it is loaded from the folder that it was saved to. What the model in memory gives
    may differ in its last bits, because there the weights lie elsewhere between the boundaries of cache lines.
    """
    expected = {}

    def outputs(model):
        folder = tmp_path / f"model-{len(expected)}"
        model.save_pretrained(str(folder))
        return outputs_of(type(model)(str(folder), device="cpu"))

    with logged_in(hub):
        for name, model in models.items():
            model.push_to_hub(name, private=True)
            expected[name.removeprefix("acme/")] = outputs(model)
        poly = models["acme/poly"]
        HfApi().create_tag("acme/poly", tag="v1")
        expected["poly of v1"] = expected["poly"]
        for revision in ("longer", None):
            with torch.no_grad():
                poly[0].model.codes.mul_(2.0)
            poly.push_to_hub("acme/poly", exist_ok=True, revision=revision)
            expected["poly" if revision is None else "poly of the branch"] = outputs(poly)
    return expected


def outputs_of(model):
    if hasattr(model, "predict"):
        return {"scores": model.predict([(CONTEXT, candidate) for candidate in CANDIDATES], convert_to_tensor=True)}
    contexts = model.encode_query([CONTEXT], convert_to_tensor=True)
    candidates = model.encode_document(CANDIDATES, convert_to_tensor=True)
    return {
        "contexts": contexts,
        "candidates": candidates,
        "scores": model.similarity(contexts, candidates)[0],
    }


@pytest.mark.parametrize("package", [True, False], ids=["with the package", "without the package"])
def test_every_way_of_loading_gives_the_same_numbers(package, pushed, models, hub, tmp_path):
    # AutoModel and plain sentence-transformers know no conversations: they get the text that one becomes.
    text = models["acme/poly"].context_texts([CONTEXT])[0]
    inputs, results = json.dumps([CONTEXT, CANDIDATES, text]), tmp_path / "found.pt"
    run_python(WITH_PACKAGE if package else WITHOUT_PACKAGE, inputs, str(results), hub=hub, hide_package=not package)
    found = torch.load(results, weights_only=True)
    ways = {"poly", "poly of v1", "poly by AutoModel", "poly by load_model", "poly of the branch", "bi", "cross"}
    if not package:
        ways = {"poly of v1 by AutoModel", "bi", "cross", "poly by pipeline"}
        ways |= {f"{name} by handler" for name in ("poly", "bi", "cross")}
    assert found.keys() == ways
    for way, tensors in found.items():
        expected = pushed[way.split(" by ")[0]]
        for name, tensor in tensors.items():
            assert torch.equal(tensor, expected[name]), (way, name, tensor, expected[name])
    assert not torch.equal(pushed["poly"]["contexts"], pushed["poly of v1"]["contexts"])
    assert not torch.equal(pushed["poly"]["contexts"], pushed["poly of the branch"]["contexts"])
