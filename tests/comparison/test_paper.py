"""Every kind of every encoder against the paper in loops: batched, padded and vectorised must give the same numbers."""

import itertools
import random

import pytest
import torch
from transformers import BertConfig

import paper
from parlai_original import sample_text, write_checkpoint
from poly_encoders import BiEncoder, CrossEncoder
from poly_encoders.modeling import PolyEncoderConfig, PolyEncoderModel
from poly_encoders.parlai import convert_parlai_checkpoint

VOCAB = 50

# contexts, their longest; candidates, their longest; codes; width
SIZES = {
    "usual": (3, 9, 4, 7, 4, 12),
    "one context": (1, 9, 4, 7, 4, 12),
    "one candidate": (3, 9, 1, 7, 4, 12),
    "one code": (3, 9, 4, 7, 1, 12),
    "one token": (2, 1, 3, 1, 4, 12),
    "one of each": (1, 1, 1, 1, 1, 12),
    "more codes than tokens": (3, 4, 2, 3, 9, 12),
    "one head of width two": (2, 5, 3, 4, 3, 2),
}


def pairwise_cover(*axes):
    """Few rows, one value of each axis, in which every two values of two axes meet."""
    rows = [(row, set(itertools.combinations(enumerate(row), 2))) for row in itertools.product(*axes)]
    missing, cover = set().union(*(pairs for _, pairs in rows)), []
    while missing:
        row, pairs = max(rows, key=lambda candidate: len(candidate[1] & missing))
        missing -= pairs
        cover.append(row)
    return cover


def texts(count: int, longest: int, generator: torch.Generator) -> list[list[int]]:
    """Token ids of texts, the first of them `longest` long, the others of any length up to it."""
    lengths = [longest, *torch.randint(1, longest + 1, (count - 1,), generator=generator).tolist()]
    return [torch.randint(1, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """A batch, padded on the right to its longest and two beyond."""
    width = max(map(len, rows)) + 2
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def outputs(model: PolyEncoderModel, side: str, ids: list[int]) -> list[list[float]]:
    """T(text) of one text by itself."""
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    return model.run_encoder(side, inputs).last_hidden_state[0].tolist()


@pytest.mark.parametrize(
    ("context_vectors", "reduction", "code_attention", "final_attention", "share_encoders", "size"),
    pairwise_cover(
        ["learnt_codes", "first_m", "last_m", "first_and_last_m"],
        ["first", "mean", "first_m_mean"],
        ["basic", "sqrt"],
        ["basic", "sqrt"],
        [False, True],
        SIZES,
    ),
)
@torch.no_grad()
def test_poly_encoder(context_vectors, reduction, code_attention, final_attention, share_encoders, size):
    num_contexts, longest_context, num_candidates, longest_candidate, m, width = SIZES[size]
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    sizes = {"vocab_size": VOCAB, "hidden_size": width, "intermediate_size": 8, "max_position_embeddings": 16}
    one = {"num_hidden_layers": 1, "num_attention_heads": 1}
    config = PolyEncoderConfig(
        context_encoder=BertConfig(**sizes, **one, initializer_range=0.5, pad_token_id=0),
        share_encoders=share_encoders,
        context_vectors=context_vectors,
        num_codes=m,
        reduction=reduction,
        code_attention=code_attention,
        final_attention=final_attention,
        output_scaling=0.5,
        code_std=1.0,
    )
    model = PolyEncoderModel(config).double().eval()
    contexts = texts(num_contexts, longest_context, generator)
    candidates = texts(num_candidates, longest_candidate, generator)
    found = model(**padded(contexts), **{f"candidate_{name}": value for name, value in padded(candidates).items()})

    codes = model.codes.tolist() if context_vectors == "learnt_codes" else []
    scales = {"basic": 1.0, "sqrt": width**-0.5}
    for row, context in enumerate(contexts):
        hidden = outputs(model, "context", context)
        vectors = paper.context_vectors(hidden, context_vectors, m, codes, scales[code_attention])
        assert found.context_vectors[row, : len(vectors)].tolist() == [pytest.approx(vector) for vector in vectors]
        for column, candidate in enumerate(candidates):
            x = paper.reduce(outputs(model, "candidate", candidate), reduction, m)
            assert found.candidate_vectors[column].tolist() == pytest.approx(x)
            score = paper.poly_encoder_score(vectors, x, scales[final_attention])
            assert float(found.scores[row, column]) == pytest.approx(score)


CONTEXTS = [["hi"], ["hello", "how are you?", "fine"], ["a much longer text " * 2]]
CANDIDATES = ["yes", "no, never", "perhaps, if it does not rain"]


@pytest.mark.parametrize(
    ("reduction", "share_encoders", "num_contexts", "num_candidates"),
    pairwise_cover(["first", "mean", "first_m_mean"], [False, True], [1, 3], [1, 3]),
)
@torch.no_grad()
def test_bi_encoder(reduction, share_encoders, num_contexts, num_candidates, checkpoints):
    m = 3 if reduction == "first_m_mean" else None
    model = BiEncoder(checkpoints(), reduction=reduction, num_codes=m, share_encoders=share_encoders, device="cpu")
    contexts, candidates = CONTEXTS[:num_contexts], CANDIDATES[:num_candidates]
    found = model.similarity(model.encode_query(contexts), model.encode_document(candidates))

    def alone(text, task):
        features = model(model.preprocess([text], task=task), task=task)
        return features["token_embeddings"][0].tolist()

    for row, context in enumerate(contexts):
        for column, candidate in enumerate(candidates):
            score = paper.bi_encoder_score(alone(context, "query"), alone(candidate, "document"), reduction, m or 0)
            assert float(found[row, column]) == pytest.approx(score, rel=1e-5, abs=1e-5)


@torch.no_grad()
def test_cross_encoder(checkpoints):
    """A new Cross-encoder: BERT's pooler, which is BERT's own way to its first output, belongs to the transformer."""
    model = CrossEncoder(checkpoints(), device="cpu")
    bert = model[0].model
    weight, bias = bert.classifier.weight[0].tolist(), float(bert.classifier.bias)
    for context in CONTEXTS:
        pairs = [(context, candidate) for candidate in CANDIDATES]
        for pair, score in zip(pairs, model.predict(pairs), strict=True):
            features = model.preprocess([pair])
            first = bert.bert(**{name: features[name] for name in ("input_ids", "token_type_ids", "attention_mask")})
            found = paper.cross_encoder_score(first.pooler_output.tolist(), weight, bias)
            assert float(score) == pytest.approx(found, rel=1e-5, abs=1e-5)


@torch.no_grad()
def test_converted_cross_encoder(tmp_path):
    """The paper's head is one matrix on the first output, and so it is in checkpoints of the original."""
    model = convert_parlai_checkpoint(write_checkpoint(tmp_path / "parlai", "cross"), tmp_path / "converted")
    rng = random.Random(0)
    pairs = [([sample_text(rng, 8)], sample_text(rng, 8)) for _ in range(5)]
    weight, bias = model[2].linear.weight[0].tolist(), float(model[2].linear.bias)
    for pair, score in zip(pairs, model.predict(pairs), strict=True):
        hidden = model[0](model.preprocess([pair]))["token_embeddings"][0].tolist()
        assert float(score) == pytest.approx(paper.cross_encoder_score(hidden, weight, bias), rel=1e-5, abs=1e-5)
