"""A stand-in Hub for each test, and models to push to it."""

import time
from copy import deepcopy

import pytest
import torch

from hub_client import logged_in
from hub_server import running_hub
from poly_encoders import BiEncoder, CrossEncoder


@pytest.fixture
def hub(tmp_path):
    """An empty Hub, with nobody logged in to it."""
    with running_hub(tmp_path) as running:
        yield running


@pytest.fixture
def as_alice(hub):
    """This process, logged in to `hub` with a token of alice's that may write."""
    with logged_in(hub):
        yield hub


@pytest.fixture
def no_waiting(monkeypatch):
    """Have huggingface_hub try again at once."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


@pytest.fixture(scope="session")
def _bi_encoder(checkpoints):
    model = BiEncoder(checkpoints("bert"), device="cpu")
    change_weights(model, seed=5)  # the two encoders start equal, and equal files are uploaded once
    return model


@pytest.fixture(scope="session")
def _cross_encoder(checkpoints):
    model = CrossEncoder(checkpoints("bert"), device="cpu")
    change_weights(model[0].model.classifier, by=5.0)  # a new one can hardly tell two candidates apart
    return model


@pytest.fixture
def models(_poly_encoder, _bi_encoder, _cross_encoder):
    """One of each kind, one's own, by the name that it has on the Hub."""
    return {
        "acme/poly": deepcopy(_poly_encoder),
        "acme/bi": deepcopy(_bi_encoder),
        "acme/cross": deepcopy(_cross_encoder),
    }


def change_weights(model, seed=0, by=0.01):
    """Make it another model, always the same one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=by)
