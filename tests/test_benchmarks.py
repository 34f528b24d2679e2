"""The benchmark of scoring runs, at toy size: its figures are for people, but it must not rot."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "scoring.py"


def test_scoring_writes_its_table_and_its_plot(tmp_path):
    pytest.importorskip("matplotlib")
    sizes = ["--n", "50", "2000", "--m", "2", "64", "--dim", "8", "--rounds", "1"]
    done = subprocess.run([sys.executable, SCRIPT, *sizes, "--out", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "scoring.json").read_text())["rows"]
    assert {(row["n"], row["m"], row["dim"]) for row in rows} == {(n, m, 8) for n in (50, 2000) for m in (2, 64)}
    assert all(row["median_ms"] > 0 for row in rows)
    assert (tmp_path / "scoring.png").read_bytes().startswith(b"\x89PNG")
