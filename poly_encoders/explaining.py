"""Why a Poly-encoder gave a candidate its score: what is in each context vector, and which of them decided.

    y_i   = sum_j a_ij h_j      a_i: how much of each token is in context vector i, that of a turn or a code
    score = sum_i w_i x . y_i   w: which vectors decided for the candidate x

so that sum_i w_i a_ij says how much of token j is in the one vector that the candidate was compared with; only nearly,
where vectors are scaled to length 1.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from poly_encoders.modeling import poly_attention
from poly_encoders.modeling.scoring_poly_encoder import turn_weights, turns_between
from poly_encoders.modeling.text_poly_encoder import Context, Tokens, plain_tokens, text_tokens


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
        turns: For each token its turn, 1, 2, ... as they are in `text`; 0 for one in no turn. A slow tokenizer counts
            from the first turn that was read.
        vectors: What each of the m context vectors is: `"turn 2: Any plans?"`, with the turn's text or, where it is
            long, that of one of its windows; `"code 7"`; `"token 3: plans"`; or `"padding"`.
        code_attention: `(m, L)`, how much of each token is in each context vector, for a code what it looks at. A row
            sums to 1, or is all 0 for padding. A token taken as it is has a 1; a turn's tokens have equal parts, and
            those of the last turn its share besides.
        final_attention: `(m,)`, how much each vector decided for this candidate. Sums to 1; 0 for padding.
        dots: `(m,)`, the candidate's dot product with each context vector; 0 for padding.
        score: As `rank` gives it: the sum of `final_attention * dots`.
        token_weights: `(L,)`, `final_attention @ code_attention`: how much each token decided. Sums to 1.
    """

    text: str
    tokens: list[str]
    offsets: list[tuple[int, int]] | None
    special: list[bool]
    turns: list[int]
    vectors: list[str]
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
    module, prompt = model[0], prompt or ""
    (text,) = model.context_texts([context])
    options: dict[str, Any] = {"device": device, "show_progress_bar": False}
    (features,) = model.encode_query([text], prompt=prompt, output_value=None, **options)
    candidates = model.encode_document([candidate], convert_to_tensor=True, **options)
    (row,) = text_tokens(module.tokenizer, [text], module.limit("query"), "left", prompt)
    turns = _turns(module, row)
    contexts, mask = features["sentence_embedding"][None], features["attention_mask"][None]
    with torch.inference_mode():
        turn_ids = torch.tensor([turns], device=mask.device)
        attention = module.model.context_attention(features["token_embeddings"][None], mask, turn_ids)
        dots, weights = poly_attention(contexts, candidates, model.final_scale)
        score = float(model.similarity(contexts, candidates)[0, 0])
    code_attention, final_attention = attention[0].float().cpu().numpy(), weights[0, 0].float().cpu().numpy()
    text = prompt + text
    tokens, offsets, special = _tokens(module.tokenizer, text, row)
    vectors = [f"code {number}" for number in range(module.config.num_codes)] if module.config.has_codes else []
    if module.config.has_turns:
        vectors = _pieces(module, text, row, offsets, turns) + vectors
    elif not vectors:
        vectors = [
            f"token {one.argmax()}: {tokens[one.argmax()]}" if one.any() else "padding" for one in code_attention
        ]
    return Explanation(
        text,
        tokens,
        offsets,
        special,
        turns,
        vectors,
        code_attention=code_attention,
        final_attention=final_attention,
        dots=dots[0, 0].float().cpu().numpy(),
        score=score,
        token_weights=final_attention @ code_attention,
    )


def _tokens(tokenizer: Any, text: str, row: Tokens) -> tuple[list[str], list[tuple[int, int]] | None, list[bool]]:
    """The tokens that the model read of a text with its prompt: `tokens`, `offsets`, `special`."""
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
    return tokens, offsets, special


def _turns(module: Any, row: Tokens) -> list[int]:
    """The turn of each token, as the model has it."""
    if row.turns is not None:
        return row.turns
    added = [token_id for token_id, special in zip(row.ids, row.special, strict=True) if special]
    ids = torch.tensor([row.ids])
    boundaries = module.config.turn_boundary_ids or added
    return turns_between(ids, torch.ones_like(ids), boundaries)[0].tolist()


def _pieces(module: Any, text: str, row: Tokens, offsets: list[tuple[int, int]] | None, turns: list[int]) -> list[str]:
    """The turns, or windows of long ones, that have a vector."""
    ids, config, names = torch.tensor([turns]), module.config, []
    (weights,), _ = turn_weights(ids, torch.ones_like(ids), config.num_codes, config.max_turn_length)
    for places in (piece.nonzero()[:, 0].tolist() for piece in weights):
        if not places:
            names.append("padding")
            continue
        first, last = places[0], places[-1]
        said = (
            text[offsets[first][0] : offsets[last][1]]
            if offsets
            else module.tokenizer.decode(row.ids[first : last + 1])
        )
        names.append(f"turn {turns[first] or 1}" + (f": {said.strip()}" if said.strip() else ""))
    return names
