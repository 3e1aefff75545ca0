# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""GPU time of a decode step by part, from a trace of torch's profiler.

``RULES`` says which kernel belongs to which part. A kernel that no rule matches belongs
to ``REST`` and is listed by name.
"""

import functools
import gzip
import json
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXPERTS = "routed experts"
SHARED = "shared expert"
ROUTER = "router"
LINEARS = "dense linears"
ATTENTION = "attention, GDN"
NORMS = "norms"
HEAD = "head"
SAMPLING = "sampling, inputs"
COMMUNICATION = "communication"
REST = "rest"
PARTS = (
    *(EXPERTS, SHARED, ROUTER, LINEARS, ATTENTION, NORMS, HEAD, SAMPLING),
    *(COMMUNICATION, REST),
)


@dataclass(frozen=True)
class Kernel:
    """A kernel or copy on the GPU; times in microseconds."""

    name: str
    start: float
    duration: float
    stream: int

    @property
    def end(self) -> float:
        """When it ended."""
        return self.start + self.duration


@dataclass(frozen=True)
class Rule:
    """A kernel belongs to ``part`` if all given patterns are found in the names.

    ``before`` and ``after`` are for the previous and the next kernel on the stream.
    Library kernels need them: a GEMM may be a router, a shared expert or a head.
    """

    part: str
    name: str
    before: str = ""
    after: str = ""

    def matches(self, name: str, previous: str, following: str) -> bool:
        """Whether the rule holds for a kernel and its neighbours ("" at an end)."""
        return (
            re.search(self.name, name) is not None
            and re.search(self.before, previous) is not None
            and re.search(self.after, following) is not None
        )


_LINEAR = r"[Gg]emm|GEMM|gemv|nvjet|marlin::|machete|wvSplitK|LLMM|Cijk_|dot_kernel"
_ATTENTION = (
    r"[Ff]lash|attention|attn|reshape_and_cache|rope|rotary|gated_delta|gdn|causal_conv"
    # Gated DeltaNet in prompts
    r"|chunk_\w+_kernel|recompute_w_u|merge_16x16|fused_post_conv"
)
_EXPERTS = r"moe_int4|marlin_moe|fused_moe_kernel|moe_wna16"
_TOP_K = r"topkGating|topk_?(softmax|sigmoid)|grouped_topk"
_SILU = r"act_and_mul|silu_and_mul|poi_fused\w*silu"
# What reads the logits. The rescored head's own kernels are the first of these.
_LOGITS = (
    r"rescore|index|gather|gumbel|[Aa]rg_?[Mm]ax|softmax|copy_kernel|AllGather|SendRecv"
)

# The first rule that matches counts.
RULES = (
    # A dense int4 linear of many rows runs a down kernel, but nothing before it.
    Rule(LINEARS, r"(prefill|tiled)_down", before=r"^(?!.*gate_up)"),
    Rule(LINEARS, r"prefill_to_planes", after=r"prefill_down"),
    Rule(LINEARS, r"dequantize_int_g"),
    Rule(EXPERTS, _EXPERTS),
    Rule(EXPERTS, r"moe_align|count_and_sort_expert|moe_sum"),
    Rule(EXPERTS, _SILU, before=_EXPERTS),
    Rule(ROUTER, rf"moe_router|{_TOP_K}"),
    Rule(HEAD, r"rescore"),
    Rule(ROUTER, _LINEAR, after=_TOP_K),
    Rule(HEAD, _LINEAR, after=_LOGITS),
    Rule(SHARED, _LINEAR, before=_SILU),
    Rule(SHARED, _LINEAR, after=rf"{_SILU}|sigmoid"),
    Rule(SHARED, r"sigmoid_kernel"),
    Rule(SHARED, r"MulFunctor", before=r"sigmoid_kernel"),
    Rule(SHARED, _SILU, before=_LINEAR, after=_LINEAR),
    Rule(LINEARS, _LINEAR),
    Rule(LINEARS, r"Memset", after=_LINEAR),
    Rule(COMMUNICATION, r"nccl|rccl|all_?[Rr]educe|cross_device_reduce|all_?[Gg]ather"),
    # Inductor's reductions
    Rule(NORMS, r"triton_(red|per)_fused"),
    Rule(SAMPLING, r"gumbel|[Aa]rg_?[Mm]ax|softmax|[Ss]ampl|reject|top_?[kp]"),
    # vLLM prepares the inputs of a step on the GPU
    Rule(SAMPLING, r"Memcpy (HtoD|DtoH)|block_table|slot_mapping|prepare_|post_update"),
    Rule(SAMPLING, r"index|gather|scatter|FillFunctor|arange|num_accepted"),
    Rule(ATTENTION, _ATTENTION),
    Rule(ATTENTION, r"triton_poi_fused", before=_ATTENTION),
    Rule(ATTENTION, r"triton_poi_fused", after=_ATTENTION),
    Rule(NORMS, r"rms_?norm|layer_?norm"),
)

# The second launch of a GEMM or of a dot product: it belongs to the first.
_SECOND_LAUNCH = re.compile(r"splitKreduce|splitk_reduce|PostGSU|reduce_1Block")


def read_trace(path: Path) -> list[Kernel]:
    """The GPU's kernels and copies in a Chrome trace (.json or .json.gz), by start.

    Raises ``ValueError`` if it has none.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt") as file:
        events = json.load(file)["traceEvents"]
    kernels = [
        Kernel(event["name"], event["ts"], event["dur"], event["args"].get("stream", 0))
        for event in events
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]
    if not kernels:
        raise ValueError(f"{path}: expected GPU kernels, found none")
    return sorted(kernels, key=lambda kernel: kernel.start)


def classify(kernels: Iterable[Kernel]) -> list[str]:
    """The part of each kernel; ``kernels`` are ordered by start."""
    kernels = list(kernels)
    streams = defaultdict(list)
    for i, kernel in enumerate(kernels):
        streams[kernel.stream].append(i)
    parts = [REST] * len(kernels)
    for indices in streams.values():
        firsts = [i for i in indices if not _SECOND_LAUNCH.search(kernels[i].name)]
        names = ["", *(kernels[i].name for i in firsts), ""]
        for place, i in enumerate(firsts):
            parts[i] = _part(*names[place : place + 3])
        for previous, i in zip(indices, indices[1:], strict=False):
            if _SECOND_LAUNCH.search(kernels[i].name):
                parts[i] = parts[previous]
    return parts


@functools.cache
def _part(previous: str, name: str, following: str) -> str:
    for rule in RULES:
        if rule.matches(name, previous, following):
            return rule.part
    return REST


def busy_by_part(kernels: Sequence[Kernel], parts: Sequence[str]) -> dict[str, float]:
    """Microseconds of each part. Time in which kernels of several parts run is divided
    evenly between these parts, so that the sum is the time in which the GPU is busy.
    """
    moments = sorted(
        [(kernel.start, 1, part) for kernel, part in zip(kernels, parts, strict=True)]
        + [(kernel.end, -1, part) for kernel, part in zip(kernels, parts, strict=True)]
    )
    busy: dict[str, float] = defaultdict(float)
    running: Counter[str] = Counter()
    before = 0.0
    for moment, change, part in moments:
        active = [name for name, count in running.items() if count > 0]
        for name in active:
            busy[name] += (moment - before) / len(active)
        running[part] += change
        before = moment
    return busy


def attribute(kernels: Sequence[Kernel], steps: int) -> dict[str, Any]:
    """Means per decode step: time and launches of each part, and kernels of the rest.

    Args:
        kernels: a trace, ordered by start.
        steps: the steps that the trace was started for.

    Steps are cut behind the head, and incomplete ones are left out. A step with drafts
    may run the head more than once: it is cut behind as many as there are per step.
    Where the trace shows fewer than two heads, it is taken as a whole, as ``steps``
    steps.
    """
    parts = classify(kernels)
    ends = [
        i + 1
        for i, part in enumerate(parts)
        if part == HEAD and HEAD not in parts[i + 1 : i + 2]
    ]
    ends = ends[:: max(1, round(len(ends) / steps))]
    if len(ends) > 1:
        steps = len(ends) - 1
        starts = [kernels[end - 1].end for end in ends]
        step_us = statistics.median(
            b - a for a, b in zip(starts, starts[1:], strict=False)
        )
    else:
        ends = [0, len(kernels)]
        step_us = (max(kernel.end for kernel in kernels) - kernels[0].start) / steps
    kernels, parts = kernels[ends[0] : ends[-1]], parts[ends[0] : ends[-1]]
    busy, launches = busy_by_part(kernels, parts), Counter(parts)
    rest: dict[str, list[float]] = defaultdict(list)
    for kernel, part in zip(kernels, parts, strict=True):
        if part == REST:
            rest[kernel.name].append(kernel.duration)
    return {
        "steps": steps,
        "step_us": step_us,
        "busy_us": sum(busy.values()) / steps,
        "launches": len(kernels) / steps,
        "parts": {
            part: {"us": busy[part] / steps, "launches": launches[part] / steps}
            for part in PARTS
            if launches[part]
        },
        "rest": {
            name: {"us": sum(times) / steps, "launches": len(times) / steps}
            for name, times in sorted(rest.items(), key=lambda item: -sum(item[1]))
        },
    }
