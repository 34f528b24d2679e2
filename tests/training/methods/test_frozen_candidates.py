"""Candidates that stay: their loss is the plain one's, they never change, and they are the right ones."""

import logging

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, DatasetDict, load_from_disk
from torch.nn.functional import cross_entropy, normalize

from poly_encoders import BiEncoder, PolyEncoder
from poly_encoders.training.data.collators import FrozenCandidatesCollator
from poly_encoders.training.methods.frozen_candidates import (
    FrozenCandidatesLoss,
    candidate_texts_of,
    candidate_vectors,
    freeze_candidate_encoder,
    positives_of_contexts,
)
from poly_encoders.training.methods.losses import Distillation, InBatchNegativesLoss
from poly_encoders.training.runs.preparing import set_dropout
from poly_encoders.training.train import make_options, run
from training_runs import (
    KINDS,
    QUIET,
    assert_same_weights,
    gradients,
    logged,
    make_model,
    make_trainer,
    weights,
    write_rows,
)

# Rows 1 and 3 have one positive, 2 and 4 one context, and a negative is another row's positive.
DATA = Dataset.from_dict(
    {
        "context": [["hello", "a"], ["hello", "b"], ["same"], ["hello", "d"], ["same"], ["hello", "f"]],
        "reply": ["one", "yes", "three", "yes", "five", "six"],
        "negative": ["no", "no", "six", "never", "x", "seven"],
    }
)
TEXTS = ["one", "no", "yes", "three", "six", "never", "five", "x", "seven"]
TWO_ENCODERS = {"poly": {"share_encoders": False}, "bi": {}}


@pytest.fixture(params=["turns", "codes", "bi", "bi-cosine"])
def model(request, checkpoints, sentence_transformer_folder):
    torch.manual_seed(0)
    if request.param.startswith("bi"):
        made = BiEncoder(checkpoints() if request.param == "bi" else sentence_transformer_folder, device="cpu")
    else:
        codes = {"context_vectors": "learnt_codes", "normalize": False, "config_kwargs": {"code_std": 1.0}}
        options = codes if request.param == "codes" else {"share_encoders": False}
        made = PolyEncoder(checkpoints(), num_codes=4, device="cpu", **options)
    set_dropout(made, 0.0)
    freeze_candidate_encoder(made)
    return made.train()


@pytest.fixture
def make(checkpoints, tmp_path):
    """A function that makes a trainer against candidates that stay."""

    def made(kind, data=DATA, model_options=None, vectors=None, eval_dataset=None, **options):
        settings = {"max_steps": 4, "per_device_train_batch_size": 3, "learning_rate": 1e-3, "save_strategy": "no"}
        settings |= {"output_dir": str(tmp_path / "out"), "freeze_candidate_encoder": True, **QUIET, **options}
        model = make_model(kind, checkpoints(), **(TWO_ENCODERS[kind] if model_options is None else model_options))
        args = KINDS[kind][2](**settings)
        return KINDS[kind][1](model, args, data, eval_dataset, candidate_vectors=vectors)

    return made


def index_of(model, texts=TEXTS):
    mode = model.training
    vectors = model.encode_document(texts, convert_to_tensor=True)
    model.train(mode)
    return vectors


def collated(model, rows, texts=TEXTS, data=DATA):
    places = {text: place for place, text in enumerate(texts)}
    collator = FrozenCandidatesCollator(model.preprocess, rows=places, positives=positives_of_contexts([data], places))
    batch = collator([data[row] for row in rows])
    assert not [name for name in batch if name.startswith(("reply", "negative"))]
    context = {name.removeprefix("context_"): value for name, value in batch.items() if name.startswith("context_")}
    return [context, {name: batch[name] for name in ("candidate_rows", "known_positives")}]


def plain(model, rows):
    columns = [[DATA[row][name] for row in rows] for name in ("context", "reply", "negative")]
    tasks = ("query", "document", "document")
    return [model.preprocess(column, task=task) | {"task": task} for column, task in zip(columns, tasks, strict=True)]


# --- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mini_batch_size", [None, 2])
@pytest.mark.parametrize("kind", [None, "kl", "margin_mse"])
def test_the_loss_is_the_plain_one_s(model, mini_batch_size, kind):
    """In value and in all gradients, duplicates, twins and a teacher included, where the other is frozen by hand."""
    rows, teacher = range(6), None if kind is None else torch.linspace(-1, 2, 12).view(6, 2)
    options = {"learn_logit_scale": True, "distillation": kind and Distillation(kind)}
    loss = InBatchNegativesLoss(model, **options)
    expected_loss = loss(plain(model, rows), teacher)
    expected = gradients(loss, expected_loss)
    frozen = FrozenCandidatesLoss(model, index_of(model), mini_batch_size=mini_batch_size, **options)
    found_loss = frozen(collated(model, rows), teacher)
    torch.testing.assert_close(found_loss, expected_loss, atol=1e-5, rtol=1e-5)
    found = gradients(frozen, found_loss)
    assert found.keys() == expected.keys()
    assert not [name for name in found if "candidate_encoder" in name or "document" in name]
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4, msg=name)
    assert frozen.take_masked() == loss.take_masked() > 0


@pytest.mark.parametrize("mini_batch_size", [None, 2])
def test_against_the_whole_index(model, mini_batch_size):
    """A context that has another positive anywhere in the data is not punished for it."""
    rows = [0, 2, 3]  # of row 2's context, row 4 is the other positive
    frozen = FrozenCandidatesLoss(model, index_of(model), -1, mini_batch_size=mini_batch_size)
    loss = frozen(collated(model, rows))
    contexts = model.encode_query([DATA[row]["context"] for row in rows], convert_to_tensor=True)
    scores = model.similarity(contexts, index_of(model)) * (20.0 if model.scores_are_cosines else 1.0)
    scores[1, TEXTS.index("five")] = -torch.inf
    expected = cross_entropy(scores, torch.tensor([TEXTS.index(DATA[row]["reply"]) for row in rows]))
    torch.testing.assert_close(loss.detach(), expected, atol=1e-5, rtol=1e-5)
    assert frozen.take_masked() == 1
    gradients(model.train(), FrozenCandidatesLoss(model, index_of(model), -1)(collated(model, rows)))


def test_rows_are_drawn_by_seed_epoch_and_batch(model):
    """Never the batch's own; in training none that only the evaluation data have; all where there are no more."""
    rows, seen = [0, 2], []
    batch = collated(model, rows)
    index = index_of(model)
    frozen = FrozenCandidatesLoss(model, index, 2, num_trained=8, seed=3)
    original = frozen.similarity
    frozen.similarity = lambda contexts, candidates: seen.append(candidates) or original(contexts, candidates)

    def drawn(loss=frozen):
        loss(batch)
        vectors = seen[-1][4:]  # after 2 positives and 2 negatives
        return [int((index == vector).all(dim=1).nonzero()[0, 0]) for vector in vectors]

    first = drawn()
    assert first == drawn()
    own = {TEXTS.index(DATA[row][name]) for row in rows for name in ("reply", "negative")}
    draws = []
    for epoch in range(20):
        frozen.epoch = epoch
        draws.append(tuple(drawn()))
        assert len(set(draws[-1])) == 2
        assert not set(draws[-1]) & (own | {8})
    assert len(set(draws)) > 3
    frozen.num_index_negatives = 100
    assert sorted(drawn()) == sorted(set(range(8)) - own)
    model.eval()
    assert sorted(drawn()) == sorted(set(range(9)) - own)
    frozen.num_index_negatives = 2
    frozen.epoch = 0
    evaluated = drawn()
    frozen.epoch = 5
    assert drawn() == evaluated  # validation losses compare


def test_other_positives_of_a_context_are_masked_among_drawn_rows(model):
    frozen = FrozenCandidatesLoss(model, index_of(model), 100)
    frozen(collated(model, [2]))
    assert frozen.take_masked() == 1
    without = FrozenCandidatesLoss(model, index_of(model), 100, mask_duplicates=False)
    assert without(collated(model, [2])) > frozen(collated(model, [2]))


# --- texts and vectors -----------------------------------------------------------------------------------------------


def test_texts_come_as_one_reads(checkpoints):
    assert candidate_texts_of(DATA) == TEXTS
    more = Dataset.from_dict({"context": ["a"] * 3, "reply": ["new", "yes", "wrong"], "label": [1, 1, 0]})
    assert candidate_texts_of(DATA, None, more) == [*TEXTS, "new"]
    upper = DATA.with_transform(lambda rows: {"c": rows["context"], "r": [text.upper() for text in rows["reply"]]})
    assert candidate_texts_of(upper) == ["ONE", "YES", "THREE", "FIVE", "SIX"]
    for data in (DatasetDict(train=DATA), DATA.to_iterable_dataset()):
        with pytest.raises(ValueError, match="one Dataset"):
            candidate_texts_of(data)


@pytest.mark.parametrize("form", ["tensor", "half", "array", "arrow", "fixed", "chunked", "column", "data", "shuffled"])
def test_vectors_in_any_form(model, tmp_path, form):
    vectors = index_of(model).double().numpy()
    texts = list(TEXTS)
    if form == "shuffled":
        order = np.random.default_rng(0).permutation(len(TEXTS))
        texts = [TEXTS[place] for place in order] + ["not asked for"]
    rows = vectors.tolist() if form != "shuffled" else [*vectors[order].tolist(), vectors[0].tolist()]
    data = Dataset.from_dict({"text": texts, "vector": rows})
    given = {
        "tensor": torch.from_numpy(vectors),
        "half": torch.from_numpy(vectors).half(),
        "array": vectors,
        "arrow": pa.array(rows),
        "fixed": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1]),
        "chunked": pa.chunked_array([pa.array(rows[:4]), pa.array(rows[4:])]),
        "column": data["vector"],
    }.get(form, data)
    found = candidate_vectors(model, TEXTS, tmp_path / "stored", given)
    assert found.dtype == torch.float32
    expected = torch.from_numpy(vectors).float()
    torch.testing.assert_close(found, expected, atol=0 if form != "half" else 1e-2, rtol=0 if form != "half" else 1e-2)
    stored = load_from_disk(str(tmp_path / "stored"))
    assert stored["text"][:] == TEXTS
    assert torch.equal(torch.tensor(stored["vector"][:]), found)
    assert torch.equal(candidate_vectors(model, TEXTS, tmp_path / "stored", stored), found)


def test_vectors_that_do_not_fit(model, tmp_path):
    good = index_of(model)
    wrong = good.clone()
    wrong[3, 2] = torch.nan
    for given, message in (
        (good[:, :-1], r"\(9, 31\); expected \(9, 32\)"),
        (good[:-1], r"\(8, 32\); expected \(9, 32\).*candidate_texts_of"),
        (good[0], r"expected \(9, 32\)"),
        ((good * 100).to(torch.int8), r"torch\.int8.*precision"),
        (wrong, r"NaN.*row 3.*'three'"),
        ([[1.0], [2.0, 3.0]], "are no"),
        (pa.array([[1.0], [2.0, 3.0]]), "one length"),
        (pa.array([1.0, 2.0]), "one length"),
        (np.array(["a", "b"]), "are no"),
        (Dataset.from_dict({"vector": good.tolist()}), "'text' and 'vector'"),
        (Dataset.from_dict({"text": TEXTS[:-1], "vector": good[:-1].tolist()}), "lack 1 of 9.*'seven'"),
    ):
        with pytest.raises(ValueError, match=message):
            candidate_vectors(model, TEXTS, tmp_path / "stored", given)
    if model.scores_are_cosines:
        with pytest.raises(ValueError, match=r"lengths from .* to .*normalize"):
            candidate_vectors(model, TEXTS, tmp_path / "stored", good * 2)
    else:
        candidate_vectors(model, TEXTS, tmp_path / "other", good * 2)
    assert not (tmp_path / "stored").exists()


def test_vectors_are_made_anew_when_what_made_them_changed(model, tmp_path, caplog):
    def made(texts=TEXTS, **options):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            return candidate_vectors(model, texts, tmp_path / "stored", show_progress_bar=False, **options)

    first = made()
    assert "there already" not in caplog.text
    assert torch.equal(first, index_of(model))
    assert torch.equal(made(), first)
    assert "there already" in caplog.text
    fewer = made(TEXTS[:5])
    assert "of other texts: making them anew" in caplog.text
    torch.testing.assert_close(fewer, first[:5], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "candidate_encoder" in name or "document" in name).add_(0.5)
    changed = made(TEXTS[:5])
    assert "of other candidate side" in caplog.text
    assert not torch.allclose(changed, fewer)
    assert torch.equal(made(TEXTS[:5], prompt="say: "), made(TEXTS[:5], prompt="say: "))
    assert not torch.allclose(made(TEXTS[:5], prompt="say: "), changed)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "context_encoder" in name or "query" in name).add_(0.5)
    made(TEXTS[:5], prompt="say: ")
    assert "there already" in caplog.text  # the context side is not theirs


def test_given_vectors_are_never_taken_for_other_texts(model, tmp_path):
    vectors = index_of(model)
    candidate_vectors(model, TEXTS, tmp_path / "stored", vectors)
    with pytest.raises(ValueError, match="texts are others"):
        candidate_vectors(model, [*TEXTS[:-1], "changed"], tmp_path / "stored", vectors)
    with pytest.raises(ValueError, match="were given"):
        candidate_vectors(model, TEXTS, tmp_path / "stored")
    other = normalize(vectors + 0.1, dim=-1)
    assert torch.equal(candidate_vectors(model, TEXTS, tmp_path / "stored", other), other)


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["poly", "bi"])
@pytest.mark.parametrize("number", [0, 3, -1])
def test_only_the_context_side_trains(kind, number, make, tmp_path):
    trainer = make(kind, num_index_negatives=number, eval_dataset=DATA, eval_strategy="steps", eval_steps=2)
    model, before = trainer.model, weights(trainer.model)
    vectors, contexts = model.encode_document(TEXTS, batch_size=8), model.encode_query(["hello"])
    np.testing.assert_array_equal(load_from_disk(str(tmp_path / "out" / "candidate_vectors"))["vector"][:], vectors)
    encode, read = type(model).preprocess, []
    trainer.data_collator.preprocess_fn = lambda *args, **named: (
        read.append(named["task"]) or encode(model, *args, **named)
    )
    trainer.train()
    assert set(read) == {"query"}
    side = "candidate_encoder" if kind == "poly" else "document"
    changed = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert changed
    assert not [name for name in changed if side in name]
    trainer.save_model()
    saved = KINDS[kind][0](str(tmp_path / "out"), device="cpu")
    np.testing.assert_array_equal(saved.encode_document(TEXTS, batch_size=8), vectors)
    assert np.abs(saved.encode_query(["hello"]) - contexts).max() > 1e-4
    assert len(logged(trainer, "eval_loss")) == 2


def test_frozen_steps_are_plain_steps(make, checkpoints, tmp_path):
    """Whole runs, of a model that is frozen by hand and of one that the option freezes."""
    frozen = make("poly", dropout=0.0, logging_steps=1, weight_decay=0.0)
    frozen.train()
    options = {"max_steps": 4, "per_device_train_batch_size": 3, "logging_steps": 1, "weight_decay": 0.0}
    other = make_trainer("poly", checkpoints(), tmp_path / "b", DATA, TWO_ENCODERS["poly"], **options)
    freeze_candidate_encoder(other.model)
    other.train()
    assert logged(frozen, "loss") == pytest.approx(logged(other, "loss"), abs=1e-4)
    assert logged(frozen, "masked_duplicates") == logged(other, "masked_duplicates")
    assert all(-1 <= value <= 1 for value in logged(frozen, "context_vector_cosine"))


@pytest.mark.parametrize("architecture", ["poly-encoder", "bi-encoder"])
def test_resuming_goes_on_with_the_same_vectors(checkpoints, tmp_path, caplog, architecture):
    """With dropout, drawn rows and a learnt scale; train.py builds a model with two encoders by itself."""
    settings = {"model_name_or_path": checkpoints(), "dataset": write_rows(tmp_path / "data.jsonl", 24)}
    settings |= {"eval_dataset": write_rows(tmp_path / "validation.jsonl", 30), "eval_set_size": 4, "max_steps": 12}
    settings |= {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3}
    settings |= {"output_dir": str(tmp_path / "out"), "learning_rate": 1e-3, "per_device_train_batch_size": 4}
    settings |= {"freeze_candidate_encoder": True, "num_index_negatives": 5, "learn_logit_scale": True}
    settings |= {"architecture": architecture, "logging_steps": 1, "dropout": 0.1, **QUIET}
    trainer = run(make_options(settings))
    assert len(trainer.loss.candidates) == 30
    assert trainer.loss.num_trained == 24
    scales = logged(trainer, "logit_scale")
    assert len(set(scales)) > 3
    for stop in (3, 9):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            again = run(
                make_options({**settings, "resume_from_checkpoint": str(tmp_path / "out" / f"checkpoint-{stop}")})
            )
        assert "30 candidates" in caplog.text
        assert "there already" in caplog.text
        assert_same_weights(again.model, trainer.model)
        assert logged(again, "logit_scale") == scales
        assert logged(again, "eval_loss") == logged(trainer, "eval_loss")


def test_vectors_of_a_stranger(make):
    torch.manual_seed(1)
    vectors = normalize(torch.randn(9, 32), dim=-1)
    trainer = make("poly", vectors=vectors, num_index_negatives=-1, max_steps=30, learning_rate=3e-3, logging_steps=10)
    assert torch.equal(trainer.loss.candidates, vectors)
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("kind", ["poly", "bi"])
def test_with_lora(kind, make, tmp_path):
    trainer = make(kind, lora_rank=2)
    vectors = trainer.model.encode_document(TEXTS)
    side = "candidate_encoder" if kind == "poly" else "document"
    assert not [name for name, p in trainer.model.named_parameters() if side in name and p.requires_grad]
    trainer.train()
    trainer.save_model()
    saved = KINDS[kind][0](str(tmp_path / "out"), device="cpu")
    np.testing.assert_array_equal(saved.encode_document(TEXTS), vectors)


def test_a_teacher_teaches_the_context_side(make):
    data = DATA.add_column("scores", [[2.0, float(row)] for row in range(6)])
    losses = []
    for options in ({}, {"distillation": "kl"}):
        trainer = make("poly", data, logging_steps=1, dropout=0.0, **options)
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[0][0] != pytest.approx(losses[1][0], abs=1e-3)


def test_what_cannot_stay(make, checkpoints, tmp_path):
    for kind in ("poly", "bi"):
        with pytest.raises(ValueError, match="share_encoders=False"):
            make(kind, model_options={"share_encoders": True})
        with pytest.raises(ValueError, match="freeze_candidate_encoder"):
            make(kind, freeze_candidate_encoder=False, vectors=torch.zeros(9, 32))
        with pytest.raises(ValueError, match="freeze_candidate_encoder"):
            make(kind, freeze_candidate_encoder=False, num_index_negatives=3)
        with pytest.raises(ValueError, match="num_index_negatives"):
            make(kind, num_index_negatives=-2)
    for data in (DatasetDict(train=DATA), DATA.to_iterable_dataset()):
        with pytest.raises(ValueError, match="one Dataset"):
            make("poly", data)
    with pytest.raises(ValueError, match="one vector whatever its column"):
        make("bi", prompts={"context": "a: ", "reply": "b: "})
    trainer = make("bi", prompts={"context": "a: ", "reply": "b: ", "negative": "b: "})
    expected = trainer.model.encode_document(TEXTS, prompt="b: ", batch_size=8, convert_to_tensor=True)
    assert torch.equal(trainer.loss.candidates, expected)
    with pytest.raises(ValueError, match=r"'unheard of' has no vector.*evaluate"):
        trainer.evaluate(Dataset.from_dict({"context": ["a"], "reply": ["unheard of"]}))
    model = make_model("bi", checkpoints())
    args = KINDS["bi"][2](str(tmp_path), freeze_candidate_encoder=True, **QUIET)
    with pytest.raises(ValueError, match="its own loss"):
        KINDS["bi"][1](model, args, DATA, loss=InBatchNegativesLoss(model))
