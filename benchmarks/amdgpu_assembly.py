# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Parses AMDGPU assembly as clang prints it: kernels, their resources and main loops.

Pure functions from text to numbers; isa_report.py runs the tools and prints.

A weight load is a vector memory load with the non-temporal hint (gfx11: ``slc`` or
``nt``; gfx12: ``th:TH_LOAD_NT...``); kernels use the hint only for weights. A main loop
is an innermost loop with weight loads. A kernel has one main loop per compiled number
of activation rows; if it is fully unrolled it has none, and its whole body counts.
Plain 16-byte loads in a main loop are activations that go to LDS, so the loop stores at
least as many 16-byte pieces to LDS. Any more plain loads are counted as weight loads
without the hint, except in loops that unpack nothing or do not access LDS: those get
activations straight from memory.

Memory serves a wave's requests while the wave computes, until it waits (``s_waitcnt``,
on gfx12 ``s_wait_*cnt``) or meets a barrier. The positions of the waits give two
numbers. *Weight bytes in flight*: what an iteration of a main loop requests before its
first wait after a weight load. *Round trips*: the number of dependent waits for memory
before a wave requests its first weights.
"""

import dataclasses
import functools
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import TypeVar

import networkx
import yaml

# VGPRs of a SIMD per wave32 lane, and the allocation granularity. Sources: LLVM's
# AMDGPU backend (feature 1_5xVGPRs: 1536 in steps of 24, else 1024 in steps of 16) and
# AMD's RDNA3 and RDNA4 instruction set guides.
ARCHS = Path(__file__).resolve().parents[1] / "csrc" / "rocm" / "amd_archs.json"
VGPR_FILE = {
    arch: (facts["vgprs"], facts["vgpr_step"])
    for arch, facts in json.loads(ARCHS.read_text()).items()
}
MAX_WAVES_PER_SIMD = 16  # RDNA2 and later
SIMDS_PER_CU = 2
LDS_BYTES_PER_WGP = 128 * 1024  # for two CUs; RDNA3 and RDNA4

LANE_LOAD_BYTES = 16  # 32 weights
WAVE_SIZE = 32

# Request counters: vector loads (in order); scalar loads and LDS (one counter on gfx11,
# so each of its waits counts as a wait for scalar loads); everything else.
_WAITS = {
    "vmcnt": "vector",
    "lgkmcnt": "scalar",
    "loadcnt": "vector",
    "kmcnt": "scalar",
    "dscnt": "other",
    "vscnt": "other",
    "storecnt": "other",
}
# Neither work nor requests: waits and scheduler hints.
_HINTS = ("s_wait", "s_delay_alu", "s_clause", "s_nop", "s_code_end")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of machine code without its comment."""

    text: str

    @property
    def operations(self) -> list[str]:
        """Mnemonics; two for a dual instruction (``v_dual_a ... :: v_dual_b ...``)."""
        return [half.split()[0] for half in self.text.split("::")]

    @property
    def load_bytes(self) -> int:
        """Bytes per lane of a vector memory load; 0 for everything else."""
        found = re.match(
            r"(?:global|buffer|flat)_load_(?:d16_)?(?:hi_)?(dwordx?|[bui](?=\d))(\d*)",
            self.text,
        )
        if not found:
            return 0
        unit, count = found.groups()
        return 4 * int(count or 1) if unit.startswith("dword") else int(count) // 8

    @property
    def is_weight_load(self) -> bool:
        """Whether this loads memory with the non-temporal hint."""
        hint = re.search(r"\b(slc|nt)\b|th:TH_LOAD_NT", self.text)
        return self.load_bytes > 0 and hint is not None

    @property
    def is_scalar_load(self) -> bool:
        """Whether this is a scalar memory load."""
        return self.text.startswith(("s_load_", "s_buffer_load_"))

    @property
    def waits(self) -> dict[str, int]:
        """Kind of request -> how many may still be pending; empty if this is no wait.

        A barrier waits for other waves, which counts as "other".
        """
        name, _, operands = self.text.partition(" ")
        if name == "s_waitcnt":
            found = re.findall(r"(\w+)\((\d+)\)", operands)
            return {
                _WAITS[counter]: int(n) for counter, n in found if counter in _WAITS
            }
        if name.startswith(("s_barrier", "s_waitcnt_")) and "depctr" not in name:
            return {"other": 0}
        counters = name.removeprefix("s_wait_").split("_")
        if not name.startswith("s_wait_") or not set(counters) <= _WAITS.keys():
            return {}
        value = int(operands.split()[-1], 0)
        if len(counters) == 2:  # loads or stores in the high byte, LDS in the low
            return {_WAITS[counters[0]]: value >> 8, "other": value & 0xFF}
        return {_WAITS[counters[0]]: value}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel in assembly: resources from the metadata, code in layout order."""

    name: str
    vgpr: int
    sgpr: int
    lds: int
    scratch: int
    block_size: int
    code: tuple[Instruction, ...]
    labels: dict[str, int]  # label -> index into code

    def main_loops(self) -> list["Region"]:
        """Return the innermost loops with weight loads; without any, the whole body."""
        loops = self.loops_with(lambda ins: ins.is_weight_load)
        return loops or [self._region(self._flow, 0)]

    def loops_with(self, wanted: Callable[[Instruction], bool]) -> list["Region"]:
        """Return the innermost loops with an instruction that is `wanted`."""
        flow = self._flow

        def found(block: int) -> bool:
            return any(map(wanted, self.code[self._blocks[block]]))

        return [
            self._region(flow.subgraph(loop), min(_entries(flow, loop)))
            for loop, hit in _loops(flow, set(flow), found)
            if hit
        ]

    def round_trips(self) -> tuple[int, int] | None:
        """Fewest and most dependent memory round trips before the first weight load.

        Considers all paths, but enters a loop without weights only if there is no way
        around it; ``None`` if no weight load is reachable. Simultaneous requests count
        once.
        """
        flow = self._flow
        loops = _loops(flow, set(flow), self._has_weights)
        avoided = {i for loop, weights in loops if not weights for i in loop} - {0}
        for graph in (flow.subgraph(set(flow) - avoided), flow):
            found: set[int] = set()

            def step(state: _Pending, ins: Instruction, found: set = found) -> list:
                if not ins.is_weight_load:
                    return [state.after(ins)]
                found.add(state.level)
                return []

            self._region(graph, 0).walk(_Pending(), step)
            if found:
                return min(found), max(found)
        return None

    def _has_weights(self, block: int) -> bool:
        return any(ins.is_weight_load for ins in self.code[self._blocks[block]])

    @functools.cached_property
    def _blocks(self) -> list[slice]:
        """Return the basic blocks in layout order."""
        jumps = [i for i, ins in enumerate(self.code) if _jump(ins)]
        starts = sorted({0, *self.labels.values(), *(i + 1 for i in jumps)})
        starts = [i for i in starts if i < len(self.code)]
        return [slice(a, b) for a, b in itertools.pairwise([*starts, len(self.code)])]

    @functools.cached_property
    def _flow(self) -> networkx.DiGraph:
        """Return the control flow graph of the block numbers."""
        blocks = self._blocks
        number = {block.start: i for i, block in enumerate(blocks)}
        flow = networkx.DiGraph()
        flow.add_nodes_from(range(len(blocks)))
        for i, block in enumerate(blocks):
            jump = _jump(self.code[block.stop - 1])
            if (not jump or jump.startswith("s_cbranch")) and i + 1 < len(blocks):
                flow.add_edge(i, i + 1)
            target = self.labels.get(jump.split()[-1]) if jump else None
            if target in number:
                flow.add_edge(i, number[target])
        return flow

    def _region(self, flow: networkx.DiGraph, entry: int) -> "Region":
        blocks = self._blocks
        return Region({i: self.code[blocks[i]] for i in sorted(flow)}, flow, entry)


def _jump(ins: Instruction) -> str:
    """Return the instruction's text if it may jump, else an empty string."""
    jumps = ("s_branch", "s_cbranch", "s_endpgm", "s_setpc")
    return ins.text if ins.text.startswith(jumps) else ""


def _entries(flow: networkx.DiGraph, loop: set[int]) -> set[int]:
    """Return a loop's blocks that are reached from outside; else its first block."""
    return {j for i, j in flow.edges if i not in loop and j in loop} or {min(loop)}


def _loops(
    flow: networkx.DiGraph, nodes: set[int], has_weights: Callable[[int], bool]
) -> Iterator[tuple[set[int], bool]]:
    """Return loops among `nodes`, each with whether it loads weights.

    Of nested loops: the innermost ones that do, and the outermost ones that do not.
    """
    parts = networkx.strongly_connected_components(flow.subgraph(nodes))
    for loop in sorted(parts, key=min):  # in layout order
        some = min(loop)
        if len(loop) == 1 and not flow.has_edge(some, some):
            continue
        if not any(has_weights(i) for i in loop):
            yield loop, False
            continue
        inner = loop - {min(_entries(flow, loop))}
        found = list(_loops(flow, inner, has_weights))
        yield from found
        if not any(weights for _, weights in found):
            yield loop, True


State = TypeVar("State", bound=Hashable)


@dataclasses.dataclass(frozen=True)
class Region:
    """A part of a kernel that is entered at one block."""

    blocks: dict[int, tuple[Instruction, ...]]  # in layout order
    flow: networkx.DiGraph
    entry: int

    @property
    def code(self) -> tuple[Instruction, ...]:
        """Return the code in layout order, with both sides of every branch."""
        return tuple(ins for block in self.blocks.values() for ins in block)

    def walk(
        self, state: State, step: Callable[[State, Instruction], list[State]]
    ) -> set[State]:
        """Carry `state` along every path, once through loops; return the final states.

        `step(state, instruction)` returns the states after an instruction. If it
        returns none, the path ends there.
        """
        dominators = networkx.immediate_dominators(self.flow, self.entry)
        reached = {self.entry, *dominators}

        def dominates(a: int, b: int) -> bool:
            while b != a and b != self.entry:
                b = dominators[b]
            return a == b

        forward = networkx.DiGraph()
        forward.add_node(self.entry)
        forward.add_edges_from(
            (i, j) for i, j in self.flow.edges if i in reached and not dominates(j, i)
        )
        arriving: dict[int, set[State]] = {self.entry: {state}}
        last: set[State] = set()
        for i in networkx.topological_sort(forward):
            states = arriving.get(i, set())
            for ins in self.blocks[i]:
                states = {after for before in states for after in step(before, ins)}
            for j in forward.successors(i):
                arriving.setdefault(j, set()).update(states)
            if not any(True for _ in forward.successors(i)):
                last |= states
        return last


@dataclasses.dataclass(frozen=True)
class _Pending:
    """Round trips so far, and their number when each pending load was requested."""

    level: int = 0
    vector: tuple[int, ...] = ()  # in order
    scalar: int = -1  # the latest; -1: none

    def after(self, ins: Instruction) -> "_Pending":
        """Return the state after an instruction."""
        if ins.is_scalar_load:
            return dataclasses.replace(self, scalar=self.level)
        if ins.load_bytes:
            return dataclasses.replace(self, vector=(*self.vector, self.level))
        level, vector, scalar = self.level, self.vector, self.scalar
        waits = ins.waits
        if "scalar" in waits:
            level, scalar = max(level, scalar + 1), -1
        if "vector" in waits:
            arrived = max(0, len(vector) - waits["vector"])
            level = max([level, *(i + 1 for i in vector[:arrived])])
            vector = vector[arrived:]
        return _Pending(level, vector, scalar)


@dataclasses.dataclass(frozen=True)
class _Requested:
    """Weight bytes that a wave requested: in all, and before the first wait."""

    total: int = 0
    early: int = 0
    waited: bool = False

    def after(self, ins: Instruction) -> "_Requested":
        """Return the state after an instruction."""
        if ins.is_weight_load:
            size = ins.load_bytes * WAVE_SIZE
            early = self.early if self.waited else self.early + size
            return _Requested(self.total + size, early, self.waited)
        if ins.waits and self.total:
            return dataclasses.replace(self, waited=True)
        return self


def parse_assembly(text: str) -> list[Kernel]:
    """Parse clang's AMDGPU assembly; return its kernels in metadata order.

    Raises ValueError if a kernel in the metadata has no code.
    """
    bodies = dict(_functions(text))
    found = re.search(
        r"^\s*\.amdgpu_metadata\n(.*?)^\s*\.end_amdgpu_metadata", text, re.M | re.S
    )
    metadata = yaml.safe_load(found[1]) if found else {}
    kernels = []
    for entry in metadata.get("amdhsa.kernels", []):
        name = entry[".name"]
        if name not in bodies:
            raise ValueError(f"kernel {name!r} has metadata but no code")
        code, labels = bodies[name]
        spills = any(ins.text.startswith("scratch_") for ins in code)
        kernels.append(
            Kernel(
                name=name,
                vgpr=entry[".vgpr_count"],
                sgpr=entry[".sgpr_count"],
                lds=entry[".group_segment_fixed_size"],
                scratch=max(entry[".private_segment_fixed_size"], 4 * spills),
                block_size=entry[".max_flat_workgroup_size"],
                code=tuple(code),
                labels=labels,
            )
        )
    return kernels


def _functions(
    text: str,
) -> Iterator[tuple[str, tuple[list[Instruction], dict[str, int]]]]:
    names = set(re.findall(r"^\s*\.type\s+(\S+),@function", text, re.M))
    name: str | None = None
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for raw in text.splitlines():
        line = raw.split(";")[0].strip()
        label = line[:-1] if re.fullmatch(r"[\w.$]+:", line) else None
        if label in names:
            name, code, labels = label, [], {}
        elif name is not None and label and label.startswith(".Lfunc_end"):
            yield name, (code, labels)
            name = None
        elif name is not None and label:
            labels[label] = len(code)
        elif name is not None and line and not line.startswith("."):
            code.append(Instruction(line))


def occupancy(arch: str, vgpr: int, lds: int = 0, block_size: int = 32) -> int:
    """Return the waves that fit a SIMD, at most 16.

    `vgpr` per lane, `lds` in bytes per block, `block_size` in lanes. Raises KeyError
    for an architecture that VGPR_FILE does not list.
    """
    total, step = VGPR_FILE[arch]
    waves = min(MAX_WAVES_PER_SIMD, total // (step * max(1, -(-vgpr // step))))
    if lds:
        in_wgp = LDS_BYTES_PER_WGP // lds * -(-block_size // 32)
        waves = min(waves, -(-in_wgp // (2 * SIMDS_PER_CU)))
    return waves


@dataclasses.dataclass
class Loop:
    """One iteration of a main loop; the module docstring explains the numbers."""

    weight_loads: dict[int, int]  # bytes per lane -> count
    weight_bytes: int  # per wave, on the path that requests most
    weight_bytes_in_flight: int  # part of weight_bytes
    plain_wide_loads: int  # 16-byte loads without the hint
    wide_lds_stores: int
    dot2_per_512B: float | None
    valu_per_512B: float | None  # dot2 included
    instructions_per_512B: float | None  # without waits and hints
    code: str
    mca_cycles_per_512B: float | None = None

    @property
    def lane_loads(self) -> float:
        """Weight bytes per lane in units of 16; one unit is 512 bytes per wave."""
        return sum(n * size for size, n in self.weight_loads.items()) / LANE_LOAD_BYTES

    @property
    def unpacks(self) -> bool:
        """Whether this extracts nibbles or bytes from weights."""
        return "v_and_or_b32" in self.code or "v_perm_b32" in self.code

    @property
    def uses_lds(self) -> bool:
        """Whether this loads from LDS or stores to it."""
        return re.search(r"\bds_(load|read|store|write)_", self.code) is not None

    def faults(self) -> list[str]:
        """Return why this loop must not ship; empty if it may."""
        found = (
            []
            if self.weight_loads
            else ["no non-temporal weight load in the main loop"]
        )
        for size, n in self.weight_loads.items():
            if size < LANE_LOAD_BYTES:
                found.append(f"weight loads of {size} bytes in the main loop ({n})")
        expected = self.wide_lds_stores
        if self.unpacks and self.uses_lds and self.plain_wide_loads > expected:
            excess = self.plain_wide_loads - self.wide_lds_stores
            found.append(
                f"weight loads that are not non-temporal in the main loop ({excess})"
            )
        if self.weight_bytes_in_flight < self.weight_bytes:
            found.append(
                f"{self.weight_bytes_in_flight} of a turn's {self.weight_bytes} weight "
                "bytes are requested before a wait"
            )
        return found


def analyse(region: Region) -> Loop:
    """Count what a main loop does in an iteration; every instruction counts once."""
    code = region.code
    loads = Counter(ins.load_bytes for ins in code if ins.is_weight_load)
    plain = [ins for ins in code if ins.load_bytes >= 16 and not ins.is_weight_load]
    stores = sum(
        ins.text.startswith(("ds_store_b128", "ds_write_b128")) for ins in code
    )
    ends = region.walk(_Requested(), lambda state, ins: [state.after(ins)])
    most = max(end.total for end in ends)
    loop = Loop(
        weight_loads=dict(sorted(loads.items())),
        weight_bytes=most,
        weight_bytes_in_flight=min(end.early for end in ends if end.total == most),
        plain_wide_loads=len(plain),
        wide_lds_stores=stores,
        dot2_per_512B=None,
        valu_per_512B=None,
        instructions_per_512B=None,
        code="\n".join(ins.text for ins in code),
    )
    if loads:
        valu = [op for ins in code for op in ins.operations if op.startswith("v_")]
        work = sum(not ins.text.startswith(_HINTS) for ins in code)
        loop.dot2_per_512B = sum("dot2" in op for op in valu) / loop.lane_loads
        loop.valu_per_512B = len(valu) / loop.lane_loads
        loop.instructions_per_512B = work / loop.lane_loads
    return loop


def parse_mca(text: str) -> list[float]:
    """Return the block reciprocal throughput, in cycles, of each llvm-mca region."""
    return [float(x) for x in re.findall(r"^Block RThroughput:\s*([\d.]+)", text, re.M)]
