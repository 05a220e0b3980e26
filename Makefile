# Every target does its own set-up. `make run` and `make test` are all a fresh machine needs.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# A GPU machine takes the index's own torch; elsewhere the CPU build named in the constraints is enough.
TORCH  := $(shell if command -v nvidia-smi >/dev/null 2>&1; then echo 'torch>=2.11,<3'; else grep '^torch==' constraints.txt; fi)
# One thread more than the work needs can stall a shared machine: never let idle OpenMP threads spin.
export OMP_WAIT_POLICY = PASSIVE
export TOKENIZERS_PARALLELISM = false

.PHONY: run test test-slow test-gpu lint figures bench bench-gpu setup assets clean

run: setup assets
	$(BIN)/python run.py -m experiment=quickstart
	$(BIN)/python -m harness.figures

test: setup assets
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 WANDB_MODE=offline $(BIN)/python -m pytest
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m bench

test-slow: setup assets
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 $(BIN)/python -m pytest -m "slow"

test-gpu: setup
	$(BIN)/python -m pytest -m gpu

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

figures: setup
	$(BIN)/python -m harness.figures

bench: setup assets
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.cpu_kernels --out results/bench/cpu_kernels.json
	$(BIN)/python -m bench.overhead --out results/bench/overhead.json

bench-gpu: setup
	$(BIN)/python -m bench.gpu_kernels --out results/bench/gpu_kernels.json
	$(BIN)/python -m bench.gpu_decode --out results/bench/gpu_decode.json

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev,notebooks]"
	touch $@

assets: setup
	$(BIN)/python -m harness.assets

clean:
	rm -rf results/cells results/fits results/figures results/table.* results/wandb
