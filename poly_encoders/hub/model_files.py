"""Which files of a folder make up a saved model: what is pushed, and what a newer push puts out of the way.

A folder may hold far more than its model: checkpoints, optimizer states, logs, a user's notes. A file belongs to the
model if its name says so, or its content where that is our code, never because nothing speaks against it.
"""

import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from poly_encoders.cards import CARD
from poly_encoders.saving import is_our_code

# The names under which transformers and sentence-transformers save parts of a model. Whole names: a pattern such as
# *config*.json would also take a user's own db_config.json.
_SAVED = re.compile(
    r"(?:generation_|processor_|router_|sentence_(?:bert|roberta|distilbert|xlm-roberta|mpnet)_)?config\.json|modules\.json|"
    r"config_sentence_transformers\.json|tokenizer(?:_config)?\.json|special_tokens_map\.json|added_tokens\.json|"
    r"chat_template\.(?:jinja|json)|vocab\.(?:json|txt)|merges\.txt|bpe\.codes|entity_vocab\.json|"
    r"(?:tokenizer|spiece|spm|sentencepiece\.bpe)\.model|"
    r"(?:pytorch_)?model(?:-\d+-of-\d+)?\.(?:safetensors|bin)(?:\.index\.json)?|"
    r"(?:configuration|modeling|scoring|text|pipeline)_poly_encoder\.py"  # our code, that nobody else would name so
)
# What a person puts beside a model on purpose; so does whoever links to a file in the card.
_BESIDE = re.compile(r"README\.md|(?:LICENSE|NOTICE)(?:\.\w+)?|requirements\.txt|handler\.py")
_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
# sentence-transformers' folders of modules: 1_Pooling, query_0_Transformer.
_MODULE_FOLDER = re.compile(r"(?:(?:query|document)_)?\d+_[A-Z]\w*")
_TEMPLATES = "additional_chat_templates"


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
    if missing := sorted(_missing(root, found)):
        raise ValueError(
            f"{root} holds no complete model: there is no {', '.join(missing)}. Give a folder that save_pretrained "
            "wrote, or save the model again."
        )
    for part in nested:
        inside = model_files(root / part)
        inside.pop(CARD, None)  # a repository has one, and this one's snippets would load the wrong model
        found |= {f"{part}/{name}": path for name, path in inside.items()}
    return found


def stale_files(
    there: Collection[str], new: Collection[str], is_ours: Callable[[str], bool], nested: Sequence[str] = ()
) -> list[str]:
    """Of the files that are `there`, those of an earlier model that the files of a `new` one do not replace.

    Weights in another number of shards, a tokenizer of another kind, modules and code of ours that are no more: beside
    the new files they would mislead whoever loads the model. All else, such as a user's own files, stays. `is_ours`
    tells by its content whether a file of code is ours.
    """
    gone = (name for name in there if name not in new)
    return sorted(name for name in gone if _is_of_a_model(name, nested) or (is_code(name) and is_ours(name)))


def is_code(name: str) -> bool:
    """Whether this is a file of code beside the weights whose name does not tell if it is ours."""
    return "/" not in name and name.endswith(".py") and not _SAVED.fullmatch(name)


def _is_of_a_model(name: str, nested: Sequence[str] = ()) -> bool:
    top, _, rest = name.partition("/")
    if not rest:
        return _SAVED.fullmatch(name) is not None
    return _is_of_a_model(rest) if top in nested else bool(_MODULE_FOLDER.fullmatch(top)) or top == _TEMPLATES


def _names(root: Path) -> Iterator[str]:
    card = (root / CARD).read_text(encoding="utf-8") if (root / CARD).is_file() else ""
    code, modules = _named_code(root), _module_folders(root)
    for path in sorted(root.iterdir()):
        name = path.name
        if path.is_file() and not name.endswith(_PICKLED):
            ours = is_code(name) and is_our_code(path.read_text(encoding="utf-8", errors="replace"))
            beside = _BESIDE.fullmatch(name) or f"]({name})" in card
            if _is_of_a_model(name) or beside or ours or name in code:
                yield name
        elif path.is_dir() and (name in modules or name == _TEMPLATES):
            for file in sorted(path.rglob("*")):
                inside = file.relative_to(root)
                hidden = any(part.startswith(".") for part in inside.parts)
                if file.is_file() and not hidden and not file.name.endswith(_PICKLED):
                    yield inside.as_posix()


def _named_code(root: Path) -> set[str]:
    """The files of code beside the weights that the configuration names, as a backbone with code of its own does."""
    named = [_read(root / name) for name in ("config.json", "tokenizer_config.json")]
    texts = json.dumps([[config.get("auto_map"), config.get("custom_pipelines")] for config in named])
    return {f"{module}.py" for module in re.findall(r'"([A-Za-z_]\w*)\.[A-Za-z_]\w*"', texts)}


def _module_folders(root: Path) -> set[str]:
    """The folders that modules.json and a Router name, if they are folders of modules."""
    names = {str(module.get("path", "")) for module in _read(root / "modules.json")}
    return {
        name
        for name in names | set(_read(root / "router_config.json").get("types", {}))
        if _MODULE_FOLDER.fullmatch(name)
    }


def _missing(root: Path, found: dict[str, Path]) -> Iterator[str]:
    """What the folder lacks to load."""
    weights = [name for name in found if name.endswith(".safetensors")]
    for name in _module_folders(root):
        if not any(key.startswith(f"{name}/") for key in (weights if name.endswith("_Transformer") else found)):
            yield f"{name}/model.safetensors" if name.endswith("_Transformer") else name
    for name, path in found.items():
        if name.endswith(".safetensors.index.json"):
            yield from {shard for shard in _read(path)["weight_map"].values() if not (path.parent / shard).is_file()}
    if not {"config.json", "modules.json"} & found.keys():
        yield "config.json"
    if not weights:
        yield "model.safetensors"


def _read(path: Path) -> Any:
    """A JSON file; empty where there is none.

    Raises:
        ValueError: it is broken.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is truncated or corrupted ({error}). Save the model again.") from error
