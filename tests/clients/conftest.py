"""Services that run as their users start them, over a tiny model of each kind."""

import os
from typing import NamedTuple

# To be said before litellm and haystack are imported: the one fetches a list of prices, the other tells of its use.
os.environ |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "HAYSTACK_TELEMETRY_ENABLED": "False"}

import huggingface_hub.constants
import pytest

from poly_encoders import BiEncoder, CrossEncoder, PolyEncoder
from poly_encoders.index import CandidateIndex
from served import running

ROWS = [
    {"id": "camp", "text": "Yes, I go camping every summer.", "year": 2024},
    {"id": "pasta", "text": "I had the pasta.", "year": 2025},
]


class Service(NamedTuple):
    """Where one listens, and its key."""

    url: str
    key: str = "secret"


@pytest.fixture(autouse=True)
def online(monkeypatch):
    """Hugging Face's client lets nothing out in its offline mode, not even to this machine."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


@pytest.fixture(scope="session")
def folders(checkpoints, tmp_path_factory):
    """Saved models: a Poly-encoder whose scores are cosines, a Bi-encoder of dot products, a Cross-encoder."""
    folder, encoder = tmp_path_factory.mktemp("models"), checkpoints("bert", max_position_embeddings=256)
    made = {kind: kind(encoder, device="cpu") for kind in (PolyEncoder, BiEncoder, CrossEncoder)}
    made[CrossEncoder][0].model.classifier.weight.data.mul_(50)  # a new one can hardly tell two candidates apart
    for kind, model in made.items():
        model.save_pretrained(str(folder / kind.__name__))
    return {kind: folder / kind.__name__ for kind in made}


@pytest.fixture(scope="session")
def models(folders):
    """As they are loaded again."""
    loaded = {kind: kind(str(folder), device="cpu") for kind, folder in folders.items()}
    assert loaded[PolyEncoder].scores_are_cosines
    assert not loaded[BiEncoder].scores_are_cosines
    return loaded


@pytest.fixture(scope="session")
def services(folders, models, tmp_path_factory):
    """All three, running until the session ends; the Poly-encoder has an index."""
    index = str(tmp_path_factory.mktemp("index") / "faq")
    CandidateIndex.build(models[PolyEncoder], ROWS, index)
    with (
        running(folders[PolyEncoder], "--index", index) as poly,
        running(folders[BiEncoder]) as bi,
        running(folders[CrossEncoder]) as cross,
    ):
        servers = {PolyEncoder: poly, BiEncoder: bi, CrossEncoder: cross}
        yield {kind: Service(f"http://127.0.0.1:{server.port}") for kind, server in servers.items()}


@pytest.fixture(params=[PolyEncoder, BiEncoder, CrossEncoder])
def kind(request):
    return request.param


@pytest.fixture
def service(services, kind):
    return services[kind]


@pytest.fixture
def model(models, kind):
    return models[kind]


@pytest.fixture
def poly_service(services):
    return services[PolyEncoder]


@pytest.fixture
def poly_model(models):
    return models[PolyEncoder]


@pytest.fixture
def bi_service(services):
    return services[BiEncoder]


@pytest.fixture
def bi_model(models):
    return models[BiEncoder]
