# `make demo` and `make test` do all the set-up they need, in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: native
native:  ## build the C++ extension in place, for working on the code
	$(PYTHON) setup.py build_ext --inplace
