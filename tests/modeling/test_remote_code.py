"""The saved folder by itself: loading it in a process where this package does not exist."""

import ast
import json
import sys

import pytest
import torch

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
config = AutoConfig.from_pretrained(path, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
model = AutoModel.from_pretrained(path, trust_remote_code=True).eval()
with torch.no_grad():
    context = model.get_context_features(**tokenizer(["hello there"], return_tensors="pt"))
    candidates = model.get_candidate_features(**tokenizer(["yes", "no"], return_tensors="pt", padding=True))
torch.save({"context": context, "candidates": candidates}, out + "/vectors.pt")
model.save_pretrained(out + "/again")
tokenizer.save_pretrained(out + "/again")
again = AutoModel.from_pretrained(out + "/again", trust_remote_code=True).eval()
with torch.no_grad():
    same = again.get_context_features(**tokenizer(["hello there"], return_tensors="pt"))
print(type(model).__module__.split(".")[0], torch.equal(same, context))
"""
    out = run_without_package(code, str(saved_poly_encoder), str(tmp_path), cache=tmp_path)
    assert out.split() == ["transformers_modules", "True"]
    vectors = torch.load(tmp_path / "vectors.pt", weights_only=True)
    expected = poly_encoder.encode_query(["hello there"], convert_to_tensor=True)
    torch.testing.assert_close(vectors["context"], expected)
    torch.testing.assert_close(
        vectors["candidates"], poly_encoder.encode_document(["yes", "no"], convert_to_tensor=True)
    )
    assert {"configuration_poly_encoder.py", "modeling_poly_encoder.py"} <= {
        file.name for file in (tmp_path / "again").iterdir()
    }


def test_the_code_is_not_run_without_being_asked(saved_poly_encoder, tmp_path):
    code = """
from transformers import AutoModel
try:
    AutoModel.from_pretrained(sys.argv[1], trust_remote_code=False)
except ValueError as error:
    print("trust_remote_code" in str(error))
"""
    assert run_without_package(code, str(saved_poly_encoder), cache=tmp_path).strip() == "True"


def test_auto_map_names_both_files(saved_poly_encoder):
    config = json.loads((saved_poly_encoder / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_poly_encoder.PolyEncoderConfig",
        "AutoModel": "modeling_poly_encoder.PolyEncoderModel",
    }


@pytest.mark.parametrize("name", ["configuration_poly_encoder.py", "modeling_poly_encoder.py"])
def test_travelling_files_import_nothing_but_torch_and_transformers(saved_poly_encoder, name):
    allowed = set(sys.stdlib_module_names) | {"torch", "transformers"}
    for node in ast.walk(ast.parse((saved_poly_encoder / name).read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 or node.module == "configuration_poly_encoder"
            names = [] if node.level else [node.module or ""]
        for module in names:
            assert module.split(".")[0] in allowed, module
