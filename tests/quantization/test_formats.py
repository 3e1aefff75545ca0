# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Every checkpoint format through vLLM's own classes: load, repack, run, shard, reload.

``test_inc_moe`` covers what does not depend on the format.
"""

import dataclasses
import itertools

import pytest
import torch

from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_reference as reference
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_tuning
from vllm.model_executor.layers.quantization import hybrid_w4a16_method as base
from vllm.model_executor.layers.quantization.hybrid_w4a16_awq import (
    AWQHybridW4A16MoEMethod,
)
from vllm.model_executor.layers.quantization.hybrid_w4a16_compressed_tensors import (
    CompressedTensorsHybridW4A16MoEMethod,
)
from vllm.model_executor.layers.quantization.hybrid_w4a16_gptq import (
    GPTQHybridW4A16MoEMethod,
)
from vllm.model_executor.layers.quantization.hybrid_w4a16_method import (
    HybridW4A16MoEMethod,
)
from vllm.model_executor.layers.quantization.inc_moe import INCHybridW4A16MoEMethod
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

from ..support.int4_formats import FORMATS
from ..support.moe_layers import (
    DEVICE,
    LAYER_NAME,
    Checkpoint,
    Shape,
    make_layer,
    peak_of_processing,
    quant_config,
    random_routing,
    relative_error,
    run_layer,
)

METHODS = {
    "auto_round:auto_gptq": INCHybridW4A16MoEMethod,
    "auto_round:auto_awq": INCHybridW4A16MoEMethod,
    "gptq": GPTQHybridW4A16MoEMethod,
    "gptq_v2": GPTQHybridW4A16MoEMethod,
    "awq": AWQHybridW4A16MoEMethod,
    "compressed-tensors": CompressedTensorsHybridW4A16MoEMethod,
}
# vLLM's AutoGPTQConfig rejects sym = false for a whole model.
CASES = [
    (format, symmetric)
    for format in FORMATS
    for symmetric in (True, False)
    if symmetric or not format.startswith("gptq")
]
every_format = pytest.mark.parametrize(
    ("format", "symmetric"),
    CASES,
    ids=[f"{name}-{'sym' if symmetric else 'asym'}" for name, symmetric in CASES],
)
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 8e-3}


def empty_layer(format, symmetric, shape=None, dtype=torch.bfloat16, **kwargs):
    shape = shape or Shape()
    config = quant_config(format, shape.group_size, symmetric)
    layer = make_layer(shape, config, dtype, **kwargs)
    assert type(layer.quant_method) is METHODS[format]
    return layer


def inputs(tokens, shape, dtype):
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, shape.hidden, generator=generator).to(dtype)
    return x, *random_routing(tokens, shape)


def error_of(layer, checkpoint, dtype, tokens=5):
    x, weights, ids = inputs(tokens, checkpoint.shape, dtype)
    expected = checkpoint.forward(x, weights, ids)
    return relative_error(run_layer(layer, x, weights, ids), expected)


@every_format
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_layer_against_float64(format, symmetric, group_size, dtype):
    shape = Shape(group_size=group_size)
    layer = empty_layer(format, symmetric, shape, dtype)
    checkpoint = Checkpoint(shape, symmetric, format=format)
    checkpoint.load_into(layer)
    for tokens in (1, 40):
        assert error_of(layer, checkpoint, dtype, tokens) < TOLERANCE[dtype]


@every_format
@pytest.mark.parametrize("kind", ["tp", "ep"])
def test_ranks_add_up(format, symmetric, kind):
    shape = Shape()
    checkpoint = Checkpoint(shape, symmetric, format=format)
    x, weights, ids = inputs(5, shape, torch.bfloat16)
    total = torch.zeros(5, shape.hidden)
    held = 0
    for rank in range(2):
        layer = empty_layer(format, symmetric, **{kind: (2, rank)})
        checkpoint.load_into(layer)
        held += sum(p.numel() for p in layer.parameters())
        total += run_layer(layer, x, weights, ids).float()
    whole = empty_layer(format, symmetric)
    checkpoint.load_into(whole)
    assert held == sum(p.numel() for p in whole.parameters())
    assert relative_error(total, checkpoint.forward(x, weights, ids)) < 8e-3


def dequantized_down(layer):
    """w2 of a converted layer, [E, H, I] in its dtype."""
    packing = layer.quant_method.packing
    zeros = getattr(layer, f"w2_{packing.zeros}", None)
    return torch.stack(
        [
            reference.dequantize(
                reference.packed_weights(words),
                scales,
                None if zeros is None else reference.packed_zero_points(zeros[expert]),
                torch.float64,
            )
            for expert, (words, scales) in enumerate(
                zip(
                    getattr(layer, f"w2_{packing.qweight}"),
                    getattr(layer, f"w2_{packing.scales}"),
                    strict=True,
                )
            )
        ]
    )


def _cut_groups():
    """Every case; the long grid but for a few."""
    few = {("auto_round:auto_gptq", True, 4), ("awq", False, 2)}
    few.add(("compressed-tensors", False, 4))
    for (format, symmetric), (ranks, group_size, dtype) in itertools.product(
        CASES, [(2, 64, torch.float16), (4, 32, torch.bfloat16)]
    ):
        marks = [] if (format, symmetric, ranks) in few else [pytest.mark.nightly]
        values = (format, symmetric, ranks, group_size, dtype)
        sign = "sym" if symmetric else "asym"
        yield pytest.param(*values, marks=marks, id=f"{format}-{sign}-{ranks} ranks")


@pytest.mark.parametrize(
    ("format", "symmetric", "ranks", "group_size", "dtype"), _cut_groups()
)
def test_shards_that_cut_groups_lose_nothing(
    format, symmetric, ranks, group_size, dtype
):
    shape = Shape(4, 2, 128, 384, 128)  # 192 or 96 columns a rank
    checkpoint = Checkpoint(shape, symmetric, format=format)
    x, weights, ids = inputs(5, shape, dtype)
    whole = empty_layer(format, symmetric, shape, dtype)
    checkpoint.load_into(whole)
    expected = dequantized_down(whole).chunk(ranks, dim=2)
    total = torch.zeros(5, shape.hidden)
    for rank in range(ranks):
        layer = empty_layer(format, symmetric, shape, dtype, tp=(ranks, rank))
        checkpoint.load_into(layer)
        scales = getattr(layer, f"w2_{layer.quant_method.packing.scales}")
        assert scales.shape == (4, 128, 384 // ranks // group_size)
        assert torch.equal(dequantized_down(layer), expected[rank])
        total += run_layer(layer, x, weights, ids).float()
    assert relative_error(total, checkpoint.forward(x, weights, ids)) < TOLERANCE[dtype]


@every_format
def test_router_weight_on_input(format, symmetric):
    shape = Shape(top_k=1)
    layer = empty_layer(format, symmetric, shape)
    checkpoint = Checkpoint(shape, symmetric, format=format)
    checkpoint.load_into(layer)
    layer.apply_router_weight_on_input = True
    x, _, ids = inputs(4, shape, torch.bfloat16)
    weights = torch.tensor([[0.5], [0.25], [1.0], [2.0]])
    output = run_layer(layer, x, weights, ids)
    expected = checkpoint.forward(x * weights, torch.ones(4, 1), ids)
    assert relative_error(output, expected) < 8e-3


@every_format
@pytest.mark.parametrize(
    "shape", [Shape(), Shape(8, 2, 1024, 512, 128)], ids=["small", "large"]
)
def test_layer_holds_the_checkpoint_and_repacking_needs_one_expert_more(
    format, symmetric, shape
):
    layer = empty_layer(format, symmetric, shape)
    checkpoint = Checkpoint(shape, symmetric, format=format)
    list(layer.load_weights(checkpoint.tensors()))
    packing = layer.quant_method.packing
    kept = {packing.qweight, packing.scales}
    if not symmetric:
        kept.add(packing.zeros)
    kept_names = {f"{w}_{suffix}" for w in ("w13", "w2") for suffix in kept}
    addresses = {name: getattr(layer, name).data_ptr() for name in kept_names}
    loaded_bytes = sum(p.untyped_storage().nbytes() for p in layer.parameters())
    assert 0 < peak_of_processing(layer) <= loaded_bytes // shape.experts
    held = dict(layer.named_parameters())
    assert {name: p.data_ptr() for name, p in held.items()} == addresses
    assert sum(p.untyped_storage().nbytes() for p in held.values()) == sum(
        array.nbytes
        for expert in checkpoint.experts
        for linear in expert.values()
        for suffix, array in linear.items()
        if suffix in kept
    )


@every_format
def test_processing_again_changes_nothing(format, symmetric):
    layer = empty_layer(format, symmetric)
    Checkpoint(Shape(), symmetric, format=format).load_into(layer)
    before = {name: p.clone() for name, p in layer.named_parameters()}
    layer.quant_method.process_weights_after_loading(layer)
    after = dict(layer.named_parameters())
    assert set(after) == set(before)
    for name, parameter in after.items():
        assert torch.equal(parameter, before[name]), name


@every_format
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_weights_are_reloaded_into_the_same_tensors(
    format, symmetric, padded, monkeypatch
):
    """vLLM's weight reload, which RL training and level 2 of sleep mode use."""
    shape = Shape(4, 2, 2048, 256, 128) if padded else Shape()
    if padded:
        pad_rows(monkeypatch)
    layer = empty_layer(format, symmetric, shape)
    model = torch.nn.ModuleDict({"experts": layer})
    with torch.device(DEVICE):  # like vLLM's loader
        record_metadata_for_reloading(model)
    Checkpoint(shape, symmetric, format=format).load_into(layer)
    before = {n: (p.data_ptr(), p.stride()) for n, p in layer.named_parameters()}
    checkpoint = Checkpoint(shape, symmetric, seed=1, format=format)
    for _ in range(2):
        initialize_layerwise_reload(model)
        list(layer.load_weights(checkpoint.tensors()))
        finalize_layerwise_reload(model, None)
        after = {n: (p.data_ptr(), p.stride()) for n, p in layer.named_parameters()}
        assert after == before
        assert error_of(layer, checkpoint, torch.bfloat16) < 8e-3
    # Only the layer's own tensors are kept.
    config, packing = layer.quant_method.moe_quant_config, layer.quant_method.packing
    assert config.w1_scale is getattr(layer, f"w13_{packing.scales}")
    assert config.w2_scale is getattr(layer, f"w2_{packing.scales}")
    assert config.w1_zp is getattr(layer, f"w13_{packing.zeros}", None)


@pytest.mark.parametrize(
    ("format", "symmetric"),
    [("auto_round:auto_gptq", True), ("compressed-tensors", False)],
)
def test_shards_that_cut_groups_are_reloaded(format, symmetric):
    shape = Shape(4, 2, 128, 192, 64)
    layer = empty_layer(format, symmetric, shape, tp=(2, 1))
    model = torch.nn.ModuleDict({"experts": layer})
    with torch.device(DEVICE):
        record_metadata_for_reloading(model)
    Checkpoint(shape, symmetric, format=format).load_into(layer)
    checkpoint = Checkpoint(shape, symmetric, seed=1, format=format)
    initialize_layerwise_reload(model)
    list(layer.load_weights(checkpoint.tensors()))
    finalize_layerwise_reload(model, None)
    fresh = empty_layer(format, symmetric, shape, tp=(2, 1))
    checkpoint.load_into(fresh)
    assert torch.equal(dequantized_down(layer), dequantized_down(fresh))


@pytest.mark.skipif(DEVICE != "cpu", reason="an opaque op hides the layer on GPUs")
@every_format
def test_compiled_code_sees_reloaded_weights(format, symmetric):
    """Compiled like vLLM: without guards, so traced code is never retraced."""
    layer = empty_layer(format, symmetric)
    model = torch.nn.ModuleDict({"experts": layer})
    record_metadata_for_reloading(model)
    Checkpoint(Shape(), symmetric, format=format).load_into(layer)
    x, weights, ids = inputs(3, Shape(), torch.bfloat16)
    torch.compiler.reset()  # without guards the previous case's code would be reused
    skip_guards = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}

    @torch.compile(backend="eager", fullgraph=True, options=skip_guards)
    def compiled(x, weights, ids):
        return layer.quant_method.apply(layer, x, weights, ids, None, None)

    with set_forward_context(None, VllmConfig()):
        compiled(x, weights, ids)
    checkpoint = Checkpoint(Shape(), symmetric, seed=1, format=format)
    initialize_layerwise_reload(model)
    list(layer.load_weights(checkpoint.tensors()))
    finalize_layerwise_reload(model, None)
    with set_forward_context(None, VllmConfig()):
        y = compiled(x, weights, ids)
    assert relative_error(y, checkpoint.forward(x, weights, ids)) < 8e-3
    # Only the layer's own tensors are kept.
    packing = layer.quant_method.packing
    scales = getattr(layer, f"w13_{packing.scales}")
    assert layer.quant_method.moe_quant_config.w1_scale is scales


@every_format
def test_loading_over_converted_weights_is_refused(format, symmetric):
    layer = empty_layer(format, symmetric)
    checkpoint = Checkpoint(Shape(), symmetric, format=format)
    checkpoint.load_into(layer)
    with pytest.raises(ValueError, match=f"{LAYER_NAME}.w13_.*layer was converted"):
        list(layer.load_weights(checkpoint.tensors()))


SENTINELS = {
    "auto_round:auto_gptq": 0x77777777,
    "auto_round:auto_awq": 0x88888888,
    "gptq": 0x77777777,
    "gptq_v2": 0x88888888,
    "awq": 0x88888888,
}


@pytest.mark.parametrize("format", SENTINELS)
@pytest.mark.parametrize("nibble", range(8))
def test_symmetric_is_verified(format, nibble):
    layer = empty_layer(format, True)
    list(layer.load_weights(Checkpoint(Shape(), format=format).tensors()))
    word = SENTINELS[format] ^ (1 << 4 * nibble)
    signed = word - (1 << 32 if word >= 1 << 31 else 0)
    layer.w2_qzeros.data[3, 1, 2] = signed
    message = (
        rf"{LAYER_NAME}.3.down_proj.qzeros holds 0x{word:08x}, "
        rf"expected 0x{SENTINELS[format]:08x}"
    )
    with pytest.raises(ValueError, match=message):
        layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize("format", ["gptq", "gptq_v2"])
def test_v1_and_v2_zero_points_are_told_apart(format):
    other = {"gptq": "gptq_v2", "gptq_v2": "gptq"}[format]
    layer = empty_layer(format, True)
    list(layer.load_weights(Checkpoint(Shape(), format=other).tensors()))
    with pytest.raises(ValueError, match=f"holds 0x{SENTINELS[other]:08x}"):
        layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize("offset", [0, 1], ids=["v2", "v1"])
def test_gptq_with_zero_points(offset):
    """vLLM's config class rejects these; the method does not."""
    format = "gptq" if offset else "gptq_v2"
    layer = empty_layer(format, True)
    layer.quant_method.symmetric = False
    checkpoint = Checkpoint(Shape(), False, format=format)
    checkpoint.load_into(layer)
    assert error_of(layer, checkpoint, torch.bfloat16) < 8e-3


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
def test_scales_that_the_activation_dtype_cannot_hold(format):
    layer = empty_layer(format, True, dtype=torch.float16)
    checkpoint = Checkpoint(Shape(), format=format)
    scales = checkpoint.format.scales
    tensors = dict(checkpoint.tensors())
    broken = tensors[f"6.down_proj.{scales}"].float()
    broken[1, 1] = 1e6
    tensors[f"6.down_proj.{scales}"] = broken
    list(layer.load_weights(tensors.items()))
    message = f"{LAYER_NAME}.6.down_proj.{scales} holds inf in torch.float16"
    with pytest.raises(ValueError, match=message):
        layer.quant_method.process_weights_after_loading(layer)


@every_format
def test_dummy_weights(format, symmetric, monkeypatch):
    """With --load-format dummy nothing is loaded; vLLM fills what it can."""
    from vllm.config import VllmConfig
    from vllm.model_executor.model_loader.weight_utils import (
        initialize_single_dummy_weight,
    )

    config = VllmConfig()
    config.load_config.load_format = "dummy"
    monkeypatch.setattr(base, "get_current_vllm_config_or_none", lambda: config)
    layer = empty_layer(format, symmetric)
    for parameter in layer.parameters():
        initialize_single_dummy_weight(parameter)
    layer.quant_method.process_weights_after_loading(layer)
    x, weights, ids = inputs(3, Shape(), torch.bfloat16)
    assert run_layer(layer, x, weights, ids).isfinite().all()


def pad_rows(monkeypatch):
    """Make a tuning table for this device that requests padding."""
    padding = dataclasses.replace(base.device_family(), tuning="padded")
    monkeypatch.setattr(base, "device_family", lambda: padding)
    table = hybrid_w4a16_tuning.table
    monkeypatch.setattr(
        hybrid_w4a16_tuning,
        "table",
        lambda name: {"row_padding": 128} if name == "padded" else table(name),
    )


@every_format
def test_rows_of_a_multiple_of_1024_bytes_are_padded(format, symmetric, monkeypatch):
    shape = Shape(4, 2, 2048, 256, 128)
    checkpoint = Checkpoint(shape, symmetric, format=format)
    plain = empty_layer(format, symmetric, shape)
    checkpoint.load_into(plain)
    pad_rows(monkeypatch)
    layer = empty_layer(format, symmetric, shape)
    checkpoint.load_into(layer)
    packing = layer.quant_method.packing
    w13, w2 = (getattr(layer, f"{w}_{packing.qweight}") for w in ("w13", "w2"))
    assert w13.shape == (4, 512, 256) and w13.stride() == (512 * 288, 288, 1)
    assert w2.shape == (4, 2048, 32) and w2.is_contiguous()
    padding = layer.quant_method.padding_bytes
    assert padding == 4 * 512 * 128
    assert w13.untyped_storage().nbytes() == w13.nbytes + padding
    assert plain.quant_method.padding_bytes == 0
    x, weights, ids = inputs(9, shape, torch.bfloat16)
    assert torch.equal(
        run_layer(layer, x, weights, ids), run_layer(plain, x, weights, ids)
    )


@every_format
def test_padding_costs_no_second_buffer(format, symmetric, monkeypatch):
    pad_rows(monkeypatch)
    shape = Shape(8, 2, 2048, 256, 128)
    layer = empty_layer(format, symmetric, shape)
    list(layer.load_weights(Checkpoint(shape, symmetric, format=format).tensors()))
    loaded_bytes = sum(p.untyped_storage().nbytes() for p in layer.parameters())
    assert 0 < peak_of_processing(layer) <= loaded_bytes // shape.experts


def test_every_method_is_a_hybrid_one():
    assert all(issubclass(method, HybridW4A16MoEMethod) for method in METHODS.values())
