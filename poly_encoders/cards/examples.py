"""Examples for the Hub's widget, out of ranking sets: a context as one text, and its candidates."""

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any

MAX_EXAMPLES = 3
MAX_CANDIDATES = 5
MAX_CONTEXT = 500  # characters, of the end: what a model reads of a long context
MAX_CANDIDATE = 200  # characters, of the start
_LOOKED_AT = 200  # sets among which to look for ones that need no clipping


def widget_examples(samples: Iterable[Mapping[str, Any]], as_text: Callable[[Any], str]) -> list[dict[str, Any]]:
    """At most three examples of a `sentence-similarity` widget, the same for the same samples.

    Args:
        samples: `{"context": ..., "candidates": [...], "label": index}`, as `CandidateRankingEvaluator` takes them;
            only the first 200 are looked at. Those whose texts are short enough as they are come first.
        as_text: Makes one text of a context in any form.

    Returns:
        `{"source_sentence": text, "sentences": [text, ...]}` each: two to five different candidates, the positive
        among them, in alphabetical order, so that their order gives nothing away.
    """
    found: dict[str, tuple[bool, dict[str, Any]]] = {}
    for sample in islice(samples, _LOOKED_AT):
        context, texts = as_text(sample["context"]).strip(), [text.strip() for text in sample["candidates"]]
        texts.insert(0, texts.pop(sample.get("label", 0)))
        texts = list(dict.fromkeys(filter(None, texts)))[:MAX_CANDIDATES]
        sentences = sorted({_clipped(text) for text in texts})
        if context and context not in found and len(sentences) > 1:
            shown = context if len(context) <= MAX_CONTEXT else "... " + context[-MAX_CONTEXT:].split(maxsplit=1)[-1]
            is_clipped = shown != context or set(sentences) != set(texts)
            found[context] = (is_clipped, {"source_sentence": shown, "sentences": sentences})
    return [example for _, example in sorted(found.values(), key=lambda entry: entry[0])][:MAX_EXAMPLES]


def _clipped(text: str) -> str:
    """The beginning of a text, up to a word's end."""
    return text if len(text) <= MAX_CANDIDATE else text[:MAX_CANDIDATE].rsplit(maxsplit=1)[0] + " ..."
