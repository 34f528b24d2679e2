"""Examples for the Hub's widget, out of ranking sets: a context as one text, and its candidates."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

MAX_EXAMPLES = 3
MAX_CANDIDATES = 5
MAX_CONTEXT = 500  # characters, of the end: what a model reads of a long context
MAX_CANDIDATE = 200  # characters, of the start
_LOOKED_AT = 200  # sets among which to look for ones that need no clipping


def widget_examples(
    samples: Iterable[Mapping[str, Any]], as_text: Callable[[Any], str], shared: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """At most three examples of a `sentence-similarity` widget, the same for the same samples.

    Args:
        samples: `{"context": ..., "candidates": [...], "label": index}`, as `CandidateRankingEvaluator` takes them;
            only the first 200 are looked at. Those whose texts are short enough as they are come first.
        as_text: Makes one text of a context in any form.
        shared: Further candidates of every sample.

    Returns:
        `{"source_sentence": text, "sentences": [text, ...]}` each: two to five different candidates, the right one
        among them, in alphabetical order, so that their order gives nothing away.
    """
    whole: list[dict[str, Any]] = []
    clipped: list[dict[str, Any]] = []
    seen = set()
    for _, sample in zip(range(_LOOKED_AT), samples, strict=False):
        context = as_text(sample["context"]).strip()
        own = list(sample["candidates"])
        right = own.pop(sample.get("label", 0))
        texts = list(dict.fromkeys(text.strip() for text in (right, *own, *shared[:MAX_CANDIDATES]) if text.strip()))
        texts = texts[:MAX_CANDIDATES]
        if not context or len(texts) < 2 or context in seen:
            continue
        seen.add(context)
        is_whole = len(context) <= MAX_CONTEXT and all(len(text) <= MAX_CANDIDATE for text in texts)
        sentences = sorted({_start(text) for text in texts})
        if len(sentences) > 1:
            (whole if is_whole else clipped).append({"source_sentence": _end(context), "sentences": sentences})
        if len(whole) == MAX_EXAMPLES:
            break
    return (whole + clipped)[:MAX_EXAMPLES]


def _start(text: str) -> str:
    """The beginning of a text, up to a word's end."""
    if len(text) <= MAX_CANDIDATE:
        return text
    return (text[:MAX_CANDIDATE].rsplit(maxsplit=1)[0] or text[:MAX_CANDIDATE]) + " ..."


def _end(text: str) -> str:
    """The end of a text, from a word's start."""
    if len(text) <= MAX_CONTEXT:
        return text
    return "... " + text[-MAX_CONTEXT:].split(maxsplit=1)[-1]
