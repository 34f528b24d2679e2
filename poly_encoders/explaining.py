"""Why a Poly-encoder gave a candidate its score: what each code looks at, and which codes decided.

    y_i   = sum_j a_ij h_j      a_i: what code i looks at, over the context's tokens
    score = sum_i w_i x . y_i   w: which codes decided for the candidate x

so that sum_i w_i a_ij says how much of token j is in the one vector that the candidate was compared with.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from poly_encoders.modeling import poly_attention
from poly_encoders.modeling.text_poly_encoder import Context, plain_tokens, text_tokens


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


def explain(model: Any, context: Context, candidate: str, prompt: str | None, device: str | None = None) -> Explanation:
    """What `PolyEncoder.explain` returns for its `model`; the prompt is the text itself."""
    if not isinstance(candidate, str):
        raise TypeError(
            f"One candidate is explained at a time, a string, but this is {type(candidate).__name__}: "
            f"{candidate!r:.60}. Call explain for each of several."
        )
    (text,) = model.context_texts([context])
    options: dict[str, Any] = {"device": device, "show_progress_bar": False}
    (features,) = model.encode_query([text], prompt=prompt or "", output_value=None, **options)
    candidates = model.encode_document([candidate], convert_to_tensor=True, **options)
    contexts, mask = features["sentence_embedding"][None], features["attention_mask"][None]
    with torch.inference_mode():
        attention = model[0].model.context_attention(features["token_embeddings"][None], mask)
        dots, weights = poly_attention(contexts, candidates, model.final_scale)
        score = float(model.similarity(contexts, candidates)[0, 0])
    code_attention, final_attention = attention[0].float().cpu().numpy(), weights[0, 0].float().cpu().numpy()
    return Explanation(
        *_read(model[0], text, prompt or ""),
        code_attention=code_attention,
        final_attention=final_attention,
        dots=dots[0, 0].float().cpu().numpy(),
        score=score,
        token_weights=final_attention @ code_attention,
    )


def _read(module: Any, text: str, prompt: str) -> tuple[str, list[str], list[tuple[int, int]] | None, list[bool]]:
    """The text with its prompt, and the tokens that the model read of it: `tokens`, `offsets`, `special`."""
    tokenizer = module.tokenizer
    (row,) = text_tokens(tokenizer, [text], module.limit("query"), "left", prompt)
    text = prompt + text
    named = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}  # an unknown token stands for a piece of text
    special = [added or token_id in named for token_id, added in zip(row.ids, row.special, strict=True)]
    names = tokenizer.convert_ids_to_tokens(row.ids)
    if encodings := plain_tokens(tokenizer, [text]).encodings:
        places = encodings[0].offsets
        kept = iter(places[: row.head] + places[row.tail :])
        offsets = [(0, 0) if added else next(kept) for added in row.special]
        pieces = [text[start:end] for start, end in offsets]
    else:
        offsets, pieces = None, [tokenizer.decode([token_id]) for token_id in row.ids]
    tokens = [name if own else piece or name for name, own, piece in zip(names, special, pieces, strict=True)]
    return text, tokens, offsets, special
