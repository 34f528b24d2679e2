"""The saved folder by itself: loading it in a process where this package does not exist."""

import ast
import importlib.util
import json
import shutil
import sys
from operator import itemgetter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from poly_encoders import PolyEncoder, modeling
from without_package import run_without_package


def test_loads_scores_and_saves_without_the_package(poly_encoder, saved_poly_encoder, tmp_path):
    code = """
import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer
try:
    import poly_encoders
    raise SystemExit("the package is not hidden")
except ModuleNotFoundError:
    pass
path, out = sys.argv[1:]
try:
    AutoModel.from_pretrained(path, trust_remote_code=False)
    raise SystemExit("code was run without being asked")
except ValueError as error:
    assert "trust_remote_code" in str(error)
config = AutoConfig.from_pretrained(path, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
model = AutoModel.from_pretrained(path, trust_remote_code=True).eval()
with torch.no_grad():
    context = model.get_context_features(**tokenizer(["hello\\nthere"], return_tensors="pt"))
    candidates = model.get_candidate_features(**tokenizer(["yes", "no"], return_tensors="pt", padding=True))
torch.save({"context": context, "candidates": candidates}, out + "/vectors.pt")
model.save_pretrained(out + "/again")
tokenizer.save_pretrained(out + "/again")
again = AutoModel.from_pretrained(out + "/again", trust_remote_code=True).eval()
with torch.no_grad():
    same = again.get_context_features(**tokenizer(["hello\\nthere"], return_tensors="pt"))
print(type(model).__module__.split(".")[0], torch.equal(same, context))
"""
    out = run_without_package(code, str(saved_poly_encoder), str(tmp_path), cache=tmp_path)
    assert out.split() == ["transformers_modules", "True"]
    vectors = torch.load(tmp_path / "vectors.pt", weights_only=True)
    expected = poly_encoder.encode_query([["hello", "there"]], convert_to_tensor=True)
    assert (expected[0] != 0).any(dim=-1).tolist() == [True, True, False, False]
    torch.testing.assert_close(vectors["context"], expected)
    torch.testing.assert_close(
        vectors["candidates"], poly_encoder.encode_document(["yes", "no"], convert_to_tensor=True)
    )
    assert sources(tmp_path / "again") == sources(saved_poly_encoder)


def sources(folder):
    """The code in a folder, by file."""
    return {file.name: file.read_text(encoding="utf-8") for file in folder.glob("*.py")}


def test_the_files_that_travel(saved_poly_encoder):
    package = {file.name for file in Path(modeling.__file__).parent.glob("*.py")} - {"__init__.py"}
    assert sources(saved_poly_encoder).keys() == package
    # handler.py is the name that Inference Endpoints look for; the others' names say whose they are.
    assert all(name.endswith("_poly_encoder.py") for name in package - {"handler.py"})
    assert len(package) == 6
    # A model's folder is put first on an endpoint's path, where a file may bear no library's name.
    assert not [name for name in package if importlib.util.find_spec(name.removesuffix(".py"))]
    assert json.loads((saved_poly_encoder / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_poly_encoder.PolyEncoderConfig",
        "AutoModel": "modeling_poly_encoder.PolyEncoderModel",
    }


def test_travelling_files_import_nothing_but_torch_and_transformers(saved_poly_encoder):
    code = sources(saved_poly_encoder)
    allowed = sys.stdlib_module_names | {"torch", "transformers"}
    for name, text in code.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert f"{node.module}.py" in code, (name, node.module)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
                assert {module.split(".")[0] for module in modules} <= allowed, (name, modules)


THE_HUBS_SNIPPET = """
import builtins
def ask(*question):
    raise SystemExit("a prompt nobody answers")
builtins.input = ask

# Load model directly
from transformers import AutoTokenizer, AutoModel

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True, device_map="auto")

import json
inputs = tokenizer(["hello"], return_tensors="pt").to(model.device)
candidates = tokenizer(["yes", "no"], return_tensors="pt", padding=True).to(model.device)
candidates = {f"candidate_{name}": tensor for name, tensor in candidates.items()}
scores = [model(**inputs, **candidates).scores[0].tolist()]

# A part on another device than the rest.
scalars = {"log_temperature": "cpu", "last_turn_logit": "cpu"}
places = {"context_encoder": "cpu", "candidate_encoder": "disk", "codes": "cpu", **scalars}
model = AutoModel.from_pretrained(
    sys.argv[1], trust_remote_code=True, device_map=places, offload_folder="offloaded"
)
scores.append(model(**inputs, **candidates).scores[0].tolist())
print(json.dumps(scores))
"""


@pytest.mark.parametrize("all_weights", [False, True])
def test_the_hubs_own_snippet(checkpoints, tmp_path, all_weights):
    learnt = {"learn_final_temperature": True, "learn_last_turn_share": True, "share_encoders": False}
    options = {"context_vectors": "turns_and_codes", "config_kwargs": learnt} if all_weights else {}
    model = PolyEncoder(checkpoints(), num_codes=4, device="cpu", **options)
    model.save_pretrained(str(tmp_path / "model"))
    out = run_without_package(THE_HUBS_SNIPPET, str(tmp_path / "model"), cache=tmp_path)
    expected = [entry["score"] for entry in sorted(model.rank("hello", ["yes", "no"]), key=itemgetter("corpus_id"))]
    assert json.loads(out.splitlines()[-1]) == [pytest.approx(expected, rel=1e-5)] * 2


PINNED = """
import json
from transformers import AutoConfig, AutoModel, AutoTokenizer, pipeline
out = []
for revision in (None, "1" * 40):
    pinned = {"trust_remote_code": True, "revision": revision}
    config = AutoConfig.from_pretrained("acme/poly", **pinned)
    model = AutoModel.from_pretrained("acme/poly", **pinned)
    pipe = pipeline("sentence-similarity", model="acme/poly", **pinned)
    AutoTokenizer.from_pretrained("acme/poly", **pinned)
    ranked = pipe(context="hello", candidates=["yes"])
    out.append([config.num_codes, model.codes[0, 0].item(), pipe.model.num_codes_said, ranked[0]["score"]])
    kept = "kept" + str(revision)
    pipe.save_pretrained(kept)
    again = pipeline("sentence-similarity", model=kept, trust_remote_code=True)
    assert again.model.num_codes_said == pipe.model.num_codes_said
print(json.dumps(out))
"""


def test_a_pinned_revision_has_its_own_weights_and_code(saved_codes_encoder, tmp_path, monkeypatch):
    """Two commits whose weights and code differ: the older one, by its id, is not run with the newer one's code."""
    repo = tmp_path / "hub" / "models--acme--poly"  # as a download leaves it
    for number in (1, 2):
        folder = repo / "snapshots" / (str(number) * 40)
        shutil.copytree(saved_codes_encoder, folder)
        weights = load_file(folder / "model.safetensors")
        # One coordinate only: layer norm's outputs sum to 0, so that codes of equal coordinates look everywhere alike.
        weights["codes"] = torch.zeros_like(weights["codes"])
        weights["codes"][:, 0] = number
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        code, marked = folder / "modeling_poly_encoder.py", f"    num_codes_said = {number}\n    config_class = "
        code.write_text(code.read_text().replace("    config_class = ", marked, 1))
        (folder / "handler.py").write_text("import what_an_endpoint_alone_has  # a user's own\n")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("2" * 40)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    latest, pinned = json.loads(run_without_package(PINNED, cache=tmp_path).splitlines()[-1])
    assert latest[:3] == [4, 2.0, 2]
    assert pinned[:3] == [4, 1.0, 1]
    assert latest[3] != pinned[3]
