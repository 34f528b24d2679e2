"""Loading a saved model of any of the three kinds by its path alone."""

import json
import os
from pathlib import Path
from typing import Any

from sentence_transformers.util import load_file_path

from poly_encoders.bi_encoder import BiEncoder
from poly_encoders.cross_encoder import CrossEncoder
from poly_encoders.poly_encoder import PolyEncoder
from poly_encoders.ranker import clear_load_errors

_CHANGES = ("reduction", "num_codes", "share_encoders", "max_context_length", "max_candidate_length")


def load_model(path: str | os.PathLike[str], **kwargs: Any) -> PolyEncoder | BiEncoder | CrossEncoder:
    """Load a Poly-, Bi- or Cross-encoder as it is.

    Args:
        path: A saved model, a local folder or a Hub id: of this package, of sentence-transformers, whose modules,
            similarity, activation and way of cutting texts then stay, or transformers' Poly-encoders and sequence
            classifiers with one label.
        **kwargs: What the model's class takes (`device`, `revision`, `token`, ...).

    Raises:
        OSError: nothing is there.
        ValueError: it is an encoder that was not trained to rank, or a model of another kind.
    """
    path = os.fspath(path)
    hub: dict[str, Any] = {
        name: kwargs[name] for name in ("token", "cache_folder", "revision", "local_files_only") if name in kwargs
    }
    with clear_load_errors(path):
        settings = _read_json(path, "config_sentence_transformers.json", hub)
        if settings is None and load_file_path(path, "modules.json", **hub) is not None:
            settings = {}  # some models on the Hub have their modules alone
        config = _read_json(path, "config.json", hub) or {}
        if settings is None and not config:
            if Path(path, "model.opt").is_file():
                raise ValueError(f"{path} is a checkpoint of ParlAI. Convert it first: poly-encoders convert-parlai.")
            raise OSError(
                f"There is no saved model at {path}: no config.json. Check the folder, or the Hub id and the network."
            )
        kind, is_ours = _kind(path, settings, config)
        if kind == "PolyEncoder":
            return PolyEncoder(path, **kwargs)
        model_class = CrossEncoder if kind == "CrossEncoder" else BiEncoder
        if is_ours:
            return model_class(path, **kwargs)
        if changes := [name for name in _CHANGES if kwargs.get(name) is not None]:
            raise ValueError(
                f"{path} was not saved by this package and is loaded as it is, so there is no {', '.join(changes)}. "
                f"To build a new model on it, call {model_class.__name__}(path, ...)."
            )
        return model_class(path, _unchanged=True, **kwargs)


def _kind(path: str, settings: dict[str, Any] | None, config: dict[str, Any]) -> tuple[str, bool]:
    """sentence-transformers' name of a saved model's kind, and whether this package saved it."""
    if config.get("model_type") == "poly-encoder":
        return "PolyEncoder", True
    if settings is not None:
        kind = settings.get("model_type", "SentenceTransformer")
        if kind not in (known := ("PolyEncoder", "SentenceTransformer", "CrossEncoder")):
            raise ValueError(f"{path} is a {kind}; expected one of {', '.join(known)}.")
        return kind, "poly_encoders" in settings
    if any(name.endswith("ForSequenceClassification") for name in config.get("architectures") or []):
        return "CrossEncoder", False
    raise ValueError(
        f"{path} is a {config.get('model_type')} encoder that was not trained to rank. Train one of the three encoders "
        "on it first: accelerate launch -m poly_encoders.training.train --model_name_or_path ..."
    )


def _read_json(path: str, name: str, hub: dict[str, Any]) -> dict[str, Any] | None:
    file = load_file_path(path, name, **hub)
    return None if file is None else json.loads(Path(file).read_text(encoding="utf-8"))
