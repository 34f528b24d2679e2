"""What the Bi-encoder and the Poly-encoder share: two sides, contexts in all their forms, ranking, safe saving."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer
from torch import nn
from torch.nn.functional import normalize
from transformers import AutoConfig, PreTrainedTokenizerFast

from poly_encoders.cards import WithCard
from poly_encoders.conversations import Context, candidate_texts, context_text, context_texts, is_single_context
from poly_encoders.hub_files import add_hub_files
from poly_encoders.model_files import CARD
from poly_encoders.modeling import staged_folder
from poly_encoders.modeling.ranking import best_first, checked_top_k, refuse_nonfinite
from poly_encoders.pushing import HubPushing

Task = Literal["query", "document"]

ASK_FOR_A_SIDE = (
    "Contexts and candidates are read differently, so the model must know which these are: call encode_query(contexts) "
    "or encode_document(candidates), or pass task='query' or task='document'."
)


class Ranked(TypedDict, total=False):
    """One entry of a ranking, as sentence-transformers' `CrossEncoder.rank` gives it."""

    corpus_id: int  # position in the list of candidates
    score: float  # comparable only within one context
    text: str  # with return_documents=True


class TwoSidedEncoder(HubPushing, WithCard, SentenceTransformer):
    """A SentenceTransformer that encodes contexts and candidates apart. Base of `PolyEncoder` and `BiEncoder`."""

    @property
    def turn_separator(self) -> str:
        """Text between the turns of a conversation."""
        raise NotImplementedError

    @property
    def max_turns(self) -> int | None:
        """Turns kept of a conversation, its last; `None` for all."""
        raise NotImplementedError

    def vector_shape(self, task: Task) -> tuple[int, ...]:
        """Shape of one text's vectors on this side."""
        return (self.get_embedding_dimension() or 0,)

    def context_texts(self, contexts: Any) -> list[str]:
        """A batch of contexts as the texts that the tokenizer sees."""
        return context_texts(contexts, self.turn_separator, self.max_turns)

    def encode(
        self,
        inputs: Any,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        output_value: Literal["sentence_embedding", "token_embeddings"] | None = "sentence_embedding",
        precision: Literal["float32", "int8", "uint8", "binary", "ubinary"] = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: str | list[str | torch.device] | None = None,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        *,
        task: Task | None = None,
        **kwargs: Any,
    ) -> Any:
        """Encode contexts (`encode_query`) or candidates (`encode_document`); options as `SentenceTransformer.encode`.

        `normalize_embeddings` scales every single vector to length 1, also where a text has several; all-zero ones,
        which are padding, stay. `precision` other than float32 is for texts of one vector, to store them: scores need
        float32.

        Returns:
            `(n, *vector_shape(task))` numbers of the model's dtype, float32 for bfloat16 in numpy; without the first
            axis for a single input.

        Raises:
            ValueError: no side named (no `task`), vectors that are not finite, an option that makes no sense.
            TypeError: an input that is no text (no conversation, on the context side).
        """
        if task not in ("query", "document"):
            raise ValueError(ASK_FOR_A_SIDE)
        if output_value not in ("sentence_embedding", "token_embeddings", None):
            raise ValueError(f"output_value is 'sentence_embedding', 'token_embeddings' or None, not {output_value!r}.")
        several = len(self.vector_shape(task)) > 1
        if several and precision not in (None, "float32"):
            raise ValueError(
                f"precision={precision!r} is for candidates that are stored; context vectors are few and all-zero ones "
                "mean padding, so they stay float32. Leave precision out for contexts."
            )
        single = is_single_context(inputs) if task == "query" else isinstance(inputs, str)
        batch = [inputs] if single else inputs
        texts = self.context_texts(batch) if task == "query" else candidate_texts(batch)
        vectors = super().encode(
            texts,
            prompt_name=prompt_name,
            prompt=prompt,
            batch_size=batch_size,
            show_progress_bar=show_progress_bar,
            output_value=output_value,
            precision=precision,
            convert_to_numpy=convert_to_numpy,
            convert_to_tensor=convert_to_tensor,
            device=device,
            # Upstream normalises axis 1, which is not the vectors' axis where a text has several.
            normalize_embeddings=normalize_embeddings and not several,
            truncate_dim=truncate_dim,
            task=task,
            **kwargs,
        )
        if len(texts) == 0 and not isinstance(vectors, list):  # upstream's has lost its axes
            *several_axis, width = self.vector_shape(task)
            empty = torch.empty(
                (0, *several_axis, min(width, truncate_dim or width)), device=getattr(vectors, "device", None)
            )
            return empty.numpy() if isinstance(vectors, np.ndarray) else empty
        if normalize_embeddings and several and output_value == "sentence_embedding":
            vectors = _normalised(vectors)
        return vectors[0] if single else vectors

    def _inference(self, inputs: list[Any], **kwargs: Any) -> Any:
        return finite(super()._inference(inputs, **kwargs))

    def preprocess(
        self, inputs: Sequence[Any], prompt: str | None = None, task: Task | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Token features of one side; contexts in any of their forms."""
        if task not in ("query", "document"):
            raise ValueError(ASK_FOR_A_SIDE)
        texts = self.context_texts(inputs) if task == "query" else candidate_texts(inputs)
        return super().preprocess(texts, prompt=prompt, task=task, **kwargs)

    def rank(
        self,
        context: Context,
        candidates: Sequence[str],
        top_k: int | None = None,
        return_documents: bool = False,
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        device: str | None = None,
    ) -> list[Ranked]:
        """Rank candidates for one context.

        Args:
            context: A text, a list of turns, or a list of chat messages, oldest first.
            candidates: The texts to choose from; an empty list gives an empty ranking.
            top_k: How many to return; all when left out.
            return_documents: Add the candidate's text to each entry.
            prompt_name, prompt: Put before the context, as in `encode_query`.
            batch_size, show_progress_bar, device: As in `encode`.

        Returns:
            `[{"corpus_id": position, "score": float, "text": ...}, ...]`, best first; equal scores in the order given.

        Raises:
            TypeError, ValueError: as `encode`.
        """
        text, texts = ranking_inputs(self, context, candidates, top_k)
        if not texts:
            return []
        options: dict[str, Any] = {"batch_size": batch_size, "device": device, "convert_to_tensor": True}
        contexts = self.encode_query([text], prompt_name=prompt_name, prompt=prompt, show_progress_bar=False, **options)
        vectors = self.encode_document(texts, show_progress_bar=show_progress_bar, **options)
        return ranking(self.similarity(contexts, vectors)[0], texts, top_k, return_documents)

    def save(self, path: str, *args: Any, **kwargs: Any) -> None:
        """As upstream's, but a save that fails leaves what was at `path` as it was."""
        forget_last_call(self)
        save_staged(super().save, path, *args, **kwargs)


def finite(outputs: Any) -> Any:
    """What a model gave, if it holds no NaN and no infinity.

    Raises:
        ValueError: it does.
    """
    for output in outputs if isinstance(outputs, list) else [outputs]:
        for tensor in output.values() if isinstance(output, dict) else [output]:
            if isinstance(tensor, torch.Tensor):
                refuse_nonfinite(tensor)
    return outputs


def _normalised(vectors: Any) -> Any:
    if isinstance(vectors, np.ndarray):
        return normalize(torch.from_numpy(vectors), dim=-1).numpy()
    if isinstance(vectors, list):
        return [normalize(vector, dim=-1) for vector in vectors]
    return normalize(vectors, dim=-1)


def ranking_inputs(model: Any, context: Any, candidates: Any, top_k: int | None) -> tuple[str, list[str]]:
    """The checked texts of a ranking by `model`."""
    checked_top_k(top_k)
    return context_text(context, model.turn_separator, model.max_turns), candidate_texts(candidates)


def ranking(scores: torch.Tensor, texts: list[str], top_k: int | None, return_documents: bool) -> list[Ranked]:
    """`(n,)` scores as a ranking, equal ones in the order given."""
    entries = [Ranked(corpus_id=index, score=score) for index, score in best_first(scores, top_k)]
    if return_documents:
        for entry in entries:
            entry["text"] = texts[entry["corpus_id"]]
    return entries


def freeze_pooler(encoder: nn.Module) -> None:
    """Take the pooler of an encoder whose token vectors are used out of training.

    It is kept for whoever loads it, but would never get a gradient, which distributed training refuses.
    """
    for name, parameter in encoder.named_parameters():
        if name.startswith("pooler."):
            parameter.requires_grad_(False)


def forget_last_call(model: nn.Module) -> None:
    """Have a model's tokenizers forget how they cut and padded last, so that what is saved does not depend on it."""
    for module in model.modules():
        tokenizer = getattr(module, "tokenizer", None)
        if isinstance(tokenizer, PreTrainedTokenizerFast):
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.no_padding()


def save_staged(save: Callable[..., None], path: Any, *args: Any, **kwargs: Any) -> None:
    """Run a `save(path, ...)` so that it writes beside `path` and moves in when complete; safetensors only."""
    if path is None:
        raise ValueError("Give the folder to save the model to.")
    if not kwargs.get("safe_serialization", True):
        raise ValueError("Models are saved as safetensors only: leave safe_serialization at True.")
    with staged_folder(path) as staging:
        if (card := Path(path, CARD)).is_file():
            shutil.copyfile(card, Path(staging, CARD))  # what a user wrote into it goes into the new one
        save(staging, *args, **kwargs)
        add_hub_files(staging)


@contextmanager
def clear_load_errors(path: Any) -> Iterator[None]:
    """Say of weights that cannot be read what is wrong with them and what to do."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(
            f"The weights in {path} are truncated or corrupted ({error}). Download or save the model again."
        ) from error
    except json.JSONDecodeError as error:
        raise OSError(
            f"A JSON file in {path} is truncated or corrupted ({error}). Download or save the model again."
        ) from error


def refuse_poly_encoder(path: str, options: dict[str, Any]) -> None:
    """Say of a Poly-encoder which class loads it, before another class fails on it.

    Raises:
        ValueError: the checkpoint at `path` is one.
    """
    hub = {
        name: options[name]
        for name in ("token", "revision", "local_files_only", "trust_remote_code")
        if name in options
    }
    config = AutoConfig.from_pretrained(path, cache_dir=options.get("cache_folder"), **hub)
    if config.model_type == "poly-encoder":
        raise ValueError(f"{path} is a PolyEncoder; load it with poly_encoders.PolyEncoder(path).")
