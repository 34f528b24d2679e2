# Environments, each made on first use: .venv runs things, .venv-dev has the development tools as well, .venv-clients the
# clients of others that the service is tested with, .venv-floors the oldest versions that pyproject.toml allows.
PYTHON ?= python3
OLDEST_PYTHON ?= python3.11
# The torch that the README's figures were taken with. Any later one will do: make quickstart TORCH=torch
TORCH ?= torch==2.13.0
# Processes to test in; each has one thread.
WORKERS ?= 2
PYTEST = -m pytest -n $(WORKERS) --dist worksteal
# A test of each thing that is taken from a library.
CORE = tests/modeling tests/poly_encoders tests/hub tests/training/data tests/training/methods/test_lora.py \
	tests/training/runs/test_trainers.py tests/training/test_pretrain.py tests/training/test_train.py

.PHONY: quickstart compare demo benchmarks test test-slow test-clients floors check wheel clean help

help:
	@echo "make quickstart   train a Poly- and a Bi-encoder on real dialogue and compare them (minutes on two CPU cores)"
	@echo "make compare      the same for all three encoders, timed"
	@echo "make demo         a page that ranks and explains, with the quick start's model (or MODEL=path)"
	@echo "make benchmarks   time and memory of scoring, an index, a service and a training step, beside their rivals"
	@echo "make test         run the tests (minutes)"
	@echo "make test-slow    those in a browser, from a wheel, and of runs that are killed"
	@echo "make test-clients those in which clients of others speak to the service"
	@echo "make floors       a core of the tests with the oldest Python and libraries that are declared"
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
	.venv-dev/bin/python benchmarks/encoding.py
	.venv-dev/bin/python benchmarks/index.py
	.venv-dev/bin/python benchmarks/serving.py
	.venv-dev/bin/python benchmarks/training.py

test: .venv-dev/.ready
	.venv-dev/bin/python $(PYTEST)

test-slow: .venv-dev/.ready
	.venv-dev/bin/python $(PYTEST) -m slow

test-clients: .venv-clients/.ready
	.venv-clients/bin/python -m pytest tests/clients

floors: .venv-floors/.ready
	.venv-floors/bin/python $(PYTEST) $(CORE)

check: .venv-dev/.ready
	.venv-dev/bin/ruff check .
	.venv-dev/bin/ruff format --check .
	.venv-dev/bin/mypy -p poly_encoders

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

.venv-clients/.ready: pyproject.toml tests/clients/requirements.txt
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/python -m pip install --quiet --upgrade pip
	.venv-clients/bin/python -m pip install --quiet "$(TORCH)"
	.venv-clients/bin/python -m pip install --quiet --editable ".[index,serve]" --requirement tests/clients/requirements.txt
	.venv-clients/bin/python -m pip install --quiet --no-deps infinity-client==0.0.78
	touch $@

.venv-floors/.ready: pyproject.toml
	$(OLDEST_PYTHON) -m venv .venv-floors
	.venv-floors/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST_PYTHON) -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
		extras = project['optional-dependencies'].values(); \
		print(*(line.replace('>=', '==') for part in (project['dependencies'], *extras) for line in part \
			if not line.startswith('poly-encoders')), sep='\n')" > .venv-floors/requirements.txt
	.venv-floors/bin/python -m pip install --quiet --requirement .venv-floors/requirements.txt
	.venv-floors/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

clean:
	rm -rf .venv .venv-clients .venv-dev .venv-floors build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
