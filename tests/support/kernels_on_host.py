# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Runs the GPU kernels on the host (csrc/rocm/host): data, the runner, checks.

Buffers have exactly the needed size, gaps between rows and outputs are poisoned, and
pointers are only as aligned as the ops require. Inputs are new in every run. A failure
prints the seed that reproduces them (environment variable HYBRID_W4A16_TEST_SEED).
"""

import concurrent.futures
import dataclasses
import os
import platform
import re
import secrets
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BUILD = Path(__file__).resolve().parents[2] / "csrc" / "rocm" / "host" / "build.py"

SEED = int(os.environ.get("HYBRID_W4A16_TEST_SEED", secrets.randbits(32)))

HALF, BF16 = 0, 1  # moe_int4::DType
TOLERANCE = {HALF: 2e-3, BF16: 8e-3}  # relative, Frobenius
NIBBLE_SHIFTS = np.array([0, 16, 4, 20, 8, 24, 12, 28], dtype=np.uint32)


def to_bits(x, dtype):
    """Round to fp16 or bf16; return the bits as uint16."""
    if dtype == HALF:
        return x.astype(np.float16).view(np.uint16)
    bits = np.asarray(x, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bits(bits, dtype):
    """Convert fp16 or bf16 bits to float64."""
    if dtype == HALF:
        return bits.view(np.float16).astype(np.float64)
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def spread(array, strides):
    """Put the array's elements at `strides` (innermost 1) in an exactly sized buffer.

    All bits of the gaps are ones: NaN as a 16-bit or 32-bit float.
    """
    strides = (*strides, 1)
    extents = ((n - 1) * s for n, s in zip(array.shape, strides, strict=True))
    flat = np.full(sum(extents) + 1, np.iinfo(np.uint64).max).astype(array.dtype)
    if array.dtype.kind == "f":
        flat[:] = np.nan
    view = np.lib.stride_tricks.as_strided(
        flat, array.shape, [s * array.itemsize for s in strides]
    )
    view[...] = array
    return flat.tobytes()


@dataclasses.dataclass
class Case:
    """One op call: the runner's fields and the expected output."""

    fields: dict
    expected: np.ndarray  # float64 [rows, columns]
    written: np.ndarray  # bool [rows]
    c_before: np.ndarray  # uint16, the whole output buffer
    c_stride: int
    dtype: int
    label: str
    shared: "Case | None" = None  # of output shared_c
    factors: np.ndarray | None = None  # expected shared_factors, float64 [tokens]

    def check_reply(self, reply):
        """Assert that all outputs in a reply of the runner are right."""
        self.check(reply["c"])
        if self.shared is not None:
            self.shared.check(reply["shared_c"])
        if self.factors is not None and self.shared.fields["op"] == b"gate_up":
            got = np.frombuffer(reply["shared_factors"], dtype=np.float32)
            assert np.allclose(got, self.factors, rtol=1e-4, atol=1e-6), self.label

    def check(self, c):
        """Assert that `c`, the bytes of the output buffer, is right, gaps included."""
        c = np.frombuffer(c, dtype=np.uint16)
        untouched = np.ones(c.size, dtype=bool)
        rows, columns = self.expected.shape
        got = np.empty((rows, columns))
        for row in range(rows):
            span = slice(row * self.c_stride, row * self.c_stride + columns)
            got[row] = from_bits(c[span], self.dtype)
            untouched[span] = not self.written[row]
        changed = np.flatnonzero(untouched & (c != self.c_before))
        assert changed.size == 0, (
            f"{self.label}: wrote elements {changed[:8]} of c's gaps"
        )
        want, got = self.expected[self.written], got[self.written]
        error = np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30)
        assert error < TOLERANCE[self.dtype], (
            f"{self.label}: relative error {error:.2e}"
        )


def record(fields):
    """Encode fields for the runner: int64, double, and bytes unchanged."""
    parts = [struct.pack("<I", len(fields))]
    for name, value in fields.items():
        if isinstance(value, float):
            value = struct.pack("<d", value)
        elif not isinstance(value, bytes):
            value = struct.pack("<q", int(value))
        parts.append(struct.pack("<I", len(name)) + name.encode())
        parts.append(struct.pack("<Q", len(value)) + value)
    return b"".join(parts)


def read_records(data):
    at = 0

    def take(count):
        nonlocal at
        at += count
        return data[at - count : at]

    while at < len(data):
        fields = {}
        for _ in range(struct.unpack("<I", take(4))[0]):
            name = take(struct.unpack("<I", take(4))[0]).decode()
            fields[name] = take(struct.unpack("<Q", take(8))[0])
        yield fields


@dataclasses.dataclass
class Outcome:
    cases: list
    replies: list
    returncode: int
    stderr: str


def run(program, cases, env=None):
    """Run the calls of `cases` in one process; return its outcome."""
    calls = b"".join(record(case.fields) for case in cases)
    done = subprocess.run(
        [program],
        input=calls,
        capture_output=True,
        check=False,
        env=os.environ | (env or {}),
    )
    stderr = done.stderr.decode(errors="replace")
    return Outcome(cases, list(read_records(done.stdout)), done.returncode, stderr)


def run_all(jobs):
    """Run `jobs`, {key: (program, cases)}, on all cores; return their outcomes."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        found = {key: pool.submit(run, *job) for key, job in jobs.items()}
        return {key: job.result() for key, job in found.items()}


def check(outcome):
    """Assert that every call of `outcome` ended with a right result."""
    if outcome.returncode != 0:
        stopped_at = outcome.cases[len(outcome.replies)].label
        pytest.fail(f"{stopped_at}\n{outcome.stderr[:4000]}", pytrace=False)
    assert len(outcome.replies) == len(outcome.cases) > 0
    for case, reply in zip(outcome.cases, outcome.replies, strict=True):
        assert reply["kernels"], case.label
        case.check_reply(reply)


def build_programs():
    """Return the paths of the host program without and with matrix instructions."""
    if platform.machine() != "x86_64":
        pytest.skip("the host run switches fibers in x86-64 assembler")
    found = {}
    for mma in (False, True):
        command = [sys.executable, BUILD, *(["--mma"] if mma else [])]
        build = subprocess.run(command, capture_output=True, text=True, check=False)
        assert build.returncode == 0, build.stderr
        found[mma] = build.stdout.strip()
    return found


def check_every_kernel_ran(program, prefix, outcomes):
    """Assert that `outcomes` include all kernels of `program` with the prefix."""
    symbols = subprocess.run(
        ["objdump", "-t", program], capture_output=True, text=True, check=True
    ).stdout
    pattern = rf"\bF gpu_kernels\s+\w+\s+({prefix}\w+)$"
    kernels = set(re.findall(pattern, symbols, re.MULTILINE))
    ran = {
        kernel
        for outcome in outcomes
        for reply in outcome.replies
        for kernel in reply["kernels"].decode().split()
    }
    assert kernels, f"the program has no kernels {prefix}*"
    assert ran == kernels


def name_of(value):
    """Return a combination's part of a test's name."""
    names = {True: "yes", False: "no"}
    return names[value] if isinstance(value, bool) else str(value)
