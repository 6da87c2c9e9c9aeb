# `make bench` and `make test` each work as the first command on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: help bench test check lint types overhead regret budget format clean

help:
	@echo "make bench     train two nets on digits, compare the strategies, draw the picture"
	@echo "make test      every test, every doctest, and the README's code"
	@echo "make check     lint and types"
	@echo "make overhead  jacrev against torch.func.jacrev on small networks"
	@echo "make regret    auto and autotune against the best strategy picked by hand"
	@echo "make budget    Jacobians under a tenth of the memory that they would take"
	@echo "make format    let ruff format the code"

# One stamp: the environment is made anew when what it installs changes.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt torch
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	@touch $@

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks $(ARGS)

overhead: $(VENV)/.installed
	$(BIN)/python -m benchmarks overhead

regret: $(VENV)/.installed
	$(BIN)/python -m benchmarks regret $(ARGS)

budget: $(VENV)/.installed
	$(BIN)/python -m benchmarks budget

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
	rm -rf $(VENV)
