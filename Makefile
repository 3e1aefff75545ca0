# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
#
# Thin wrappers; each line is a command that can be run by hand.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
RUN := $(VENV)/bin/python
ARGS ?=

.PHONY: help venv clang demo test pytest lint format bench matrix isa fork drift clean
help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 10

venv:  ## make or update .venv: vLLM for the CPU, this project built and installed
	@$(PYTHON) tools/make_venv.py --venv $(VENV)

demo: venv  ## serve the bundled checkpoint with vLLM and show a completion
	@$(RUN) tools/demo.py $(ARGS)

clang:
	@tools/install_clang.sh

test: clang venv lint pytest  ## everything that CI runs

pytest: venv  ## the tests alone; ARGS="-k packaging" and the like go to pytest
	@$(VENV)/bin/pytest $(ARGS)

lint: venv  ## ruff, clang-format and mypy
	@$(RUN) tools/lint.py

format: venv  ## rewrite the sources as `make lint` wants them
	@$(RUN) tools/lint.py --fix

bench: venv  ## time the experts call on this machine's CPU
	@$(RUN) benchmarks/benchmark_moe.py --device cpu $(ARGS)

matrix: venv  ## run the support matrix (an hour), write the README's table
	@$(RUN) tests/support/matrix.py $(ARGS)

isa: venv  ## compile the GPU kernels for AMD, report registers and loads
	@$(RUN) benchmarks/isa_report.py $(ARGS)
	@$(RUN) benchmarks/prefill_report.py

fork: venv  ## commit the patch to the vLLM sources in VLLM_SRC (ARGS="--patch F", ...)
	@$(VENV)/bin/vllm-hybrid-w4a16 fork --vllm-src "$(VLLM_SRC)" $(ARGS)

drift: venv  ## does the newest vLLM release still fit? (ARGS="0.33.0": another one)
	@$(RUN) tools/check_drift.py $(ARGS)

clean:  ## remove .venv and everything built
	rm -rf $(VENV) build dist *.egg-info vllm/_hybrid_w4a16_C.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
