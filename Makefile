# `make demo` sets up and runs the main job; `make test` sets up and tests. Both need python3 (3.11 or later) and pip.
# VENV names the virtual environment; it is created when there is none. PYTHON makes it.

VENV ?= .venv
PYTHON ?= python3
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install -qq --no-input
# An environment holds one editable install: the stamp names the clone that it belongs to.
STAMP := $(VENV)/.glowflow-$(shell printf '%s' '$(CURDIR)' | cksum | cut -d' ' -f1)

.DEFAULT_GOAL := help
.PHONY: help install demo test lint journeys benchmarks docs clean

help:  ## show this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 14

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "The tested versions in constraints.txt need Python 3.11 or later, this is " + sys.version.split()[0])'
	@test -x $(BIN)/python || { echo "creating $(VENV)"; $(PYTHON) -m venv "$(VENV)"; }
	@echo "installing into $(VENV) (some minutes the first time)"
	@$(PIP) -c constraints.txt -e '.[dev]'
	@rm -f "$(VENV)"/.glowflow-*
	@touch $@

install: $(STAMP)  ## create the virtual environment and install GlowFlow with its development tools

demo: $(STAMP)  ## set up and run the main job: configs/quickstart.yaml, then a summary
	@$(BIN)/glowflow demo

lint: $(STAMP)  ## check style, types and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: $(STAMP) lint  ## set up and test: lint, then all tests that need neither a GPU nor minutes
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder -m "not slow and not gpu" $(PYTEST_ARGS)

journeys: $(STAMP)  ## whole commands, faults and resumes with Ray, the slow ones too
	$(BIN)/python -m pytest tests/journeys -m "not gpu" $(PYTEST_ARGS)

benchmarks: $(STAMP)  ## measure training speed on this machine; an MLflow run in the experiment `benchmarks`
	$(BIN)/glowflow bench train configs/shakespeare_char.yaml --json

docs: $(STAMP)  ## regenerate the config reference and the JSON Schema
	$(BIN)/python -m glowflow.config.reference docs/config.md
	$(BIN)/python -m glowflow.config.json_schema docs/config.schema.json

clean:  ## remove caches and builds; environments, runs and data stay
	rm -rf build dist *.egg-info .coverage .coverage.* htmlcov .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
