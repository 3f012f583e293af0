# The targets that people use. `make help` lists them.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.d2v_fast-installed
LIBRARY := d2v_fast/_C.so
CONFIG ?= configs/digits.json
PROCESSES ?= 1
OUT ?= build/gpu

.DEFAULT_GOAL := help
.PHONY: help setup build train test lint format bench bench-check gpu clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

setup: $(INSTALLED) ## virtual environment, pinned packages, C++ kernels

# torch first and alone: whatever asks for plain torch afterwards is content with it
$(INSTALLED): constraints.txt pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt torch
	D2V_REQUIRE_CPP=1 $(BIN)/pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[train,test,bench,hf]'
	touch $@

build: $(INSTALLED) $(LIBRARY) ## compile the C++ kernels again after a change in csrc/

# with the cmake of the environment: that of the isolated build is gone once pip has ended; the set-up may have just built it
$(LIBRARY): CMakeLists.txt $(wildcard csrc/*) | $(INSTALLED)
	@if test ! -e $@ || test -n "$$(find $^ -newer $@)"; then \
	PATH=$(abspath $(BIN)):$$PATH D2V_REQUIRE_CPP=1 $(BIN)/python setup.py --quiet build_ext --inplace && touch $@; fi

train: build ## pre-train on CONFIG (configs/digits.json) with PROCESSES (1) processes
	$(BIN)/deepspeed --num_accelerators $(PROCESSES) d2v_fast/train.py --ds_config $(CONFIG)

test: build ## run the tests
	$(BIN)/python -m pytest

lint: $(INSTALLED) ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*

format: $(INSTALLED) ## let ruff and clang-format rewrite the files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*

bench: build ## measure the operations, the masks and a step; table and plots in bench/results
	mkdir -p build
	$(BIN)/python -m pytest bench -q --benchmark-json build/bench.json
	$(BIN)/python bench/report.py build/bench.json

bench-check: build ## measure, and fail where a ratio is below what bench/goals.json expects
	mkdir -p build
	$(BIN)/python -m pytest bench -q --benchmark-json build/bench-check.json
	$(BIN)/python bench/report.py build/bench-check.json --check

# with the machine's own python: no network and no virtual environment; what is not installed there is skipped by name
gpu: ## build, test and benchmark on a machine with a CUDA GPU and no network; results under OUT
	mkdir -p $(OUT)
	$(PYTHON) -m pip install --quiet --no-build-isolation --no-deps -e . || $(PYTHON) setup.py --quiet build_ext --inplace
	$(PYTHON) -c "import torch, d2v_fast.ops as ops; print(torch.__version__, torch.cuda.get_device_name(), ops.backends())" > $(OUT)/machine.txt
	cat $(OUT)/machine.txt
	$(PYTHON) -m pytest tests --device cuda -p no:cacheprovider > $(OUT)/tests.txt 2>&1; code=$$?; tail -n 40 $(OUT)/tests.txt; \
	$(PYTHON) -m pytest bench --device cuda --benchmark-json $(OUT)/bench.json > $(OUT)/bench.txt 2>&1 || code=$$?; tail -n 60 $(OUT)/bench.txt; \
	$(PYTHON) bench/report.py $(OUT)/bench.json --out $(OUT)/results || code=$$?; \
	exit $$code

clean: ## remove what was built, not the runs
	rm -rf build $(VENV) d2v_fast/_C.so *.egg-info .pytest_cache .mypy_cache .ruff_cache
