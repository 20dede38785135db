# Run, test and check kmodel. Every target does the set-up it needs; see tools/setup.sh for what that is.

MAKEFLAGS += --no-builtin-rules
PY := .venv/bin/python
# Extra arguments of stress, test and bench, as in: make stress ARGS='--seed 7'
ARGS ?=
# Test processes of make test. The stress suites always run alone: they need the CPUs to themselves.
JOBS ?= auto

.DEFAULT_GOAL := help
.PHONY: help setup stress test check bench clean

help:
	@echo "make setup    prepare .venv/ (the other targets do it themselves)"
	@echo "make stress   torture the model on real threads           ARGS='...' goes to kmodel stress"
	@echo "make test     all tests, then the short stress suites      ARGS='...' goes to pytest, JOBS=N processes"
	@echo "make check    lint, formatting, types, layering"
	@echo "make bench    the uprobe lookup benchmark                  ARGS='...' goes to the benchmark"
	@echo "make clean    remove what the other targets left here"
	@echo
	@echo "KMODEL_PYTHON=python3.13t (or a path) chooses the interpreter for the set-up."

setup:
	@tools/setup.sh

stress: setup
	.venv/bin/kmodel stress $(ARGS)

test: setup
	$(PY) -m pytest tests -n $(JOBS) -q $(ARGS)
	$(PY) -m pytest stress -q -p no:xdist $(ARGS)

check: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy kmodel $(wildcard stress benchmarks)
	$(PY) -m pytest tests/test_layering.py -q -p no:xdist

bench: setup
	$(PY) -m benchmarks.uprobe_lookup $(ARGS)

# The interpreter in the per-user cache stays: it took minutes to build and serves every checkout.
clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
