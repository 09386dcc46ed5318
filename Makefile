# `make help` lists the targets. Everything lives in .venv, made from the lock files.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
# Compiling every file of torch takes half of the set-up: only what a run imports is compiled, once, even where the
# environment tells Python not to keep bytecode (each worker would then start 4 s later).
INSTALL := $(PIP) install --no-compile
COMPILE := env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -c \
	'import kfp.dsl.executor_main, kfp.local, kfp.compiler, pipelines.local, vapo.cli, vapo.worker; vapo.worker.preload()'
COMPILE_VLLM := env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -c \
	'import vllm.inputs, vllm.v1.engine.core, vllm.v1.worker.cpu_worker; from vllm import EngineArgs, LLMEngine'

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup setup-dev demo test check manifests bench images clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: .venv/.stamp ## .venv with everything that a laptop needs

setup-dev: .venv/.stamp-dev ## the same with the tools for tests and checks

demo: setup ## train a small model with the whole pipeline, here, and write its report
	$(BIN)/vapo run demo

test: setup-dev ## all tests
	$(BIN)/pytest

check: setup-dev ## style, types, who may import whom, and whether the README's tree is true
	@status=0; for tool in "ruff check" "ruff format --check" mypy "lint-imports --no-logo"; do \
		echo "== $$tool"; $(BIN)/$$tool || status=1; \
	done; echo "== README's tree"; $(BIN)/python docs/tree.py --check || status=1; \
	echo "== manifests"; $(BIN)/python -m manifests.check || status=1; exit $$status

manifests: setup-dev ## render every overlay of manifests/ offline and check what a cluster would refuse
	@$(BIN)/python -m manifests.images
	@$(BIN)/python -m manifests.check

bench: setup-dev ## every measurement in benchmarks/
	@set -e; for file in benchmarks/*.py; do \
		[ -f "$$file" ] || { echo "benchmarks/ holds no .py file" >&2; exit 1; }; \
		echo "== $$file"; $(BIN)/python "$$file"; \
	done

images: setup ## container images of the stages: KIND=cpu, train or rollout; PUSH=REGISTRY/NAME publishes (docs/images.md)
	@$(BIN)/python -m components.images.build --kind="$(KIND)" --push="$(PUSH)" --base="$(BASE)" --engine="$(ENGINE)"

clean: ## remove .venv, caches and build leftovers; runs/ stays
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build dist vapo.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

# A stamp stands only beside a finished installation: both go before pip starts, and a .venv without a stamp is
# what an interruption left, so it is made anew.
.venv/.stamp: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "vapo needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo not there)." \
		"Give another: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@test -f $@ || rm -rf .venv
	@rm -f .venv/.stamp .venv/.stamp-dev
	@echo "setting up .venv (about a minute, longer where torch comes with CUDA)"
	@test -d .venv || $(PYTHON) -m venv .venv
	@$(INSTALL) -r requirements.lock
	@$(INSTALL) --no-deps --no-build-isolation -e .
	@$(COMPILE)
	@touch $@

# DeepSpeed asks torch while it is built, so no isolation; it compiles nothing beforehand (DS_BUILD_OPS).
.venv/.stamp-dev: requirements-vllm.lock requirements-dev.lock .venv/.stamp
	@rm -f .venv/.stamp .venv/.stamp-dev
	@command -v cc > /dev/null || { echo "the tests need a C compiler once, for reasoning-gym's pycosat:" \
		"install gcc and Python's headers (Debian: gcc python3-dev)" >&2; exit 1; }
	@echo "adding the development tools and the engines that are tested (a GB, some minutes)"
	@DS_BUILD_OPS=0 $(INSTALL) --no-deps --no-build-isolation -r requirements-vllm.lock
	@$(COMPILE_VLLM)
	@touch .venv/.stamp
	@touch $@
