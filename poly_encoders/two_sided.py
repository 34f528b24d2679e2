"""What the Bi-encoder and the Poly-encoder share: contexts and candidates are encoded apart."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from sentence_transformers import SentenceTransformer
from torch import Tensor, float32, from_numpy, promote_types
from torch.linalg import vector_norm
from torch.nn.functional import normalize

from poly_encoders.modeling.text_poly_encoder import candidate_texts, plain_tokens
from poly_encoders.ranker import UPSTREAM_READS, Ranker, Task

LENGTH_TOLERANCE = 0.01
ASK_FOR_A_SIDE = (
    "Contexts and candidates are read differently, so the model must know which these are: call encode_query(contexts) "
    "or encode_document(candidates), or pass task='query' or task='document'."
)


class TwoSidedEncoder(Ranker, SentenceTransformer):
    """A SentenceTransformer that encodes contexts and candidates apart. Base of `PolyEncoder` and `BiEncoder`."""

    def vector_shape(self, task: Task) -> tuple[int, ...]:
        """Shape of one text's vectors on this side."""
        return (self.get_embedding_dimension() or 0,)

    def side_texts(self, inputs: Any, task: Task | None) -> list[str]:
        """A batch of one side as checked texts.

        Raises:
            ValueError: no side named, or text that no tokenizer can read.
            TypeError: an input that is no text (no conversation, on the context side).
        """
        if task not in ("query", "document"):
            raise ValueError(ASK_FOR_A_SIDE)
        return self.context_texts(inputs) if task == "query" else list(candidate_texts(inputs))

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
        device: str | list[Any] | None = None,
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
            axis for a single input. An empty list gives an empty array of the same dtype and width.

        Raises:
            ValueError: no side named (no `task`), vectors that are not finite, an option that makes no sense.
            TypeError: an input that is no text (no conversation, on the context side).
        """
        single = is_single_context(inputs) if task == "query" else isinstance(inputs, str)
        texts = self.side_texts([inputs] if single else inputs, task)
        if output_value not in ("sentence_embedding", "token_embeddings", None):
            raise ValueError(f"output_value is 'sentence_embedding', 'token_embeddings' or None, not {output_value!r}.")
        several = len(self.vector_shape(task or "query")) > 1
        if several and precision not in (None, "float32"):
            raise ValueError(
                f"precision={precision!r} is for candidates that are stored; context vectors are few and all-zero ones "
                "mean padding, so they stay float32. Leave precision out for contexts."
            )
        vectors = super().encode(
            texts or ["a", "b"],  # of nothing, upstream's result has neither the width nor the dtype
            prompt_name=prompt_name,
            prompt=prompt,
            batch_size=batch_size,
            show_progress_bar=show_progress_bar and bool(texts),
            output_value=output_value,
            precision=precision,
            convert_to_numpy=convert_to_numpy,
            convert_to_tensor=convert_to_tensor,
            device=device if texts or not isinstance(device, list) else None,
            # Upstream normalises axis 1, which is not the vectors' axis where a text has several.
            normalize_embeddings=normalize_embeddings and not several,
            truncate_dim=truncate_dim,
            task=task,
            **(kwargs if texts else {}),
        )
        if not texts:
            return vectors[:0]
        if normalize_embeddings and several and output_value == "sentence_embedding":
            vectors = _normalised(vectors)
        return vectors[0] if single else vectors

    def _input_length(self, sample: Any) -> int:
        """Tokens: upstream sorts texts by it, so that those in one batch need little padding."""
        if not isinstance(sample, str):
            return int(super()._input_length(sample))
        with UPSTREAM_READS:  # which tells the tokenizer of a model that is left as it is how to cut and pad
            return len(plain_tokens(self.tokenizer, [sample])["input_ids"][0])

    def score_texts(self, context: str, candidates: list[str], prompt: str | None, **options: Any) -> Tensor:
        show = options.pop("show_progress_bar", None)
        options["convert_to_tensor"] = True
        contexts = self.encode_query([context], prompt=prompt, show_progress_bar=False, **options)
        vectors = self.encode_document(candidates, show_progress_bar=show, **options)
        return self.similarity(contexts, vectors)[0]


def has_length_1(vectors: Tensor) -> bool:
    """Whether all of `(..., dim)` vectors are of length 1, as far as any precision that they are stored in allows."""
    if vectors.numel() == 0:
        return True
    lengths = vector_norm(vectors, dim=-1, dtype=promote_types(vectors.dtype, float32))
    return bool(((lengths - 1).abs() <= LENGTH_TOLERANCE).all())


def refuse_other_lengths(vectors: Tensor, what: str = "candidate vectors") -> None:
    """Let no `(..., dim)` vectors into a score of cosines that are not of length 1.

    Raises:
        ValueError: there are such.
    """
    if not has_length_1(vectors):
        lengths = vectors.float().norm(dim=-1)
        raise ValueError(
            f"This model scores by cosines, but {what} are of lengths from {float(lengths.min()):.4g} to "
            f"{float(lengths.max()):.4g}. Scale each to length 1 first: torch.nn.functional.normalize(vectors, dim=-1)."
        )


def is_single_context(inputs: Any) -> bool:
    """Whether `inputs` to a batch method is one context: a string, a chat message, or a list of chat messages."""
    if isinstance(inputs, (str, Mapping)):
        return True
    return isinstance(inputs, Sequence) and len(inputs) > 0 and isinstance(inputs[0], Mapping)


def _normalised(vectors: Any) -> Any:
    if isinstance(vectors, np.ndarray):
        return normalize(from_numpy(vectors), dim=-1).numpy()
    if isinstance(vectors, list):
        return [normalize(vector, dim=-1) for vector in vectors]
    return normalize(vectors, dim=-1)
