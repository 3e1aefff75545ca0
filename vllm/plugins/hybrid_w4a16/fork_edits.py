# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""What the series inserts into vLLM's own files, as a table, and how it is inserted.

The place is found by a pattern that has to match once; everything else stays as it
was, byte by byte. A row fits vLLM 0.32 and 0.33.
"""

import re
from dataclasses import dataclass

_MOE = "vllm/model_executor/layers/fused_moe"
_QUANTIZATION = "vllm/model_executor/layers/quantization"
ORACLE = f"{_MOE}/oracle/int_wna16.py"
CONFIG = "vllm/config/kernel.py"
RUNNER = f"{_MOE}/runner/moe_runner.py"
INC = f"{_QUANTIZATION}/inc/schemes/inc_wna16_scheme.py"
GPTQ = f"{_QUANTIZATION}/auto_gptq.py"
AWQ = f"{_QUANTIZATION}/auto_awq.py"
ONLINE = f"{_QUANTIZATION}/online/base.py"
EMBEDDING = "vllm/model_executor/layers/vocab_parallel_embedding.py"
LINEAR = "vllm/model_executor/kernels/linear/__init__.py"
SHORTHANDS = "vllm/config/quantization.py"
CMAKE = "CMakeLists.txt"
DOCS = "docs/features/quantization"
FEATURES = "docs/design/moe_kernel_features.md"
CI_CPU = ".buildkite/hardware_tests/cpu.yaml"


class Conflict(Exception):
    """The text is not what the edit was written for; the message says how."""


@dataclass(frozen=True)
class Insertion:
    """Text that a commit inserts into one of vLLM's files."""

    commit: str
    path: str
    symbol: str
    """What the report calls the place."""
    after: str
    """Pattern, multi-line; the text goes where its match ends."""
    text: str
    instead_of: str = ""
    """What of vLLM's text the new one replaces."""

    def apply(self, source: str) -> str:
        """``source`` with the text, or as it is where the text is there already.

        Raises ``Conflict`` where the place is not found, or found more than once.
        """
        found = list(re.finditer(self.after, source, re.M))
        if len(found) != 1:
            raise Conflict(f"{len(found)} places match {self.after!r}, expected one")
        end = found[0].end()
        # before its end where the pattern looks ahead
        if source.startswith(self.text, end) or source[:end].endswith(self.text):
            return source
        if not source.startswith(self.instead_of, end):
            raise Conflict(f"{self.after!r} is not followed by {self.instead_of!r}")
        return source[:end] + self.text + source[end + len(self.instead_of) :]


def _function(name: str) -> str:
    """Pattern from ``def name(`` on; what follows it may span lines."""
    return rf"^ *def {name}\((?:.|\n)*?"


# The end of a function's docstring and of its arguments.
_DOCSTRING_END = r'\n    """\n'
_ARGUMENTS_END = r"\n    \)[^\n]*:\n"

_CMAKE_INCLUDE = "include(${CMAKE_CURRENT_LIST_DIR}/cmake/hybrid_w4a16.cmake)\n"

INSERTIONS: tuple[Insertion, ...] = (
    Insertion(
        "ops",
        CMAKE,
        "ops in _rocm_C",
        r"^  define_extension_target\(\n    _rocm_C\n(?:    [^)\n]*\n)*?    [^)\n]*\)"
        r"\n",
        f"  {_CMAKE_INCLUDE}",
    ),
    Insertion(
        "backend",
        CONFIG,
        "MoEBackend",
        r"^MoEBackend = Literal\[\n(?:    .*\n)*?(?=\])",
        '    "hybrid_w4a16",\n',
    ),
    Insertion(
        "backend",
        CONFIG,
        "KernelConfig.moe_backend (docstring)",
        r'^    - "rdna3": .*\n',
        """\
    - "hybrid_w4a16": Use int4 skinny GEMM kernels for decode and Triton for
      prefill over the same weights (ROCm gfx11/gfx12)
""",
    ),
    Insertion(
        "backend",
        ORACLE,
        "import",
        r"^from [\w.]*trtllm_mxint4_moe import \(\n.*\n\)\n",
        "from vllm.model_executor.layers.fused_moe.oracle import hybrid_w4a16_wna16\n",
    ),
    Insertion(
        "backend",
        ORACLE,
        "WNA16MoEBackend",
        r"^class WNA16MoEBackend\(Enum\):\n",
        '    HYBRID_W4A16 = "HYBRID_W4A16"\n',
    ),
    Insertion(
        "backend",
        ORACLE,
        "backend_to_kernel_cls",
        _function("backend_to_kernel_cls") + r"(?=    else:\n)",
        """\
    elif backend == WNA16MoEBackend.HYBRID_W4A16:
        from vllm.model_executor.layers.fused_moe.experts.hybrid_w4a16_moe import (
            HybridW4A16MoEExperts,
        )

        return [HybridW4A16MoEExperts]
""",
    ),
    Insertion(
        "backend",
        ORACLE,
        "_get_priority_backends",
        _function("_get_priority_backends") + r"    backends = \[\n",
        """\
        # Native HIP kernels for gfx11 and gfx12.
        WNA16MoEBackend.HYBRID_W4A16,
""",
    ),
    Insertion(
        "backend",
        ORACLE,
        "_backend_incompatibility_reason",
        _function("_backend_incompatibility_reason") + r"\n\) -> str \| None:\n",
        """\
    if backend == WNA16MoEBackend.HYBRID_W4A16:
        return hybrid_w4a16_wna16.incompatibility_reason(moe_config, quant_config)

""",
    ),
    Insertion(
        "backend",
        ORACLE,
        "map_wna16_backend",
        _function("map_wna16_backend") + r"    mapping = \{\n",
        '        "hybrid_w4a16": WNA16MoEBackend.HYBRID_W4A16,\n',
    ),
    Insertion(
        "backend",
        ORACLE,
        "make_wna16_moe_kernel",
        _function("make_wna16_moe_kernel")
        + r"(?=    if backend == WNA16MoEBackend.HUMMING:\n)",
        """\
    if backend == WNA16MoEBackend.HYBRID_W4A16:
        allowed_experts += tuple(backend_to_kernel_cls(backend))
""",
    ),
    Insertion(
        "backend",
        ORACLE,
        "convert_to_wna16_moe_kernel_format",
        _function("convert_to_wna16_moe_kernel_format") + _DOCSTRING_END,
        """\
    if backend == WNA16MoEBackend.HYBRID_W4A16:
        return hybrid_w4a16_wna16.convert_weights(
            quant_config,
            w13,
            w2,
            w13_scale,
            w2_scale,
            w13_qzeros,
            w2_qzeros,
            w13_bias,
            w2_bias,
        )

""",
    ),
    *(
        Insertion(
            "backend",
            path,
            f"{name}.get_quant_method",
            rf"^class {name}\((?:.|\n)*?"
            + _function("get_quant_method")
            + r" {12}if not check_moe_marlin_supports_layer\(\n.*\n {12}\)",
            " and not hybrid_w4a16_wna16.takes(layer.moe_config, self)",
        )
        for path, name in ((GPTQ, "AutoGPTQConfig"), (AWQ, "AutoAWQConfig"))
    ),
    *(
        Insertion(
            "backend",
            path,
            "import",
            r"(?=^from [\w.]*\.oracle\.int_wna16 import \(\n)",
            "from vllm.model_executor.layers.fused_moe.oracle import "
            "hybrid_w4a16_wna16\n",
        )
        for path in (GPTQ, AWQ)
    ),
    Insertion(
        "backend",
        f"{DOCS}/README.md",
        "list of pages",
        r"^- \[FP8 ViT Encoder Attention\].*\n",
        "- [Hybrid INT4 MoE (RDNA)](hybrid_w4a16.md)\n",
    ),
    Insertion(
        "backend",
        FEATURES,
        "table of experts",
        r"^\| rocm aiter moe \|.*\n",
        "| hybrid_w4a16 | standard | int4 | G(32),G(64),G(128) | silu, gelu,</br>"
        "gelu_tanh,</br>swigluoai_uninterleave | Y | Y | [`HybridW4A16MoEExperts`]"
        "[vllm.model_executor.layers.fused_moe.experts.hybrid_w4a16_moe."
        "HybridW4A16MoEExperts] |\n",
    ),
    Insertion(
        "autoround",
        INC,
        "INCWna16Scheme.get_moe_method",
        _function("get_moe_method") + _ARGUMENTS_END,
        """\
        from vllm.model_executor.layers.quantization.inc_moe import inc_moe_method

        if method := inc_moe_method(self, config, layer, prefix, layer_config):
            return method

""",
    ),
    Insertion(
        "cpu",
        CMAKE,
        "ops in _C of the CPU",
        r"^ *include\([^()\s]*/cmake/cpu_extension\.cmake\)\n",
        f"        {_CMAKE_INCLUDE}",
    ),
    Insertion(
        "cpu",
        ORACLE,
        "_get_priority_backends (CPU)",
        _function("_get_priority_backends") + r"is_cpu\(\):\n        return \[",
        """
            WNA16MoEBackend.HYBRID_W4A16,
            WNA16MoEBackend.ZEN_CPU,
            WNA16MoEBackend.CPU,
        ]
""",
        "WNA16MoEBackend.ZEN_CPU, WNA16MoEBackend.CPU]\n",
    ),
    Insertion(
        "cpu",
        CI_CPU,
        "CI of the CPU kernels",
        r"^ *tests/kernels/moe/test_cpu_quant_fused_moe\.py \\\n",
        "      tests/kernels/moe/hybrid_w4a16 \\\n"
        "      tests/quantization/hybrid_w4a16 \\\n",
    ),
    Insertion(
        "cpu",
        CI_CPU,
        "CI of the CPU kernels (dependencies)",
        r"^  - tests/kernels/moe/test_cpu_quant_fused_moe\.py\n",
        "  - csrc/hybrid_w4a16/\n  - tests/kernels/moe/hybrid_w4a16/\n"
        "  - tests/quantization/hybrid_w4a16/\n",
    ),
    Insertion(
        "lm_head",
        SHORTHANDS,
        "names of targets",
        r"^_ONLINE_SHORTHANDS: dict\[str, QuantizationConfigArgs\] = \{\n",
        """\
    # lm_head, see hybrid_w4a16_head: neither a linear nor a moe spec
    "int8_g32": QuantizationConfigArgs(),
    "int4_g32": QuantizationConfigArgs(),
    "int4_g128": QuantizationConfigArgs(),
    "int4_rescored": QuantizationConfigArgs(),
""",
    ),
    Insertion(
        "lm_head",
        ONLINE,
        "OnlineQuantizationConfig.get_quant_method",
        r"^class OnlineQuantizationConfig\((?:.|\n)*?"
        + _function("get_quant_method")
        + _ARGUMENTS_END,
        """\
        from vllm.model_executor.layers.quantization import hybrid_w4a16_head

        if method := hybrid_w4a16_head.lm_head_config_method(self, layer, prefix):
            return method

""",
    ),
    Insertion(
        "lm_head",
        EMBEDDING,
        "VocabParallelEmbedding.update_param_tp_status",
        r"^    def update_param_tp_status\(self\)[^\n]*:\n",
        """\
        from vllm.model_executor.layers.quantization.hybrid_w4a16_head import (
            lm_head_built,
        )

        lm_head_built(self)
""",
    ),
    Insertion(
        "token",
        LINEAR,
        "import",
        r"(?=^from [\w.]*\.mixed_precision\.machete import \(\n)",
        """\
from vllm.model_executor.kernels.linear.mixed_precision.hybrid_w4a16 import (
    HybridW4A16LinearKernel,
)
""",
    ),
    Insertion(
        "token",
        LINEAR,
        "_POSSIBLE_KERNELS",
        r"^_POSSIBLE_KERNELS: (?:.|\n)*?    PlatformEnum.CPU: \[\n",
        "        HybridW4A16LinearKernel,\n",
    ),
    Insertion(
        "token",
        RUNNER,
        "MoERunner._select_forward",
        r"^    def _select_forward\(self\) -> Callable:\n",
        """\
        from vllm.model_executor.layers.fused_moe import hybrid_w4a16_runner

        hybrid_w4a16_runner.runner_built(self)
""",
    ),
)
