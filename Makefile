# `make help` lists the commands. Each creates .venv and installs what it needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-lowest check clean

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMP)  ## train, save and evaluate a classifier on built-in reviews (about a minute)
	# Threads that spin while they wait would slow down many times over where cores are busy.
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python scripts/train_text.py --dataset demo_reviews

test: $(STAMP)  ## run the whole test suite (seven minutes to a quarter of an hour on two idle cores)
	# Threads that wait for each other would slow down two tests at once many times over.
	# A process that is done early takes over tests of the other.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-lowest: .venv-lowest/.installed  ## the same with the lowest versions that pyproject.toml admits
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -n 2 --dist worksteal

check: $(STAMP)  ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## remove the virtual environment and caches; runs/ and data/ stay
	rm -rf $(VENV) .venv-lowest .pytest_cache .mypy_cache .ruff_cache .hypothesis

define check_python
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: Python 3.11 or newer is needed; try make PYTHON=python3.11 ..." >&2; exit 2; }
endef

$(STAMP): pyproject.toml constraints.txt
	$(check_python)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): some minutes, about 2.4 GB"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

# pip has no way to ask for the lowest versions that go together.
.venv-lowest/.installed: pyproject.toml
	$(check_python)
	test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet uv
	.venv-lowest/bin/uv pip install --quiet --python .venv-lowest/bin/python \
		--resolution lowest-direct --editable '.[dev]'
	@touch $@
