# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""What the host does in a prefill call: launches, and nothing that waits for the GPU.

Triton compiles the kernels and launches nothing (``benchmarks/prefill_host.py``). The
last test: which compiled variant a launch takes that does not ask Triton.
"""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/prefill_host.py"
SIZES = (4, 2, 256, 128, 128)
ALIGN = "moe_align_block_size"


class Operators(TorchDispatchMode):
    """Records the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def host():
    driver = pytest.importorskip("triton.runtime.driver").driver
    spec = importlib.util.spec_from_file_location("prefill_host", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_active", None)
        yield module


TRITON = "moe_int4_prefill_{}".format
TILED = "fused_moe_wvSplitK_int4_tiled_{}".format


@pytest.mark.parametrize(
    ("arch", "kernels"),
    [
        ("gfx1151", [TRITON("gate_up"), TRITON("down"), TRITON("sum")]),
        ("sm_90", [TILED("gate_up"), TILED("down"), TRITON("sum")]),
        pytest.param(
            "sm_80",
            [TRITON(name) for name in ("to_planes", "gate_up", "down", "sum")],
            marks=pytest.mark.nightly,  # compiles for ten seconds
        ),
    ],
)
def test_a_call_launches_no_more_than_marlin_and_never_waits(host, arch, kernels):
    from triton.runtime.driver import driver

    device = host.NoLaunches(arch)
    driver.set_active(device)
    with host.no_ops(device.launches):
        marlin = host.marlin_call(device.launches, 64, SIZES)
        marlin()
        of_marlin = device.launches.total()
        device.launches.clear()
        for tokens in (33, 64):  # a size of its own captures like any other
            hybrid = host.hybrid_call(arch, tokens, SIZES)
            with Operators() as operators:
                hybrid()
            assert device.launches == dict.fromkeys([ALIGN, *kernels], 1)
            assert device.launches.total() <= of_marlin
            device.launches.clear()
            # Allocations and views: nothing copies or reads a value on the host.
            allowed = {
                "aten::empty.memory_format",
                "aten::new_empty",
                "aten::as_strided",
            }
            assert operators.names <= allowed


@pytest.fixture
def launched(host, monkeypatch):
    """Types and attributes of the arguments of each launched variant."""
    from triton.runtime.driver import driver

    found: list[str] = []

    def launcher(source, metadata):
        variant = str((source.signature, source.attrs))
        return lambda *_: found.append(variant)

    device = host.NoLaunches("gfx1151")
    monkeypatch.setattr(device, "launcher_cls", launcher)
    driver.set_active(device)
    return found


@pytest.fixture
def asked(monkeypatch):
    """asked(kernel): a list that grows when Triton chooses the kernel's variant."""
    from vllm.model_executor.layers.fused_moe.experts import hybrid_w4a16_triton

    def asked(name):
        kernel = getattr(hybrid_w4a16_triton, f"moe_int4_prefill_{name}")
        run, calls = kernel.run, []

        def counting(*args, **options):
            calls.append(args)
            return run(*args, **options)

        monkeypatch.setattr(kernel, "run", counting)
        return calls

    return asked


def test_linears_of_one_layout_share_a_variant_and_others_do_not(launched, asked):
    """Dense linears have no launches of their own per layer."""
    from vllm.model_executor.layers.fused_moe.experts.hybrid_w4a16_triton import dense
    from vllm.model_executor.layers.fused_moe.hybrid_w4a16_tuning import Tile

    asked = asked("down")

    def linear(n, k, offset=0, zeros=None, rows=40):
        words = torch.zeros(n * k // 8 + offset, dtype=torch.int32)[offset:].view(n, -1)
        scales = torch.zeros(n, k // 128, dtype=torch.bfloat16)
        return torch.zeros(rows, k).bfloat16(), words, scales, zeros, 128

    calls = {
        "usual": linear(256, 256),
        "more rows": linear(256, 256, rows=72),
        "weights not aligned": linear(256, 256, offset=1),
        "outputs not a multiple of 16": linear(264, 256),
        "zero points": linear(256, 256, zeros=torch.zeros(32, 2, dtype=torch.int32)),
    }
    tile = Tile(16, 64, 2, 1, "natural")
    for arguments in calls.values():
        dense(*arguments, tile)
    of_triton, expected = len(asked), dict(zip(calls, launched, strict=True))
    assert of_triton == len(calls) - 1  # the second call has the variant of the first
    assert expected["more rows"] == expected["usual"]
    assert len(set(expected.values())) == len(calls) - 1
    launched.clear()
    for name in [*calls, *reversed(calls)]:
        dense(*calls[name], tile)
        assert launched.pop() == expected[name], name
    assert len(asked) - of_triton == 2, "only the weights that are not aligned"


def test_another_variant_is_never_reused(launched, asked):
    """Pointers, strides, dtypes and large storages for which Triton has another one."""
    from triton import knobs

    from vllm.model_executor.layers.fused_moe.experts.hybrid_w4a16_triton import (
        sum_pairs,
    )

    asked = asked("sum")
    tokens, top_k, hidden = 4, 2, 256
    ids = torch.zeros(tokens, top_k, dtype=torch.int32)
    memory = torch.empty(2**30 + 8, dtype=torch.bfloat16)  # 2 GiB, never touched

    def rows(count, storage=None, offset=0, stride=hidden, dtype=torch.bfloat16):
        if storage is None:
            storage = torch.empty(count * stride + offset, dtype=dtype)
        return storage.as_strided((count, hidden), (stride, 1), offset)

    pairs, out = rows(tokens * top_k), rows(tokens)
    calls = {
        "usual": (pairs, out, ids),
        "pairs not aligned": (rows(tokens * top_k, offset=1), out, ids),
        "output not aligned": (pairs, rows(tokens, offset=4), ids),
        "2 GiB": (rows(tokens * top_k, memory), out, ids),
        "odd stride": (pairs, rows(tokens, stride=hidden + 1), ids),
        "fp16": (pairs.half(), out.half(), ids),
        "int64": (pairs, out, ids.long()),
    }
    for tensors in calls.values():
        sum_pairs(*tensors, None, 8)
    of_triton, expected = len(asked), dict(zip(calls, launched, strict=True))
    assert of_triton == len(calls)
    assert len(set(expected.values())) == len(calls), (
        "Triton no longer tells these apart"
    )
    launched.clear()
    for name in [*calls, *reversed(calls)]:
        sum_pairs(*calls[name], None, 8)
        assert launched.pop() == expected[name], name
    by_triton = [name for name in calls if "aligned" in name or "GiB" in name]
    assert len(asked) - of_triton == 2 * len(by_triton)

    seen = []
    knobs.runtime.launch_enter_hook.add(seen.append)
    try:
        sum_pairs(*calls["usual"], None, 8)
    finally:
        knobs.runtime.launch_enter_hook.remove(seen.append)
    assert len(asked) - of_triton == 2 * len(by_triton) + 1
