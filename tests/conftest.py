# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Settings for the whole run, before any test imports vLLM."""

import importlib.metadata
import importlib.util
import os

import pytest

# Nothing is fetched: tests use the bundled checkpoint and ones that they make.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# GiB; vLLM's default on a CPU machine is a share of the memory that tests do not need.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
# A worker of pytest-xdist has its share of the cores. Its servers compute on one: vLLM
# would put those of all workers on the first.
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) is not None:
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    core = cores[int(worker.removeprefix("gw")) % len(cores)]
    os.environ.setdefault("OMP_NUM_THREADS", str(share))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", str(core))


def pytest_configure() -> None:
    # the checkout is on sys.path, so that our own modules would be found anyway
    ours = list(importlib.metadata.distributions(name="vllm-hybrid-w4a16"))
    for name, found in (
        ("vllm", importlib.util.find_spec("vllm.config")),
        ("this project", ours),
    ):
        if not found:
            pytest.exit(
                f"{name} is not installed here: run `make test`, or install vLLM and "
                "then this project (pip install --no-build-isolation -e .)",
                returncode=4,
            )
