"""A card as text: whether a person has a hand in it, the id that its snippets load, its metadata and its sections.

A card that we wrote ends with a comment that holds a fingerprint of all before it. As long as the two agree, the card
is ours to write anew; any other card is a person's.
"""

import hashlib
import re
from typing import Any

import yaml

CARD = "README.md"
PLACEHOLDER = "path/to/this/model"  # in the snippets of a card that knows no Hub id

_SIGNATURE = re.compile(r"\s*<!-- Written by poly-encoders \(([0-9a-f]{12})\)[^>]*-->\s*\Z")
_FRONT_MATTER = re.compile(r"\s*---[ \t]*\n(.*?)\n---[ \t]*(?:\n|\Z)", re.DOTALL)
_SNIPPET = re.compile(r'^model = \w+\("([^"]+)"', re.MULTILINE)


def signed(text: str) -> str:
    """A card that we wrote, with the comment that tells so."""
    body = _SIGNATURE.sub("", text).strip()
    note = f"Written by poly-encoders ({_fingerprint(body)}) and anew whenever the model is saved or pushed."
    return f"{body}\n\n<!-- {note}\nEdit anything, and the whole card stays as it is. -->\n"


def is_generated(text: str) -> bool:
    """Whether a card is as we wrote it."""
    text = text.replace("\r\n", "\n")
    match = _SIGNATURE.search(text)
    return match is not None and match[1] == _fingerprint(text[: match.start()].strip())


def snippet_id(text: str) -> str | None:
    """What the snippets of a card that we wrote load; `None` where they know no id."""
    match = _SNIPPET.search(text)
    return None if match is None or match[1] == PLACEHOLDER else match[1]


def with_id(text: str, repo_id: str) -> str:
    """A card whose snippets load `repo_id`, if it is as we wrote it; a person's stays as it is."""
    if not is_generated(text):
        return text
    return signed(text.replace(f'"{snippet_id(text) or PLACEHOLDER}"', f'"{repo_id}"'))


def metadata_of(text: str) -> dict[str, Any]:
    """The front matter of a card; empty where there is none that can be read."""
    match = _FRONT_MATTER.match(text)
    try:
        data = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return {}
    return data if isinstance(data, dict) else {}


def section_of(text: str, heading: str) -> str:
    """The section under a heading of the second level, the heading with it; empty where there is none."""
    match = re.search(rf"^## {heading}\n.*?(?=^## |\Z)", _SIGNATURE.sub("", text), re.MULTILINE | re.DOTALL)
    return match[0].strip() if match else ""


def _fingerprint(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()[:12]
