"""Pre-training on dialogue: masked language modelling and next-utterance prediction, a batch of each in turn.

Humeau et al., arXiv:1905.01969, section 4.1: both tasks read a context and a response, each with its special tokens
and its segment. Next-utterance prediction tells the positive from a response drawn from the data, half of the time. It
is learnt by a Cross-encoder that shares its encoder with the masked language model, so that its score is kept whole.
"""

import random
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    ProgressCallback,
    Trainer,
    TrainingArguments,
)
from transformers.utils import ModelOutput

from poly_encoders import CrossEncoder
from poly_encoders.saving import replace_file, staged_folder
from poly_encoders.training.data.checks import cells, checked_examples, text_columns
from poly_encoders.training.runs.arguments import RunArguments, option
from poly_encoders.training.runs.callbacks import StopOnSignal, TrainingProgress
from poly_encoders.training.runs.preparing import freeze_word_embeddings, set_dropout
from poly_encoders.training.runs.pretrained_cards import write_card
from poly_encoders.training.runs.resuming import RunTrainer

CROSS_ENCODER_FOLDER = "cross-encoder"  # where a pre-trained folder keeps its Cross-encoder
_MEASURES = ("mlm_loss", "nup_loss", "nup_accuracy")


@dataclass
class PreTrainingArguments(RunArguments, TrainingArguments):
    """Options of `PreTrainer`: `TrainingArguments` and these."""

    freeze_word_embeddings: bool = option(False, "Keep the word embeddings as they are.")
    dropout: float | None = option(None, "Of the encoder's dropout modules; as the checkpoint says when left out.")
    mlm_probability: float = option(0.15, "Share of the tokens to predict.")
    ddp_find_unused_parameters: bool | None = option(True, "Must be on: a batch trains one task's head alone.")
    train_sampling_strategy: str = option("sequential", "Must stay 'sequential': the data set shuffles itself.")
    remove_unused_columns: bool = option(False, "Must stay off: the collator reads texts.")

    def __post_init__(self) -> None:
        if self.train_sampling_strategy != "sequential":
            raise ValueError(
                f"train_sampling_strategy={self.train_sampling_strategy!r} would mix the two tasks in a batch. Leave "
                "it out: the examples come in a new random order every epoch."
            )
        super().__post_init__()


@dataclass
class PreTrainingOutput(ModelOutput):
    loss: Tensor | None = None  # scalar
    scores: Tensor | None = None  # (batch,) float32, next-utterance prediction only


class PreTrainingModel(nn.Module):
    """A masked language model and a Cross-encoder, whose score is that of the next utterance, on the latter's encoder.

    Raises:
        ValueError: a tokenizer without a mask token, or with more tokens than the model has embeddings.
    """

    def __init__(self, masked_lm: PreTrainedModel, cross_encoder: CrossEncoder) -> None:
        super().__init__()
        tokenizer, known = cross_encoder.tokenizer, masked_lm.get_input_embeddings().num_embeddings
        if tokenizer.mask_token is None or len(tokenizer) > known:
            raise ValueError(
                f"The model has embeddings of {known} tokens, and its tokenizer {len(tokenizer)} tokens, with the mask "
                f"token {tokenizer.mask_token}. Give both of one masked language model."
            )
        # The Cross-encoder's has all that a pre-trained encoder has; a masked language model's may lack the pooler.
        setattr(masked_lm, masked_lm.base_model_prefix, cross_encoder[0].model.base_model)
        masked_lm.tie_weights()
        self.masked_lm = masked_lm
        self.cross_encoder = cross_encoder

    @classmethod
    def from_checkpoint(cls, path: str, from_scratch: bool = False, **options: Any) -> "PreTrainingModel":
        """Go on from a checkpoint, or start anew from its configuration and tokenizer.

        Args:
            path: A folder or a Hub id.
            from_scratch: Random weights; those at `path`, if there are any, are not read.
            **options: `CrossEncoder`'s, such as `max_context_length`.

        Raises:
            ValueError: a model without a masked language model or a classifier, or as the class says.
        """
        config = AutoConfig.from_pretrained(path, num_labels=1)
        mappings = (MODEL_FOR_MASKED_LM_MAPPING, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING)
        if config.is_encoder_decoder or any(type(config) not in mapping for mapping in mappings):
            raise ValueError(
                f"{path} is of the type {config.model_type}, which is no encoder with both a masked language model and "
                "a sequence classifier. Pre-train an encoder such as BERT, RoBERTa or ModernBERT."
            )
        if not from_scratch:
            return cls(AutoModelForMaskedLM.from_pretrained(path), CrossEncoder(path, **options))
        with TemporaryDirectory() as folder:
            AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
            AutoTokenizer.from_pretrained(path).save_pretrained(folder)
            cross_encoder = CrossEncoder(folder, local_files_only=True, **options)
        return cls(AutoModelForMaskedLM.from_config(config), cross_encoder)

    def forward(
        self, input_ids: Any, attention_mask: Any, token_type_ids: Any = None, labels: Any = None, is_next: Any = None
    ) -> PreTrainingOutput:
        """The loss of one task; a ValueError where both have targets, or neither.

        Args:
            input_ids, attention_mask, token_type_ids: `(batch, length)` int64, of pairs.
            labels: `(batch, length)` int64, for masked language modelling: the tokens to predict, -100 elsewhere.
            is_next: `(batch,)` float, for next-utterance prediction: 1 where the response is the positive, else 0.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        if labels is not None and is_next is None:
            chosen = labels != -100
            logits = self._token_logits(inputs, chosen)
            # Not the mean of cross_entropy, which is NaN for a small batch without a single masked token.
            loss = cross_entropy(logits, labels[chosen], reduction="sum") / chosen.sum().clamp(min=1)
            return PreTrainingOutput(loss=loss)
        if is_next is not None and labels is None:
            scores = self.cross_encoder[0].model(**inputs).logits[:, 0].float()
            return PreTrainingOutput(loss=binary_cross_entropy_with_logits(scores, is_next), scores=scores)
        raise ValueError("A batch is for one task: pass labels (masked tokens) or is_next (next utterance).")

    def _token_logits(self, inputs: dict[str, Tensor], chosen: Tensor) -> Tensor:
        """Logits of the chosen tokens, `(chosen, vocabulary)` float32.

        The others never reach the layer as wide as the vocabulary, which would cost as much as a small encoder.
        """
        layer = self.masked_lm.get_output_embeddings()
        hook = layer.register_forward_pre_hook(lambda module, args: (args[0][chosen],))
        try:
            logits = self.masked_lm(**inputs).logits
        finally:
            hook.remove()
        return (logits if logits.dim() == 2 else logits[chosen]).float()  # some families have a layer of their own

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Compute activations anew in the backward pass, as `PreTrainedModel` does; for the encoder of both."""
        self.masked_lm.activation_checkpointing_enable(**options)

    def save_pretrained(self, path: str | Path) -> None:
        """Write the encoder with its language model, the tokenizer, and the Cross-encoder into a folder within.

        The folder starts every kind of model, `cross-encoder` in it a Cross-encoder that already ranks.
        """
        with staged_folder(path) as staging:
            self.masked_lm.save_pretrained(staging)
            self.cross_encoder.tokenizer.save_pretrained(staging)
            self.cross_encoder.save_pretrained(str(Path(staging, CROSS_ENCODER_FOLDER)))

    def load_weights(self, path: str | Path) -> None:
        """Take over the weights that `save_pretrained` wrote; a FileNotFoundError where there are none."""
        folder = Path(path, CROSS_ENCODER_FOLDER)
        if not folder.is_dir():
            raise FileNotFoundError(f"{path} holds no pre-training checkpoint: it has no {CROSS_ENCODER_FOLDER}.")
        for model, saved in ((self.masked_lm, Path(path)), (self.cross_encoder[0].model, folder)):
            # The language model read alone may lack the pooler, which comes with the Cross-encoder.
            model.load_state_dict(type(model).from_pretrained(saved).state_dict(), strict=model is not self.masked_lm)


class PreTrainingPairs(torch.utils.data.Dataset):
    """Contexts and responses in a new random order every epoch, the tasks taking turns from update to update.

    All draws follow from the seed, the epoch and the position alone: a resumed run sees what an unbroken one sees, with
    any number of workers.

    Args:
        data: The first column holds contexts in any form, the second responses.
        update_size: Examples in an update, those of all processes and accumulated batches together. An epoch is a whole
            number of updates, the last one filled up from its start.
        seed: Of all draws.

    Raises:
        ValueError: data that cannot be read, or fewer than two different responses.
    """

    def __init__(self, data: Dataset, update_size: int, seed: int) -> None:
        self.data = checked_examples(data, "the training data")
        self.update_size = update_size
        self.seed = seed
        self.context_column, self.response_column = text_columns(self.data)[:2]
        responses = cells(self.data, self.response_column)
        first = next(responses)
        if all(response == first for response in responses):
            raise ValueError(
                f"Every response is {first!r:.80}, and none can be drawn. Give at least two different ones."
            )
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the order of an epoch; the data loader calls this."""
        self.epoch = epoch
        generator = torch.Generator().manual_seed(random.Random(f"{self.seed}-{epoch}").getrandbits(63))
        self.order = torch.randperm(len(self.data), generator=generator)

    def __len__(self) -> int:
        return -(-len(self.data) // self.update_size) * self.update_size

    def __getitem__(self, position: int) -> dict[str, Any]:
        """`context`, `response`, `is_next` (whether it is the positive; `None` for masking) and a `seed`."""
        draw = random.Random(f"{self.seed}-{self.epoch}-{position}")
        update = (self.epoch * len(self) + position) // self.update_size
        row = self.data[int(self.order[position % len(self.data)])]
        response = positive = row[self.response_column]
        is_next = None if update % 2 == 0 else draw.random() < 0.5
        while is_next is False and response == positive:
            response = self.data[draw.randrange(len(self.data))][self.response_column]
        return {
            "context": row[self.context_column],
            "response": response,
            "is_next": is_next,
            "seed": draw.getrandbits(63),
        }


class PreTrainingCollator:
    """Examples of `PreTrainingPairs` to the inputs of `PreTrainingModel`, cut and joined as the Cross-encoder does.

    Args:
        cross_encoder: Whose tokens they become.
        mlm_probability: Share of the tokens to predict; 80 % of them are masked, 10 % replaced, 10 % left (Devlin et
            al., arXiv:1810.04805).
    """

    def __init__(self, cross_encoder: CrossEncoder, mlm_probability: float = 0.15) -> None:
        self.preprocess = cross_encoder.preprocess
        self.special_ids = torch.tensor(cross_encoder.tokenizer.all_special_ids)
        self.masking = DataCollatorForLanguageModeling(cross_encoder.tokenizer, mlm_probability=mlm_probability)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Token features, `(batch, length)` int64, with `labels` of that shape or `is_next`, `(batch,)` float32.

        Raises:
            ValueError: rows of both tasks.
        """
        is_next = [row["is_next"] for row in rows]
        if len({answer is None for answer in is_next}) > 1:
            raise ValueError(
                "A batch mixes the two tasks: it is not of the size that the data set was made for. Set "
                "per_device_train_batch_size yourself and leave auto_find_batch_size off."
            )
        features = self.preprocess([(row["context"], row["response"]) for row in rows])
        del features["modality"]
        if is_next[0] is not None:
            return {**features, "is_next": torch.tensor(is_next, dtype=torch.float32)}
        self.masking.generator = torch.Generator().manual_seed(rows[0]["seed"])
        special = torch.isin(features["input_ids"], self.special_ids)
        ids, labels = self.masking.torch_mask_tokens(features["input_ids"], special_tokens_mask=special)
        return {**features, "input_ids": ids, "labels": labels}


class PreTrainer(RunTrainer, Trainer):
    """Pre-trains a `PreTrainingModel`; logs the losses of both tasks and how often the next utterance is told right.

    Args:
        model: What to train.
        args: Options.
        train_dataset: Contexts in the first column, responses in the second.
        **kwargs: Further parameters of `transformers.Trainer`.
    """

    nested_models = (CROSS_ENCODER_FOLDER,)

    def __init__(self, model: PreTrainingModel, args: Any, train_dataset: Dataset, **kwargs: Any) -> None:
        if args.freeze_word_embeddings:
            freeze_word_embeddings(model)
        if args.dropout is not None:
            set_dropout(model, args.dropout)
        update_size = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        kwargs["train_dataset"] = PreTrainingPairs(train_dataset, update_size, args.seed)
        kwargs["data_collator"] = PreTrainingCollator(model.cross_encoder, args.mlm_probability)
        self.signals = StopOnSignal()
        super().__init__(model=model, args=args, **kwargs)
        self.add_callback(self.signals)
        if self.pop_callback(ProgressCallback) is not None:  # notebooks have another
            self.add_callback(TrainingProgress())
        # Since the last log, for each of _MEASURES: the sum over batches, and how many there were.
        self._sums = torch.zeros(len(_MEASURES), 2, device=args.device)

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **options: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **options)
        if outputs.scores is None:
            task, measured = slice(0, 1), loss.detach()
        else:
            accuracy = ((outputs.scores > 0) == (inputs["is_next"] > 0.5)).float().mean()
            task, measured = slice(1, 3), torch.stack([loss.detach(), accuracy])
        self._sums[task, 0] += measured
        self._sums[task, 1] += 1
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As upstream's, with `mlm_loss`, `nup_loss` and `nup_accuracy` since the last log, over all processes."""
        if "loss" in logs:
            sums = self.accelerator.reduce(self._sums, reduction="sum").tolist()
            self._sums = torch.zeros_like(self._sums)
            logs |= {name: total / count for name, (total, count) in zip(_MEASURES, sums, strict=True) if count}
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # Upstream writes the weights of both tasks under one name and pickles the options; ours are models and JSON.
        if self.args.should_save:
            folder = Path(self.args.output_dir if output_dir is None else output_dir)
            self.model.save_pretrained(folder)
            replace_file(folder / "training_args.json", self.args.to_json_string())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.model.load_weights(resume_from_checkpoint)

    def create_model_card(self, language: Any = None, license: Any = None, tags: Any = None, **_: Any) -> None:  # noqa: A002
        """Write a card into the output folder that says what the encoder is and how to go on from it."""
        if self.is_world_process_zero():
            base, folder = self.model.masked_lm.config.name_or_path, self.args.output_dir
            write_card(folder, self.hub_model_id, base, CROSS_ENCODER_FOLDER, language, license, tags)
