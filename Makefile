# One command from nothing: `make demo` or `make test`. Needs Python 3.10 or newer and make; `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv
VENV_OLDEST ?= .venv-oldest
VENV_NEWEST ?= .venv-newest
PIP_ARGS ?=
NEWEST ?=
PYTEST_ARGS ?=
EXTRAS := demo,sae,bench,dev,docs
BIN := $(VENV)/bin
INPUTS := setup.py pyproject.toml constraints-common.txt

# Triton 3.10 flips the default of floating-point fusion; stated here, the tolerances of the tests do not move.
export TRITON_DEFAULT_FP_FUSION = 1

.PHONY: help setup demo test coverage test-oldest test-newest test-zoo test-vllm seams lint types docs bench bars evidence evidence-quality evidence-vllm dist clean
.DEFAULT_GOAL := help

help:
	@echo "make demo         steer a real language model (sets everything up first)"
	@echo "make test         the test suite; kernels under Triton's interpreter"
	@echo "make coverage     the share of steerfast's lines that its plain run reaches; before a release"
	@echo "make test-oldest  the same with the oldest supported transformers and triton"
	@echo "make test-newest  the whole suite with the newest releases, no pin kept; installed from scratch; before a release"
	@echo "make test-zoo     every architecture of transformers, each in a process of its own; about 8 minutes"
	@echo "make test-vllm    the plugin on a real vLLM engine, in an environment of its own"
	@echo "make seams        what steering builds on in vLLM, in the sources of a release or folder: VLLM=0.34.0, VLLM=path"
	@echo "make setup        environment in $(VENV) with the versions of constraints.txt"
	@echo "make lint types   ruff; mypy"
	@echo "make docs         the API reference, as pages in build/docs"
	@echo "make bench        benchmarks on this machine, at most 15 minutes; bench-add, bench-flow, … one suite"
	@echo "make bars         every number the project set itself: wanted, measured, met or not"
	@echo "make evidence     what takes hours: scaling, SAE training, the quality study; TEXT=FILE also measures the SAE on it"
	@echo "make evidence-quality  the quality study alone, resumed; DATA=FOLDER of public sets, MODEL=FOLDER or GGUF file of another model"
	@echo "make evidence-vllm  the same inside vLLM: 10 000 requests, host time, throughput"
	@echo "make dist         wheel and sdist in dist/"
	@echo "make clean        remove environments, caches and build output"
	@echo
	@echo "PYTHON=python3.12     another interpreter"
	@echo "PYTEST_ARGS='-k add'  more arguments for pytest"
	@echo "PIP_ARGS=...          more arguments for pip. On Linux the registry's torch is the CUDA build, several GB; for"
	@echo "                      the CPU build: make setup PIP_ARGS=--extra-index-url=https://download.pytorch.org/whl/cpu"
	@echo "NEWEST='torch==2.13.0'  test-newest: this torch (or any other requirement) and the newest of everything else"

# create(venv, constraint files, more requirements, triton): torch first. A CUDA build of torch brings the one triton it
# works with, so ours is pinned and installed only where torch came without.
define create
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "steerfast needs Python 3.10 or newer; '$(PYTHON)' is not. Try: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo "'$(PYTHON)' cannot create environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(1)
	sed -e '/^triton/d' -e '/^-c/d' $(2) > $(1)/constraints.txt
	$(1)/bin/python -m pip install --quiet $(PIP_ARGS) -c $(1)/constraints.txt -e ".[$(EXTRAS)]" $(3)
	$(1)/bin/python -c 'import triton' 2> /dev/null || \
	  $(1)/bin/python -m pip install --quiet $(PIP_ARGS) -c $(firstword $(2)) $(or $(4),-e ".[cpu-kernels]")
	@touch $@
endef

# The tests read data sets of Hugging Face, too; the oldest environment does without: `datasets` wants a newer hub.
$(VENV)/.installed: $(INPUTS) constraints.txt
	$(call create,$(VENV),constraints.txt constraints-common.txt,datasets)

$(VENV_OLDEST)/.installed: $(INPUTS) constraints-oldest.txt
	$(call create,$(VENV_OLDEST),constraints-oldest.txt constraints-common.txt)

# No pins, and so nothing that could be up to date: made anew at every call. Not held to the bounds of cpu-kernels either.
.PHONY: $(VENV_NEWEST)/.installed
$(VENV_NEWEST)/.installed:
	rm -rf $(VENV_NEWEST)
	$(call create,$(VENV_NEWEST),/dev/null,datasets $(patsubst %,'%',$(NEWEST)),triton)

setup: $(VENV)/.installed

demo: setup
	$(BIN)/steerfast demo

# Triton reads TRITON_INTERPRET when it is imported, so the interpreter's tests are a run of their own. Two processes of
# one thread each: the models under test are tiny, and threads that wait for each other cost more than they bring. Files are
# taken by their names: by their numbers of tests, the few long ones came last and left a core idle for minutes.
WORKERS ?= 2
PARALLEL := OMP_NUM_THREADS=1
run_plain = $(PARALLEL) $(1)/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not interpreter and not gpu and not zoo" $(2) $(PYTEST_ARGS)
run_interpreted = $(PARALLEL) TRITON_INTERPRET=1 $(1)/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m interpreter $(2) $(PYTEST_ARGS)
define run_tests
	$(run_plain)
	$(run_interpreted)
endef

# Quantised layers are steered, too. Their packages speak up wherever transformers is imported, so only the tests see them.
%/quantised/.installed: %/.installed
	$(if $(filter Linux,$(shell uname)),$*/bin/python -m pip install --quiet $(PIP_ARGS) -c $*/constraints.txt --no-deps \
	  --upgrade --target $(@D) torchao bitsandbytes)
	@mkdir -p $(@D) && touch $@

test: $(VENV)/quantised/.installed
	$(call run_tests,PYTHONPATH=$(abspath $(<D)) $(VENV))

# The plain run alone, measured: a fifth slower. The kernels are no part of the number: that a line of theirs ran under the
# interpreter says little about a GPU, and measuring there costs more than half as much time again.
coverage: $(VENV)/quantised/.installed
	$(call run_plain,PYTHONPATH=$(abspath $(<D)) $(VENV),--cov --cov-report=term)

test-newest: $(VENV_NEWEST)/quantised/.installed
	@PYTHONPATH=$(abspath $(<D)) $(VENV_NEWEST)/bin/python tests/releases.py
	$(call run_tests,PYTHONPATH=$(abspath $(<D)) $(VENV_NEWEST))

# What depends on the version of transformers or triton; the rest is the same code in both environments.
OLDEST := $(addprefix tests/test_,ahead_of_time.py bare.py compile.py conditions.py demo_model.py extract.py families.py hooks.py layers.py \
	ops.py robustness.py sae_ops.py)
test-oldest: $(VENV_OLDEST)/.installed
	$(call run_tests,$(VENV_OLDEST),$(OLDEST))

# Every architecture of transformers; `make test` tries a few of every kind. What changed for the better is written into
# tests/data/zoo.json and docs/models.md by `python tests/zoo.py --write`.
test-zoo: setup
	$(PARALLEL) ZOO_JOBS=$(WORKERS) $(BIN)/python -m pytest -q -m zoo tests/test_zoo.py $(PYTEST_ARGS)

# vLLM pins its own torch, so it has an environment of its own. A process per file: engines leave state behind.
VENV_VLLM ?= .venv-vllm
$(VENV_VLLM)/.installed: setup.py constraints-vllm.txt
	$(PYTHON) -m venv $(VENV_VLLM)
	$(VENV_VLLM)/bin/python -m pip install --quiet $(PIP_ARGS) -r constraints-vllm.txt
	$(VENV_VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VENV_VLLM)/bin/python -m pip install --quiet $(PIP_ARGS) --no-deps -e .
	@touch $@

# The longest first, WORKERS at a time; the model is converted once, before them.
VLLM_PARTS := v2 v2_pp v2_drafts v1 read capture server drafts pp edits moe images quantised by_token tp check families lora dp guards
test-vllm: $(VENV_VLLM)/.installed
	$(VENV_VLLM)/bin/python -c 'from steerfast.models import demo; demo.path(progress=print)'
	$(MAKE) --jobs $(WORKERS) --output-sync=target $(addprefix test-vllm-,$(VLLM_PARTS))

test-vllm-%: $(VENV_VLLM)/.installed
	$(PARALLEL) $(if $(filter v2%,$*),TRITON_INTERPRET=1) $(VENV_VLLM)/bin/python -m pytest -q --durations=3 tests/test_vllm_$*.py $(PYTEST_ARGS)

# What steering builds on in vLLM, read from the sources of releases (fetched once, 340 MB each, of which 55 MB are kept) or of a
# folder: make seams VLLM=0.34.0, make seams VLLM=path/to/vllm. Without VLLM the releases of steerfast/vllm/seam_table.py.
SOURCES ?= build/vllm-sources
seams: setup
	$(BIN)/python tests/vllm_sources.py $(VLLM) --keep $(SOURCES)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

# The reference of every public module, from the docstrings; a warning of the generator is an error.
docs: setup
	rm -rf build/docs
	$(BIN)/python docs/reference.py build/docs

bench: setup
	@series=$$(date -u +%Y-%m-%dT%H:%M:%S+00:00); status=0; \
	parts=$$($(BIN)/python -c "import torch; print(1 if torch.cuda.is_available() else 2)"); \
	for part in $$(seq $$parts); do echo "process $$part of $$parts"; $(PARALLEL) $(BIN)/python -m pytest benchmarks -q \
	-m "not slow" --series $$series --parts $$parts --visits 12 --deadline $$((800 / parts)) $(PYTEST_ARGS) \
	|| { status=$$?; [ $$status -ne 2 ] || break; }; done; exit $$status

bench-%: setup
	$(PARALLEL) $(BIN)/python -m pytest benchmarks/test_$*.py -q $(PYTEST_ARGS)

bars: setup
	$(BIN)/python benchmarks/bars.py

# What takes too long for CI; the results are committed. The SAE goes on where a run was cut off.
EVIDENCE ?= evidence
evidence: setup
	$(PARALLEL) $(BIN)/python -m pytest benchmarks -q -m slow $(PYTEST_ARGS)
	$(BIN)/steerfast sae train --preset smollm2 --out $(EVIDENCE)/sae
	$(if $(TEXT),$(BIN)/python benchmarks/sae_quality.py $(EVIDENCE)/sae --text $(TEXT))
	$(MAKE) evidence-quality
	$(BIN)/python benchmarks/report.py

# The quality study, resumed where it was cut off. DATA is a folder of public sets; MODEL another model, a folder or GGUF file.
quality = $(BIN)/python benchmarks/quality.py --seeds 3 $(if $(1),--model $(1))
truthful = $(BIN)/python benchmarks/quality_truthful.py $(DATA)/TruthfulQA.csv $(if $(1),--model $(1))
evidence-quality: setup
	$(call quality)
	$(call quality) --fields --concepts sentiment formality
	$(call quality) --everywhere
	$(if $(MODEL),$(call quality,$(MODEL)))
	$(if $(MODEL),$(call quality,$(MODEL)) --fields --concepts sentiment formality)
	$(if $(DATA),$(call quality) --data $(DATA))
	$(if $(DATA),$(call quality) --data $(DATA) --pairs 0 --nulls 0)
	$(if $(DATA),$(call truthful))
	$(if $(and $(DATA),$(MODEL)),$(call quality,$(MODEL)) --data $(DATA))
	$(if $(and $(DATA),$(MODEL)),$(call truthful,$(MODEL)))

# The same for the engine: the cost of steering, and 10 000 requests with random plans, strengths and aborts.
evidence-vllm: $(VENV_VLLM)/.installed
	$(VENV_VLLM)/bin/python benchmarks/vllm_soak.py --out benchmarks/results
	$(VENV_VLLM)/bin/python benchmarks/vllm_host.py --out benchmarks/results
	$(VENV_VLLM)/bin/python benchmarks/vllm_cost.py --out benchmarks/results --minutes 20
	$(VENV_VLLM)/bin/python benchmarks/vllm_cost.py --loads lora-16 --out benchmarks/results

dist: setup
	$(BIN)/python -m build --no-isolation

clean:
	rm -rf $(VENV) $(VENV_OLDEST) $(VENV_NEWEST) $(VENV_VLLM) steerfast-demo build dist *.egg-info .cache .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find kernels steerfast tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
