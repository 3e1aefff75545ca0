# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""AutoRound layers through vLLM's own classes: load, repack, run, errors, memory."""

import pytest
import torch

from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.experts.hybrid_w4a16_moe import (
    HybridW4A16MoEExperts,
)
from vllm.model_executor.layers.quantization.inc_moe import INCHybridW4A16MoEMethod

from ..support.moe_layers import (
    DEVICE,
    LAYER_NAME,
    Checkpoint,
    Shape,
    inc_config,
    make_layer,
    peak_of_processing,
    random_routing,
    relative_error,
    run_layer,
)

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 8e-3}


def loaded_layer(shape, dtype=torch.bfloat16, symmetric=True, **kwargs):
    config = inc_config(shape.group_size, sym=symmetric)
    layer = make_layer(shape, config, dtype, **kwargs)
    checkpoint = Checkpoint(shape, symmetric)
    checkpoint.load_into(layer)
    return layer, checkpoint


def hidden_states(tokens, shape, dtype, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, shape.hidden, generator=generator).to(dtype)


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_layer_against_float64(group_size, dtype, symmetric, tokens):
    shape = Shape(group_size=group_size)
    layer, checkpoint = loaded_layer(shape, dtype, symmetric)
    assert isinstance(layer.quant_method, INCHybridW4A16MoEMethod)
    x = hidden_states(tokens, shape, dtype)
    weights, ids = random_routing(tokens, shape)
    output = run_layer(layer, x, weights, ids)
    assert output.dtype == dtype
    # the scales of a bf16 layer are rounded to bf16 when they are loaded
    tolerance = TOLERANCE[dtype]
    assert relative_error(output, checkpoint.forward(x, weights, ids)) < tolerance


def clamped_swiglu(alpha, beta, limit):
    def activation(gate, up):
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return gate * torch.sigmoid(alpha * gate) * (up + beta)

    return activation


def gelu_and_mul(approximate):
    return lambda gate, up: torch.nn.functional.gelu(gate, approximate=approximate) * up


@pytest.mark.parametrize(
    ("config", "reference"),
    [
        ({"activation": MoEActivation.GELU}, gelu_and_mul("none")),
        ({"activation": MoEActivation.GELU_TANH}, gelu_and_mul("tanh")),
        ({"swiglu_limit": 0.75}, clamped_swiglu(1.0, 0.0, 0.75)),
        (
            {
                "activation": MoEActivation.SWIGLUOAI_UNINTERLEAVE,
                "swiglu_limit": 0.75,
                "swiglu_alpha": 1.702,
                "swiglu_beta": 1.0,
            },
            clamped_swiglu(1.702, 1.0, 0.75),
        ),
    ],
    ids=["gelu", "gelu_tanh", "silu with clamp", "swigluoai"],
)
def test_activations(config, reference):
    shape = Shape()
    layer, checkpoint = loaded_layer(shape, torch.float16, **config)
    x = hidden_states(6, shape, torch.float16)
    weights, ids = random_routing(6, shape)
    output = run_layer(layer, x, weights, ids)
    expected = checkpoint.forward(x, weights, ids, reference)
    assert relative_error(output, expected) < TOLERANCE[torch.float16]
    # the parameters matter: plain silu gives another result
    assert relative_error(checkpoint.forward(x, weights, ids), expected) > 0.05


def test_expert_parallel_ranks_add_up():
    shape = Shape()
    x = hidden_states(5, shape, torch.bfloat16)
    weights, ids = random_routing(5, shape)
    total = torch.zeros(5, shape.hidden)
    for rank in range(2):
        layer, checkpoint = loaded_layer(shape, ep=(2, rank))
        assert layer.w13_qweight.shape[0] == shape.experts // 2
        total += run_layer(layer, x, weights, ids).float()
    assert relative_error(total, checkpoint.forward(x, weights, ids)) < 8e-3


def test_router_weight_on_input():
    shape = Shape(top_k=1)
    layer, checkpoint = loaded_layer(shape)
    layer.apply_router_weight_on_input = True
    x = hidden_states(4, shape, torch.bfloat16)
    _, ids = random_routing(4, shape)
    weights = torch.tensor([[0.5], [0.25], [1.0], [2.0]])
    output = run_layer(layer, x, weights, ids)
    expected = checkpoint.forward(x * weights, torch.ones(4, 1), ids)
    assert relative_error(output, expected) < 8e-3


def test_no_tokens():
    shape = Shape()
    layer, _ = loaded_layer(shape)
    x = hidden_states(0, shape, torch.bfloat16)
    output = run_layer(layer, x, torch.empty(0, 2), torch.empty(0, 2).int())
    assert output.shape == (0, shape.hidden)


def test_method_and_parameters_have_their_documented_names():
    layer = make_layer(Shape(), inc_config())
    assert type(layer.quant_method) is INCHybridW4A16MoEMethod
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert shapes == {
        "w13_qweight": (8, 32, 256),
        "w13_scales": (8, 4, 256),
        "w13_qzeros": (8, 4, 32),
        "w13_bias": (8, 0),
        "w2_qweight": (8, 16, 256),
        "w2_scales": (8, 2, 256),
        "w2_qzeros": (8, 2, 32),
        "w2_bias": (8, 0),
    }


def test_after_load_the_layer_holds_the_checkpoints_bytes_and_nothing_else():
    shape = Shape()
    layer = make_layer(shape, inc_config())
    kept = ("w13_qweight", "w2_qweight", "w13_scales", "w2_scales")
    loaded = {name: getattr(layer, name) for name in kept}
    addresses = {name: p.data_ptr() for name, p in loaded.items()}
    sizes = {name: p.untyped_storage().nbytes() for name, p in loaded.items()}
    assert sum(sizes.values()) == sum(
        linear["scales"].nbytes + linear["qweight"].nbytes
        for expert in Checkpoint(shape).experts
        for linear in expert.values()
    )
    Checkpoint(shape).load_into(layer)
    held = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    assert set(held) == set(kept)
    assert {name: p.data_ptr() for name, p in held.items()} == addresses
    assert {name: p.untyped_storage().nbytes() for name, p in held.items()} == sizes
    config = layer.quant_method.moe_quant_config
    assert config.w1_scale.data_ptr() == addresses["w13_scales"]
    assert config.w2_scale.data_ptr() == addresses["w2_scales"]
    assert config.w1_zp is None and config.w2_zp is None
    assert isinstance(
        layer.quant_method.moe_kernel.fused_experts, HybridW4A16MoEExperts
    )


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(
    "shape", [Shape(), Shape(8, 2, 1024, 512, 128)], ids=["small", "large"]
)
def test_repack_peak_is_at_most_one_expert(shape, symmetric):
    """The allocator's own record of the most live bytes above the start."""
    layer = make_layer(shape, inc_config(shape.group_size, sym=symmetric))
    list(layer.load_weights(Checkpoint(shape, symmetric).tensors()))
    loaded_bytes = sum(p.untyped_storage().nbytes() for p in layer.parameters())
    assert 0 < peak_of_processing(layer) <= loaded_bytes // shape.experts


def test_processing_again_changes_nothing():
    shape = Shape()
    layer, _ = loaded_layer(shape)
    before = {name: p.clone() for name, p in layer.named_parameters()}
    addresses = {name: p.data_ptr() for name, p in layer.named_parameters()}
    layer.quant_method.process_weights_after_loading(layer)
    assert {n: p.data_ptr() for n, p in layer.named_parameters()} == addresses
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("ep", [(1, 0), (2, 1)], ids=["one rank", "rank 1 of 2"])
@pytest.mark.parametrize(
    ("name", "column", "projection"),
    [
        ("w13_qzeros", 15, "gate_proj"),
        ("w13_qzeros", 16, "up_proj"),
        ("w2_qzeros", 2, "down_proj"),
    ],
)
def test_symmetric_checkpoint_with_another_zero_point_is_refused(
    name, column, projection, ep
):
    shape = Shape()
    layer = make_layer(shape, inc_config(), ep=ep)
    list(layer.load_weights(Checkpoint(shape).tensors()))
    getattr(layer, name).data[3, 1, column] = 0x77787777
    before = {n: p.clone() for n, p in layer.named_parameters()}
    expert = 3 + ep[1] * shape.experts // 2
    message = (
        rf"{LAYER_NAME}.{expert}.{projection}.qzeros holds 0x77787777, "
        r"expected 0x77777777"
    )
    with pytest.raises(ValueError, match=message):
        layer.quant_method.process_weights_after_loading(layer)
    after = dict(layer.named_parameters())
    assert set(after) == set(before)
    for n, parameter in after.items():
        assert torch.equal(parameter, before[n]), n


def test_zero_points_that_were_never_loaded_are_noticed():
    layer = make_layer(Shape(), inc_config())
    tensors = Checkpoint(Shape()).tensors()
    list(layer.load_weights((n, t) for n, t in tensors if n != "5.down_proj.qzeros"))
    with pytest.raises(ValueError, match=f"{LAYER_NAME}.5.down_proj.qzeros is not in"):
        layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.skipif(DEVICE != "cpu", reason="a custom op hides it on GPUs")
def test_apply_traces_without_graph_break():
    shape = Shape()
    layer, _ = loaded_layer(shape)
    kernel = layer.quant_method.moe_kernel
    weights, ids = (tensor.to(DEVICE) for tensor in random_routing(3, shape))

    def experts(x):
        return kernel.apply(
            x,
            layer.w13_qweight,
            layer.w2_qweight,
            weights,
            ids,
            layer.activation,
            shape.experts,
            None,
            False,
        )

    x = hidden_states(3, shape, torch.bfloat16).to(DEVICE)
    compiled = torch.compile(experts, fullgraph=True)
    assert torch.equal(compiled(x), experts(x))
