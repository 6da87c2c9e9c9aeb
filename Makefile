# `make bench` and `make test` each work as the first command on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RIVALS := .venv-rivals
ARGS ?=

.PHONY: help bench test check lint types overhead regret budget samples rivals structure format clean

help:
	@echo "make bench     train two nets on digits, compare the strategies, draw the picture"
	@echo "make test      every test, every doctest, and the README's code"
	@echo "make check     lint and types"
	@echo "make overhead  jacrev against torch.func.jacrev on small networks"
	@echo "make regret    auto and autotune against the best strategy picked by hand"
	@echo "make budget    Jacobians under a tenth of the memory that they would take"
	@echo "make samples   per-sample parameter Jacobians: jacfunc against vmap(jacrev)"
	@echo "make rivals    the same beside other libraries, in an environment of their own"
	@echo "make structure NTK, GGN, reused buffers and their growth, beside rivals (same environment)"
	@echo "make format    let ruff format the code"

# One stamp: the environment is made anew when what it installs changes.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt torch
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev,test-hf]'
	@touch $@

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks $(ARGS)

overhead: $(VENV)/.installed
	$(BIN)/python -m benchmarks overhead

regret: $(VENV)/.installed
	$(BIN)/python -m benchmarks regret $(ARGS)

budget: $(VENV)/.installed
	$(BIN)/python -m benchmarks budget

samples: $(VENV)/.installed
	$(BIN)/python -m benchmarks samples $(ARGS)

# The rivals' own environment: what they bring must not change what the tests know.
$(RIVALS)/.installed: pyproject.toml constraints.txt benchmarks/rivals.txt
	$(PYTHON) -m venv $(RIVALS)
	$(RIVALS)/bin/python -m pip install --constraint constraints.txt torch
	$(RIVALS)/bin/python -m pip install --constraint constraints.txt --editable '.[bench,scipy]'
	$(RIVALS)/bin/python -m pip install --no-deps --requirement benchmarks/rivals.txt
	@touch $@

rivals: $(RIVALS)/.installed
	$(RIVALS)/bin/python -m benchmarks samples $(ARGS)

structure: $(RIVALS)/.installed
	$(RIVALS)/bin/python -m benchmarks structure $(ARGS)

test: $(VENV)/.installed
	$(BIN)/python -m pytest $(ARGS)

check: lint types

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(RIVALS)
