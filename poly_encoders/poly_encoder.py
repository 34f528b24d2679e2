"""The Poly-encoder as a sentence-transformers model: encode both sides, score, rank, save, load."""

import os
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from poly_encoders.building import BuildOptions, module_from_encoder, module_from_sentence_transformer, settings_of
from poly_encoders.cards import PolyEncoderModelCardData
from poly_encoders.explaining import Explanation, explain
from poly_encoders.modeling import PolyEncoderConfig
from poly_encoders.modeling.scoring_poly_encoder import best_first
from poly_encoders.modeling.text_poly_encoder import Context, candidate_texts, checked_count, context_text
from poly_encoders.poly_encoder_module import PolyEncoderModule
from poly_encoders.ranker import Ranked, Task, TextOptions, clear_load_errors, local_path, ranking
from poly_encoders.scoring import PreparedCandidates, score
from poly_encoders.scoring import top_k as find_best
from poly_encoders.two_sided import TwoSidedEncoder, refuse_other_lengths

ContextVectors = Literal["learnt_codes", "first_m", "last_m", "first_and_last_m", "turns", "turns_and_codes"]
PROMPT_SETTINGS = frozenset({"prompts", "default_prompt_name"})  # of a checkpoint that is built on
Vectors = Tensor | np.ndarray | list[Tensor] | list[np.ndarray]


class PolyEncoder(TwoSidedEncoder):
    r"""A Poly-encoder for text: m vectors for a context, one for a candidate, attention between them as the score.

    Args:
        model_name_or_path: A saved Poly-encoder, a SentenceTransformer (whose weights and pooling it starts from), or
            any encoder; a local folder or a Hub id.
        context_vectors: How a context becomes m vectors. A new model has `"turns"`, one vector for each of the last m
            turns, which needs no training: candidates' vectors are those of the checkpoint. `"learnt_codes"`, to be
            trained, has codes that start far from each other or, with `normalize=False`, is the paper's Poly-encoder:
            raw dot products, two encoders, codes near zero. `"first_m"`, `"last_m"` and `"first_and_last_m"` are the
            paper's too. `"turns_and_codes"` has m of either.
        num_codes: m, the number of context vectors. For a new model 32 with turns, else 64.
        normalize: Vectors of length 1 from both sides, so that scores are cosines: for a new model with turns or learnt
            codes, unless its checkpoint scores by dot products.
        final_temperature: Of the attention over the context vectors. 0.025 for a new model with cosines, else 1.
        last_turn_share: How much of the last turn is in each turn's vector. 0.5 for a new model.
        reduction: How a candidate becomes one vector: `"mean"`, `"first"` or `"first_m_mean"`; a new model follows the
            checkpoint's pooling.
        share_encoders: One encoder for both sides, as a new model with turns has, or with codes and cosines; or two
            that start equal.
        max_context_length, max_candidate_length: Tokens kept: the last of a context, the first of a candidate.
        turn_separator: Text between the turns of a conversation. For a new model a newline or, where the tokenizer
            drops newlines, its separator token.
        max_turns: Turns kept of a conversation, its last; all when left out.
        **kwargs: All that `SentenceTransformer` takes (`device`, `prompts`, `revision`, `token`, `model_kwargs`, ...);
            further fields of `PolyEncoderConfig` go into `config_kwargs`.

    Raises:
        ValueError: options that a saved model was not trained with, or a checkpoint that cannot become a Poly-encoder.
        OSError: files that are missing, truncated or corrupted.

    Example:
        >>> model = PolyEncoder("sentence-transformers/all-MiniLM-L6-v2", num_codes=16)  # doctest: +SKIP
        >>> model.rank(["Hi!", "Hello. Any plans for tonight?"], ["A film, perhaps.", "Forty-two."])  # doctest: +SKIP
    """

    model_type = "PolyEncoder"
    model_card_data_class = PolyEncoderModelCardData
    # The one class outside sentence_transformers that modules.json may name without trust_remote_code.
    _module_classes: ClassVar[dict[str, type[nn.Module]]] = {
        f"{PolyEncoderModule.__module__}.{PolyEncoderModule.__name__}": PolyEncoderModule,
        "poly_encoders.poly_module.PolyEncoderModule": PolyEncoderModule,  # its name in models saved before
    }

    def __init__(
        self,
        model_name_or_path: str | os.PathLike[str] | None = None,
        *,
        num_codes: int | None = None,
        context_vectors: ContextVectors | None = None,
        reduction: Literal["first", "mean", "first_m_mean"] | None = None,
        normalize: bool | None = None,
        final_temperature: float | None = None,
        last_turn_share: float | None = None,
        share_encoders: bool | None = None,
        max_context_length: int | None = None,
        max_candidate_length: int | None = None,
        turn_separator: str | None = None,
        max_turns: int | None = None,
        **kwargs: Any,
    ) -> None:
        path = local_path(model_name_or_path)
        given = TextOptions(max_context_length, max_candidate_length, turn_separator, max_turns).given()
        architecture = {
            "num_codes": checked_count(num_codes, "num_codes"),
            "context_vectors": context_vectors,
            "reduction": reduction,
            "normalize": normalize,
            "final_temperature": final_temperature,
            "last_turn_share": last_turn_share,
            "share_encoders": share_encoders,
        }
        given |= {name: value for name, value in architecture.items() if value is not None}
        if given and path is None:
            raise ValueError(f"{', '.join(given)}: these options need a model_name_or_path to build on.")
        if kwargs.get("backend", "torch") != "torch":
            raise ValueError(f"A Poly-encoder runs on backend='torch', not {kwargs['backend']!r}.")
        wishes = {**(kwargs.get("config_kwargs") or {}), **given}
        kwargs["config_kwargs"] = {PolyEncoderConfig.attribute_map.get(name, name): wishes[name] for name in wishes}
        with clear_load_errors(path):
            super().__init__(path, **kwargs)

    # --- loading and saving ----------------------------------------------------------------------------------------

    def _load_default_modules(self, model_name_or_path: str, **kwargs: Any) -> tuple[list[nn.Module], dict[str, Any]]:
        return self._build(module_from_encoder, model_name_or_path, **kwargs)

    def _load_converted_modules(
        self, model_name_or_path: str, *, model_type: str | None = None, **kwargs: Any
    ) -> tuple[list[nn.Module], dict[str, Any]]:
        if model_type != SentenceTransformer.model_type:
            raise ValueError(
                f"{model_name_or_path} is a {model_type}, not a PolyEncoder, a SentenceTransformer or a plain encoder. "
                f"Load it with {model_type}(path), or build a Poly-encoder on the encoder it was trained from."
            )
        return self._build(module_from_sentence_transformer, model_name_or_path, keeps_prompts=True, **kwargs)

    def _build(
        self, build: Any, path: str, keeps_prompts: bool = False, **kwargs: Any
    ) -> tuple[list[nn.Module], dict[str, Any]]:
        hub = {
            "token": kwargs.get("token"),
            "cache_dir": kwargs.get("cache_folder"),
            "revision": kwargs.get("revision"),
            "local_files_only": kwargs.get("local_files_only", False),
        }
        options = BuildOptions(
            kwargs.get("trust_remote_code", False),
            kwargs.get("model_kwargs") or {},
            kwargs.get("processor_kwargs") or {},
            kwargs.get("config_kwargs") or {},
        )
        module = build(path, hub, options)
        if keeps_prompts:  # the weights know texts with them, and so do the vectors of an index
            saved = settings_of(path, hub)
            self._parse_model_config({name: saved[name] for name in PROMPT_SETTINGS & saved.keys()})
        # Only a Poly-encoder that was loaded as a whole has a name; one that was built is as its checkpoint comes.
        self.model_card_data.is_untrained = not module.model.name_or_path
        if not hub["local_files_only"]:
            self.model_card_data.set_base_model(path, revision=hub["revision"])
        return [module], {}

    # --- encoding --------------------------------------------------------------------------------------------------

    @property
    def turn_separator(self) -> str:
        return self[0].config.turn_separator

    @property
    def max_turns(self) -> int | None:
        return self[0].config.max_turns

    @property
    def scores_are_cosines(self) -> bool:
        """Whether scores lie between -1 and 1, so that a loss scales them."""
        return self[0].config.normalize

    def length_limits(self) -> tuple[int, int]:
        """Tokens kept of a context and of a candidate, special tokens included."""
        return self[0].limit("query"), self[0].limit("document")

    def vector_shape(self, task: Task) -> tuple[int, ...]:
        vector = super().vector_shape(task)
        return (self[0].config.num_context_vectors, *vector) if task == "query" else vector

    # --- scoring ---------------------------------------------------------------------------------------------------

    _similarity_fn_name = "custom"  # upstream's storage; it must not pick one of its own functions

    @property
    def similarity_fn_name(self) -> str:
        """Always `"custom"`, MTEB's name for a model that brings its own `similarity`."""
        return "custom"

    @similarity_fn_name.setter
    def similarity_fn_name(self, value: str | None) -> None:
        if value not in (None, "custom"):
            raise ValueError(f"A Poly-encoder scores by attention over its context vectors, not by {value!r}.")

    @property
    def final_scale(self) -> float | Tensor:
        """Factor on the dots in the softmax of the score: give it to `poly_encoders.scoring.top_k` as `scale`.

        A number; in training a tensor where the temperature is learnt.
        """
        return self[0].model.final_scale

    def similarity(self, embeddings1: Vectors, embeddings2: Vectors) -> Tensor:
        """Score every candidate against every context.

        Args:
            embeddings1: Context vectors of `encode_query`, `(n, m, dim)`, or `(m, dim)` for one context.
            embeddings2: Candidate vectors of `encode_document`, `(k, dim)`, or `(dim,)` for one candidate.

        Returns:
            `(n, k)` float32 scores, comparable within a row.

        Upstream's `RerankingEvaluator` scores by the cosine unless it is told otherwise, which means nothing here: give
        it `similarity_fct=model.similarity`.

        Raises:
            ValueError: other shapes, as of two sets of candidates; candidates that are not of length 1 where scores are
                cosines.
            TypeError: quantised vectors.
        """
        contexts, candidates = self._context_vectors(embeddings1), self._candidate_vectors(embeddings2)
        if candidates.numel() == 0:
            return contexts.new_empty((len(contexts), 0))
        return score(contexts, candidates[None] if candidates.dim() == 1 else candidates, self.final_scale)

    def similarity_pairwise(self, embeddings1: Vectors, embeddings2: Vectors) -> Tensor:
        """Score the i-th candidate against the i-th context: `(n, m, dim)` and `(n, dim)` to `(n,)`."""
        contexts, candidates = self._context_vectors(embeddings1), self._candidate_vectors(embeddings2)
        if candidates.dim() == 1:
            candidates = candidates[None]
        if len(contexts) != len(candidates):
            raise ValueError(
                f"{len(contexts)} contexts and {len(candidates)} candidates make no pairs; pass as many of each."
            )
        return score(contexts, candidates[:, None], self.final_scale)[:, 0]

    def rank(
        self,
        context: Context,
        candidates: Sequence[str],
        top_k: int | None = None,
        return_documents: bool = False,
        *,
        candidate_vectors: PreparedCandidates | Vectors | None = None,
        **options: Any,
    ) -> list[Ranked]:
        """Rank candidates for one context, as `Ranker.rank` says, which has the other arguments.

        Args:
            candidate_vectors: Those of the candidates, `encode_document(candidates)`, or what `scoring.prepare` made of
                them: then the context alone is encoded, and with a `top_k`, `scoring.top_k` finds the best.

        Raises:
            ValueError: vectors of another number than the candidates.
        """
        if candidate_vectors is None:
            return super().rank(context, candidates, top_k, return_documents, **options)
        texts, k = candidate_texts(candidates), checked_count(top_k, "top_k", least=0)
        if len(candidate_vectors) != len(texts):
            raise ValueError(f"{len(texts)} candidates have {len(candidate_vectors)} vectors; give one for each.")
        if not texts:
            return []
        named = {name: options.pop(name, None) for name in ("prompt_name", "prompt")}
        contexts = self.encode_query(
            context_text(context, self.turn_separator, self.max_turns),
            prompt=self.prompt_of("query", **named),
            convert_to_tensor=True,
            **{**options, "show_progress_bar": False},
        )
        if isinstance(candidate_vectors, PreparedCandidates):
            held: Any = candidate_vectors
            if self.scores_are_cosines:
                refuse_other_lengths(held.norms[:, None])
        else:
            held = self._candidate_vectors(candidate_vectors).to(contexts.device)
        if k is None:  # of all of them, exact scores would take long
            vectors = held.vectors if isinstance(held, PreparedCandidates) else held
            places = {text: place for place, text in reversed([*enumerate(texts)])}  # of equal texts, the first
            scores = self.similarity(contexts[None], torch.as_tensor(vectors, device=contexts.device))[0]
            pairs = best_first(scores.cpu()[[places[text] for text in texts]])
        else:
            best = find_best(contexts[None], held, k, scale=float(self.final_scale))
            pairs = [*zip(best.indices[0].tolist(), best.scores[0].tolist(), strict=True)]
        return ranking(pairs, texts if return_documents else None)

    def explain(
        self,
        context: Context,
        candidate: str,
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        device: str | None = None,
    ) -> Explanation:
        """Which tokens are in each context vector, of a turn or a code, and which vectors decided for this candidate.

        Args:
            context: A text, a list of turns, or a list of chat messages, oldest first, as for `rank`.
            candidate: One text.
            prompt_name, prompt, device: As for `rank`.

        Returns:
            The tokens that were read, what each vector is, both attentions, the dot products and the score; see
            `Explanation`.

        Raises:
            TypeError: several candidates, or a context or candidate that is no text.
            ValueError: a conversation without turns, a text without tokens, a prompt name that the model lacks.

        Example:
            >>> why = model.explain(["Hi!", "Any plans for tonight?"], "A film, perhaps.")  # doctest: +SKIP
            >>> sorted(zip(why.token_weights, why.tokens), reverse=True)[:3]  # doctest: +SKIP
            >>> sorted(zip(why.final_attention, why.vectors), reverse=True)[:3]  # doctest: +SKIP
        """
        return explain(self, context, candidate, self.prompt_of("query", prompt_name, prompt), device)

    def _context_vectors(self, vectors: Vectors) -> Tensor:
        contexts, m = _floats(vectors), self[0].config.num_context_vectors
        if contexts.dim() == 2:
            contexts = contexts[None]
        if contexts.dim() != 3 or contexts.shape[1] != m:
            raise ValueError(
                f"The first argument is {tuple(_floats(vectors).shape)}; expected context vectors (n, {m}, dim), "
                f"or ({m}, dim) for one. Contexts come from encode_query, candidates from encode_document."
            )
        return contexts

    def _candidate_vectors(self, vectors: Vectors) -> Tensor:
        candidates = _floats(vectors)
        if self.scores_are_cosines and not candidates.requires_grad and candidates.dim() in (1, 2):
            refuse_other_lengths(candidates)
        return candidates


def _floats(vectors: Vectors) -> Tensor:
    """Vectors in any container as one tensor of floating-point numbers."""
    if isinstance(vectors, list):
        if not vectors:
            return torch.empty(0)
        tensor = torch.stack([torch.as_tensor(vector) for vector in vectors])
    else:
        tensor = torch.as_tensor(vectors)
    if not tensor.is_floating_point():
        raise TypeError(
            f"These vectors are {tensor.dtype}: quantised codes, whose dot products are no scores. "
            "Encode with precision='float32'."
        )
    return tensor
