# From a fresh clone: `make demo` trains on the built-in data, `make test` runs the fast tests, `make test-all` all.
# Each first makes an environment in .venv. PYTHON=python3.12 takes another Python, VENV=folder another environment.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
ANOTHER = name another: make $(MAKECMDGOALS) PYTHON=python3.12

.PHONY: demo test test-all

demo: $(INSTALLED)
	@echo "Training takes some minutes on a CPU, and after 20 steps it says how many on this machine"
	$(BIN)/python recipes/pretrain.py --config recipes/configs/pretrain/openmoji.yaml
	@echo "Open $(CURDIR)/runs/openmoji/report.html"

test: $(INSTALLED)
	$(BIN)/pytest -m "not slow"

test-all: test
	$(BIN)/pytest -m slow

# Written last, so that an installation that failed is repeated, and one of changed requirements too.
$(INSTALLED): pyproject.toml constraints.txt
	$(if $(shell command -v $(PYTHON)),,$(error there is no $(PYTHON); install Python 3.11 or newer, or $(ANOTHER)))
	$(if $(shell $(PYTHON) -c 'import sys; print("new" * (sys.version_info >= (3, 11)))' 2>/dev/null),,$(error \
	    Python must be 3.11 or newer, $(PYTHON) is "$(shell $(PYTHON) --version 2>&1 | head -n 1)"; $(ANOTHER)))
	$(if $(shell $(PYTHON) -c 'import ensurepip, venv; print("there")' 2>/dev/null),,$(error \
	    $(PYTHON) has no module venv; install it (on Debian and Ubuntu: apt-get install python3-venv), or $(ANOTHER)))
	@echo "Installing into $(VENV), which takes some minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e ".[dev]"
	@touch $@
