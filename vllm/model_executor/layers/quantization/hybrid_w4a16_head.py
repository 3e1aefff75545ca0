# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""lm_head in int8 or int4, quantized when the model is loaded.

The head is the largest read of a decoded token. ``SCHEMES`` lists what it can be kept
in. ``int4_rescored`` scans all rows in int4 and then computes those again from the
16-bit weights that could matter (``wvSplitK_int_g_rescore``):

* exact: the first token, which is that of the 16-bit head unless an error of the int4
  logits exceeds ``BOUND`` standard deviations (over 12.6 million logits of a trained
  model the largest was 5.8); and every logit within ``WINDOW`` of the largest, so also
  what is sampled among them. "Exact" means up to the order of fp32 sums;
* approximate: logits further below, each less than ``exp(-WINDOW)`` = 3e-4 as likely
  as the first token. They keep their int4 value.

With tensor parallelism each rank goes by the largest logit of its own rows: it
computes more again, never less. More than 16 rows at once (``prompt_logprobs``) take
the 16-bit weights. Other schemes free them, unless an embedding is tied to them.
"""

from typing import TYPE_CHECKING, Any

import torch

from vllm import envs
from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_device as device
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import hybrid_w4a16_dense_ops as ops
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.quantization.hybrid_w4a16_head_schemes import (
    ENV_NAME,
    SCHEMES,
    HeadScheme,
    register,
)
from vllm.model_executor.layers.quantization.online.base import (
    OnlineQuantizationConfig,
    _find_matching_targets,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(__name__)

# A patched vLLM tree has no plugin that did it: without, reading the variable fails.
register()

BOUND = 7.0
"""Standard deviations of an int4 logit's error that are allowed for."""
WINDOW = 8.0
"""Logits this close to the largest are computed in 16 bits."""

_TIED_METHOD = "_hybrid_w4a16_tied_head_method"
"""Attribute of an embedding that a quantized head is tied to."""


def lm_head_config_method(
    self: OnlineQuantizationConfig, layer: torch.nn.Module, prefix: str
) -> QuantizeMethodBase | None:
    """Hook of ``OnlineQuantizationConfig.get_quant_method``, which refuses heads.

    A head with one of our names is built and loaded in 16 bits; ``lm_head_built`` then
    takes over.
    """
    if isinstance(layer, ParallelLMHead) and _target(self, prefix) is not None:
        return UnquantizedEmbeddingMethod()
    return None


def lm_head_built(self: VocabParallelEmbedding) -> None:
    """Hook of ``VocabParallelEmbedding.update_param_tp_status``, the last step of the
    constructor and of loading weights anew: gives a head that was asked for its
    quantization method.

    Raises ``ValueError`` naming the head where it cannot have it.
    """
    if not isinstance(self, ParallelLMHead):
        tied = getattr(self, _TIED_METHOD, None)
        if tied is not None:  # what vLLM loads anew does not reach the head
            tied.is_stale = True
        return
    if isinstance(self.quant_method, HybridW4A16HeadMethod):
        return  # its weights were loaded anew
    vllm_config = get_current_vllm_config_or_none()
    online = _online_config(vllm_config)
    target = None if online is None else _target(online, self.prefix)
    if target is not None:
        pattern, name = target
        source = f"quantization_config.targets[{pattern!r}]={name}"
    else:
        name = getattr(envs, ENV_NAME)
        if name is None:
            return
        pattern, source = ENV_NAME, f"{ENV_NAME}={name}"
    scheme = SCHEMES[name]
    reason = _decline_reason(self, scheme, vllm_config)
    if reason is not None:
        raise ValueError(f"{source}: {self.prefix}: {reason}")
    self.quant_method = HybridW4A16HeadMethod(name, self.prefix)
    if online is not None:  # vLLM's line of what is quantized
        online.quantized_layers[self.prefix] = ("targets", name, pattern)


def _online_config(
    vllm_config: "VllmConfig | None",
) -> OnlineQuantizationConfig | None:
    config = None if vllm_config is None else vllm_config.quant_config
    if isinstance(config, OnlineQuantizationConfig):
        return config
    return getattr(config, "online_quantization_config", None)


def _target(online: OnlineQuantizationConfig, prefix: str) -> tuple[str, str] | None:
    """Pattern and scheme that ``targets`` gives to a head, if it is one of ours."""
    targets = online.args.targets
    if targets is None:
        return None
    matches = _find_matching_targets(prefix, targets)
    if not matches or targets[matches[0]] not in SCHEMES:
        return None
    return matches[0], targets[matches[0]]


def _decline_reason(
    layer: ParallelLMHead, scheme: HeadScheme, vllm_config: "VllmConfig | None"
) -> str | None:
    """Why the head cannot be kept in ``scheme``, ``None`` if it can."""
    method = layer.quant_method
    if not isinstance(method, (UnquantizedEmbeddingMethod, UnquantizedLinearMethod)):
        return f"the checkpoint quantizes it already ({type(method).__name__})"
    if layer.has_bias:
        return "a head with a bias is not supported"
    if layer.params_dtype not in (torch.float16, torch.bfloat16):
        return f"weights in {layer.params_dtype}, supported: fp16 and bf16"
    if layer.embedding_dim % scheme.group_size:
        return (
            f"hidden size {layer.embedding_dim} is not a multiple of the group size "
            f"{scheme.group_size}"
        )
    family = device.device_family()
    if isinstance(family, str):
        return family
    if vllm_config is not None:
        if vllm_config.lora_config is not None:
            return "LoRA is enabled, which adds to logits after the head"
        model = vllm_config.model_config
        if model is not None and model.head_dtype not in (None, model.dtype):
            return f"head_dtype {model.head_dtype} is not the model's {model.dtype}"
    return ops.load_error()


class HybridW4A16HeadMethod(QuantizeMethodBase):
    """Quantization method of an lm_head. The layer gets, padding of the vocabulary
    included (N rows)::

        qweight        see ``hybrid_w4a16_dense_ops``
        weight_scale   activation dtype [N, K//G]
        weight_error   rescored only: fp32 [N], negative for rows of padding
        weight         rescored, or tied to an embedding: as loaded, [N, K]
    """

    def __init__(self, name: str, prefix: str):
        self.scheme = SCHEMES[name]
        self.name, self.prefix = name, prefix
        self.is_tied = False
        self.is_stale = False
        """The tied embedding was loaded anew since the head was quantized."""
        self._unquantized = UnquantizedEmbeddingMethod()
        self._cu_count = 1

    def create_weights(self, layer: torch.nn.Module, *args, **kwargs) -> None:
        self._unquantized.create_weights(layer, *args, **kwargs)

    def tie_weights(
        self, layer: torch.nn.Module, embed_tokens: VocabParallelEmbedding
    ) -> torch.nn.Module:
        """The embedding keeps its weights; the head quantizes a copy of them."""
        self.is_tied = True
        setattr(embed_tokens, _TIED_METHOD, self)
        return self._unquantized.tie_weights(layer, embed_tokens)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Quantize. ``ValueError`` naming the tensor where a weight is not finite."""
        family = device.device_family()
        assert isinstance(family, device.DeviceFamily), family
        device.load_kernels(family)
        self._cu_count = family.cu_count
        for key, value in self._quantized(layer).items():
            layer.register_parameter(
                key, torch.nn.Parameter(value, requires_grad=False)
            )
        if self.scheme.rescored:
            self._unquantized.process_weights_after_loading(layer)
        elif not self.is_tied:
            del layer.weight
        self._log(layer)

    def _quantized(self, layer: Any) -> dict[str, torch.Tensor]:
        weight = layer.weight.data
        finite = weight.isfinite().all(1)
        if not finite.all():
            row = int(finite.logical_not().nonzero()[0])
            raise ValueError(
                f"{self.prefix}.weight: expected finite values, row {row} has others"
            )
        packed, scales, errors = ops.quantize(
            weight, self.scheme.bits, self.scheme.group_size
        )
        self.is_stale = False
        quantized = {"qweight": packed, "weight_scale": scales}
        if self.scheme.rescored:
            indices = layer.shard_indices
            organic, added = indices.num_org_elements, indices.num_added_elements
            errors[organic : indices.num_org_elements_padded] = -1
            errors[indices.num_org_elements_padded + added :] = -1
            quantized["weight_error"] = errors
        return quantized

    def _log(self, layer: Any) -> None:
        weights = layer.num_embeddings_per_partition * layer.embedding_dim
        scheme = self.scheme
        kept = "16-bit weights freed"
        if scheme.rescored:
            kept = "beside the 16-bit weights"
        elif self.is_tied:
            kept = "beside the embedding's 16-bit weights"
        logger.info(
            "%s: %s, %.1f MiB %s",
            self.prefix,
            self.name,
            weights * scheme.bytes_per_weight() / 2**20,
            kept,
        )

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits [..., N] of hidden states [..., K], in their dtype."""
        if bias is not None:
            raise ValueError(f"{self.prefix}: a head with a bias is not supported")
        if self.is_stale:
            for key, value in self._quantized(layer).items():
                getattr(layer, key).data.copy_(value)
        rows = x.reshape(-1, x.shape[-1])
        if self.scheme.rescored and len(rows) > ops.MAX_ROWS:
            return self._unquantized.apply(layer, x)
        logits = x.new_empty(len(rows), layer.qweight.shape[0])
        for begin in range(0, len(rows), ops.MAX_ROWS):
            part = slice(begin, begin + ops.MAX_ROWS)
            self._apply_few(layer, rows[part], logits[part])
        return logits.unflatten(0, x.shape[:-1]) if x.dim() != 2 else logits

    def _apply_few(self, layer: Any, rows: torch.Tensor, logits: torch.Tensor) -> None:
        ops.wvSplitK_int_g(
            rows,
            layer.qweight,
            layer.weight_scale,
            logits,
            self._cu_count,
            self.scheme.group_size,
            self.scheme.bits,
        )
        if self.scheme.rescored:
            partials = torch.empty(
                len(rows), 2 * ops.PARTS, dtype=torch.float32, device=rows.device
            )
            ops.wvSplitK_int_g_rescore(
                rows, layer.weight, layer.weight_error, logits, partials, WINDOW, BOUND
            )
