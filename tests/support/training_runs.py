"""Trainers of tiny models on tiny data, and the options of quiet runs on the CPU."""

import json
from pathlib import Path

import torch

from poly_encoders import BiEncoder, CrossEncoder, PolyEncoder
from poly_encoders.training.runs.arguments import (
    BiEncoderTrainingArguments,
    CrossEncoderTrainingArguments,
    PolyEncoderTrainingArguments,
)
from poly_encoders.training.runs.trainers import BiEncoderTrainer, CrossEncoderTrainer, PolyEncoderTrainer

KINDS = {
    "poly": (PolyEncoder, PolyEncoderTrainer, PolyEncoderTrainingArguments),
    "bi": (BiEncoder, BiEncoderTrainer, BiEncoderTrainingArguments),
    "cross": (CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments),
}
QUIET = {"report_to": "none", "bf16": False, "use_cpu": True, "disable_tqdm": True}


def make_model(kind, checkpoint, **options):
    """A model of a kind, the same every time; a Poly-encoder has 4 codes."""
    torch.manual_seed(0)
    codes = {"num_codes": 4} if kind == "poly" else {}
    return KINDS[kind][0](checkpoint, device="cpu", **{**codes, **options})


def make_trainer(kind, checkpoint, folder, data, model_options=None, eval_dataset=None, **options):
    """A trainer of two steps that saves nothing, unless told otherwise."""
    settings = {"max_steps": 2, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "save_strategy": "no"}
    settings |= {"output_dir": str(folder), "dropout": 0.0, **QUIET, **options}
    model = make_model(kind, checkpoint, **(model_options or {}))
    args = KINDS[kind][2](**settings)
    return KINDS[kind][1](model=model, args=args, train_dataset=data, eval_dataset=eval_dataset)


def write_rows(path: Path, number: int) -> str:
    """A file of so many examples, with contexts of several turns and lengths; its name."""
    rows = [{"context": [f"what is {i}", "well" * (1 + i % 7)], "reply": f"it is {i}"} for i in range(number)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def weights(model):
    """Copies of all parameters by name."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same_weights(found, expected):
    """To the last bit."""
    found, expected = weights(found), weights(expected)
    assert found.keys() == expected.keys()
    assert not [name for name, value in expected.items() if not torch.equal(found[name], value)]


def gradients(model, loss):
    """By the names of parameters, the gradients of a loss, of which some are not 0."""
    model.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert any(gradient.abs().sum() > 0 for gradient in found.values())
    return found


def logged(trainer, name):
    """The values that a trainer has logged under a name."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]
