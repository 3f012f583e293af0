# The targets that people use. `make help` lists them.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --no-compile --disable-pip-version-check
INSTALLED := $(VENV)/.d2v_fast-installed
LIBRARY := d2v_fast/_C.so
DOCS := build/docs-venv
CONFIG ?= configs/digits.json
PROCESSES ?= 1
OUT ?= build/gpu

.DEFAULT_GOAL := help
.PHONY: help setup lock build dist train train-speech train-text test test-minimal test-dist sanitize lint format docs bench bench-check gpu clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 22

setup: $(INSTALLED) ## virtual environment, pinned packages, C++ kernels

# Every file is held against its hash in requirements.lock, but for torch: each index has other files of one version, and
# a GPU machine wants its own. setuptools comes first, for it builds what is published as source, and only what is locked
# takes part in a build. The lock begins with Python 3.11; before that, the ranges of pyproject.toml must do.
$(INSTALLED): requirements.lock constraints.txt pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	if $(BIN)/python -c "import sys; sys.exit(sys.version_info < (3, 11))"; then \
	sed -n '/^setuptools==/,/[^\\]$$/p' requirements.lock > $(VENV)/setuptools.lock && \
	$(PIP) --require-hashes --no-deps -r $(VENV)/setuptools.lock && \
	$(PIP) --require-hashes --no-deps --no-build-isolation -r requirements.lock && \
	$(PIP) -c constraints.txt torch && \
	PATH=$(abspath $(BIN)):$$PATH D2V_REQUIRE_CPP=1 $(PIP) --no-deps --no-build-isolation -e .; \
	else $(PIP) torch && D2V_REQUIRE_CPP=1 $(PIP) -e '.[train,test,bench,hf]'; fi
	touch $@

lock: ## requirements.lock and docs/requirements.lock again, after a change in constraints.txt or pyproject.toml
	rm -rf build/lock
	$(PYTHON) -m venv build/lock
	build/lock/bin/pip install --quiet --disable-pip-version-check uv==0.13.9
	grep -v '^torch==' constraints.txt | build/lock/bin/uv pip compile --quiet --no-config --python build/lock/bin/python \
	--python-version 3.11 --no-deps --generate-hashes --no-annotate --no-header --no-emit-index-url -o build/lock/new -
	{ echo '# Made by `make lock` out of constraints.txt: the hashes of all files of every version.'; cat build/lock/new; } > requirements.lock
	$(PYTHON) -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'], sep='\n')" | \
	build/lock/bin/uv pip compile --quiet --no-config --python build/lock/bin/python --python-version 3.11 --universal \
	--constraint constraints.txt --generate-hashes --no-annotate --no-header --no-emit-index-url -o build/lock/docs -
	{ echo '# Made by `make lock` out of the extra `docs` of pyproject.toml and constraints.txt.'; cat build/lock/docs; } > docs/requirements.lock

build: $(INSTALLED) $(LIBRARY) ## compile the C++ kernels again after a change in csrc/

# with the cmake of the environment: that of the isolated build is gone once pip has ended; the set-up may have just built it
$(LIBRARY): CMakeLists.txt $(wildcard csrc/*) | $(INSTALLED)
	@if test ! -e $@ || test -n "$$(find $^ -newer $@)"; then \
	PATH=$(abspath $(BIN)):$$PATH D2V_REQUIRE_CPP=1 $(BIN)/python setup.py --quiet build_ext --inplace && touch $@; fi

# with isolation, as for a release: torch and the build tools are installed into an environment of their own
dist: $(INSTALLED) ## source archive and wheel, in dist/
	rm -rf dist
	PIP_CONSTRAINT=$(abspath constraints.txt) D2V_REQUIRE_CPP=1 $(BIN)/python -m build

train: build ## pre-train on CONFIG (configs/digits.json) with PROCESSES (1) processes
	$(BIN)/deepspeed --num_accelerators $(PROCESSES) d2v_fast/train.py --ds_config $(CONFIG)

train-speech: CONFIG = configs/speech.json
train-speech: train ## pre-train on 300 spoken words

train-text: CONFIG = configs/text.json
train-text: train ## pre-train on the reference pages that Python carries

# two files at a time, so that what the tests of a file share is made once: first those that compute, then those that
# mostly wait; at last, one by one, those with a clock
test: build ## run the tests
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not alone and not waits"
	$(BIN)/python -m pytest -n 2 --dist loadfile -m waits
	$(BIN)/python -m pytest -m alone

test-minimal: ## the tests of the operations in an environment with torch and no other dependency
	rm -rf build/minimal
	$(PYTHON) -m venv build/minimal
	build/minimal/bin/pip install --quiet --disable-pip-version-check torch
	build/minimal/bin/pip install --quiet --disable-pip-version-check pytest pytest-timeout hypothesis cmake setuptools
	PATH=$(abspath build/minimal/bin):$$PATH D2V_REQUIRE_CPP=1 build/minimal/bin/pip install --quiet --no-build-isolation -e .
	build/minimal/bin/python -m pytest tests/ops -p no:cacheprovider -m "not alone"

test-dist: build ## source archive and wheel: what is in them, and whether they work where they are installed
	$(BIN)/python -m pytest tests/project/test_packaging.py --run-slow

# beside a copy of the Python files, so that d2v_fast/_C.so stays what it is; with GCC, whose libraries are loaded first:
# Python itself is not instrumented. Triton and torch.compile have none of our C++ in them.
sanitize: $(INSTALLED) ## the tests of the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer
	$(BIN)/cmake -S . -B build/sanitize -G "Unix Makefiles" -DCMAKE_CXX_COMPILER=g++ -DD2V_SANITIZE=ON \
	-DD2V_TORCH_FOLDER=$$($(BIN)/python -c "import pathlib, torch; print(pathlib.Path(torch.__file__).parent)")
	$(BIN)/cmake --build build/sanitize --parallel
	rm -rf build/sanitized
	mkdir build/sanitized
	cp -RP d2v_fast kernels tests conftest.py pyproject.toml build/sanitized
	rm -f build/sanitized/$(LIBRARY)
	$(BIN)/cmake --install build/sanitize --prefix build/sanitized
	nm -D build/sanitized/$(LIBRARY) | grep -q __asan_report
	nm -D build/sanitized/$(LIBRARY) | grep -q __ubsan_handle
	cd build/sanitized && ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	$(abspath $(BIN))/python -m pytest tests/ops -n 2 -q -p no:cacheprovider -k "not triton and not compile and not derivatives"

lint: $(INSTALLED) ## ruff, mypy, clang-format, codespell
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*

format: $(INSTALLED) ## let ruff and clang-format rewrite the files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*

# in an environment of its own, without torch: of d2v_fast only its configuration and its help are imported
$(DOCS)/.installed: docs/requirements.lock
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
	{ echo "make docs needs Python 3.11 or later: name one, make docs PYTHON=python3.11"; exit 1; }
	rm -rf $(DOCS)
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install --quiet --no-compile --disable-pip-version-check --require-hashes --no-deps -r docs/requirements.lock
	touch $@

docs: $(DOCS)/.installed ## documentation site, in build/site
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

bench: build ## measure the operations, the masks and a step; table and plots in bench/results
	mkdir -p build
	$(BIN)/python -m pytest bench -q --run-slow --benchmark-json build/bench.json
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
	rm -rf build dist $(VENV) d2v_fast/_C.so *.egg-info .pytest_cache .mypy_cache .ruff_cache
