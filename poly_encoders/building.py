"""Building a Poly-encoder from other checkpoints: plain encoders and sentence-transformers models."""

import json
import logging
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.util import load_dir_path, load_file_path
from transformers import AutoConfig, AutoTokenizer

from poly_encoders.first_m_pooling import FirstMMeanPooling
from poly_encoders.modeling import PolyEncoderConfig, PolyEncoderModel
from poly_encoders.poly_encoder_module import PolyEncoderModule, load_saved
from poly_encoders.ranker import default_separator

logger = logging.getLogger(__name__)

# Half of a turn's vector is its own, so its cosine counts 20 times, as sentence-transformers' losses scale cosines.
COSINE_TEMPERATURE = 0.025
# Codes that each see other tokens from the start: near zero, all see the mean, and learn the same (docs/benchmarks.md).
COSINE_CODE_STD = 0.5
# sentence-transformers' name of a pooling -> ours. The others have no counterpart in the paper.
_REDUCTIONS = {"mean": "mean", "cls": "first"}


def module_from_encoder(path: str, hub: dict[str, Any], options: "BuildOptions") -> PolyEncoderModule:
    """A module on a plain encoder checkpoint, or around a Poly-encoder saved by `PolyEncoderModel` alone."""
    config_hub = {**hub, "trust_remote_code": options.trust_remote_code}
    config = AutoConfig.from_pretrained(path, **config_hub)
    tokenizer = AutoTokenizer.from_pretrained(path, **config_hub, **options.processor)
    if isinstance(config, PolyEncoderConfig):
        return PolyEncoderModule(load_saved(path, config, options.config, **hub, **options.model), tokenizer)
    config_options = {"turn_separator": default_separator(tokenizer), **with_defaults(options.config)}
    model = PolyEncoderModel.from_encoders_pretrained(path, **config_hub, **options.model, **config_options)
    return PolyEncoderModule(model, tokenizer)


def module_from_sentence_transformer(path: str, hub: dict[str, Any], options: "BuildOptions") -> PolyEncoderModule:
    """A module on a SentenceTransformer's own weights and pooling, one encoder or two (a Router of query and document).

    Raises:
        ValueError: the checkpoint's pooling or modules have no counterpart in a Poly-encoder.
    """
    sides = _read_sides(path, hub)
    settings = settings_of(path, hub)
    has_normalize = any(name == "Normalize" for name, _ in sides["document"])
    is_cosine = has_normalize or settings.get("similarity_fn_name") in (None, "cosine")
    config_options = with_defaults(options.config, is_cosine)
    if has_normalize and not config_options.get("normalize"):
        logger.warning(
            "%s normalises its vectors; this Poly-encoder takes plain dot products, so that is dropped.", path
        )
    config_options.setdefault("reduction", _reduction(path, sides["document"], hub, config_options))
    folders = {side: _single(names, "Transformer", path) for side, names in sides.items()}
    separate = folders["query"] != folders["document"]
    if separate:
        if options.config.get("share_encoders"):
            raise ValueError(
                f"{path} has an encoder for each side, which share_encoders=True would drop. Leave it out."
            )
        config_options["share_encoders"] = False
        local = {side: _local_folder(path, folder, hub) for side, folder in folders.items()}
        places: dict[str, Any] = {}
    else:
        local = dict.fromkeys(folders, path)
        places = {**hub, "subfolder": folders["query"]} if folders["query"] else hub
    ours = settings.get("poly_encoders", {})
    for name in ("turn_separator", "max_turns"):
        if name in ours:
            config_options.setdefault(name, ours[name])
    places = {**places, "trust_remote_code": options.trust_remote_code}
    tokenizers = {side: AutoTokenizer.from_pretrained(local[side], **places, **options.processor) for side in local}
    if tokenizers["query"].get_vocab() != tokenizers["document"].get_vocab():
        raise ValueError(
            f"{path} has a tokenizer of its own for each side, with different vocabularies; a Poly-encoder has one. "
            "Use PolyEncoderModel itself with two tokenizers."
        )
    config_options.setdefault("turn_separator", default_separator(tokenizers["query"]))
    for name, side in (("max_context_length", "query"), ("max_candidate_length", "document")):
        own_limit = tokenizers[side].model_max_length if separate else None
        config_options.setdefault(name, _max_length(path, folders[side], side, hub) or own_limit)
    model = PolyEncoderModel.from_encoders_pretrained(
        local["query"], local["document"] if separate else None, **places, **options.model, **config_options
    )
    return PolyEncoderModule(model, tokenizers["query"])


def settings_of(path: str, hub: dict[str, Any]) -> dict[str, Any]:
    """What a SentenceTransformer's checkpoint says of its similarity and prompts; empty where it says nothing."""
    return _read_json(path, "config_sentence_transformers.json", hub, default={})


def with_defaults(options: dict[str, Any], is_cosine: bool = True) -> dict[str, Any]:
    """A new model's options, with ours where nothing was said: one vector a turn, cosines, one encoder.

    Learnt codes have cosines and one encoder too, and start far from each other. With `normalize=False` they have the
    paper's choices, which are `PolyEncoderConfig`'s, and so have its other kinds of context vectors.

    Args:
        options: Those that were given.
        is_cosine: Whether the checkpoint's vectors are compared by their cosine.
    """
    ours: dict[str, Any] = {}
    kind = options.get("context_vectors", "turns")
    if kind in ("turns", "turns_and_codes"):
        ours = {"context_vectors": "turns", "num_codes": 32, "last_turn_share": 0.5}
        ours |= {"share_encoders": True, "normalize": is_cosine}
    elif kind == "learnt_codes" and options.get("normalize", is_cosine):
        ours = {"share_encoders": True, "normalize": True}
    if options.get("normalize", ours.get("normalize")):
        ours["final_temperature"] = COSINE_TEMPERATURE
        if kind in ("learnt_codes", "turns_and_codes"):
            ours["code_std"] = COSINE_CODE_STD
    return {**ours, **options}


class BuildOptions(NamedTuple):
    """What a caller passed to `PolyEncoder(...)` for the model, the tokenizer and the configuration."""

    trust_remote_code: bool
    model: dict[str, Any]
    processor: dict[str, Any]
    config: dict[str, Any]


def _read_sides(path: str, hub: dict[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """For each side its modules, as (class name, folder within the checkpoint)."""
    entries = [(entry["type"].rsplit(".", 1)[-1], entry["path"]) for entry in _read_json(path, "modules.json", hub)]
    if entries[0][0] != "Router":
        return {"query": entries, "document": entries}
    root = entries[0][1]
    router = _read_json(path, "router_config.json", hub, root)
    if not {"query", "document"} <= router["structure"].keys():
        raise ValueError(
            f"{path} routes {sorted(router['structure'])}, but a Poly-encoder needs the routes 'query' and 'document'."
        )
    return {
        side: [
            (router["types"][name].rsplit(".", 1)[-1], str(PurePosixPath(root, name)))
            for name in router["structure"][side]
        ]
        + entries[1:]
        for side in ("query", "document")
    }


def _reduction(path: str, modules: list[tuple[str, str]], hub: dict[str, Any], wishes: dict[str, Any]) -> str:
    """The reduction that the checkpoint's pooling is."""
    for name, _ in modules:
        if name not in ("Transformer", "Pooling", "FirstMMeanPooling", "Normalize"):
            raise ValueError(
                f"{path} has a {name} module, which a Poly-encoder cannot carry over. Build on its encoder alone: "
                "PolyEncoderModel.from_encoders_pretrained(path)."
            )
    if "reduction" in wishes:
        return wishes["reduction"]
    if any(name == "FirstMMeanPooling" for name, _ in modules):
        folder = _single(modules, "FirstMMeanPooling", path)
        m = FirstMMeanPooling.load_config(path, subfolder=folder, **_st_hub(hub))["m"]
        if m != wishes.get("num_codes", PolyEncoderConfig.num_codes):
            raise ValueError(
                f"{path} averages the first m={m} outputs, and a Poly-encoder as many as it has codes. "
                f"Build it with num_codes={m}, or with another reduction."
            )
        return "first_m_mean"
    pooling = Pooling.load_config(path, subfolder=_single(modules, "Pooling", path), **_st_hub(hub))["pooling_mode"]
    mode = pooling[0] if isinstance(pooling, list) and len(pooling) == 1 else pooling
    if mode not in _REDUCTIONS:
        raise ValueError(
            f"{path} pools by {mode!r}; a Poly-encoder's reduction is 'mean', 'first' or 'first_m_mean'. "
            "Choose one with PolyEncoder(path, reduction=...)."
        )
    return _REDUCTIONS[mode]


def _single(modules: list[tuple[str, str]], name: str, path: str) -> str:
    folders = [folder for module, folder in modules if module == name]
    if len(folders) != 1:
        raise ValueError(
            f"{path} has {len(folders)} {name} modules on one side; a Poly-encoder is built on exactly one."
        )
    return folders[0]


def _max_length(path: str, folder: str, side: str, hub: dict[str, Any]) -> int | None:
    settings = _read_json(path, "sentence_bert_config.json", hub, folder, default={})
    return settings.get(f"{side}_length") or settings.get("max_seq_length")


def _local_folder(path: str, folder: str, hub: dict[str, Any]) -> str:
    return str(Path(load_dir_path(path, subfolder=folder, **_st_hub(hub))))


def _read_json(path: str, name: str, hub: dict[str, Any], folder: str = "", default: Any = None) -> Any:
    file = load_file_path(path, name, subfolder=folder, **_st_hub(hub))
    if file is None:
        if default is not None:
            return default
        raise OSError(f"{path} has no {name}, which its modules.json calls for. Download or save the model again.")
    return json.loads(Path(file).read_text(encoding="utf-8"))


def _st_hub(hub: dict[str, Any]) -> dict[str, Any]:
    """Transformers' names of the Hub options as sentence-transformers' helpers want them."""
    names = {"cache_dir": "cache_folder"}
    return {names.get(name, name): value for name, value in hub.items()}
