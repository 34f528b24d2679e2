"""What is pushed loads again with an empty cache, by every way that there is, to the last bit; its card's code runs."""

import json
import re

import torch
from huggingface_hub import HfApi

from card_snippets import assert_prints_what_it_shows, python_blocks
from hub_client import logged_in, run_python
from poly_encoders import BiEncoder, CandidateRankingEvaluator, CrossEncoder, PolyEncoder

# Short enough for every way: plain sentence-transformers cuts long pairs elsewhere.
CONTEXT = ["Hi! Been here before?", "No."]
CANDIDATES = ["The best here.", "A plumber.", "Opens at nine."]
SETS = [{"context": ["a fish?", "no, a bird"], "candidates": ["it flies", "it swims"], "label": 0}]
KINDS = {"acme/poly": PolyEncoder, "acme/bi": BiEncoder, "acme/cross": CrossEncoder}

_START = """
import json
import torch
context, candidates, text, results, blocks = json.loads(sys.argv[1])
found = {}

def vectors(model, context=context):
    return {
        "contexts": model.encode_query([context], convert_to_tensor=True),
        "candidates": model.encode_document(candidates, convert_to_tensor=True),
    }

def features(model, tokenizer):
    with torch.no_grad():
        return {
            "contexts": model.get_context_features(**tokenizer([text], return_tensors="pt")),
            "candidates": model.get_candidate_features(**tokenizer(candidates, padding=True, return_tensors="pt")),
        }
"""
_END = """
torch.save(found, results)
for block in blocks:
    print("=====")
    exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})
"""

WITH_PACKAGE = """
from transformers import AutoModel, AutoTokenizer
from poly_encoders import BiEncoder, CrossEncoder, PolyEncoder
from poly_encoders.loading import load_model

found["poly"] = vectors(PolyEncoder("acme/poly", device="cpu"))
found["poly by load_model"] = vectors(load_model("acme/poly", device="cpu"))
found["poly of v1"] = vectors(PolyEncoder("acme/poly", revision="v1", device="cpu"))
found["poly of the branch"] = vectors(PolyEncoder("acme/poly", revision="longer", device="cpu"))
found["bi"] = vectors(BiEncoder("acme/bi", device="cpu"))
pairs = [(context, candidate) for candidate in candidates]
found["cross"] = {"scores": CrossEncoder("acme/cross", device="cpu").predict(pairs, convert_to_tensor=True)}
model = AutoModel.from_pretrained("acme/poly").eval()
assert type(model).__module__.startswith("poly_encoders."), type(model)
found["poly by AutoModel"] = features(model, AutoTokenizer.from_pretrained("acme/poly"))
"""

WITHOUT_PACKAGE = """
try:
    import poly_encoders
    raise SystemExit("the package is not hidden")
except ModuleNotFoundError:
    pass
from huggingface_hub import snapshot_download
from sentence_transformers import CrossEncoder, SentenceTransformer
from transformers import AutoModel, AutoTokenizer, pipeline

options = {"trust_remote_code": True, "revision": "v1"}
model = AutoModel.from_pretrained("acme/poly", device_map="auto", **options).eval()  # as in the Hub's own snippet
assert type(model).__module__.startswith("transformers_modules."), type(model)
found["poly of v1 by AutoModel"] = features(model, AutoTokenizer.from_pretrained("acme/poly", **options))
bi = SentenceTransformer("acme/bi", device="cpu")
found["bi"] = vectors(bi, text)
# The Hub's widget and snippet name no side: they get candidates.
found["bi by encode"] = {"candidates": bi.encode(candidates, convert_to_tensor=True)}
cross = CrossEncoder("acme/cross", device="cpu")
found["cross"] = {"scores": cross.predict([(text, candidate) for candidate in candidates], convert_to_tensor=True)}

ranker = pipeline("sentence-similarity", model="acme/poly", trust_remote_code=True, device="cpu")
ranked = {entry["index"]: entry["score"] for entry in ranker(context=context, candidates=candidates)}
found["poly by pipeline"] = {"scores": torch.tensor([ranked[i] for i in range(len(candidates))])}

folder = snapshot_download("acme/poly")
sys.path.insert(0, folder)
from handler import EndpointHandler
answer = EndpointHandler(folder)({"inputs": {"source_sentence": context, "sentences": candidates}})
found["poly by handler"] = {"scores": torch.tensor(answer)}
"""


def loaded_again(model, folder):
    """What the model gives, loaded from a folder.

    In memory it may differ in its last bits: there the weights lie elsewhere between the boundaries of cache lines.
    """
    model.save_pretrained(str(folder))
    again = type(model)(str(folder), device="cpu")
    if isinstance(again, CrossEncoder):
        scores = again.predict([(CONTEXT, candidate) for candidate in CANDIDATES], convert_to_tensor=True)
        return {"scores": scores}
    contexts = again.encode_query([CONTEXT], convert_to_tensor=True)
    candidates = again.encode_document(CANDIDATES, convert_to_tensor=True)
    return {"contexts": contexts, "candidates": candidates, "scores": again.similarity(contexts, candidates)[0]}


def test_every_way_of_loading_gives_the_same_numbers(checkpoints, hub, tmp_path):
    """A private model of each kind; the Poly-encoder has a tag of a former one, and a branch."""
    expected = {}
    encoder = checkpoints("bert", max_position_embeddings=256)
    with logged_in(hub):
        for name, kind in KINDS.items():
            torch.manual_seed(0)
            model = kind(encoder, device="cpu", **({"num_codes": 4} if kind is PolyEncoder else {}))
            for parameter in model.parameters():
                parameter.data.add_(torch.randn(parameter.shape), alpha=0.01)  # the two encoders start equal
            CandidateRankingEvaluator(SETS, show_progress_bar=False, at_k=(1,))(model)
            if kind is PolyEncoder:
                for revision, way in ((None, "poly of v1"), ("longer", "poly of the branch")):
                    model.push_to_hub(name, private=True, exist_ok=True, revision=revision)
                    expected[way] = loaded_again(model, tmp_path / way)
                    model[0].model.context_encoder.embeddings.LayerNorm.weight.data.mul_(2.0)
                HfApi().create_tag(name, tag="v1")
            model.push_to_hub(name, private=True, exist_ok=True)
            expected[name.removeprefix("acme/")] = loaded_again(model, tmp_path / name)
        # AutoModel and plain sentence-transformers know no conversations: they get the text that one becomes.
        text = model.context_texts([CONTEXT])[0]
    assert all(check.status == 200 for check in hub.requests("POST", "/api/validate-yaml"))
    assert not torch.equal(expected["poly"]["contexts"], expected["poly of v1"]["contexts"])

    cards = {name: hub.files(name)["README.md"].decode() for name in KINDS}
    blocks = [block for card in cards.values() for block in python_blocks(card)]
    for name, card in cards.items():
        assert str(tmp_path) not in card
        assert len(re.findall(f'"{name}"', card)) == len(python_blocks(card))
    ours = [block for block in blocks if "poly_encoders" in block]
    others = [block for block in blocks if "poly_encoders" not in block]
    assert (len(ours), len(others)) == (3, 4)

    ways = set()
    for code, group, hidden in ((WITH_PACKAGE, ours, False), (WITHOUT_PACKAGE, others, True)):
        results = tmp_path / f"found-{hidden}.pt"
        given = json.dumps([CONTEXT, CANDIDATES, text, str(results), group])
        _, *outputs = run_python(_START + code + _END, given, hub=hub, hide_package=hidden).split("=====\n")
        for way, tensors in torch.load(results, weights_only=True).items():
            ways.add(way)
            for name, tensor in tensors.items():
                wanted = expected[way.split(" by ")[0]][name]
                assert torch.equal(tensor, wanted), (way, name, tensor, wanted)
        for block, output in zip(group, outputs, strict=True):
            assert_prints_what_it_shows(block, output)
    assert len(ways) == 11
