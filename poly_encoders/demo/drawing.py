"""Rankings and explanations as HTML, by the macros of drawing.html."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from poly_encoders.explaining import Explanation

TOP_ROWS = 16  # of the heat map, unless all are wanted
LISTED = 8  # context vectors in the list, unless all are wanted
TOKENS_NAMED = 3  # of each code in the list
COSINE_SCALE = 20  # cosines are close to each other: a softmax is taken of so many times them, as in training

_TEMPLATE_SIGNS = str.maketrans({sign: f"&#{ord(sign)};" for sign in "{}$`"})
_BREAKS = {"\n": "⏎", "\t": "⇥"}


def shown(text: object) -> str:
    """`text` so that a page shows it letter by letter: no tag, and nothing that Gradio's templates would fill in."""
    return text if isinstance(text, Markup) else Markup(html.escape(str(text)).translate(_TEMPLATE_SIGNS))


def draw(macro: str, *arguments: Any) -> str:
    """What a macro of drawing.html makes of its arguments."""
    return str(getattr(_MACROS, macro)(*arguments))


def ranking(entries: Sequence[dict[str, Any]], explained: bool, scale: int = 1) -> str:
    """What `rank(..., return_documents=True)` gave, as bars of the softmax of `scale` times the scores."""
    scores = scale * np.array([entry["score"] for entry in entries])
    powers = np.exp(scores - scores.max())
    return draw("ranking", list(zip(entries, powers / powers.sum(), strict=True)), explained, scale)


def explanation(why: Explanation, candidate: str, kind: str, all_vectors: bool) -> str:
    """Why the candidate got its score; `kind` is what the context's vectors are of, such as "turn"."""
    vectors = [_vector(why, place) for place in np.argsort(-why.final_attention, kind="stable").tolist()]
    vectors = [vector for vector in vectors if vector["weights"].any()]  # without padding
    rows, listed = (vectors, vectors) if all_vectors else (vectors[:TOP_ROWS], vectors[:LISTED])
    return draw("explanation", why, candidate, kind, pieces(why), vectors, listed, rows, not all_vectors)


def _vector(why: Explanation, place: int) -> dict[str, Any]:
    """What is shown of one context vector: of a code the tokens that it looks at most, else its text."""
    weights = why.code_attention[place]
    name, _, text = why.vectors[place].partition(": ")
    strongest = [] if text else np.argsort(-weights, kind="stable")[:TOKENS_NAMED].tolist()
    return {
        "name": name,
        "text": _visible(text) if text else "",
        "share": max(float(why.final_attention[place]), 1e-9),
        "weights": weights,
        "depths": depths(weights),
        "strongest": [token for token in strongest if weights[token] > 0.005],
    }


def depths(weights: np.ndarray) -> np.ndarray:
    """How deep to colour each of `(L,)` weights that sum to 1: 0 for an even share or less, 1 for the strongest.

    Full depth takes at least one and a half even shares, so that attention which is nearly even looks so.
    """
    even = 1 / len(weights)
    if len(weights) == 1:
        return weights
    return np.clip(weights - even, 0, None) / max(float(weights.max()) - even, even / 2)


def pieces(why: Explanation) -> list[tuple[Any, ...]]:
    """For each token: the text since the one before, its own, its name, whether it is special, its weight and depth."""
    found, at = [], 0
    for place, (token, special) in enumerate(zip(why.tokens, why.special, strict=True)):
        gap, text = "", token
        start, end = why.offsets[place] if why.offsets else (0, 0)
        if end > start:
            gap = why.text[at:start]  # white space between words, or what was cut off
            text = token if special else why.text[max(start, at) : end]  # two tokens may share a letter
            at = max(at, end)
        found.append((gap, text, token, special))
    return [(*row, *numbers) for row, *numbers in zip(found, why.token_weights, depths(why.token_weights), strict=True)]


def _visible(token: str) -> str:
    """A token whose every character can be seen, if it is nothing but white space."""
    return token if token.strip() else "".join(_BREAKS.get(space, "␣") for space in token)


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%" if share >= 0.0995 else f"{100 * share:.1f}%"


_environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, finalize=shown)
_environment.filters |= {"visible": _visible, "percent": _percent}
_MACROS: Any = _environment.get_template("drawing.html").module
