# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""lm_head in int8 or int4, quantized when the model is loaded.

The head is the largest read of a decoded token. ``SCHEMES`` lists the formats for it.
``int4_rescored`` scans all rows in int4, then recomputes the logits that could matter
from the 16-bit weights (``wvSplitK_int_g_rescore``):

* exact: the most likely token, which is that of the 16-bit head unless an error of the
  int4 logits exceeds ``BOUND`` standard deviations (the largest of 12.6 million logits
  of a trained model was 5.8); and every logit within ``WINDOW`` of the largest, and so
  also sampling among those. "Exact" means up to the order of fp32 sums;
* approximate: logits further below, each less than ``exp(-WINDOW)`` = 3e-4 as likely as
  the most likely token. They keep their int4 value. If a grammar or a bias allows only
  such tokens, the choice is that of an int4 head.

With tensor parallelism each rank uses the largest logit of its own rows, so it
recomputes more logits, never fewer. More than 16 rows at once (``prompt_logprobs``) use
the 16-bit weights, except in vLLM's batch-invariant mode. Other schemes free those,
unless an embedding is tied to them.

Drafters (MTP, EAGLE) that share the head can read it in int4 or int8 without rescoring,
whatever format the head itself has. That changes which drafts are accepted, not the
distribution of the output. Their weights are parameters of the shared head, so they are
quantized, reloaded and put to sleep with it.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from vllm import envs
from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_device as device
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_ops
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.quantization import hybrid_w4a16_dense_ops as ops
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.quantization.hybrid_w4a16_head_schemes import (
    # fork: begin overlay
    DRAFT_ATTRIBUTE,
    DRAFT_OPTION,
    DRAFT_TARGET,
    ENV_NAME,
    # fork: end
    SCHEMES,
    HeadScheme,
    # fork: begin overlay
    draft_scheme,
    # fork: end
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
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = init_logger(__name__)

BOUND = 7.0
"""Allowed error of an int4 logit, in standard deviations."""
WINDOW = 8.0
"""Logits within this distance of the largest are computed in 16 bits."""

_TIED_METHOD = "_hybrid_w4a16_tied_head_method"
"""Attribute of an embedding to which a quantized head is tied."""


def lm_head_config_method(
    self: OnlineQuantizationConfig, layer: torch.nn.Module, prefix: str
) -> QuantizeMethodBase | None:
    """The method of a head, for ``OnlineQuantizationConfig.get_quant_method``.

    A head with one of ``SCHEMES`` is built and loaded in 16 bits; ``lm_head_built``
    replaces its method afterwards. ``None`` for all other layers.
    """
    if isinstance(layer, ParallelLMHead) and _target(self, prefix) is not None:
        return UnquantizedEmbeddingMethod()
    return None


def lm_head_built(self: VocabParallelEmbedding) -> None:
    """Sets the quantization method of a head that is to be quantized.

    ``VocabParallelEmbedding.update_param_tp_status`` calls it: the last step of the
    constructor and of a weight reload.

    Raises ``ValueError`` naming the head if the scheme does not support it.
    """
    if not isinstance(self, ParallelLMHead):
        tied = getattr(self, _TIED_METHOD, None)
        if tied is not None:  # the head has a copy, which a reload does not reach
            tied.is_stale = True
        return
    if isinstance(self.quant_method, HybridW4A16HeadMethod):
        return  # its weights were reloaded
    # fork: begin overlay
    if _is_loading_drafter:
        return  # usually replaced by the target's head and then never loaded
    # fork: end
    vllm_config = get_current_vllm_config_or_none()
    online = _online_config(vllm_config)
    # fork: begin overlay
    if not hasattr(self, "prefix"):
        targets = {} if online is None else online.args.targets or {}
        if getattr(envs, ENV_NAME) is not None or set(targets.values()) & set(SCHEMES):
            raise ValueError(
                "lm_head: quantizing it needs vLLM 0.31 or newer: this version does "
                f"not tell a head its name. Remove {ENV_NAME} or the target."
            )
        return
    # fork: end
    name = pattern = None
    sources = {}
    if target := None if online is None else _target(online, self.prefix):
        pattern, name = target
        sources[name] = f"quantization_config.targets[{pattern!r}]={name}"
    # fork: begin overlay
    elif (name := getattr(envs, ENV_NAME)) is not None:
        pattern, sources[name] = ENV_NAME, f"{ENV_NAME}={name}"
    # fork: end
    draft: str | None = None
    # fork: begin overlay
    draft, source = _draft_target(vllm_config, online)
    if draft is not None:
        sources.setdefault(draft, source)
    # fork: end
    for scheme, source in sources.items():
        reason = _decline_reason(self, SCHEMES[scheme], vllm_config)
        if reason is not None:
            raise ValueError(f"{source}: {self.prefix}: {reason}")
    if not sources:
        return
    self.quant_method = HybridW4A16HeadMethod(name, self.prefix, draft)
    if online is not None and name is not None:  # for vLLM's log of quantized layers
        online.quantized_layers[self.prefix] = ("targets", name, pattern)


# fork: begin overlay
def _draft_target(
    vllm_config: "VllmConfig | None", online: OnlineQuantizationConfig | None
) -> tuple[str | None, str]:
    """The scheme for drafters that share the head, and the option that set it."""
    speculative = None if vllm_config is None else vllm_config.speculative_config
    if speculative is None:
        return None, ""
    name = getattr(speculative, DRAFT_ATTRIBUTE, None)
    if name is not None:
        return name, f"speculative_config.{DRAFT_OPTION}={name}"
    name = None if online is None else (online.args.targets or {}).get(DRAFT_TARGET)
    source = f"quantization_config.targets[{DRAFT_TARGET!r}]={name}"
    if name is not None and draft_scheme(name) is None:
        raise ValueError(f"{source}: {_draft_names()}")
    return name, source


def _draft_names() -> str:
    names = [name for name in SCHEMES if draft_scheme(name) is not None]
    return f"expected one of {', '.join(names)}: drafts are not rescored"


_is_loading_drafter = False


@contextlib.contextmanager
def _loading_drafter() -> Iterator[None]:
    global _is_loading_drafter
    _is_loading_drafter = True
    try:
        yield
    finally:
        _is_loading_drafter = False


def draft_model_loaded(
    self: BaseModelLoader,
    vllm_config: "VllmConfig",
    model_config: "ModelConfig",
    prefix: str = "",
) -> torch.nn.Module | None:
    """Hook of ``BaseModelLoader.load_model``: a drafter's own head keeps the format of
    the checkpoint. If vLLM replaces it by the target's head afterwards, the drafter's
    logits come from that head's weights for drafts.
    """
    speculative = vllm_config.speculative_config
    if (
        _is_loading_drafter
        or speculative is None
        or model_config is vllm_config.model_config
        or model_config is not speculative.draft_model_config
    ):
        return None
    with _loading_drafter():
        model = self.load_model(vllm_config, model_config, prefix)
    draft, source = _draft_target(vllm_config, _online_config(vllm_config))
    if draft is None:
        return model
    if getattr(model, "has_own_lm_head", False):
        logger.warning(
            "%s: the drafter brings an lm_head of its own, which stays in 16 bits",
            source,
        )
    for module in model.modules():
        if isinstance(module, LogitsProcessor):
            apply_head = functools.partial(_apply_draft_head, module._apply_head)
            object.__setattr__(module, "_apply_head", apply_head)
    return model


def _apply_draft_head(
    stock: Callable[..., torch.Tensor],
    lm_head: ParallelLMHead,
    hidden_states: torch.Tensor,
    embedding_bias: torch.Tensor | None,
) -> torch.Tensor:
    """``LogitsProcessor._apply_head`` for a drafter."""
    method = lm_head.quant_method
    if embedding_bias is None and isinstance(method, HybridW4A16HeadMethod):
        return method.apply_draft(lm_head, hidden_states)
    return stock(lm_head, hidden_states, embedding_bias)


# fork: end
def _online_config(
    vllm_config: "VllmConfig | None",
) -> OnlineQuantizationConfig | None:
    config = None if vllm_config is None else vllm_config.quant_config
    if isinstance(config, OnlineQuantizationConfig):
        return config
    return getattr(config, "online_quantization_config", None)


def _target(online: OnlineQuantizationConfig, prefix: str) -> tuple[str, str] | None:
    """The pattern and scheme of a head in ``targets``, if it is one of ``SCHEMES``."""
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
    """Why the head cannot be quantized with ``scheme``; ``None`` if it can."""
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
    """Quantization method of an lm_head. The layer gets these tensors, where N includes
    the padding of the vocabulary::

        qweight        see ``hybrid_w4a16_dense_ops``
        weight_scale   activation dtype [N, K//G]
        weight_error   rescored only: fp32 [N], negative for rows of padding
        weight         rescored, 16-bit, or tied to an embedding: as loaded, [N, K]
        draft_qweight, draft_weight_scale
                       for drafters, if they use another scheme

    Args:
        name: scheme of the head; ``None``: 16 bits.
        prefix: the layer's name, for messages.
        draft: scheme for drafters; ``None``: the same as the target's.
    """

    def __init__(self, name: str | None, prefix: str, draft: str | None = None):
        self.scheme = None if name is None else SCHEMES[name]
        self.name, self.prefix = name, prefix
        self.draft = None if draft is None else SCHEMES[draft]
        self.draft_name = draft
        self.is_tied = False
        self.is_stale = False
        """Whether the tied embedding was reloaded since the head was quantized."""
        self._unquantized = UnquantizedEmbeddingMethod()
        self._cu_count = 1

    @property
    def _draft_has_own_weights(self) -> bool:
        if self.draft is None or self.scheme is None:
            return self.draft is not None
        same = (self.draft.bits, self.draft.group_size)
        return same != (self.scheme.bits, self.scheme.group_size)

    @property
    def _keeps_weight(self) -> bool:
        return self.scheme is None or self.scheme.rescored

    def create_weights(self, layer: torch.nn.Module, *args, **kwargs) -> None:
        """Register the 16-bit weight, as for a head that is not quantized."""
        self._unquantized.create_weights(layer, *args, **kwargs)

    def tie_weights(
        self, layer: torch.nn.Module, embed_tokens: VocabParallelEmbedding
    ) -> torch.nn.Module:
        """The embedding keeps its weights; the head quantizes a copy of them."""
        self.is_tied = True
        setattr(embed_tokens, _TIED_METHOD, self)
        return self._unquantized.tie_weights(layer, embed_tokens)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Quantize the head.

        Raises ``ValueError`` naming the tensor if a weight is not finite.
        """
        family = device.device_family()
        assert isinstance(family, device.DeviceFamily), family
        device.load_kernels(family)
        self._cu_count = family.cu_count
        for key, value in self._quantized(layer).items():
            layer.register_parameter(
                key, torch.nn.Parameter(value, requires_grad=False)
            )
        if self._keeps_weight:
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
        self.is_stale = False
        quantized: dict[str, torch.Tensor] = {}
        if self.draft is not None and self._draft_has_own_weights:
            packed, scales, _ = ops.quantize(
                weight, self.draft.bits, self.draft.group_size
            )
            quantized |= {"draft_qweight": packed, "draft_weight_scale": scales}
        if self.scheme is None:
            return quantized
        packed, scales, errors = ops.quantize(
            weight, self.scheme.bits, self.scheme.group_size
        )
        quantized |= {"qweight": packed, "weight_scale": scales}
        if self.scheme.rescored:
            indices = layer.shard_indices
            organic, added = indices.num_org_elements, indices.num_added_elements
            errors[organic : indices.num_org_elements_padded] = -1
            errors[indices.num_org_elements_padded + added :] = -1
            quantized["weight_error"] = errors
        return quantized

    def _log(self, layer: Any) -> None:
        weights = layer.num_embeddings_per_partition * layer.embedding_dim
        kept = "16-bit weights freed"
        if self._keeps_weight:
            kept = "beside the 16-bit weights"
        elif self.is_tied:
            kept = "beside the embedding's 16-bit weights"
        if self.scheme is not None:
            mib = weights * self.scheme.bytes_per_weight() / 2**20
            logger.info("%s: %s, %.1f MiB %s", self.prefix, self.name, mib, kept)
        if self.draft is not None:
            mib = weights * self.draft.bytes_per_weight() / 2**20
            if not self._draft_has_own_weights:
                mib = 0.0
            logger.info(
                "%s: drafters read %s, %.1f MiB more",
                self.prefix,
                self.draft_name,
                mib,
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
        if self.scheme is None:
            return self._unquantized.apply(layer, x)
        self._follow_tied(layer)
        many = x.numel() > ops.MAX_ROWS * x.shape[-1]
        if self.scheme.rescored and many and not hybrid_w4a16_ops.row_invariant():
            return self._unquantized.apply(layer, x)
        return self._apply(
            layer,
            x,
            layer.qweight,
            layer.weight_scale,
            self.scheme,
            self.scheme.rescored,
        )

    def apply_draft(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        """As ``apply`` without a bias, for a drafter that shares the head."""
        if self.draft is None:
            return self.apply(layer, x)
        self._follow_tied(layer)
        key = "draft_" if self._draft_has_own_weights else ""
        packed = getattr(layer, f"{key}qweight")
        scales = getattr(layer, f"{key}weight_scale")
        return self._apply(layer, x, packed, scales, self.draft, False)

    def _follow_tied(self, layer: Any) -> None:
        if self.is_stale:
            for key, value in self._quantized(layer).items():
                getattr(layer, key).data.copy_(value)

    def _apply(
        self,
        layer: Any,
        x: torch.Tensor,
        packed: torch.Tensor,
        scales: torch.Tensor,
        scheme: HeadScheme,
        rescored: bool,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        logits = x.new_empty(len(rows), packed.shape[0])
        for begin in range(0, len(rows), ops.MAX_ROWS):
            part = slice(begin, begin + ops.MAX_ROWS)
            ops.wvSplitK_int_g(
                rows[part],
                packed,
                scales,
                logits[part],
                self._cu_count,
                scheme.group_size,
                scheme.bits,
            )
            if rescored:
                self._rescore(layer, rows[part], logits[part])
        return logits.unflatten(0, x.shape[:-1]) if x.dim() != 2 else logits

    @staticmethod
    def _rescore(layer: Any, rows: torch.Tensor, logits: torch.Tensor) -> None:
        partials = torch.empty(
            len(rows), 2 * ops.PARTS, dtype=torch.float32, device=rows.device
        )
        ops.wvSplitK_int_g_rescore(
            rows, layer.weight, layer.weight_error, logits, partials, WINDOW, BOUND
        )
