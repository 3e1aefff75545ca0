# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""AMDGPU assembler text as clang prints it: kernels, their resources, their main loops.

Pure functions from text to numbers; isa_report.py runs the tools and prints.

A weight load is a vector memory load with the non-temporal hint (gfx11: ``slc`` or
``nt``; gfx12: ``th:TH_LOAD_NT...``): kernels give it to weights and to nothing else. A
main loop is an innermost loop with weight loads; a kernel has one per compiled number
of activation rows, or none when it is fully unrolled: then its whole body counts. Plain
loads of 16 bytes in a main loop are activations on their way to LDS, so the loop stores
at least as many 16-byte pieces there; plain loads in excess are taken for weight loads
that lost the hint.
"""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

# VGPRs of a SIMD per wave32 lane, and the step in which a wave gets them: LLVM's AMDGPU
# backend (feature 1_5xVGPRs: 1536 in steps of 24, else 1024 in steps of 16) and AMD's
# RDNA3 and RDNA4 instruction set guides.
ARCHS = Path(__file__).resolve().parents[1] / "csrc" / "rocm" / "amd_archs.json"
VGPR_FILE = {
    arch: (facts["vgprs"], facts["vgpr_step"])
    for arch, facts in json.loads(ARCHS.read_text()).items()
}
MAX_WAVES_PER_SIMD = 16  # RDNA2 and later
SIMDS_PER_CU = 2
LDS_BYTES_PER_WGP = 128 * 1024  # for two CUs; RDNA3 and RDNA4

LANE_LOAD_BYTES = 16  # 32 weights


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of machine code without its comment."""

    text: str

    @property
    def operations(self) -> list[str]:
        """Mnemonics, two for a dual instruction (``v_dual_a ... :: v_dual_b ...``)."""
        return [half.split()[0] for half in self.text.split("::")]

    @property
    def load_bytes(self) -> int:
        """Bytes per lane of a vector memory load, 0 for everything else."""
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
        hint = re.search(r"\b(slc|nt)\b|th:TH_LOAD_NT", self.text)
        return self.load_bytes > 0 and hint is not None


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel as assembled: resources from the metadata, code in layout order."""

    name: str
    vgpr: int
    sgpr: int
    lds: int
    scratch: int
    block_size: int
    code: tuple[Instruction, ...]
    labels: dict[str, int]  # label -> index into code

    def main_loops(self) -> list[tuple[Instruction, ...]]:
        """The innermost loops with weight loads; the whole body where there is none.

        A loop is its instructions in layout order, both sides of every branch in it.
        """
        blocks, successors = self._blocks()
        heavy = [any(ins.is_weight_load for ins in self.code[b]) for b in blocks]

        def innermost(nodes: set[int]) -> Iterator[set[int]]:
            for cycle in _cycles(nodes, successors):
                if not any(heavy[i] for i in cycle):
                    continue
                outside = set(range(len(blocks))) - cycle
                entries = {j for i in outside for j in successors[i] & cycle}
                inner = list(innermost(cycle - {min(entries or cycle)}))
                yield from inner or [cycle]

        loops = [
            tuple(ins for i in sorted(loop) for ins in self.code[blocks[i]])
            for loop in innermost(set(range(len(blocks))))
        ]
        return loops or [self.code]

    def _blocks(self) -> tuple[list[slice], list[set[int]]]:
        """Basic blocks in layout order and, for each, the blocks that may follow it."""
        jumps = {
            i: ins.text
            for i, ins in enumerate(self.code)
            if ins.text.startswith(("s_branch", "s_cbranch", "s_endpgm", "s_setpc"))
        }
        starts = sorted({0, *self.labels.values(), *(i + 1 for i in jumps)})
        starts = [i for i in starts if i < len(self.code)]
        ends = [*starts[1:], len(self.code)]
        number = {start: i for i, start in enumerate(starts)}
        blocks = [slice(a, b) for a, b in zip(starts, ends, strict=True)]
        successors: list[set[int]] = []
        for i, block in enumerate(blocks):
            jump = jumps.get(block.stop - 1, "")
            falls = not jump or jump.startswith("s_cbranch")
            after = {i + 1} if falls and i + 1 < len(blocks) else set()
            target = self.labels.get(jump.split()[-1]) if jump else None
            successors.append(after | {number[target]} if target in number else after)
        return blocks, successors


def _cycles(nodes: set[int], successors: list[set[int]]) -> Iterator[set[int]]:
    """Strongly connected components of `nodes` that contain an edge."""
    reach = {i: sum(1 << j for j in successors[i] & nodes) for i in nodes}
    for k in nodes:
        for i in nodes:
            if reach[i] >> k & 1:
                reach[i] |= reach[k]
    left = set(nodes)
    for i in sorted(nodes):
        if i in left and reach[i] >> i & 1:
            cycle = {j for j in left if reach[i] >> j & 1 and reach[j] >> i & 1}
            left -= cycle
            yield cycle


def parse_assembly(text: str) -> list[Kernel]:
    """Reads clang's AMDGPU assembler output; returns its kernels in metadata order.

    Raises ValueError when a kernel that the metadata names has no code.
    """
    bodies = dict(_functions(text))
    found = re.search(r"^amdhsa\.kernels:\s*\n(.*?)^amdhsa\.target", text, re.M | re.S)
    kernels = []
    for entry in re.split(r"(?m)^  - (?=\.)", found.group(1) if found else "")[1:]:
        field = dict(re.findall(r"(?m)^(?:    )?\.(\w+): +(\S+)$", entry))
        name = field["name"].strip("'\"")
        if name not in bodies:
            raise ValueError(f"kernel {name!r} has metadata but no code")
        code, labels = bodies[name]
        spills = any(ins.text.startswith("scratch_") for ins in code)
        kernels.append(
            Kernel(
                name=name,
                vgpr=int(field["vgpr_count"]),
                sgpr=int(field["sgpr_count"]),
                lds=int(field["group_segment_fixed_size"]),
                scratch=max(int(field["private_segment_fixed_size"]), 4 * spills),
                block_size=int(field["max_flat_workgroup_size"]),
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
    """Waves per SIMD that fit, at most 16.

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
    """One turn of a main loop; see the module's docstring for the numbers."""

    weight_loads: dict[int, int]  # bytes per lane -> count
    plain_wide_loads: int  # 16 bytes and no hint
    wide_lds_stores: int
    dot2_per_32: float | None
    valu_per_32: float | None
    code: str
    mca_cycles_per_512B: float | None = None

    @property
    def lane_loads(self) -> float:
        """Weight bytes per lane in units of 16, which is 512 bytes per wave."""
        return sum(n * size for size, n in self.weight_loads.items()) / LANE_LOAD_BYTES

    def faults(self) -> list[str]:
        """Why this loop must not ship; empty when it may."""
        found = (
            []
            if self.weight_loads
            else ["no non-temporal weight load in the main loop"]
        )
        for size, n in self.weight_loads.items():
            if size < LANE_LOAD_BYTES:
                found.append(f"weight loads of {size} bytes in the main loop ({n})")
        if self.plain_wide_loads > self.wide_lds_stores:
            excess = self.plain_wide_loads - self.wide_lds_stores
            found.append(
                f"weight loads that are not non-temporal in the main loop ({excess})"
            )
        return found


def analyse(code: Sequence[Instruction]) -> Loop:
    """Counts what a main loop does in one turn, every instruction once."""
    loads = Counter(ins.load_bytes for ins in code if ins.is_weight_load)
    plain = [ins for ins in code if ins.load_bytes >= 16 and not ins.is_weight_load]
    stores = sum(
        ins.text.startswith(("ds_store_b128", "ds_write_b128")) for ins in code
    )
    valu = [op for ins in code for op in ins.operations if op.startswith("v_")]
    dot2 = sum("dot2" in op for op in valu)
    text = "\n".join(ins.text for ins in code)
    loop = Loop(dict(sorted(loads.items())), len(plain), stores, None, None, text)
    if loads:
        loop.dot2_per_32 = dot2 / loop.lane_loads
        loop.valu_per_32 = (len(valu) - dot2) / loop.lane_loads
    return loop


def parse_mca(text: str) -> list[float]:
    """Block reciprocal throughputs, in cycles, of the regions of an llvm-mca report."""
    return [float(x) for x in re.findall(r"^Block RThroughput:\s*([\d.]+)", text, re.M)]
