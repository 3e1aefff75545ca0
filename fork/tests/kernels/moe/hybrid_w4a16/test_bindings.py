# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Schemas, implementations, wrappers and the build agree. Reads sources alone."""

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch

from vllm.model_executor.layers.fused_moe import hybrid_w4a16_ops as ops

ROOT = Path(__file__).parents[4]
SOURCES = ROOT / "csrc" / "hybrid_w4a16"
KERNELS = (
    "fused_moe_wvSplitK_int4_gemm",
    "fused_moe_wvSplitK_int4_gate_up",
    "fused_moe_wvSplitK_int4_down",
)


def text(path: str) -> str:
    return (SOURCES / path).read_text()


def schema_arguments(op: str) -> list[str]:
    """Argument names of an op's schema, whose text is cut into several literals."""
    bindings = re.sub(r'"\s*\n\s*"', "", text("torch_bindings.cpp"))
    match = re.search(rf'"{op}\(([^"]*)\) -> \(\)"', bindings)
    assert match is not None, op
    arguments = re.sub(r"\([a-z]!\)|\[\]", "", match[1]).split(", ")
    return [argument.partition("=")[0].split()[-1] for argument in arguments]


@pytest.mark.parametrize("op", KERNELS)
def test_op_is_registered_for_gpus(op):
    bindings = text("rocm/torch_bindings_gpu.cpp")
    assert re.search(rf'm\.impl\("{op}",\s*TORCH_BOX\(&[\w:]+\)\)', bindings)


@pytest.mark.parametrize("op", KERNELS)
def test_wrapper_has_the_arguments_of_the_schema(op):
    """The wrappers take the tensors of a shared expert as one tuple."""
    schema = schema_arguments(op)
    shared = [name for name in schema if name.startswith("shared_")]
    expected = [name for name in schema if name not in shared]
    parameters = inspect.signature(getattr(ops, op)).parameters
    assert list(parameters) == expected + ["shared"] * bool(shared)
    assert not shared or len(parameters["shared"].default) == len(shared)


def test_the_build_includes_the_ops_after_the_extension():
    cmake = (ROOT / "CMakeLists.txt").read_text()
    extension = cmake.index("define_extension_target(\n    _rocm_C\n")
    assert "cmake/hybrid_w4a16.cmake)" in cmake[extension:]


def test_a_build_without_the_ops_says_so(monkeypatch):
    monkeypatch.setattr(ops, "_ops_registered", lambda: False)
    error = ops.load_error.__wrapped__()
    assert error == "vLLM's own libraries hold no int4 MoE ops"
    monkeypatch.setattr(ops, "load_error", lambda: error)
    with pytest.raises(RuntimeError, match="hold no int4 MoE ops"):
        ops.build_info()
    with pytest.raises(RuntimeError, match="hold no int4 MoE ops"):
        ops.refusal("gfx1151")


def test_every_activation_has_a_name_and_a_formula():
    header = text("moe_int4_args.h")
    body = re.search(r"enum class Activation[^{]*\{([^}]*)\}", header)
    assert body is not None
    formulas = [int(number) for number in re.findall(r"= (\d+)", body[1])]
    assert {activation.formula for activation in ops.ACTIVATIONS.values()} == set(
        formulas
    )


def test_module_imports_no_kernel_by_itself():
    tree = ast.parse(inspect.getsource(ops))
    calls = [node for node in tree.body if isinstance(node, ast.Expr)]
    assert all(isinstance(call.value, ast.Constant) for call in calls)
    assert isinstance(ops.load_error(), str | None)
    assert torch.ops._rocm_C is not None
