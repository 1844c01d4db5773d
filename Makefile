# The developer's map: `make help`. Every target may be the first one run on a fresh machine, may be run
# again, and works from a path with spaces. It sets up what it needs, and says first what it downloads.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# TORCH=cpu|cuda picks torch's build; by default whether an NVIDIA driver answers decides.
TORCH ?= auto
# DATA=my.jsonl STEPS=50 are passed to the demo.
DATA ?=
STEPS ?=
# SEED=7 is what `make chaos` draws from; without it another one each time, which it says.
SEED ?=

PYTHON := .venv/bin/python
PACKAGES := gpu_pool schemas web workers
SOURCES := $(PACKAGES) client_lib/rewardsignal

export HF_HUB_OFFLINE ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup model demo unit test chaos check format bench bench-storm bench-engine bench-sample bench-sdk bench-sharing bench-tinker cookbook gpu-check docs-errors docs-losses docs-reference clean

##@ Use it
help: ## this list
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} /^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

demo: setup model ## fine-tune SmolLM2-135M on a chat file, through the whole stack (DATA=my.jsonl STEPS=50)
	@$(PYTHON) examples/demo.py $(if $(DATA),--data "$(DATA)") $(if $(STEPS),--steps "$(STEPS)")

setup: ## the virtual environment in .venv with everything in it (TORCH=cpu|cuda)
	@mapfile -t pythons < <(bash deploy/pythons.sh); \
	if [ $${#pythons[@]} -eq 0 ]; then \
		echo "make setup: no Python 3.11, 3.12 or 3.13 runs here; install one (with its venv module)." >&2; exit 1; \
	fi; \
	"$${pythons[0]}" deploy/bootstrap.py --torch "$(TORCH)" "$${pythons[@]}"

model: setup ## SmolLM2-135M-Instruct in .signal/models (98 MB once)
	@$(PYTHON) deploy/fetch_model.py

##@ Develop it
unit: setup ## the unit tests: no model, no sockets, seconds
	@$(PYTHON) -m pytest -q tests/unit

test: setup ## all tests: unit, contract, a real stack, a short chaos, and the GPU's where there is one
	@$(PYTHON) -m pytest -q $(wildcard tests/unit tests/contract tests/integration tests/chaos tests/gpu)

chaos: setup ## kill everything at every moment, for half an hour: no number may change (SEED=7)
	@seed="$(SEED)"; export CHAOS_SEED="$${seed:-$$RANDOM}"; echo "SEED=$$CHAOS_SEED"; \
	$(PYTHON) -m pytest -q -m "long or not long" tests/chaos

check: setup ## style, types (strict), import directions, generated pages
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mypy $(SOURCES)
	@$(PYTHON) -P -c 'from importlinter.cli import lint_imports_command as lint; lint()' --no-cache
	@$(PYTHON) deploy/docs_sdk.py --check && $(PYTHON) deploy/docs_api.py --check || \
		{ echo "docs/reference is not up to date: make docs-reference" >&2; exit 1; }
	@$(PYTHON) -m client_lib.generate_async --check
	@$(PYTHON) deploy/docs_errors.py --check || { echo "docs/errors.md is not up to date: make docs-errors" >&2; exit 1; }

format: setup ## rewrite the sources in the house style
	@$(PYTHON) -m ruff check --fix-only --quiet .
	@$(PYTHON) -m ruff format .

bench: setup model ## latencies and throughput as JSON
	@$(PYTHON) -m tests.bench

bench-storm: setup ## far more at once than anybody asks for, against a budget; minutes
	@$(PYTHON) -m tests.bench.storm

bench-engine: setup model ## training against transformers + peft on one thread, JSON and a table; minutes
	@OMP_NUM_THREADS=1 $(PYTHON) -m tests.bench.engine

bench-sample: setup model ## sampling against transformers on one thread, JSON and a table; minutes
	@OMP_NUM_THREADS=1 $(PYTHON) -m tests.bench.sample

bench-sdk: setup ## what the SDK adds to a bare HTTP client, pipelined and with thousands in flight, as JSON
	@OMP_NUM_THREADS=1 $(PYTHON) -m tests.bench.sdk

bench-sharing: setup ## runs that share a worker: time per step, memory per run, delay beside large batches
	@OMP_NUM_THREADS=1 $(PYTHON) -m tests.bench.sharing

bench-tinker: setup ## the official Tinker SDK as the client: latencies and throughput as JSON
	@$(PYTHON) -m tests.bench.tinker

cookbook: setup model ## four recipes of tinker-cookbook, unmodified and offline, each of which must learn; minutes
	@$(PYTHON) deploy/cookbook_env.py
	@$(PYTHON) -m tests.bench.cookbook

gpu-check: setup ## numbers and speed on a GPU against transformers + peft, 1B and 8B shapes
	@$(PYTHON) -m tests.bench.gpu

docs-errors: setup ## docs/errors.md from schemas/errors.py
	@$(PYTHON) deploy/docs_errors.py

docs-reference: setup ## docs/reference from the SDK's docstrings and the OpenAPI document
	@$(PYTHON) deploy/docs_sdk.py
	@$(PYTHON) deploy/docs_api.py

docs-losses: setup ## docs/losses.md from schemas/losses/
	@$(PYTHON) deploy/docs_losses.py

clean: ## remove caches and build outputs; the environment and the data stay
	@rm -rf .cache build dist ./*.egg-info client_lib/*.egg-info client_lib/build
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
