"""Rerankers of others rank as the model does, and say what is wrong in their own words."""

import itertools
import math

import cohere
import httpx
import infinity_client
import litellm
import pytest
from haystack import Document as HaystackDocument
from haystack.utils import Secret
from haystack_integrations.components.rankers.cohere import CohereRanker
from haystack_integrations.components.rankers.huggingface_api import HuggingFaceTEIRanker
from haystack_integrations.components.rankers.jina import JinaRanker
from haystack_integrations.components.rankers.vllm import VLLMRanker
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_cohere import CohereRerank as LangChainCohere
from langchain_community.document_compressors import InfinityRerank, JinaRerank, jina_rerank
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.postprocessor.cohere_rerank import CohereRerank as LlamaIndexCohere
from llama_index.postprocessor.jinaai_rerank import JinaRerank as LlamaIndexJina
from llama_index.postprocessor.tei_rerank import TextEmbeddingInference

from poly_encoders import CrossEncoder

litellm.suppress_debug_info = True

QUESTION = 'Do you like "camping"? 🏕'
TURNS = ["Hi! How was your weekend?", "Great, we went hiking.", QUESTION]
MESSAGES = [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": QUESTION}]
TEXTS = [
    "Yes, I go camping every summer.",
    "“Nein, danke” — said Jürgen's 犬 \\ and left\nfor good.",
    "I had the pasta.",
    "What a long story. " * 500,
    "It's 3 < 4 & 5 > 4, isn't it?",
]

# --- each client, as a function that gives pairs of index and score --------------------------------------------------


def cohere_v2(url, key, question, texts, top_n):
    found = cohere.ClientV2(api_key=key, base_url=url).rerank(model="m", query=question, documents=texts, top_n=top_n)
    return [(row.index, row.relevance_score) for row in found.results]


def cohere_v1(url, key, question, texts, top_n):
    client = cohere.Client(api_key=key, base_url=url)
    found = client.rerank(model="m", query=question, documents=texts, top_n=top_n, return_documents=True)
    assert [row.document.text for row in found.results] == [texts[row.index] for row in found.results]
    return [(row.index, row.relevance_score) for row in found.results]


def _compressed(compressor, question, texts):
    documents = [Document(page_content=text, metadata={"place": place}) for place, text in enumerate(texts)]
    found = compressor.compress_documents(documents, question)
    return [(document.metadata["place"], document.metadata["relevance_score"]) for document in found]


def langchain_cohere(url, key, question, texts, top_n):
    return _compressed(LangChainCohere(model="m", base_url=url, cohere_api_key=key, top_n=top_n), question, texts)


def langchain_jina(url, key, question, texts, top_n):
    jina_rerank.JINA_API_URL = f"{url}/v1/rerank"
    return _compressed(JinaRerank(jina_api_key=key, top_n=top_n), question, texts)


def langchain_infinity(url, key, question, texts, top_n):
    headers = {"Authorization": f"Bearer {key}"}
    client = infinity_client.Client(f"{url}/infinity", headers=headers, raise_on_unexpected_status=True)
    return _compressed(InfinityRerank(client=client, model="m", top_n=top_n or len(texts)), question, texts)


def _postprocessed(postprocessor, question, texts):
    nodes = [NodeWithScore(node=TextNode(text=text, id_=str(place))) for place, text in enumerate(texts)]
    return [(int(node.node_id), node.score) for node in postprocessor.postprocess_nodes(nodes, query_str=question)]


def llama_index_cohere(url, key, question, texts, top_n):
    options = {"api_key": key, "base_url": url, "model": "m", "top_n": top_n or len(texts)}
    return _postprocessed(LlamaIndexCohere(**options), question, texts)


def llama_index_tei(url, key, question, texts, top_n):
    options = {"base_url": url, "auth_token": f"Bearer {key}", "top_n": top_n or len(texts)}
    return _postprocessed(TextEmbeddingInference(**options), question, texts)


def llama_index_jina(url, key, question, texts, top_n):
    options = {"base_url": f"{url}/v1", "api_key": key, "top_n": top_n or len(texts)}
    return _postprocessed(LlamaIndexJina(**options), question, texts)


def _litellm(provider, path=""):
    def rerank(url, key, question, texts, top_n):
        options = {"query": question, "documents": texts, "top_n": top_n, "api_base": f"{url}{path}", "api_key": key}
        found = litellm.rerank(model=f"{provider}/m", return_documents=True, **options)
        assert [row["document"]["text"] for row in found.results] == [texts[row["index"]] for row in found.results]
        return [(row["index"], row["relevance_score"]) for row in found.results]

    return rerank


def _ranked_documents(ranker, question, texts):
    documents = [HaystackDocument(content=text, meta={"place": place}) for place, text in enumerate(texts)]
    return [(found.meta["place"], found.score) for found in ranker.run(question, documents)["documents"]]


def haystack_cohere(url, key, question, texts, top_n):
    options = {"model": "m", "api_base_url": url, "api_key": Secret.from_token(key), "top_k": top_n or len(texts)}
    return _ranked_documents(CohereRanker(**options), question, texts)


def haystack_tei(url, key, question, texts, top_n, **more):
    options = {"url": url, "token": Secret.from_token(key), "top_k": top_n or len(texts), **more}
    return _ranked_documents(HuggingFaceTEIRanker(**options), question, texts)


def haystack_jina(url, key, question, texts, top_n):
    options = {"model": "m", "base_url": f"{url}/v1/rerank", "api_key": Secret.from_token(key), "top_k": top_n}
    return _ranked_documents(JinaRanker(**options), question, texts)


def haystack_vllm(url, key, question, texts, top_n):
    options = {"model": "m", "api_base_url": f"{url}/v1", "api_key": Secret.from_token(key), "top_k": top_n}
    return _ranked_documents(VLLMRanker(**options), question, texts)


def haystack_vllm_raw(url, key, question, texts, top_n):
    options = {"model": "m", "api_base_url": f"{url}/v1", "api_key": Secret.from_token(key), "top_k": top_n}
    ranker = VLLMRanker(extra_parameters={"use_activation": False}, **options)
    return _ranked_documents(ranker, question, texts)


def haystack_tei_raw(url, key, question, texts, top_n):
    return haystack_tei(url, key, question, texts, top_n, raw_scores=True)


def hub_sentence_similarity(url, key, question, texts, top_n):
    scores = InferenceClient(model=url, token=key).sentence_similarity(question, texts)
    return sorted(enumerate(scores), key=lambda row: -row[1])[:top_n]


# What each raises for a wrong key and for an empty document. Some have nothing but RuntimeError; `says` is for those.
ALIKE = (RuntimeError, RuntimeError)
COHERE = (cohere.UnauthorizedError, cohere.BadRequestError)
LITELLM = (litellm.AuthenticationError, litellm.BadRequestError)
CLIENTS = {
    "cohere v2": (cohere_v2, COHERE),
    "cohere v1": (cohere_v1, COHERE),
    "langchain cohere": (langchain_cohere, COHERE),
    "langchain jina": (langchain_jina, ALIKE),
    "langchain infinity": (langchain_infinity, (infinity_client.errors.UnexpectedStatus,) * 2),
    "llama-index cohere": (llama_index_cohere, COHERE),
    "llama-index jina": (llama_index_jina, ALIKE),
    "llama-index tei": (llama_index_tei, None),  # looks at no status
    "litellm cohere": (_litellm("cohere"), LITELLM),
    "litellm jina_ai": (_litellm("jina_ai"), LITELLM),
    "litellm hosted_vllm": (_litellm("hosted_vllm"), LITELLM),
    "litellm huggingface": (
        _litellm("huggingface"),
        (litellm.AuthenticationError, litellm.APIError),
    ),  # no name for 422
    "litellm infinity": (_litellm("infinity", "/infinity"), LITELLM),
    "haystack cohere": (haystack_cohere, COHERE),
    "haystack tei": (haystack_tei, ALIKE),
    "haystack jina": (haystack_jina, ALIKE),
    "haystack vllm": (haystack_vllm, ALIKE),
}
RAW = {
    "haystack tei raw": (haystack_tei_raw, ALIKE),
    "haystack vllm raw": (haystack_vllm_raw, ALIKE),
    "huggingface_hub": (hub_sentence_similarity, (HfHubHTTPError, HfHubHTTPError)),
}
EVERY = CLIENTS | RAW
every_client = pytest.mark.parametrize("name", EVERY)


def unit(model, score):
    """Between 0 and 1, as docs/serving.md says."""
    if isinstance(model, CrossEncoder):
        return 1 / (1 + math.exp(-score))
    return (1 + score) / 2 if model.scores_are_cosines else (1 + score / (1 + abs(score))) / 2


def expected(model, name, question, texts):
    """(index, score) pairs as `rank` has them, between 0 and 1 where the client's interface has them so."""
    ranked = [(row["corpus_id"], row["score"]) for row in model.rank(question, texts)]
    return [(index, unit(model, score) if name in CLIENTS else score) for index, score in ranked]


def assert_same(found, wanted):
    assert [index for index, _ in found] == [index for index, _ in wanted]
    assert [score for _, score in found] == pytest.approx([score for _, score in wanted], abs=2e-6)


@every_client
def test_ranks_as_the_model(name, service, model):
    wanted = expected(model, name, QUESTION, TEXTS)
    gaps = [one - other for (_, one), (_, other) in itertools.pairwise(wanted)]
    assert min(gaps) > 1e-5
    assert_same(EVERY[name][0](*service, QUESTION, TEXTS, None), wanted)
    assert_same(EVERY[name][0](*service, QUESTION, TEXTS, 2), wanted[:2])


@every_client
def test_a_thousand_documents_in_one_call(name, poly_service, poly_model):
    texts = [f"{text[:40]} {number}" for number in range(200) for text in TEXTS]
    found = EVERY[name][0](*poly_service, QUESTION, texts, None)
    wanted = dict(expected(poly_model, name, QUESTION, texts))
    scores = [score for _, score in found]
    assert sorted(index for index, _ in found) == list(range(1000))
    assert scores == sorted(scores, reverse=True)
    assert scores == pytest.approx([wanted[index] for index, _ in found], abs=1e-6)


# These have texts only: their turns are joined with the model's own separator.
TEXT_ONLY = ("llama-index", "litellm cohere", "litellm hosted_vllm", "litellm infinity")


@pytest.mark.parametrize("context", [TURNS, MESSAGES], ids=["turns", "messages"])
@every_client
def test_a_conversation_as_the_query(name, context, poly_service, poly_model):
    wanted = expected(poly_model, name, context, TEXTS)
    assert wanted != expected(poly_model, name, QUESTION, TEXTS)
    if name.startswith(TEXT_ONLY):
        turns = [turn if isinstance(turn, str) else turn["content"] for turn in context]
        context = poly_model.turn_separator.join(turns)
    assert_same(EVERY[name][0](*poly_service, context, TEXTS, None), wanted)


@every_client
def test_a_wrong_key(name, poly_service):
    rerank, errors = EVERY[name]
    if errors is None:
        with pytest.raises(AssertionError):
            rerank(poly_service.url, "wrong", QUESTION, TEXTS, None)
        return
    with pytest.raises(errors[0]) as error:
        rerank(poly_service.url, "wrong", QUESTION, TEXTS, None)
    assert "needs its API key" in str(error.value)


@every_client
def test_an_empty_document(name, poly_service):
    rerank, errors = EVERY[name]
    if errors is None:
        with pytest.raises(AssertionError):
            rerank(*poly_service, QUESTION, [*TEXTS, ""], None)
        return
    with pytest.raises(errors[1]) as error:
        rerank(*poly_service, QUESTION, [*TEXTS, ""], None)
    assert "[5] is empty" in str(error.value)


def test_cohere_documents_that_are_objects(poly_service, poly_model):
    client = cohere.Client(api_key=poly_service.key, base_url=poly_service.url)
    documents = [{"title": "A title", "text": text} for text in TEXTS]
    for fields, joined in ((None, TEXTS), (["title", "text"], [f"A title\n{text}" for text in TEXTS])):
        found = client.rerank(model="m", query=QUESTION, documents=documents, rank_fields=fields)
        assert_same(
            [(row.index, row.relevance_score) for row in found.results],
            expected(poly_model, "cohere v1", QUESTION, joined),
        )


def test_cohere_reads_some_tokens_of_each_document(poly_service, poly_model):
    """The tiny model has a token for each character."""
    client = cohere.ClientV2(api_key=poly_service.key, base_url=poly_service.url)
    found = client.rerank(model="m", query=QUESTION, documents=TEXTS, max_tokens_per_doc=12)
    assert_same(
        [(row.index, row.relevance_score) for row in found.results],
        expected(poly_model, "cohere v2", QUESTION, [text[:12] for text in TEXTS]),
    )


def test_a_retriever_of_langchain(poly_service, poly_model):
    class Everything(BaseRetriever):
        def _get_relevant_documents(self, query, *, run_manager):
            return [Document(page_content=text) for text in TEXTS]

    compressor = LangChainCohere(model="m", base_url=poly_service.url, cohere_api_key=poly_service.key, top_n=2)
    retriever = ContextualCompressionRetriever(base_compressor=compressor, base_retriever=Everything())
    wanted = expected(poly_model, "langchain cohere", QUESTION, TEXTS)[:2]
    assert [found.page_content for found in retriever.invoke(QUESTION)] == [TEXTS[index] for index, _ in wanted]


def test_answers_say_what_was_cut(poly_service):
    headers = {"Authorization": f"Bearer {poly_service.key}"}
    body = {"query": QUESTION, "texts": TEXTS}
    answer = httpx.post(f"{poly_service.url}/rerank", json=body, headers=headers)
    assert answer.headers["x-truncated-texts"] == "1"
