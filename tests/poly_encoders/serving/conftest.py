"""A service over tiny models, without a network: requests go into the application itself."""

from contextlib import contextmanager

import pytest
from starlette.testclient import TestClient

from poly_encoders import BiEncoder, CrossEncoder
from poly_encoders.serving.app import create_app
from poly_encoders.serving.serve_options import ServeOptions


@pytest.fixture
def bi_encoder(sentence_transformer_folder):
    return BiEncoder(sentence_transformer_folder, device="cpu")


@pytest.fixture
def cross_encoder(checkpoints):
    return CrossEncoder(checkpoints("bert"), device="cpu")


@pytest.fixture(params=["poly_encoder", "bi_encoder", "cross_encoder"])
def any_model(request):
    """Each of the three kinds."""
    return request.getfixturevalue(request.param)


@contextmanager
def serving(model, **options):
    """A client of a service of this model; its application is `client.app`."""
    app = create_app(ServeOptions("tiny", **options), model)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="session")
def serve():
    return serving
