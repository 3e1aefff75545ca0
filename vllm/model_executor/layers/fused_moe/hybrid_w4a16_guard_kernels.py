# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Compares the kernels on a layer's own weights with plain torch, for the guard."""

import functools
import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import torch

from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_ops as ops
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_reference as reference
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_tuning as tuning
from vllm.model_executor.layers.fused_moe.hybrid_w4a16_guard_sums import some_rows

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.fused_moe.experts.hybrid_w4a16_moe import (
        HybridW4A16MoEExperts,
    )
    from vllm.model_executor.layers.fused_moe.hybrid_w4a16_packing import Int4MoEMethod
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEKernel

logger = init_logger(__name__)

# Allowed error of a row's outputs, relative to their typical size for random
# activations. Correct kernels reach 0.01 (bf16; int8 activations on some CPUs). If one
# scale of 16 is wrong by half, the error is 0.1.
TOLERANCE = 0.04
# A chunk of dequantized weights takes at most this share of an expert's bytes.
_CHUNK_SHARE = 2
_DECODE_TOKENS = (1, 3)
_PREFILL_TOKENS = 24


class _Run(NamedTuple):
    """One call of the kernels on the first ``tokens`` tokens."""

    how: str
    tokens: int
    middle: torch.Tensor
    """[M * top_k, I]: what gate_up wrote."""
    out: torch.Tensor
    """[M, H]"""


class _Comparison(NamedTuple):
    """What kernels wrote for some rows of a matrix, and what plain torch has."""

    got: torch.Tensor
    """fp32 [R, N]: all runs' results for N rows of the matrix."""
    want: torch.Tensor
    """fp32 [R, N]"""
    allowed: torch.Tensor
    """fp32 [1, N] or [runs, N]: the size of an error of 1."""
    counts: list[int]
    """How many of the R rows each run has, in order."""
    tokens: torch.Tensor
    """int64 [R], on the CPU: the token of each row."""


class KernelCheck:
    """Runs the kernels on a few tokens that all pick the same two experts."""

    def __init__(
        self,
        method: "Int4MoEMethod",
        layer: "RoutedExperts",
        kernel: "FusedMoEKernel",
        expert: int,
    ) -> None:
        packing = method.packing
        self.layer = layer
        self.kernel = cast("HybridW4A16MoEExperts", kernel.fused_experts)
        self.w13, self.w2 = (
            (
                getattr(layer, f"{name}_{packing.qweight}"),
                getattr(layer, f"{name}_{packing.scales}"),
                getattr(layer, f"{name}_{packing.zeros}", None),
            )
            for name in ("w13", "w2")
        )
        scales = self.w13[1]
        self.device, self.dtype = scales.device, scales.dtype
        self.hidden = self.w13[0].shape[2] * 8
        self.inter = self.w2[0].shape[2] * 8
        self.top_k = method.moe.experts_per_token
        self.activation = (
            ops.ACTIVATIONS[layer.activation].name,
            *self.kernel._activation_arguments(layer.activation),
        )
        self.compiled, self.compile_s = 0, 0.0
        generator = torch.Generator().manual_seed(0)
        tokens = max(*self._decode_tokens(), self._prefill_tokens())
        x = torch.randn(tokens, self.hidden, generator=generator, device="cpu")
        self.x = x.to(self.dtype).to(self.device)
        # slots alternate; the second expert comes first in every other token
        local = torch.tensor([0, expert])
        slots = (torch.arange(tokens)[:, None] + torch.arange(self.top_k)) % 2
        self.slots = local[slots].cpu()
        """int64 [M, top_k]: the local expert of each slot; ``local`` on the device."""
        self.local = self.slots.to(self.device)
        self.experts = sorted({0, expert})
        self.expert_map = layer.expert_map
        ids = self.local
        if self.expert_map is not None:
            globals_ = [
                int((self.expert_map == e).nonzero()[0, 0]) for e in (0, expert)
            ]
            ids = torch.tensor(globals_)[slots].to(self.device)
        self.ids = ids.to(torch.int32)
        # vLLM loads models with the model's dtype as torch's default
        weights = torch.rand(
            tokens,
            self.top_k,
            generator=generator,
            dtype=torch.float32,
            device="cpu",
        )
        weights += 0.5
        self.weights = (weights / self.top_k).to(self.device)

    def _prefill_tokens(self) -> int:
        return 0 if self.kernel.prefill_from is None else _PREFILL_TOKENS

    def problem(self) -> str | None:
        """The first difference from plain torch; ``None`` if there is none."""
        try:
            runs = [self._decode(tokens) for tokens in self._decode_tokens()]
        except RuntimeError as error:
            if self.kernel.tuned is None or ": plan:" not in str(error):
                raise
            logger.warning(
                "HybridW4A16 MoE: the tuning table's launch plans for %s do not fit "
                "this layer and are not used: %s",
                self.kernel.tuned.shape,
                str(error).splitlines()[0],
            )
            self.kernel.tuned.decode.clear()
            runs = [self._decode(tokens) for tokens in self._decode_tokens()]
        if self.kernel.prefill_from is not None:
            runs += [self._prefill(tiles) for tiles in self._tiles()]
        return self._gate_up_problem(runs) or self._down_problem(runs)

    def _decode_tokens(self) -> list[int]:
        """A few token counts, and all for which the tuning table has plans."""
        planned = self.kernel.tuned.decode if self.kernel.tuned is not None else {}
        return sorted({*_DECODE_TOKENS, *planned})

    def _decode(self, tokens: int) -> _Run:
        plans: tuple[tuning.Plan | None, tuning.Plan | None] = (None, None)
        if self.kernel.tuned is not None:
            plans = self.kernel.tuned.decode_plans(tokens)
        nan = float("nan")
        middle = self.x.new_full((tokens * self.top_k, self.inter), nan)
        out = self.x.new_full((tokens, self.hidden), nan)
        w13, s13, z13 = self.w13
        w2, s2, z2 = self.w2
        name, alpha, beta, limit = self.activation
        cu_count = self.kernel.cu_count
        ids, weights = self.ids[:tokens], self.weights[:tokens]
        ops.fused_moe_wvSplitK_int4_gate_up(
            self.x[:tokens],
            w13,
            s13,
            middle,
            ids,
            name,
            cu_count,
            self.kernel.group_size,
            z13,
            self.expert_map,
            alpha,
            beta,
            limit,
            plan=plans[0],
        )
        ops.fused_moe_wvSplitK_int4_down(
            middle,
            w2,
            s2,
            out,
            ids,
            weights,
            cu_count,
            self.kernel.down_group_size,
            z2,
            self.expert_map,
            plan=plans[1],
        )
        return _Run(f"decode, {tokens} tokens", tokens, middle, out)

    def _tiles(self) -> list[tuning.PrefillTiles]:
        """The tiles for every number of tokens that the model can get at once."""
        assert self.kernel.prefill_from is not None and self.kernel.tuned is not None
        tokens, found = self.kernel.prefill_from, []
        while tokens <= 1 << 17:
            tiles = self.kernel.tuned.prefill_tiles(tokens * self.top_k)
            if tiles not in found:
                found.append(tiles)
            tokens *= 2
        return found

    def _prefill(self, tiles: tuning.PrefillTiles) -> _Run:
        from vllm.model_executor.layers.fused_moe.experts import (
            hybrid_w4a16_triton as prefill,
        )

        start = time.monotonic()
        tokens = self._prefill_tokens()
        sizes = tokens, self.top_k, self.hidden, self.inter
        buffer = self.x.new_zeros(prefill.Workspace.elements(*sizes))
        workspace = prefill.Workspace.split(buffer, *sizes)
        out = self.x.new_full((tokens, self.hidden), float("nan"))
        known = self.w13[0].shape[0]
        if self.expert_map is not None:
            known = self.expert_map.shape[0]
        blocks = prefill.sort_pairs(
            self.ids[:tokens], tiles.gate_up.block_m, known, self.expert_map
        )
        prefill.prefill_experts(
            self.x[:tokens],
            prefill.Int4Matrix(*self.w13, self.kernel.group_size),
            prefill.Int4Matrix(*self.w2, self.kernel.down_group_size),
            out,
            workspace,
            self.ids[:tokens],
            self.weights[:tokens],
            self.expert_map,
            blocks,
            prefill.Activation(*self.activation),
            tiles,
        )
        place = torch.arange(self.inter, device=self.device)
        if not tiles.down.natural:
            # from plane order back to the order of the intermediate's columns
            place = 128 * (place // 128) + 16 * (place % 8) + (place % 128) // 8
        middle = workspace.middle[:, place]
        self.compiled += 2
        self.compile_s += time.monotonic() - start
        return _Run(f"prefill, {tiles}", tokens, middle, out)

    def _gate_up_problem(self, runs: list[_Run]) -> str | None:
        middle = torch.cat([run.middle for run in runs])
        ends = itertools.accumulate(len(run.middle) for run in runs)
        firsts = [0, *ends][:-1]
        for expert in self.experts:
            # of every run, the pairs of this expert: token * top_k + slot
            pairs = (self.slots.flatten() == expert).nonzero()[:, 0]
            mine = [pairs[pairs < run.tokens * self.top_k] for run in runs]
            places = [m + first for m, first in zip(mine, firsts, strict=True)]
            compare = functools.partial(
                self._compare_gate_up,
                expert,
                middle[torch.cat(places).to(self.device)],
                torch.cat(mine) // self.top_k,
                list(map(len, mine)),
            )
            wrong = self._wrong(compare, self._chunks(self.inter, self.hidden))
            if wrong is not None:
                run_index, text = wrong
                how = runs[run_index].how
                return f"gate_up ({how}), local expert {expert}, {text}"
        return None

    def _compare_gate_up(
        self,
        expert: int,
        got: torch.Tensor,
        tokens: torch.Tensor,
        counts: list[int],
        rows: torch.Tensor,
    ) -> _Comparison:
        """``got[i]``, [R, I], is what gate_up wrote for ``tokens[i]``."""
        name, alpha, beta, limit = self.activation
        x = self.x.float()
        gate, gate_norm = self._product(self.w13, expert, rows, x)
        up, up_norm = self._product(self.w13, expert, rows + self.inter, x)
        want = reference.activate(gate, up, *self.activation)
        acted = reference.activate(gate, torch.ones_like(up), name, alpha, 0.0, limit)
        # the error of the product, given the errors of gate and up
        size = _rms(x)
        gate_size, up_size = gate_norm * size, up_norm * size
        allowed = (_rms(up + beta, 0) + TOLERANCE * up_size) * gate_size
        allowed += _rms(acted, 0) * up_size + _rms(want, 0)
        want = want[tokens.to(self.device)]
        return _Comparison(got[:, rows].float(), want, allowed[None], counts, tokens)

    def _down_problem(self, runs: list[_Run]) -> str | None:
        """The first wrong row of down, given what gate_up wrote in the same run."""
        factors = {
            expert: (self.weights * (self.local == expert))[:, :, None]
            for expert in self.experts
        }
        inputs = {
            expert: torch.cat(
                [
                    (run.middle.unflatten(0, (-1, self.top_k)) * f[: run.tokens]).sum(1)
                    for run in runs
                ]
            )
            for expert, f in factors.items()
        }
        input_sizes = {expert: _rms(x, 1)[:, None] for expert, x in inputs.items()}
        got = torch.cat([run.out for run in runs])
        counts = [run.tokens for run in runs]
        tokens = torch.cat([torch.arange(count, device="cpu") for count in counts])

        def compare(rows: torch.Tensor) -> _Comparison:
            want = sizes = torch.zeros((), dtype=torch.float32, device=self.device)
            for expert in self.experts:
                part, norm = self._product(self.w2, expert, rows, inputs[expert])
                want = want + part
                sizes = sizes + part.abs() + norm * input_sizes[expert]
            allowed = _rms_of_runs(sizes, counts)
            return _Comparison(got[:, rows].float(), want, allowed, counts, tokens)

        wrong = self._wrong(compare, self._chunks(self.hidden, self.inter))
        return None if wrong is None else f"down ({runs[wrong[0]].how}), {wrong[1]}"

    def _wrong(
        self,
        compare: Callable[[torch.Tensor], _Comparison],
        chunks: Sequence[torch.Tensor],
    ) -> tuple[int, str] | None:
        """The run and the first row whose error is larger than ``TOLERANCE * allowed``.

        The device is waited for once, not once per chunk.
        """
        found = torch.stack([self._errors(compare(rows))[1].any() for rows in chunks])
        if not bool(found.any()):
            return None
        rows = chunks[int(found.nonzero()[0, 0])]
        compared = compare(rows)
        error, wrong = self._errors(compared)
        run, at = wrong.nonzero()[0].tolist()
        allowed = compared.allowed.expand_as(error)[run, at].clamp(min=1e-30)
        got, want, tokens = (
            part.split(compared.counts)[run]
            for part in (compared.got[:, at], compared.want[:, at], compared.tokens)
        )
        worst = int((got - want).abs().nan_to_num(math.inf).argmax())
        return run, (
            f"row {int(rows[at])} differs from plain torch: relative error "
            f"{float(error[run, at] / allowed):.2g}, allowed {TOLERANCE}; token "
            f"{int(tokens[worst])} is {float(got[worst]):.6g}, "
            f"expected {float(want[worst]):.6g}"
        )

    def _errors(self, compared: _Comparison) -> tuple[torch.Tensor, torch.Tensor]:
        """[runs, rows]: the errors, and whether they are too large."""
        difference, allowed = compared.got - compared.want, compared.allowed
        if self.dtype == torch.float16:  # may overflow even if the model is sound
            inside = compared.want.abs() < torch.finfo(torch.float16).max
            difference = torch.where(inside, difference, 0.0)
            allowed = allowed.nan_to_num(math.inf)
        error = _rms_of_runs(difference, compared.counts)
        return error, ~(error <= TOLERANCE * allowed + 1e-30)

    def _chunks(self, rows: int, k: int) -> Sequence[torch.Tensor]:
        """The rows to compare, in chunks so that temporaries stay small."""
        every = some_rows(rows, k, self.device)
        expert_bytes = 3 * self.hidden * self.inter // 2
        # two temporaries of 4 bytes each per weight
        count = max(8, expert_bytes // _CHUNK_SHARE // (8 * k) // 8 * 8)
        return every.split(count)

    def _product(
        self,
        matrix: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
        expert: int,
        rows: torch.Tensor,
        x: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x [M, K] times ``rows`` of the expert, fp32 [M, rows], and the rows' norms.

        To a row's norm, that of weights one step from zero is added: neither is zero.
        """
        words, scales, zero_points = (None if t is None else t[expert] for t in matrix)
        assert words is not None and scales is not None
        zeros = None
        if zero_points is not None:
            zeros = reference.packed_zero_points(zero_points[rows[::8] // 8])
        w = reference.dequantize(
            reference.packed_weights(words[rows]), scales[rows], zeros, torch.float32
        )
        group_size = w.shape[1] // scales.shape[1]
        steps = scales[rows].float()
        square = (w * w).sum(1) + (steps * steps).sum(1) * group_size
        return x @ w.T, square.sqrt()


def _rms(x: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """Root mean square over all elements, or along ``dim``.

    Here and above, as few different operations as possible: on a GPU the first call of
    each loads its kernel, which takes longer than all calls together.
    """
    square = x.float() * x.float()
    count = x.numel() if dim is None else x.shape[dim]
    return ((square.sum() if dim is None else square.sum(dim)) / count).sqrt()


def _rms_of_runs(x: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Root mean square over the rows of each run: [R, N] to [len(counts), N]."""
    means = [(part * part).sum(0) / max(1, len(part)) for part in x.split(counts)]
    return torch.stack(means).sqrt()
