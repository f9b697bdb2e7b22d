# Arriero: `make run` trains a small LLaMA on real text; `make test` installs what the tests need and runs them.
PYTHON ?= python3
BIN := .venv/bin
# By themselves: many real jobs at once against deadlines.
ALONE := tests/integration/test_chaos.py

.PHONY: all run test chaos check bench clean chromium slurm faketime

all: .venv/.done

# One environment, rebuilt when the dependencies change.
.venv/.done: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing dependencies into .venv (a minute or two the first time)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check 'torch~=2.13.0'
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --editable '.[dev]'
	@touch $@

run: all
	@$(BIN)/arriero launch experiment=first_run

test: all chromium slurm faketime
	@$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder $(ALONE:%=--ignore=%)
	@$(BIN)/python -m pytest $(ALONE)

# Pages are tested in a real Chromium. Where it can't be installed those tests are skipped and say so; in CI they fail.
chromium:
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit 0; done; \
	if [ "$$(id -u)" = 0 ]; then root=; elif sudo -n true 2>/dev/null; then root='sudo -n'; \
	else echo "no chromium, and no right to install it: the pages are not tested in a browser"; exit 0; fi; \
	echo "installing chromium, which the tests of the pages need"; \
	$$root apt-get -qq update && $$root apt-get -qq install --yes --no-install-recommends chromium >/dev/null || true

# Slurm is tested on a real one. Where it can't be installed those tests are skipped and say so; in CI they fail.
slurm: all
	@missing=$$($(BIN)/python -c "from slurm.virtual import missing_packages; print(*missing_packages())"); \
	test -z "$$missing" && exit 0; \
	if [ "$$(id -u)" = 0 ]; then root=; elif sudo -n true 2>/dev/null; then root='sudo -n'; \
	else echo "no Slurm, and no right to install it: sudo apt-get install --no-install-recommends $$missing"; exit 0; fi; \
	echo "installing $$missing, which the tests under Slurm need"; \
	$$root apt-get -qq update && $$root env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 \
	apt-get -qq install --yes --no-install-recommends $$missing >/dev/null || true

# The clock is shifted with libfaketime. Where it can't be installed that fault is skipped and says so.
faketime: all
	@ls /usr/lib/*/faketime/libfaketimeMT.so.1 >/dev/null 2>&1 && exit 0; \
	if [ "$$(id -u)" = 0 ]; then root=; elif sudo -n true 2>/dev/null; then root='sudo -n'; \
	else echo "no libfaketime, and no right to install it: sudo apt-get install libfaketime"; exit 0; fi; \
	$$root apt-get -qq update && $$root apt-get -qq install --yes --no-install-recommends libfaketime >/dev/null || true

# make chaos: every fault once. make chaos N=1000: so many random kills.
chaos: all slurm faketime
	@$(BIN)/arriero chaos $(if $(N),--random $(N)) $(if $(SEED),--seed $(SEED))

check: all
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: all
	@$(BIN)/python -m pytest tests/bench --override-ini=python_files='bench_*.py' -s

clean:
	rm -rf .venv dist build
