# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The commits of the series: titles, texts for pull requests, tests.

Files of each: ``fork_files.ROWS``. Edits of vLLM's files: ``fork_edits.INSERTIONS``.
"""

import textwrap
from dataclasses import dataclass

from . import fork_files

_KERNEL_TESTS = "tests/kernels/moe/hybrid_w4a16"
_QUANTIZATION_TESTS = "tests/quantization/hybrid_w4a16"


@dataclass(frozen=True)
class Commit:
    """One commit, and the pull request that it makes. Texts are paragraphs."""

    title: str
    why: str
    what: str
    tested: str
    not_measured: str
    tests: tuple[str, ...]
    """Test files that have to pass at this commit: what it brings or completes."""

    def message(self) -> str:
        return (
            f"{self.title}\n\n{_wrapped(self.why, 72)}\n\n{_wrapped(self.what, 72)}\n"
        )

    def pull_request(self, added: int, tests: int, of_vllm: int) -> str:
        """Markdown. ``added``, ``tests``, ``of_vllm``: lines of the commit."""
        size = (
            f"{added} lines without tests, {of_vllm} of them in files that vLLM has; "
            f"{tests} lines of tests."
        )
        commands = f"```bash\npytest -v {' '.join(self.tests)}\n```"
        parts = (
            f"# {self.title}",
            "## Why",
            self.why,
            "## What",
            self.what,
            size,
            "## How it was tested",
            commands,
            self.tested,
            "## What was not measured",
            self.not_measured,
        )
        return "\n\n".join(_wrapped(part, 88) for part in parts) + "\n"


def _wrapped(text: str, width: int) -> str:
    if text.startswith(("#", "```")):
        return text
    paragraphs = text.split("\n\n")
    return "\n\n".join(
        textwrap.fill(
            " ".join(p.split()), width, break_long_words=False, break_on_hyphens=False
        )
        for p in paragraphs
    )


_NO_RDNA = """\
Nothing was run on an RDNA GPU. The AMD code was compiled for every architecture of
amd_archs.json, and its registers and loads were read from the compiled code. The
launch plans of RDNA follow from those counts."""

_SAME_SOURCE = """\
Outside of vLLM, the kernels' source was compiled for the host, where its results agree
with float64. An earlier version of it was compiled as CUDA and ran on an H100 under
compute-sanitizer without errors or hazards."""

SERIES: dict[str, Commit] = {
    "kernels": Commit(
        title="[ROCm][Kernel] Add int4 MoE skinny GEMM kernels for RDNA GPUs",
        why="""\
A decode step of an int4 MoE model reads each picked expert once and computes little.
On gfx11 and gfx12 vLLM runs such layers on the Triton WNA16 kernel, which is made for
many rows per expert.""",
        what="""\
Adds the device code of two kernels: gate and up with the activation, and down with
the weighted sum over top-k. A decode step of a layer is these two launches. They read
int4 weights in one layout (ExLlama order, [E, N, K/8]) with non-temporal 16-byte
loads, sum in fp32 in a fixed order, and use no atomics, no scratch memory and no host
sync, so that graphs capture them and bits repeat. A third kernel, a grouped GEMM, is
for callers that sort rows by expert themselves.

The kernels need no vendor header and no device library: any clang with the AMDGPU
target compiles them. Nothing calls them yet.""",
        tested=f"""\
The test compiles every kernel with the clang at hand and looks up each entry point in
the code object: run with clang 22. It is skipped without a clang that has the AMDGPU
target.
{_SAME_SOURCE}""",
        not_measured=_NO_RDNA,
        tests=(f"{_KERNEL_TESTS}/test_device_code.py",),
    ),
    "ops": Commit(
        title="[ROCm][Kernel] Register the int4 MoE ops in _rocm_C",
        why="""\
The int4 MoE kernels need ops that check their arguments and launch them.""",
        what="""\
Registers fused_moe_wvSplitK_int4_gate_up, _down and _gemm through torch's stable ABI.
Every argument is checked with a message that names it, what was expected and what
came. The build compiles the kernels for the gfx11 and gfx12 targets among
VLLM_GPU_ARCHES, embeds a code object for each, and loads it with hipModuleLoadData
from the HIP runtime that torch has loaded. Other targets get no ops, and the Python
wrapper says so.""",
        tested=f"""\
The bindings test reads the sources: each op has a schema, an implementation and a
Python wrapper. The numeric tests hold each op against float64 with poisoned outputs
and sentinels. They are skipped where the build has no kernels for the machine, and so
they were here; with the CPU ops of a later commit they pass. The HIP library was built
for gfx1151.
{_SAME_SOURCE}""",
        not_measured=_NO_RDNA,
        tests=(
            f"{_KERNEL_TESTS}/test_bindings.py",
            f"{_KERNEL_TESTS}/test_moe_int4_ops.py",
            f"{_KERNEL_TESTS}/test_moe_int4_gpu.py",
        ),
    ),
    "backend": Commit(
        title="[ROCm][MoE] Add the HYBRID_W4A16 backend to the WNA16 MoE oracle",
        why="""\
GPTQ, AWQ and compressed-tensors MoE layers choose their kernels in the WNA16 oracle.
The int4 MoE ops need an entry there.""",
        what="""\
Adds HybridW4A16MoEExperts: decode on the int4 MoE ops, prefill on a Triton grouped
GEMM over the same weights. The oracle gets WNA16MoEBackend.HYBRID_W4A16, first in the
list. It declines with a reason on other GPUs than gfx11 and gfx12, and for layers
that the kernels do not cover (group size, dtype, activation, LoRA, EPLB, bias). It is
also `--moe-backend hybrid_w4a16`; then a layer that does not fit is an error. The
weight conversion takes the layouts of the four methods that call the oracle. Where
prefill begins, and its tiles, are read from a JSON table per device.""",
        tested="""\
The oracle's choice and its reasons, with a device of the family put in place; the
weight conversion of each method against its dequantized weights; the Triton kernels
against float64, in Triton's interpreter where there is no GPU. For 110 layer
configurations, the class or the reason was compared with that of a separate package
that makes the same choice without the oracle: they are the same.""",
        not_measured=f"""\
{_NO_RDNA} The prefill tiles of RDNA were chosen by the same reading.""",
        tests=(
            f"{_QUANTIZATION_TESTS}/test_oracle.py",
            f"{_QUANTIZATION_TESTS}/test_packing.py",
            f"{_KERNEL_TESTS}/test_moe_int4_prefill.py",
        ),
    ),
    "autoround": Commit(
        title="[ROCm][Quantization] Run AutoRound int4 MoE layers on HYBRID_W4A16",
        why="""\
AutoRound checkpoints do not reach the WNA16 oracle unless Marlin supports their
shape, and entries of extra_config that name experts are overlooked.""",
        what="""\
Adds INCHybridW4A16MoEMethod, for the GPTQ and the AWQ packing of AutoRound. It checks
each tensor that it loads (name, shape, dtype, zero points of symmetric checkpoints),
and repacks expert by expert in the storage that was loaded, so that the peak is the
checkpoint plus one expert. A layer that the backend declines takes the path that it
took before.""",
        tested="""\
Layers from the checkpoint to their output against the dequantized weights, symmetric
and with zero points, expert parallel shards; converting a second time; memory while
converting; missing tensors and wrong zero points. These tests need the ops: they are
skipped on a machine that the build has no kernels for. They were run with the CPU ops
of a later commit.""",
        not_measured="No checkpoint was served on an RDNA GPU.",
        tests=(f"{_QUANTIZATION_TESTS}/test_inc_moe.py",),
    ),
    "cpu": Commit(
        title="[CPU][Kernel] Add the int4 MoE ops for the CPU",
        why="""\
vLLM on the CPU does not load AutoRound, GPTQ or AWQ checkpoints with int4 MoE layers,
and the tests of HYBRID_W4A16 need a machine with an RDNA GPU.""",
        what="""\
Implements the int4 MoE ops in portable C++, and in AVX2 and AVX-512 where the
compiler has them; the processor's instruction set decides at run time. The oracle
offers HYBRID_W4A16 first on the CPU too.""",
        tested="""\
All tests of the backend run on the CPU from this commit on, with each instruction set
that the processor has: on a Zen 4, portable, AVX2 and AVX-512.""",
        not_measured="""\
AArch64: the portable kernels were compiled and run on x86-64 alone.""",
        tests=(
            f"{_KERNEL_TESTS}/test_moe_int4_ops.py",
            f"{_QUANTIZATION_TESTS}/test_inc_moe.py",
            f"{_QUANTIZATION_TESTS}/test_cpu_layers.py",
        ),
    ),
    "cpu_avx512": Commit(
        title="[CPU][Kernel] Add VNNI, bf16 and AMX kernels to the int4 MoE ops",
        why="""\
Decode on the CPU is bound by memory bandwidth only if the arithmetic keeps up, and
prefill by arithmetic.""",
        what="""\
Adds kernels for AVX-512 VNNI and bf16, and for AMX int8 and bf16. By rows of an
expert and by what the processor has, tuning.h says which one runs.""",
        tested="""\
The numeric tests run with every instruction set that the processor has: in this tree
VNNI and bf16 on a Zen 4. The AMX kernels were run outside of vLLM, with the same tests,
on a Xeon. There, with 2 cores, an earlier version of the ops was 1.20 to 1.52 times as
fast as CPUExpertsInt4 at 1 to 8 tokens and 1.18 to 1.72 times at 64 and 512, over the
layers of Qwen3-30B-A3B and Qwen3.5-35B-A3B.""",
        not_measured="""\
The AMX kernels in this tree. Fp16 activations and zero points were not timed with AMX
at all.""",
        tests=(f"{_KERNEL_TESTS}/test_moe_int4_ops.py",),
    ),
    "lm_head": Commit(
        title="[ROCm][CPU] Quantize lm_head to int8 or int4 when the model is loaded",
        why="""\
The 16-bit lm_head is the largest read of a decoded token in int4 MoE models: 1.0 GB
of 2.6 GB in Qwen3.5-35B-A3B.""",
        what="""\
Adds dense ops for weights quantized by group, and four names for a head in
`--quantization-config '{"targets": {"lm_head": NAME}}'`: int8_g32, int4_g32,
int4_g128 and int4_rescored. The last scans in int4, then computes every logit again,
from the 16-bit weights, that could be the first or close to it.""",
        tested="""\
The ops against float64; the most likely token against a 16-bit head; logits and memory
with each of the names; tied embeddings, padding of the vocabulary, weights that are
loaded again.""",
        not_measured=f"""\
{_NO_RDNA} No model was served with a quantized head in this tree; speculative decoding,
structured output and sleep mode were not run.""",
        tests=(
            f"{_KERNEL_TESTS}/test_wvSplitK_int_g.py",
            f"{_QUANTIZATION_TESTS}/test_lm_head.py",
        ),
    ),
    "token": Commit(
        title="[CPU][Kernel] Run dense int4 linears and shared experts on MoE kernels",
        why="""\
In int4 MoE models the dense int4 projections are, after experts and head, the next
largest part of a decoded token. A 16-bit shared expert takes four to seven launches of
its own.""",
        what="""\
Adds HybridW4A16LinearKernel over the dense int4 op, first in the list of the CPU's
mixed-precision kernels. It leaves bf16 to vLLM's AMX kernel where there is one. On a
GPU it runs few rows on the skinny GEMM and many on Triton, but it is in no GPU's
list. For up to 8 tokens the gate_up and down launches compute the shared expert as
well, in 16 bits or with the int4 weights of that kernel; the MoE runner fetches and
adds its result as before. For as many tokens one launch computes router logits and
top-k where the runner holds the gate.""",
        tested="""\
Layers that fit and that do not; the product against float64, on the CPU. The shared
expert in the ops against float64. Router logits against float64, ids and weights
against torch.""",
        not_measured=f"""\
{_NO_RDNA} The linear kernel was not compared with RDNAHybridW4A16LinearKernel. The
shared expert in the launches and the router were not timed on any GPU.""",
        tests=(
            f"{_KERNEL_TESTS}/test_router.py",
            f"{_KERNEL_TESTS}/test_shared_expert.py",
            f"{_QUANTIZATION_TESTS}/test_linear_kernel.py",
        ),
    ),
    "pair": Commit(
        title="[CPU][Kernel] One int4 product for the input of Gated DeltaNet",
        why="""\
A Gated DeltaNet layer multiplies its input with in_proj_qkvz and with in_proj_ba. The
second has 64 rows where the first has 12288, and is a launch of its own.""",
        what="""\
Joins the weights of the two at load, where both run on HybridW4A16LinearKernel and have
no bias. The parameters become views of the joint tensors, so weights can be loaded
again. The first linear computes both products and the second takes its part.""",
        tested="""\
Both products against float64 with one call of the kernel, in eager and compiled mode,
on the CPU.""",
        not_measured=f"""\
{_NO_RDNA} The gain was not measured on any GPU.""",
        tests=(f"{_QUANTIZATION_TESTS}/test_linear_pair.py",),
    ),
}

assert tuple(SERIES) == fork_files.COMMITS
