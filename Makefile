# Nothing but Python >= 3.10 and make is needed: every target sets up .venv by itself.
#
#   make demo    URLs → corpus → training, killed and resumed → text → export → report, on this machine
#   make test    lint, types, all tests
#   make fast    the tests that take seconds
#   make check   lint and types alone
#   make soak    the long reliability tests
#   make bench   the benchmarks

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DONE := $(VENV)/.installed-$(shell cat pyproject.toml | cksum | cut -d' ' -f1)

# Or each of hundreds of processes would compile torch for itself.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test pytest fast check soak bench clean

setup: $(DONE)

$(DONE):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo 'make: $(PYTHON) is too old: Python 3.10 or newer is needed; give make PYTHON=python3.12' >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# A pip of today: the one that a venv is born with takes three times as long to find out what fits together.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	@# Modules are compiled when they are first imported, on all cores, and kept: all of them at once would take a minute.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -e '.[dev]'
	@rm -f $(VENV)/.installed-*
	@touch $@

demo: setup
	$(BIN)/python -m benchmarks.demo

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Many tests wait for processes, sockets and time limits: four at once keep two cores at work, beside lint and types.
test: setup
	@$(MAKE) --no-print-directory -j 2 check pytest

pytest: setup
	$(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder $(PYTEST)

fast: setup
	$(BIN)/python -m pytest -m 'not slow and not soak'

bench: setup
	$(BIN)/python -m benchmarks.urls
	$(BIN)/python -m benchmarks.fetch
	$(BIN)/python -m benchmarks.corpus
	$(BIN)/python -m benchmarks.join
	$(BIN)/python -m benchmarks.pipeline
	$(BIN)/python -m benchmarks.training
	$(BIN)/python -m benchmarks.inference
	$(BIN)/python -m benchmarks.sweep
	$(BIN)/python -m benchmarks.mup

soak: setup
	$(BIN)/python -m pytest -m soak -s --timeout 3600

clean:
	rm -rf build dist *.egg-info .demo .pytest_cache .mypy_cache .ruff_cache
