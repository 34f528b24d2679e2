"""What a trainer does to options and model before a run."""

import math
from typing import Any

from datasets import Dataset, DatasetDict
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import IntervalStrategy, SaveStrategy


def set_evaluation_steps(args: Any, data: Any) -> None:
    """Turn `evaluations_per_epoch` into steps, for evaluating and for saving."""
    if args.evaluations_per_epoch is None:
        return
    if not isinstance(data, Dataset | DatasetDict):
        raise ValueError("evaluations_per_epoch needs a data set of known length; give eval_steps for a streamed one.")
    rows = len(data) if isinstance(data, Dataset) else sum(data.num_rows.values())
    batches = rows / (args.train_batch_size * args.world_size)
    batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    steps = max(1, round(batches / args.gradient_accumulation_steps / args.evaluations_per_epoch))
    args.eval_strategy, args.eval_steps = IntervalStrategy.STEPS, steps
    if args.save_strategy in (SaveStrategy.STEPS, SaveStrategy.EPOCH):
        args.save_strategy, args.save_steps = SaveStrategy.STEPS, steps


def set_dropout(model: nn.Module, probability: float) -> None:
    """Give every dropout module in `model` this probability; a ValueError where it is none."""
    if not 0.0 <= probability < 1.0:
        raise ValueError(f"dropout must be at least 0 and below 1, got {probability}.")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability


def freeze_word_embeddings(model: nn.Module) -> None:
    """Take the word embeddings of every backbone in `model` out of training."""
    for backbone in [module for module in model.modules() if isinstance(module, PreTrainedModel)]:
        if (embeddings := backbone.get_input_embeddings()) is not None:
            embeddings.requires_grad_(False)
