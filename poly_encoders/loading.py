"""Loading a saved model of any of the three kinds by its path alone."""

import json
from pathlib import Path
from typing import Any

from sentence_transformers.util import load_file_path

from poly_encoders.bi_encoder import BiEncoder
from poly_encoders.cross_encoder import CrossEncoder
from poly_encoders.poly_encoder import PolyEncoder

# `model_type` in config_sentence_transformers.json -> the class that loads the folder.
_CLASSES: dict[str, type[PolyEncoder] | type[BiEncoder] | type[CrossEncoder]] = {
    "PolyEncoder": PolyEncoder,
    "SentenceTransformer": BiEncoder,
    "CrossEncoder": CrossEncoder,
}


def load_model(path: str, **kwargs: Any) -> PolyEncoder | BiEncoder | CrossEncoder:
    """Load a Poly-, Bi- or Cross-encoder.

    Args:
        path: A saved model, a local folder or a Hub id: of this package, of sentence-transformers, or transformers'
            Poly-encoders and sequence classifiers with one label.
        **kwargs: What the model's class takes (`device`, `revision`, `token`, ...).

    Raises:
        OSError: nothing is there.
        ValueError: it is an encoder that was not trained to rank, or a model of another kind.
    """
    hub: dict[str, Any] = {
        name: kwargs[name] for name in ("token", "cache_folder", "revision", "local_files_only") if name in kwargs
    }
    settings = _read_json(path, "config_sentence_transformers.json", hub)
    if settings is not None:
        model_type = settings.get("model_type", "SentenceTransformer")
        if model_type not in _CLASSES:
            raise ValueError(f"{path} is a {model_type}; expected one of {', '.join(_CLASSES)}.")
        return _CLASSES[model_type](path, **kwargs)
    config = _read_json(path, "config.json", hub)
    if config is None:
        if Path(path, "model.opt").is_file():
            raise ValueError(f"{path} is a checkpoint of ParlAI. Convert it first: poly-encoders convert-parlai.")
        raise OSError(
            f"There is no saved model at {path}: no config.json. Check the folder, or the Hub id and the network."
        )
    if config.get("model_type") == "poly-encoder":
        return PolyEncoder(path, **kwargs)
    if any(name.endswith("ForSequenceClassification") for name in config.get("architectures") or []):
        return CrossEncoder(path, **kwargs)
    raise ValueError(
        f"{path} is a {config.get('model_type')} encoder that was not trained to rank. Train one of the three encoders "
        "on it first: accelerate launch -m poly_encoders.training.train --model_name_or_path ..."
    )


def _read_json(path: str, name: str, hub: dict[str, Any]) -> dict[str, Any] | None:
    file = load_file_path(path, name, **hub)
    return None if file is None else json.loads(Path(file).read_text(encoding="utf-8"))
