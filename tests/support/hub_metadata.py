"""The stand-in Hub's checks of a card's metadata: shapes of the known keys, and names that the Hub knows."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import yaml

REPOSITORY = re.compile(r"(?:[\w.-]{1,96}/)?[\w.-]{1,96}", re.ASCII)
TASKS = {
    "feature-extraction",
    "fill-mask",
    "sentence-similarity",
    "text-classification",
    "text-generation",
    "text-ranking",
}
LICENSES = {"apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-sa-4.0", "cc0-1.0", "openrail", "other", "unknown"}


def front_matter(text: str) -> dict[str, Any]:
    """The metadata at the head of a card; empty where there is none.

    Raises:
        yaml.YAMLError: it is no YAML mapping.
    """
    match = re.match(r"---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", text, re.DOTALL)
    data = yaml.safe_load(match[1]) if match else None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise yaml.YAMLError("the metadata must be a mapping")
    return data


def check_card(text: str) -> tuple[list[str], list[str]]:
    """Errors and warnings about a card."""
    try:
        data = front_matter(text)
    except yaml.YAMLError as error:
        return [f"YAML metadata error: {error}"], []
    if not data:
        return [], ["empty or missing yaml metadata in repo card"]
    errors = [f'"{key}" {wanted}' for key, (wanted, fits) in _SHAPES.items() if key in data and not fits(data[key])]
    errors += _index_errors(data.get("model-index") or [])
    tag = str(data.get("pipeline_tag", ""))
    warnings = [] if not tag or tag in TASKS else [f'"pipeline_tag" {tag!r} is no task that the Hub knows']
    return errors, warnings


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_id(value: Any) -> bool:
    return isinstance(value, str) and REPOSITORY.fullmatch(value) is not None


def _is_widget(value: Any) -> bool:
    if not isinstance(value, list):
        return False
    return all(
        isinstance(example, dict)
        and (
            "source_sentence" not in example
            or (_is_text(example["source_sentence"]) and _is_texts(example.get("sentences")) and example["sentences"])
        )
        for example in value
    )


def _is_emissions(value: Any) -> bool:
    number = value.get("emissions") if isinstance(value, dict) else value
    return isinstance(number, (int, float)) and not isinstance(number, bool)


_SHAPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "language": ("must be a language code or a list of them", lambda value: _is_text(value) or _is_texts(value)),
    "license": (
        f"must be one of {', '.join(sorted(LICENSES))}",
        lambda value: {value} <= LICENSES if isinstance(value, str) else _is_texts(value) and set(value) <= LICENSES,
    ),
    "tags": ("must be a list of texts", _is_texts),
    "pipeline_tag": ("must be a text", _is_text),
    "library_name": ("must be a text", _is_text),
    "datasets": ("must be a list of Hub ids", lambda value: isinstance(value, list) and all(map(_is_id, value))),
    "metrics": ("must be a list of texts", _is_texts),
    "base_model": (
        "must be a Hub id or a list of them",
        lambda value: _is_id(value) or (isinstance(value, list) and all(map(_is_id, value))),
    ),
    "widget": ("must be a list of examples, each with all that its task needs", _is_widget),
    "co2_eq_emissions": ("must be a number of grams, or have one as emissions", _is_emissions),
    "model-index": ("must be a list", lambda value: isinstance(value, list)),
}


def _index_errors(index: Any) -> Iterator[str]:
    """What is wrong with the results of a model-index."""
    for entry in index if isinstance(index, list) else []:
        if not isinstance(entry, dict) or not {"name", "results"} <= entry.keys():
            yield '"model-index" entries need "name" and "results"'
            continue
        for result in entry["results"]:
            if not _is_text((result.get("task") or {}).get("type")):
                yield '"model-index" results need "task.type"'
            if not {"name", "type"} <= (result.get("dataset") or {}).keys():
                yield '"model-index" results need "dataset.name" and "dataset.type"'
            metrics = result.get("metrics") or []
            if not metrics or not all({"type", "value"} <= metric.keys() for metric in metrics):
                yield '"model-index" results need "metrics" with "type" and "value"'
