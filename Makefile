# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
#
# Thin wrappers: each recipe is a command that can be run by hand.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
RUN := $(VENV)/bin/python
ARGS ?=

# pytest processes. Each file runs in one of them, and the files of tests/e2e start first, because
# they take longest.
WORKERS ?= 2
# Where it is set, as in many containers, each process compiles what it imports: 10 s with vLLM.
unexport PYTHONDONTWRITEBYTECODE
PYTEST := $(VENV)/bin/pytest --numprocesses=$(WORKERS) --dist=loadfile \
    --no-loadscope-reorder

.PHONY: help venv clang demo quick test pytest nightly lint format bench matrix isa
.PHONY: wheel fork check-vllm-src drift clean
help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 10

venv:  ## make or update .venv: vLLM for the CPU, this project built and installed
	@$(PYTHON) tools/make_venv.py --venv $(VENV)

demo: venv  ## serve the bundled checkpoint with vLLM and show a completion
	@$(RUN) -m tools.demo $(ARGS)

clang:
	@tools/install_clang.sh

quick: venv  ## the tests to run after every edit, under 3 minutes
	@$(PYTEST) -m "not slow and not e2e and not packaging and not nightly" $(ARGS)

test: clang venv lint pytest  ## everything that CI runs, under 20 minutes

pytest: venv  ## only the tests of CI; ARGS goes to pytest (ARGS="-k packaging")
	@$(PYTEST) $(ARGS)

nightly: clang venv wheel  ## the long tests, previous vLLM releases, drift
	@$(PYTEST) -m nightly $(ARGS)
	@$(RUN) -m tools.check_install
	@$(RUN) -m tools.check_releases
	@$(RUN) -m tools.check_drift

lint: venv  ## ruff, clang-format and mypy
	@$(RUN) tools/lint.py

format: venv  ## format the sources and fix what `make lint` can fix
	@$(RUN) tools/lint.py --fix

bench: venv  ## time the experts call on this machine's CPU
	@$(RUN) benchmarks/benchmark_moe.py --device cpu $(ARGS)

matrix: venv  ## run the support matrix (an hour), write its table
	@$(RUN) -m tests.support.matrix $(ARGS)

isa: venv  ## compile the GPU kernels for AMD, report registers and loads
	@$(RUN) benchmarks/isa_report.py $(ARGS)
	@$(RUN) benchmarks/prefill_report.py

wheel: venv  ## build the wheel for every AMD GPU and the CPU into dist
	@HYBRID_W4A16_GPU=hip HYBRID_W4A16_SKIP_VLLM_CHECK=1 \
	    $(RUN) -m pip wheel --no-deps --no-build-isolation --wheel-dir dist .

fork: check-vllm-src venv  ## commit the series to VLLM_SRC=DIR (ARGS="--patch-dir D", ...)
	@$(VENV)/bin/vllm-hybrid-w4a16 fork --vllm-src "$(VLLM_SRC)" $(ARGS)

check-vllm-src:
	$(if $(VLLM_SRC),,$(error VLLM_SRC is not set: make fork VLLM_SRC=/path/to/vllm, \
	    the folder of vLLM's sources))

drift: venv  ## check whether the newest vLLM release still fits (ARGS="0.33.0": another)
	@$(RUN) -m tools.check_drift $(ARGS)

clean:  ## remove .venv and everything built
	rm -rf $(VENV) build dist *.egg-info vllm/_hybrid_w4a16_C.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
