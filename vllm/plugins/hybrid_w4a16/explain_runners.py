# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The MoE runners of a checkpoint's model, as vLLM builds them.

Whether a router or a shared expert runs on our kernels depends on the model's code, not
only on the checkpoint. So the model is built from config.json, without quantization and
with all weights on the meta device. Then explain asks the checks that serving uses.
"""

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.model_executor.layers.fused_moe.hybrid_w4a16_device import DeviceFamily
from vllm.model_executor.layers.fused_moe.router import router_factory
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.layers.quantization import hybrid_w4a16_head_schemes
from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT
from vllm.model_executor.model_loader.utils import get_model_architecture
from vllm.model_executor.models import ModelRegistry
from vllm.utils.torch_utils import set_default_torch_dtype

from .explain_checkpoint import Checkpoint
from .explain_layers import activation_dtype

if TYPE_CHECKING:
    from torch import nn

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_GROUPS = ("_WORLD", "_TP", "_EP", "_PP", "_DP", "_PCP", "_DCP")
_SHARDED = ("_WORLD", "_TP", "_EP")


def moe_runners(
    checkpoint: Checkpoint, tp_size: int, family: DeviceFamily | str
) -> dict[int, MoERunner] | str:
    """The decoder's MoE runners by index of the layer, or why vLLM cannot build them.

    They have no weights and no quantization. ``family``: the device to plan for.
    """
    on_gpu = isinstance(family, DeviceFamily) and family.tuning is not None
    try:
        with (
            mock.patch.dict(os.environ),  # vLLM's config of a CPU sets variables
            _router_of_a_gpu() if on_gpu else contextlib.nullcontext(),
        ):
            model = _model(checkpoint, tp_size)
    except Exception as error:  # noqa: BLE001  whatever a model's code raises
        cause = _import_error(checkpoint) or error
        reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        return f"vLLM cannot build the model here: {reason}"
    found = {}
    for runner in model.modules():
        if isinstance(runner, MoERunner):
            index = _LAYER.search(runner.layer_name)
            if index is not None:
                found[int(index[1])] = runner
    return found


def _import_error(checkpoint: Checkpoint) -> Exception | None:
    """Why the model's module cannot be imported, which vLLM only logs."""
    for name in checkpoint.config.get("architectures") or ():
        try:
            if name in ModelRegistry.models:
                ModelRegistry.models[name].load_model_cls()
        except Exception as error:  # noqa: BLE001
            return error
    return None


def _model(checkpoint: Checkpoint, tp_size: int) -> "nn.Module":
    """vLLM's model on the meta device, as rank 0 of ``tp_size`` builds it."""
    hybrid_w4a16_head_schemes.register()  # the hook of lm_head reads its variable
    dtype = activation_dtype(checkpoint)
    config = _unquantized(checkpoint.config)
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/config.json", "w", encoding="utf-8") as file:
            json.dump(config, file)
        model_config = ModelConfig(
            model=folder,
            tokenizer=folder,
            skip_tokenizer_init=True,
            dtype=dtype,
            language_model_only=True,
            enforce_eager=True,
        )
        vllm_config = VllmConfig(model_config=model_config)
        groups = {name: _group(tp_size if name in _SHARDED else 1) for name in _GROUPS}
        with (
            set_current_vllm_config(vllm_config),
            mock.patch.multiple(parallel_state, **groups),
            mock.patch.dict(_ROPE_DICT, clear=True),  # vLLM's cache of modules
            torch.device("meta"),
            set_default_torch_dtype(dtype),
        ):
            model_class, _ = get_model_architecture(model_config)
            return model_class(vllm_config=vllm_config, prefix="")


def _unquantized(config: dict[str, Any]) -> dict[str, Any]:
    """A copy of a config.json without its quantization."""
    return {
        key: _unquantized(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in ("quantization_config", "compression_config")
    }


def _group(size: int) -> Any:
    """A stand-in for vLLM's coordinator of ``size`` ranks, seen from the first one."""
    ranks = SimpleNamespace(size=lambda: size, rank=lambda: 0)
    return SimpleNamespace(
        world_size=size,
        rank=0,
        local_rank=0,
        rank_in_group=0,
        ranks=list(range(size)),
        is_first_rank=True,
        is_last_rank=True,
        device_group=ranks,
        cpu_group=ranks,
        device_communicator=None,
    )


@contextlib.contextmanager
def _router_of_a_gpu() -> Iterator[None]:
    """Let vLLM's factory of routers build a GPU's on whatever machine is at hand."""
    gpu = SimpleNamespace(is_cpu=lambda: False)
    with mock.patch.object(router_factory, "current_platform", gpu):
        yield
