"""The stand-in Hub's checks of a card's metadata: shapes of the known keys, and names that the Hub knows."""

import re
from typing import Any

import yaml

TASKS = ("feature-extraction", "fill-mask", "sentence-similarity", "text-ranking")
_ID = re.compile(r"(?:[\w.-]{1,96}/)?[\w.-]{1,96}", re.ASCII)


def check_card(text: str) -> list[str]:
    """What is wrong with a card."""
    match = re.match(r"---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", text, re.DOTALL)
    try:
        data = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError as error:
        return [f"YAML metadata error: {error}"]
    checks = {
        "language": lambda value: _is_texts([value] if isinstance(value, str) else value),
        "license": lambda value: value in ("apache-2.0", "mit", "bsd-3-clause"),
        "tags": _is_texts,
        "pipeline_tag": lambda value: value in TASKS,
        "library_name": lambda value: value in ("transformers", "sentence-transformers"),
        "datasets": lambda value: _is_texts(value) and all(map(_ID.fullmatch, value)),
        "metrics": _is_texts,
        "base_model": lambda value: isinstance(value, str) and _ID.fullmatch(value),
        "widget": lambda value: all(
            _is_texts([example["source_sentence"], *example["sentences"]]) for example in value
        ),
        "co2_eq_emissions": lambda value: isinstance(value["emissions"], float),
        "model-index": lambda value: all(_is_result(result) for entry in value for result in entry["results"]),
    }
    return [f'"{key}" has the value {data[key]}' for key, fits in checks.items() if key in data and not fits(data[key])]


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) and text for text in value)


def _is_result(result: dict[str, Any]) -> bool:
    metrics = result["metrics"]
    return (
        result["task"]["type"] in TASKS
        and {"name", "type"} <= result["dataset"].keys()
        and all({"type", "value"} <= metric.keys() for metric in metrics)
        and bool(metrics)
    )
