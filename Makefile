# Every target builds .venv first when it is missing, or when pyproject.toml or constraints.txt changed.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: demo test test-browser fuzz test-lowest test-latest dist pictures check check-format check-lint check-types check-docs bench docs clean help

VENV := .venv
STAMP := $(VENV)/.stamp
RUN := $(VENV)/bin/python -m
PYTHON ?=
WORKERS ?= 2
ARGS ?=
SECONDS_EACH ?= 20
REPORTS := build/reports
export NO_MKDOCS_2_WARNING := 1
SHARED = -n $(WORKERS) --dist worksteal
UNMARKED := not model and not browser and not slow and not gpu

help:  ## Say what each target does.
	@grep -E '^[a-z -]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+)[^#]*## /make \1\t/' | expand -t 20

demo: $(STAMP)  ## Edit real facts into a real model, undo a batch, leave a model behind (ARGS=... are passed on).
	$(VENV)/bin/nmke demo $(ARGS)

test: $(STAMP)  ## Tests on tiny models, then tests on the real default model. WORKERS=0 runs in one process.
	mkdir -p $(REPORTS)
	OMP_NUM_THREADS=1 $(RUN) pytest -m "$(UNMARKED)" $(SHARED) --junitxml=$(REPORTS)/unmarked.xml
	$(RUN) pytest -m "model" -rs --junitxml=$(REPORTS)/model.xml

# Chromium: Debian's own, or one that CHROMIUM= names; the tests skip without one unless CI is set.
test-browser: $(STAMP)  ## The studio in a real browser, on the real default model.
	mkdir -p $(REPORTS)
	$(RUN) pytest -m "browser" -rs --junitxml=$(REPORTS)/browser.xml

fuzz: $(STAMP)  ## Every reader of files on damaged input, SECONDS_EACH=20, (needs the extra "fuzz").
	for name in $$($(RUN) tests.fuzz.targets); do \
	  echo "fuzzing $$name"; $(RUN) tests.fuzz.run $$name -max_total_time=$(SECONDS_EACH) -verbosity=0; \
	done

# Environments of their own, apart from .venv, resolved by uv without the constraints file. UV_TORCH_BACKEND=cpu
# takes PyTorch's CPU build where its index can be reached; PYTHON= names another interpreter.
test-lowest: RESOLUTION := lowest-direct
test-latest: RESOLUTION := highest
test-lowest test-latest: test-%: build/uv/bin/uv  ## The unmarked tests on the lowest versions that pyproject.toml allows (on the latest).
	build/uv/bin/uv venv --quiet --clear $(if $(PYTHON),--python $(PYTHON)) build/$*
	build/uv/bin/uv pip install --quiet --python build/$*/bin/python --resolution $(RESOLUTION) -e ".[dev]"
	OMP_NUM_THREADS=1 build/$*/bin/python -m pytest -m "$(UNMARKED)" $(SHARED)

dist: build/uv/bin/uv  ## Wheel and sdist into dist/; then the wheel in an empty environment edits a fact.
	rm -rf dist
	build/uv/bin/uv build --quiet --out-dir dist
	build/uv/bin/uv venv --quiet --clear $(if $(PYTHON),--python $(PYTHON)) build/wheel
	build/uv/bin/uv pip install --quiet --python build/wheel/bin/python dist/*.whl
	cd build && wheel/bin/nmke --version && wheel/bin/nmke demo --limit 2 --force -o wheel-demo

build/uv/bin/uv:
	$(or $(PYTHON),python3) -m venv build/uv
	build/uv/bin/pip install --disable-pip-version-check --quiet uv

pictures: $(STAMP)  ## Draw the pictures of the documentation from the committed records.
	$(VENV)/bin/python docs/pictures.py

check: check-format check-lint check-types check-docs  ## Format, lint, types, and the documentation.

check-format: $(STAMP)
	$(RUN) ruff format --check .

check-lint: $(STAMP)
	$(RUN) ruff check .

check-types: $(STAMP)
	$(RUN) mypy

check-docs: $(STAMP)
	$(RUN) mkdocs build --strict --quiet --site-dir build/docs

bench: $(STAMP)  ## Measure speed, quality, stages against their floors and the self-written corpus.
	$(VENV)/bin/python benchmarks/stages.py
	$(VENV)/bin/python benchmarks/roofline.py
	$(VENV)/bin/python benchmarks/packed_tails.py
	$(VENV)/bin/python benchmarks/ranks.py
	$(VENV)/bin/python benchmarks/speed_quality.py
	$(VENV)/bin/python benchmarks/corpus.py

docs: $(STAMP)  ## Build the documentation into site/.
	$(RUN) mkdocs build --strict --site-dir site

clean:  ## Remove the environment and everything that was built; caches of models stay.
	rm -rf $(VENV) build site dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +

# The first interpreter that runs and is new enough. An environment that still works is brought up to date,
# not rebuilt. The exact versions exist for Python 3.11 and later; under 3.10 only torch is pinned.
$(STAMP): pyproject.toml constraints.txt
	@if ! $(VENV)/bin/python -c 'import pip' 2>/dev/null; then \
	  for python in $(PYTHON) python3.11 python3.12 python3.13 python3.10 python3; do \
	    if $$python -c 'import sys, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then break; fi; \
	    python=; \
	  done; \
	  if [ -z "$$python" ]; then \
	    echo 'make: no Python 3.10 or later with the venv module was found; install one or set PYTHON=' >&2; exit 1; \
	  fi; \
	  echo "Building $(VENV) with $$python; the first time takes a few minutes." >&2; \
	  $$python -m venv --clear $(VENV); \
	fi
	@pins=constraints.txt; \
	if ! $(VENV)/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
	  pins=$(VENV)/torch.txt; grep '^torch==' constraints.txt > $$pins; \
	fi; \
	$(RUN) pip install --disable-pip-version-check --quiet -c $$pins -e ".[dev]"
	@touch $@
