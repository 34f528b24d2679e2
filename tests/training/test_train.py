"""training/train.py: options, and whole runs as a user starts them, in one process and in two."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from datasets import Dataset

import forks
from poly_encoders import BiEncoder, CrossEncoder, PolyEncoder
from poly_encoders.training.runs.arguments import TRAINING_ARGUMENTS
from poly_encoders.training.train import build_model, build_trainer, main, make_options, parse_options
from training_runs import QUIET, write_rows

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "training" / "configs").glob("*.yaml"))


@pytest.fixture
def options(checkpoints, tmp_path):
    """A function from changes to the options of a run of two steps."""

    def made(**changes):
        return {
            "model_name_or_path": checkpoints(),
            "dataset": write_rows(tmp_path / "data.jsonl", 24),
            "eval_dataset": write_rows(tmp_path / "validation.jsonl", 8),
            "eval_set_size": 4,
            "output_dir": str(tmp_path / "out"),
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "learning_rate": "5e-4",
            "save_strategy": "no",
            **QUIET,
            **changes,
        }

    return made


@pytest.fixture
def config(options, tmp_path):
    """A function from changes to a file of those options."""

    def write(name="config.yaml", **changes):
        (tmp_path / name).write_text(yaml.safe_dump(options(**changes)))
        return str(tmp_path / name)

    return write


@pytest.mark.parametrize(
    ("architecture", "model_class", "changes"),
    [
        ("poly-encoder", PolyEncoder, {"num_codes": 3, "reduction": "first_m_mean"}),
        ("bi-encoder", BiEncoder, {"num_codes": 3, "reduction": "first_m_mean"}),
        ("cross-encoder", CrossEncoder, {"num_negatives": 2}),
    ],
)
def test_a_run_of_each(config, tmp_path, architecture, model_class, changes):
    main(["--config", config(architecture=architecture, **changes), "--max_candidate_length", "10"])
    model = model_class(str(tmp_path / "out"), device="cpu")
    assert model.length_limits()[1] == 10
    assert len(model.rank("what is 3", ["it is 3", "it is 4"])) == 2
    if architecture == "bi-encoder":
        assert model.reduction_options() == {"reduction": "first_m_mean", "num_codes": 3}
    if architecture == "poly-encoder":
        assert (model[0].config.num_codes, model[0].config.reduction) == (3, "first_m_mean")
    assert (tmp_path / "out" / "eval" / "candidate_ranking_validation.csv").is_file()


TWO_PROCESSES = """
import sys
from torch import distributed
from poly_encoders.training import pretrain, train
from poly_encoders.training.runs.resuming import end_processes, train_to_end

for config in sys.argv[1:-1]:
    trainer, states = train.run(train.parse_options(["--config", config])), [None, None]
    learnt = {**trainer.loss.own_state(), **trainer.model.state_dict()}
    distributed.all_gather_object(states, {name: value.double().sum().item() for name, value in learnt.items()})
    assert states[0] == states[1]
train_to_end(pretrain.build_trainer(pretrain.parse_options(["--config", sys.argv[-1]])))
end_processes()
"""


def test_two_processes(config, options, tmp_path):
    """Distributed training refuses uneven sides and parameters without a gradient, as pre-training's heads in turn."""
    common = {"ddp_backend": "gloo", "save_strategy": "steps", "save_steps": 1, "logging_steps": 1}
    learnt = {**common, "learn_logit_scale": True, "learn_final_temperature": True, "share_encoders": False}
    frozen = {**common, "learn_logit_scale": True, "freeze_candidate_encoder": True, "num_index_negatives": 3}
    folders = [tmp_path / name for name in ("plain", "gathered", "frozen", "pretrained")]
    configs = [
        config("plain.yaml", output_dir=str(folders[0]), architecture="bi-encoder", **common),
        config("all.yaml", output_dir=str(folders[1]), gather_across_devices=True, mini_batch_size=2, **learnt),
        config("frozen.yaml", output_dir=str(folders[2]), gather_across_devices=True, **frozen),
    ]
    known = {name: value for name, value in options(**common).items() if not name.startswith("eval_")}
    (tmp_path / "pre.yaml").write_text(yaml.safe_dump({**known, "output_dir": str(folders[3])}))
    forks.run(["-c", TWO_PROCESSES, *configs, tmp_path / "pre.yaml"], ranks=2)
    for folder, kind in zip(folders, (BiEncoder, *[PolyEncoder] * 3), strict=True):
        assert len(kind(str(folder), device="cpu").rank("a", ["b"])) == 1
        random_states = {file.name for file in (folder / "checkpoint-1").glob("rng_state*")}
        assert random_states == {"rng_state_0.pth", "rng_state_1.pth"}
    history = json.loads((folders[3] / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert [{"mlm_loss", "nup_loss"} & entry.keys() for entry in history] == [{"mlm_loss"}, {"nup_loss"}]
    assert CrossEncoder(str(folders[3] / "cross-encoder"), device="cpu").rank("a", ["b"])


@pytest.mark.slow
def test_accelerate_launch(config, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file"]
    script = [ROOT / "training" / "accelerate" / "cpu_2_processes.yaml", "training/train.py"]
    command = [*launch, *script, "--config", config(ddp_backend="gloo", num_codes=3)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert PolyEncoder(str(tmp_path / "out"), device="cpu")[0].config.num_codes == 3


# --- evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["a file", "a saved data set"])
def test_nothing_is_evaluated_where_no_evaluation_data_are_given(options, tmp_path, caplog, kind):
    """All training rows were ranked at the end, for longer than it had trained."""
    source = write_rows(tmp_path / "data.jsonl", 24)
    if kind == "a saved data set":
        Dataset.from_json(source).save_to_disk(tmp_path / "saved")
        source = str(tmp_path / "saved")
    with caplog.at_level(logging.INFO):
        trainer = build_trainer(make_options(options(dataset=source, eval_dataset=None, eval_strategy="no")))
    assert (trainer.evaluator, trainer.eval_dataset) == (None, None)
    assert not trainer.model.model_card_data.eval_datasets
    assert "--eval_dataset" in caplog.text
    with pytest.raises(ValueError, match="eval_strategy"):
        build_trainer(make_options(options(dataset=source, eval_dataset=None, eval_strategy="steps")))


def test_evaluation_data_are_those_that_were_named(options, tmp_path):
    trainer = build_trainer(make_options(options(max_eval_sets=5, max_eval_examples=3)))
    assert (len(trainer.train_dataset), len(trainer.eval_dataset), len(trainer.evaluator.samples)) == (24, 3, 5)
    splits = {
        name: Dataset.from_json(write_rows(tmp_path / f"{name}.jsonl", n)) for name, n in (("train", 9), ("b", 6))
    }
    for name, split in splits.items():
        split.save_to_disk(tmp_path / "both" / name)
    (tmp_path / "both" / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
    changes = {"dataset": str(tmp_path / "both"), "eval_dataset": None, "eval_split": "b", "max_eval_examples": 0}
    trainer = build_trainer(make_options(options(**changes)))
    assert (len(trainer.train_dataset), trainer.eval_dataset, len(trainer.evaluator.samples)) == (9, None, 6)
    trainer = build_trainer(make_options(options(eval_split=None)))
    assert (trainer.evaluator, trainer.eval_dataset) == (None, None)


def test_nothing_is_trained_when_the_data_are_bad(config, tmp_path):
    empty, bad = tmp_path / "empty.jsonl", tmp_path / "bad.jsonl"
    empty.write_text("")
    bad.write_text('{"context": "a", "right": "b"}\n{"context": "c", "right"\n')
    with pytest.raises(ValueError, match="eval_split null"):
        main(["--config", config(eval_dataset=str(empty))])
    with pytest.raises(ValueError, match="Line 2"):
        main(["--config", config(dataset=str(bad))])
    assert not (tmp_path / "out").exists()


# --- options ---------------------------------------------------------------------------------------------------------


def test_the_command_line_comes_before_files_and_later_files_before_earlier_ones(config, tmp_path):
    (tmp_path / "other.yaml").write_text("num_codes: 9\nmax_steps: 3\n")
    options = parse_options(["--config", config(num_codes=5), str(tmp_path / "other.yaml"), "--max_steps", "7"])
    assert (options.model.num_codes, options.training.max_steps) == (9, 7)
    assert options.training.learning_rate == 5e-4
    assert options.training.per_device_train_batch_size == 4


def test_resuming_needs_no_name(config):
    for words, expected in (([], None), ([""], "last"), (["x/checkpoint-3"], "x/checkpoint-3")):
        given = ["--resume_from_checkpoint", *filter(None, words)] if words else []
        assert parse_options(["--config", config(), *given]).training.resume_from_checkpoint == expected


def test_options_that_do_not_exist(config):
    with pytest.raises(ValueError, match=r"\['num_code'\]"):
        parse_options(["--config", config(num_code=3)])
    with pytest.raises(ValueError, match="num_negatives"):
        parse_options(
            ["--config", config(architecture="cross-encoder", num_negatives=2), "--architecture", "bi-encoder"]
        )
    with pytest.raises(ValueError, match="architecture"):
        parse_options(["--config", config(architecture="tri-encoder")])
    with pytest.raises(FileNotFoundError, match="no config file"):
        parse_options(["--config", "nowhere.yaml"])


@pytest.mark.parametrize(
    "file", [file for file in CONFIGS if not file.stem.endswith(("_pretrain", "_distill"))], ids=lambda file: file.stem
)
def test_every_config_parses(file):
    options = parse_options(["--config", str(file)])
    assert isinstance(options.training, TRAINING_ARGUMENTS[options.model.architecture])
    assert options.model.turn_separator is None


@pytest.mark.parametrize(
    ("architecture", "task", "expected"),
    [
        ("bi", "convai2", (512, 100, 10)),
        ("poly", "dstc7", (256, 100, 8)),
        ("cross", "ubuntu_v2", (16, 1000, 12)),
    ],
)
def test_the_paper_s_settings(architecture, task, expected, checkpoints):
    files = [str(ROOT / "training" / "configs" / f"{name}.yaml") for name in (f"paper_{architecture}", task)]
    model, data, training = parse_options(["--config", *files, "--model_name_or_path", checkpoints()])
    assert data.dataset == task.replace("_", "-")
    assert (model.max_context_length, model.max_candidate_length, model.max_turns) == (360, 72, 20)
    assert (training.train_batch_size, training.warmup_steps, training.num_train_epochs) == expected
    assert (training.optimizer, training.learning_rate, training.weight_decay) == ("adamax", 5e-5, 0.01)
    assert training.lr_scheduler_type == "reduce_lr_on_plateau"
    assert training.lr_scheduler_kwargs == {"factor": 0.4, "patience": 0}
    assert (training.evaluations_per_epoch, training.freeze_word_embeddings) == (2, True)
    if architecture == "poly":
        model.max_context_length = model.max_candidate_length = 40  # as much as the tiny encoder reads
        built = build_model(model)[0].config
        assert (built.reduction, training.code_learning_rate_factor) == ("mean", 1.0)
        assert (built.context_vectors, built.num_codes, built.share_encoders) == ("learnt_codes", 64, False)
        assert (built.normalize, built.final_temperature, training.logit_scale) == (False, 1.0, 1.0)
    if architecture == "bi":
        model.max_context_length = model.max_candidate_length = 40
        built = build_model(model)
        assert (built.similarity_fn_name, built.share_encoders, training.logit_scale) == ("dot", False, 1.0)


def test_model_options(checkpoints, sentence_transformer_folder):
    """Those that are given reach the model; the others are its own defaults."""

    def built(folder=None, **changes):
        return build_model(make_options({"model_name_or_path": folder or checkpoints(), **changes}).model)

    config, default = built()[0].config, PolyEncoder(checkpoints(), device="cpu")[0].config
    assert config.to_dict() == default.to_dict()
    assert (config.context_vectors, config.normalize, config.share_encoders) == ("turns", True, True)
    given = {"context_vectors": "turns_and_codes", "num_codes": 3, "normalize": False, "final_temperature": 0.5}
    given |= {"learn_final_temperature": True, "last_turn_share": 0.25, "learn_last_turn_share": True}
    given |= {"max_turn_length": 7, "share_encoders": False, "reduction": "first"}
    config = built(**given)[0].config
    assert {name: getattr(config, name) for name in given} == given
    for similarity, expected in ((None, "cosine"), ("cosine", "cosine"), ("dot", "dot")):
        model = built(sentence_transformer_folder, architecture="bi-encoder", similarity=similarity)
        assert (model.similarity_fn_name, model.scores_are_cosines) == (expected, expected == "cosine")


def test_two_encoders_are_built_where_one_side_stays(options):
    trainer = build_trainer(make_options(options(freeze_candidate_encoder=True)))
    assert not trainer.model[0].config.share_encoders
    with pytest.raises(ValueError, match="share_encoders=False"):
        build_trainer(make_options(options(freeze_candidate_encoder=True, share_encoders=True)))
