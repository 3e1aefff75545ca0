# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""vLLM's load format ``dummy`` with random weights that make decode realistic.

vLLM's own leaves int4 weights as they are in memory and makes 16-bit weights so small
that all tokens are alike: every token would then take the same experts.
"""

import torch

from vllm.config import ModelConfig
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

# Deviation of integers drawn uniformly from -8..7 where -8 is replaced by 0.
_NIBBLE_DEVIATION = 4.18
_ONES = {torch.int32: 0x11111111, torch.uint8: 0x11}
# The symmetric zero point, 8, as GPTQ stores it: minus 1.
_ZEROS = {torch.int32: 0x77777777, torch.uint8: 0x77}
# Standard deviations by part of the name. embed_tokens: about what all layers add.
# gate: logits of the experts differ by about 2. lm_head: about 100 of 150,000 logits
# are within 8 of the largest, as in trained models. conv1d: four weights per channel.
_DEVIATIONS = {
    "embed_tokens": 1.0,
    "mlp.gate.weight": 0.05,
    "lm_head": 0.15,
    "conv1d": 0.3,
}
# Attention without training averages over the context. At full size its output would be
# most of the hidden state after some layers, and the same for all tokens.
_ATTENTION_OUTPUT = 0.1


class RandomWeights(DummyModelLoader):
    """Loads random weights; the same ones in each run and on each rank."""

    def load_weights(self, model: torch.nn.Module, model_config: ModelConfig) -> None:
        """Fill all parameters in place.

        Raises ``ValueError`` if the experts are not int4. With a quantization that
        vLLM does not know for experts, it makes 16-bit ones and says nothing.
        """
        experts = [name for name, _ in model.named_parameters() if ".experts." in name]
        if not any("qweight" in name for name in experts):
            raise ValueError(f"expected experts with qweight, got {experts[:1]}")
        super().load_weights(model, model_config)
        torch.manual_seed(0)
        # the RMSNorm of Qwen3.5 multiplies by one plus its weight
        norm = 0.0 if type(model).__name__.startswith("Qwen3_5") else 1.0
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                fill(name, parameter.data, model_config.get_hidden_size(), norm)


def fill(name: str, weight: torch.Tensor, hidden: int, norm: float) -> None:
    """Fill a parameter in place, according to its name.

    Args:
        name: as in ``named_parameters``.
        weight: any shape. Integers are packed int4 weights, zero points or g_idx.
        hidden: the model's hidden size.
        norm: what weights of norms are set to.
    """
    last = name.rpartition(".")[2]
    if weight.numel() == 0:
        return
    if "qzeros" in last:
        weight.fill_(_ZEROS[weight.dtype])
    elif "qweight" in last:
        random_int4(weight)
    elif not weight.is_floating_point() or last in ("A_log", "dt_bias"):
        weight.zero_()
    elif "scales" in last:
        scale = 1 / (_NIBBLE_DEVIATION * hidden**0.5)
        if ".o_proj." in name:
            scale *= _ATTENTION_OUTPUT
        weight.uniform_(0.5 * scale, 1.5 * scale)
    elif "linear_attn.norm" in name:
        weight.fill_(1.0)
    elif "norm" in name:
        weight.fill_(norm)
    else:
        found = (value for part, value in _DEVIATIONS.items() if part in name)
        weight.normal_(0, next(found, hidden**-0.5))


def random_int4(words: torch.Tensor) -> None:
    """Fill packed int4 weights (int32 or uint8, any shape) with 1..15, zero point 8.

    0 becomes 8: with -8 the weights' mean would not be 0, and all tokens alike.
    """
    info = torch.iinfo(words.dtype)
    words.random_(info.min, info.max + 1)
    used = words | (words >> 1) | (words >> 2) | (words >> 3)
    words |= (~used & _ONES[words.dtype]) << 3
