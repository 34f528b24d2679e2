"""The original implementation's own outputs, beside those of its plain restatement and of the converted model.

The fixtures are tiny checkpoints saved by ParlAI (commit a29567f7, CPU, float32), each with its inputs and outputs.
"""

import json

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModel, AutoTokenizer

from parlai_original import FIXTURES, Original
from poly_encoders import BiEncoder, CrossEncoder, PolyEncoder
from poly_encoders.parlai import ParlAITokenizer, convert_parlai_checkpoint

CASES = {"poly_codes8": PolyEncoder, "bi_mean": BiEncoder, "cross_first": CrossEncoder}
TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """A fixture's name, what ParlAI printed, and the model that was converted, saved and loaded again."""
    folder = tmp_path_factory.mktemp(request.param) / "converted"
    convert_parlai_checkpoint(FIXTURES / request.param / "model", folder)
    reference = json.loads((FIXTURES / request.param / "reference.json").read_text())
    return request.param, reference, CASES[request.param](str(folder), device="cpu"), folder


def turns(context: dict) -> list[str]:
    return [turn["text"] for turn in context["turns"]]


def rows(batch: dict):
    """For each context of a batch: it, the texts and ids of its candidates, and their scores."""
    for position, context in enumerate(batch["contexts"]):
        own = batch["candidates"]
        candidates = own[position] if isinstance(own[0], list) else own
        yield context, candidates, batch["outputs"]["scores"][position]


def test_the_plain_restatement_agrees_with_the_original(case):
    name, reference, _, _ = case
    original = Original(FIXTURES / name)
    for text in reference["tokenization"]:
        assert original.text_ids(text["text"]) == text["ids"]
    for batch in reference["batches"]:
        for context, candidates, scores in rows(batch):
            assert original.context_ids(turns(context)) == context["ids"]
            for candidate, score in zip(candidates, scores, strict=True):
                assert original.candidate_ids(candidate["text"]) == candidate["ids"]
                assert original.score(turns(context), candidate["text"]) == pytest.approx(score, abs=TOLERANCE)


def test_ids_of_texts_and_the_card(case):
    name, reference, _, folder = case
    card = ModelCard.load(folder / "README.md")
    assert "parlai" in card.data.tags
    assert "converted from a checkpoint of [ParlAI]" in card.content
    tokenizer = AutoTokenizer.from_pretrained(folder / "query_0_Transformer" if name == "bi_mean" else folder)
    assert isinstance(tokenizer, ParlAITokenizer)
    special = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    assert special == list(reference["special_ids"].values())
    texts = [(text["text"], text["ids"]) for text in reference["tokenization"]]
    contexts = [context for batch in reference["batches"] for context in batch["contexts"]]
    texts += [(context["full_text"], context["untruncated_ids_without_start_end"]) for context in contexts]
    for text, ids in texts:
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids


def test_scores_from_turns_and_texts(case):
    _, reference, model, _ = case
    for batch in reference["batches"]:
        for context, candidates, scores in rows(batch):
            ranking = model.rank(turns(context), [candidate["text"] for candidate in candidates])
            found = {entry["corpus_id"]: entry["score"] for entry in ranking}
            np.testing.assert_allclose([found[i] for i in range(len(scores))], scores, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", ["poly_codes8", "bi_mean"], indirect=True)
def test_ids_and_vectors_of_whole_batches(case):
    _, reference, model, _ = case
    for batch in reference["batches"]:
        contexts = [turns(context) for context in batch["contexts"]]
        features = model.preprocess(contexts, task="query")
        assert features["input_ids"].tolist() == batch["inputs"]["context_ids"]
        vectors = model.encode_query(contexts, batch_size=len(contexts))
        expected = np.array(batch["outputs"]["context_vectors"], dtype=np.float32)
        np.testing.assert_allclose(vectors.reshape(expected.shape), expected, rtol=0, atol=TOLERANCE)
        lists = batch["candidates"] if isinstance(batch["candidates"][0], list) else [batch["candidates"]]
        texts = [candidate["text"] for candidates in lists for candidate in candidates]
        ids = [candidate["ids"] for candidates in lists for candidate in candidates]
        features = model.preprocess(texts, task="document")
        for row, mask, wanted in zip(features["input_ids"], features["attention_mask"], ids, strict=True):
            assert row[mask == 1].tolist() == wanted
        expected = np.array(batch["outputs"]["candidate_vectors"], dtype=np.float32)
        vectors = model.encode_document(texts).reshape(expected.shape)
        np.testing.assert_allclose(vectors, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", ["poly_codes8"], indirect=True)
def test_auto_model_gives_hidden_states_and_scores_of_the_original_ids(case):
    _, reference, _, folder = case
    plain = AutoModel.from_pretrained(folder)
    for batch in reference["batches"]:
        sides = {}
        for side in ("context", "candidate"):
            ids = torch.tensor(batch["inputs"][f"{side}_ids"])
            mask = (ids != reference["special_ids"]["null"]).long()
            sides[side] = {"input_ids": ids, "attention_mask": mask}
            if f"{side}_hidden" in batch["outputs"]:
                hidden = plain.run_encoder(side, sides[side]).last_hidden_state
                expected = torch.tensor(batch["outputs"][f"{side}_hidden"])
                torch.testing.assert_close(hidden * mask[..., None], expected, rtol=0, atol=TOLERANCE)
        output = plain(**sides["context"], **{f"candidate_{name}": value for name, value in sides["candidate"].items()})
        expected = torch.tensor(batch["outputs"]["scores"])
        torch.testing.assert_close(output.scores, expected, rtol=0, atol=TOLERANCE)
    assert any("context_hidden" in batch["outputs"] for batch in reference["batches"])


@pytest.mark.parametrize("case", ["cross_first"], indirect=True)
def test_pairs(case):
    _, reference, model, folder = case
    encoder = AutoModel.from_pretrained(folder)
    for batch in reference["batches"]:
        for position, (context, candidates, _) in enumerate(rows(batch)):
            features = model.preprocess([(turns(context), candidate["text"]) for candidate in candidates])
            mask = features["attention_mask"]
            width = mask.shape[1]
            ids, segments = (torch.tensor(batch["inputs"][f"pair_{kind}"][position]) for kind in ("ids", "segments"))
            assert torch.equal(features["input_ids"], ids[:, :width])
            assert not ids[:, width:].any()
            assert torch.equal(features["token_type_ids"] * mask, segments[:, :width] * mask)
            inputs = {name: features[name] for name in ("input_ids", "token_type_ids", "attention_mask")}
            vectors = encoder(**inputs).last_hidden_state[:, 0]
            expected = torch.tensor(batch["outputs"]["pair_vectors"][position])
            torch.testing.assert_close(vectors, expected, rtol=0, atol=TOLERANCE)
