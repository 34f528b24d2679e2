"""What docs/serving.md has a reader write for each client."""

import re
from pathlib import Path

import litellm
import pytest

from card_snippets import python_blocks

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
FIRST, *BLOCKS = python_blocks(PAGE)
CHOICES = r"^(compressor|reranker|ranker) = (\w+)"  # lines of one block of which a reader takes one


def variants(block):
    """The block with each of its choices alone."""
    lines = block.splitlines()
    names = [match[2] for match in re.finditer(CHOICES, block, flags=re.MULTILINE)]
    for name in names or [None]:
        chosen = [line for line in lines if name is None or (re.match(CHOICES, line) or [0, 0, name])[2] == name]
        yield pytest.param("\n".join(chosen), id=name or "all of it")


@pytest.fixture
def defined(poly_service):
    """The names of the first block, which ranks with Cohere's client."""
    return run(FIRST.replace("http://localhost:8080", poly_service.url).replace("my-key", poly_service.key), {})


def run(block, names):
    exec(compile(block, "serving.md", "exec"), names)
    return names


def test_the_first_block(defined, poly_model):
    wanted = poly_model.rank(["Hi!", defined["question"]], defined["texts"])[0]
    assert defined["best"].index == wanted["corpus_id"]
    assert defined["best"].relevance_score == pytest.approx((1 + wanted["score"]) / 2, abs=1e-6)


def test_every_client_is_there():
    found = [name for block in BLOCKS for name in re.findall(CHOICES, block, flags=re.MULTILINE)]
    assert len(found) == len(set(found)) == 10
    assert len(BLOCKS) == 4


@pytest.mark.parametrize("block", [variant for block in BLOCKS[:3] for variant in variants(block)])
def test_rerankers_of_frameworks(block, defined, poly_model):
    names = run(block, dict(defined))
    [best] = names["nodes" if "nodes" in names else "documents"]
    text = next(filter(None, (getattr(best, name, None) for name in ("page_content", "text", "content"))))
    wanted = poly_model.rank(names["question"], names["texts"])[0]
    assert text == names["texts"][wanted["corpus_id"]]


def test_the_last_block(defined, poly_model):
    names = run(BLOCKS[-1], dict(defined))
    wanted = poly_model.rank(names["question"], names["texts"])
    assert [row["index"] for row in names["found"].results] == [wanted[0]["corpus_id"]]
    assert names["vectors"] == pytest.approx(poly_model.encode_document(names["texts"]), abs=1e-6)
    scores = sorted(names["scores"], reverse=True)
    assert scores == pytest.approx([row["score"] for row in wanted], abs=1e-6)
    made = [row.embedding for row in names["made"].data]
    assert made == [pytest.approx(vector, abs=1e-6) for vector in names["vectors"].tolist()]


@pytest.mark.parametrize("provider", ["cohere", "jina_ai", "hosted_vllm", "huggingface", "infinity"])
def test_names_that_litellm_knows(provider):
    assert f"`{provider}/`" in PAGE
    assert provider in [one.value for one in litellm.LlmProviders]
