# make setup | demo | test | check and more; every target prepares what it needs in .venv of this checkout.
# TORCH_VARIANT=cuda|cpu and TORCH=torch==VERSION choose another PyTorch than install.py would
PYTHON ?= python3
TORCH ?=
TORCH_VARIANT ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TEST_WORKERS ?= 2
# tests in parts of the list, so that most set-ups are made once; who ends first takes over from the others
SPREAD := --dist worksteal -n $(TEST_WORKERS)
# ranks wait for each other, or for a timeout, most of the time
SPREAD_RANKS := --dist worksteal -n $(shell expr $(TEST_WORKERS) + 1)
# the same on every machine: a GPU is for test-gpu, kernels run in the interpreter
NO_GPU := CUDA_VISIBLE_DEVICES=
REHEARSED := tests/test_kills.py tests/test_benchmarks_gpu_runs.py::test_two_ranks_are_launched_judged_and_tabulated
export OMP_NUM_THREADS ?= 1

.PHONY: help setup demo test test-distributed test-slurm test-browser test-gpu rings test-install check faults format equivalence mutations bench-data bench-gpu clean FORCE

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 20

setup: $(READY)  ## create .venv with pinned versions (safe to run again; PYTHON=, TORCH_VARIANT=cuda|cpu, TORCH=torch==…)

$(READY): pyproject.toml constraints.txt install.py $(if $(TORCH)$(TORCH_VARIANT),FORCE)
	@$(PYTHON) install.py --venv $(VENV) --variant "$(TORCH_VARIANT)" --torch "$(TORCH)"

FORCE:

demo: setup  ## generate tiny proteins, prepare, train to the target, check the log, write the report (CPU, minutes)
	$(BIN)/scalefold demo

test: setup  ## CPU tests
	$(NO_GPU) $(BIN)/python -m pytest -q $(SPREAD) -m "not gpu and not multi_gpu and not slurm and not distributed and not browser and not faults and not long"
	$(MAKE) test-distributed

test-distributed: setup  ## multi-process CPU tests
	$(NO_GPU) $(BIN)/python -m pytest -q $(SPREAD_RANKS) -m "distributed and not gpu and not multi_gpu and not faults and not long"

faults: setup  ## rehearse every fault, kills at random and the judge of starts, write the table in docs/faults.md (CPU, minutes)
	$(NO_GPU) SCALEFOLD_WRITE_FAULTS=1 $(BIN)/python -m pytest -q tests/faults $(REHEARSED)

test-slurm: setup  ## tests on a real Slurm that is installed and started for them (Debian, root)
	$(NO_GPU) $(BIN)/python -m pytest -q -m slurm

test-browser: setup  ## reports in a real browser that is installed for them (Debian, root)
	$(NO_GPU) $(BIN)/python -m pytest -q -m browser

test-gpu: setup  ## tests that need one or more CUDA devices, and those of kernels as a GPU compiles them (TEST_WORKERS=)
	$(BIN)/python -m pytest -q -m "gpu or multi_gpu"
	$(BIN)/python -m pytest -q $(SPREAD) -m "not gpu and not multi_gpu and not long" tests/test_kernels_*.py

equivalence: setup  ## compare everything with the reference's numbers, rewrite the table in docs/equivalence.md
	$(NO_GPU) PYTHONPATH=tests $(BIN)/python -m parity.table

mutations: setup  ## plant defects in a copy of the source and show that tests catch all of them
	$(NO_GPU) PYTHONPATH=tests $(BIN)/python -m parity.mutations

bench-data: setup  ## prepare real or generated chains and measure samples per second on one core
	$(BIN)/python benchmarks/measure/data_pipeline.py

bench-gpu: setup  ## measure a step on this machine's GPUs, side by side, and judge every line (TORCH=torch==2.11.0 STORE=folder)
	$(BIN)/python benchmarks/measure/gates.py $(STORE)

rings: setup  ## the long ring: compiled kernels (faults at every share, keys, machine code) and scripts (no GPU, minutes)
	$(NO_GPU) $(BIN)/python -m pytest -q $(SPREAD) -m "long and not gpu"
	$(NO_GPU) PYTHONPATH=tests TRITON_INTERPRET=1 $(BIN)/python -m pytest -q $(SPREAD) -p separate_programs \
		-m "not (gpu or multi_gpu or distributed or long)" tests/test_kernels_*.py tests/test_direct.py tests/test_dap_arriv*.py
	$(BIN)/python benchmarks/measure/compile_targets.py --faults --dap 1 2 4 8 --evaluation 320 704
	$(BIN)/python benchmarks/measure/compile_targets.py --faults --targets 100

test-install:  ## what a fresh machine would install, from the package index alone: resolver matrix, installation, short demo
	$(PYTHON) tests/installation.py

check: setup  ## lint, format, types, and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/shellcheck launch/*.sh .ci/run
	$(BIN)/python -m pytest -q -p no:cacheprovider tests/test_imports.py

format: setup  ## apply the formatter and safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and all caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build dist
