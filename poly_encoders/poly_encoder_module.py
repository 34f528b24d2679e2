"""The sentence-transformers module around a `PolyEncoderModel`: text in, context or candidate vectors out."""

import copy
from typing import Any, Literal

from sentence_transformers.base.modules import InputModule
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from poly_encoders.modeling import PolyEncoderConfig, PolyEncoderModel
from poly_encoders.modeling.configuration_poly_encoder import token_limit
from poly_encoders.modeling.text_poly_encoder import (
    boundary_ids,
    candidate_texts,
    context_texts,
    make_ready,
    tokenized,
)
from poly_encoders.ranker import Task
from poly_encoders.two_sided import ASK_FOR_A_SIDE

#: Options of a saved model that may be changed on loading; the others are what its weights were trained for.
RUNTIME_OPTIONS = frozenset(
    {"max_context_length", "max_candidate_length", "turn_separator", "max_turns", "max_turn_length"}
)


class PolyEncoderModule(InputModule):
    """Tokenizes and encodes either side; `task` says which.

    Args:
        model: The Poly-encoder.
        tokenizer: One tokenizer for both sides.

    Raises:
        ValueError: the vocabularies of the two encoders differ, which one tokenizer cannot serve, or the tokenizer has
            neither a padding nor an end token, or cannot tell turns apart where these have vectors.
    """

    forward_kwargs = {"task"}  # noqa: RUF012  (upstream's form)
    save_in_root = True

    def __init__(self, model: PolyEncoderModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        sizes = [
            encoder.get_input_embeddings().num_embeddings
            for encoder in (model.context_encoder, model.candidate_encoder)
        ]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"The encoders have vocabularies of {sizes[0]} and {sizes[1]} tokens, so one tokenizer cannot serve "
                "both. Use PolyEncoderModel itself with two tokenizers, or two backbones of one family."
            )
        make_ready(tokenizer)
        if model.config.has_turns:
            model.config.turn_boundary_ids = boundary_ids(tokenizer, model.config.turn_separator)
            if not tokenizer.is_fast and model.config.turn_boundary_ids is None:
                raise ValueError(
                    f"A {type(tokenizer).__name__} cannot tell where its tokens are in a text, and the turn separator "
                    f"{model.config.turn_separator!r} is not one token of it, so turns cannot be told apart. Choose a "
                    "turn_separator that is one token, a fast tokenizer, or other context_vectors than "
                    f"{model.config.context_vectors!r}."
                )
        self.model = model
        self.tokenizer = tokenizer

    @property
    def config(self) -> PolyEncoderConfig:
        return self.model.config

    def preprocess(
        self, inputs: Any, prompt: str | None = None, task: Task | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Token ids and mask, `(batch, length)` int64, of contexts (`task="query"`) or candidates (`"document"`).

        Raises:
            ValueError: no `task`, or a text that has no token at all.
            TypeError: an input that is no text (no conversation, on the context side).
        """
        if task == "query":
            texts = context_texts(inputs, self.config.turn_separator, self.config.max_turns)
        elif task == "document":
            texts = candidate_texts(inputs)
        else:
            raise ValueError(ASK_FOR_A_SIDE)
        side: Literal["left", "right"] = "left" if task == "query" else "right"
        turns = task == "query" and self.config.has_turns
        return {**tokenized(self.tokenizer, texts, self.limit(task), side, prompt, turns=turns), "task": task}

    def limit(self, task: Task) -> int:
        """Tokens kept of a text on this side, special tokens included."""
        model, config = self.model, self.config
        if task == "query":
            return token_limit(self.tokenizer, model.context_encoder, config.max_context_length)
        return token_limit(self.tokenizer, model.candidate_encoder, config.max_candidate_length)

    def forward(self, features: dict[str, Any], task: Task | None = None) -> dict[str, Any]:
        """Adds `sentence_embedding`, `(batch, m, dim)` or `(batch, dim)`, and `token_embeddings`."""
        task = task or features.get("task")
        if task not in ("query", "document"):
            raise ValueError(ASK_FOR_A_SIDE)
        names = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "turn_ids")
        inputs = {name: features[name] for name in names if features.get(name) is not None}
        output, vectors = self.model.encode_side("context" if task == "query" else "candidate", inputs)
        return {**features, "token_embeddings": output.last_hidden_state, "sentence_embedding": vectors}

    @property
    def max_seq_length(self) -> int:
        """Tokens kept of a context. Setting it limits both sides."""
        return self.limit("query")

    @max_seq_length.setter
    def max_seq_length(self, value: int | None) -> None:
        self.config.max_context_length = self.config.max_candidate_length = value

    def get_embedding_dimension(self) -> int:
        return self.config.hidden_size

    def get_config_dict(self) -> dict[str, Any]:
        shown = sorted(self.config.own_fields() - {"context_encoder", "candidate_encoder"})
        return {"architecture": type(self.model.context_encoder).__name__} | {
            name: getattr(self.config, name) for name in shown
        }

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Write the model (always safetensors) and the tokenizer; the rest of the folder is not this module's."""
        if not safe_serialization:
            raise ValueError("Poly-encoders are saved as safetensors only: leave safe_serialization at True.")
        self.model.save_pretrained(output_path)
        self.tokenizer.save_pretrained(output_path)

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        config_kwargs: dict[str, Any] | None = None,
        backend: str = "torch",
        **kwargs: Any,
    ) -> "PolyEncoderModule":
        """Load a saved Poly-encoder from a local folder or the Hub; parameters as for `SentenceTransformer`.

        Raises:
            ValueError: `config_kwargs` ask for another architecture than the saved one.
            OSError: the weights are missing or incomplete.
        """
        if backend != "torch":
            raise ValueError(f"A Poly-encoder runs on backend='torch', not {backend!r}.")
        hub = {
            "subfolder": subfolder,
            "token": token,
            "cache_dir": cache_folder,
            "revision": revision,
            "local_files_only": local_files_only,
        }
        config = PolyEncoderConfig.from_pretrained(model_name_or_path, **hub)
        model = load_saved(model_name_or_path, config, config_kwargs or {}, **hub, **(model_kwargs or {}))
        tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, **hub, **(processor_kwargs or {}))
        return cls(model, tokenizer)


def load_saved(path: str, config: PolyEncoderConfig, options: dict[str, Any], **kwargs: Any) -> PolyEncoderModel:
    """A saved model with some options of `config` changed, which its weights must allow.

    `share_encoders=False` makes two equal encoders of one, so that one side can be trained and the other stay.

    Raises:
        ValueError: options that the weights were not trained for.
        OSError: weights that are missing or incomplete.
    """
    divide = config.share_encoders and options.get("share_encoders") is False
    apply_options(config, {name: options[name] for name in options if not (divide and name == "share_encoders")}, path)
    model = load_checked(path, config=config, **kwargs)
    if not divide:
        return model
    config = copy.deepcopy(model.config)
    config.share_encoders, config.candidate_encoder = False, copy.deepcopy(config.context_encoder)
    divided = PolyEncoderModel(config, model.context_encoder, copy.deepcopy(model.context_encoder))
    divided.load_state_dict(model.state_dict(), strict=False)  # codes and what else is in no encoder
    divided.name_or_path = model.name_or_path
    return divided.to(model.device, model.dtype).eval()


def apply_options(config: PolyEncoderConfig, options: dict[str, Any], path: str) -> None:
    """Set options on a saved model's configuration; refuse those that its weights were not trained for."""
    config.refuse_misspelt(options)
    for name, value in options.items():
        name = config.attribute_map.get(name, name)
        saved = getattr(config, name, None)
        if name in config.own_fields() - RUNTIME_OPTIONS and value != saved:
            raise ValueError(
                f"{path} is a trained Poly-encoder with {name}={saved!r}; {name}={value!r} would need training anew. "
                f"Leave the option out, or start from an encoder checkpoint."
            )
        setattr(config, name, value)
    config.validate()


def load_checked(path: str, **kwargs: Any) -> PolyEncoderModel:
    """`PolyEncoderModel.from_pretrained` that never leaves a weight at random.

    Raises:
        OSError: the weight file lacks weights that the configuration calls for.
    """
    # Sizes that differ are let through here only to be named below, more clearly than upstream does.
    model, info = PolyEncoderModel.from_pretrained(
        path, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
    )
    mismatched = [
        f"{name} (there {tuple(there)}, expected {tuple(here)})" for name, there, here in info["mismatched_keys"]
    ]
    if wrong := sorted(info["missing_keys"]) + sorted(mismatched):
        raise OSError(
            f"The weights in {path} do not hold {', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''} "
            f"({len(wrong)} in all), which its config.json calls for. Download or save the model again."
        )
    return model
