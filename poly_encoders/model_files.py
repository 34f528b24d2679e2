"""Which files of a folder make up a saved model: what is pushed, and what a newer push puts out of the way.

A folder may hold far more than its model: checkpoints, optimizer states, logs, a user's notes. A file belongs to the
model if its name says so, never because nothing speaks against it.
"""

import json
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

CARD = "README.md"

# The names under which transformers and sentence-transformers save parts of a model.
_SAVED = re.compile(
    r"""
      (?:[\w-]+_)?config(?:_[\w-]+)?\.json | modules\.json
    | [\w.-]*(?:vocab|merges|tokenizer|spiece|bpe)[\w.-]*\.(?:json|txt|model|codes)
    | special_tokens_map\.json | added_tokens\.json | chat_template\.(?:jinja|json)
    | (?:pytorch_)?model(?:-\d+-of-\d+)?\.(?:safetensors|bin)(?:\.index\.json)?
    """,
    re.VERBOSE,
)
# Besides, what a person puts beside a model on purpose, and the code that travels with it.
_BESIDE = re.compile(r"README\.md | (?:LICENSE|NOTICE)(?:\.\w+)? | requirements\.txt | \w+\.py", re.VERBOSE)
# sentence-transformers' folders of modules: 1_Pooling, query_0_Transformer.
_MODULE_FOLDER = re.compile(r"(?:(?:query|document)_)?\d+_[A-Z]\w*")
_TEMPLATES = "additional_chat_templates"
_OUR_CODE = re.compile(r"(?:configuration|modeling|pipeline)_poly_encoder\.py")
_PICTURE = re.compile(r"""(?:\]\(|src=["'])\s*([\w./-]+\.(?:png|jpe?g|svg|gif|webp))""", re.IGNORECASE)


def model_files(folder: str | Path, nested: Sequence[str] = ()) -> dict[str, Path]:
    """The files of the model saved in `folder`, by their path in it with forward slashes.

    Args:
        folder: A saved model, alone or among other things, such as the output folder of a training run.
        nested: Names of folders within that hold a model of their own which goes with it.

    Raises:
        ValueError: there is no complete model.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"There is no folder {folder}. Give the folder that the model was saved to.")
    found = {name: root / name for name in _names(root)}
    _check_complete(root, found)
    for part in nested:
        inside = model_files(root / part)
        inside.pop(CARD, None)  # a repository has one, and this one's snippets would load the wrong model
        found |= {f"{part}/{name}": path for name, path in inside.items()}
    return found


def stale_files(there: Collection[str], new: Collection[str], nested: Sequence[str] = ()) -> list[str]:
    """Of the files that are `there`, those of an earlier model that the files of a `new` one do not replace.

    Weights in another number of shards, a tokenizer of another kind, modules that are no more: beside the new files
    they would mislead whoever loads the model. All else, such as a user's own files, stays.
    """
    return sorted(name for name in there if name not in new and _is_of_a_model(name, nested))


def _is_of_a_model(name: str, nested: Sequence[str]) -> bool:
    top, _, rest = name.partition("/")
    if not rest:
        return bool(_SAVED.fullmatch(name) or _OUR_CODE.fullmatch(name))
    if top in nested:
        return _is_of_a_model(rest, ())
    return bool(_MODULE_FOLDER.fullmatch(top)) or top == _TEMPLATES


def _names(root: Path) -> Iterator[str]:
    for path in sorted(root.iterdir()):
        name = path.name
        if path.is_file() and (_SAVED.fullmatch(name) or _BESIDE.fullmatch(name)) and not name.endswith(".bin"):
            yield name
        elif path.is_dir() and (name in _module_folders(root) or name == _TEMPLATES):
            inside = (file.relative_to(root) for file in sorted(path.rglob("*")) if file.is_file())
            yield from (file.as_posix() for file in inside if not any(part.startswith(".") for part in file.parts))
    card = root / CARD
    for picture in _PICTURE.findall(card.read_text(encoding="utf-8")) if card.is_file() else []:
        place = PurePosixPath(picture)
        if not place.is_absolute() and ".." not in place.parts and (root / place).is_file():
            yield place.as_posix()


def _module_folders(root: Path) -> set[str]:
    """The folders that modules.json and a Router name, if they are folders of modules."""
    names = {str(module.get("path", "")) for module in _read(root / "modules.json", [])}
    names |= set(_read(root / "router_config.json", {}).get("types", {}))
    return {name for name in names if _MODULE_FOLDER.fullmatch(name)}


def _check_complete(root: Path, found: dict[str, Path]) -> None:
    """Refuse a folder that would not load."""
    missing = []
    for name in sorted(_module_folders(root)):
        inside = [key for key in found if key.startswith(name + "/")]
        if not inside:
            missing.append(name)
        elif name.endswith("_Transformer") and not any(key.endswith(".safetensors") for key in inside):
            missing.append(f"{name}/model.safetensors")
    for name, path in found.items():
        if name.endswith(".safetensors.index.json"):
            shards = set(_read(path, {}).get("weight_map", {}).values())
            missing += sorted(shard for shard in shards if not (path.parent / str(shard)).is_file())
    if not {"config.json", "modules.json"} & found.keys():
        missing.append("config.json")
    if not any(name.endswith(".safetensors") for name in found):
        missing.append("model.safetensors")
    if missing:
        raise ValueError(
            f"{root} holds no complete model: there is no {', '.join(missing)}. Give a folder that save_pretrained "
            "wrote, or save the model again."
        )


def _read(path: Path, default: Any) -> Any:
    """A JSON file, which must hold the same kind of value as `default`; `default` where there is no file.

    Raises:
        ValueError: it is broken.
    """
    if not path.is_file():
        return default
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is truncated or corrupted ({error}). Save the model again.") from error
    if not isinstance(value, type(default)):
        raise ValueError(
            f"{path} holds a {type(value).__name__}, not a {type(default).__name__}. Save the model again."
        )
    return value
