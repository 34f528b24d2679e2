"""The benchmarks run, at toy size: their figures are for people, but they must not rot."""

import json
from pathlib import Path

import pytest

import forks

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def _plots():
    pytest.importorskip("matplotlib")


def test_scoring_writes_its_table_and_its_plot(tmp_path):
    sizes = ["--n", "50", "2000", "--m", "2", "64", "--dim", "8", "--rounds", "1"]
    forks.run([str(BENCHMARKS / "scoring.py"), *sizes, "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "scoring.json").read_text())["rows"]
    assert {(row["n"], row["m"], row["dim"]) for row in rows} == {(n, m, 8) for n in (50, 2000) for m in (2, 64)}
    assert all(row["median_ms"] > 0 for row in rows)
    assert (tmp_path / "scoring.png").read_bytes().startswith(b"\x89PNG")


def test_quality_makes_its_tables_from_runs(tmp_path):
    """Paired: of 100 contexts the Poly-encoder is right where the Bi-encoder is, and in ten more."""
    (tmp_path / "quality").mkdir()
    shared = {"examples": 64, "layers": [0], "steps": 2, "batch": 32, "context_length": 16, "machine": {}}
    for name, right in (("bi-0", 40), ("poly-64-0", 50), ("bi-1", 40), ("poly-64-1", 50)):
        found = {**shared, "run": name, "ranks": [1] * right + [3] * (100 - right)}
        (tmp_path / "quality" / f"{name}.json").write_text(json.dumps(found))
    forks.run([str(BENCHMARKS / "quality.py"), "--tables", "--results", str(tmp_path)])
    (pair,) = json.loads((tmp_path / "quality.json").read_text())["pairs"]
    assert (pair["lead"], pair["seeds"]) == (pytest.approx(10.0), 2)
    low, high = pair["interval"]
    assert 3.5 < low < 6 < 14 < high < 17  # 10 +- 1.96 standard errors of 3 points: the contexts are 100, not 200
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")
