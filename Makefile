# Everything a fresh machine needs is python3 (>= 3.11), make and a package registry.
PYTHON ?= python3
UV_VERSION = 0.13.9
STAMP = .venv/.synced
BIN = .venv/bin

.PHONY: setup demo test lint docs clean

setup: $(STAMP)

# The lock file fixes every version; running this again with nothing changed does nothing.
$(STAMP): pyproject.toml uv.lock
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(BIN)/uv sync --frozen --inexact --quiet
	@touch $@

demo: setup
	$(BIN)/lensmith demo

test: setup
	$(BIN)/pytest -m "not gpu"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python tools/write_docs.py --check

docs: setup
	$(BIN)/python tools/write_docs.py

clean:
	rm -rf .venv
