# `make bench` and `make test` each work as the first command on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RIVALS := .venv-rivals
ARGS ?=
WORKERS ?= 2
CORE := tests/house/test_house.py tests/trees tests/assembly tests/linear_map tests/functions

.PHONY: help bench suite report figures compare hand test quick check lint types overhead budget first_call ladder
.PHONY: format clean

help:
	@echo "make bench     the quick suite: tables, page and picture in two minutes"
	@echo "make suite     the full suite beside every rival; ARGS=--resume goes on with it"
	@echo "make report    page and picture of the full suite's results"
	@echo "make figures   the README's figures, from the committed results"
	@echo "make compare   what became slower between two results files: A=… B=…"
	@echo "make hand      every door beside the best by hand, in a few minutes"
	@echo "make test      every test, every doctest, and the README's code"
	@echo "make check     lint and types"
	@echo "make quick     lint, types and the tests of the core, in a minute and a half"
	@echo "make overhead  jacrev against torch.func.jacrev on small networks"
	@echo "make budget    Jacobians under a tenth of the memory that they would take"
	@echo "make first_call  what the first call of a process takes of its budget"
	@echo "make ladder    what Jacobians of networks that vmap refuses take beside their result"
	@echo "make format    let ruff format the code"

# One stamp: the environment is made anew when what it installs changes.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt torch
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev,test-hf]'
	@touch $@

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks $(ARGS)

suite: $(RIVALS)/.installed
	$(RIVALS)/bin/python -m benchmarks run --suite full $(ARGS)
	$(RIVALS)/bin/python -m benchmarks report --suite full

report: $(VENV)/.installed
	$(BIN)/python -m benchmarks report $(ARGS)

figures: $(VENV)/.installed
	$(BIN)/python -m benchmarks figures

hand: $(VENV)/.installed
	$(BIN)/python -m benchmarks run --suite hand $(ARGS)

compare: $(VENV)/.installed
	$(BIN)/python -m benchmarks compare $(A) $(B)

overhead: $(VENV)/.installed
	$(BIN)/python -m benchmarks overhead

budget: $(VENV)/.installed
	$(BIN)/python -m benchmarks budget

first_call: $(VENV)/.installed
	$(BIN)/python -m benchmarks first_call

ladder: $(VENV)/.installed
	$(BIN)/python -m benchmarks ladder

# The rivals' own environment: what they bring must not change what the tests know.
$(RIVALS)/.installed: pyproject.toml constraints.txt benchmarks/rivals.txt
	$(PYTHON) -m venv $(RIVALS)
	$(RIVALS)/bin/python -m pip install --constraint constraints.txt torch
	$(RIVALS)/bin/python -m pip install --constraint constraints.txt --editable '.[bench,scipy,test-hf]'
	$(RIVALS)/bin/python -m pip install --no-deps --requirement benchmarks/rivals.txt
	@touch $@

# Two processes at once, or as many as WORKERS says; 0 runs all tests in one.
test: $(VENV)/.installed
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal $(ARGS)

# Lint, types and the tests of the core: what to run between two edits.
quick: check
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal -q $(CORE)

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
