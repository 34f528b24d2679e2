"""Pre-training: what a batch holds, what each task learns, and whole runs as a user starts them."""

from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

import tiny
from poly_encoders import BiEncoder, CrossEncoder, PolyEncoder
from poly_encoders.training.methods.pretraining import (
    PreTrainer,
    PreTrainingArguments,
    PreTrainingCollator,
    PreTrainingModel,
    PreTrainingPairs,
)
from poly_encoders.training.pretrain import main, parse_options
from training_runs import QUIET, assert_same_weights, weights, write_rows

CONFIG = str(Path(__file__).parents[2] / "training" / "configs" / "chitchat_pretrain.yaml")
MASKED_FAMILIES = [family for family in tiny.FAMILIES if family not in ("t5", "qwen3")]
LETTERS = "abcdefghijklmnop"
# The right response repeats the context's last turn.
DATA = Dataset.from_dict(
    {"context": [["say", letter * 6] for letter in LETTERS], "reply": [letter * 6 for letter in LETTERS]}
)


@pytest.fixture
def model(checkpoints):
    torch.manual_seed(0)
    return PreTrainingModel.from_checkpoint(checkpoints(), device="cpu")


def make(checkpoints, tmp_path, data=DATA, family="bert", model_options=None, **options):
    torch.manual_seed(0)
    model = PreTrainingModel.from_checkpoint(checkpoints(family), device="cpu", **(model_options or {}))
    settings = {
        "output_dir": str(tmp_path / "out"),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "logging_steps": 2,
        **QUIET,
    }
    return PreTrainer(model=model, args=PreTrainingArguments(**{**settings, **options}), train_dataset=data)


# --- what a batch holds ----------------------------------------------------------------------------------------------


def test_the_tasks_take_turns_and_every_example_comes_once_an_epoch():
    pairs = PreTrainingPairs(DATA, update_size=4, seed=3)
    for epoch in range(2):
        pairs.set_epoch(epoch)
        rows = [pairs[i] for i in range(len(pairs))]
        assert [row["is_next"] is None for row in rows] == [True] * 4 + [False] * 4 + [True] * 4 + [False] * 4
        assert sorted(row["context"][1] for row in rows) == [letter * 6 for letter in LETTERS]
        assert all(row["context"][1] == row["response"] for row in rows if row["is_next"] in (None, True))
        assert all(row["context"][1] != row["response"] for row in rows if row["is_next"] is False)


def test_turns_go_on_across_epochs_and_the_last_update_is_filled_up():
    pairs = PreTrainingPairs(DATA, update_size=6, seed=3)
    assert len(pairs) == 18
    tasks = []
    for epoch in range(2):
        pairs.set_epoch(epoch)
        tasks += [pairs[i]["is_next"] is None for i in range(0, 18, 6)]
    assert tasks == [True, False, True, False, True, False]


def test_draws_are_seeded_and_differ_by_epoch():
    def rows(seed, epoch):
        pairs = PreTrainingPairs(DATA, update_size=4, seed=seed)
        pairs.set_epoch(epoch)
        return [pairs[i] for i in range(16)]

    assert rows(1, 2) == rows(1, 2)
    assert rows(1, 2) != rows(1, 3)
    assert rows(1, 2) != rows(2, 2)


def test_half_of_the_next_utterances_are_wrong():
    pairs = PreTrainingPairs(Dataset.from_dict({"c": ["x"] * 4000, "r": ["a", "b"] * 2000}), update_size=2, seed=0)
    answers = [row["is_next"] for row in (pairs[i] for i in range(4000)) if row["is_next"] is not None]
    assert len(answers) == 2000
    assert 0.45 < sum(answers) / len(answers) < 0.55


def test_pairs_are_cut_and_joined_as_the_cross_encoder_does(checkpoints):
    options = {"max_context_length": 5, "max_candidate_length": 3, "turn_separator": "|"}
    model = PreTrainingModel.from_checkpoint(checkpoints(), device="cpu", **options)
    rows = [{"context": ["abc", "defg"], "response": "uvwxyz", "is_next": True, "seed": 0}]
    batch = PreTrainingCollator(model.cross_encoder)(rows)
    assert model.cross_encoder.tokenizer.decode(batch["input_ids"][0]) == "<s> | d e f g </s> u v w </s>"
    assert batch["token_type_ids"].tolist() == [[0] * 7 + [1] * 4]
    assert batch["is_next"].tolist() == [1.0]


def test_masking(model):
    text = LETTERS * 3
    rows = [{"context": text[:40], "response": text[:15], "is_next": None, "seed": seed} for seed in range(64)]
    tokenizer, collate = model.cross_encoder.tokenizer, PreTrainingCollator(model.cross_encoder)
    batch = collate(rows)
    plain = collate([{**row, "is_next": True} for row in rows])["input_ids"]
    chosen = batch["labels"] != -100
    assert torch.equal(batch["labels"][chosen], plain[chosen])
    assert torch.equal(batch["input_ids"][~chosen], plain[~chosen])
    assert not torch.isin(plain[chosen], torch.tensor(tokenizer.all_special_ids)).any()
    assert 0.12 < chosen.sum() / (64 * 55) < 0.18
    masked = (batch["input_ids"] == tokenizer.mask_token_id)[chosen].float().mean()
    kept = (batch["input_ids"] == plain)[chosen].float().mean()
    assert 0.72 < masked < 0.88
    assert 0.05 < kept < 0.17
    assert torch.equal(collate(rows)["input_ids"], batch["input_ids"])
    rows[0]["seed"] = 99
    assert not torch.equal(collate(rows)["input_ids"], batch["input_ids"])


def test_a_batch_of_both_tasks_is_refused(model):
    rows = [{"context": "a", "response": "b", "is_next": answer, "seed": 0} for answer in (None, True)]
    with pytest.raises(ValueError, match="mixes the two tasks"):
        PreTrainingCollator(model.cross_encoder)(rows)


# --- the model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MASKED_FAMILIES)
def test_every_family_trains_and_what_is_saved_starts_all_three(family, checkpoints, tmp_path):
    trainer = make(checkpoints, tmp_path, family=family, model_options={"max_context_length": 40})
    before = weights(trainer.model)
    trainer.train()
    trainer.save_model()
    changed = {name for name, value in weights(trainer.model).items() if not torch.equal(value, before[name])}
    assert [name for name in changed if "layer" in name and name.startswith("masked_lm")]
    assert [name for name in changed if name.startswith("cross_encoder") and "classifier" in name]
    assert trainer.model.masked_lm.get_input_embeddings().weight.requires_grad

    folder = str(tmp_path / "out")
    pair = (["hello", "you"], "hi")
    trained = trainer.model.eval()
    features = trained.cross_encoder.preprocess([pair])
    features.pop("modality")
    scores = trained(**features, is_next=torch.ones(1)).scores
    ranker = CrossEncoder(folder + "/cross-encoder", device="cpu")
    torch.testing.assert_close(ranker.predict([pair], convert_to_tensor=True), scores.detach())
    assert ranker.length_limits()[0] == 40

    again = AutoModelForMaskedLM.from_pretrained(folder).eval()
    torch.testing.assert_close(again(**features).logits, trained.masked_lm(**features).logits)
    encoder = AutoModel.from_pretrained(folder).eval()
    hidden = encoder(**features).last_hidden_state
    torch.testing.assert_close(hidden, trained.masked_lm.base_model(**features).last_hidden_state)
    assert AutoTokenizer.from_pretrained(folder).mask_token == "<mask>"
    for model_class in (PolyEncoder, BiEncoder, CrossEncoder):
        assert len(model_class(folder, device="cpu").rank("a", ["b", "c"])) == 2
    assert (tmp_path / "out" / "training_args.json").is_file()
    assert not [file for file in Path(folder).rglob("*") if file.suffix in (".bin", ".pt", ".pkl", ".pth")]


def test_the_two_models_are_one_encoder(model):
    classifier = model.cross_encoder[0].model
    assert model.masked_lm.base_model is classifier.base_model
    assert model.masked_lm.get_output_embeddings().weight is classifier.get_input_embeddings().weight
    assert classifier.base_model.pooler is not None


@pytest.mark.parametrize("family", MASKED_FAMILIES)
def test_the_losses_are_those_of_the_tasks(family, checkpoints):
    model = PreTrainingModel.from_checkpoint(checkpoints(family), device="cpu").eval()
    batch = tiny.token_batch(3, 9)
    labels = torch.full_like(batch["input_ids"], -100)
    labels[0, 3], labels[2, 0] = 7, 8
    expected = model.masked_lm(**batch, labels=labels).loss
    torch.testing.assert_close(model(**batch, labels=labels).loss, expected)
    assert model(**batch, labels=torch.full_like(labels, -100)).loss == 0
    is_next = torch.tensor([1.0, 0.0, 1.0])
    scores = model.cross_encoder[0].model(**batch).logits[:, 0]
    right = torch.where(is_next == 1, scores.sigmoid(), 1 - scores.sigmoid())
    torch.testing.assert_close(model(**batch, is_next=is_next).loss, -right.log().mean())
    for targets in ({}, {"labels": labels, "is_next": is_next}):
        with pytest.raises(ValueError, match="one task"):
            model(**batch, **targets)


def test_the_vocabulary_is_scored_for_the_predicted_tokens_alone(model):
    seen = []
    layer = model.masked_lm.get_output_embeddings()
    layer.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    batch = tiny.token_batch(3, 9)
    labels = torch.full_like(batch["input_ids"], -100)
    labels[0, 3], labels[2, 0] = 7, 8
    model(**batch, labels=labels).loss.backward()
    assert seen == [(2, tiny.VOCAB_SIZE)]
    assert model.masked_lm(**batch).logits.shape == (3, 9, tiny.VOCAB_SIZE)


def test_from_scratch_reads_configuration_and_tokenizer_alone(checkpoints, tmp_path):
    tiny.family_config("roberta").save_pretrained(tmp_path)
    tiny.make_tokenizer().save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    model = PreTrainingModel.from_checkpoint(str(tmp_path), from_scratch=True, device="cpu")
    assert model.masked_lm.config.model_type == "roberta"
    source = AutoModel.from_pretrained(checkpoints())
    for from_scratch in (False, True):
        model = PreTrainingModel.from_checkpoint(checkpoints(), from_scratch=from_scratch, device="cpu")
        found = model.masked_lm.get_input_embeddings().weight
        assert torch.equal(found, source.get_input_embeddings().weight) != from_scratch


def test_training_helps_at_both_tasks(checkpoints, tmp_path):
    # A wrong response is most often the rare one, which is learnt in a few steps.
    data = Dataset.from_dict({"context": ["hello"] * 14 + ["bye"] * 2, "reply": ["aaaaaa"] * 14 + ["bbbbbb"] * 2})
    options = {"max_steps": 120, "per_device_train_batch_size": 16, "learning_rate": 3e-3, "logging_steps": 40}
    trainer = make(checkpoints, tmp_path, data=data, dropout=0.0, **options)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "mlm_loss" in entry]
    assert len(logs) == 3
    assert logs[-1]["mlm_loss"] < logs[0]["mlm_loss"] - 0.5
    assert logs[-1]["nup_loss"] < logs[0]["nup_loss"] - 0.1
    assert logs[-1]["nup_accuracy"] > 0.7
    assert logs[0]["loss"] == pytest.approx((logs[0]["mlm_loss"] + logs[0]["nup_loss"]) / 2, abs=1e-3)


def test_options_of_the_trainer(checkpoints, tmp_path):
    frozen = make(checkpoints, tmp_path, freeze_word_embeddings=True, dropout=0.25, mlm_probability=0.3)
    assert not frozen.model.masked_lm.get_input_embeddings().weight.requires_grad
    assert {module.p for module in frozen.model.modules() if isinstance(module, torch.nn.Dropout)} == {0.25}
    assert frozen.data_collator.masking.mlm_probability == 0.3
    frozen.train()
    recomputing = make(checkpoints, tmp_path, activation_checkpointing=True, max_steps=2)
    recomputing.train()
    assert recomputing.state.global_step == 2


@pytest.mark.parametrize(("accumulated", "workers"), [(1, 0), (2, 2)])
def test_resuming_gives_the_same_weights(accumulated, workers, checkpoints, tmp_path):
    """Of 4 or 2 steps an epoch: the run is cut within an epoch that is not the first, and dropout draws too."""
    options = {"max_steps": 7, "save_strategy": "steps", "save_steps": 5, "seed": 5}
    options |= {"gradient_accumulation_steps": accumulated, "dataloader_num_workers": workers}
    whole = make(checkpoints, tmp_path, **options)
    whole.train()
    again = make(checkpoints, tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-5"))
    assert_same_weights(again.model, whole.model)
    with pytest.raises(FileNotFoundError, match="no pre-training checkpoint"):
        again.train(resume_from_checkpoint=str(tmp_path))


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["t5", "qwen3"])
def test_models_that_cannot_be_pre_trained(family, checkpoints):
    with pytest.raises(ValueError, match="no encoder with both"):
        PreTrainingModel.from_checkpoint(checkpoints(family), device="cpu")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"mask_token": None}, "the mask token None"),
        ({"pad_token": None, "eos_token": None}, "neither a padding token nor"),
        ({"new": ["one", "more"]}, f"tokenizer {tiny.VOCAB_SIZE + 2} tokens"),
    ],
)
def test_tokenizers_that_will_not_do(change, match, checkpoints, tmp_path):
    AutoModel.from_pretrained(checkpoints()).save_pretrained(tmp_path)
    tokenizer = tiny.make_tokenizer()
    tokenizer.add_tokens(change.get("new", []))
    for name in change.keys() - {"new"}:
        setattr(tokenizer, name, None)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=match):
        PreTrainingModel.from_checkpoint(str(tmp_path), device="cpu")


def test_data_that_cannot_be_trained_on():
    for responses, match in ((["same", "same"], "at least two different"), (["x", None], r"[Rr]ow 2")):
        with pytest.raises(ValueError, match=match):
            PreTrainingPairs(Dataset.from_dict({"a": ["x", "y"], "b": responses}), update_size=2, seed=0)
    labelled = Dataset.from_dict({"a": ["x", "y", "z"], "b": ["1", "2", "3"], "label": [1, 0, 1]})
    pairs = PreTrainingPairs(labelled, update_size=2, seed=0)
    assert {row["b"] for row in pairs.data} == {"1", "3"}


def test_a_sampling_strategy_that_would_mix_the_tasks(tmp_path):
    with pytest.raises(ValueError, match="would mix the two tasks"):
        PreTrainingArguments(output_dir=str(tmp_path), train_sampling_strategy="random")


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(checkpoints, tmp_path):
    options = {
        "model_name_or_path": checkpoints(),
        "dataset": write_rows(tmp_path / "data.jsonl", 24),
        "output_dir": str(tmp_path / "out"),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": "5e-4",
        "logging_steps": 2,
        "save_strategy": "no",
        **QUIET,
    }

    def write(**changes):
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump({**options, **changes}))
        return str(file)

    return write


def test_a_run(config, tmp_path):
    main(["--config", config(save_strategy="steps", save_steps=2), "--from_scratch", "--max_candidate_length", "10"])
    assert CrossEncoder(str(tmp_path / "out" / "cross-encoder"), device="cpu").length_limits()[1] == 10
    assert (tmp_path / "out" / "checkpoint-2" / "cross-encoder" / "config.json").is_file()
    main(["--config", config(), "--resume_from_checkpoint", str(tmp_path / "out" / "checkpoint-2")])


def test_options(config):
    options = parse_options(["--config", config(from_scratch=True), "--max_steps", "7"])
    assert (options.training.max_steps, options.training.learning_rate) == (7, 5e-4)
    assert options.model.from_scratch
    with pytest.raises(ValueError, match="do not exist"):
        parse_options(["--config", config(num_codes=3)])
    assert parse_options(["--config", CONFIG]).model.max_context_length == 96
