# Every target sets up what it needs: a virtual environment in .venv, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help setup demo test bench bench-gpu zoo check clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' Makefile

setup: $(INSTALLED)  ## create .venv and install everything into it

# torch goes in by itself, pinned, before anything that asks for "torch": otherwise pip may take gigabytes of
# another build. The two model libraries come without their own requirements for the same reason, and Model Explorer
# because its own are half a gigabyte: a test reads the classes of its JSON.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) --editable ".[test,zoo]"
	$(PIP) --no-deps torch-rechub==0.9.0 deepctr-torch==0.3.0 ai-edge-model-explorer==0.1.34
	touch $@

demo: setup  ## five real models against Inductor: at most 10 minutes, results in out/
	$(BIN)/recompile demo

test: setup  ## the tests, on two cores
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

bench: setup  ## the table of benchmarks with its targets, results in out/bench.json (ARGS="--group ratio")
	$(BIN)/python -m benchmarks.run $(ARGS)

bench-gpu:  ## the table of a GPU's benchmarks, in benchmarks/results/; with PYTHON's torch (ARGS="--quick")
	$(PYTHON) -m benchmarks.gpu $(ARGS)

zoo: setup  ## every model of the zoo against eager (ARGS="--only rechub.DeepFM")
	$(BIN)/recompile zoo $(ARGS)

check: setup  ## format, lint, types, long files
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python tools/size_table.py

clean:  ## remove the virtual environment and results
	rm -rf $(VENV) out
