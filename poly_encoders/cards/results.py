"""What a card says of evaluations and of a training run, as rows of its tables."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult

MAX_ROWS = 30  # of the training table

_MAIN = (
    "learning_rate",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "optimizer",
    "weight_decay",
    "lr_scheduler_type",
    "warmup_steps",
    "bf16",
    "fp16",
    "seed",
)
# Options that say where and how a run was kept and shown, not what was trained.
_NOT_SHOWN = re.compile(
    r"(hub_|push_to_hub|logging_|log_|save_|eval_on_|dataloader_(?!drop_last)|ddp_|report_to|run_name|project|trackio_|"
    r"output_dir|resume_|disable_tqdm|include_|use_cpu|card_|load_best_|restore_|skip_memory|torch_empty|"
    r"deepspeed|fsdp_config|accelerator_config|length_column|past_index|prompts$|router_mapping|remove_unused).*"
)
_TIMES = re.compile(r".*_(runtime|per_second|steps_per_second|samples_per_second)$|.*_(preparation|compilation)_time$")


def evaluations(results: Mapping[Any, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The latest figures of each evaluator.

    Args:
        results: The metrics that each evaluator gave, its name in front of theirs.

    Returns:
        `{"title", "dataset", "split", "about", "metrics": [(key, label, value)]}` each. Of evaluators with one title,
        such as two of the same data, the last counts.
    """
    found: dict[str, dict[str, Any]] = {}
    for evaluator, metrics in results.items():
        name = getattr(evaluator, "name", None) or ""
        labels: dict[str, str] = getattr(evaluator, "metric_labels", {})
        own = {key.removeprefix(f"{name}_") if name else key: value for key, value in metrics.items()}
        numbers = {key: _number(value) for key, value in own.items()}
        split = getattr(evaluator, "split", None) or ""
        dataset = getattr(evaluator, "dataset", None) or name
        title = evaluator.description
        if dataset:
            title += f" on {dataset}" + (f", {split}" if split and split != dataset else "")
        found[title] = {
            "title": title,
            "description": evaluator.description,
            "dataset": dataset,
            "split": split,
            "about": getattr(evaluator, "about", ""),
            "metrics": [
                (key, labels.get(key, key.replace("_", " ")), value)
                for key, value in numbers.items()
                if value is not None and (key in labels or not labels)
            ],
        }
    return list(found.values())


def eval_results(found: Sequence[Mapping[str, Any]], task: str) -> list[EvalResult]:
    """The same as entries of a `model-index`, for the Hub's `task`."""
    return [
        EvalResult(
            task_type=task,
            task_name=entry["description"],
            dataset_type=re.sub(r"[^\w./-]+", "-", entry["dataset"]).strip("-") or "unknown",
            dataset_name=entry["dataset"] or "Unknown",
            dataset_split=entry["split"] or None,
            metric_type=key,
            metric_name=label,
            metric_value=value,
        )
        for entry in found
        for key, label, value in entry["metrics"]
    ]


def training_table(history: Sequence[Mapping[str, Any]], best_step: int | None = None) -> list[list[str]]:
    """A run's losses and evaluations by step, its heading first; empty where nothing was logged.

    Args:
        history: `TrainerState.log_history`.
        best_step: The step whose model was kept, set in bold.

    Returns:
        Rows of cells, at most 31: all evaluations and, evenly spaced, as many of the other steps as there is room for.
    """
    rows: dict[int, dict[str, Any]] = {}
    for entry in history:
        figures = {}
        for name, value in entry.items():
            if name == "loss" and value is not None:
                figures["Training loss"] = value
            elif name.startswith("eval_") and isinstance(value, float) and not _TIMES.match(name):
                figures[_shown(name)] = value
        if figures:
            row = rows.setdefault(int(entry["step"]), {"Step": int(entry["step"]), "Epoch": entry.get("epoch")})
            row.update(figures)
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    first = [name for name in ("Epoch", "Step", "Training loss", "Validation loss") if name in columns]
    columns = [*first, *(name for name in columns if name not in first)]
    if len(columns) < 3:
        return []
    table = [columns]
    for step in _chosen_steps(rows):
        cells = [_cell(rows[step].get(name)) for name in columns]
        table.append([f"**{cell}**" if cell else cell for cell in cells] if step == best_step else cells)
    return table


def shown_options(options: Mapping[str, Any], changed: Mapping[str, Any]) -> dict[str, str]:
    """The options of a run that say what was trained, as text: the main ones, then those that are not at their default.

    Nothing that may be a path of the machine that it ran on is among them.
    """
    names = [*(name for name in _MAIN if name in options), *sorted(changed)]
    shown = {}
    for name in dict.fromkeys(names):
        value = changed[name] if name in changed else options[name]
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        if not (value is None or _NOT_SHOWN.fullmatch(name) or "/" in text or "\\" in text):
            shown[name] = text
    return shown


def _chosen_steps(rows: Mapping[int, Mapping[str, Any]]) -> list[int]:
    """At most `MAX_ROWS` steps, the evaluated ones before the others, the last among them."""
    evaluated = [step for step, row in rows.items() if set(row) - {"Epoch", "Step", "Training loss"}]
    others = [step for step in rows if step not in evaluated]
    kept = _spread(evaluated, MAX_ROWS)
    return sorted(kept + _spread(others, MAX_ROWS - len(kept)))


def _spread(steps: Sequence[int], count: int) -> list[int]:
    """At most `count` of the steps, evenly spaced, ending with the last."""
    if len(steps) <= count:
        return list(steps)
    return [steps[(place + 1) * len(steps) // count - 1] for place in range(count)]


def _shown(name: str) -> str:
    name = name.removeprefix("eval_")
    if name == "loss":
        return "Validation loss"
    name = re.sub(r"recall@", "R@", name.removesuffix("_mrr") + " MRR" if name.endswith("_mrr") else name)
    return "MRR" if name == "mrr" else name.replace("_", " ")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}"


def _number(value: Any) -> float | None:
    try:
        return round(float(value), 4)
    except (TypeError, ValueError):
        return None
