"""The trainers: what learns, at which rate, from which columns, and that training helps."""

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback
from transformers.trainer_utils import HPSearchBackend

from poly_encoders import CandidateRankingEvaluator, poly_score
from poly_encoders.hardware import has_fast_bf16
from poly_encoders.training.data.sampling import LengthSortedBatchSampler
from poly_encoders.training.runs.arguments import PolyEncoderTrainingArguments
from poly_encoders.training.runs.schedules import WarmupReduceLROnPlateau
from poly_encoders.training.runs.trainers import PolyEncoderTrainer
from training_runs import KINDS, QUIET, assert_same_weights, logged, make_model, make_trainer, weights

LETTERS = "abcdefghijklmnop"
# The positive of a letter is the next one, thrice: nothing a fresh model knows, and learnt in a few steps.
DATA = Dataset.from_dict(
    {
        "context": [["say", letter * 4] for letter in LETTERS],
        "reply": [LETTERS[(i + 1) % 16] * 3 for i in range(16)],
        "negative": [LETTERS[(i + 6) % 16] * 3 for i in range(16)],
    }
)


CODES = {"context_vectors": "learnt_codes", "normalize": False}


@pytest.fixture
def make(checkpoints, tmp_path):
    """A function that makes a trainer of a kind."""

    def made(kind, data=DATA, **options):
        return make_trainer(kind, checkpoints(), tmp_path / "out", data, **options)

    return made


def dropouts(model):
    return {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}


@pytest.mark.parametrize(("kind", "model_options"), [("poly", {}), ("poly", CODES), ("bi", {}), ("cross", {})])
def test_training_helps_and_what_is_saved_loads_and_holds_no_pickle(kind, model_options, make, tmp_path):
    steps = {"max_steps": 100, "num_negatives": 7} if kind == "cross" else {"max_steps": 60}
    trainer = make(kind, per_device_train_batch_size=16, learning_rate=3e-3, model_options=model_options, **steps)
    model, before = trainer.model, weights(trainer.model)
    sets = [
        {"context": row["context"], "candidates": [row["reply"], *(x * 3 for x in LETTERS if x * 3 != row["reply"])]}
        for row in DATA
    ]
    evaluator = CandidateRankingEvaluator(sets, show_progress_bar=False, write_csv=False)
    quality = evaluator(model)["mrr"]
    trainer.train()
    assert trainer.model is model
    assert evaluator(model)["mrr"] > quality + 0.2
    changed = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert not [name for name in changed if "word_embeddings" in name]
    for part in ("position_embeddings", "attention", *(["codes"] if model_options else [])):
        assert [name for name in changed if part in name]
    trainer.save_model()
    assert (tmp_path / "out" / "training_args.json").is_file()
    assert not [file for file in (tmp_path / "out").rglob("*") if file.suffix in (".bin", ".pt", ".pkl")]
    assert_same_weights(KINDS[kind][0](str(tmp_path / "out"), device="cpu"), model)


def test_the_codes_learn_faster(make):
    trainer = make("poly", model_options=CODES, code_learning_rate_factor=30.0, freeze_word_embeddings=False)
    groups = trainer.create_optimizer().param_groups
    codes = trainer.model[0].model.codes
    rates = {name: group["lr"] for group in groups for name in group["params"]}
    assert rates.pop(codes) == 0.03
    assert set(rates.values()) == {0.001}
    assert len(rates) == len(list(trainer.model.parameters())) - 1  # each once, embeddings too
    assert trainer.args.learning_rate_mapping == {}  # the caller's options stay
    assert all(group["fused"] for group in groups)
    own = make("poly", model_options=CODES, learning_rate_mapping={"codes": 0.5}).create_optimizer().param_groups
    assert sorted({group["lr"] for group in own}) == [0.001, 0.5]


class Trial(dict):
    """As much of Optuna's as the Trainer wants."""

    number, params = 0, "those of the test"


def test_a_hyperparameter_search_tries_what_it_says(checkpoints, tmp_path, monkeypatch):
    """The codes kept the first trial's learning rate; dropout and the loss came a trial late, or never."""

    def made():
        return make_model("poly", checkpoints(), **CODES)

    args = PolyEncoderTrainingArguments(str(tmp_path), max_steps=1, save_strategy="no", dropout=0.2, **QUIET)
    trainer = PolyEncoderTrainer(args=args, train_dataset=DATA, model_init=lambda: made())
    assert dropouts(trainer.model) == {0.2}
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: True)  # reads dicts
    trainer.hp_search_backend, trainer.hp_space = HPSearchBackend.OPTUNA, dict
    for rate, dropout, size in ((1e-3, 0.1, 4), (5e-3, 0.3, 2)):
        trial = Trial(learning_rate=rate, dropout=dropout, mini_batch_size=size)
        trainer.args.mini_batch_size = 1  # upstream casts to the type of the value before
        trainer.train(trial=trial)
        rates = sorted({group["initial_lr"] for group in trainer.optimizer.param_groups})
        assert rates == pytest.approx([rate, 30 * rate])
        assert dropouts(trainer.model) == {dropout}
        assert trainer.loss.mini_batch_size == size
        assert trainer.loss.model is trainer.model
        frozen = [name for name, parameter in trainer.model.named_parameters() if not parameter.requires_grad]
        assert any("word_embeddings" in name for name in frozen)


def test_the_loss_is_cross_entropy_in_the_batch(make):
    """Every other candidate of the batch is a negative, the third column's among them."""
    trainer = make("poly")
    model = trainer.model.eval()
    batch = trainer.data_collator([DATA[i] for i in range(5)])
    loss = trainer.compute_loss(model, batch)
    contexts = model.encode_query(DATA["context"][:5], convert_to_tensor=True)
    texts = [*DATA["reply"][:5], *DATA["negative"][:5]]
    scores = 20.0 * poly_score(contexts, model.encode_document(texts, convert_to_tensor=True), model.final_scale)
    assert scores.shape == (5, 10)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(scores, torch.arange(5)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["poly", "bi"])
def test_the_first_column_is_the_context_whatever_its_name(kind, make):
    data = DATA.rename_columns({"context": "zebra", "reply": "apple", "negative": "mango"})
    batch = make(kind, data).data_collator([data[0]])
    assert (batch["zebra_task"], batch["apple_task"], batch["mango_task"]) == ("query", "document", "document")


def test_the_cross_encoder_reads_its_own_candidates_and_drawn_ones(make):
    trainer = make("cross", num_negatives=3)
    seen = []
    original = trainer.model.preprocess
    trainer.data_collator.preprocess_fn = lambda pairs, **options: seen.extend(pairs) or original(pairs, **options)
    batch = trainer.data_collator([DATA[i] for i in range(6)])
    assert batch["features"]["candidate_mask"].shape == (6, 4)
    for row in range(6):
        contexts, candidates = zip(*seen[4 * row : 4 * row + 4], strict=True)
        assert all(context == DATA[row]["context"] for context in contexts)
        assert candidates[:2] == (DATA[row]["reply"], DATA[row]["negative"])
        assert set(candidates[2:]) <= set(DATA["reply"]) - {DATA[row]["reply"]}
    scores = trainer.model.eval()(dict(batch["features"]))["scores"].view(6, 4)
    expected = torch.nn.functional.cross_entropy(scores, torch.zeros(6, dtype=torch.long))
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), expected)


# --- data from Python ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_data_that_cannot_be_trained_on_are_refused_with_their_place(kind, make):
    good = {"context": ["a", "b", "c"], "reply": ["d", "e", "f"]}
    for change, match in (
        ({"reply": ["d", None, "f"]}, r"[Rr]ow 2.*the training data.*reply"),
        ({"context": [["a"], ["b"], []]}, r"[Rr]ow 3.*context"),
        ({"label": [1, 0, 2]}, "label"),
    ):
        with pytest.raises(ValueError, match=match):
            make(kind, Dataset.from_dict({**good, **change}))
    with pytest.raises(ValueError, match="needs a context and a candidate"):
        make(kind, Dataset.from_dict({"context": ["a"]}))
    with pytest.raises(ValueError, match="the evaluation data"):
        make(kind, eval_dataset=Dataset.from_dict({**good, "reply": ["", "e", "f"]}))


@pytest.mark.parametrize("kind", KINDS)
def test_labels_and_transforms_are_honoured(kind, make):
    """Rows of label 0 were trained on as positives, and a transform that renames columns was a KeyError."""
    labelled = DATA.select_columns(["context", "reply"]).add_column("label", [1, 0] * 8)
    trainer = make(kind, labelled)
    assert [row["reply"] for row in trainer.train_dataset] == DATA["reply"][::2]
    renamed = DATA.select_columns(["context", "reply"]).with_transform(
        lambda rows: {"dialogue": rows["context"], "answer": [text.upper() for text in rows["reply"]]}
    )
    trainer = make(kind, renamed, eval_dataset=renamed, eval_strategy="steps", eval_steps=1)
    trainer.train()
    assert len(logged(trainer, "eval_loss")) == 2


def test_a_streamed_data_set_trains_and_has_no_half_epochs(make):
    stream = DATA.to_iterable_dataset()
    trainer = make("poly", stream)
    trainer.train()
    assert trainer.state.global_step == 2
    with pytest.raises(ValueError, match="known length"):
        make("poly", stream, eval_dataset=DATA, evaluations_per_epoch=2)


@pytest.mark.parametrize("kind", KINDS)
def test_arguments_come_in_upstream_s_order(kind, checkpoints, tmp_path):
    _, trainer_class, arguments_class = KINDS[kind]
    args = arguments_class(str(tmp_path), **QUIET)
    evaluator = CandidateRankingEvaluator([{"context": "a", "candidates": ["a", "b"]}], name="dev", write_csv=False)
    small = DATA.select(range(3))
    trainer = trainer_class(make_model(kind, checkpoints()), args, DATA, small, None, evaluator)
    assert (trainer.train_dataset.to_list(), trainer.eval_dataset.to_list()) == (DATA.to_list(), small.to_list())
    assert 0 < trainer.evaluate()["eval_dev_mrr"] <= 1


# --- the recipe ------------------------------------------------------------------------------------------------------


def test_adamax_has_the_codes_rate_and_the_weight_decay(make):
    trainer = make("poly", model_options=CODES, optimizer="adamax")
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, torch.optim.Adamax)
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    assert groups[trainer.model[0].model.codes]["lr"] == 0.03
    trained = {name: parameter for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert {groups[p]["weight_decay"] for name, p in trained.items() if "dense.weight" in name} == {0.01}
    assert {groups[p]["weight_decay"] for name, p in trained.items() if name.endswith("bias")} == {0.0}
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_plateau_goes_by_the_validation_loss_of_every_half_epoch(kind, make, tmp_path):
    trainer = make(
        kind,
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
    evaluated = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert evaluated == [2, 4, 6, 8, 10, 12]
    # Warm after 3 steps; nothing ever improves by a threshold so large, so each evaluation from then on lowers it.
    expected = [1 / 3, 2 / 3, 1, 1, 0.4, 0.4, 0.16, 0.16, 0.064, 0.064, 0.0256, 0.0256]
    assert [rate * 1e3 for rate in logged(trainer, "learning_rate")] == pytest.approx(expected)
    assert {path.name for path in (tmp_path / "out").glob("checkpoint-*")} == {f"checkpoint-{n}" for n in evaluated}


def test_the_validation_loss_is_the_same_whenever_it_is_measured(make):
    """The Cross-encoder's drawn candidates change with the epochs in training only."""
    trainer = make("cross", eval_dataset=DATA, num_negatives=5)
    first = trainer.evaluate()["eval_loss"]
    trainer.data_collator.epoch = 3
    assert trainer.evaluate()["eval_loss"] == first
    assert trainer.data_collator.epoch == 3


def test_masked_duplicates_are_logged(make):
    """Four different replies to sixteen rows: in a batch of them all, each has three twins."""
    data = DATA.select_columns(["context", "reply"]).map(lambda row, i: {"reply": "abcd"[i % 4]}, with_indices=True)
    trainer = make("bi", data, per_device_train_batch_size=16, logging_steps=1)
    trainer.train()
    assert logged(trainer, "masked_duplicates") == [48.0, 48.0]


def test_how_alike_context_vectors_are_is_logged(make):
    trainer = make("poly", logging_steps=1)
    trainer.train()
    assert len(logged(trainer, "context_vector_cosine")) == 2
    assert all(-1 <= value <= 1 for value in logged(trainer, "context_vector_cosine"))
    trainer = make("bi", logging_steps=1)
    trainer.train()
    assert not logged(trainer, "context_vector_cosine")


def test_disagreement_parts_the_context_vectors(make):
    alike = []
    for weight in (0.0, 5.0):
        trainer = make("poly", model_options=CODES, disagreement_weight=weight, max_steps=20, logging_steps=10)
        trainer.train()
        alike.append(logged(trainer, "context_vector_cosine")[-1])
    assert alike[1] < alike[0] - 0.05


@pytest.mark.parametrize("optimizer", ["adamw", "adamax"])
def test_what_is_learnt_as_one_number_learns_faster_and_does_not_decay(make, optimizer):
    options = {"config_kwargs": {"learn_final_temperature": True, "learn_last_turn_share": True}}
    trainer = make("poly", model_options=options, learn_logit_scale=True, optimizer=optimizer, logging_steps=1)
    model = trainer.model[0].model
    numbers = [trainer.loss.log_logit_scale, model.log_temperature, model.last_turn_logit]
    before = [number.item() for number in numbers]
    groups = trainer.create_optimizer().param_groups
    of = {parameter: group for group in groups for parameter in group["params"]}
    assert [of[number]["lr"] for number in numbers] == pytest.approx([0.01] * 3)
    assert [of[number]["weight_decay"] for number in numbers] == [0.0] * 3
    assert sum(len(group["params"]) for group in groups) == len(of)
    trainer.train()
    assert all(abs(number.item() - old) > 1e-3 for number, old in zip(numbers, before, strict=True))
    assert logged(trainer, "logit_scale")[-1] == pytest.approx(numbers[0].exp().item(), abs=1e-3)
    own = make("bi", learn_logit_scale=True, scalar_learning_rate_factor=2.0)
    assert {group["lr"] for group in own.create_optimizer().param_groups} == {1e-3, 2e-3}
    assert own.loss.logit_scale.item() == pytest.approx(1.0)


class Seen(TrainerCallback):
    """The gradients of the logit scale before each step."""

    def __init__(self, trainer):
        self.trainer, self.gradients = trainer, []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.gradients.append(self.trainer.loss.log_logit_scale.grad.item())


def test_accumulated_and_cached_gradients_teach_the_scale_the_same(make):
    found = []
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "learn_logit_scale": True}
    for size in (None, 3):
        trainer = make("poly", mini_batch_size=size, **options)
        trainer.add_callback(seen := Seen(trainer))
        trainer.train()
        found.append(seen.gradients)
    assert len(found[0]) == 2
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_batches_are_sorted_by_length_unless_told_otherwise(make):
    def sampler(**options):
        return make("poly", **options).get_train_dataloader().batch_sampler

    assert isinstance(sampler(), LengthSortedBatchSampler)
    assert not isinstance(sampler(length_sorted_batches=False), LengthSortedBatchSampler)
    assert not isinstance(sampler(batch_sampler="no_duplicates"), LengthSortedBatchSampler)


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_beyond_the_limit_do_not_count(kind, make):
    data = Dataset.from_dict({"context": ["a" * 500, "b" * 5000, "c" * 3], "reply": ["x", "y", "z"]})
    trainer = make(kind, data, model_options={"max_context_length": 10, "max_candidate_length": 10})
    assert trainer.get_train_dataloader().batch_sampler.lengths.tolist() == [61, 61, 4]


@pytest.mark.parametrize("kind", ["poly", "bi"])
def test_cached_gradients_train_the_same(kind, make):
    losses = []
    for size in (None, 3):
        trainer = make(kind, mini_batch_size=size, max_steps=4, logging_steps=1)
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert trainer.args.ddp_find_unused_parameters  # or the last mini-batch's side alone would be averaged


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_and_compilation_change_no_loss(kind, make):
    losses = []
    compiled = [{"torch_compile": True, "torch_compile_backend": "eager"}] if kind == "cross" else []
    for options in ({}, {"gradient_checkpointing": True}, *compiled):
        trainer = make(kind, logging_steps=1, **options)
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert all(other == pytest.approx(losses[0], rel=1e-3) for other in losses)


@pytest.mark.parametrize("kind", KINDS)
def test_lora_trains_little_and_saves_a_plain_model(kind, make, tmp_path):
    options = {"lora_rank": 2, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "dropout": 0.1, "seed": 3}
    trainer = make(kind, **options)
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert trained < 0.2 * sum(p.numel() for p in trainer.model.parameters())
    trainer.train()
    trainer.save_model()
    again = KINDS[kind][0](str(tmp_path / "out"), device="cpu")
    found, expected = (model.rank("hello", ["hello", "you", "why"]) for model in (again, trainer.model.eval()))
    assert [entry["score"] for entry in found] == pytest.approx([entry["score"] for entry in expected], abs=1e-4)
    assert not any("lora" in name for name, _ in again.named_parameters())
    resumed = make(kind, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert_same_weights(resumed.model, trainer.model)


# --- options ---------------------------------------------------------------------------------------------------------


def test_options_that_depend_on_the_machine(make, tmp_path):
    args = PolyEncoderTrainingArguments(str(tmp_path))
    assert args.bf16 == has_fast_bf16()
    assert args.dataloader_num_workers == (2 if torch.accelerator.is_available() else 0)
    own = PolyEncoderTrainingArguments(str(tmp_path), dataloader_num_workers=3, bf16=False)
    assert (own.dataloader_num_workers, own.bf16) == (3, False)
    trainer = make("poly", bf16=True)
    trainer.train()
    assert trainer.model.dtype == torch.float32
    assert torch.isfinite(torch.tensor(logged(trainer, "train_loss"))).all()


def test_options_that_make_no_sense(make, tmp_path):
    for options, message in (
        ({"evaluations_per_epoch": 0}, "evaluations_per_epoch"),
        ({"distillation": "kl", "distillation_weight": 2.0}, "distillation_weight"),
        ({"optimizer": "Adamax"}, "optimizer"),
        ({"logit_scale": -1.0}, "logit_scale"),
        ({"logit_scale": 200.0, "learn_logit_scale": True}, "100"),
        ({"disagreement_weight": float("nan")}, "disagreement_weight"),
        ({"num_index_negatives": 5}, "freeze_candidate_encoder"),
        ({"dataloader_persistent_workers": True, "dataloader_num_workers": 1}, "random draws"),
        ({"hub_strategy": "checkpoint"}, "pickled"),
        ({"hub_strategy": "every_save", "hub_create_pr": True}, "at every save"),
    ):
        with pytest.raises(ValueError, match=message):
            PolyEncoderTrainingArguments(output_dir=str(tmp_path), **options)
    assert dropouts(make("poly", dropout=0.25).model) == {0.25}
    with pytest.raises(ValueError, match="dropout"):
        make("poly", dropout=1.5)


def test_a_loss_of_the_users_own_may_have_labels(checkpoints, tmp_path):
    class Mean(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.labels = model, []

        def forward(self, features, labels):
            self.labels += labels.tolist()
            return sum(self.model(side)["sentence_embedding"].mean() for side in features)

    data = DATA.select_columns(["context", "reply"]).add_column("label", [0.5] * 16)
    model = make_model("bi", checkpoints())
    args = KINDS["bi"][2](str(tmp_path), max_steps=1, save_strategy="no", **QUIET)
    trainer = KINDS["bi"][1](model, args, data, loss=(loss := Mean(model)))
    trainer.train()
    assert set(loss.labels) == {0.5}
