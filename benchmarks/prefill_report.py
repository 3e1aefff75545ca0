#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Compiles the Triton prefill kernels without a GPU and reports what they execute.

For every architecture it compiles the tiles of the tuning table in a few variants
(dtype, group size, zero points). Exit status 1: a kernel spills registers, uses scratch
memory, or uses more than 64 KiB of shared memory on AMD; or a main loop is over LIMITS.

Columns:
  regs       registers per lane
  spills     bytes per lane of spills and scratch memory
  shared     bytes of shared memory (LDS) per block
On AMD, of the main loop (the innermost loop with matrix instructions):
  wmma       matrix instructions (16 x 16 x 16) per iteration and wave
  valu, lds  VALU operations (both halves of a dual instruction count) and LDS
             instructions per wmma
  barriers   per 128 weights of K
  peak       highest share of the wmma rate: while a wave's wmma runs, the wave issues
             no VALU instruction
"""

import argparse
import concurrent.futures
import dataclasses
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections import Counter
from importlib.metadata import version
from typing import Any

import amdgpu_assembly

# By default it checks one AMD architecture of each generation.
ARCHS = "gfx1151,gfx1100,gfx1201"
# dtype, group size, zero points
VARIANTS = [
    (*variant, zeros)
    for variant in (("bf16", 128), ("fp16", 128))
    for zeros in (False, True)
]
ALL_VARIANTS = list(itertools.product(("bf16", "fp16"), (32, 64, 128), (False, True)))
# LDS bytes per workgroup on RDNA.
LDS_LIMIT = 65536
# Most VALU and LDS per wmma and barriers per 128 weights, for blocks of at least 32
# rows in natural order and groups of 128. Smaller blocks wait for memory, and smaller
# groups scale their sums more often.
LIMITS = {"valu": 16.0, "lds": 2.0, "barriers": 16.0}
# Clocks of a wmma on its SIMD: 8192 operations at 256 per clock and SIMD (RDNA 3), or
# 512 (RDNA 4); AMD's RDNA 3 and RDNA 4 instruction set guides.
WMMA_CLOCKS = {"gfx11": 32, "gfx12": 16}


def gpu_target(arch: str) -> Any:
    """Return Triton's compilation target for ``sm_NN`` or an AMD architecture."""
    from triton.backends.compiler import GPUTarget

    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch[3:]), 32)
    return GPUTarget("hip", arch, 32)


def compile_kernel(
    arch: str, name: str, tile: tuple[Any, ...], dtype: str, group: int, zeros: bool
) -> dict[str, Any]:
    """Compile one kernel; return its row of the report. "dequantize" has no tile."""
    if name == "dequantize":
        compiled, counts = compile_dequantize(arch, dtype, group, zeros), {}
    else:
        compiled = compile_gemm(arch, name, tile, dtype, group, zeros)
        weights = group if tile[-1] == "natural" else 128
        counts = main_loop(arch, compiled, weights)
    registers, spilled = resources(arch, compiled)
    return {
        "arch": arch,
        "kernel": name,
        "tile": list(tile),
        "dtype": dtype,
        "group_size": group,
        "zero_points": bool(zeros),
        "registers": registers,
        "spilled_bytes": spilled,
        "shared_bytes": compiled.metadata.shared,
        **counts,
    }


def compile_gemm(
    arch: str, name: str, tile: tuple[Any, ...], dtype: str, group: int, zeros: bool
) -> Any:
    """Compile gate_up, down, or down of a dense linear."""
    from vllm.model_executor.layers.fused_moe.experts import hybrid_w4a16_triton

    of_experts = "down" if name == "dense" else name  # a dense linear is one expert
    kernel = getattr(hybrid_w4a16_triton, f"moe_int4_prefill_{of_experts}")
    block_m, block_n, warps, stages, order = tile
    natural = order == "natural"
    constants = {
        "GROUP": group,
        "HAS_ZEROS": bool(zeros),
        "HAS_WEIGHTS": name != "dense",
        "SORTED": name != "dense",
        "EVEN_K": True,
        "ACTIVATION": 0,
        "NATURAL": natural,
        "OUT_NATURAL": natural,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
    }
    multiples = {
        argument
        for argument in kernel.arg_names
        if argument.endswith("_ptr")
        or argument in ("I", "H")
        or argument[:7] == "stride_"
        if argument not in ("stride_zn", "stride_sn", "stride_ze")
    }
    options = {"num_warps": warps, "num_stages": stages}
    return compile_source(arch, kernel, constants, dtype, multiples, options)


def compile_dequantize(arch: str, dtype: str, group: int, zeros: bool) -> Any:
    """Compile the kernel that writes a linear's int4 weights in 16 bits."""
    from vllm.model_executor.layers.quantization import hybrid_w4a16_dense_triton

    kernel = hybrid_w4a16_dense_triton.dequantize_int_g
    constants = hybrid_w4a16_dense_triton.constants(4, group, bool(zeros))
    multiples = {name for name in kernel.arg_names if name.endswith("_ptr")}
    multiples |= {"N", "K", "stride_wn"}
    return compile_source(arch, kernel, constants, dtype, multiples, {"num_warps": 4})


def compile_source(
    arch: str,
    kernel: Any,
    constants: dict[str, Any],
    dtype: str,
    multiples: set[str],
    options: dict[str, int],
) -> Any:
    """Compile a kernel as a launch would, with arguments that are multiples of 16."""
    import triton
    from triton.compiler import ASTSource

    floats = {
        "x_ptr": dtype,
        "out_ptr": dtype,
        "scales_ptr": dtype,
        "weights_ptr": "fp32",
    }
    scalars = {"alpha": "fp32", "beta": "fp32", "limit": "fp32"}
    signature = {}
    for argument in kernel.arg_names:
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument.endswith("_ptr"):
            signature[argument] = f"*{floats.get(argument, 'i32')}"
        else:
            signature[argument] = scalars.get(argument, "i32")
    places = [i for i, name in enumerate(kernel.arg_names) if name in multiples]
    source = ASTSource(
        kernel,
        signature,
        constexprs={n: v for n, v in constants.items() if n in kernel.arg_names},
        attrs={(place,): [["tt.divisibility", 16]] for place in places},
    )
    return triton.compile(source, target=gpu_target(arch), options=options)


def main_loop(arch: str, compiled: Any, weights: int) -> dict[str, float]:
    """Count what the main loop executes; ``weights`` of K per iteration.

    Empty on CUDA. Raises ``ValueError`` if there is not one such loop.
    """
    if arch.startswith("sm_"):
        return {}
    (kernel,) = amdgpu_assembly.parse_assembly(compiled.asm["amdgcn"])
    loops = kernel.loops_with(lambda ins: ins.text.startswith("v_wmma"))
    if len(loops) != 1:
        raise ValueError(f"{kernel.name}: expected 1 loop with wmma, got {len(loops)}")
    names = Counter(name for ins in loops[0].code for name in ins.operations)

    def count(prefix: str) -> int:
        return sum(n for name, n in names.items() if name.startswith(prefix))

    wmma = count("v_wmma")
    valu = (count("v_") - wmma) / wmma
    clocks = WMMA_CLOCKS[arch[:5]]
    # gfx12 splits a barrier into a signal and a wait
    barriers = count("s_barrier") - count("s_barrier_wait")
    return {
        "wmma": wmma,
        "valu": round(valu, 1),
        "lds": round(count("ds_") / wmma, 2),
        "barriers": barriers * 128 / weights,
        "peak": round(clocks / (clocks + valu), 2),
    }


def faults(row: dict[str, Any]) -> list[str]:
    """Return why a kernel of the report must not ship; empty if it may."""
    found = []
    if row["spilled_bytes"] > 0:
        found.append(f"spills {row['spilled_bytes']} bytes")
    if row["arch"].startswith("gfx"):
        if row["shared_bytes"] > LDS_LIMIT:
            found.append(f"{row['shared_bytes']} bytes of shared memory")
        block_m, *_, order = row["tile"] or (0, "")
        if order == "natural" and block_m >= 32 and row["group_size"] == 128:
            found += [
                f"{row[name]} {name}, at most {most:g} expected"
                for name, most in LIMITS.items()
                if row[name] > most
            ]
    return found


def resources(arch: str, compiled: Any) -> tuple[int, int]:
    """Return registers per thread, and bytes of spills or scratch memory."""
    if not arch.startswith("sm_"):
        text = compiled.asm["amdgcn"]
        numbers = [
            re.search(rf"^; {key}: (\d+)", text, re.M)
            for key in ("NumVgprs", "ScratchSize")
        ]
        assert None not in numbers, "the assembly has no resource comments"
        return int(numbers[0][1]), int(numbers[1][1])  # type: ignore[index]
    import triton

    tools = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.check_output(
            [tools / "cuobjdump", "-res-usage", file.name], text=True
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return int(found[1]), int(found[2])


def tile_of(row: dict[str, Any], name: str) -> tuple[Any, ...]:
    """Return block_m, block_n, warps, stages and order of a row of the tuning table."""
    from vllm.model_executor.layers.fused_moe.hybrid_w4a16_tuning import Tile

    return dataclasses.astuple(Tile(row["block_m"], *row[name]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", default=ARCHS, help=f"default: {ARCHS}")
    parser.add_argument(
        "--all", action="store_true", help="every dtype, group size and zero points"
    )
    parser.add_argument("--json", type=pathlib.Path, help="write the rows to this file")
    args = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm.model_executor.layers.fused_moe.hybrid_w4a16_tuning import (
        table,
        table_name,
    )

    jobs = []
    for arch in args.arch.split(","):
        rows = table(table_name(arch))["rows"]
        tiles = {
            (name, tile_of(row, "down" if name == "dense" else name))
            for row in rows
            for name in ("gate_up", "down", *(["dense"] if args.all else []))
        }
        tiles.add(("dequantize", ()))
        for name, tile in sorted(tiles):
            for variant in ALL_VARIANTS if args.all else VARIANTS:
                jobs.append((arch, name, tile, *variant))

    columns = "{:8} {:10} {:>27} {:>6} {:>5} {!s:>5} {:>5} {:>6} {:>6}"
    counts = " {:>4} {:>5} {:>5} {:>8} {:>5}"
    names = (
        "block_m n warps stages",
        "dtype",
        "group",
        "zeros",
        "regs",
        "spills",
        "shared",
    )
    print(f"Triton {version('triton')}")
    title = columns.format("arch", "kernel", *names)
    print(title + counts.format("wmma", "valu", "lds", "barriers", "peak"))
    results = []
    workers = len(os.sched_getaffinity(0))
    with concurrent.futures.ProcessPoolExecutor(workers) as pool:
        for row in pool.map(compile_kernel, *zip(*jobs, strict=True)):
            results.append(row)
            arch, kernel, tile, *rest = row.values()
            sizes = " ".join(f"{size:>4}" for size in tile)
            line = columns.format(arch, kernel, sizes, *rest[:6])
            print(line + (counts.format(*rest[6:]) if rest[6:] else ""), flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    bad = [row for row in results if faults(row)]
    for row in bad:
        where = " ".join(str(value) for value in list(row.values())[:6])
        print(f"FAULT {where}: {'; '.join(faults(row))}")
    print(f"{len(results)} kernels, {len(bad)} of them with faults")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
