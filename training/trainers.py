"""Trainers of the three encoders: sentence-transformers' trainers, hence transformers' Trainer, hence Accelerate.

They ask for no mapping: the first column of a data set is the context, the second its right candidate, any further
ones wrong candidates; a column `scores` holds a teacher's. The Bi- and the Poly-encoder learn against the other
candidates of the batch, the Cross-encoder against a sample of them (Humeau et al., arXiv:1905.01969, section 5).
"""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.base.sampler import BatchSamplers
from sentence_transformers.cross_encoder import CrossEncoderTrainer as UpstreamCrossEncoderTrainer
from torch import Tensor, nn
from transformers import PreTrainedModel, ProgressCallback, TrainerCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType, has_length

from poly_encoders import BiEncoder, CrossEncoder, PolyEncoder
from poly_encoders.modeling import PolyEncoderModel
from poly_encoders.training.adapters import add_lora, has_lora, load_trainable_state, merged_copy, trainable_state
from poly_encoders.training.arguments import (
    BiEncoderTrainingArguments,
    CrossEncoderTrainingArguments,
    PolyEncoderTrainingArguments,
)
from poly_encoders.training.callbacks import EvaluationCurve, StopOnSignal, TrainingProgress, WarmUp, replace_file
from poly_encoders.training.cards import CardOfRun, with_card_of
from poly_encoders.training.collators import ContextFirstCollator, PairCollator, row_lengths
from poly_encoders.training.data_sources import text_columns
from poly_encoders.training.losses import InBatchNegativesLoss, SampledNegativesLoss
from poly_encoders.training.running import RunTrainer
from poly_encoders.training.sampling import LengthSortedBatchSampler
from poly_encoders.training.schedules import WarmupReduceLROnPlateau
from poly_encoders.training.sharding import WholeModel, shard_by_layers

TRAINABLE = "trainable.safetensors"  # what LoRA trains, beside the merged model
CHARACTERS_PER_TOKEN = 6  # at least so many hardly ever: a text of more than that is cut for certain


class NonFiniteLossError(RuntimeError):
    """The loss, or its gradient, became NaN or infinite. `path` is the file that has the batch."""

    def __init__(self, step: int, loss: float | str, path: Path) -> None:
        super().__init__(
            f"The loss of step {step} is {loss}, so training stopped; no weights were overwritten. The batch is in "
            f"{path}. Look at its texts; if they are fine, lower learning_rate, or train with --bf16 false, and go on "
            "with --resume_from_checkpoint."
        )
        self.path = path


class PaperTrainer(RunTrainer):
    """What the three trainers share; mixed in before upstream's class."""

    model_card_callback_class = CardOfRun

    args: Any
    data_collator: Any
    lr_scheduler: Any
    model: Any
    state: Any
    loss: Any

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        loss: Any = None,
        evaluator: Any = None,
        **kwargs: Any,
    ) -> None:
        args = self.training_args_class(output_dir="tmp_trainer") if args is None else args  # type: ignore[attr-defined]
        self._options = args  # upstream sets its own only after model_init was called
        if model is not None:
            self.prepare_model(model, args)
        if train_dataset is not None:
            set_evaluation_steps(args, train_dataset)
        self._batch_sampler: Any = None
        self._batches_seen = 0  # of the present epoch
        self.signals = StopOnSignal()
        kwargs["callbacks"] = [
            _Epochs(self),
            _FiniteGradients(self),
            WarmUp(),
            EvaluationCurve(),
            self.signals,
            *(kwargs.get("callbacks") or []),
        ]
        super().__init__(model, args, train_dataset, eval_dataset, loss, evaluator, **kwargs)  # type: ignore[call-arg]
        self._whole: WholeModel | None = None
        if self.is_fsdp_enabled:  # type: ignore[attr-defined]
            shard_by_layers(self.accelerator.state.fsdp_plugin, self.model)
            self._whole = WholeModel(self.model) if args.should_save else None
        if self.pop_callback(ProgressCallback) is not None:  # type: ignore[attr-defined]  # notebooks have another
            self.add_callback(TrainingProgress())  # type: ignore[attr-defined]

    def call_model_init(self, trial: Any = None) -> Any:
        """As upstream's; a model made that way is set up like one that is given."""
        model = super().call_model_init(trial)  # type: ignore[misc]
        self.prepare_model(model, self._options)
        return model

    def prepare_model(self, model: Any, args: Any) -> None:
        """Set the model up as the options say, before the optimizer sees its parameters."""
        if args.freeze_word_embeddings:
            freeze_word_embeddings(model)
        if args.dropout is not None:
            set_dropout(model, args.dropout)
        if args.lora_rank is not None:
            targets = args.lora_targets
            names = targets if targets == "all-linear" or "," not in targets else targets.split(",")
            add_lora(model, args.lora_rank, args.lora_alpha, args.lora_dropout, names)

    # --- what goes into a step -----------------------------------------------------------------------------------

    def get_batch_sampler(self, dataset: Any, batch_size: int, drop_last: bool, **kwargs: Any) -> Any:
        """Length-sorted batches, unless the options name another sampler."""
        chosen = self.args.batch_sampler == BatchSamplers.BATCH_SAMPLER and self.args.length_sorted_batches
        if not chosen or not isinstance(dataset, Dataset):
            return super().get_batch_sampler(dataset, batch_size, drop_last, **kwargs)  # type: ignore[misc]
        most = [CHARACTERS_PER_TOKEN * tokens for tokens in self._most_tokens()]
        lengths = row_lengths(dataset.select_columns(text_columns(dataset)), most)
        kwargs["seed"] = self.args.seed
        return LengthSortedBatchSampler(dataset, lengths, batch_size=batch_size, drop_last=drop_last, **kwargs)

    def _most_tokens(self) -> tuple[int, int]:
        """Tokens kept of a context and of a candidate."""
        raise NotImplementedError

    def get_train_dataloader(self) -> Any:
        """As upstream's; the order of its batches is kept in mind, to name the rows of a bad one."""
        loader = super().get_train_dataloader()  # type: ignore[misc]
        self._batch_sampler = getattr(loader, "batch_sampler", None)
        return loader

    def length_sorted_sampler(self) -> LengthSortedBatchSampler | None:
        """The sampler of the training batches, out of what distributed training wraps it in."""
        sampler = self._batch_sampler
        while sampler is not None and not isinstance(sampler, LengthSortedBatchSampler):
            sampler = getattr(sampler, "batch_sampler", None)
        return sampler

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As upstream's, and a warm-up for `reduce_lr_on_plateau` too."""
        if self.args.lr_scheduler_type != SchedulerType.REDUCE_ON_PLATEAU:
            return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]
        if self.lr_scheduler is None:
            warmup = self.args.get_warmup_steps(num_training_steps)
            options = self.args.lr_scheduler_kwargs or {}
            self.lr_scheduler = WarmupReduceLROnPlateau(optimizer or self.optimizer, warmup, **options)  # type: ignore[attr-defined]
        return self.lr_scheduler

    def get_optimizer_cls_and_kwargs(self, args: Any, model: Any = None) -> tuple[Any, Any]:
        """Upstream's groups of parameters, for the optimizer of the options."""
        cls, options = super().get_optimizer_cls_and_kwargs(args, model)  # type: ignore[misc]
        if args.optimizer != "adamax":
            return cls, options
        kept = {name: value for name, value in options.items() if name not in ("fused", "amsgrad")}
        return torch.optim.Adamax, kept

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """As upstream's; a loss that is no number stops the run before the optimizer sees its gradients.

        Raises:
            NonFiniteLossError: it is NaN or infinite.
        """
        loss = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        self._batches_seen += 1
        if not bool(loss.isfinite()):
            raise NonFiniteLossError(self.state.global_step + 1, loss.item(), self.write_batch(inputs))
        return loss

    def write_batch(self, inputs: Any = None) -> Path:
        """Write the rows of the batch just seen, with their numbers in the data set; its texts where none is known."""
        step, data = self.state.global_step + 1, self.train_dataset  # type: ignore[attr-defined]
        found: dict[str, Any] = {"step": step}
        if self.length_sorted_sampler() is not None:  # another sampler's order need not come again
            rows: list[int] = next(itertools.islice(self._batch_sampler, self._batches_seen - 1, None), [])
            found |= {"rows": rows, "examples": [data[row] for row in rows]}
        elif inputs is not None:
            sides = {name: ids for name, ids in _flat(inputs).items() if name.endswith("input_ids")}
            decode = self.model.tokenizer.batch_decode
            found |= {name.removesuffix("_input_ids"): decode(ids, True) for name, ids in sides.items()}
        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"bad_batch_step_{step}_process_{self.args.process_index}.json"
        replace_file(path, (json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode())
        return path

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As upstream's, with the number of candidates that the loss masked, the mean of a batch."""
        if "loss" in logs and isinstance(self.loss, InBatchNegativesLoss):
            masked = self.loss.take_masked()
            logs = logs if masked is None else {**logs, "masked_duplicates": round(masked, 3)}
        super().log(logs, start_time)  # type: ignore[misc]

    # --- what stays ----------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # Upstream pickles the options beside the model; ours are JSON, and the tokenizers are the model's to save.
        if not self.args.should_save:  # upstream calls every process
            return
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        model = self.model
        if self._whole is not None and state_dict is not None:
            model = with_card_of(self._whole.with_weights(state_dict), model)
        if not has_lora(model):
            model.save_pretrained(str(folder))
        else:
            merged_copy(model).save_pretrained(str(folder))
            save_file(trainable_state(model), str(folder / TRAINABLE))
        replace_file(folder / "training_args.json", self.args.to_json_string().encode())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self._whole is not None or self.is_fsdp_enabled:  # type: ignore[attr-defined]
            raise ValueError(
                "Whole weights cannot be loaded into a sharded model, so FSDP runs cannot be resumed. Start from the "
                "checkpoint as a model (--model_name_or_path), or train without FSDP."
            )
        if not has_lora(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint)  # type: ignore[misc]
        else:
            load_trainable_state(self.model, load_file(str(Path(resume_from_checkpoint) / TRAINABLE)))


class _FiniteGradients(TrainerCallback):
    """Stops a run whose gradients are NaN or infinite though its loss is not, before they reach the weights."""

    def __init__(self, trainer: PaperTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        trainer: Any = self.trainer
        if trainer.accelerator.scaler is not None or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            return  # float16's scaler skips such steps by itself; shards have no gradients of their own to look at
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if gradients and not bool(nn.utils.get_total_norm(gradients).isfinite()):
            raise NonFiniteLossError(state.global_step + 1, "finite, but its gradients are not", trainer.write_batch())


class _Epochs(TrainerCallback):
    """Tells sampler and collator which epoch begins, and the trainer how far into it a resumed run is."""

    def __init__(self, trainer: PaperTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        trainer, epoch = self.trainer, int(state.epoch or 0)
        if (sampler := trainer.length_sorted_sampler()) is not None:
            sampler.set_epoch(epoch)
        collator = trainer.data_collator
        if isinstance(collator, PairCollator):
            collator.epoch = epoch
        if has_length(train_dataloader):
            updates = max(1, math.ceil(len(train_dataloader) / args.gradient_accumulation_steps))
            trainer._batches_seen = state.global_step % updates * args.gradient_accumulation_steps


class InBatchTrainer(PaperTrainer, SentenceTransformerTrainer):
    """Trains two-sided encoders: every other candidate of the batch is a wrong one."""

    data_collator_class = ContextFirstCollator

    def __init__(self, model: Any = None, args: Any = None, *more: Any, **kwargs: Any) -> None:
        args = self.training_args_class(output_dir="tmp_trainer") if args is None else args
        if args.gather_across_devices and args.world_size > 1:
            args.dataloader_drop_last = True  # what is gathered must be equally large everywhere
        if args.mini_batch_size is not None:
            # The last mini-batch is of one side: gradients of the other would never be averaged over the processes.
            args.ddp_find_unused_parameters = True
        super().__init__(model, args, *more, **kwargs)

    def _most_tokens(self) -> tuple[int, int]:
        return side_limit(self.model, "query"), side_limit(self.model, "document")

    def get_data_collator(self, model: Any, args: Any, processing_class: Any = None) -> ContextFirstCollator:
        return self.data_collator_class(
            preprocess_fn=model.preprocess, router_mapping=args.router_mapping, prompts=args.prompts
        )

    def get_default_loss(self, model: Any) -> nn.Module:
        return InBatchNegativesLoss(
            model,
            gather_across_devices=self.args.gather_across_devices and self.args.world_size > 1,
            mini_batch_size=self.args.mini_batch_size,
            mask_duplicates=self.args.mask_duplicates,
            distillation=self.args.make_distillation(),
        )


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
    data_collator_class = PairCollator

    def __init__(
        self, model: Any = None, args: Any = None, train_dataset: Any = None, *more: Any, **kwargs: Any
    ) -> None:
        self._pool = right_candidates(train_dataset)
        super().__init__(model, args, train_dataset, *more, **kwargs)

    def _most_tokens(self) -> tuple[int, int]:
        return self.model.length_limits()

    def get_data_collator(self, model: Any, args: Any, processing_class: Any = None) -> PairCollator:
        return self.data_collator_class(
            preprocess_fn=model.preprocess,
            router_mapping=args.router_mapping,
            prompts=args.prompts,
            pool=self._pool,
            num_negatives=args.num_negatives,
            seed=args.seed,
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As upstream's; the drawn candidates are the same in every epoch, so that validation losses compare."""
        collator = self.data_collator
        self.data_collator = replace(collator)  # in epoch 0
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = collator

    def collect_features(self, inputs: dict[str, Any]) -> tuple[Any, Tensor | None]:
        """The pairs' tokens, and the teacher's scores where there are some; texts with upstream's collator."""
        if "features" not in inputs:
            return super().collect_features(inputs)
        return inputs["features"], inputs.get("label")

    def get_default_loss(self, model: Any) -> nn.Module:
        """Cross-entropy of the right candidate's raw score among its own and `num_negatives` in all."""
        return SampledNegativesLoss(model, distillation=self.args.make_distillation())


def side_limit(model: Any, task: Literal["query", "document"]) -> int:
    """Tokens kept of a text on this side of a two-sided encoder: those of a text that is too long."""
    return model.preprocess(["a " * 5000], task=task)["input_ids"].shape[1]


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


def right_candidates(data: Any) -> list[str]:
    """The right candidate of every row, to draw wrong ones from."""
    if not isinstance(data, Dataset):
        return []
    return list(data[text_columns(data)[1]])


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


def _flat(inputs: dict[str, Any]) -> dict[str, Any]:
    return {**inputs, **inputs["features"]} if "features" in inputs else inputs
