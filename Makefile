# The first target makes .venv when it is missing or older than what it is made from; all others use it. Its packages
# are not compiled, which takes as long as installing them: Python compiles what is imported.
NEW_ENOUGH = -c 'import sys; sys.exit(sys.version_info < (3, 11))'
PYTHON ?= $(or $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python $(NEW_ENOUGH) 2>/dev/null && echo $$python && break; done), \
	$(error Python 3.11 or newer is needed; give one: make PYTHON=/path/to/python))
VENV ?= .venv
BIN = $(VENV)/bin
TESTS ?=

.PHONY: quickstart test test-faults lint docs

$(VENV)/.installed: pyproject.toml constraints.txt
	@test ! -e $(BIN)/python || $(BIN)/python $(NEW_ENOUGH) || \
		{ echo "$(VENV) is of a Python before 3.11: remove it, and make again" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable ".[dev]"
	touch $@

quickstart: $(VENV)/.installed
	$(BIN)/python experiments/train.py -config configs/digits.py

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto --dist loadgroup $(TESTS)

test-faults: $(VENV)/.installed
	$(BIN)/python -m pytest -m faults

lint: $(VENV)/.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check

docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
