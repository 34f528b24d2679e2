"""How a page speaks of a model: its kind, what its context vectors are of, and what can be seen of it."""

from typing import NamedTuple

import torch

from poly_encoders.bi_encoder import BiEncoder
from poly_encoders.cross_encoder import CrossEncoder
from poly_encoders.poly_encoder import PolyEncoder

Model = PolyEncoder | BiEncoder | CrossEncoder

_KINDS = {PolyEncoder: "Poly-encoder", BiEncoder: "Bi-encoder", CrossEncoder: "Cross-encoder"}
_VECTORS = {  # kind of context vectors -> what one is of, and what they are
    "turns": ("turn", "one for each turn, which has read the others"),
    "learnt_codes": ("code", "one for each learnt code, which looks at some of its tokens"),
    "turns_and_codes": ("vector", "one for each turn, and one for each learnt code, which looks at some of its tokens"),
}
_TOKENS = ("vector", "those of some of its tokens")
_HOW = {
    PolyEncoder: "The dialogue becomes several vectors, {}; each candidate decides which of them to listen to. "
    "Choose a candidate in the ranking to see it.",
    BiEncoder: "This is a Bi-encoder: one vector for the dialogue, one for the candidate, and how alike they are is "
    "the score. Nothing in between tells which words decided, so there is no map to show.",
    CrossEncoder: "This is a Cross-encoder: it reads the dialogue and a candidate together in all its layers. "
    "No single place in it tells which words decided, so there is no map to show.",
}


class Wording(NamedTuple):
    """Words for one model."""

    kind: str  # such as "Poly-encoder"
    vector: str  # what a context vector is of, such as "turn"
    how: str  # how it scores, in a sentence or two


def wording(model: Model) -> Wording:
    """The words for a model of any of the three kinds."""
    kind = next(kind for kind in _KINDS if isinstance(model, kind))
    vector, what = _TOKENS
    if isinstance(model, PolyEncoder):
        vector, what = _VECTORS.get(model[0].config.context_vectors, _TOKENS)
        with torch.no_grad():
            share = float(model[0].model.last_turn_share)
        what += f" ({share:.0%} of each is the last turn's)" if share else ""
    return Wording(_KINDS[kind], vector, _HOW[kind].format(what))
