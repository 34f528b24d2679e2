"""The private names of upstream that this package leans on. If one moves, this says so before a user does."""

import ast
import importlib
import inspect
import pkgutil

import pytest
from sentence_transformers.base.modules import Transformer

import poly_encoders
from poly_encoders.upstream import PRIVATE

LISTED = {entry.rpartition(":")[2].rpartition(".")[2] for entry in PRIVATE}


@pytest.mark.parametrize("entry", PRIVATE)
def test_it_is_there_as_it_was(entry):
    parameters, purpose = PRIVATE[entry]
    try:
        found = pkgutil.resolve_name(entry)
    except (ImportError, AttributeError) as error:
        pytest.fail(f"{entry} is gone ({error}). It was used for: {purpose}.")
    if parameters is not None:
        there = list(inspect.signature(found).parameters)
        wanted = [name for name in parameters.split() if name != "..."]
        changed = f"{entry} has the parameters {there} now, where {parameters!r} was relied on for: {purpose}."
        assert (there == wanted) if "..." not in parameters else (set(wanted) <= set(there)), changed


@pytest.fixture(scope="module")
def modules():
    names = (found.name for found in pkgutil.walk_packages(poly_encoders.__path__, "poly_encoders."))
    return [importlib.import_module(name) for name in names if not name.endswith("__main__")]


def is_private(name):
    known = ("_abc_impl", "_modules", "_replace")  # of Python and torch, for good
    return name.startswith("_") and not name.startswith("__") and name not in known


def test_what_takes_the_place_of_a_private_name_is_listed(modules):
    kinds = {kind for module in modules for kind in vars(module).values() if inspect.isclass(kind)}
    for kind in {kind for kind in kinds if str(kind.__module__).startswith("poly_encoders")}:
        bases = [base for base in kind.__mro__[1:] if not str(base.__module__).startswith(("poly_encoders", "enum"))]
        overridden = {name for name in vars(kind) if is_private(name) and any(name in vars(base) for base in bases)}
        assert overridden <= LISTED, kind


def test_private_names_that_are_nowhere_ours_are_listed(modules):
    ours, used = set(), {}
    for module in modules:
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            name = next((vars(node)[kind] for kind in ("name", "attr", "id", "arg") if kind in vars(node)), None)
            if name and isinstance(getattr(node, "ctx", None), ast.Load):
                used.setdefault(name, module.__name__)
            else:
                ours.add(name)
    assert {name: user for name, user in used.items() if is_private(name) and name not in ours | LISTED} == {}


def test_a_plain_sentence_transformer_asks_a_model_for_text_features():
    """What lets PolyEncoderModel refuse to be loaded as a SentenceTransformer."""
    assert "get_{modality}_features" in inspect.getsource(Transformer.infer_modalities)
