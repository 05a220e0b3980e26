# Every target does its own set-up. `make run` and `make test` are all a fresh machine needs.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
EXTRAS := dev,notebooks,slurm
# Compiling thousands of modules that nothing imports would take half of the set-up.
PIP    := $(BIN)/python -m pip install -q --disable-pip-version-check --no-compile
# Where there is no GPU, the CPU build of torch that the constraints name is enough. A GPU machine takes the newest torch
# of its index, with the triton that belongs to it.
ifeq ($(shell command -v nvidia-smi 2>/dev/null),)
TORCH  := $(shell grep '^torch==' constraints.txt)
FREE   := ^$$
else
TORCH  := torch>=2.11,<3
FREE   := ^(torch|triton)==
endif
# One thread more than the work needs can stall a shared machine: never let idle OpenMP threads spin.
export OMP_WAIT_POLICY = PASSIVE
export TOKENIZERS_PARALLELISM = false
# A shell that forbids it would have every process of the tests compile thousands of modules anew: 15 s instead of 5.
unexport PYTHONDONTWRITEBYTECODE

# In an unpacked bundle nothing is fetched: wheels and what `prefetch` makes lie beside this file.
ifneq ($(wildcard bundled/wheels),)
export PIP_NO_INDEX = 1
export PIP_FIND_LINKS = $(CURDIR)/bundled/wheels
export DYNACT_CACHE = $(CURDIR)/bundled/cache
export HF_HUB_OFFLINE = 1
export HF_DATASETS_OFFLINE = 1
MADE_WITH := $(shell cat bundled/python)
endif

.PHONY: run test test-slow test-gpu test-browser lint written figures report docs study archive fuzz bundle bench bench-gpu setup assets clean

run: setup assets
	$(BIN)/python run.py -m experiment=quickstart
	$(BIN)/python -m harness figures

test: setup assets
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 WANDB_MODE=offline OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder --durations 15
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m bench

test-slow: setup assets
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 $(BIN)/python -m pytest -m "slow"

# The report and the manual in headless Chromium: axe, phones, keys. The browser is the system's (`apt install chromium`)
# or Playwright's (`.venv/bin/playwright install chromium`).
test-browser: setup
	$(PIP) -c constraints.txt -e ".[dev,docs,browser]"
	$(BIN)/python -m pytest -m slow tests/test_browser.py

test-gpu: setup
	$(BIN)/python -m pytest -m gpu

# One tar for a machine without a network: this commit, wheels for a machine like this one, the data, and embedded models
# (models="qwen2.5-coder-0.5b …" for more than the default one). There: tar -xf dynact-bundle.tar && cd dynact && make run
models ?=
bundle: setup
	rm -rf build/bundle && mkdir -p build/bundle/dynact
	git archive HEAD | tar -x -C build/bundle/dynact
	$(BIN)/python -m pip download -q --disable-pip-version-check -d build/bundle/dynact/bundled/wheels \
		-c $(VENV)/constraints.txt "$(TORCH)" "setuptools>=77" wheel ".[$(EXTRAS)]"
	rm -f build/bundle/dynact/bundled/wheels/dynact-*
	$(BIN)/python -c "import platform; print(platform.python_version())" > build/bundle/dynact/bundled/python
	DYNACT_CACHE=$(CURDIR)/build/bundle/dynact/bundled/cache $(BIN)/python -m harness prefetch $(models)
	tar -cf build/dynact-bundle.tar -C build/bundle dynact

# 100,000 damaged and hostile files for everything that reads one; the count is committed.
fuzz: setup assets
	$(BIN)/python -m tests.fuzz --examples 100000 --out results/bench/fuzz.json

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

figures: setup
	$(BIN)/python -m harness figures

# What is written by scripts and committed: the map of the house, which method runs on which family, what new methods do.
written: setup
	$(BIN)/python -m tests.house_map
	$(BIN)/python -m tests.matrix_table > docs/families.md
	$(BIN)/python -m tests.test_fingerprint new
	$(BIN)/python -m tests.readme_board
	$(BIN)/python -m tests.schema_page
	$(BIN)/python -m tests.latency_page

# One page with everything: results/report.html
report: setup
	$(BIN)/python -m harness report

# The manual: build/site/index.html, which opens without a server.
docs: setup
	$(PIP) -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# The study's matrix; size=smoke, cpu or full (a GPU). Runs what is missing, then judges the claims. `make archive` adds
# the whole cells to results/study.
size ?= cpu
study: setup assets
	$(BIN)/python run.py experiment=pitfalls size=$(size)
	$(BIN)/python -m harness claims --limited

archive: setup
	$(BIN)/python -m harness archive results $(wildcard results/study) --to results/study

bench: setup assets
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.cpu_kernels --out results/bench/cpu_kernels.json
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.cpu_decode --out results/bench/cpu_decode.json
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.cpu_decode --dtype bfloat16 --no-compile --out results/bench/cpu_decode_bf16.json
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.cpu_step --out results/bench/cpu_step.json
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.cpu_lowbit --out results/bench/cpu_lowbit.json
	$(BIN)/python -m bench.overhead --out results/bench/overhead.json
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.reuse --out results/bench/reuse.json

bench-gpu: setup
	$(BIN)/python -m bench.gpu_kernels --out results/bench/gpu_kernels.json
	$(BIN)/python -m bench.gpu_decode --out results/bench/gpu_decode.json
	$(BIN)/python -m bench.gpu_attention --out results/bench/gpu_attention.json

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -z "$(MADE_WITH)" || $(PYTHON) -c "import sys; made = tuple(map(int, '$(MADE_WITH)'.split('.'))); \
		here = sys.version_info[:3]; here[:2] == made[:2] and here >= made or sys.exit('this bundle was made with Python ' \
		'$(MADE_WITH), and $(PYTHON) is %d.%d.%d: name a later one of the same series, make run PYTHON=...' % here)"
	@echo "installing into $(VENV): a few minutes, once"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)"
	grep -vE '$(FREE)' constraints.txt > $(VENV)/constraints.txt
	$(PIP) -c $(VENV)/constraints.txt -e ".[$(EXTRAS)]"
	touch $@

assets: setup
	$(BIN)/python -m harness prefetch

clean:
	rm -rf results/cells results/fits results/figures results/table.* results/wandb
