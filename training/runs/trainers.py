"""Trainers of the three encoders: sentence-transformers' trainers, hence transformers' Trainer, hence Accelerate.

They ask for no mapping: the first column of a data set is the context, the second its positive, any further ones
negatives; a column `scores` holds a teacher's. The Bi- and the Poly-encoder learn against the other candidates of the
batch, the Cross-encoder against a sample of them (Humeau et al., arXiv:1905.01969, section 5).
"""

import copy
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.base.sampler import BatchSamplers
from sentence_transformers.cross_encoder import CrossEncoderTrainer as UpstreamCrossEncoderTrainer
from torch import Tensor, nn
from transformers import ProgressCallback
from transformers.trainer_utils import SchedulerType

from poly_encoders import BiEncoder, CrossEncoder, PolyEncoder
from poly_encoders.saving import replace_file
from poly_encoders.training.data.checks import cells, checked_examples, text_columns
from poly_encoders.training.data.collators import (
    ContextFirstCollator,
    FrozenCandidatesCollator,
    PairCollator,
    row_lengths,
)
from poly_encoders.training.data.sampling import LengthSortedBatchSampler
from poly_encoders.training.methods.frozen_candidates import (
    CandidateIndex,
    FrozenCandidatesLoss,
    freeze_candidate_encoder,
    make_index,
)
from poly_encoders.training.methods.lora import add_lora, has_lora, load_trainable_state, merged_copy, trainable_state
from poly_encoders.training.methods.losses import InBatchNegativesLoss, SampledNegativesLoss
from poly_encoders.training.runs.arguments import (
    BiEncoderTrainingArguments,
    CrossEncoderTrainingArguments,
    PolyEncoderTrainingArguments,
)
from poly_encoders.training.runs.callbacks import (
    BatchWatch,
    EvaluationCurve,
    NonFiniteLossError,
    StopOnSignal,
    TrainingProgress,
    WarmUp,
)
from poly_encoders.training.runs.preparing import freeze_word_embeddings, set_dropout, set_evaluation_steps
from poly_encoders.training.runs.resuming import RunTrainer
from poly_encoders.training.runs.run_cards import CardOfRun, with_card_of
from poly_encoders.training.runs.schedules import WarmupReduceLROnPlateau
from poly_encoders.training.runs.sharding import WholeModel, shard_by_layers

TRAINABLE = "trainable.safetensors"  # what LoRA trains, beside the merged model
OF_THE_LOSS = "loss.safetensors"  # what the loss has learnt by itself
SCALARS = ("log_logit_scale", "log_temperature", "last_turn_logit")  # learnt as one number each
CHARACTERS_PER_TOKEN = 6  # at least so many hardly ever: a text of more than that is cut for certain


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
        # Upstream sets its own only after it asked for model and more.
        self._options, self._data, self._eval_data = args, train_dataset, eval_dataset
        self._defaults = {"loss": loss is None, "data_collator": kwargs.get("data_collator") is None}
        if model is not None:
            self.prepare_model(model, args)
        if train_dataset is not None:
            set_evaluation_steps(args, train_dataset)
        self.batch_sampler: Any = None  # of training, perhaps around a length-sorted one
        self.length_sorted_sampler: LengthSortedBatchSampler | None = None
        self.batches_seen = 0  # of the present epoch
        self.signals = StopOnSignal()
        ours = [BatchWatch(self), WarmUp(), EvaluationCurve(), self.signals]
        kwargs["callbacks"] = [*ours, *(kwargs.get("callbacks") or [])]
        super().__init__(model, args, train_dataset, eval_dataset, loss, evaluator, **kwargs)  # type: ignore[call-arg]
        self._whole: WholeModel | None = None
        if self.is_fsdp_enabled:  # type: ignore[attr-defined]
            if args.load_best_model_at_end:
                raise ValueError("FSDP cannot load weights into shards: leave load_best_model_at_end out.")
            if names := [
                name for name in ("freeze_candidate_encoder", "learn_logit_scale") if getattr(args, name, False)
            ]:
                raise ValueError(f"FSDP shards what trains, which is not made for {' and '.join(names)}: leave it out.")
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
        """As upstream's, with the figures that the loss keeps."""
        if "loss" in logs and isinstance(self.loss, InBatchNegativesLoss):
            logs = {**logs, **self.loss.take_figures()}
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
        if isinstance(self.loss, InBatchNegativesLoss) and (learnt := self.loss.own_state()):
            save_file(learnt, str(folder / OF_THE_LOSS))
        replace_file(folder / "training_args.json", self.args.to_json_string())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:  # type: ignore[attr-defined]
            raise ValueError("FSDP runs cannot be resumed: give the checkpoint as a model, by --model_name_or_path.")
        if isinstance(self.loss, InBatchNegativesLoss) and self.loss.own_state():
            self.loss.load_own_state(load_file(str(Path(resume_from_checkpoint, OF_THE_LOSS))))
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


class InBatchTrainer(PaperTrainer, SentenceTransformerTrainer):
    """Trains two-sided encoders: every other candidate of the batch is a negative.

    Args:
        candidate_vectors: For `freeze_candidate_encoder`, vectors of the candidates that are not the model's own; see
            `poly_encoders.training.methods.frozen_candidates.candidate_vectors`.
        *args, **kwargs: As for `SentenceTransformerTrainer`.
    """

    data_collator_class = ContextFirstCollator

    def __init__(self, *args: Any, candidate_vectors: Any = None, **kwargs: Any) -> None:
        self._given = candidate_vectors
        self._index: tuple[Any, CandidateIndex] | None = None  # of a model
        super().__init__(*args, **kwargs)

    def prepare_model(self, model: Any, args: Any) -> None:
        """As the others', and frozen on the candidates' side where the options say so."""
        super().prepare_model(model, args)
        if args.freeze_candidate_encoder:
            if not all(self._defaults.values()):
                raise ValueError("freeze_candidate_encoder has its own loss and data_collator: leave yours out.")
            freeze_candidate_encoder(model)
        elif self._given is not None:
            raise ValueError("candidate_vectors are for training with freeze_candidate_encoder=True.")

    def candidate_index(self, model: Any) -> CandidateIndex:
        """The vectors that stay, those of all candidates of the data."""
        if self._index is None or self._index[0] is not model:
            self._index = (model, make_index(model, self._data, self._eval_data, self._options, self._given))
        return self._index[1]

    def get_data_collator(self, model: Any, args: Any, processing_class: Any = None) -> ContextFirstCollator:
        options = {"router_mapping": args.router_mapping, "prompts": args.prompts}
        if not args.freeze_candidate_encoder:
            return self.data_collator_class(model.preprocess, **options)
        index = self.candidate_index(model)
        return FrozenCandidatesCollator(model.preprocess, rows=index.rows, positives=index.positives, **options)

    def collect_features(self, inputs: dict[str, Any]) -> tuple[Any, Tensor | None]:
        """As upstream's; then the rows of candidates that stay."""
        features, labels = super().collect_features(inputs)
        rows = {name: inputs[name] for name in ("candidate_rows", "known_positives") if name in inputs}
        return ([*features, rows] if rows else features), labels

    def get_default_loss(self, model: Any) -> nn.Module:
        args, names = self.args, ("mini_batch_size", "mask_duplicates", "logit_scale", "learn_logit_scale")
        options: dict[str, Any] = {name: getattr(args, name) for name in (*names, "disagreement_weight")}
        options["gather_across_devices"] = args.gather_across_devices and args.world_size > 1
        options["distillation"] = args.make_distillation()
        if not args.freeze_candidate_encoder:
            return InBatchNegativesLoss(model, **options)
        index = self.candidate_index(model)
        options |= {"num_trained": index.num_trained, "seed": args.seed}
        return FrozenCandidatesLoss(model, index.vectors, args.num_index_negatives, **options)

    def rate_factors(self, args: Any) -> dict[str, float]:
        """By the names of parameters, their learning rates over that of the rest."""
        return dict.fromkeys(SCALARS, args.scalar_learning_rate_factor)

    def get_optimizer_cls_and_kwargs(self, args: Any, model: Any = None) -> tuple[Any, Any]:
        """As the other trainers', with learning rates of their own for some, unless the options give them one."""
        rates, of_loss = args.learning_rate_mapping, self.loss if isinstance(self.loss, nn.Module) else nn.Module()
        there = {name.rpartition(".")[2] for part in (self.model, of_loss) for name, _ in part.named_parameters()}
        factors = {name: factor for name, factor in self.rate_factors(args).items() if name in there}
        own = {rf"\b{name}$": args.learning_rate * factor for name, factor in factors.items()}
        own = {pattern: own[pattern] for pattern in own if not any(pattern[2:-1] in given for given in rates)}
        if own:
            args = copy.copy(args)
            args.learning_rate_mapping = {**rates, **own}
        return super().get_optimizer_cls_and_kwargs(args, model)

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """As upstream's; what is learnt as one number decays to no 0."""
        names = super().get_decay_parameter_names(model)
        return [name for name in names if name.rpartition(".")[2] not in SCALARS]


class BiEncoderTrainer(InBatchTrainer):
    """Trains a `BiEncoder`; parameters as for `SentenceTransformerTrainer`, and `candidate_vectors`."""

    model_class = BiEncoder
    training_args_class = BiEncoderTrainingArguments


class PolyEncoderTrainer(InBatchTrainer):
    """Trains a `PolyEncoder`; parameters as for `BiEncoderTrainer`. The codes learn faster than the rest."""

    model_class = PolyEncoder
    training_args_class = PolyEncoderTrainingArguments

    def rate_factors(self, args: Any) -> dict[str, float]:
        """As the Bi-encoder's, and that of the codes."""
        return {"codes": args.code_learning_rate_factor, **super().rate_factors(args)}


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
