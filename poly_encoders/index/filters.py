"""Conditions on candidates: SQL as Lance reads it, clear errors where it does not, and the same said to Milvus."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from poly_encoders.index.lance_store import ID, TEXT, LanceStore, first_line

# Literals and quoted names first: nothing in them is changed.
TOKENS = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|`[^`]*`|<>|[<>=!]=|[=()]|\w+|\s+|.", re.DOTALL)
IN_MILVUS = {"=": "==", "<>": "!="} | {
    word: word for word in ("and", "or", "not", "in", "like", "is", "null", "true", "false")
}
ESCAPES = {"\\": r"\\", '"': r"\"", "\n": r"\n", "\r": r"\r", "\t": r"\t"}  # milvus-lite knows no others


@contextmanager
def clear_filter_errors(store: LanceStore) -> Iterator[None]:
    """For what runs a condition of the user's in Lance.

    Raises:
        ValueError: it has a wrong syntax or a column that is not there; names those that are.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if any(sign in str(error) for sign in ("Invalid user input", "SQL", "sql", "No field")):
            raise ValueError(
                f"The filter cannot be read: {first_line(error)}. It is a condition in SQL on the columns "
                f"{', '.join([ID, TEXT, *store.metadata_columns])}, such as {ID} = 'a' AND {TEXT} LIKE 'W%'."
            ) from error
        raise


def sql_literal(id_: Any) -> str:
    """An id in SQL.

    Raises:
        TypeError: it is none.
    """
    if isinstance(id_, bool) or not isinstance(id_, str | int | np.integer):
        raise TypeError(f"{id_!r} is no id; ids are texts or whole numbers.")
    return "'" + id_.replace("'", "''") + "'" if isinstance(id_, str) else str(id_)


def milvus_literal(value: str | int) -> str:
    """A text or number in a filter of Milvus."""
    return '"' + "".join(ESCAPES.get(sign, sign) for sign in value) + '"' if isinstance(value, str) else str(value)


def milvus_filter(condition: str) -> str:
    """SQL in Milvus's words, as far as it has them: comparisons, `AND`, `OR`, `NOT`, `IN`, `LIKE`, `IS NULL`."""
    found, closing = [], []
    after_in = False
    for token in TOKENS.findall(condition):
        if token[0] in "'\"" and len(token) > 1:
            token = milvus_literal(token[1:-1].replace(token[0] * 2, token[0]))
        elif token[0] == "`":
            token = token.strip("`")
        elif token == "(":
            token = "[" if after_in else "("
            closing.append("]" if after_in else ")")
        elif token == ")":
            token = closing.pop() if closing else token
        after_in = token.lower() == "in" or (after_in and token.isspace())
        found.append(IN_MILVUS.get(token.lower(), token))
    return "".join(found)
