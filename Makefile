# Everything starts from a fresh clone with Python >= 3.10 and a package index: the first target that needs it makes .venv.
#   make test PYTHON=python3.12     another interpreter
#   make test JOBS=8                more test processes

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# the first interpreter on the PATH that is new enough
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python3.10 python; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$python && break; done)
JOBS ?= 2

.DEFAULT_GOAL := help
.PHONY: help install demo test lint types requirements audit format clean

help: ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

install: $(STAMP) ## set up .venv (the other targets do it by themselves)

$(STAMP): setup.cfg pyproject.toml
	@test -n "$(PYTHON)" || { echo "No Python >= 3.10 on the PATH. Install one, or name it: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python >= 3.10 is needed, $(PYTHON) is not. Name another: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' || \
		{ echo "$(PYTHON) has no venv module (on Debian and Ubuntu: apt install python3-venv)."; exit 1; }
	@echo "Setting up $(VENV) with $$($(PYTHON) --version), once; about two minutes ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: $(STAMP) ## six methods, nine benchmarks, one report on generated scenes, at most 10 minutes on 2 cores
	$(BIN)/python tools/sweep.py sweep=demo

# one thread for each test process: more only fight for the cores
test: lint types requirements ## lint, types, fitting requirements and the test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal

lint: $(STAMP) ## ruff
	$(BIN)/ruff check .

types: $(STAMP) ## mypy
	$(BIN)/mypy pirl_plugin

requirements: $(STAMP) ## whether what is installed fits together (pip check)
	$(BIN)/python -m pip --disable-pip-version-check check

# pip-audit asks a service on the internet and has no local database: without network it fails, so that it is no part of
# `test`; --strict, or it would pass what it could not ask about
audit: $(STAMP) ## known vulnerabilities of what is installed (pip-audit); needs the internet
	$(BIN)/python -m pip freeze --exclude-editable > $(VENV)/.frozen
	test -x $(VENV)/audit/bin/pip-audit || { $(PYTHON) -m venv $(VENV)/audit && \
		$(VENV)/audit/bin/python -m pip install --disable-pip-version-check -q pip-audit; }
	$(VENV)/audit/bin/pip-audit --strict --no-deps --disable-pip -r $(VENV)/.frozen

format: $(STAMP) ## ruff format and the fixes that ruff knows
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv and caches (runs/ stays)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
