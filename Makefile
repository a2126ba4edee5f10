# Everything a contributor or CI runs. `make help` lists it.
#
# On a machine whose pip has extra package sources configured, they are used; elsewhere torch
# comes from PyTorch's own index of CPU builds (see requirements/uv).

PYTHON ?= python3.11
BIN := .venv/bin
UV_VERSION := $(shell sed -n 's/^uv==//p' requirements/lock.txt)
# Two at a time: an engine computes on one core in the tests. tests/durations.py says what goes where.
PYTEST := $(BIN)/pytest -n 2
INSTALL := requirements/uv pip install --quiet --no-deps --python $(BIN)/python

# Python's caches save 8 s of imports at every start of the engine: keep them whatever the shell says.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo demo-push demo-shared demo-standalone test test-all durations mutants soak compat lint docs lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' Makefile

demo: .venv/installed ## a real model answers a long question three times, once after a restart
	@$(BIN)/lamina-kv demo --model-dir models

demo-standalone: .venv/installed ## conversations in transformers' continuous batching, with and without Lamina
	@$(BIN)/lamina-kv demo-standalone --model-dir models --picture out/standalone.png

demo-push: .venv/installed ## one engine prefills, another decodes, each row leaves when it is computed
	@$(BIN)/lamina-kv demo-push --model-dir models

demo-shared: .venv/installed ## a conversation goes from one server to another, its KV cache by way of Valkey
	@$(BIN)/lamina-kv demo-shared --model-dir models --picture out/shared.png

test: .venv/installed-tests ## the test suite, without what is marked slow
	@$(PYTEST) -m "not slow and not soak" --budget 10

test-all: .venv/installed-tests ## the whole test suite, without what takes minutes
	@$(PYTEST) -m "not soak" --durations 20 $(PYTEST_OPTIONS)

durations: .venv/installed-tests ## the whole test suite, and write down what each test takes
	@$(PYTEST) -m "not soak" --record-durations

MUTANTS ?= 40
MUTANTS_SEED ?= 1

mutants: .venv/installed-tests ## faults put into the product at random, and whether the fast tests notice
	@$(BIN)/python tests/mutation --count $(MUTANTS) --seed $(MUTANTS_SEED)

SOAK_STEPS ?= 1000000
SOAK_CYCLES ?= 300
SOAK_ENGINE_CYCLES ?= 12
SOAK_SERVER_CYCLES ?= 2
SOAK_REQUESTS ?= 10000
SOAK_PUSH_REQUESTS ?= 500
SOAK_CONVERSATIONS ?= 40
SOAK_SHARED_REQUESTS ?= 500
SOAK_PROTOCOL_HISTORIES ?= 60
SOAK_PROTOCOL_STATES ?= 10000

soak: .venv/installed-tests ## a million simulated steps, kills by the hundred, 10,000 requests with aborts
	@LAMINA_SOAK_STEPS=$(SOAK_STEPS) LAMINA_SOAK_CYCLES=$(SOAK_CYCLES) \
		LAMINA_SOAK_ENGINE_CYCLES=$(SOAK_ENGINE_CYCLES) LAMINA_SOAK_REQUESTS=$(SOAK_REQUESTS) \
		LAMINA_SOAK_SERVER_CYCLES=$(SOAK_SERVER_CYCLES) \
		LAMINA_SOAK_PUSH_REQUESTS=$(SOAK_PUSH_REQUESTS) \
		LAMINA_SOAK_CONVERSATIONS=$(SOAK_CONVERSATIONS) \
		LAMINA_SOAK_SHARED_REQUESTS=$(SOAK_SHARED_REQUESTS) \
		LAMINA_PROTOCOL_HISTORIES=$(SOAK_PROTOCOL_HISTORIES) \
		LAMINA_PROTOCOL_STATES=$(SOAK_PROTOCOL_STATES) \
		$(BIN)/pytest -q --timeout 3600 -m "(soak and not compat) or scaled"

compat: .venv/installed-tests ## vLLM 0.32 and 0.33, each with both model runners; fetches 336 MB
	@newer=$$(PYTHONPATH=tests $(BIN)/python -m engine.runners) && \
		$(BIN)/pytest -n 2 --dist loadgroup -m compat --record-versions tests/engine/test_compat.py && \
		PYTHONPATH=$$newer $(BIN)/pytest -n 2 --dist loadfile -m "not slow" --record-versions $(ON_NEWER)

# Files that are run again in a session in which every vLLM is the newer one.
ON_NEWER := $(addprefix tests/engine/test_,v2_step.py plugin.py hooks.py push_failures.py reset.py events.py) \
	tests/fault/test_engine_pressure.py

lint: .venv/installed ## ruff, and mypy for the oldest and the newest Python
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@echo "mypy ..."
	@$(BIN)/mypy --python-version 3.13 & newest=$$!; $(BIN)/mypy; oldest=$$?; \
		wait $$newest && exit $$oldest

# The theme advertises its successor otherwise.
docs: export NO_MKDOCS_2_WARNING := 1
docs: .venv/installed ## the documentation site, in build/site; a broken link or anchor fails
	@$(BIN)/mkdocs build --quiet --strict

lock: .venv/installed ## pin anew what is installed: requirements/lock.txt
	@echo "resolving requirements/lock.in and pyproject.toml ..."
	@requirements/uv pip compile --quiet --upgrade --python-version 3.11 --no-annotate \
		--custom-compile-command "make lock" --override requirements/exclude.txt \
		--extra bench --extra demo --extra dev requirements/lock.in pyproject.toml \
		--output-file requirements/lock.txt

clean: ## remove the environment, the demo's model and every cache
	@rm -rf .venv models build dist out src/*.egg-info
	@rm -rf .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	@find src tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/installed: requirements/lock.txt requirements/uv pyproject.toml
	@echo "creating .venv ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install -qq --disable-pip-version-check "uv==$(UV_VERSION)"
	@echo "installing $$(grep -c == requirements/lock.txt) packages, about 740 MB to download ..."
	@$(INSTALL) --requirements requirements/lock.txt
	@$(INSTALL) --no-build-isolation --editable .
	@touch $@

.venv/installed-tests: .venv/installed requirements/test-extra.txt requirements/prometheus
	@echo "installing what only tests need, about 380 MB to download ..."
	@$(INSTALL) --requirements requirements/test-extra.txt
	@requirements/prometheus
	@touch $@
