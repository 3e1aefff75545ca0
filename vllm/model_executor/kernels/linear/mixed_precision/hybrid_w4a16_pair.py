# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Two int4 linears that multiply the same input, in one launch.

A Gated DeltaNet layer multiplies its input with ``in_proj_qkvz`` and then with
``in_proj_ba``, which has 64 rows where the other has 12288: a second launch for next to
no weights. So the weights of both move into common tensors. The parameters of the
linears become views of these. The first linear computes both products, and the second
takes its part: columns of a wider tensor, which vLLM's kernels behind them accept.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch

from vllm._aiter_ops import rocm_aiter_ops

FIRST, SECOND = "in_proj_qkvz", "in_proj_ba"
_ATTRIBUTE = "_hybrid_w4a16_pair"

# Weights, scales and zero points (layout in hybrid_w4a16_dense_ops).
_Parameters = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]

# Where one of these is true, AITER's kernels for Gated DeltaNet read the products. They
# were not tried on columns of a wider tensor. Releases lack some.
_AITER = "are_gdn_triton_kernels_available", "is_rdna_gdn_triton_kernels_available"

# By the name of the module above: a FIRST that is loaded while its SECOND is not.
_waiting: weakref.WeakValueDictionary[str, torch.nn.Module] = (
    weakref.WeakValueDictionary()
)


class LinearPair:
    """The common weights of two linears, the first one's rows before the second's."""

    def __init__(self, first: _Parameters, second: _Parameters) -> None:
        """Both ``fit_together``; they become views of the common weights."""
        self._parameters = first, second
        self._rows = len(first[0])
        zeros = None
        if first[2] is not None and second[2] is not None:
            zeros = _joined(first[2], second[2])
        weights, scales = _joined(first[0], second[0]), _joined(first[1], second[1])
        self._joint: _Parameters = weights, scales, zeros
        # The last input, and the second linear's part of its product.
        self._input: torch.Tensor | None = None
        self._rest: torch.Tensor | None = None

    def product(
        self,
        layer: Any,
        x: torch.Tensor,
        multiply: Callable[..., torch.Tensor],
    ) -> torch.Tensor | None:
        """``x @ w^.T`` for one of the two, or ``None`` if it is on its own this time.

        Then its parameters are no parts of the common weights, as while weights are
        loaded again; or the first linear had another input, as two threads may run the
        model on two parts of a batch.

        Args:
            multiply: called with ``x`` and parameters.
        """
        now = _parameters(layer)
        first, second = (
            all(a is b for a, b in zip(mine, now, strict=True))
            for mine in self._parameters
        )
        if first:
            out = multiply(x, *self._joint)
            self._input, self._rest = x, out[..., self._rows :]
            return out[..., : self._rows]
        of, rest = self._input, self._rest
        self._input = self._rest = None
        return rest if second and of is x else None


def pair_up(layer: torch.nn.Module) -> None:
    """Join a linear whose weights are loaded with the one that belongs to it.

    vLLM finishes a FIRST before its SECOND. If it does not, they stay apart.
    """
    above, _, name = getattr(layer, "prefix", "").rpartition(".")
    if name not in (FIRST, SECOND) or pair_of(layer) is not None:
        return
    if any(getattr(rocm_aiter_ops, available, bool)() for available in _AITER):
        return
    if name == FIRST:
        _waiting[above] = layer
        return
    first = _waiting.pop(above, None)
    if first is not None and fit_together(first, layer):
        pair = LinearPair(_parameters(first), _parameters(layer))
        setattr(first, _ATTRIBUTE, pair)
        setattr(layer, _ATTRIBUTE, pair)


def pair_of(layer: Any) -> LinearPair | None:
    """The pair of a linear, ``None`` if it is on its own."""
    return getattr(layer, _ATTRIBUTE, None)


def fit_together(first: Any, second: Any) -> bool:
    """Whether two linears without bias differ in their number of rows alone."""
    if first.bias is not None or second.bias is not None:
        return False
    for a, b in zip(_parameters(first), _parameters(second), strict=True):
        if a is None or b is None:
            if a is not b:
                return False
        elif (a.shape[1], a.dtype, a.device) != (b.shape[1], b.dtype, b.device):
            return False
    return True


def _parameters(layer: Any) -> _Parameters:
    # imported here because vLLM lists its linear kernels before it can import its MoE
    from vllm.model_executor.layers.fused_moe import hybrid_w4a16_ops

    found = hybrid_w4a16_ops.dense_parameters(layer)
    assert found is not None
    return found


def _joined(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The rows of both, as a tensor of which ``a`` and ``b`` become parts."""
    joined = torch.cat((a.data, b.data))
    a.data, b.data = joined[: len(a)], joined[len(a) :]
    return joined
