# `make demo` and `make test` set themselves up; `make venv` is the set-up alone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-slow lint venv

demo: $(READY)
	$(BIN)/rayproj demo $(ARGS)

# One thread a worker: beside each other, two threads each wait for a core in every small operation. Three workers on two
# cores, as the one that brings up clusters mostly waits.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 3 --dist loadgroup --no-loadscope-reorder $(ARGS)

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

venv: $(READY)

# constraints.txt pins torch==2.13.0, which is the CPU build where no CUDA build is asked for; naming it in the same
# command keeps pip from taking another torch first.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "rayproj needs Python 3.11 or newer; run 'make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)'." >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "torch==2.13.0" -e ".[dev,s3]"
	touch $@
