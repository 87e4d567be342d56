# `make help` lists the commands. Each sets up what it needs in .venv, from nothing but make and Python >= 3.10.

PYTHON ?= python3
PIP_FLAGS ?=
PYTEST_FLAGS ?=
DEMO_FLAGS ?=
SOAK_FLAGS ?=
BENCH_FLAGS ?=
FUZZ_FLAGS ?= --seconds 300
RACES_FLAGS ?= --seeds 2000
BENCHES ?= $(filter-out bench.bench_device,$(patsubst bench/%.py,bench.%,$(sort $(wildcard bench/bench_*.py))))
CUDA_RESULTS ?= build/test-cuda.json
CUDA_BENCHES ?= bench.speed_test bench.bench_device

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PEERS := $(VENV)/peers
PYTEST := $(BIN)/python -m pytest -n 3 --dist loadfile
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-input --constraint constraints.txt $(PIP_FLAGS)
# Two makes at once must not build one .venv together.
LOCK := $(if $(shell command -v flock),flock $(VENV).lock)
# With somebody else's Python: this checkout first, then the peers, whose folder holds a nitrous_ema 0.0.1 as well.
WITH_PYTHON := PYTHONPATH="$(CURDIR):$(CURDIR)/$(PEERS):$$PYTHONPATH" $(PYTHON)

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-slow test-bench check same-bytes crash soak fuzz races bench test-cuda bench-cuda clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*  ## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

demo: venv  ## train, snapshot, synthesize and choose an EMA length on real digits (DEMO_FLAGS=...)
	@$(BIN)/python -m nitrous_ema demo $(DEMO_FLAGS)

test: venv  ## the tests, in minutes (PYTEST_FLAGS="-k words -x -n 8")
	@$(PYTEST) -m "not slow" --ignore tests/bench $(PYTEST_FLAGS)

# Small models are averaged inside update() in their users' hands, and in the thread in the other runs.
test-slow: venv  ## the tests that take long, and all of AsyncPostHocEMA with small models averaged inside update()
	@$(PYTEST) -m slow --ignore tests/bench $(PYTEST_FLAGS)
	@$(PYTEST) -m "not slow" --small-models inline tests/unit/async_ tests/behaviour $(PYTEST_FLAGS)

test-bench: venv  ## the tests of the benches and of the tables in the docs
	@$(PYTEST) tests/bench $(PYTEST_FLAGS)

check: venv  ## format, lint, types, import direction and plain English
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m tests.plain_english
	$(BIN)/python -m pytest -q tests/behaviour/test_import_direction.py

same-bytes: venv  ## every file, JSON object and exit status of this checkout and another, byte for byte (OLD=path)
	@test -n "$(OLD)" || { echo "make: same-bytes needs the other checkout; pass OLD=path." >&2; exit 2; }
	@$(BIN)/python -m tests.same_bytes "$(OLD)" .

crash: venv  ## long crash campaigns: every crash state, every mutation, hundreds of kills and failing calls
	@$(BIN)/python -m tests.crash.campaign
	@$(BIN)/python -m tests.crash.mutations
	@$(BIN)/python -m tests.crash.kills --kills 400
	@$(BIN)/python -W ignore -m tests.crash.faults --random 1000
	@$(BIN)/python -W ignore -m tests.crash.faults --random 1000 --seed 1 --folder /dev/shm

soak: venv  ## training runs, readers and a pruner in one folder for minutes (SOAK_FLAGS="--seconds 3600")
	@$(BIN)/python -W ignore -m tests.crash.soak $(SOAK_FLAGS)

fuzz: venv  ## long coverage-guided fuzzing of everything that reads files (FUZZ_FLAGS="--seconds 300 --seed 0")
	@$(BIN)/python -W ignore -m tests.fuzz.campaign $(FUZZ_FLAGS)

races: venv  ## all scenarios, and all missing waits, on a fake device in thousands of orders (RACES_FLAGS="--seeds 2000")
	@$(BIN)/python -m tests.support.laggy.campaign $(RACES_FLAGS)

bench: venv  ## side by side with ema-pytorch and nitrous-ema 0.0.1 (BENCHES=bench.bench_one BENCH_FLAGS=...)
	@set -e; for bench in $(BENCHES); do $(BIN)/python -m $$bench $(BENCH_FLAGS); done

test-cuda:  ## the CUDA tests, with the torch that PYTHON=... has; installs nothing (CUDA_RESULTS=file.json)
	@$(WITH_PYTHON) -m pytest tests/cuda -m cuda --require-cuda --device-results $(CUDA_RESULTS) $(PYTEST_FLAGS)

bench-cuda:  ## a quarter of an hour on the accelerator, with the torch that PYTHON=... has; installs nothing (CUDA_BENCHES=...)
	@mkdir -p build/bench
	@status=0; for bench in $(CUDA_BENCHES); do \
		$(WITH_PYTHON) -m $$bench --device cuda --json build/bench $(BENCH_FLAGS) || status=1; done; exit $$status

venv:  ## only set up .venv (PYTHON=..., PIP_FLAGS=...)
	@$(LOCK) $(MAKE) --silent --no-print-directory $(READY)

# .ready says that the environment is whole. Without it whatever is there is a set-up that was cut short, and goes.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "make PYTHON=...: Python 3.10 or newer is needed, this is " + sys.version)'
	@echo "Setting up $(VENV); the first time this takes a minute or more: torch is large."
	@test -f $(READY) || { rm -rf $(VENV) && $(PYTHON) -m venv $(VENV); } \
		|| { echo "make: '$(PYTHON) -m venv' failed; on Debian it needs the package python3-venv." >&2; exit 1; }
	@rm -f $(READY)
	@$(INSTALL) hatchling editables setuptools
	@$(INSTALL) --no-build-isolation --editable '.[demo,plot,bench,test,dev]'
	@$(INSTALL) --no-deps --upgrade --target $(PEERS) ema-pytorch nitrous-ema==0.0.1
	@touch $(READY)

clean:  ## remove .venv and every cache
	rm -rf $(VENV) $(VENV).lock build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
