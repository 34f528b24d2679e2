"""What a service does, whatever interface asks: score candidates for a context, and encode texts of either side."""

import contextlib
import ctypes
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from poly_encoders.bi_encoder import BiEncoder
from poly_encoders.cross_encoder import CrossEncoder
from poly_encoders.modeling.text_poly_encoder import (
    CheckedText,
    candidate_texts,
    context_text,
    plain_tokens,
    read_frame,
)
from poly_encoders.poly_encoder import PolyEncoder
from poly_encoders.ranker import Task
from poly_encoders.serving.batching import Batcher, Item, Work
from poly_encoders.serving.request_errors import InvalidRequestError, TooLargeError
from poly_encoders.serving.serve_options import ServeOptions
from poly_encoders.serving.service_metrics import ServiceMetrics
from poly_encoders.serving.vector_cache import Read, VectorCache

KINDS = {PolyEncoder: "poly-encoder", BiEncoder: "bi-encoder", CrossEncoder: "cross-encoder"}
CHARACTERS_A_TOKEN = 4  # of English, about: an estimate for the queue
SECONDS_TO_KEEP = 5  # free memory


@dataclass(frozen=True)
class Cost:
    """What an answer took: tokens read, texts cut, seconds in the queue."""

    tokens: int
    cut: int
    queued: float

    def usage(self) -> dict[str, int]:
        """As OpenAI, Jina and vLLM have it."""
        return {"prompt_tokens": self.tokens, "total_tokens": self.tokens}

    def headers(self) -> dict[str, str]:
        """For the answer, by text-embeddings-inference's names where it has one."""
        return {
            "x-compute-tokens": str(self.tokens),
            "x-queue-time": str(round(1000 * self.queued)),
            "x-truncated-texts": str(self.cut),
        }


class Service:
    """One model behind a queue, with a cache of candidates' vectors.

    Args:
        model: Any of the three kinds.
        options: Bounds.
    """

    def __init__(self, model: PolyEncoder | BiEncoder | CrossEncoder, options: ServeOptions) -> None:
        self.model, self.options, self.metrics = model, options, ServiceMetrics()
        self.kind = next(name for kind, name in KINDS.items() if isinstance(model, kind))
        self.limits = dict(zip(("query", "document"), model.length_limits(), strict=True))
        frame = read_frame(model.tokenizer)
        self._own_tokens = len(frame.before) + len(frame.after) if not isinstance(model, CrossEncoder) else 0
        dim = 0 if isinstance(model, CrossEncoder) else int(model.get_embedding_dimension() or 0)
        self._cache = VectorCache(dim, options.cache_bytes if dim else 0)
        self._given_back = time.monotonic()
        self.batcher = Batcher(
            self._encode,
            options.max_batch_tokens,
            options.max_waiting,
            options.max_waiting_tokens,
            self.metrics.observe_batch,
            self.metrics.observe_queue,
        )

    @property
    def context_vectors(self) -> int:
        """m, how many vectors a context has; 0 for a Cross-encoder."""
        if isinstance(self.model, PolyEncoder):
            return int(self.model[0].config.num_context_vectors)
        return 0 if isinstance(self.model, CrossEncoder) else 1

    # --- checking --------------------------------------------------------------------------------------------------

    def context(self, context: Any, what: str = "query") -> CheckedText:
        """A request's context as one text.

        Raises:
            InvalidRequestError, TooLargeError: it is none, empty, or too long to be looked at.
        """
        try:
            text = context_text(context, self.model.turn_separator, self.model.max_turns)
        except (TypeError, ValueError) as error:
            raise InvalidRequestError(f"{what}: {error}") from None
        return self._bounded(text, what)

    def candidates(self, texts: Sequence[str], what: str = "documents") -> list[CheckedText]:
        """As `context`, for candidates."""
        self.check_number(len(texts), what)
        try:
            checked = candidate_texts(texts)
        except (TypeError, ValueError) as error:
            raise InvalidRequestError(f"{what}: {error}") from None
        return [self._bounded(text, what, place) for place, text in enumerate(checked)]

    def check_number(self, number: int, what: str) -> None:
        """
        Raises:
            TooLargeError: more candidates than a request may have.
        """
        if number > (most := self.options.max_documents):
            raise TooLargeError(f"{what}: {number:,} are more than the {most:,} of a request. Send several requests.")

    def _bounded(self, text: CheckedText, what: str, place: int | None = None) -> CheckedText:
        where = what if place is None else f"{what}[{place}]"
        if not text or text.isspace():
            raise InvalidRequestError(f"{where} is empty. Give a text, or leave it out.")
        if len(text) > (most := self.options.max_characters):
            raise TooLargeError(f"{where} has {len(text):,} characters, more than the {most:,} of a text. Shorten it.")
        return text

    def prompt(self, task: Task, name: str | None) -> str | None:
        """The model's prompt of this name, or the side's own."""
        try:
            return self.model.prompt_of(task, name)
        except ValueError as error:
            raise InvalidRequestError(str(error)) from None

    def cut(self, texts: Sequence[str], max_tokens: int | None) -> list[str]:
        """The first so many tokens of each text; all of it where a slow tokenizer cannot tell where they end.

        Raises:
            InvalidRequestError: fewer than 1.
        """
        if max_tokens is not None and max_tokens < 1:
            raise InvalidRequestError(f"max_tokens_per_doc is a whole number of at least 1, not {max_tokens}.")
        if max_tokens is None or max_tokens >= self.limits["document"] or not self.model.tokenizer.is_fast:
            return list(texts)
        encodings = plain_tokens(self.model.tokenizer, list(texts)).encodings or []
        ends = [one.offsets[max_tokens - 1][1] if len(one.ids) > max_tokens else None for one in encodings]
        return [text[:end] for text, end in zip(texts, ends, strict=True)]

    # --- scoring and encoding --------------------------------------------------------------------------------------

    async def scores(
        self, contexts: Sequence[CheckedText], texts: Sequence[CheckedText], prompt_name: str | None = None
    ) -> tuple[Tensor, Cost]:
        """The score of each candidate for the one context, or of each pair, `(n,)`; and what it took.

        As `rank` has them: equal candidates have equal scores.
        """
        pairs = [(0 if len(contexts) == 1 else place, text) for place, text in enumerate(texts)]
        # The longest first: what does not fit into one batch is then with others of its length, and little is padding.
        unique = sorted(dict.fromkeys(pairs), key=lambda pair: -len(contexts[pair[0]]) - len(pair[1]))
        places = {pair: place for place, pair in enumerate(unique)}
        prompt = self.prompt("query", prompt_name)
        if isinstance(self.model, CrossEncoder):
            both = [(contexts[place], text) for place, text in unique]
            items = [Item(("pair", prompt), pair, sum(map(self._cost, pair, self.limits))) for pair in both]
            work = await self.batcher.run(items)
            scores, taken = torch.tensor([score for score, _ in work.results]), self._taken(work, work.results)
        else:
            queries = [Item(("query", prompt), text, self._cost(text, "query")) for text in contexts]

            def finish(found: list[tuple[Tensor, Read]], vectors: np.ndarray) -> Tensor:
                each = torch.stack([of_context for of_context, _ in found])
                each = each[[place for place, _ in unique]] if len(contexts) > 1 else each
                return self._similarity(each, torch.from_numpy(vectors))

            work, _, reads = await self._vectors([text for _, text in unique], queries, finish=finish)
            scores = work.outcome
            taken = self._taken(work, [*work.results[: len(queries)], *((None, read) for read in reads)])
        return scores[[places[pair] for pair in pairs]], taken

    async def embed(
        self, texts: Sequence[CheckedText], task: Task, prompt_name: str | None = None
    ) -> tuple[Tensor, Cost]:
        """Vectors `(n, dim)`, or `(n, m, dim)` of a Poly-encoder's contexts.

        Raises:
            InvalidRequestError: a Cross-encoder has none.
        """
        if isinstance(self.model, CrossEncoder):
            raise InvalidRequestError(
                "A Cross-encoder reads both texts together, without vectors: ask /rerank or /score."
            )
        if task == "document":
            work, vectors, reads = await self._vectors(texts, [], self.prompt("document", prompt_name))
            return torch.from_numpy(vectors), self._taken(work, [(None, read) for read in reads])
        kind = ("query", self.prompt("query", prompt_name))
        work = await self.batcher.run([Item(kind, text, self._cost(text, "query")) for text in texts])
        return torch.stack([vectors for vectors, _ in work.results]), self._taken(work, work.results)

    async def _vectors(
        self,
        texts: Sequence[CheckedText],
        first: list[Item],
        prompt: str | None = None,
        finish: Callable[[list[Any], np.ndarray], Any] = lambda found, vectors: None,
    ) -> tuple[Work, np.ndarray, list[Read]]:
        """Candidates' vectors `(n, dim)`, of the cache or new; the items `first` are encoded before them.

        What `finish` makes of the results of `first` and of the vectors is the work's outcome.
        """
        assert not isinstance(self.model, CrossEncoder)
        prompt = self.model.prompt_of("document") if prompt is None else prompt
        vectors, known = self._cache.get([(prompt, text) for text in texts])
        missing = sorted(set(range(len(texts))) - known.keys(), key=lambda place: -len(texts[place]))
        self.metrics.observe_cache(len(known), len(missing))
        items = [Item(("document", prompt), texts[place], self._cost(texts[place], "document")) for place in missing]

        def end(results: list[Any]) -> Any:
            if missing:
                vectors[missing] = [vector for vector, _ in results[len(first) :]]
            return finish(results[: len(first)], vectors)

        work = await self.batcher.run([*first, *items], self._keep, end)
        reads = known | {place: read for place, (_, read) in zip(missing, work.results[len(first) :], strict=True)}
        return work, vectors, [reads[place] for place in range(len(texts))]

    def _keep(self, items: Sequence[Item], results: Sequence[tuple[Any, Read]]) -> None:
        """Put candidates into the cache as they come: a request that was given up goes on when it is repeated."""
        for item, (vector, read) in zip(items, results, strict=True):
            side, prompt = item.kind
            if side == "document":
                self._cache.put((prompt, item.content), vector, read)

    def _similarity(self, contexts: Tensor, candidates: Tensor) -> Tensor:
        assert not isinstance(self.model, CrossEncoder)
        with torch.inference_mode():
            if len(contexts) > 1:
                return self.model.similarity_pairwise(contexts, candidates).float()
            return self.model.similarity(contexts, candidates)[0].float()

    # --- in the model's thread -------------------------------------------------------------------------------------

    def _give_back(self) -> None:
        """Hand free memory back to the system now and then: glibc keeps the gaps that batches of all sizes leave."""
        if time.monotonic() - self._given_back > SECONDS_TO_KEEP:
            self._given_back = time.monotonic()
            with contextlib.suppress(AttributeError, OSError, TypeError):  # another system
                ctypes.CDLL(None).malloc_trim(0)

    def _encode(self, kind: Any, contents: list[Any]) -> Sequence[Any]:
        """Results of items of one kind: vectors or scores, with what was read."""
        self._give_back()
        side, prompt = kind
        options: dict[str, Any] = {"prompt": prompt, "show_progress_bar": False}
        with torch.inference_mode():
            if side == "pair":
                assert isinstance(self.model, CrossEncoder)
                scores = self.model.predict(contents, **options).tolist()
                both = [self._reads([pair[place] for pair in contents], task) for place, task in enumerate(self.limits)]
                return [
                    (score, Read(one.tokens + other.tokens, one.is_cut or other.is_cut))
                    for score, one, other in zip(scores, *both, strict=True)
                ]
            assert not isinstance(self.model, CrossEncoder)
            if side == "query":
                vectors = self.model.encode_query(contents, convert_to_tensor=True, **options).float().cpu()
                return [*zip(vectors, self._reads(contents, "query"), strict=True)]
            places = {text: place for place, text in enumerate(dict.fromkeys(contents))}
            rows = self.model.encode_document(list(places), **options).astype(np.float32)
            pairs = [*zip(rows, self._reads(list(places), "document"), strict=True)]
            return [pairs[places[text]] for text in contents]

    def _reads(self, texts: list[str], task: str) -> list[Read]:
        limit = self.limits[task] - self._own_tokens
        lengths = map(len, plain_tokens(self.model.tokenizer, texts)["input_ids"])
        return [Read(min(length, limit) + self._own_tokens, length > limit) for length in lengths]

    def _cost(self, text: str, task: str) -> int:
        return min(len(text) // CHARACTERS_A_TOKEN + 2, self.limits[task])

    def _taken(self, work: Work, results: Sequence[tuple[Any, Read]]) -> Cost:
        queued = (work.began or time.perf_counter()) - work.queued if work.items else 0.0
        cost = Cost(sum(read.tokens for _, read in results), sum(read.is_cut for _, read in results), queued)
        self.metrics.observe_cost(cost.tokens, cost.queued)
        return cost
