# Everything a fresh machine needs is python3 (>= 3.11), make and a package registry.
PYTHON ?= python3
UV_VERSION = 0.13.9
STAMP = .venv/.synced
COMPILED = .venv/.compiled
BIN = .venv/bin
UV_EXPORT = $(BIN)/uv export --frozen --quiet --no-emit-project --no-header --no-annotate
OLDEST = .venv/oldest
# All that compares with other libraries, but for kernels, memory and parsers, which see torch and numpy only.
OLDEST_TESTS = $(filter-out $(addprefix tests/reference/test_, few_rows.py decode_attention.py headers.py mean_ap.py \
  merge_memory.py pack.py plan_counts.py words.py %kernels.py kernels_compile.py), $(wildcard tests/reference/test_*.py)) \
  tests/unit/test_versions.py tests/unit/test_recipe.py tests/unit/test_load.py tests/journeys/test_guide.py \
  tests/journeys/test_first_hour.py tests/journeys/test_grpo_run.py tests/journeys/test_export_journey.py

.PHONY: setup pip-sync demo test test-oldest lint docs clean

setup: $(COMPILED)

# Where PYTHONDONTWRITEBYTECODE is set nobody else writes byte code, and without it every start compiles anew:
# `lensmith plan` took 0.9 s instead of 0.3.
$(COMPILED): $(STAMP) $(shell find src/lensmith -name '*.py')
	@$(BIN)/python -m compileall -q src/lensmith
	@touch $@

# The lock file fixes every version; running this again with nothing changed does nothing.
$(STAMP): pyproject.toml uv.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than 3.11. Name a newer one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv || \
	  { echo "$(PYTHON) cannot make environments. On Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	@echo "Installing into .venv (some gigabytes the first time) ..."
	@$(BIN)/uv sync --frozen --inexact --quiet --compile-bytecode || $(MAKE) --no-print-directory pip-sync
	@touch $@

# The same versions by pip, for machines whose registry is named in pip's own settings, which uv does not read. pip writes
# byte code by itself.
pip-sync:
	$(UV_EXPORT) --output-file .venv/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement .venv/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .

# The group `oldest` of uv.lock, in a folder that stands before .venv on Python's path. Only what differs is installed, some
# 280 MB, and torch is shared. Hashes are joined to their package's line, so that lines can be compared.
$(OLDEST)/.synced: $(STAMP)
	@rm -rf $(OLDEST) && mkdir $(OLDEST)
	@$(UV_EXPORT) --output-file $(OLDEST)/newest.lines
	@$(UV_EXPORT) --no-default-groups --group oldest --output-file $(OLDEST)/oldest.lines
	@for set in newest oldest; do sed -e ':a' -e '/\\$$/N; s/ *\\\n */ /; ta' $(OLDEST)/$$set.lines > $(OLDEST)/$$set.txt; done
	@grep -vxF -f $(OLDEST)/newest.txt $(OLDEST)/oldest.txt > $(OLDEST)/requirements.txt
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --target $(OLDEST) --no-deps --compile-bytecode \
	  --requirement $(OLDEST)/requirements.txt || \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --target $(OLDEST) --no-deps \
	  --requirement $(OLDEST)/requirements.txt
	@touch $@

demo: setup
	$(BIN)/lensmith demo

test: setup
	$(BIN)/pytest -m "not gpu"

# What touches other libraries' insides, on the lowest versions that pyproject.toml allows. Threads that wait sleep: on cores
# that others use as well, spinning made some tests take twelve seconds instead of one.
test-oldest: setup $(OLDEST)/.synced
	PYTHONPATH=$(CURDIR)/$(OLDEST) OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -m "not gpu" --group oldest $(OLDEST_TESTS)

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
