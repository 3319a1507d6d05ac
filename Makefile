# make demo | test | bench | gpu | lint: each does its own set-up in .venv. A second run starts within seconds.
PYTHON ?= python3
BIN := .venv/bin
STEPS ?=
BENCH ?=
GPU ?=

.PHONY: demo test bench gpu lint
demo: .venv/ready
	$(BIN)/fastclip demo $(if $(STEPS),--steps $(STEPS))

test: .venv/ready
	$(BIN)/python -m pytest

bench: .venv/ready
	$(BIN)/python -m benchmarks $(BENCH)

# On a machine with a GPU: the system's Python with torch, triton, numpy and pytest; no install, no network.
# make gpu GPU="--only tests" passes flags on; python3 -m benchmarks.gpu --help has them.
gpu:
	PYTHONSAFEPATH=1 PYTHONPATH=$$($(PYTHON) benchmarks/gpu_path.py)$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) -m benchmarks.gpu $(GPU)

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/ready: setup.py pyproject.toml constraints.txt $(wildcard csrc/*/*)
	@echo "Setting up .venv, once: torch and the other packages are downloaded and the CPU kernels are built; minutes"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools ninja numpy torch
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e ".[dev]"
	touch $@
