"""Clients that ask for vectors, or for the scores of sentences."""

import base64

import litellm
import numpy as np
import openai
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError

TEXTS = ["Yes, I go camping every summer.", '“Nein” — 犬 🏕 it\'s\n"quoted" \\', "What a long story. " * 500]
CONVERSATION = ["Hi!", "Do you like camping?"]


def client_of(service, key=None):
    return openai.OpenAI(base_url=f"{service.url}/v1", api_key=key or service.key, max_retries=0)


def numbers(embedding):
    """OpenAI's client reads base64, which it asks for by itself, but not where it was told to ask for it."""
    return np.frombuffer(base64.b64decode(embedding), "<f4") if isinstance(embedding, str) else np.array(embedding)


@pytest.mark.parametrize("form", [openai.omit, "float", "base64"], ids=["default", "float", "base64"])
def test_openai_embeds_candidates(form, poly_service, poly_model):
    made = client_of(poly_service).embeddings.create(model="m", input=TEXTS, encoding_format=form)
    vectors = np.stack([numbers(row.embedding) for row in made.data])
    np.testing.assert_allclose(vectors, poly_model.encode_document(TEXTS), atol=1e-6)
    assert [row.index for row in made.data] == [0, 1, 2]
    assert made.usage.total_tokens > 300


def test_openai_embeds_a_thousand_texts(poly_service, poly_model):
    texts = [f"number {place}" for place in range(1000)]
    made = client_of(poly_service).embeddings.create(model="m", input=texts)
    vectors = np.array([row.embedding for row in made.data])
    np.testing.assert_allclose(vectors, poly_model.encode_document(texts), atol=1e-6)


def test_openai_embeds_contexts_of_a_bi_encoder(bi_service, bi_model):
    contexts = ["Hi!", CONVERSATION]
    made = client_of(bi_service).embeddings.create(model="m", input=contexts, extra_body={"input_type": "query"})
    vectors = np.array([row.embedding for row in made.data])
    np.testing.assert_allclose(vectors, bi_model.encode_query(contexts), atol=1e-5)


def test_openai_hears_what_is_wrong(poly_service):
    with pytest.raises(openai.AuthenticationError, match="needs its API key"):
        client_of(poly_service, "wrong").embeddings.create(model="m", input=TEXTS)
    with pytest.raises(openai.BadRequestError, match="is empty"):
        client_of(poly_service).embeddings.create(model="m", input=["Hi!", ""])
    with pytest.raises(openai.BadRequestError, match="A context has 32 vectors in this Poly-encoder"):
        client_of(poly_service).embeddings.create(model="m", input="Hi!", extra_body={"input_type": "query"})
    with pytest.raises(openai.BadRequestError, match="dimensions"):
        client_of(poly_service).embeddings.create(model="m", input="Hi!", dimensions=7)


def test_openai_lists_the_model(poly_service):
    assert [model.id for model in client_of(poly_service).models.list()] == ["PolyEncoder"]


def test_litellm_embeds_candidates(poly_service, poly_model):
    options = {"api_base": f"{poly_service.url}/v1", "api_key": poly_service.key}
    made = litellm.embedding(model="openai/m", input=TEXTS, **options)
    vectors = np.array([row["embedding"] for row in made.data])
    np.testing.assert_allclose(vectors, poly_model.encode_document(TEXTS), atol=1e-6)


def test_the_hubs_client_extracts_features(poly_service, poly_model):
    client = InferenceClient(model=poly_service.url, token=poly_service.key)
    np.testing.assert_allclose(client.feature_extraction(TEXTS), poly_model.encode_document(TEXTS), atol=1e-6)
    one = client.feature_extraction(TEXTS[0], normalize=True, truncate=True)
    np.testing.assert_allclose(one, poly_model.encode_document(TEXTS[:1]), atol=1e-6)


def test_the_hubs_client_extracts_features_of_contexts(bi_service, bi_model):
    client = InferenceClient(model=bi_service.url, token=bi_service.key)
    found = client.feature_extraction(["Hi!", CONVERSATION], prompt_name="query")
    np.testing.assert_allclose(found, bi_model.encode_query(["Hi!", CONVERSATION]), atol=1e-5)


def test_the_hubs_client_hears_what_is_wrong(poly_service):
    with pytest.raises(HfHubHTTPError, match="needs its API key") as error:
        InferenceClient(model=poly_service.url, token="wrong").feature_extraction(TEXTS)
    assert error.value.response.status_code == 401
    client = InferenceClient(model=poly_service.url, token=poly_service.key)
    with pytest.raises(HfHubHTTPError, match="is empty") as error:
        client.feature_extraction(["Hi!", ""])
    assert error.value.response.status_code == 422
    with pytest.raises(HfHubHTTPError, match="longer than the model reads"):
        client.feature_extraction(TEXTS, truncate=False)
