# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Damaged checkpoints: hundreds of mutations of a layer's tensors and of the config.

Each ends in an exception that names the damage, or in the output that the mutated
checkpoint represents; never in a crash or a silent error.
"""

import re

import numpy as np
import pytest
import torch

from ..support.int4_formats import FORMATS
from ..support.moe_layers import (
    LAYER_NAME,
    Checkpoint,
    Shape,
    make_layer,
    quant_config,
    random_routing,
    relative_error,
    run_layer,
)

SHAPE = Shape(experts=4, hidden=128, intermediate=128, group_size=32)
CASES = [
    (format, symmetric)
    for format in FORMATS
    for symmetric in (True, False)
    if symmetric or not format.startswith("gptq")
]
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
SEEDS = range(52)  # for each of the ten cases: 520 mutations


class Mutation:
    """A change of one layer's tensors.

    Attributes:
            tensors: (name, tensor) in the order of loading.
            named: what the error must mention; ``None`` if the checkpoint is as good as
                before, or has another meaning.
            reference: the checkpoint that the tensors represent after the mutation.
    """

    def __init__(self, format: str, symmetric: bool, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.reference = Checkpoint(SHAPE, symmetric, seed, format)
        self.symmetric = symmetric
        self.tensors = dict(self.reference.tensors())
        self.named: list[str] | None = None
        kinds = [name for name in dir(self) if name.startswith("mutate_")]
        self.kind = kinds[seed % len(kinds)]
        getattr(self, self.kind)()

    def pick(self, suffix: str | None = None) -> tuple[str, str]:
        """Return a tensor's name, and the part after the layer's name in errors."""
        names = [
            name
            for name in self.tensors
            if not name.endswith("weight_shape")
            and (suffix is None or name.endswith("." + suffix))
        ]
        name = names[self.rng.integers(len(names))]
        return name, f"{LAYER_NAME}.{name}"

    def mutate_shape_smaller(self) -> None:
        name, text = self.pick()
        dim = self.rng.integers(2)
        size = self.tensors[name].shape[dim]
        self.tensors[name] = self.tensors[name].narrow(dim, 0, max(1, size // 2))
        self.named = [text, "has shape", "expected"]

    def mutate_shape_one_more(self) -> None:
        name, text = self.pick()
        tensor = self.tensors[name]
        self.tensors[name] = torch.cat([tensor, tensor[:1]])
        self.named = [text, "has shape", "expected"]

    def mutate_shape_empty(self) -> None:
        name, text = self.pick()
        self.tensors[name] = self.tensors[name][:0]
        self.named = [text, "has shape", "expected"]

    def mutate_dimensions(self) -> None:
        name, text = self.pick()
        flat = self.rng.integers(2)
        tensor = self.tensors[name]
        self.tensors[name] = tensor.flatten() if flat else tensor[None, None]
        self.named = [text, "has shape", "expected"]

    def mutate_transposed(self) -> None:
        name, text = self.pick()
        tensor = self.tensors[name]
        self.tensors[name] = tensor.t().contiguous()
        if tensor.shape[0] != tensor.shape[1]:
            self.named = [text, "has shape", "expected"]
        else:
            self.named = []

    def mutate_dtype_of_words(self) -> None:
        name, text = self.pick(self.reference.format.qweight)
        wrong = [torch.int64, torch.int16, torch.uint8, torch.float16, torch.float32]
        dtype = wrong[self.rng.integers(len(wrong))]
        self.tensors[name] = self.tensors[name].to(dtype)
        self.named = [text, str(dtype), "expected torch.int32"]

    def mutate_dtype_of_scales(self) -> None:
        name, text = self.pick(self.reference.format.scales)
        wrong = [torch.int32, torch.int8, torch.float64, torch.float8_e4m3fn]
        dtype = wrong[self.rng.integers(len(wrong))]
        self.tensors[name] = self.tensors[name].to(dtype)
        self.named = [text, str(dtype), "expected"]

    def mutate_dtype_of_scales_that_is_fine(self) -> None:
        name, _ = self.pick(self.reference.format.scales)
        self.tensors[name] = self.tensors[name].float()

    def mutate_scale_not_a_number(self) -> None:
        name, text = self.pick(self.reference.format.scales)
        tensor = self.tensors[name].clone()
        bad = [float("nan"), float("inf"), float("-inf")][self.rng.integers(3)]
        tensor.view(-1)[self.rng.integers(tensor.numel())] = bad
        self.tensors[name] = tensor
        self.named = [f"{text} holds", "finite"]

    def mutate_scales_of_zeros(self) -> None:
        name, text = self.pick(self.reference.format.scales)
        self.tensors[name] = torch.zeros_like(self.tensors[name])
        self.named = [f"{text} holds nothing but zeros"]

    def mutate_expert_too_many(self) -> None:
        name, _ = self.pick()
        other = f"{SHAPE.experts}.{name.partition('.')[2]}"
        self.tensors[other] = self.tensors[name]
        self.named = [f"{LAYER_NAME}.{other} is in the checkpoint", "has 4 experts"]

    def mutate_word_of_zeros(self) -> None:
        zeros = self.reference.format.zeros
        if not any(name.endswith(zeros) for name in self.tensors):
            return self.mutate_missing()
        name, text = self.pick(zeros)
        expert, projection, _ = name.split(".")
        array = self.tensors[name].numpy().copy()
        where = self.rng.integers(array.size)
        array.flat[where] ^= np.int32(1) << np.int32(self.rng.integers(31))
        self.tensors[name] = torch.from_numpy(array)
        if self.symmetric:
            self.named = [f"{text} holds 0x", "expected"]
        else:  # another number, equally valid
            self.reference.experts[int(expert)][projection][zeros] = array
        return None

    def mutate_word_of_weights(self) -> None:
        name, _ = self.pick(self.reference.format.qweight)
        expert, projection, suffix = name.split(".")
        array = self.tensors[name].numpy().copy()
        array.flat[self.rng.integers(array.size)] ^= np.int32(0x12345678)
        self.tensors[name] = torch.from_numpy(array)
        self.reference.experts[int(expert)][projection][suffix] = array

    def mutate_missing(self) -> None:
        name, text = self.pick()
        del self.tensors[name]
        self.named = [text, "is not in the checkpoint"]

    def mutate_missing_projection(self) -> None:
        expert = self.rng.integers(SHAPE.experts)
        projection = PROJECTIONS[self.rng.integers(3)]
        prefix = f"{expert}.{projection}."
        for name in [name for name in self.tensors if name.startswith(prefix)]:
            del self.tensors[name]
        self.named = [f".{expert}.{projection}.", "is not in the checkpoint"]

    def mutate_missing_expert(self) -> None:
        expert = self.rng.integers(SHAPE.experts)
        for name in [name for name in self.tensors if name.startswith(f"{expert}.")]:
            del self.tensors[name]
        self.named = [
            f"{LAYER_NAME}.{expert}.",
            "and 8 more" if self.has_zeros else "more",
        ]

    @property
    def has_zeros(self) -> bool:
        return any(name.endswith(self.reference.format.zeros) for name in self.tensors)

    def mutate_everything_missing(self) -> None:
        self.tensors = {}
        self.named = [f"{LAYER_NAME}.0.", "is not in the checkpoint"]

    def mutate_renamed(self) -> None:
        name, text = self.pick()
        self.tensors[name + "_of_old"] = self.tensors.pop(name)
        self.named = ["_of_old"]

    def mutate_bias(self) -> None:
        expert = self.rng.integers(SHAPE.experts)
        projection = PROJECTIONS[self.rng.integers(3)]
        bias = torch.zeros(128)
        bias[self.rng.integers(128)] = 1
        self.tensors[f"{expert}.{projection}.bias"] = bias
        self.named = [f".{expert}.{projection}.bias is not zero"]

    def mutate_bias_of_zeros(self) -> None:
        for expert in range(SHAPE.experts):
            self.tensors[f"{expert}.gate_proj.bias"] = torch.zeros(128)

    def mutate_twice(self) -> None:
        name, text = self.pick()
        self.again = (name, self.tensors[name])
        self.named = [text, "more than once"]

    again: tuple[str, torch.Tensor] | None = None

    def mutate_order(self) -> None:
        names = list(self.tensors)
        self.rng.shuffle(names)
        self.tensors = {name: self.tensors[name] for name in names}

    def load(self):
        tensors = [*self.tensors.items()]
        if self.again is not None:
            tensors.append(self.again)
        config = quant_config(
            self.reference.format.name, SHAPE.group_size, self.symmetric
        )
        layer = make_layer(SHAPE, config)
        list(layer.load_weights(tensors))
        layer.quant_method.process_weights_after_loading(layer)
        return layer


@pytest.mark.parametrize(
    ("format", "symmetric"),
    CASES,
    ids=[f"{name}-{'sym' if symmetric else 'asym'}" for name, symmetric in CASES],
)
@pytest.mark.parametrize("seed", SEEDS)
def test_mutated_tensors(format, symmetric, seed):
    mutation = Mutation(format, symmetric, seed)
    if mutation.named is not None and mutation.named:
        with pytest.raises((ValueError, AttributeError)) as error:
            mutation.load()
        message = str(error.value)
        assert LAYER_NAME in message, mutation.kind
        for text in mutation.named:
            assert text in message, (mutation.kind, message)
        return
    layer = mutation.load()
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, SHAPE.hidden, generator=generator).to(torch.bfloat16)
    weights, ids = random_routing(3, SHAPE)
    if mutation.named == []:  # a square tensor: transposed, still a checkpoint
        assert run_layer(layer, x, weights, ids).isfinite().all()
        return
    expected = mutation.reference.forward(x, weights, ids)
    assert relative_error(run_layer(layer, x, weights, ids), expected) < 8e-3


def test_every_kind_of_mutation_is_among_them():
    kinds = {Mutation("awq", True, seed).kind for seed in SEEDS}
    assert len(kinds) == sum(name.startswith("mutate_") for name in dir(Mutation))


def test_symmetric_zero_points_in_a_checkpoint_that_is_not_called_so():
    checkpoint = Checkpoint(SHAPE)
    layer = make_layer(SHAPE, quant_config("auto_round:auto_gptq", 32, False))
    checkpoint.load_into(layer)
    x = torch.randn(3, SHAPE.hidden).to(torch.bfloat16)
    weights, ids = random_routing(3, SHAPE)
    expected = checkpoint.forward(x, weights, ids)
    assert relative_error(run_layer(layer, x, weights, ids), expected) < 8e-3


# The config's settings, while the tensors are symmetric with group size 32.
CONFIGS = {
    "auto_round:auto_gptq": [
        {"group_size": 64},
        {"group_size": 128},
        {"packing_format": "auto_round:auto_awq"},
        {"bits": 8},
        {"bits": "4"},
        {"bits": 0},
        {"group_size": 0},
        {"group_size": "32"},
        {"packing_format": "auto_round:nonsense"},
        {"data_type": "fp4"},
    ],
    "gptq": [
        {"group_size": 64},
        {"checkpoint_format": "gptq_v2"},
        {"checkpoint_format": "nonsense"},
        {"checkpoint_format": 7},
        {"sym": False},
        {"desc_act": True},
        {"bits": 3},
        {"group_size": 0},
        {"dynamic": {"+:.*": {"group_size": 64}}},
    ],
    "awq": [
        {"group_size": 64},
        {"version": "gemv"},
        {"bits": 8},
        {"group_size": -1},
    ],
    "compressed-tensors": [
        {"config_groups": {}},
        *(
            {
                "config_groups": {
                    "group_0": {
                        "targets": ["Linear"],
                        "weights": {
                            "num_bits": 4,
                            "type": "int",
                            "strategy": "group",
                            "group_size": 32,
                            "symmetric": True,
                            **change,
                        },
                    }
                }
            }
            for change in (
                {"group_size": 64},
                {"symmetric": False},
                {"num_bits": 8},
                {"num_bits": "many"},
                {"strategy": "channel", "group_size": None},
                {"type": "float"},
                {"actorder": "group"},
                {"group_size": 0},
            )
        ),
    ],
}
CONFIG_CASES = [
    (format, index)
    for format, changes in CONFIGS.items()
    for index in range(len(changes))
]


@pytest.mark.parametrize(("format", "index"), CONFIG_CASES)
def test_config_that_does_not_fit_the_tensors(format, index, monkeypatch):
    """An error under "require": no layer runs with wrong settings of the config."""
    monkeypatch.setenv("VLLM_HYBRID_W4A16_MOE", "require")
    change = CONFIGS[format][index]
    checkpoint = Checkpoint(SHAPE, True, format=format)
    # vLLM's config classes and pydantic raise any kind of exception, including bare
    # assertions.
    with pytest.raises(Exception) as error:  # noqa: B017, PT011
        config = quant_config(format, 32, **change)
        layer = make_layer(SHAPE, config)
        checkpoint.load_into(layer)
    assert re.search(
        r"layer|[Uu]nsupported|supports|validation error|desc_act|activation ordering|"
        r"group_size|Scheme|^AssertionError: $",
        f"{error.typename}: {error.value}",
    ), error.value
