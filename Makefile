# Two targets do all the set-up on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help demo test test-system test-all test-slow check format zoo coverage bench clean

help:            ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 14

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV) (torch is large: a minute or two) …"
	$(PIP) --editable ".[demo]"
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV) (torch is large: a minute or two) …"
	$(PIP) --editable ".[dev]"
	@touch $@

demo: $(VENV)/.demo       ## real weights, photographs, four conversions
	$(BIN)/normsurgeon demo

test: $(VENV)/.dev        ## the fast tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

test-system: $(VENV)/.dev ## the tests that take longer, start processes or a browser, and the notebooks
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal --override-ini addopts="-q --strict-markers" -m "(system or long) and not slow"

test-all: test test-system ## both, as CI runs them

test-slow: $(VENV)/.dev   ## what takes minutes
	$(BIN)/python -m pytest --override-ini addopts="-q --strict-markers" -m slow

check: $(VENV)/.dev       ## format, lint, types, architecture, documentation examples
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest --doctest-modules normsurgeon

format: $(VENV)/.dev      ## put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

zoo: $(VENV)/.dev         ## convert every BatchNorm architecture of timm; writes docs/coverage.md
	$(BIN)/python benchmarks/zoo.py --output docs/coverage.md

coverage: $(VENV)/.dev    ## convert the networks of other projects (installs them); writes docs/coverage.md
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(PIP) --group coverage
	$(BIN)/python benchmarks/beyond.py --output docs/coverage.md

bench: $(VENV)/.dev       ## what a conversion costs and keeps, and what an analysis costs
	$(BIN)/python benchmarks/cost.py
	$(BIN)/python benchmarks/function.py
	$(BIN)/python benchmarks/analysis.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/hessian.py

clean:           ## remove the environment and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache
