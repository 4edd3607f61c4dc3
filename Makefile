# make train [RECIPE=mod_lm] [PYTHON=…] [key=value …]   train a recipe; every key of its configuration
# make test      the whole suite, ranks over gloo included (under 10 minutes on 2 cores)
# make test-all  and what is marked slow
# make test-backends   the whole suite on each backend that a CPU has; triton's kernels interpreted,
#                which takes long: BACKENDS="reference torch" or TESTS=tests/adaptive/blocks for less
# make soak      100 kills, signals, full disks, damaged checkpoints, bad configurations and 20,000 steps;
#                takes an hour or two, and goes on where it was (runs/soak); SOAK="kills --tries 20"
# make lint      ruff and mypy
# PYTHON=/path/to/python uses an existing environment (a GPU machine that has its torch);
# without it everything is installed into .venv, at the versions of requirements.lock.

RECIPE ?= mod_lm
BACKENDS ?= reference torch triton
TESTS ?= tests
VENV := .venv
BASE_PYTHON := $(shell command -v python3.11 || command -v python3)
TORCH := $(shell sed -n 's/^torch==//p' requirements.lock)
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
# Two processes, each a file at a time, in the order of tests/conftest.py.
SPREAD := -n 2 --dist loadfile --no-loadscope-reorder
SOURCES := adaptive parallel launch tests benchmarks setup.py

# Every KEY=VALUE of make's command line goes to the recipe, but for variables of this file and what
# programs read from their environment. MAKEOVERRIDES has the last one first, and blanks as `\ `.
NOT_KEYS := RECIPE PYTHON BACKENDS TESTS VENV BASE_PYTHON TORCH TORCH_CPU_INDEX SOURCES SPREAD SHELL \
  OUTPUT ADAPTIVE_BACKEND SOAK DS_ACCELERATOR CUDA_VISIBLE_DEVICES OMP_NUM_THREADS TRITON_INTERPRET
GIVEN = $(foreach word,$(subst \ ,_,$(subst \\,_,$(MAKEOVERRIDES))),$(firstword $(subst =, ,$(word))))
reversed = $(if $(1),$(call reversed,$(wordlist 2,$(words $(1)),$(1))) $(firstword $(1)))
quoted = '$(subst ','\'',$(1))'
OVERRIDES = $(foreach key,$(filter-out $(NOT_KEYS),$(call reversed,$(GIVEN))),$(call quoted,$(key)=$(value $(key))))

ifeq ($(PYTHON),)
  RUN := $(abspath $(VENV))/bin/python
  READY := $(VENV)/installed
else
  RUN := $(PYTHON)
  READY :=
endif

.PHONY: train test test-all test-backends soak lint clean

train: $(READY)
	@test -f recipes/$(RECIPE).sh || { echo "RECIPE=$(RECIPE): must be one of $(sort $(basename $(notdir $(wildcard recipes/*.sh))))" >&2; exit 2; }
	@PYTHON=$(RUN) bash recipes/$(RECIPE).sh $(OVERRIDES)

test: $(READY)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m "not slow and not gpu" $(SPREAD) --durations 15

test-all: $(READY)
	OMP_NUM_THREADS=1 $(RUN) -m pytest $(SPREAD) --durations 30

# Every backend runs, whatever failed on the one before. A test's limit is for compiled code.
test-backends: $(READY)
	@status=0; for backend in $(BACKENDS); do echo "ADAPTIVE_BACKEND=$$backend"; \
	  ADAPTIVE_BACKEND=$$backend TRITON_INTERPRET=1 OMP_NUM_THREADS=1 \
	  $(RUN) -m pytest -m "not slow and not gpu" $(SPREAD) --timeout 1200 \
	  --durations 15 $(TESTS) || status=1; done; exit $$status

soak: $(READY)
	OMP_NUM_THREADS=1 $(RUN) -m tests.soak $(SOAK)

lint: $(READY)
	$(RUN) -m ruff check $(SOURCES)
	$(RUN) -m ruff format --check $(SOURCES)
	$(RUN) -m mypy adaptive parallel

# The CPU build of torch where there is no GPU: the default build brings gigabytes of CUDA.
$(VENV)/installed: requirements.lock setup.py
	@test -n "$(BASE_PYTHON)" || { echo "python3.11: not found; give PYTHON=/path/to/python" >&2; exit 2; }
	$(BASE_PYTHON) -m venv $(VENV)
	@echo "Installing the versions of requirements.lock into $(VENV) (about two minutes) …"
	@if [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null; then \
	  $(VENV)/bin/pip install --quiet "torch==$(TORCH)+cpu" 2>/dev/null \
	  || $(VENV)/bin/pip install --quiet --index-url $(TORCH_CPU_INDEX) "torch==$(TORCH)+cpu"; \
	else $(VENV)/bin/pip install --quiet "torch==$(TORCH)"; fi
	@$(VENV)/bin/pip install --quiet -r requirements.lock
	@$(VENV)/bin/pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
