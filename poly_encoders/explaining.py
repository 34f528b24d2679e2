"""Why a Poly-encoder gave a candidate its score: what each code looks at, and which codes decided.

    y_i   = sum_j a_ij h_j      a_i: what code i looks at, over the context's tokens
    score = sum_i w_i x . y_i   w: which codes decided for the candidate x

so that sum_i w_i a_ij says how much of token j is in the one vector that the candidate was compared with.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import BatchEncoding

from poly_encoders.conversations import Context, context_text
from poly_encoders.modeling import poly_attention

if TYPE_CHECKING:
    from poly_encoders.poly_encoder import PolyEncoder


@dataclass(frozen=True, eq=False)
class Explanation:
    """How one candidate got its score for one context. All arrays are float32, L is the number of tokens read.

    Attributes:
        text: What the tokenizer was given: the prompt, if there is one, and the context, its turns joined.
        tokens: L pieces of `text`, as it writes them, or a special token's name. Where the context was too long, these
            are its last.
        offsets: For each token where it begins and ends in `text`, `(0, 0)` for one that the tokenizer added; `None`
            for a slow tokenizer, which cannot tell.
        special: For each token whether it is one of the tokenizer's own, such as `[CLS]`, and no text.
        code_attention: `(m, L)`, what each code looks at. A row sums to 1; the row of a context vector that is padding
            is all 0. Where context vectors are tokens taken as they are (`"first_m"`, `"last_m"`,
            `"first_and_last_m"`, which has m + 1 rows), a row has a 1 at its token.
        final_attention: `(m,)`, how much each code decided for this candidate. Sums to 1; 0 for padding.
        dots: `(m,)`, the candidate's dot product with each context vector; 0 for padding.
        score: As `rank` gives it: the sum of `final_attention * dots`.
        token_weights: `(L,)`, `final_attention @ code_attention`: how much each token decided. Sums to 1.
    """

    text: str
    tokens: list[str]
    offsets: list[tuple[int, int]] | None
    special: list[bool]
    code_attention: np.ndarray
    final_attention: np.ndarray
    dots: np.ndarray
    score: float
    token_weights: np.ndarray


def explain(
    model: "PolyEncoder", context: Context, candidate: str, prompt: str | None = None, device: str | None = None
) -> Explanation:
    """What `PolyEncoder.explain` returns; the prompt is the text itself."""
    if not isinstance(candidate, str):
        raise TypeError(
            f"One candidate is explained at a time, a string, but this is {type(candidate).__name__}: "
            f"{candidate!r:.60}. Call explain for each of several."
        )
    text = context_text(context, model.turn_separator, model.max_turns)
    options: dict[str, Any] = {"device": device, "show_progress_bar": False}
    (features,) = model.encode_query([text], prompt=prompt, output_value=None, **options)
    candidates = model.encode_document([candidate], convert_to_tensor=True, **options)
    contexts, mask = features["sentence_embedding"][None], features["attention_mask"][None]
    with torch.inference_mode():
        attention = model[0].model.context_attention(features["token_embeddings"][None], mask)
        dots, weights = poly_attention(contexts, candidates, model.final_scale)
        score = float(model.similarity(contexts, candidates)[0, 0])
        kept = attention[0][:, mask[0] != 0].float()  # (m, L)
        token_weights = weights[0, 0].float() @ kept

    (text,), encoding = model[0].tokenized([text], prompt, "query")
    tokens, offsets, special = _read(text, encoding, model.tokenizer)
    return Explanation(
        text=text,
        tokens=tokens,
        offsets=offsets,
        special=special,
        code_attention=kept.cpu().numpy(),
        final_attention=weights[0, 0].float().cpu().numpy(),
        dots=dots[0, 0].float().cpu().numpy(),
        score=score,
        token_weights=token_weights.cpu().numpy(),
    )


def _read(
    text: str, encoding: BatchEncoding, tokenizer: Any
) -> tuple[list[str], list[tuple[int, int]] | None, list[bool]]:
    """The tokens of the one text in `encoding` as a person reads them, where they stand, and which are no text."""
    kept = encoding["attention_mask"][0].nonzero().flatten().tolist()
    ids = encoding["input_ids"][0, kept].tolist()
    named = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}  # an unknown token stands for a piece of text
    names = tokenizer.convert_ids_to_tokens(ids)
    if not encoding.encodings:
        own = [token_id in named for token_id in ids]
        pieces = [name if is_own else tokenizer.decode([i]) for i, name, is_own in zip(ids, names, own, strict=True)]
        return [piece or name for piece, name in zip(pieces, names, strict=True)], None, own
    row = encoding.encodings[0]
    added = [bool(row.special_tokens_mask[position]) for position in kept]
    special = [is_added or token_id in named for is_added, token_id in zip(added, ids, strict=True)]
    offsets = [(0, 0) if is_added else row.offsets[i] for i, is_added in zip(kept, added, strict=True)]
    tokens = [
        name if is_special else text[start:end] or name
        for name, is_special, (start, end) in zip(names, special, offsets, strict=True)
    ]
    return tokens, offsets, special
