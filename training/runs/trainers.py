"""Trainers of the three encoders: sentence-transformers' trainers, hence transformers' Trainer, hence Accelerate.

They ask for no mapping: the first column of a data set is the context, the second its positive, any further ones
negatives; a column `scores` holds a teacher's. The Bi- and the Poly-encoder learn against the other candidates of the
batch, the Cross-encoder against a sample of them (Humeau et al., arXiv:1905.01969, section 5).
"""

import copy
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from poly_encoders.saving import replace_file
from poly_encoders.training.data.checks import cells, checked_examples, text_columns
from poly_encoders.training.data.collators import ContextFirstCollator, PairCollator, row_lengths
from poly_encoders.training.data.sampling import LengthSortedBatchSampler
from poly_encoders.training.methods.lora import add_lora, has_lora, load_trainable_state, merged_copy, trainable_state
from poly_encoders.training.methods.losses import InBatchNegativesLoss, SampledNegativesLoss
from poly_encoders.training.runs.arguments import (
    BiEncoderTrainingArguments,
    CrossEncoderTrainingArguments,
    PolyEncoderTrainingArguments,
)
from poly_encoders.training.runs.callbacks import EvaluationCurve, StopOnSignal, TrainingProgress, WarmUp
from poly_encoders.training.runs.resuming import RunTrainer
from poly_encoders.training.runs.run_cards import CardOfRun, with_card_of
from poly_encoders.training.runs.schedules import WarmupReduceLROnPlateau
from poly_encoders.training.runs.sharding import WholeModel, shard_by_layers

TRAINABLE = "trainable.safetensors"  # what LoRA trains, beside the merged model
CHARACTERS_PER_TOKEN = 6  # at least so many hardly ever: a text of more than that is cut for certain


class NonFiniteLossError(RuntimeError):
    """The loss, or its gradient, became NaN or infinite. `path` is the file that has the batch."""

    def __init__(self, step: int, loss: float | str, path: Path) -> None:
        super().__init__(
            f"The loss of step {step} is {loss}, so training stopped before that step. Its batch is in {path}. Look at "
            "the texts; if they are fine, lower learning_rate or give --bf16 false, and --resume_from_checkpoint."
        )
        self.path = path


class PaperTrainer(RunTrainer):
    """What the three trainers share; mixed in before upstream's class.

    Raises:
        ValueError: a data set that cannot be trained on (with row and column), or options that do not go together.
    """

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
        train_dataset = checked_examples(train_dataset, "the training data", keep_labels=loss is not None)
        eval_dataset = checked_examples(eval_dataset, "the evaluation data", keep_labels=loss is not None)
        self._options, self._data = args, train_dataset  # upstream sets its own only after it asked for model and more
        self._defaults = {"loss": loss is None, "data_collator": kwargs.get("data_collator") is None}
        if model is not None:
            self.prepare_model(model, args)
        if train_dataset is not None:
            set_evaluation_steps(args, train_dataset)
        self.batch_sampler: Any = None  # of training, perhaps around a length-sorted one
        self.length_sorted_sampler: LengthSortedBatchSampler | None = None
        self.batches_seen = 0  # of the present epoch
        self.signals = StopOnSignal()
        ours = [_Watch(self), WarmUp(), EvaluationCurve(), self.signals]
        kwargs["callbacks"] = [*ours, *(kwargs.get("callbacks") or [])]
        super().__init__(model, args, train_dataset, eval_dataset, loss, evaluator, **kwargs)  # type: ignore[call-arg]
        self._whole: WholeModel | None = None
        if self.is_fsdp_enabled:  # type: ignore[attr-defined]
            if args.load_best_model_at_end:
                raise ValueError("FSDP cannot load weights into shards: leave load_best_model_at_end out.")
            shard_by_layers(self.accelerator.state.fsdp_plugin, self.model)
            self._whole = WholeModel(self.model) if args.should_save else None
        if self.pop_callback(ProgressCallback) is not None:  # type: ignore[attr-defined]  # notebooks have another
            self.add_callback(TrainingProgress())  # type: ignore[attr-defined]

    def call_model_init(self, trial: Any = None) -> Any:
        """As upstream's; a model made that way is set up like one that is given."""
        model = super().call_model_init(trial)  # type: ignore[misc]
        if trial is None:
            self.prepare_model(model, self._options)
        return model

    def _hp_search_setup(self, trial: Any) -> None:
        """As upstream's, which sets a trial's options after the model is made: what follows from them is made anew."""
        super()._hp_search_setup(trial)  # type: ignore[misc]
        if trial is None:
            return
        set_evaluation_steps(self.args, self._data)
        self.prepare_model(self.model, self.args)
        if self._defaults["loss"]:
            self.loss = self.get_default_loss(self.model).to(self.args.device)  # type: ignore[attr-defined]
        if self._defaults["data_collator"]:
            self.data_collator = self.get_data_collator(self.model, self.args)  # type: ignore[attr-defined]

    def prepare_model(self, model: Any, args: Any) -> None:
        """Set the model up as the options say, before the optimizer sees its parameters."""
        if args.freeze_word_embeddings:
            freeze_word_embeddings(model)
        if args.dropout is not None:
            set_dropout(model, args.dropout)
        if args.lora_rank is not None:
            targets = args.lora_targets.split(",")
            add_lora(model, args.lora_rank, args.lora_alpha, args.lora_dropout, targets)

    # --- what goes into a step -----------------------------------------------------------------------------------

    def get_batch_sampler(self, dataset: Any, batch_size: int, drop_last: bool, **kwargs: Any) -> Any:
        """Length-sorted batches, unless the options name another sampler."""
        chosen = self.args.batch_sampler == BatchSamplers.BATCH_SAMPLER and self.args.length_sorted_batches
        if not chosen or not isinstance(dataset, Dataset):
            return super().get_batch_sampler(dataset, batch_size, drop_last, **kwargs)  # type: ignore[misc]
        lengths = row_lengths(dataset, [CHARACTERS_PER_TOKEN * tokens for tokens in self.model.length_limits()])
        kwargs["seed"] = self.args.seed
        return LengthSortedBatchSampler(dataset, lengths, batch_size=batch_size, drop_last=drop_last, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As upstream's, and a warm-up for `reduce_lr_on_plateau` too."""
        if self.args.lr_scheduler_type != SchedulerType.REDUCE_ON_PLATEAU:
            return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]
        if self.lr_scheduler is None:
            optimizer, options = optimizer or self.optimizer, self.args.lr_scheduler_kwargs or {}  # type: ignore[attr-defined]
            warmup = self.args.get_warmup_steps(num_training_steps)
            self.lr_scheduler = WarmupReduceLROnPlateau(optimizer, warmup, **options)
        return self.lr_scheduler

    def get_optimizer_cls_and_kwargs(self, args: Any, model: Any = None) -> tuple[Any, Any]:
        """Upstream's groups of parameters, for the optimizer of the options."""
        cls, options = super().get_optimizer_cls_and_kwargs(args, model)  # type: ignore[misc]
        if args.optimizer != "adamax":
            return cls, options
        return torch.optim.Adamax, {name: options[name] for name in options if name not in ("fused", "amsgrad")}

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """As upstream's; raises `NonFiniteLossError` before the optimizer sees the gradients of a loss of NaN."""
        loss = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        self.batches_seen += 1
        if not bool(loss.isfinite()):
            raise NonFiniteLossError(self.state.global_step + 1, loss.item(), self.write_batch(inputs))
        return loss

    def write_batch(self, inputs: Any = None) -> Path:
        """Write the rows of the batch just seen, with their numbers in the data set; its texts where none is known."""
        step, data = self.state.global_step + 1, self.train_dataset  # type: ignore[attr-defined]
        found: dict[str, Any] = {"step": step}
        if self.length_sorted_sampler is not None:  # another sampler's order need not come again
            rows: list[int] = next(itertools.islice(self.batch_sampler, self.batches_seen - 1, None), [])
            found |= {"rows": rows, "examples": [data[row] for row in rows]}
        elif inputs is not None:
            sides = {name: ids for name, ids in (inputs | inputs.get("features", {})).items() if "input_ids" in name}
            decode = self.model.tokenizer.batch_decode
            found |= {name.removesuffix("_input_ids"): decode(ids, True) for name, ids in sides.items()}
        path = Path(self.args.output_dir, f"bad_batch_step_{step}_process_{self.args.process_index}.json")
        replace_file(path, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
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
        folder, model = Path(self.args.output_dir if output_dir is None else output_dir), self.model
        if self._whole is not None and state_dict is not None:
            model = with_card_of(self._whole.with_weights(state_dict), model)
        if not has_lora(model):
            model.save_pretrained(str(folder))
        else:
            merged_copy(model).save_pretrained(str(folder))
            save_file(trainable_state(model), str(folder / TRAINABLE))
        replace_file(folder / "training_args.json", self.args.to_json_string())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:  # type: ignore[attr-defined]
            raise ValueError("FSDP runs cannot be resumed: give the checkpoint as a model, by --model_name_or_path.")
        model = getattr(self.model, "_orig_mod", self.model)  # out of what torch.compile makes of it
        if has_lora(model):
            load_trainable_state(model, load_file(str(Path(resume_from_checkpoint, TRAINABLE))))
            return
        # Upstream's would take the class of a pooling of ours, saved beside the weights, for a stranger's code.
        trust = {"trust_remote_code": model.trust_remote_code}
        saved = type(model)(resume_from_checkpoint, device="cpu", local_files_only=True, **trust)
        model.load_state_dict(saved.state_dict())

    def _load_best_model(self) -> None:
        # Upstream's logs an error where it fails, and the last weights would be saved as the best.
        best = self.state.best_model_checkpoint
        self.model.model_card_data.set_best_model_step(int(best.rsplit("-", 1)[-1]))
        self._load_from_checkpoint(best)


class _Watch(TrainerCallback):
    """Tells sampler and collator which epoch begins; stops a run whose gradients alone are NaN or infinite."""

    def __init__(self, trainer: PaperTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        trainer, epoch = self.trainer, int(state.epoch or 0)
        trainer.batch_sampler = sampler = getattr(train_dataloader, "batch_sampler", None)
        while sampler is not None and not isinstance(sampler, LengthSortedBatchSampler):
            sampler = getattr(sampler, "batch_sampler", None)  # out of what distributed training wraps it in
        trainer.length_sorted_sampler = sampler
        if sampler is not None:
            sampler.set_epoch(epoch)
        if isinstance(trainer.data_collator, PairCollator):
            trainer.data_collator.epoch = epoch
        if has_length(train_dataloader):  # a resumed run is somewhere in the epoch
            updates = max(1, math.ceil(len(train_dataloader) / args.gradient_accumulation_steps))
            trainer.batches_seen = state.global_step % updates * args.gradient_accumulation_steps

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        trainer: Any = self.trainer
        if trainer.accelerator.scaler is not None or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            return  # float16's scaler skips such steps by itself; shards have no gradients of their own to look at
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if gradients and not bool(nn.utils.get_total_norm(gradients).isfinite()):
            raise NonFiniteLossError(state.global_step + 1, "finite, but its gradients are not", trainer.write_batch())


class InBatchTrainer(PaperTrainer, SentenceTransformerTrainer):
    """Trains two-sided encoders: every other candidate of the batch is a negative."""

    data_collator_class = ContextFirstCollator

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

    def get_optimizer_cls_and_kwargs(self, args: Any, model: Any = None) -> tuple[Any, Any]:
        """As the other trainers', with a learning rate of the codes' own unless the options give them one."""
        rates = args.learning_rate_mapping
        has_codes = any(isinstance(part, PolyEncoderModel) and hasattr(part, "codes") for part in self.model.modules())
        if has_codes and not any("codes" in pattern for pattern in rates):
            args = copy.copy(args)
            args.learning_rate_mapping = {**rates, r"\bcodes$": args.learning_rate * args.code_learning_rate_factor}
        return super().get_optimizer_cls_and_kwargs(args, model)


class CrossEncoderTrainer(PaperTrainer, UpstreamCrossEncoderTrainer):
    """Trains a `CrossEncoder`; parameters as for upstream's. Each context is read with a sample of negatives."""

    model_class = CrossEncoder
    training_args_class = CrossEncoderTrainingArguments
    data_collator_class = PairCollator

    def get_data_collator(self, model: Any, args: Any, processing_class: Any = None) -> PairCollator:
        data = self._data
        return self.data_collator_class(
            preprocess_fn=model.preprocess,
            router_mapping=args.router_mapping,
            prompts=args.prompts,
            pool=list(cells(data, text_columns(data)[1])) if isinstance(data, Dataset) else [],
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
        """Cross-entropy of the positive's raw score among its own and `num_negatives` in all."""
        return SampledNegativesLoss(model, distillation=self.args.make_distillation())


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
