# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Servers on the bundled checkpoint, and its expected results."""

import os
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.serve_bench.vllm_server import VllmServer

from ..support.api_client import Client
from ..support.reference_model import ReferenceModel

CHECKOUT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 600.0

# A small model does not need vLLM's default share of a GPU's memory, which other
# processes may be using.
_ON_GPU = ["--gpu-memory-utilization=0.2", f"--kv-cache-memory-bytes={2**30}"]
SERVE_ARGUMENTS = [
    "--no-enable-prefix-caching",
    *(_ON_GPU if torch.cuda.is_available() else []),
    # options that the machine needs, such as another attention backend
    *shlex.split(os.environ.get("HYBRID_W4A16_TEST_SERVE_ARGS", "")),
]

# The options of each server: vLLM's defaults with the switch at its default (hybrid is
# opt-in on CUDA), and eager mode under "require". The cache of compiled code is deleted
# with the server, so that the current sources run.
MODES: dict[str, tuple[list[str], str | None]] = {
    "compiled": ([], None if torch.version.cuda is None else "1"),
    "eager": (["--enforce-eager"], "require"),
}


@pytest.fixture(scope="session")
def serve_arguments() -> list[str]:
    """Options of every server."""
    return SERVE_ARGUMENTS


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """The bundled checkpoint."""
    return CHECKOUT / "demo/int4-autoround-g128"


@pytest.fixture(scope="session")
def reference(checkpoint: Path) -> ReferenceModel:
    return ReferenceModel(checkpoint)


@pytest.fixture(scope="session", params=MODES)
def client(
    request: pytest.FixtureRequest,
    checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Client]:
    """Yield a client of a server in each of the modes."""
    arguments, switch = MODES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    environment = {"VLLM_HYBRID_W4A16_MOE": switch, "VLLM_CACHE_ROOT": str(folder)}
    with VllmServer(
        checkpoint,
        folder / "server.log",
        ["--dtype=bfloat16", *SERVE_ARGUMENTS, *arguments],
        environment,
    ) as server:
        server.wait_ready(START_TIMEOUT_S)
        yield Client(server)
