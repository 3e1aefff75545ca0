# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Importing this module replaces vLLM's load format ``dummy`` in this process."""

from token_bench.random_weights import RandomWeights
from vllm.model_executor.model_loader import register_model_loader

register_model_loader("dummy")(RandomWeights)


class Worker:
    """An empty extension of vLLM's worker: a worker that names it imports this."""


WORKER = f"{__name__}.{Worker.__name__}"
