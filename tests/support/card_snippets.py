"""The Python blocks of a card: taken out, run, and compared with the output that they say they have."""

import contextlib
import io
import re

_PRINTED = re.compile(r"# (-?\d+\.\d\d)  (.+)")
_LINE = re.compile(r"(-?\d+\.\d\d)  (.+)")


def python_blocks(card: str) -> list[str]:
    blocks = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert blocks, "the card has no Python"
    return blocks


def ranking_shown(block: str) -> list[tuple[str, float]]:
    """The ranking that a block says it prints."""
    return [(text, float(score)) for score, text in _PRINTED.findall(block)]


def ranking_printed(output: str) -> list[tuple[str, float]]:
    """The ranking that it did print."""
    return [(match[2], float(match[1])) for match in map(_LINE.fullmatch, output.splitlines()) if match]


def run_block(block: str) -> str:
    """What the block prints in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})
    return output.getvalue()


def assert_prints_what_it_shows(block: str, output: str) -> None:
    shown, printed = ranking_shown(block), ranking_printed(output)
    assert len(shown) == 3
    assert [text for text, _ in printed] == [text for text, _ in shown]
    for (_, score), (_, expected) in zip(printed, shown, strict=True):
        assert abs(score - expected) < 0.011  # the last digit shown
