# Arriero: `make run` trains a small LLaMA on real text; `make test` installs what the tests need and runs them.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: all run test check bench clean

all: .venv/.done

# One environment, rebuilt when the dependencies change.
.venv/.done: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing dependencies into .venv (a minute or two the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check 'torch~=2.13.0'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

run: all
	@$(BIN)/arriero launch experiment=first_run

test: all
	@$(BIN)/python -m pytest

check: all
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: all
	@$(BIN)/python -m pytest tests/bench --override-ini=python_files='bench_*.py' -s

clean:
	rm -rf .venv dist build
