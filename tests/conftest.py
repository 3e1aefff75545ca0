# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Settings for the whole run, made before any test imports vLLM."""

import importlib.metadata
import importlib.util
import os

import pytest

# Tests must not download anything: they use the bundled checkpoint and generated ones.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# GiB. On a CPU machine vLLM's default is a share of the memory, more than tests need.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
# A worker of pytest-xdist has its share of the cores. Its servers use one core; vLLM
# would put the servers of all workers on the first.
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) is not None:
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    core = cores[int(worker.removeprefix("gw")) % len(cores)]
    os.environ.setdefault("OMP_NUM_THREADS", str(share))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", str(core))


def pytest_configure() -> None:
    # the checkout is on sys.path, so importing our modules would prove nothing
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
