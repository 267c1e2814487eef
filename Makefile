# The first target makes .venv when it is missing or older than what it is made from; all others use it. Its packages
# are not compiled, which takes as long as installing them: Python compiles what is imported.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN = $(VENV)/bin
TESTS ?=

.PHONY: quickstart test test-faults lint docs

$(VENV)/.installed: pyproject.toml constraints.txt
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
