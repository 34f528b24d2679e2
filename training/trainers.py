"""Trainers of the three encoders: sentence-transformers' trainers, hence transformers' Trainer, hence Accelerate.

They ask for no mapping: the first column of a data set is the context, the second its right candidate, any further
ones wrong candidates. The Bi- and the Poly-encoder learn against the other candidates of the batch, the Cross-encoder
against a sample of them (Humeau et al., arXiv:1905.01969, section 5).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.cross_encoder import CrossEncoderTrainer as UpstreamCrossEncoderTrainer
from sentence_transformers.cross_encoder.losses import MultipleNegativesRankingLoss as PairwiseNegativesLoss
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from torch import nn
from transformers import PreTrainedModel

from poly_encoders import BiEncoder, CrossEncoder, PolyEncoder
from poly_encoders.modeling import PolyEncoderModel
from poly_encoders.training.arguments import (
    BiEncoderTrainingArguments,
    CrossEncoderTrainingArguments,
    PolyEncoderTrainingArguments,
)
from poly_encoders.training.losses import InBatchNegativesLoss


@dataclass
class ContextFirstCollator(SentenceTransformerDataCollator):
    """Tokenizes the first column as contexts and the others as candidates."""

    def _get_task_for_column(self, column_name: str, column_position: int, router_mapping: dict[str, str]) -> str:
        return router_mapping.get(column_name) or ("query" if column_position == 0 else "document")


class PaperTrainer:
    """What the three trainers share; mixed in before upstream's class."""

    def __init__(self, model: Any = None, args: Any = None, **kwargs: Any) -> None:
        args = self.training_args_class(output_dir="tmp_trainer") if args is None else args  # type: ignore[attr-defined]
        if model is not None:
            self.prepare_model(model, args)
        super().__init__(model=model, args=args, **kwargs)  # type: ignore[call-arg]

    def prepare_model(self, model: Any, args: Any) -> None:
        """Set the model up as the options say, before the optimizer sees its parameters."""
        if args.freeze_word_embeddings:
            freeze_word_embeddings(model)
        if args.dropout is not None:
            set_dropout(model, args.dropout)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # Upstream pickles the options beside the model; ours are JSON, and the tokenizers are the model's to save.
        folder = Path(self.args.output_dir if output_dir is None else output_dir)  # type: ignore[attr-defined]
        self.model.save_pretrained(str(folder))  # type: ignore[attr-defined]
        (folder / "training_args.json").write_text(self.args.to_json_string(), encoding="utf-8")  # type: ignore[attr-defined]


class InBatchTrainer(PaperTrainer, SentenceTransformerTrainer):
    """Trains two-sided encoders: every other candidate of the batch is a wrong one."""

    data_collator_class = ContextFirstCollator

    def get_data_collator(self, model: Any, args: Any, processing_class: Any = None) -> ContextFirstCollator:
        return self.data_collator_class(
            preprocess_fn=model.preprocess, router_mapping=args.router_mapping, prompts=args.prompts
        )

    def get_default_loss(self, model: Any) -> nn.Module:
        return InBatchNegativesLoss(model)


class BiEncoderTrainer(InBatchTrainer):
    """Trains a `BiEncoder`; parameters as for `SentenceTransformerTrainer`."""

    model_class = BiEncoder
    training_args_class = BiEncoderTrainingArguments


class PolyEncoderTrainer(InBatchTrainer):
    """Trains a `PolyEncoder`; parameters as for `SentenceTransformerTrainer`. The codes learn faster than the rest."""

    model_class = PolyEncoder
    training_args_class = PolyEncoderTrainingArguments

    def prepare_model(self, model: Any, args: Any) -> None:
        super().prepare_model(model, args)
        has_codes = any(isinstance(module, PolyEncoderModel) and hasattr(module, "codes") for module in model.modules())
        if has_codes and not any("codes" in pattern for pattern in args.learning_rate_mapping):
            args.learning_rate_mapping = {
                **args.learning_rate_mapping,
                r"\bcodes$": args.learning_rate * args.code_learning_rate_factor,
            }


class CrossEncoderTrainer(PaperTrainer, UpstreamCrossEncoderTrainer):
    """Trains a `CrossEncoder`; parameters as for upstream's. Each context is read with a sample of wrong candidates."""

    model_class = CrossEncoder
    training_args_class = CrossEncoderTrainingArguments

    def get_default_loss(self, model: Any) -> nn.Module:
        """Cross-entropy of the right candidate's raw score among itself and `num_negatives` of the batch."""
        return PairwiseNegativesLoss(
            model, num_negatives=self.args.num_negatives, scale=1.0, activation_fn=nn.Identity()
        )


def set_dropout(model: nn.Module, probability: float) -> None:
    """Give every dropout module in `model` this probability.

    Raises:
        ValueError: it is not within 0 and 1.
    """
    if not 0.0 <= probability < 1.0:
        raise ValueError(f"dropout must be at least 0 and below 1, got {probability}.")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability


def freeze_word_embeddings(model: nn.Module) -> None:
    """Take the word embeddings of every backbone in `model` out of training."""
    backbones = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    for backbone in backbones:
        if (embeddings := backbone.get_input_embeddings()) is not None:
            embeddings.requires_grad_(False)
