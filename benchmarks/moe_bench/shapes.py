# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Shapes of the routed experts of published MoE models."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MoEShape:
    """Routed experts of one layer: three int4 matrices per expert."""

    name: str
    num_experts: int
    top_k: int
    hidden: int
    intermediate: int

    @property
    def expert_weights(self) -> int:
        """Weights of one expert: gate, up and down."""
        return 3 * self.hidden * self.intermediate

    def int4_bytes(self, group_size: int) -> int:
        """Bytes of one expert's int4 weights and 16-bit scales (symmetric)."""
        return self.expert_weights // 2 + 2 * self.expert_weights // group_size


# num_local_experts / num_experts_per_tok / hidden_size / moe_intermediate_size of each
# model's published config.json
SHAPES = {
    shape.name: shape
    for shape in (
        MoEShape("qwen3-30b-a3b", 128, 8, 2048, 768),
        MoEShape("qwen3.5-35b-a3b", 256, 8, 2048, 512),
        MoEShape("qwen3-next-80b-a3b", 512, 10, 2048, 512),
        MoEShape("glm-4.5-air", 128, 8, 4096, 1408),
        MoEShape("minimax-m2", 256, 8, 3072, 1536),
        MoEShape("mixtral-8x7b", 8, 2, 4096, 14336),
    )
}


def parse_shapes(text: str) -> list[MoEShape]:
    """Parse comma-separated shapes; ``all`` stands for every shape of ``SHAPES``.

    Raises ``ValueError`` as ``parse_shape`` does.
    """
    if text == "all":
        return list(SHAPES.values())
    return [parse_shape(name) for name in text.split(",")]


def parse_shape(text: str) -> MoEShape:
    """Parse a name of ``SHAPES`` or ``experts:top_k:hidden:intermediate``.

    Raises ``ValueError`` for anything else.
    """
    if text in SHAPES:
        return SHAPES[text]
    sizes = text.split(":")
    if len(sizes) != 4 or not all(size.isdecimal() and int(size) for size in sizes):
        raise ValueError(
            f"--shapes: {text!r} is none of all, {', '.join(SHAPES)}, "
            "experts:top_k:hidden:intermediate"
        )
    num_experts, top_k, hidden, intermediate = map(int, sizes)
    if top_k > num_experts:
        raise ValueError(
            f"--shapes: {text!r}: top_k {top_k} exceeds {num_experts} experts"
        )
    return MoEShape(text, num_experts, top_k, hidden, intermediate)
