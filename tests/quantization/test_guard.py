# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The check of a model's first layer finds planted faults and passes sound layers."""

import re

import pytest
import torch

from vllm.model_executor.layers.fused_moe import hybrid_w4a16_guard as guard
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_guard_kernels as kernels
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_moe_helper as helper
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_ops as ops
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.oracle import hybrid_w4a16 as oracle

from ..support.int4_formats import FORMATS
from ..support.moe_layers import (
    LAYER_NAME,
    Checkpoint,
    Shape,
    fresh_gate_records,
    make_layer,
    quant_config,
)

SHAPE = Shape(4, 2, 512, 256, 64)
every_format = pytest.mark.parametrize("format", list(FORMATS))
# vLLM's own GPTQ supports only symmetric checkpoints.
with_zeros = [name for name in FORMATS if not name.startswith("gptq")]


@pytest.fixture(autouse=True)
def fresh_records(monkeypatch):
    fresh_gate_records(monkeypatch)
    monkeypatch.setattr(guard, "_checked", set())


def load(format="auto_round:auto_gptq", symmetric=True, name=LAYER_NAME, **overrides):
    config = quant_config(format, SHAPE.group_size, symmetric)
    layer = make_layer(SHAPE, config, name=name, **overrides)
    Checkpoint(SHAPE, symmetric, format=format).load_into(layer)
    return layer


def spoil_packing(monkeypatch, layer_format, field, spoil):
    """Let ``spoil`` change the result of converting one kind of tensor."""
    import dataclasses

    from vllm.model_executor.layers.quantization import hybrid_w4a16_method as method

    original = method.HybridW4A16MoEMethod.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        sound = getattr(self.packing, field)

        def wrong(stored):
            converted = sound(stored)
            spoil(converted)
            return converted

        self.packing = dataclasses.replace(self.packing, **{field: wrong})

    monkeypatch.setattr(method.HybridW4A16MoEMethod, "__init__", init)


@pytest.mark.parametrize(
    ("format", "symmetric"),
    [(name, True) for name in FORMATS] + [(name, False) for name in with_zeros],
)
def test_sound_layers_are_checked_and_pass(format, symmetric, monkeypatch):
    runs = []
    decode = kernels.KernelCheck._decode

    def noted(self, tokens):
        runs.append(tokens)
        return decode(self, tokens)

    monkeypatch.setattr(kernels.KernelCheck, "_decode", noted)
    load(format, symmetric)
    assert runs == list(kernels._DECODE_TOKENS)


def test_one_wrong_scale_in_the_conversion(monkeypatch):
    sound = helper.transposed_copy

    def wrong(matrix):
        copy = sound(matrix)
        if copy.is_floating_point():
            copy[37, 1] *= 1.0625
        return copy

    monkeypatch.setattr(helper, "transposed_copy", wrong)
    with pytest.raises(RuntimeError) as error:
        load()
    message = str(error.value)
    assert message.startswith(
        f"layer {LAYER_NAME}: the conversion of the scales of w13"
    )
    assert "1 of 512 rows, row 37 first" in message
    assert "VLLM_HYBRID_W4A16_MOE=0" in message


@every_format
def test_one_wrong_nibble_in_the_conversion(format, monkeypatch):
    def spoil(words):
        words[5, 3] ^= 1 << 9

    spoil_packing(monkeypatch, format, "to_exllama", spoil)
    with pytest.raises(RuntimeError, match="of the weights of w13.*row 5 first"):
        load(format)


@pytest.mark.parametrize("format", with_zeros)
def test_one_wrong_zero_point_in_the_conversion(format, monkeypatch):
    def spoil(zeros):
        zeros[2, 1] ^= 1 << 12  # of row 8 * 2 + 3

    spoil_packing(monkeypatch, format, "to_row_zeros", spoil)
    with pytest.raises(RuntimeError, match="of the zero points of w13.*row 19 first"):
        load(format, symmetric=False)


def break_op(monkeypatch, name, spoil):
    whole = f"fused_moe_wvSplitK_int4_{name}"
    original = getattr(ops, whole)

    def broken(a, w, scales, c, *rest, **named):
        original(a, w, scales, c, *rest, **named)
        spoil(c)

    monkeypatch.setattr(ops, whole, broken)


@pytest.mark.parametrize("op", ["gate_up", "down"])
@pytest.mark.parametrize("fault", [1.2, float("nan")], ids=["off", "nan"])
def test_one_wrong_output_row_of_a_kernel(op, fault, monkeypatch):
    break_op(monkeypatch, op, lambda c: c[:, 100].mul_(fault))
    with pytest.raises(RuntimeError) as error:
        load()
    message = str(error.value)
    assert re.search(rf"{op} \(decode, \d tokens\)", message), message
    assert "row 100 differs" in message
    assert LAYER_NAME in message and "VLLM_HYBRID_W4A16_MOE=0" in message


def test_a_kernel_that_takes_the_wrong_expert(monkeypatch):
    original = ops.fused_moe_wvSplitK_int4_down

    def broken(a, w, *rest, **named):
        original(a, w.roll(1, 0), *rest, **named)

    monkeypatch.setattr(ops, "fused_moe_wvSplitK_int4_down", broken)
    with pytest.raises(RuntimeError, match="down"):
        load()


@pytest.mark.parametrize(
    "activation",
    [MoEActivation.GELU, MoEActivation.GELU_TANH, MoEActivation.SWIGLUOAI_UNINTERLEAVE],
)
def test_other_activations_pass(activation):
    load(activation=activation)


def test_fp16_may_overflow(monkeypatch):
    """Random activations can be too large for a sound model's fp16."""
    finite = []
    decode = kernels.KernelCheck._decode

    def noted(self, tokens):
        run = decode(self, tokens)
        finite.append(bool(run.middle.isfinite().all() and run.out.isfinite().all()))
        return run

    monkeypatch.setattr(kernels.KernelCheck, "_decode", noted)
    config = quant_config("auto_round:auto_gptq", SHAPE.group_size, True)
    layer = make_layer(SHAPE, config, torch.float16)
    checkpoint = Checkpoint(SHAPE)
    for expert in checkpoint.experts:
        for linear in expert.values():
            linear["scales"] = linear["scales"] * linear["scales"].dtype.type(1000)
    checkpoint.load_into(layer)
    assert finite == [False] * len(kernels._DECODE_TOKENS)


def test_under_expert_parallelism():
    config = quant_config("auto_round:auto_gptq", SHAPE.group_size, True)
    layer = make_layer(SHAPE, config, ep=(2, 1))
    Checkpoint(SHAPE).load_into(layer)
    assert guard._checked


def test_only_the_first_layer_of_its_form_in_a_model_is_checked(monkeypatch):
    config = quant_config("auto_round:auto_gptq", SHAPE.group_size, True)
    checks = []
    run = kernels.KernelCheck.problem
    monkeypatch.setattr(
        kernels.KernelCheck, "problem", lambda self: checks.append(1) or run(self)
    )

    def two_layers():
        layers = [
            make_layer(SHAPE, config, name=f"model.layers.{i}.mlp.experts")
            for i in (0, 1)
        ]
        for layer in layers:
            Checkpoint(SHAPE).load_into(layer)

    two_layers()
    assert len(checks) == 1 and not oracle._model.accepted
    two_layers()  # another model
    assert len(checks) == 2


def test_reference_uses_no_code_of_the_conversion():
    """It agrees with the independent second implementation on stored tensors."""
    import numpy as np

    from vllm.model_executor.layers.fused_moe import hybrid_w4a16_packing as packing
    from vllm.model_executor.layers.fused_moe import hybrid_w4a16_reference as reference

    for format, mine in (
        ("gptq", packing.GPTQ_V1),
        ("gptq_v2", packing.GPTQ_V2),
        ("awq", packing.AWQ),
        ("compressed-tensors", packing.PACK_QUANTIZED),
    ):
        rng = np.random.default_rng(0)
        stored = FORMATS[format].random_linear(rng, 48, 128, 32, False)
        q, zero, _ = FORMATS[format].load(stored)
        words = torch.from_numpy(stored[mine.qweight])
        zeros = torch.from_numpy(stored[mine.zeros])
        assert np.array_equal(reference.stored_weights(mine, words).numpy(), q)
        assert np.array_equal(reference.stored_zero_points(mine, zeros).numpy(), zero)
