# `make quickstart` trains on rendered characters and writes a report; `make test` is what CI runs. Both need Python 3.11 or newer only.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: help quickstart test test-full test-processors docs lint format clean

$(if $(wildcard constraints.txt),,$(error make has to start in the folder of this Makefile: cd there, or make -C FOLDER))

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TEST_STAMP := $(VENV)/.installed-test
DOCS_STAMP := $(VENV)/.installed-docs
comma := ,
# What is installed depends on the GPUs that the driver lists (it may be there and list none); how many processes train, on those
# that torch can use at that time (`dnc-dist launch --help`).
EXTRA = $(shell [[ "$$(nvidia-smi -L 2> /dev/null)" == *"GPU 0:"* ]] && echo gpu || echo cpu)
# The first of these that is new enough and can make virtual environments; PYTHON=... chooses another.
SUITS := -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2> /dev/null
PYTHON ?= $(shell for name in python3 python3.13 python3.12 python3.11; do if $$name $(SUITS); then echo $$name; break; fi; done)

# `import kernels` must never find the folder of that name (a package on PyPI is called like that).
export PYTHONSAFEPATH := 1
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
RUN := runs/quickstart
FAST := not slow and not gpu
# Two at a time, whole files, as fixtures are shared inside one.
PARALLEL := --numprocesses 2 --dist loadfile --no-loadscope-reorder

help:
	@echo "make quickstart   train on rendered characters, one process per GPU or 2 on the CPU (about 5 minutes on 2 cores), and write a report"
	@echo "make test         lint, types and all tests but the slow ones"
	@echo "make test-full    all tests"
	@echo "make test-processors  the fast tests as on other processors; TESTS='tests/test_x.py ...' and PROCESSORS='avx2-machine ...' choose some"
	@echo "make docs         the documentation as a site, build/site/index.html"
	@echo "make lint         ruff and mypy; make format repairs what ruff can"
	@echo "make clean        remove the virtual environment and caches; runs/ and data/ stay"

# torch first and alone: DeepSpeed looks for it when it is built. DS_BUILD_OPS=0: no operator is compiled at installation.
define install
	@[ -x $(BIN)/python ] || "$(PYTHON)" $(SUITS) || { echo "error: Python 3.11 or newer with the venv module is needed;" \
		"$(or $(PYTHON),no python3 found here) is none. Install one (Debian: apt install python3-venv) or give PYTHON=/path/to/python" >&2; exit 2; }
	@echo "installing into $(VENV), extras: $(1)"
	@[ -x $(BIN)/python ] || "$(PYTHON)" -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
	@$(PIP) torch && DS_BUILD_OPS=0 $(PIP) --editable ".[$(1)]" || { echo "error: pip could not install the packages (see above);" \
		"it needs the network, or a copy of the packages that PIP_INDEX_URL or PIP_FIND_LINKS names" >&2; exit 1; }
endef

$(STAMP): pyproject.toml constraints.txt
	$(call install,$(EXTRA))
	@touch $@

# What runs the product, and what tests it: Triton among it, whose interpreter and compiler need no GPU.
$(TEST_STAMP): pyproject.toml constraints.txt
	$(call install,$(EXTRA)$(comma)test)
	@touch $(STAMP) $@

$(DOCS_STAMP): pyproject.toml constraints.txt
	$(call install,$(EXTRA)$(comma)docs)
	@touch $(STAMP) $@

quickstart: $(STAMP)
	@[ -f data/glyphs/manifest.json ] || $(BIN)/dnc-dist data prepare glyphs --out data/glyphs
	@rm -rf $(RUN)
	@$(BIN)/dnc-dist launch configs/quickstart.yaml
	@echo "report: $(RUN)/report.html"

lint: $(TEST_STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(TEST_STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Sphinx, with every warning as an error: a link that leads nowhere is one.
docs: $(DOCS_STAMP)
	$(BIN)/python docs/site/build.py

# One thread a process: tests start up to four, and torch's thread pools would fight for the cores.
# On the CPU, on every machine: tests start as many processes as they need, and GPUs serve one each. The last line of test-full is for GPUs.
test: export OMP_NUM_THREADS ?= 1
test: export CUDA_VISIBLE_DEVICES :=
test: lint
	$(BIN)/python -m pytest -m "$(FAST)" $(PARALLEL) --durations=15

test-full: export OMP_NUM_THREADS ?= 1
test-full: lint docs
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -m "not gpu" $(PARALLEL) --durations=30
	$(BIN)/python -m pytest -m gpu

# An imitated processor after the other, and a table at the end. Interpreters that compute without oneDNN find that in PYTHONPATH.
test-processors: export OMP_NUM_THREADS ?= 1
test-processors: export CUDA_VISIBLE_DEVICES :=
test-processors: $(TEST_STAMP)
	$(BIN)/python tests/processors.py $(PROCESSORS) -- -m "$(FAST)" $(PARALLEL) $(TESTS)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
