"""Which files of a folder make up a saved model: what is pushed, and what a newer push puts out of the way.

A folder may hold far more than its model: checkpoints, optimizer states, logs, a user's notes. A file belongs to the
model if its name says so, never because nothing speaks against it.
"""

import json
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from poly_encoders import modeling

CARD = "README.md"

# The names under which transformers and sentence-transformers save parts of a model. Whole names: a pattern such as
# *config*.json would also take a user's own db_config.json.
_SAVED = frozenset(
    (
        "config.json",
        "generation_config.json",
        "processor_config.json",
        "modules.json",
        "router_config.json",
        "config_sentence_transformers.json",
        "sentence_bert_config.json",
        "sentence_roberta_config.json",
        "sentence_distilbert_config.json",
        "sentence_xlm-roberta_config.json",
        "sentence_mpnet_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "bpe.codes",
        "tokenizer.model",
        "spiece.model",
        "spm.model",
        "sentencepiece.bpe.model",
        "entity_vocab.json",
    )
)
_WEIGHTS = re.compile(r"(?:pytorch_)?model(?:-\d+-of-\d+)?\.(?:safetensors|bin)(?:\.index\.json)?")
# The code that travels with our models.
_OUR_CODE = frozenset(file.name for file in Path(modeling.__file__).parent.glob("*.py")) - {"__init__.py"} | {
    "first_m_pooling.py"
}
# Besides, what a person puts beside a model on purpose.
_BESIDE = re.compile(r"README\.md|(?:LICENSE|NOTICE)(?:\.\w+)?|requirements\.txt")
_PICKLED = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
# sentence-transformers' folders of modules: 1_Pooling, query_0_Transformer.
_MODULE_FOLDER = re.compile(r"(?:(?:query|document)_)?\d+_[A-Z]\w*")
_TEMPLATES = "additional_chat_templates"
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
        return name in _SAVED or name in _OUR_CODE or bool(_WEIGHTS.fullmatch(name))
    if top in nested:
        return _is_of_a_model(rest, ())
    return bool(_MODULE_FOLDER.fullmatch(top)) or top == _TEMPLATES


def _names(root: Path) -> Iterator[str]:
    code = _named_code(root)
    for path in sorted(root.iterdir()):
        name = path.name
        if path.is_file() and not name.endswith(".bin"):
            if _is_of_a_model(name, ()) or name in code or _BESIDE.fullmatch(name):
                yield name
        elif path.is_dir() and (name in _module_folders(root) or name == _TEMPLATES):
            for file in sorted(path.rglob("*")):
                inside = file.relative_to(root)
                hidden = any(part.startswith(".") for part in inside.parts)
                if file.is_file() and not hidden and file.suffix not in _PICKLED:
                    yield inside.as_posix()
    card = root / CARD
    for picture in _PICTURE.findall(card.read_text(encoding="utf-8")) if card.is_file() else []:
        place = PurePosixPath(picture)
        if not place.is_absolute() and ".." not in place.parts and (root / place).is_file():
            yield place.as_posix()


def _named_code(root: Path) -> set[str]:
    """The files of code beside the weights that config.json names, as a backbone with code of its own does."""
    config = _read(root / "config.json", {})
    named = [*(config.get("auto_map") or {}).values()]
    named += [task.get("impl") for task in (config.get("custom_pipelines") or {}).values() if isinstance(task, dict)]
    found = re.findall(r"""(?<![\w./-])([A-Za-z_]\w*)\.[A-Za-z_]\w*""", json.dumps(named))
    return {f"{module}.py" for module in found}


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
