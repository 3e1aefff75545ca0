# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The bytes that a decode step reads, by part of the model: the roofline of one stream.

Counted: every weight that a token needs, once; the keys and values of its context; and
the linear-attention state, read and written. Not counted: activations, the token's own
key and value, and data that a kernel reads twice.
"""

import re
from dataclasses import dataclass

from .explain_checkpoint import (
    Checkpoint,
    CheckpointError,
    TensorInfo,
)
from .explain_layers import (
    EXPERT_TENSOR,
    UNREAD,
    ZEROS,
    ExpertsLayer,
    is_decoder,
    is_symmetric,
    suffix,
)

ROUTED = "routed experts"
SHARED = "shared experts"
ROUTER = "router"
_LM_HEAD, _EMBEDDING = "lm_head", "embedding"
_ATTENTION = "attention"
_KV = "KV cache"
_STATE = "linear attention state"
_NOT_DECODED = ("vision and audio", "draft layers (MTP)")

# A tensor belongs to the part of the first pattern that its name contains.
_PARTS = (
    (_NOT_DECODED[0], r"(?:^|\.)(?:visual|vision\w*|audio\w*|mm_\w+|multi_modal\w*)\."),
    (_NOT_DECODED[1], r"(?:^|\.)mtp\."),
    (ROUTED, r"\bexperts\."),
    (SHARED, r"\.shared_(?:expert|mlp)"),
    (ROUTER, r"\.(?:gate|router)\."),
    (_ATTENTION, r"\.(?:self_attn|linear_attn|attn|attention|mixer)\."),
    (_LM_HEAD, r"(?:^|\.)lm_head\."),
    (_EMBEDDING, r"\.(?:embed_tokens|wte|word_embeddings)\."),
    ("dense MLP", r"\.(?:mlp|feed_forward)\."),
    ("norms and others", r""),
)
# Tensors that tensor-parallel ranks do not shard.
_REPLICATED = re.compile(r"norm|\.(?:gate|router|shared_expert_gate)\.")
_KEY_VALUE = re.compile(r"\.[kv]_proj\.")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
# Bytes of the 16-bit floats that vLLM loads float32 weights as, and keeps the KV
# cache in by default.
_HALF = 2
_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Part:
    """One part of a model: bytes on disk and bytes moved per decoded token."""

    name: str
    stored_bytes: int
    """In the checkpoint's files; 0 for memory that the server allocates."""
    token_bytes: float
    """Per GPU."""


def parts(
    checkpoint: Checkpoint, layers: list[ExpertsLayer], tp_size: int, context: int
) -> list[Part]:
    """All parts of the model, in the order of the table. Their ``stored_bytes`` add up
    to the checkpoint's tensors.

    Args:
        layers: of ``expert_layers``.
        tp_size: number of tensor-parallel GPUs.
        context: tokens in the KV cache.
    """
    stored = {name: 0 for name, _ in _PARTS}
    moved = {name: 0.0 for name, _ in _PARTS}
    depth = checkpoint.value("num_hidden_layers", "n_layer", "num_layers")
    vocabulary = checkpoint.value("vocab_size")
    symmetric = is_symmetric(checkpoint)
    unread = (*UNREAD, *ZEROS) if symmetric else UNREAD
    embedding = 0.0
    for tensor in checkpoint.tensors:
        part = part_of(tensor.name, depth)
        stored[part] += tensor.nbytes
        if part in _NOT_DECODED or part == ROUTED or suffix(tensor.name) in unread:
            continue
        read = _loaded_bytes(tensor) * _share(checkpoint, tensor.name, tp_size)
        if part == _EMBEDDING:
            embedding += read
        else:
            moved[part] += read
    moved[_EMBEDDING] = embedding * tp_size / vocabulary  # one row
    if not stored[_LM_HEAD]:  # tied: the embedding, read as a whole
        moved[_LM_HEAD] = embedding
    for layer in layers:
        moved[ROUTED] += layer.loaded_bytes * layer.top_k / layer.num_experts / tp_size
    result = [Part(name, stored[name], moved[name]) for name, _ in _PARTS]
    cache, state = _cache_bytes(checkpoint, depth, tp_size, context)
    result += [Part(f"{_KV}, {context} tokens", 0, cache), Part(_STATE, 0, state)]
    return [part for part in result if part.stored_bytes or part.token_bytes]


@dataclass(frozen=True)
class HeadOption:
    """A format that the lm_head can be kept in. Bytes are per GPU."""

    name: str
    """``16-bit``, or the name in ``quantization_config``."""
    token_bytes: float
    """Of the head, without rescored rows (tens of rows of a few kB each)."""
    memory_bytes: float
    """Of the head, not counting a tied embedding."""


def head_options(checkpoint: Checkpoint, found: list[Part]) -> list[HeadOption]:
    """The lm_head's possible formats; empty if the checkpoint quantizes it already.

    Args:
        found: the result of ``parts``.
    """
    from vllm.model_executor.layers.quantization.hybrid_w4a16_head_schemes import (
        SCHEMES,
    )

    depth = checkpoint.value("num_hidden_layers", "n_layer", "num_layers")
    stored = [t for t in checkpoint.tensors if part_of(t.name, depth) == _LM_HEAD]
    head = next((part.token_bytes for part in found if part.name == _LM_HEAD), 0.0)
    if not head or any(suffix(tensor.name) != "weight" for tensor in stored):
        return []
    weights = head / _HALF
    kept = head if stored else 0.0  # a tied embedding stays as it is
    options = [HeadOption("16-bit", head, kept)]
    for name, scheme in SCHEMES.items():
        read = weights * scheme.bytes_per_weight()
        memory = read + (kept if scheme.rescored else 0.0)
        options.append(HeadOption(name, read, memory))
    return options


def part_of(name: str, depth: int) -> str:
    """The part of the model that a tensor belongs to; ``depth``: decoder layers."""
    found = _LAYER.search(name)
    part = next(part for part, pattern in _PARTS if re.search(pattern, name))
    if part != _NOT_DECODED[0] and found and not is_decoder(name, int(found[1]), depth):
        return _NOT_DECODED[1]
    # "experts" that are no layer's, such as a vision tower's, are not decoded either
    return part if part != ROUTED or EXPERT_TENSOR.match(name) else _NOT_DECODED[0]


def _loaded_bytes(tensor: TensorInfo) -> int:
    return tensor.numel * _HALF if tensor.dtype in ("F32", "F64") else tensor.nbytes


def _share(checkpoint: Checkpoint, name: str, tp_size: int) -> float:
    """The fraction of a tensor that a tensor-parallel rank holds."""
    if _REPLICATED.search(name):
        return 1.0
    if _KEY_VALUE.search(name):
        return _kv_heads(checkpoint, tp_size) / _kv_heads(checkpoint, 1)
    return 1.0 / tp_size


def _kv_heads(checkpoint: Checkpoint, tp_size: int) -> int:
    """Key/value heads per rank; at least one, whatever the number of ranks."""
    heads = checkpoint.value("num_key_value_heads", "num_attention_heads")
    return max(1, heads // tp_size)


def _layer_types(checkpoint: Checkpoint, depth: int) -> list[str]:
    interval = checkpoint.value("full_attention_interval", default=0)
    if interval:
        default = [
            "linear_attention" if (index + 1) % interval else "full_attention"
            for index in range(depth)
        ]
    else:
        default = ["full_attention"] * depth
    return checkpoint.value("layer_types", default=default)


def _cache_bytes(
    checkpoint: Checkpoint, depth: int, tp_size: int, context: int
) -> tuple[float, float]:
    """Bytes per step: KV cache (read), recurrent state (read and written)."""
    types = _layer_types(checkpoint, depth)
    window = checkpoint.value("sliding_window", default=context)
    cache = state = 0.0
    for kind in types:
        if kind == "linear_attention":
            state += 2 * _state_bytes(checkpoint, tp_size)
        elif kind in ("full_attention", "sliding_attention"):
            tokens = min(context, window) if kind == "sliding_attention" else context
            cache += tokens * _kv_token_bytes(checkpoint, tp_size)
        else:
            raise CheckpointError(
                f"{checkpoint.name}: layer type {kind!r} in config.json, known: "
                "full_attention, sliding_attention, linear_attention"
            )
    return cache, state


def _kv_token_bytes(checkpoint: Checkpoint, tp_size: int) -> int:
    """Bytes per layer and token of a 16-bit cache."""
    latent = checkpoint.value("kv_lora_rank", default=0)
    if latent:  # multi-head latent attention: one latent vector, on every rank
        return _HALF * (latent + checkpoint.value("qk_rope_head_dim"))
    head_dim = checkpoint.value("head_dim", default=0) or (
        checkpoint.value("hidden_size") // checkpoint.value("num_attention_heads")
    )
    return 2 * _HALF * _kv_heads(checkpoint, tp_size) * head_dim


def _state_bytes(checkpoint: Checkpoint, tp_size: int) -> float:
    """Recurrent and convolution state of a gated-delta-net layer."""
    keys = checkpoint.value("linear_num_key_heads")
    values = checkpoint.value("linear_num_value_heads")
    key_dim = checkpoint.value("linear_key_head_dim")
    value_dim = checkpoint.value("linear_value_head_dim")
    kernel = checkpoint.value("linear_conv_kernel_dim")
    item = _ITEM_BYTES.get(checkpoint.value("mamba_ssm_dtype", default=""), _HALF)
    recurrent = values * key_dim * value_dim * item
    channels = 2 * keys * key_dim + values * value_dim
    return (recurrent + channels * (kernel - 1) * _HALF) / tp_size
