# Two environments: .venv runs things, .venv-dev has the development tools as well. Both are made on first use.
PYTHON ?= python3
# The torch that the README's figures were taken with. Any other from 2.9 on will do: make quickstart TORCH=torch
TORCH ?= torch==2.13.0

.PHONY: quickstart compare demo benchmarks test check wheel clean help

help:
	@echo "make quickstart   train a Poly-encoder on real dialogue and rank replies (minutes on two CPU cores)"
	@echo "make compare      the same for all three encoders, timed"
	@echo "make demo         a page that ranks and explains, with the quick start's model (or MODEL=path)"
	@echo "make benchmarks   time and memory of scoring and of a training step, beside their rivals"
	@echo "make test         run all tests"
	@echo "make check        lint and types"
	@echo "make wheel        build the distribution into dist/"

quickstart: .venv/.ready
	.venv/bin/python -m poly_encoders.training.quickstart

compare: .venv/.ready
	.venv/bin/python -m poly_encoders.training.quickstart --compare

demo: .venv/.demo
	.venv/bin/poly-encoders demo $(MODEL)

benchmarks: .venv-dev/.ready
	.venv-dev/bin/python benchmarks/scoring.py
	.venv-dev/bin/python benchmarks/training.py

test: .venv-dev/.ready
	.venv-dev/bin/python -m pytest

check: .venv-dev/.ready
	.venv-dev/bin/ruff check .
	.venv-dev/bin/ruff format --check .
	.venv-dev/bin/python -m pip install --quiet --no-deps --upgrade --target build/typed .
	cd build/typed && ../../.venv-dev/bin/mypy --config-file ../../pyproject.toml -p poly_encoders

wheel: .venv-dev/.ready
	.venv-dev/bin/python -m build --outdir dist .

.venv/.ready: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --upgrade pip
	.venv/bin/python -m pip install --quiet "$(TORCH)"
	.venv/bin/python -m pip install --quiet --editable ".[examples]"
	touch $@

.venv/.demo: .venv/.ready
	.venv/bin/python -m pip install --quiet --editable ".[examples,demo]"
	touch $@

.venv-dev/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-dev
	.venv-dev/bin/python -m pip install --quiet --upgrade pip
	.venv-dev/bin/python -m pip install --quiet "$(TORCH)"
	.venv-dev/bin/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv .venv-dev build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
