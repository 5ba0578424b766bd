# make demo      a model that chats, from nothing, in minutes        make test      the fast tests
# make test-all  every test (what CI runs)                            make lint      style and mistakes
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# On a GPU machine, or for a CPU-only torch from its own index, install torch your way first, then: pip install -e .
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-all lint clean install

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

demo: install
	PATH="$(abspath $(BIN)):$$PATH" sh tool/demo/run.sh

test: install
	$(BIN)/python -m pytest -m "not slow"

test-all: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf weight/demo .pytest_cache .ruff_cache build *.egg-info
