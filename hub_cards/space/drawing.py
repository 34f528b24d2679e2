"""Rankings and explanations as HTML. Every text that came from outside goes through `shown`."""

import html
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from poly_encoders.explaining import Explanation

TOP_CODES = 16  # rows of the heat map, unless all are wanted
LISTED_CODES = 8  # in the list
TOKENS_NAMED = 3  # of each code in the list
SPEAKERS = ("A", "B")

_BREAKS = {"\n": "⏎", "\t": "⇥", " ": "␣"}


def shown(text: str) -> str:
    """`text` so that a page shows it letter by letter: no tag, and nothing that Gradio's templates would fill in."""
    safe = html.escape(text, quote=True)
    return safe.replace("{", "&#123;").replace("}", "&#125;").replace("$", "&#36;").replace("`", "&#96;")


def message(text: str) -> str:
    """Something to mend, said where the result would be."""
    return f'<p class="pe-message" role="alert">{shown(text)}</p>' if text else ""


def dialogue(turns: Sequence[str]) -> str:
    """The turns as speech bubbles, two speakers in turn."""
    if not turns:
        return '<p class="pe-hint">No turn yet. Write what somebody says, then press “Add turn”.</p>'
    bubbles = "".join(
        f'<li class="pe-turn pe-turn-{SPEAKERS[i % 2]}"><b>{SPEAKERS[i % 2]}</b><span>{shown(turn)}</span></li>'
        for i, turn in enumerate(turns)
    )
    return f'<ol class="pe-dialogue" aria-label="Dialogue">{bubbles}</ol>'


def shares(scores: Sequence[float]) -> list[float]:
    """The softmax of the scores."""
    top = max(scores)
    powers = [math.exp(score - top) for score in scores]
    return [power / sum(powers) for power in powers]


def ranking(entries: Sequence[dict[str, Any]], explained: bool) -> str:
    """A ranking as bars, best first.

    Args:
        entries: As `rank(..., return_documents=True)` gives them.
        explained: Whether a candidate can be chosen to be explained. The best one is chosen at first.
    """
    rows = []
    for place, (entry, share) in enumerate(zip(entries, shares([entry["score"] for entry in entries]), strict=True)):
        inner = (
            f'<span class="pe-place">{place + 1}</span><span class="pe-text">{shown(entry["text"])}</span>'
            f'<span class="pe-score" title="raw score">{entry["score"]:.2f}</span>'
            f'<span class="pe-bar"><span style="width:{100 * share:.2f}%"></span></span>'
            f'<span class="pe-share" title="softmax of the scores">{_percent(share)}</span>'
        )
        if explained:
            pressed = "true" if place == 0 else "false"
            inner = (
                f'<button type="button" class="pe-row" data-candidate="{entry["corpus_id"]}" '
                f'aria-pressed="{pressed}">{inner}</button>'
            )
        else:
            inner = f'<div class="pe-row">{inner}</div>'
        rows.append(f"<li>{inner}</li>")
    return f'<ol class="pe-ranking" aria-label="Candidates, best first">{"".join(rows)}</ol>'


def depths(weights: np.ndarray) -> np.ndarray:
    """How deep to colour each of `(L,)` weights that sum to 1: 0 for an even share or less, 1 for the strongest.

    Full depth takes at least one and a half even shares, so that attention which is nearly even looks so.
    """
    even = 1 / len(weights)
    if len(weights) == 1:
        return weights
    return np.clip(weights - even, 0, None) / max(float(weights.max()) - even, even / 2)


def coloured_text(explanation: Explanation) -> str:
    """The context, each token on a ground as deep as its part in the decision."""
    depth = depths(explanation.token_weights)
    spans, at = [], None
    for i, (token, special, weight) in enumerate(
        zip(explanation.tokens, explanation.special, explanation.token_weights.tolist(), strict=True)
    ):
        start, end = explanation.offsets[i] if explanation.offsets is not None else (0, 0)
        piece = token if special or explanation.offsets is None else explanation.text[start:end]
        if end > start:
            if at is None and start > 0:  # cut off on the left
                unread = '<span class="pe-unread" title="not read: the context is too long for the model">'
                spans.append(f"{unread}{shown(explanation.text[:start])}</span>")
            elif at is not None and start > at:
                spans.append(shown(explanation.text[at:start]))
            at = max(end, at or 0)
        kind = "pe-token pe-special" if special else "pe-token"
        title = f"{_visible(token)}: {_percent(weight)}"
        spans.append(f'<span class="{kind}" style="--w:{depth[i]:.2f}" title="{shown(title)}">{shown(piece)}</span>')
    return f'<p class="pe-context">{"".join(spans)}</p>'


def codes(explanation: Explanation, name: str, limit: int = LISTED_CODES) -> str:
    """The codes that decided, as bars, with the tokens that each looks at most."""
    peak = max(float(explanation.final_attention.max()), 1e-9)
    rows = []
    for code in _by_share(explanation)[:limit]:
        share, row = float(explanation.final_attention[code]), explanation.code_attention[code]
        best = [i for i in np.argsort(-row, kind="stable")[:TOKENS_NAMED] if row[i] > 0.005]
        words = "".join(
            f'<span class="pe-word{" pe-special" if explanation.special[i] else ""}">'
            f"{shown(_visible(explanation.tokens[i]))}<small>{_percent(float(row[i]))}</small></span>"
            for i in best
        )
        rows.append(
            f'<li><span class="pe-code">{name} {code}</span>'
            f'<span class="pe-bar"><span style="width:{100 * share / peak:.2f}%"></span></span>'
            f'<span class="pe-share">{_percent(share)}</span><span class="pe-words">{words}</span></li>'
        )
    return f'<ol class="pe-codes" aria-label="Codes, the one that decided most first">{"".join(rows)}</ol>'


def heat_map(explanation: Explanation, name: str, limit: int = TOP_CODES, titles: bool = True) -> str:
    """Codes by tokens, the code that decided most on top; each row has its own scale, that of `depths`."""
    order = _by_share(explanation)[:limit]
    heads = "".join(
        f'<th scope="col"{_class(special)}><span>{shown(_visible(token))}</span></th>'
        for token, special in zip(explanation.tokens, explanation.special, strict=True)
    )
    rows = "".join(_heat_row(explanation, code, name, titles) for code in order)
    label = f"Heat map of {len(order)} {name}s by {len(explanation.tokens)} tokens. The list above names the strongest."
    return (
        f'<div class="pe-scroll" tabindex="0" role="region" aria-label="{label}">'
        f'<table class="pe-heat"><thead><tr><th scope="col" class="pe-corner">{name} · share</th>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _heat_row(explanation: Explanation, code: int, name: str, titles: bool) -> str:
    row = explanation.code_attention[code]
    cells = []
    for token, weight, depth in zip(explanation.tokens, row.tolist(), depths(row).tolist(), strict=True):
        title = f' title="{shown(_visible(token))}: {_percent(weight)}"' if titles else ""
        style = f' style="--w:{depth:.2f}"' if depth >= 0.01 else ""
        cells.append(f"<td{style}{title}></td>")
    share = _percent(float(explanation.final_attention[code]))
    return f'<tr><th scope="row">{name} {code} <small>{share}</small></th>{"".join(cells)}</tr>'


def legend() -> str:
    """What the depth of the colour means."""
    return (
        '<p class="pe-hint pe-legend"><span>an even share or less</span><span class="pe-scale"></span>'
        "<span>the strongest, from 1.5 times that on</span></p>"
    )


def _by_share(explanation: Explanation) -> list[int]:
    return np.argsort(-explanation.final_attention, kind="stable").tolist()


def _visible(token: str) -> str:
    """A token whose every character can be seen, if it is nothing but white space."""
    return token if token.strip() else "".join(_BREAKS.get(character, "␣") for character in token)


def _class(special: bool) -> str:
    return ' class="pe-special"' if special else ""


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%" if share >= 0.0995 else f"{100 * share:.1f}%"
