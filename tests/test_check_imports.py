# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""``tools/check_imports.py`` finds planted problems, and none in this checkout."""

import pytest

from tools import check_imports

LAYERS = "vllm/model_executor/layers"
GOOD = {
    "vllm/plugins/hybrid_w4a16/__init__.py": "from . import hooks\n",
    "vllm/plugins/hybrid_w4a16/hooks.py": (
        "from vllm.model_executor.layers.quantization import ours\nimport vllm.envs\n"
    ),
    f"{LAYERS}/quantization/ours.py": (
        "def f():\n"
        "    from vllm.model_executor.layers.fused_moe import hybrid_w4a16_packing\n"
    ),
    f"{LAYERS}/fused_moe/hybrid_w4a16_packing.py": "AWQ = 1\n",
    f"{LAYERS}/fused_moe/experts/first.py": "",
    "csrc/rocm/gpu_compat.cuh": "#if defined(__HIP__)\n#endif\n",
    "csrc/rocm/kernel.hip": "// not __HIP__ here\nint x;\n",
}


def problems(checkout, changes):
    for path, text in {**GOOD, **changes}.items():
        (checkout / path).parent.mkdir(parents=True, exist_ok=True)
        (checkout / path).write_text(text)
    return [
        *check_imports.import_problems(checkout),
        *check_imports.macro_problems(checkout),
    ]


def test_this_checkout_and_a_good_one_have_none(tmp_path):
    checkout = check_imports.CHECKOUT
    assert len(check_imports.modules(checkout)) > 20
    assert not [*check_imports.import_problems(checkout)]
    assert not [*check_imports.macro_problems(checkout)]
    assert problems(tmp_path, {}) == []


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        (
            f"{LAYERS}/fused_moe/experts/first.py",
            "from vllm.plugins.hybrid_w4a16 import hooks\n",
            "first.py:1: imports vllm.plugins.hybrid_w4a16.hooks, against the",
        ),
        (
            f"{LAYERS}/fused_moe/experts/first.py",
            "if TYPE_CHECKING:\n    from ...quantization.ours import f\n",
            "first.py:2: imports vllm.model_executor.layers.quantization.ours, against",
        ),
        (
            f"{LAYERS}/fused_moe/hybrid_w4a16_packing.py",
            "from .experts import first\n",
            "packing.py:1: imports vllm.model_executor.layers.fused_moe.experts.first,",
        ),
        (
            "vllm/model_executor/models/other.py",
            "",
            "vllm/model_executor/models/other.py: in none of vllm.plugins",
        ),
        (
            "csrc/rocm/kernel.hip",
            "int x;\n#ifdef __HIPCC__\n#endif\n",
            "csrc/rocm/kernel.hip:2: __HIPCC__ belongs in gpu_compat.cuh",
        ),
        (
            "csrc/cpu/kernel.cpp",
            "#if __CUDA_ARCH__ >= 900\n#endif\n",
            "csrc/cpu/kernel.cpp:1: __CUDA_ARCH__ belongs in gpu_compat.cuh",
        ),
        (
            "csrc/kernel.h",
            "#if defined(__AMDGCN__)\n#endif\n",
            "csrc/kernel.h:1: __AMDGCN__ belongs in gpu_compat.cuh",
        ),
    ],
    ids=["up", "up for types", "ground floor", "nowhere", "hip", "cuda", "amdgcn"],
)
def test_a_planted_violation_is_found(path, text, expected, tmp_path):
    found = problems(tmp_path, {path: text})
    assert len(found) == 1 and expected in found[0]


def test_a_circle_is_found(tmp_path):
    first = f"{LAYERS}/fused_moe/experts/first.py"
    second = f"{LAYERS}/fused_moe/second.py"
    changes = {
        first: "def f():\n    from .. import second\n",
        second: "from vllm.model_executor.layers.fused_moe.experts.first import f\n",
    }
    (found,) = problems(tmp_path, changes)
    assert found.startswith("import circle: ") and "second" in found
