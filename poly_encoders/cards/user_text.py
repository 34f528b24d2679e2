"""A card that its reader may edit: what they changed stays when the model is saved again, the rest is written anew.

A card is its metadata and its sections, each of which begins with a heading of the second level; what is before the
first heading is a section too. A comment at the end of the card keeps a fingerprint of every key and section as it was
written. Whatever differs from its fingerprint, or has none, or is missing, was changed, added or removed by the user. A
card without that comment is the user's altogether.
"""

import hashlib
import json
import logging
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

import yaml

logger = logging.getLogger(__name__)

#: The rule as the cards tell it.
EDITS = """\
<!-- This card is written when the model is saved. What you change in it is yours: sections and metadata that you edit,
add or remove stay as you left them when the model is saved again, and the rest is written anew. The last line of this
file keeps count; without it, the whole file stays as it is. -->"""

#: Tags that tell of one training run; the next one brings its own.
TRAINING_TAGS = re.compile(r"generated_from_trainer|dataset_size:.*|loss:.*")

Part = Literal["metadata", "sections"]

PARTS: tuple[Part, Part] = ("metadata", "sections")
_LASTING = ("language", "license", "base_model")  # still true of a model that was trained further
_FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\n(.*?\n)??---[ \t]*(?:\n|\Z)", re.DOTALL)
_RECORD = re.compile(r"<!-- poly-encoders wrote (\{.*\}) -->")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")


@dataclass
class Card:
    """A card taken apart.

    Attributes:
        metadata: What its front matter says.
        front_matter: The same as it is written, without the lines of dashes.
        sections: Texts by heading; "" is the one before the first.
        record: Fingerprints of all that was written, by part and name, and notes; `None` where the card has none.
    """

    metadata: dict[str, Any]
    front_matter: str
    sections: dict[str, str]
    record: dict[str, Any] | None

    @classmethod
    def parse(cls, text: str) -> "Card":
        """Take a card apart.

        Raises:
            ValueError: its front matter is no YAML mapping.
        """
        text = text.replace("\r\n", "\n").removeprefix("\ufeff")
        match = _FRONT_MATTER.match(text)
        front_matter, body = (match[1] or "", text[match.end() :]) if match else ("", text)
        try:
            metadata = yaml.safe_load(front_matter)
        except yaml.YAMLError as error:
            raise ValueError(f"The metadata at the head of the card are no YAML: {error}") from error
        if not isinstance(metadata, dict | None):
            raise ValueError(f"The metadata at the head of the card must be `key: value` lines, got {metadata!r:.80}.")
        return cls(metadata or {}, front_matter.strip("\n"), _sections(_RECORD.sub("", body)), _record(body))

    def fingerprints(self, part: Part) -> dict[str, str]:
        """What the record says of each name of a part."""
        return (self.record or {}).get(part, {})

    def is_users(self, part: Part, name: str) -> bool:
        """Whether the user changed, added or removed this key of the metadata, or the section under this heading."""
        content, written = getattr(self, part), self.fingerprints(part)
        return written.get(name) != _fingerprint(content[name]) if name in content else name in written

    def render(self) -> str:
        """The card as text, its record at the end."""
        body = "\n\n".join(text for text in self.sections.values() if text)
        record = json.dumps(self.record, sort_keys=True).replace("-->", "--\\u003e")  # which would end the comment
        return f"---\n{self.front_matter}\n---\n\n{body}\n\n<!-- poly-encoders wrote {record} -->\n"


def with_user_text(
    new: str, old: str | None, *, trained: bool, said: Collection[str] = (), notes: dict[str, Any] | None = None
) -> str:
    """A card that was just written, with what a user changed in the one before it.

    Args:
        new: The card as the template gives it.
        old: The card before it, if there is one.
        trained: Whether the model was trained since `old` was written. If not, what only `old` has, such as the section
            on its training, is still true and stays.
        said: Keys of the metadata that the program set on purpose: there the user's edits give way.
        notes: Kept in the card's record.

    Returns:
        The card to save; `old` itself where that has no record, and so is all the user's.
    """
    before = Card({}, "", {}, {})
    if old is not None and old.strip():
        try:
            before = Card.parse(old)
        except ValueError as error:
            logger.warning("The model's README.md stays as it is. %s", error)
            return old
        if before.record is None:
            logger.warning(
                "The model's README.md was not written by poly-encoders, so it stays as it is. For a card that is, "
                "delete it and save the model again."
            )
            return old
    written = Card.parse(new)
    # What a user changed after the program's word had been written comes after it.
    known = before.fingerprints("metadata")
    said = {name for name in said if known.get(name) != _fingerprint(written.metadata.get(name))}
    metadata = _merged_metadata(written, before, trained, said)
    sections = _merged_sections(written, before, trained)
    record: dict[str, Any] = dict(notes or {})
    for part, result in zip(PARTS, (metadata, sections), strict=True):
        known = before.fingerprints(part)
        record[part] = {}
        for name in {**result, **known}:
            if before.is_users(part, name) and not (part == "metadata" and name in said):
                if name in known:  # of what it was before the user's change, so that it is found changed again
                    record[part][name] = known[name]
            elif name in result:
                record[part][name] = _fingerprint(result[name])
    # A user's own order and comments in the front matter stay as long as all that it says does.
    if metadata == before.metadata:
        front_matter = before.front_matter
    else:
        front_matter = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).strip()
    return Card(metadata, front_matter, sections, record).render()


def _merged_metadata(new: Card, old: Card, trained: bool, said: Collection[str]) -> dict[str, Any]:
    merged = {}
    for name in {**new.metadata, **old.metadata}:
        is_users = old.is_users("metadata", name) and name not in said
        if name in new.metadata and not is_users:
            merged[name] = new.metadata[name]
            if name == "tags" and not trained:
                merged[name] = [*merged[name], *(tag for tag in old.metadata.get(name, []) if tag not in merged[name])]
        elif name in old.metadata and name not in said and (is_users or not trained or name in _LASTING):
            merged[name] = old.metadata[name]
    return merged


def _merged_sections(new: Card, old: Card, trained: bool) -> dict[str, str]:
    texts, order = {}, []
    for name, text in new.sections.items():
        if not old.is_users("sections", name):
            texts[name] = text
        elif name in old.sections:
            texts[name] = old.sections[name]
    order = list(texts)
    place = 0
    for name, text in old.sections.items():
        if name in texts:
            place = order.index(name) + 1
        elif name not in new.sections and (old.is_users("sections", name) or not trained):
            texts[name] = text
            order.insert(place, name)  # after the section that it came after
            place += 1
    return {name: texts[name] for name in order}


def _sections(body: str) -> dict[str, str]:
    """The sections of a card's body; a second one of the same heading gets a number behind its name."""
    parts: list[tuple[str, list[str]]] = [("", [])]
    fence = ""
    for line in body.split("\n"):
        if match := _FENCE.match(line):
            if not fence:
                fence = match[1]
            elif match[1].startswith(fence) and not line.strip().strip(fence[0]):
                fence = ""
        if line.startswith("## ") and not fence:
            parts.append((line.removeprefix("##").strip(), []))
        parts[-1][1].append(line.rstrip())
    sections: dict[str, str] = {}
    for heading, lines in parts:
        name, count = heading, 1
        while name in sections:
            count += 1
            name = f"{heading} ({count})"
        sections[name] = "\n".join(lines).strip("\n")
    return sections


def _record(body: str) -> dict[str, Any] | None:
    found = _RECORD.findall(body)
    try:
        record = json.loads(found[-1]) if found else None
    except json.JSONDecodeError:
        return None
    if not isinstance(record, dict) or not all(isinstance(record.get(part), dict) for part in PARTS):
        return None
    return record


def _fingerprint(content: Any) -> str:
    return hashlib.sha256(json.dumps(_with_text_keys(content), sort_keys=True, default=str).encode()).hexdigest()[:12]


def _with_text_keys(content: Any) -> Any:
    """YAML's keys may be of any kind, and those of several kinds have no order."""
    if isinstance(content, dict):
        return {str(key): _with_text_keys(value) for key, value in content.items()}
    return [_with_text_keys(value) for value in content] if isinstance(content, list) else content
