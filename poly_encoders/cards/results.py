"""What a card says of evaluations and of a training run, as rows of its tables."""

import json
import re
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from huggingface_hub import EvalResult

MAX_ROWS = 30  # of the training table

_FIGURE = re.compile(r"loss|eval_(?!(.*_)?(runtime|per_second|time)$).*")
_FIRST = ("Epoch", "Step", "Training loss", "Validation loss")  # columns of the training table
_MAIN = re.compile(
    "learning_rate|per_device_train_batch_size|gradient_accumulation_steps|num_train_epochs|max_steps|optimizer|"
    "weight_decay|lr_scheduler_type|warmup_steps|bf16|fp16|seed"
)
# Options that say where and how a run was kept and shown, not what was trained.
_NOT_SHOWN = re.compile(
    "(hub_|push_|log|save_|eval_on_|dataloader_|ddp_|report_|run_name|project|trackio_|output_dir|resume_|disable_tqdm|"
    "include_|use_cpu|card_|load_best_|restore_|deepspeed|fsdp_config|accelerator_config|prompts|router_mapping).*"
)


def evaluations(results: Mapping[Any, Mapping[str, Any]], task: str) -> list[dict[str, Any]]:
    """The latest figures of each evaluator.

    Args:
        results: The metrics that each evaluator gave, its name in front of theirs.
        task: The Hub's name of it.

    Returns:
        `{"title", "about", "results": entries of a model-index}` each. Of evaluators with one title, such as two of the
        same data, the last counts.
    """
    found = {}
    for evaluator, metrics in results.items():
        name, split = getattr(evaluator, "name", None) or "", getattr(evaluator, "split", None) or ""
        labels: dict[str, str] = getattr(evaluator, "metric_labels", {})
        dataset = getattr(evaluator, "dataset", None) or name
        title = evaluator.description + (f" on {dataset}" if dataset else "")
        title += f", {split}" if dataset and split not in ("", dataset) else ""
        figures = {key.removeprefix(f"{name}_") if name else key: value for key, value in metrics.items()}
        entries = [
            EvalResult(
                task_type=task,
                task_name=evaluator.description,
                dataset_type=re.sub(r"[^\w./-]+", "-", dataset).strip("-") or "unknown",
                dataset_name=dataset or "Unknown",
                dataset_split=split or None,
                metric_type=key,
                metric_name=labels.get(key, key.replace("_", " ")),
                metric_value=round(float(value), 4),
            )
            for key, value in figures.items()
            if isinstance(value, Real) and (key in labels or not labels)
        ]
        found[title] = {"title": title, "about": getattr(evaluator, "about", ""), "results": entries}
    return list(found.values())


def training_table(history: Sequence[Mapping[str, Any]], best_step: int | None = None) -> list[list[str]]:
    """A run's losses and evaluations by step, its heading first; empty where nothing was logged.

    Args:
        history: `TrainerState.log_history`.
        best_step: The step whose model was kept, set in bold.

    Returns:
        At most 31 rows of cells. Of a longer run evenly spaced ones, to the last: its evaluations, if it has any.
    """
    rows: dict[int, dict[str, Any]] = {}
    for entry in history:
        if figures := {_shown(name): value for name, value in entry.items() if _FIGURE.fullmatch(name)}:
            rows.setdefault(entry["step"], {"Epoch": entry.get("epoch"), "Step": entry["step"]}).update(figures)
    if len(rows) > MAX_ROWS:
        rows = {step: row for step, row in rows.items() if row.keys() - set(_FIRST[:3])} or rows
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    columns = [name for name in _FIRST if name in names] + [name for name in names if name not in _FIRST]
    table = [columns] if rows else []
    every = 1 + (len(rows) - 1) // MAX_ROWS
    for step in sorted(rows)[::-1][::every][::-1] if rows else []:
        cells = [_cell(rows[step].get(name)) for name in columns]
        table.append([f"**{cell}**" if cell else cell for cell in cells] if step == best_step else cells)
    return table


def shown_options(options: Mapping[str, Any], changed: Mapping[str, Any]) -> dict[str, str]:
    """The options of a run that say what was trained, as text: the main ones, then those that are not at their default.

    Nothing that may be a path of the machine that it ran on is among them.
    """
    merged = {name: value for name, value in options.items() if _MAIN.fullmatch(name)} | dict(sorted(changed.items()))
    texts = {
        name: value if isinstance(value, str) else json.dumps(value, default=str)
        for name, value in merged.items()
        if value is not None and not _NOT_SHOWN.fullmatch(name)
    }
    return {name: text for name, text in texts.items() if not {"/", "\\"} & set(text)}


def _shown(name: str) -> str:
    if name in ("loss", "eval_loss"):
        return "Training loss" if name == "loss" else "Validation loss"
    return re.sub(r"_?mrr$", " MRR", name.removeprefix("eval_")).replace("recall@", "R@").replace("_", " ").strip()


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else f"{value:,}"
