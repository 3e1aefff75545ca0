#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Compiles the Triton prefill kernels without a GPU and reports their resources.

For every architecture it compiles the tiles of the tuning table in a few variants
(dtype, group size, zero points). Exit status 1: a kernel spills registers, uses scratch
memory, or uses more than 64 KiB of shared memory on AMD.
"""

import argparse
import concurrent.futures
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any

# By default it checks one AMD architecture of each generation.
ARCHS = "gfx1151,gfx1100,gfx1201"
# dtype, group size, zero points: the common case, and the one that needs most registers
VARIANTS = [("bf16", 128, False), ("bf16", 32, True)]
ALL_VARIANTS = list(itertools.product(("bf16", "fp16"), (32, 64, 128), (False, True)))
# LDS bytes per workgroup on RDNA.
LDS_LIMIT = 65536


def gpu_target(arch: str) -> Any:
    """Return Triton's compilation target for ``sm_NN`` or an AMD architecture."""
    from triton.backends.compiler import GPUTarget

    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch[3:]), 32)
    return GPUTarget("hip", arch, 32)


def compile_kernel(
    arch: str, name: str, tile: tuple[int, ...], dtype: str, group: int, zeros: bool
) -> dict[str, Any]:
    """Compile one kernel; return its row of the report."""
    import triton
    from triton.compiler import ASTSource

    from vllm.model_executor.layers.fused_moe.experts import hybrid_w4a16_triton

    of_experts = "down" if name == "dense" else name  # a dense linear is one expert
    kernel = getattr(hybrid_w4a16_triton, f"moe_int4_prefill_{of_experts}")
    block_m, block_n, warps, stages = tile
    constants = {
        "GROUP": group,
        "HAS_ZEROS": bool(zeros),
        "HAS_WEIGHTS": name != "dense",
        "SORTED": name != "dense",
        "EVEN_K": True,
        "ACTIVATION": 0,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
    }
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
    # Specialize like a launch: these are multiples of a real layer's sizes.
    multiples = [
        (i,)
        for i, argument in enumerate(kernel.arg_names)
        if argument.endswith("_ptr")
        or argument in ("I", "H")
        or argument[:7] == "stride_"
        if argument not in ("stride_zn", "stride_sn", "stride_ze")
    ]
    source = ASTSource(
        kernel,
        signature,
        constexprs={n: v for n, v in constants.items() if n in kernel.arg_names},
        attrs={place: [["tt.divisibility", 16]] for place in multiples},
    )
    options = {"num_warps": warps, "num_stages": stages}
    compiled = triton.compile(source, target=gpu_target(arch), options=options)
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
    }


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
            (name, (row["block_m"], *row["down" if name == "dense" else name]))
            for row in rows
            for name in ("gate_up", "down", *(["dense"] if args.all else []))
        }
        for name, tile in sorted(tiles):
            for variant in ALL_VARIANTS if args.all else VARIANTS:
                jobs.append((arch, name, tile, *variant))

    columns = "{:8} {:8} {:>20} {:>6} {:>5} {!s:>5} {:>5} {:>6} {:>6}"
    names = (
        "block_m n warps stages",
        "dtype",
        "group",
        "zeros",
        "regs",
        "spills",
        "shared",
    )
    print(columns.format("arch", "kernel", *names))
    results = []
    workers = len(os.sched_getaffinity(0))
    with concurrent.futures.ProcessPoolExecutor(workers) as pool:
        for row in pool.map(compile_kernel, *zip(*jobs, strict=True)):
            results.append(row)
            arch, kernel, tile, *rest = row.values()
            sizes = " ".join(f"{size:>4}" for size in tile)
            print(columns.format(arch, kernel, sizes, *rest), flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    bad = [
        row
        for row in results
        if row["spilled_bytes"] > 0
        or (row["shared_bytes"] > LDS_LIMIT and row["arch"].startswith("gfx"))
    ]
    print(f"{len(results)} kernels, {len(bad)} of them spill or exceed shared memory")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
