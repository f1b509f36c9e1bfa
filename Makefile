# Two commands for everybody: `make demo` and `make test`. Each sets up .venv by itself.

PYTHON ?= python3
# Pinned, and installed first: an unpinned torch brings gigabytes of CUDA with it.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export HF_HUB_OFFLINE := 1
export PYTHONSAFEPATH := 1

.PHONY: help demo test lint bench clean

help:
	@echo "make demo    a real model answers three questions, the later ones out of the cache"
	@echo "make test    every test"
	@echo "make lint    ruff and mypy"
	@echo "make bench   kernels, tiers, hashing and graphs against memcpy; writes bench.json"

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "tierloom needs Python 3.10 or newer"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[demo,test,lint]"
	@touch $@

demo: $(READY)
	$(BIN)/tierloom demo --json demo.json

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-json=bench.json -q
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/table.py bench.json

clean:
	rm -rf $(VENV) build dist src/*.egg-info bench.json demo.json
