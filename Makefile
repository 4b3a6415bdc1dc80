# `make quickstart` and `make test` need Python >= 3.11, git and make; they install into .venv first, at the versions of constraints/ci.txt.
# PIP_ARGS goes to pip, e.g. to choose another index for CPU builds of torch.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3 python; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
PIP_ARGS ?=
BIN := .venv/bin

.PHONY: quickstart test lint bench clean vllm-env test-vllm replicate-% replicate-vgf compare-rules

quickstart: .venv/run.stamp
	$(BIN)/llmrl train recipes/quickstart.toml --overwrite

test: .venv/dev.stamp
	$(BIN)/pytest -q

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/pyright

bench: .venv/dev.stamp
	$(BIN)/python scripts/bench.py
	$(BIN)/python scripts/bench_scoring.py
	$(BIN)/python scripts/bench_rollout.py

# Arms and seeds of recipes/replication/NAME/study.toml; what is done is kept in runs/replication and not done again.
replicate-%: .venv/run.stamp
	$(BIN)/python scripts/replicate.py recipes/replication/$*/study.toml

replicate-vgf: .venv/run.stamp
	$(BIN)/python scripts/replicate_vgf.py

compare-rules: .venv/run.stamp
	$(BIN)/python scripts/replicate.py recipes/rules/study.toml

# vLLM has an environment of its own: VLLM_ENV, by default .venv-vllm.
VLLM_ENV ?= .venv-vllm

vllm-env:
	bash scripts/vllm_env.sh $(VLLM_ENV)

test-vllm: .venv/dev.stamp
	LLMRL_VLLM_PYTHON=$(abspath $(VLLM_ENV))/bin/python $(BIN)/pytest -q -s -m vllm

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "no Python >= 3.11 with venv and ensurepip found; name one: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/run.stamp: pyproject.toml constraints/ci.txt | $(BIN)/python
	@echo "installing llmrl into .venv: a minute or a few, mostly torch"
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints/ci.txt -e .
	touch $@

.venv/dev.stamp: .venv/run.stamp
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints/ci.txt -e '.[dev]'
	touch $@
