# `make help` lists the targets.
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
DEVICE ?= cuda
SECONDS ?= 360

.DEFAULT_GOAL := help
.PHONY: help setup lock build dist train train-speech train-text test test-minimal test-dist sanitize lint format docs bench bench-check gpu clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 22

setup: $(INSTALLED) ## virtual environment, pinned packages, C++ kernels

# Files are checked against the hashes in requirements.lock, except torch: its files differ between indexes, and a GPU
# machine needs another build. setuptools comes first, because it builds packages that are published as source.
# The lock needs Python 3.11; older versions use the ranges of pyproject.toml.
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

build: $(INSTALLED) $(LIBRARY) ## rebuild the C++ kernels if csrc/ changed

# uses the cmake of the virtual environment; the set-up may have just built the library
$(LIBRARY): CMakeLists.txt $(wildcard csrc/*) | $(INSTALLED)
	@if test ! -e $@ || test -n "$$(find $^ -newer $@)"; then \
	PATH=$(abspath $(BIN)):$$PATH D2V_REQUIRE_CPP=1 $(BIN)/python setup.py --quiet build_ext --inplace && touch $@; fi

# isolated, as for a release: installs torch and the build tools into a separate environment
dist: $(INSTALLED) ## source archive and wheel, in dist/
	rm -rf dist
	PIP_CONSTRAINT=$(abspath constraints.txt) D2V_REQUIRE_CPP=1 $(BIN)/python -m build

train: build ## pre-train with CONFIG (configs/digits.json) and PROCESSES (1)
	$(BIN)/deepspeed --num_accelerators $(PROCESSES) d2v_fast/train.py --ds_config $(CONFIG)

train-speech: CONFIG = configs/speech.json
train-speech: train ## pre-train on 300 spoken words

train-text: CONFIG = configs/text.json
train-text: train ## pre-train on the reference pages of Python

# Python keeps what it compiles, in build/: the tests start many processes, and packages are installed uncompiled
test: export PYTHONDONTWRITEBYTECODE =
test: export PYTHONPYCACHEPREFIX = $(abspath build/bytecode)
# two files at a time, so that what the tests of a file share is made once: first those that compute, then, more at a
# time, those that mostly wait
test: build ## run the tests
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not waits"
	$(BIN)/python -m pytest -n 4 --dist worksteal -m waits

test-minimal: ## the tests of the operations in an environment with torch and no other dependency
	rm -rf build/minimal
	$(PYTHON) -m venv build/minimal
	build/minimal/bin/pip install --quiet --disable-pip-version-check torch
	build/minimal/bin/pip install --quiet --disable-pip-version-check pytest pytest-timeout hypothesis cmake setuptools
	PATH=$(abspath build/minimal/bin):$$PATH D2V_REQUIRE_CPP=1 build/minimal/bin/pip install --quiet --no-build-isolation -e .
	build/minimal/bin/python -m pytest tests/ops -p no:cacheprovider

test-dist: build ## source archive and wheel: what is in them, and whether they work where they are installed
	$(BIN)/python -m pytest tests/project/test_packaging.py --run-slow

# in a copy of the Python files, so that d2v_fast/_C.so does not change. The libraries of GCC are preloaded, because
# Python is not instrumented. Tests of Triton and torch.compile run no C++ of this library, and times mean nothing.
sanitize: $(INSTALLED) ## test the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer
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
	$(abspath $(BIN))/python -m pytest tests/ops -n 2 -q -p no:cacheprovider -k "not triton and not compile and not derivatives and not host_time"

lint: $(INSTALLED) ## ruff, mypy, clang-format, codespell
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*

format: $(INSTALLED) ## format the code with ruff and clang-format
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

bench: build ## time operations, masks and a step; write bench/results
	mkdir -p build
	$(BIN)/python -m pytest bench -q --run-slow --benchmark-json build/bench.json
	$(BIN)/python bench/report.py build/bench.json

bench-check: build ## fail if a ratio is below its goal in bench/goals.json
	mkdir -p build
	$(BIN)/python -m pytest bench -q --benchmark-json build/bench-check.json
	$(BIN)/python bench/report.py build/bench-check.json --check

# uses the machine's own python, without network or virtual environment; reports and skips what is not installed
gpu: ## build, test and benchmark on a CUDA machine without network, in SECONDS (360); results in OUT
	$(PYTHON) bench/gpu.py --out $(OUT) --device $(DEVICE) --seconds $(SECONDS)

clean: ## remove everything that was built; keep runs
	rm -rf build dist $(VENV) d2v_fast/_C.so *.egg-info .pytest_cache .mypy_cache .ruff_cache
