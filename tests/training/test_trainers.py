"""The trainers: what learns, at which rate, from which columns, and that training helps."""

from copy import deepcopy

import pytest
import torch
from datasets import Dataset

from poly_encoders import BiEncoder, CandidateRankingEvaluator, CrossEncoder, PolyEncoder, poly_score
from poly_encoders.hardware import has_fast_bf16
from poly_encoders.training.arguments import (
    BiEncoderTrainingArguments,
    CrossEncoderTrainingArguments,
    PolyEncoderTrainingArguments,
)
from poly_encoders.training.trainers import BiEncoderTrainer, CrossEncoderTrainer, PolyEncoderTrainer

LETTERS = "abcdefghijklmnop"
# The right answer to a letter is the next one, thrice: nothing a fresh model knows, and learnt in a few steps.
DATA = Dataset.from_dict(
    {
        "context": [["say", letter * 4] for letter in LETTERS],
        "reply": [LETTERS[(i + 1) % 16] * 3 for i in range(16)],
        "wrong": [LETTERS[(i + 6) % 16] * 3 for i in range(16)],
    }
)
KINDS = {
    "poly": (PolyEncoder, PolyEncoderTrainer, PolyEncoderTrainingArguments),
    "bi": (BiEncoder, BiEncoderTrainer, BiEncoderTrainingArguments),
    "cross": (CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments),
}


def make(kind, checkpoints, tmp_path, data=DATA, model_options=None, **options):
    model_class, trainer_class, arguments_class = KINDS[kind]
    torch.manual_seed(0)
    model = model_class(
        checkpoints(), device="cpu", **({"num_codes": 4} if kind == "poly" else {}), **(model_options or {})
    )
    settings = {
        "output_dir": str(tmp_path / "out"),
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "dropout": 0.0,
    }
    return trainer_class(model=model, args=arguments_class(**{**settings, **options}), train_dataset=data)


@pytest.mark.parametrize("kind", KINDS)
def test_training_helps(kind, checkpoints, tmp_path):
    steps = {"max_steps": 150, "num_negatives": 7} if kind == "cross" else {"max_steps": 60}
    trainer = make(kind, checkpoints, tmp_path, per_device_train_batch_size=16, learning_rate=3e-3, **steps)
    sets = [
        {"context": row["context"], "candidates": [row["reply"], *(x * 3 for x in LETTERS if x * 3 != row["reply"])]}
        for row in DATA
    ]
    evaluator = CandidateRankingEvaluator(sets, show_progress_bar=False, write_csv=False)
    before = evaluator(trainer.model)
    trainer.train()
    after = evaluator(trainer.model)
    assert after["mrr"] > before["mrr"] + 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_word_embeddings_stay_by_default(kind, checkpoints, tmp_path):
    trainer = make(kind, checkpoints, tmp_path)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, parameter in trainer.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert not [name for name in changed if "word_embeddings" in name]
    assert [name for name in changed if "position_embeddings" in name]
    assert [name for name in changed if "attention" in name]
    thawed = make(kind, checkpoints, tmp_path, freeze_word_embeddings=False)
    assert all(p.requires_grad for name, p in thawed.model.named_parameters() if "word_embeddings" in name)


def test_the_codes_learn_faster(checkpoints, tmp_path):
    trainer = make("poly", checkpoints, tmp_path, code_learning_rate_factor=30.0)
    optimizer = trainer.create_optimizer()
    codes = trainer.model[0].model.codes
    rates = {group["lr"] for group in optimizer.param_groups for parameter in group["params"] if parameter is codes}
    others = {
        group["lr"] for group in optimizer.param_groups for parameter in group["params"] if parameter is not codes
    }
    assert rates == {0.03}
    assert others == {0.001}
    counted = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert len(counted) == len(set(counted))
    before = codes.detach().clone()
    trainer.train()
    assert not torch.equal(codes, before)


def test_a_poly_encoder_without_codes_trains(checkpoints, tmp_path):
    trainer = make("poly", checkpoints, tmp_path, model_options={"context_vectors": "last_m"})
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_rate_of_the_user_s_own_for_the_codes_stays(checkpoints, tmp_path):
    trainer = make("poly", checkpoints, tmp_path, learning_rate_mapping={"codes": 0.5})
    assert trainer.args.learning_rate_mapping == {"codes": 0.5}


def test_the_loss_is_cross_entropy_in_the_batch(checkpoints, tmp_path):
    """Every other candidate of the batch is a wrong one, the third column's among them."""
    trainer = make("poly", checkpoints, tmp_path)
    model = trainer.model.eval()
    batch = trainer.data_collator([DATA[i] for i in range(5)])
    loss = trainer.compute_loss(model, batch)
    contexts = model.encode_query(DATA["context"][:5], convert_to_tensor=True)
    texts = [*DATA["reply"][:5], *DATA["wrong"][:5]]
    scores = poly_score(contexts, model.encode_document(texts, convert_to_tensor=True))
    assert scores.shape == (5, 10)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(scores, torch.arange(5)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["poly", "bi"])
def test_the_first_column_is_the_context_whatever_its_name(kind, checkpoints, tmp_path):
    data = DATA.rename_columns({"context": "zebra", "reply": "apple", "wrong": "mango"})
    batch = make(kind, checkpoints, tmp_path, data=data).data_collator([data[0]])
    assert (batch["zebra_task"], batch["apple_task"], batch["mango_task"]) == ("query", "document", "document")


def test_the_cross_encoder_reads_its_own_candidates_and_drawn_ones(checkpoints, tmp_path):
    trainer = make("cross", checkpoints, tmp_path, num_negatives=3)
    seen = []
    original = trainer.model.preprocess
    trainer.data_collator.preprocess_fn = lambda pairs, **options: seen.extend(pairs) or original(pairs, **options)
    batch = trainer.data_collator([DATA[i] for i in range(6)])
    assert batch["features"]["candidate_mask"].shape == (6, 4)
    for row in range(6):
        contexts, candidates = zip(*seen[4 * row : 4 * row + 4], strict=True)
        assert all(context == DATA[row]["context"] for context in contexts)
        assert candidates[:2] == (DATA[row]["reply"], DATA[row]["wrong"])
        assert set(candidates[2:]) <= set(DATA["reply"]) - {DATA[row]["reply"]}
    scores = trainer.model.eval()(dict(batch["features"]))["scores"].view(6, 4)
    expected = torch.nn.functional.cross_entropy(scores, torch.zeros(6, dtype=torch.long))
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_loads_and_holds_no_pickle(kind, checkpoints, tmp_path):
    trainer = make(kind, checkpoints, tmp_path)
    trainer.train()
    trainer.save_model()
    folder = tmp_path / "out"
    assert (folder / "training_args.json").is_file()
    assert not [file for file in folder.rglob("*") if file.suffix in (".bin", ".pt", ".pkl")]
    again = KINDS[kind][0](str(folder), device="cpu")
    found, expected = again.rank("hello", ["a", "b"]), trainer.model.rank("hello", ["a", "b"])
    assert [entry["corpus_id"] for entry in found] == [entry["corpus_id"] for entry in expected]
    assert [entry["score"] for entry in found] == pytest.approx([entry["score"] for entry in expected], abs=1e-6)


@pytest.mark.parametrize("kind", ["poly", "bi"])
def test_resuming_gives_the_same_weights(kind, checkpoints, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "seed": 5}
    whole = make(kind, checkpoints, tmp_path / "a", **options)
    whole.train()
    again = make(kind, checkpoints, tmp_path / "a", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "out" / "checkpoint-2"))
    for (name, expected), found in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, msg=name)


def test_evaluation_while_training(checkpoints, tmp_path):
    trainer = make("poly", checkpoints, tmp_path, eval_strategy="no")
    trainer.evaluator = CandidateRankingEvaluator(
        [{"context": "a", "candidates": ["a", "b"]}], name="dev", show_progress_bar=False
    )
    assert 0 <= trainer.evaluate()["eval_dev_mrr"] <= 1
    assert (tmp_path / "out" / "eval" / "candidate_ranking_dev.csv").is_file()


def test_bf16_is_on_where_the_hardware_has_it(tmp_path):
    arguments = PolyEncoderTrainingArguments(output_dir=str(tmp_path))
    assert arguments.bf16 == has_fast_bf16()
    assert not PolyEncoderTrainingArguments(output_dir=str(tmp_path), bf16=False).bf16


def test_bf16_training_runs(checkpoints, tmp_path):
    trainer = make("poly", checkpoints, tmp_path, bf16=True)
    trainer.train()
    assert trainer.model.dtype == torch.float32
    assert torch.isfinite(torch.tensor(trainer.state.log_history[-1]["train_loss"]))


def test_dropout_is_a_probability(checkpoints, tmp_path):
    trainer = make("poly", checkpoints, tmp_path, dropout=0.25)
    assert {module.p for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout)} == {0.25}
    with pytest.raises(ValueError, match="dropout"):
        make("poly", checkpoints, tmp_path, dropout=1.5)


def test_the_callers_model_is_the_one_trained(checkpoints, tmp_path):
    trainer = make("poly", checkpoints, tmp_path)
    before = deepcopy(trainer.model[0].model.codes.detach())
    model = trainer.model
    trainer.train()
    assert not torch.equal(model[0].model.codes, before)
