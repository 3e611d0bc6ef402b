# Every command of this project. Set-up happens by itself: once, and again when what is to be installed changes.
PYTHON ?= python3
ARGS ?=

# The shell is named for its `time`, which says how long each check took.
SHELL := /bin/bash
BIN := .venv/bin
timed = @TIMEFORMAT='== $(1): %R s'; time
INSTALLED_FROM := pyproject.toml constraints.txt scripts/setup.py

# pyright would ask the network for a newer version of itself.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.PHONY: help train test setup clean

help: ## print this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 16

train: .venv/runtime.stamp ## train a classifier: make train ARGS="--epochs 5"
	@$(BIN)/dynaconv train $(ARGS)

test: .venv/dev.stamp ## the whole gate: ruff, pyright, pytest with coverage
	$(call timed,ruff check) $(BIN)/ruff check
	$(call timed,ruff format) $(BIN)/ruff format --check
	$(call timed,pyright) $(BIN)/pyright
	$(call timed,pytest) $(BIN)/pytest --cov --cov-report=term:skip-covered

setup: .venv/dev.stamp ## install everything for work on dynaconv into .venv

clean: ## remove what the tools leave behind; the runs and the wheels in the user's cache stay
	rm -rf .venv .coverage .pytest_cache .ruff_cache dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/runtime.stamp: $(INSTALLED_FROM)
	@"$(PYTHON)" scripts/setup.py

.venv/dev.stamp: $(INSTALLED_FROM)
	@"$(PYTHON)" scripts/setup.py --dev
