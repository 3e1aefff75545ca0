# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Reports on compiled GPU kernels, without a GPU.

``python benchmarks/isa_report.py [--arch gfx1151 ...] [--json F] [SOURCE ...]``

Compiles kernel sources (without SOURCE all of csrc/rocm that AMD supports) to assembly
for each architecture. Prints the registers, LDS, scratch and occupancy of each kernel,
and what its main loops do.

amdgpu_assembly.py defines weight loads, main loops, round trips and weight bytes in
flight.

Exit status 0: no faults. 1: a kernel uses scratch; a main loop has no weight load, one
narrower than 16 bytes, or one without the hint; a wait separates the weight loads of an
iteration; or a kernel for one token (name ending in _t1) has fewer than 2048 weight
bytes in flight. The report names each kernel and the reason. 2: a tool is missing (the
message names Debian's package) or the compiler failed.

Columns:
  vgpr, sgpr  registers per lane and per wave
  lds         static bytes per block; dynamic LDS is extra
  scratch     bytes per lane
  occ         waves per SIMD that fit registers and static LDS, at most 16
  trips       dependent memory round trips before the first weight load: fewest-most
              over the paths to it
  weight      weight loads per iteration of the main loop, count x bytes per lane
  flight      weight bytes that a wave requests before its first wait after a load
  dot2, valu, instr
              v_dot2, all VALU operations (both halves of a dual instruction count) and
              all instructions except waits and hints, per 512 weight bytes
  mca         SIMD cycles for 512 weight bytes (a 16-byte load of 32 lanes) if other
              waves hide all latency: llvm-mca's block reciprocal throughput
  budget      mca as a share of the SIMD cycles that memory needs to deliver them
"""

import argparse
import concurrent.futures
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from amdgpu_assembly import (
    SIMDS_PER_CU,
    VGPR_FILE,
    Loop,
    analyse,
    occupancy,
    parse_assembly,
    parse_mca,
)

ROOT = Path(__file__).resolve().parent.parent
SOURCE_DIR = ROOT / "csrc" / "rocm"

# The budget is for gfx1151 (Strix Halo, Radeon 8060S): 40 CUs at 2.9 GHz (AMD's product
# page), and 212 GB/s, which copy tools measure of its 256 GB/s (8000 MT/s, 32 bytes
# wide).
CUS, CLOCK_HZ, READ_BYTES_PER_S = 40, 2.9e9, 212e9
WAVE_LOAD_BYTES = 512  # 32 lanes x 16 bytes
# Required bytes in flight of a kernel for one token: two blocks, two row sets.
LEAST_IN_FLIGHT = 2048
WITHOUT_WEIGHTS = ("rescore_largest_",)  # name prefixes


def budget_cycles() -> float:
    """SIMD cycles of a CU in which memory delivers 512 weight bytes to it: about 560.

    212 GB/s over 40 CUs at 2.9 GHz is 1.83 bytes per CU and clock; 2 SIMDs share them.
    """
    return SIMDS_PER_CU * WAVE_LOAD_BYTES / (READ_BYTES_PER_S / CUS / CLOCK_HZ)


class ToolError(Exception):
    """A tool is missing or failed; the message says which, and what to do."""


def kernel_sources() -> list[Path]:
    """The sources that are compiled for AMD: the grouped kernels are not."""
    sources = sorted(SOURCE_DIR.glob("*.hip"))
    return [source for source in sources if "_grouped_" not in source.name]


def find_tool(names: Sequence[str], package: str) -> str:
    """Return the first of `names` on PATH or in ROCm's folders. Raises ToolError."""
    rocm = os.environ.get("ROCM_PATH", "/opt/rocm")
    path = [os.environ.get("PATH", ""), f"{rocm}/bin", f"{rocm}/llvm/bin"]
    for name in names:
        if found := shutil.which(name, path=os.pathsep.join(path)):
            return found
    raise ToolError(
        f"found none of {', '.join(names)}; Debian has it in package {package}"
    )


def _run(command: Sequence[str], text: str = "") -> str:
    run = subprocess.run(
        command, input=text, capture_output=True, text=True, check=False
    )
    if run.returncode:
        raise ToolError(f"{' '.join(command)} failed:\n{run.stderr.strip()[:4000]}")
    return run.stdout


def compile_to_assembly(compiler: str, source: Path, arch: str) -> str:
    """Compile a kernel source for `arch`; return the assembly. Raises ToolError."""
    command = [compiler, "-x", "hip", f"--offload-arch={arch}", "--offload-device-only"]
    command += ["-O3", "-std=c++17", "-S", f"-I{ROOT / 'csrc'}", f"-I{SOURCE_DIR}"]
    if Path(compiler).name.startswith("clang"):  # plain clang, without ROCm
        command += ["-nogpulib", "-nogpuinc", "--no-gpu-bundle-output"]
    return _run([*command, str(source), "-o", "-"])


def estimate_cycles(mca: str, arch: str, loops: Sequence[Loop]) -> None:
    """Set mca_cycles_per_512B of the loops with weight loads. Raises ToolError."""
    loops = [loop for loop in loops if loop.weight_loads]
    if not loops:
        return
    regions = (
        f"# LLVM-MCA-BEGIN loop{i}\n{loop.code}\n# LLVM-MCA-END loop{i}\n"
        for i, loop in enumerate(loops)
    )
    command = [mca, "-mtriple=amdgcn", f"-mcpu={arch}", "-iterations=1"]
    command += ["-instruction-info=0", "-resource-pressure=0"]
    cycles = parse_mca(_run(command, "".join(regions)))
    for loop, value in zip(loops, cycles, strict=True):
        loop.mca_cycles_per_512B = value / loop.lane_loads


def report(arch: str, source: Path, compiler: str, mca: str) -> list[dict]:
    """Return a row per kernel of `source`, ready for JSON except for "loops"."""
    kernels = parse_assembly(compile_to_assembly(compiler, source, arch))
    loops = [[analyse(code) for code in kernel.main_loops()] for kernel in kernels]
    estimate_cycles(mca, arch, [loop for group in loops for loop in group])
    rows = []
    for kernel, group in zip(kernels, loops, strict=True):
        row = {
            key: getattr(kernel, key)
            for key in ("name", "vgpr", "sgpr", "lds", "scratch")
        }
        row["occupancy"] = occupancy(arch, kernel.vgpr, kernel.lds, kernel.block_size)
        sizes = [size for loop in group for size in loop.weight_loads]
        row["weight_load_bytes"] = min(sizes, default=None)  # the narrowest
        cycles = [x for loop in group if (x := loop.mca_cycles_per_512B) is not None]
        row["mca_cycles_per_512B"] = max(cycles, default=None)  # the slowest main loop
        flight = min(loop.weight_bytes_in_flight for loop in group)
        row["weight_bytes_in_flight"] = flight
        trips = kernel.round_trips()
        row["round_trips"], row["round_trips_at_most"] = trips or (None, None)
        for key in ("valu_per_512B", "instructions_per_512B"):
            counts = [x for loop in group if (x := getattr(loop, key)) is not None]
            row[key] = max(counts, default=None)
        # of the routed experts' loops: a shared expert's activations bypass LDS
        through_lds = [loop for loop in group if loop.uses_lds] or group
        counts = [x for loop in through_lds if (x := loop.valu_per_512B) is not None]
        row["valu_per_512B_through_lds"] = max(counts, default=None)
        faults = (
            [f"{kernel.scratch} bytes of scratch per lane"] if kernel.scratch else []
        )
        if kernel.name.endswith("_t1") and flight < LEAST_IN_FLIGHT:
            faults.append(
                f"{flight} weight bytes in flight, expected at least {LEAST_IN_FLIGHT}"
            )
        if not kernel.name.startswith(WITHOUT_WEIGHTS):
            faults += sorted({x for loop in group for x in loop.faults()})
        row["faults"] = faults
        row["loops"] = group
        rows.append(row)
    return rows


# ---------------------------------------------------------------- output


def table(arch: str, rows: Sequence[dict]) -> str:
    """Return one architecture's rows as text: a line per kernel and extra main loop."""
    width = max([len(row["name"]) for row in rows], default=6)
    columns = (
        "vgpr sgpr   lds scratch occ trips   weight flight   dot2   valu  instr    mca "
        "budget"
    )
    lines = [
        f"{arch}: VGPR file {VGPR_FILE[arch][0]} in steps of {VGPR_FILE[arch][1]}",
        f"{'kernel':{width}} {columns}",
    ]
    for row in rows:
        trips = (
            "-"
            if row["round_trips"] is None
            else f"{row['round_trips']}-{row['round_trips_at_most']}"
        )
        head = (
            f"{row['name']:{width}} {row['vgpr']:4} {row['sgpr']:4} {row['lds']:5} "
            f"{row['scratch']:7} {row['occupancy']:3} {trips:>5}"
        )
        for loop in row["loops"]:
            weight = "+".join(f"{n}x{size}" for size, n in loop.weight_loads.items())
            numbers = "      -" * 5
            if loop.mca_cycles_per_512B is not None:
                numbers = (
                    f"{loop.dot2_per_512B:6.1f} {loop.valu_per_512B:6.1f} "
                    f"{loop.instructions_per_512B:6.1f} "
                    f"{loop.mca_cycles_per_512B:6.1f} "
                    f"{loop.mca_cycles_per_512B / budget_cycles():6.0%}"
                )
            flight = loop.weight_bytes_in_flight
            lines.append(f"{head} {weight or '-':>8} {flight:6} {numbers}")
            head = " " * len(head)
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line of the module docstring; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="*", type=Path, metavar="SOURCE")
    parser.add_argument("--arch", nargs="+", choices=sorted(VGPR_FILE), metavar="GFX")
    parser.add_argument("--json", type=Path, metavar="F", help="also write F")
    args = parser.parse_args(argv)
    archs = args.arch or sorted(VGPR_FILE)
    sources = args.sources or kernel_sources()
    try:
        tools = (
            find_tool(["hipcc", "amdclang++", "clang++-22"], "clang-22"),
            find_tool(["llvm-mca-22", "llvm-mca"], "llvm-22"),
        )
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = {
                arch: [pool.submit(report, arch, source, *tools) for source in sources]
                for arch in archs
            }
            by_arch = {
                arch: [row for job in parts for row in job.result()]
                for arch, parts in jobs.items()
            }
    except ToolError as error:
        print(f"isa_report: {error}", file=sys.stderr)
        return 2
    print("\n\n".join(table(arch, rows) for arch, rows in by_arch.items()))
    print(
        f"\nbudget: {budget_cycles():.0f} SIMD cycles per 512 weight bytes, gfx1151's"
    )
    faults = [
        f"{arch} {row['name']}: {fault}"
        for arch, rows in by_arch.items()
        for row in rows
        for fault in row["faults"]
    ]
    print(f"{sum(map(len, by_arch.values()))} kernels, {len(faults)} fault(s)")
    print("".join(f"{fault}\n" for fault in faults), end="")
    if args.json:
        for row in (row for rows in by_arch.values() for row in rows):
            row["loops"] = [dataclasses.asdict(loop) for loop in row["loops"]]
            for loop in row["loops"]:
                del loop["code"]
        document = {
            "archs": {arch: {"kernels": rows} for arch, rows in by_arch.items()}
        }
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
