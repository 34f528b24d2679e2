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
from poly_encoders.training.sampling import LengthSortedBatchSampler
from poly_encoders.training.schedules import WarmupReduceLROnPlateau
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


def make(kind, checkpoints, tmp_path, data=DATA, model_options=None, eval_dataset=None, **options):
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
    args = arguments_class(**{**settings, **options})
    return trainer_class(model=model, args=args, train_dataset=data, eval_dataset=eval_dataset)


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


# --- the recipe ------------------------------------------------------------------------------------------------------


def test_adamax_has_the_codes_rate_and_the_weight_decay(checkpoints, tmp_path):
    trainer = make("poly", checkpoints, tmp_path, optimizer="adamax")
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, torch.optim.Adamax)
    codes = trainer.model[0].model.codes
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    assert groups[id(codes)]["lr"] == 0.03
    names = dict(trainer.model.named_parameters())
    assert {groups[id(p)]["weight_decay"] for name, p in names.items() if "dense.weight" in name} == {0.01}
    assert {
        groups[id(p)]["weight_decay"] for name, p in names.items() if name.endswith("bias") and p.requires_grad
    } == {0.0}
    trainer.train()
    assert trainer.state.global_step == 2


def test_adamw_is_fused_by_default(checkpoints, tmp_path):
    optimizer = make("bi", checkpoints, tmp_path).create_optimizer()
    assert isinstance(optimizer, torch.optim.AdamW)
    assert all(group["fused"] for group in optimizer.param_groups)


@pytest.mark.parametrize("kind", KINDS)
def test_the_plateau_goes_by_the_validation_loss_of_every_half_epoch(kind, checkpoints, tmp_path):
    trainer = make(
        kind,
        checkpoints,
        tmp_path,
        eval_dataset=DATA,
        max_steps=-1,
        num_train_epochs=3,
        per_device_train_batch_size=4,
        lr_scheduler_type="reduce_lr_on_plateau",
        lr_scheduler_kwargs={"factor": 0.4, "patience": 0, "threshold": 1e9, "threshold_mode": "abs"},
        warmup_steps=3,
        evaluations_per_epoch=2,
        save_strategy="steps",
        logging_steps=1,
    )
    assert (trainer.args.eval_strategy, trainer.args.eval_steps, trainer.args.save_steps) == ("steps", 2, 2)
    trainer.train()
    assert isinstance(trainer.lr_scheduler, WarmupReduceLROnPlateau)
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    evaluated = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert evaluated == [2, 4, 6, 8, 10, 12]
    # Warm after 3 steps; nothing ever improves by a threshold so large, so each evaluation from then on lowers it.
    expected = [1 / 3, 2 / 3, 1, 1, 0.4, 0.4, 0.16, 0.16, 0.064, 0.064, 0.0256, 0.0256]
    assert [rate * 1e3 for rate in rates] == pytest.approx(expected)
    assert (tmp_path / "out" / "checkpoint-2").is_dir()


def test_the_validation_loss_is_the_same_whenever_it_is_measured(checkpoints, tmp_path):
    """The Cross-encoder's drawn candidates change with the epochs in training only."""
    trainer = make("cross", checkpoints, tmp_path, eval_dataset=DATA, num_negatives=5)
    first = trainer.evaluate()["eval_loss"]
    trainer.data_collator.epoch = 3
    assert trainer.evaluate()["eval_loss"] == first
    assert trainer.data_collator.epoch == 3


def test_masked_duplicates_are_logged(checkpoints, tmp_path):
    """Four different replies to sixteen rows: in a batch of them all, each has three twins."""
    data = DATA.select_columns(["context", "reply"]).map(lambda row, i: {"reply": "abcd"[i % 4]}, with_indices=True)
    trainer = make("bi", checkpoints, tmp_path, data=data, per_device_train_batch_size=16, logging_steps=1)
    trainer.train()
    counts = [entry["masked_duplicates"] for entry in trainer.state.log_history if "masked_duplicates" in entry]
    assert counts == [48.0, 48.0]


def test_batches_are_sorted_by_length_unless_told_otherwise(checkpoints, tmp_path):
    def sampler(**options):
        return make("poly", checkpoints, tmp_path, **options).get_train_dataloader().batch_sampler

    assert isinstance(sampler(), LengthSortedBatchSampler)
    assert not isinstance(sampler(length_sorted_batches=False), LengthSortedBatchSampler)
    assert not isinstance(sampler(batch_sampler="no_duplicates"), LengthSortedBatchSampler)


def test_lengths_beyond_the_limit_do_not_count(checkpoints, tmp_path):
    data = Dataset.from_dict({"context": ["a" * 500, "b" * 5000, "c" * 3], "reply": ["x", "y", "z"]})
    options = {"model_options": {"max_context_length": 10, "max_candidate_length": 10}}
    lengths = make("poly", checkpoints, tmp_path, data=data, **options).get_train_dataloader().batch_sampler.lengths
    assert lengths.tolist() == [61, 61, 4]


@pytest.mark.parametrize("kind", ["poly", "bi"])
def test_cached_gradients_train_the_same(kind, checkpoints, tmp_path):
    losses = []
    for name, size in (("plain", None), ("cached", 3)):
        trainer = make(kind, checkpoints, tmp_path / name, mini_batch_size=size, max_steps=4, logging_steps=1)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert trainer.args.ddp_find_unused_parameters  # or the last mini-batch's side alone would be averaged


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_and_compilation_change_no_loss(kind, checkpoints, tmp_path):
    losses = []
    for options in ({}, {"gradient_checkpointing": True}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        trainer = make(kind, checkpoints, tmp_path, logging_steps=1, **options)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0] == pytest.approx(losses[2], rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_lora_trains_little_and_saves_a_plain_model(kind, checkpoints, tmp_path):
    options = {"lora_rank": 2, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "dropout": 0.1, "seed": 3}
    trainer = make(kind, checkpoints, tmp_path, **options)
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert trained < 0.2 * sum(p.numel() for p in trainer.model.parameters())
    trainer.train()
    trainer.save_model()
    folder = tmp_path / "out"
    again = KINDS[kind][0](str(folder), device="cpu")
    texts = ["hello", "you", "why not"]
    found, expected = again.rank("hello", texts), trainer.model.eval().rank("hello", texts)
    assert [entry["score"] for entry in found] == pytest.approx([entry["score"] for entry in expected], abs=1e-4)
    assert not any("lora" in name for name, _ in again.named_parameters())
    resumed = make(kind, checkpoints, tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    for (name, value), other in zip(trainer.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(value, other), name


def test_options_that_make_no_sense(tmp_path):
    for options, message in (
        ({"evaluations_per_epoch": 0}, "evaluations_per_epoch"),
        ({"distillation": "kl", "distillation_weight": 2.0}, "distillation_weight"),
        ({"optimizer": "Adamax"}, "optimizer"),
        ({"dataloader_persistent_workers": True, "dataloader_num_workers": 1}, "random draws"),
        ({"hub_strategy": "checkpoint"}, "pickled"),
        ({"hub_strategy": "every_save", "hub_create_pr": True}, "at every save"),
    ):
        with pytest.raises(ValueError, match=message):
            PolyEncoderTrainingArguments(output_dir=str(tmp_path), **options)


def test_a_streamed_data_set_trains_and_has_no_half_epochs(checkpoints, tmp_path):
    stream = DATA.to_iterable_dataset()
    trainer = make("poly", checkpoints, tmp_path, data=stream)
    trainer.train()
    assert trainer.state.global_step == 2
    with pytest.raises(ValueError, match="known length"):
        make("poly", checkpoints, tmp_path, data=stream, eval_dataset=DATA, evaluations_per_epoch=2)


@pytest.mark.parametrize("kind", KINDS)
def test_arguments_come_in_upstream_s_order(kind, checkpoints, tmp_path):
    model_class, trainer_class, arguments_class = KINDS[kind]
    args = arguments_class(str(tmp_path), report_to="none", use_cpu=True, bf16=False)
    evaluator = CandidateRankingEvaluator([{"context": "a", "candidates": ["a", "b"]}])
    trainer = trainer_class(model_class(checkpoints(), device="cpu"), args, DATA, DATA, None, evaluator)
    assert trainer.train_dataset is DATA
    assert trainer.eval_dataset is DATA
    assert trainer.evaluator is evaluator


def test_a_model_that_is_made_by_the_trainer_is_set_up_too(checkpoints, tmp_path):
    args = PolyEncoderTrainingArguments(
        str(tmp_path), report_to="none", use_cpu=True, bf16=False, dropout=0.2, max_steps=1, save_strategy="no"
    )
    trainer = PolyEncoderTrainer(
        args=args, train_dataset=DATA, model_init=lambda: PolyEncoder(checkpoints(), num_codes=3, device="cpu")
    )
    trainer.train()
    assert {module.p for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout)} == {0.2}
    frozen = [name for name, p in trainer.model.named_parameters() if not p.requires_grad]
    assert any("word_embeddings" in name for name in frozen)


def test_options_that_depend_on_the_machine(tmp_path):
    args = PolyEncoderTrainingArguments(str(tmp_path))
    assert args.dataloader_num_workers == (2 if torch.accelerator.is_available() else 0)
    assert PolyEncoderTrainingArguments(str(tmp_path), dataloader_num_workers=3).dataloader_num_workers == 3
