"""What a training run tells the model's card: examples, the log, the curve, and what it is made from."""

import copy
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from sentence_transformers.base.model_card import BaseModelCardCallback

from poly_encoders import CandidateRankingEvaluator
from poly_encoders.training.data.checks import text_columns
from poly_encoders.training.data.task_files import TASK_FILES
from poly_encoders.training.runs.arguments import MINILM, DataArguments, ModelArguments
from poly_encoders.training.runs.callbacks import CURVE

_ROWS = 200  # of the evaluation data from which examples are chosen
_CANDIDATES = 5
_ENGLISH = {"chitchat", *TASK_FILES}  # the data known by name


class CardOfRun(BaseModelCardCallback):
    """Upstream's callback, and what our cards show beyond it.

    It is built by the trainer, which hands it the defaults of the options.
    """

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any, trainer: Any, **kwargs: Any) -> None:
        card = model.model_card_data
        if not args.card_examples:
            card.generate_widget_examples, card.widget = False, []
        if args.card_license is not None:
            card.set_license(args.card_license)
        if args.card_language is not None:
            card.set_language(args.card_language)
        evaluators = getattr(trainer.evaluator, "evaluators", [trainer.evaluator])
        ranking = next((member for member in evaluators if isinstance(member, CandidateRankingEvaluator)), None)
        card.set_examples(ranking_samples(trainer.eval_dataset) if ranking is None else ranking.samples)
        super().on_init_end(args, state, control, model, trainer=trainer, **kwargs)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, model, **kwargs)
        card = model.model_card_data
        card.log_history = state.log_history  # which the trainer adds to, after what a run that goes on has logged
        card.curve = Path(args.output_dir, f"{CURVE}.png") if state.global_step > 0 else None  # of the run that goes on


def describe_run(card: Any, model: ModelArguments, data: DataArguments) -> None:
    """Tell a model's card what it is made from, and what it is trained and evaluated on."""
    card.train_datasets = [_described(data.dataset, data.train_split)]
    if data.eval_split is not None and data.max_eval_examples != 0:
        card.eval_datasets = [_described(data.eval_dataset or data.dataset, data.eval_split)]
    if data.dataset in _ENGLISH and not card.language:
        card.set_language("en")
    if model.model_name_or_path == "minilm":
        card.base_model = MINILM


def _described(source: str, split: str) -> dict[str, Any]:
    is_of_hub = source not in _ENGLISH and not Path(source).exists()
    return {"name": data_name(source), "split": split, **({"id": source} if is_of_hub else {})}


def data_name(source: str) -> str:
    """What a card calls data: a file or a folder by its own name, whatever folder it is in."""
    return Path(source).name if Path(source).exists() else source


def ranking_samples(data: Any) -> list[dict[str, Any]]:
    """Ranking sets of the first rows of evaluation data: their own candidates, then other rows' positives.

    Data that is streamed gives none: to look at it would use it up.
    """
    if isinstance(data, DatasetDict):
        data = next(iter(data.values()))
    if not isinstance(data, Dataset) or len(text_columns(data)) < 2:
        return []
    context, *candidates = text_columns(data)
    rows = list(islice(data, _ROWS))
    samples = []
    for position, row in enumerate(rows):
        others = [other[candidates[0]] for other in rows[position + 1 :] + rows[:position]][:_CANDIDATES]
        own = dict.fromkeys([*(row[name] for name in candidates), *others])
        samples.append({"context": row[context], "candidates": list(own), "label": 0})
    return samples


def with_card_of(model: Any, other: Any) -> Any:
    """`model`, with a copy of what the other one's card says."""
    model.model_card_data = copy.copy(other.model_card_data)
    model.model_card_data.register_model(model)
    return model
