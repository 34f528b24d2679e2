"""Shared fixtures. Nothing here reaches a network."""

import os
from copy import deepcopy

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# A worker has a core, and tiny models gain nothing from more. To be said before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import hypothesis
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from transformers import AutoModel

import tiny
from poly_encoders import PolyEncoder

hypothesis.settings.register_profile("fast", max_examples=25, deadline=None)
hypothesis.settings.register_profile("ci", max_examples=200, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A function from a family's name to the folder of a tiny encoder checkpoint with its tokenizer; read only.

    Changes are to its configuration: `checkpoints("bert", max_position_embeddings=256)` has room for whole sentences.
    """
    made: dict[str, str] = {}

    def folder(family: str = "bert", **changes: object) -> str:
        key = f"{family} {changes}"
        if key not in made:
            path = tmp_path_factory.mktemp(f"tiny-{family}")
            torch.manual_seed(1)
            AutoModel.from_config(tiny.family_config(family, **changes)).save_pretrained(path)
            tiny.make_tokenizer(left=family in tiny.LEFT_PADDED).save_pretrained(path)
            made[key] = str(path)
        return made[key]

    return folder


@pytest.fixture(scope="session")
def sentence_transformer_folder(checkpoints, tmp_path_factory):
    """A tiny SentenceTransformer: mean pooling, then normalised."""
    encoder = Transformer(checkpoints("bert"))
    path = tmp_path_factory.mktemp("tiny-sentence-transformer")
    SentenceTransformer(modules=[encoder, Pooling(tiny.WIDTH, "mean"), Normalize()], device="cpu").save(str(path))
    return str(path)


@pytest.fixture(scope="session")
def _poly_encoder(checkpoints):
    return PolyEncoder(checkpoints("bert"), num_codes=4, device="cpu")


@pytest.fixture
def poly_encoder(_poly_encoder):
    """A tiny PolyEncoder of one's own, with a vector for each turn: a test may train or break it."""
    return deepcopy(_poly_encoder)


@pytest.fixture(scope="session")
def _codes_encoder(checkpoints):
    torch.manual_seed(0)
    options = {
        "context_vectors": "learnt_codes",
        "normalize": False,
        "num_codes": 4,
        "config_kwargs": {"code_std": 1.0},
    }
    return PolyEncoder(checkpoints("bert"), device="cpu", **options)


@pytest.fixture
def codes_encoder(_codes_encoder):
    """The same of the paper's form: learnt codes, dot products, two encoders."""
    return deepcopy(_codes_encoder)


@pytest.fixture(scope="session")
def saved_poly_encoder(_poly_encoder, tmp_path_factory):
    """The folder that the tiny PolyEncoder saves; read only."""
    path = tmp_path_factory.mktemp("saved") / "poly"
    _poly_encoder.save_pretrained(str(path))
    return path


@pytest.fixture(scope="session")
def saved_codes_encoder(_codes_encoder, tmp_path_factory):
    """The folder that the paper's form saves; read only."""
    path = tmp_path_factory.mktemp("saved") / "codes"
    _codes_encoder.save_pretrained(str(path))
    return path
