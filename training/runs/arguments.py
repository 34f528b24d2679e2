"""The arguments of training, as dataclasses that a YAML file or the command line fills."""

import logging
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from sentence_transformers import SentenceTransformerTrainingArguments
from sentence_transformers.cross_encoder import CrossEncoderTrainingArguments as UpstreamCrossEncoderTrainingArguments

from poly_encoders.hardware import has_fast_bf16
from poly_encoders.poly_encoder import ContextVectors
from poly_encoders.training.data.sources import DataSource
from poly_encoders.training.methods.losses import Distillation, check_scales

logger = logging.getLogger(__name__)

LAST = "last"  # the newest checkpoint, as `--resume_from_checkpoint` without a name has it

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
Architecture = Literal["poly-encoder", "bi-encoder", "cross-encoder"]


def option(default: Any, about: str, **metadata: Any) -> Any:
    """A field of an arguments dataclass, with what `--help` says of it."""
    return field(default=default, metadata={"help": about, **metadata})


@dataclass
class StartArguments:
    """What to start from, and how its texts are cut."""

    model_name_or_path: str = option(MINILM, "Where to start: a folder, a Hub id, or 'minilm', the one from PyPI.")
    max_context_length: int | None = option(None, "Tokens kept of a context, its last.")
    max_candidate_length: int | None = option(None, "Tokens kept of a candidate, its first.")
    turn_separator: str | None = option(None, "Text between the turns of a conversation.")
    max_turns: int | None = option(None, "Turns kept of a conversation, its last.")

    def text_options(self) -> dict[str, Any]:
        """What all three encoders take."""
        names = ("max_context_length", "max_candidate_length", "turn_separator", "max_turns")
        return {name: getattr(self, name) for name in names}


@dataclass
class ModelArguments(StartArguments):
    """What to train."""

    architecture: Architecture = option("poly-encoder", "Which of the paper's three encoders.")
    share_encoders: bool | None = option(None, "One encoder for both sides; as the model has it when left out.")
    reduction: Literal["first", "mean", "first_m_mean"] | None = option(
        None, "Outputs to one vector (bi; poly, candidates)."
    )
    similarity: Literal["cosine", "dot"] | None = option(None, "How two vectors make a score (bi).")
    num_codes: int | None = option(None, "m, the number of context vectors (poly); of outputs (first_m_mean).")
    context_vectors: ContextVectors | None = option(None, "Kind of context vectors (poly); one a turn when left out.")
    normalize: bool | None = option(None, "Vectors of length 1, so that scores are cosines (poly).")
    final_temperature: float | None = option(None, "Of the attention over the context vectors (poly).")
    learn_final_temperature: bool | None = option(None, "Train it (poly).")
    last_turn_share: float | None = option(None, "How much of the last turn is in each turn's vector (poly).")
    learn_last_turn_share: bool | None = option(None, "Train it (poly).")
    code_std: float | None = option(None, "Standard deviation of new codes (poly).")
    max_turn_length: int | None = option(None, "Tokens of a turn that make one vector; a longer one is split (poly).")

    def poly_options(self) -> dict[str, Any]:
        """What a Poly-encoder takes beyond what others do, where it is given."""
        names = ("num_codes", "context_vectors", "normalize", "final_temperature", "last_turn_share")
        fields = ("learn_final_temperature", "learn_last_turn_share", "code_std", "max_turn_length")
        config = {name: getattr(self, name) for name in fields if getattr(self, name) is not None}
        return {**{name: getattr(self, name) for name in names}, "config_kwargs": config}


@dataclass
class SourceArguments:
    """What to train on."""

    dataset: str = option("chitchat", "'chitchat', a task of the paper, a file, a saved data set or a Hub id.")
    dataset_config: str | None = option(None, "Configuration of the Hub data set.")
    data_dir: str | None = option(None, "Folder with the files of one of the paper's tasks.")
    columns: list[str] | None = option(None, "Context, positive, negatives. All columns in order when left out.")
    train_split: str = option("train", "Split to train on.")
    max_train_examples: int | None = option(None, "A seeded sample of so many examples.")

    def train_source(self, seed: int) -> DataSource:
        """The data to train on."""
        return self._source(self.dataset, self.train_split, self.columns, self.max_train_examples, seed)

    def _source(self, name: str, split: str, columns: Any, max_examples: int | None, seed: int) -> DataSource:
        kept = getattr(self, "max_negatives", 0)  # pre-training takes none
        return DataSource(name, split, columns, self.dataset_config, self.data_dir, kept, max_examples, seed)


@dataclass
class DataArguments(SourceArguments):
    """What to train and evaluate on."""

    max_negatives: int | None = option(None, "Columns of negatives to train with, the first ones; all when left out.")
    eval_dataset: str | None = option(None, "Where to evaluate; another split of `dataset` when left out.")
    eval_columns: list[str] | None = option(None, "`columns` where evaluated; the same when left out.")
    eval_split: str | None = option("validation", "Split to evaluate on; null for none.")
    eval_set_size: int = option(20, "C, candidates in a ranking set.")
    max_eval_sets: int | None = option(2000, "A seeded sample of so many ranking sets.")
    max_eval_examples: int | None = option(2000, "The same for the validation loss, of examples; 0 for none.")

    def eval_source(self, seed: int) -> DataSource | None:
        """The data to evaluate on; `None` where there are none, which is logged where no one asked for that."""
        if self.eval_split is None:
            return None
        path = Path(self.dataset)
        if self.eval_dataset is None and (path.is_file() or (path / "state.json").is_file()):
            said = "Nothing is evaluated: %s is a single split, which is trained on. Name other data by --eval_dataset."
            logger.warning(said, path)
            return None
        name, columns = self.eval_dataset or self.dataset, self.eval_columns or self.columns
        return self._source(name, self.eval_split, columns, self.max_eval_examples or None, seed)


@dataclass
class RunArguments:
    """What every run adds to upstream's options, and where its defaults differ."""

    bf16: bool | None = option(None, "bfloat16 autocast. By default, where the hardware makes it fast.")
    resume_from_checkpoint: str | None = option(
        None,
        "Go on from this checkpoint; without a name, from output_dir's newest if it has any.",
        nargs="?",
        const=LAST,
    )
    report_to: list[str] | None = option(
        None, "Where to log, or none. By default tensorboard and trackio, which need no account, if installed."
    )

    dataloader_num_workers: int | None = option(
        None, "Processes that tokenize ahead of the step; 2 beside a GPU, and 0 on a CPU, whose cores the step needs."
    )

    hub_strategy: str = option("end", "When to push: 'end', or 'every_save' as well.")
    hub_create_pr: bool = option(False, "Push by a pull request, which needs no right to write to the repository.")

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

    freeze_word_embeddings: bool = option(True, "Keep the word embeddings as they are (Humeau et al., section 5).")
    dropout: float | None = option(None, "Of the backbones' dropout modules; as the checkpoint says when left out.")
    optimizer: Literal["adamw", "adamax"] = option("adamw", "AdamW, fused where it can be, or the paper's Adamax.")
    weight_decay: float = option(0.01, "Of all weights but biases and norms.")
    evaluations_per_epoch: float | None = option(None, "In place of eval_steps and save_steps; the paper's is 2.")
    length_sorted_batches: bool = option(True, "Batches of contexts of about one length, in random order.")
    distillation: Literal["kl", "margin_mse"] | None = option(None, "Learn from the column `scores` by this loss too.")
    distillation_weight: float = option(0.5, "The teacher's share of the loss, 0 to 1.")
    distillation_temperature: float = option(1.0, "Of both distributions, for 'kl'.")
    card_examples: bool = option(True, "Show examples of the evaluation data in the model's card.")
    card_language: list[str] | None = option(None, "The model's languages, such as en, for its card.")
    card_license: str | None = option(None, "The model's license, such as mit, for its card.")
    lora_rank: int | None = option(None, "Train LoRA matrices of this rank; all weights else.")
    lora_alpha: float | None = option(None, "Scale of LoRA; twice the rank when left out.")
    lora_dropout: float = option(0.0, "Of LoRA's inputs.")
    lora_targets: str = option("all-linear", "Modules that get LoRA: 'all-linear', or names with commas between.")
    # Each side is a forward of its own, after which the other side's parameters look unused; none is.
    ddp_find_unused_parameters: bool | None = option(False, "Look for parameters without a gradient.")

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
class InBatchArguments(PaperArguments):
    """What the trainers of the two-sided encoders add."""

    mini_batch_size: int | None = option(None, "Cache gradients, for the memory of a batch of this size.")
    gather_across_devices: bool = option(False, "Candidates of all processes are negatives, with gradients to each.")
    mask_duplicates: bool = option(True, "The positive's text, and others of its context, are no negatives.")
    logit_scale: float | None = option(None, "Factor on scores in the loss; 20 for cosines, 1 for dots when left out.")
    learn_logit_scale: bool = option(False, "Train it; it stays at or below 100.")
    scalar_learning_rate_factor: float = option(
        10.0, "The learning rate of what is learnt as one number (logit scale, temperature, share) over the rest's."
    )
    disagreement_weight: float = option(0.0, "Of the mean cosine between a context's vectors, in the loss (poly).")
    freeze_candidate_encoder: bool = option(False, "Train contexts alone, against candidate vectors that stay.")
    num_index_negatives: int = option(0, "Further ones of these that a batch is scored against; -1 for all.")

    def __post_init__(self) -> None:
        check_scales(self.logit_scale, self.learn_logit_scale, self.disagreement_weight)
        if self.num_index_negatives < -1:
            raise ValueError(f"num_index_negatives is a number of rows, or -1 for all; got {self.num_index_negatives}.")
        if self.num_index_negatives and not self.freeze_candidate_encoder:
            raise ValueError("num_index_negatives are of vectors that stay: it needs freeze_candidate_encoder.")
        super().__post_init__()
        if self.gather_across_devices and self.world_size > 1:  # type: ignore[attr-defined]
            self.dataloader_drop_last = True  # what is gathered must be equally large everywhere
        if self.mini_batch_size is not None:
            # The last mini-batch is of one side: gradients of the other would never be averaged over the processes.
            self.ddp_find_unused_parameters = True


@dataclass
class BiEncoderTrainingArguments(InBatchArguments, SentenceTransformerTrainingArguments):
    """Options of `BiEncoderTrainer`: `SentenceTransformerTrainingArguments` and the paper's."""


@dataclass
class PolyEncoderTrainingArguments(InBatchArguments, SentenceTransformerTrainingArguments):
    """Options of `PolyEncoderTrainer`: `SentenceTransformerTrainingArguments` and the paper's."""

    # The codes start near zero and are few.
    code_learning_rate_factor: float = option(30.0, "The codes' learning rate over that of the rest.")


@dataclass
class CrossEncoderTrainingArguments(PaperArguments, UpstreamCrossEncoderTrainingArguments):
    """Options of `CrossEncoderTrainer`: upstream's and the paper's."""

    num_negatives: int = option(15, "Of each context: its row's own, then some of the data's positives.")


TRAINING_ARGUMENTS: dict[str, Any] = {
    "poly-encoder": PolyEncoderTrainingArguments,
    "bi-encoder": BiEncoderTrainingArguments,
    "cross-encoder": CrossEncoderTrainingArguments,
}
