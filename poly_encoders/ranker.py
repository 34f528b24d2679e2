"""What all three encoders share: options of the text, ranking, prompts, and saving that loses nothing."""

import json
import os
import shutil
import threading
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypedDict

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedTokenizerBase

from poly_encoders.cards import CARD, WithCard
from poly_encoders.hub.pushing import HubPushing
from poly_encoders.modeling.scoring_poly_encoder import best_first, refuse_nonfinite
from poly_encoders.modeling.text_poly_encoder import (
    TURN_SEPARATOR,
    Context,
    candidate_texts,
    checked_count,
    context_text,
    context_texts,
    make_ready,
    plain_tokens,
)
from poly_encoders.saving import staged_folder

# Held where upstream reads texts, for models that are left as they are: it tells their tokenizer how to cut and pad,
# which threads share. One for all, because a model with a lock could be neither copied nor pickled.
UPSTREAM_READS = threading.RLock()

Task = Literal["query", "document"]  # sentence-transformers' words for the sides of a context and of a candidate

# Names under which sentence-transformers looks for the prompt of each side.
_PROMPT_NAMES: dict[Task, tuple[str, ...]] = {"query": ("query",), "document": ("document", "passage", "corpus")}


class Ranked(TypedDict, total=False):
    """One entry of a ranking, as sentence-transformers' `CrossEncoder.rank` gives it."""

    corpus_id: int  # position in the list of candidates
    score: float  # comparable only within one context
    text: str  # with return_documents=True


@dataclass
class TextOptions:
    """How a model reads texts; `None` where nothing was said. A bad value is a ValueError, whoever it comes from."""

    max_context_length: int | None = None  # tokens kept of a context, its last
    max_candidate_length: int | None = None  # tokens kept of a candidate, its first
    turn_separator: str | None = None
    max_turns: int | None = None  # turns kept of a conversation, its last

    def __post_init__(self) -> None:
        for name in ("max_context_length", "max_candidate_length", "max_turns"):
            setattr(self, name, checked_count(getattr(self, name), name))
        if not isinstance(self.turn_separator, str | None):
            raise ValueError(f"turn_separator must be a text, got {self.turn_separator!r}.")

    def given(self) -> dict[str, Any]:
        """The options about which something was said."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def filled(self, saved: Mapping[str, Any]) -> "TextOptions":
        """These options, and what `saved` says where nothing was said."""
        names = {field.name for field in fields(self)}
        return TextOptions(**{**{name: saved[name] for name in names & saved.keys()}, **self.given()})


class Ranker(HubPushing, WithCard):
    """Mixed in before a class of sentence-transformers."""

    prompts: dict[str, str]
    default_prompt_name: str | None

    @property
    @abstractmethod
    def turn_separator(self) -> str:
        """Text between the turns of a conversation."""

    @property
    @abstractmethod
    def max_turns(self) -> int | None:
        """Turns kept of a conversation, its last; `None` for all."""

    @abstractmethod
    def length_limits(self) -> tuple[int, int]:
        """Tokens kept at most of a context and of a candidate."""

    @abstractmethod
    def score_texts(self, context: str, candidates: list[str], prompt: str | None, **options: Any) -> Tensor:
        """Scores `(n,)` of n different checked candidates, at least one, for a checked context behind its prompt."""

    def context_texts(self, contexts: Any) -> list[str]:
        """A batch of contexts as the texts that the tokenizer sees."""
        return list(context_texts(contexts, self.turn_separator, self.max_turns))

    def prompt_of(self, task: Task, prompt_name: str | None = None, prompt: str | None = None) -> str | None:
        """What is put before the texts of a side: the prompt, the one of this name, the side's own, the default one.

        Raises:
            ValueError: the model has no prompt of this name.
        """
        if prompt is not None:
            return prompt
        if prompt_name is None:
            own = (name for name in _PROMPT_NAMES[task] if self.prompts.get(name) is not None)
            prompt_name = next(own, self.default_prompt_name)
            return None if prompt_name is None else self.prompts.get(prompt_name)
        if prompt_name not in self.prompts:
            raise ValueError(f"The model has no prompt {prompt_name!r}, only {sorted(self.prompts)}.")
        return self.prompts[prompt_name]

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
        **kwargs: Any,
    ) -> list[Ranked]:
        """Rank candidates for one context.

        Args:
            context: A text, a list of turns, or a list of chat messages, oldest first.
            candidates: The texts to choose from; an empty list gives an empty ranking.
            top_k: How many to return; all when left out.
            return_documents: Add the candidate's text to each entry.
            prompt_name, prompt: Put before the context, as in `encode_query`.
            batch_size, show_progress_bar, device: As in `encode`, or `predict` for a Cross-encoder.
            **kwargs: What else a Cross-encoder's `predict` takes; nothing for the others.

        Returns:
            `[{"corpus_id": position, "score": float, "text": ...}, ...]`, best first; equal scores in the order given.
            Equal texts have equal scores.

        Raises:
            TypeError, ValueError: what is no context or no list of candidates, options out of range.
        """
        top_k = checked_count(top_k, "top_k", least=0)
        text, texts = context_text(context, self.turn_separator, self.max_turns), candidate_texts(candidates)
        if not texts:
            return []
        # Each text once: of equal rows, a matrix product may make numbers that differ in the last bit.
        places = {candidate: place for place, candidate in enumerate(dict.fromkeys(texts))}
        options = {"batch_size": batch_size, "show_progress_bar": show_progress_bar, "device": device, **kwargs}
        scores = self.score_texts(text, list(places), self.prompt_of("query", prompt_name, prompt), **options)
        scores = scores.float().cpu()[[places[candidate] for candidate in texts]]
        return ranking(best_first(scores, top_k), texts if return_documents else None)

    def _inference(self, inputs: list[Any], **kwargs: Any) -> Any:
        outputs = super()._inference(inputs, **kwargs)  # type: ignore[misc]
        for output in outputs if isinstance(outputs, list) else [outputs]:
            for tensor in output.values() if isinstance(output, dict) else [output]:
                if isinstance(tensor, Tensor):
                    refuse_nonfinite(tensor)
        return outputs

    def save(self, path: str, *args: Any, **kwargs: Any) -> None:
        """As upstream's, but a save that fails leaves what was at `path` as it was; safetensors only."""
        if path is None:
            raise ValueError("Give the folder to save the model to.")
        if not kwargs.get("safe_serialization", True):
            raise ValueError("Models are saved as safetensors only: leave safe_serialization at True.")
        for module in self.modules():  # type: ignore[attr-defined]
            tokenizer = getattr(module, "tokenizer", None)
            if isinstance(tokenizer, PreTrainedTokenizerBase):
                make_ready(tokenizer)  # what is saved does not depend on how it was called last
        with staged_folder(path) as staging:
            if (card := Path(path, CARD)).is_file():
                shutil.copyfile(card, Path(staging, CARD))
            self._save_into(staging, *args, **kwargs)

    def _save_into(self, folder: str, *args: Any, **kwargs: Any) -> None:
        """Write everything into an empty folder."""
        super().save(folder, *args, **kwargs)  # type: ignore[misc]


def ranking(best: Iterable[tuple[int, float]], texts: Sequence[str] | None) -> list[Ranked]:
    """What `rank` gives of positions with their scores, with the texts where they are given."""
    if texts is None:
        return [Ranked(corpus_id=index, score=score) for index, score in best]
    return [Ranked(corpus_id=index, score=score, text=texts[index]) for index, score in best]


def default_separator(tokenizer: Any) -> str:
    r"""What a new model puts between turns: a newline, or the tokenizer's separator token where it drops newlines."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or tokenizer.sep_token is None:
        return TURN_SEPARATOR
    with_newline, without = plain_tokens(tokenizer, [f"a{TURN_SEPARATOR}a", "a a"])["input_ids"]
    return f" {tokenizer.sep_token} " if with_newline == without else TURN_SEPARATOR


def local_path(path: str | os.PathLike[str] | None) -> str | None:
    """A path or a Hub id as the text that sentence-transformers takes."""
    return None if path is None else os.fspath(path)


def freeze_pooler(encoder: nn.Module) -> None:
    """Take the pooler of an encoder whose token vectors are used out of training.

    It is kept for whoever loads it, but would never get a gradient, which distributed training refuses.
    """
    for name, parameter in encoder.named_parameters():
        if name.startswith("pooler."):
            parameter.requires_grad_(False)


@contextmanager
def clear_load_errors(path: Any) -> Iterator[None]:
    """Say of a model that cannot be loaded what is wrong with it and what to do."""
    try:
        yield
    except (SafetensorError, json.JSONDecodeError) as error:
        what = "The weights" if isinstance(error, SafetensorError) else "A JSON file"
        raise OSError(
            f"{what} in {path} is truncated or corrupted ({error}). Download or save the model again."
        ) from error
    except StrictDataclassError as error:
        raise ValueError(str(error.__cause__ or error)) from error


def refuse_poly_encoder(path: str, options: dict[str, Any]) -> None:
    """Say of a Poly-encoder which class loads it, before another class fails on it.

    Raises:
        ValueError: the checkpoint at `path` is one.
    """
    names = ("token", "revision", "local_files_only", "trust_remote_code")
    hub = {name: options[name] for name in names if name in options}
    config = AutoConfig.from_pretrained(path, cache_dir=options.get("cache_folder"), **hub)
    if config.model_type == "poly-encoder":
        raise ValueError(f"{path} is a PolyEncoder; load it with poly_encoders.PolyEncoder(path).")
