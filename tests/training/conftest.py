"""What all tests of training share."""

import sys

import pytest


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """Runs as where matplotlib is not installed: a plot takes longer than most runs here."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
