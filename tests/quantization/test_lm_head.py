# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""lm_head layers as vLLM builds them: which are quantized, memory, logits, refusals."""

import types

import pytest
import torch

# fork: begin overlay
import vllm

# fork: end
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.quantization import QuantizationConfigArgs
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.quantization import hybrid_w4a16_dense_ops as ops
from vllm.model_executor.layers.quantization import hybrid_w4a16_head
from vllm.model_executor.layers.quantization.hybrid_w4a16_head import (
    BOUND,
    WINDOW,
    HybridW4A16HeadMethod,
    # fork: begin overlay
    draft_model_loaded,
    # fork: end
)
from vllm.model_executor.layers.quantization.hybrid_w4a16_head_schemes import (
    # fork: begin overlay
    DRAFT_ATTRIBUTE,
    DRAFT_TARGET,
    ENV_NAME,
    # fork: end
    SCHEMES,
    # fork: begin overlay
    draft_head_config,
    # fork: end
)
from vllm.model_executor.layers.quantization.online.base import OnlineQuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from ..support.moe_layers import (
    DEVICE,
    become_the_only_rank,
    inc_config,
)

# fork: begin overlay
pytestmark = pytest.mark.skipif(
    vllm.__version__.startswith("0.30."), reason="vLLM 0.30 does not name its heads"
)
# fork: end
VOCABULARY, HIDDEN = 1000, 256  # padded to 1024
PREFIX = "lm_head"


@pytest.fixture(scope="module", autouse=True)
def _one_process(tmp_path_factory):
    become_the_only_rank(tmp_path_factory.mktemp("distributed"))


def make_head(name, base=None, dtype=torch.bfloat16, tied=False, **options):
    """Make a head under construction, as a model's constructor does.

    name: a scheme, or the whole ``targets``. base: the checkpoint's quantization;
    ``None`` means 16 bits.
    """
    config = VllmConfig()
    if name is not None:
        targets = name if isinstance(name, dict) else {PREFIX: name}
        online = OnlineQuantizationConfig(QuantizationConfigArgs(targets=targets))
        if base is not None:
            base.online_quantization_config = online
        config.quant_config = base or online
    for key in [key for key in options if hasattr(config, key)]:
        object.__setattr__(config, key, options.pop(key))
    hidden = options.pop("hidden", HIDDEN)
    quant_config = config.quant_config
    with set_current_vllm_config(config), torch.device(DEVICE):
        head = ParallelLMHead(
            VOCABULARY,
            hidden,
            params_dtype=dtype,
            quant_config=quant_config,
            prefix=PREFIX,
            **options,
        )
        embedding = VocabParallelEmbedding(VOCABULARY, hidden, dtype)
        if tied:
            head = head.tie_weights(embedding)
    weight = torch.randn(VOCABULARY, hidden, dtype=torch.float32).to(dtype)
    (embedding if tied else head).weight.data.zero_()
    (embedding if tied else head).weight.data[:VOCABULARY] = weight.to(DEVICE)
    return types.SimpleNamespace(
        head=head, embedding=embedding, weight=weight, quant_config=quant_config
    )


def logits_of(made, rows):
    x = torch.randn(rows, made.weight.shape[1]).to(made.weight.dtype)
    x += made.weight[torch.randint(0, VOCABULARY, (rows,))]
    got = made.head.quant_method.apply(made.head, x.to(DEVICE)).cpu()
    return got[:, :VOCABULARY], x.double() @ made.weight.double().T


def finish(made):
    made.head.quant_method.process_weights_after_loading(made.head)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("base", [None, "auto-round"])
@pytest.mark.parametrize("name", SCHEMES)
def test_logits_memory_and_summary(name, base, tied):
    made = make_head(name, inc_config() if base else None, tied=tied)
    method, scheme = made.head.quant_method, SCHEMES[name]
    assert isinstance(method, HybridW4A16HeadMethod) and method.name == name
    finish(made)
    limit = {8: 0.01, 4: 0.15}[scheme.bits]
    for rows in (1, 16, 40):  # the last exceeds the rows of one call
        got, exact = logits_of(made, rows)
        assert got.shape == exact.shape
        error = (got.double() - exact).norm() / exact.norm()
        assert error < limit
        if scheme.rescored:
            assert torch.equal(got.argmax(1), exact.bfloat16().argmax(1))
    kept = sum(p.numel() * p.element_size() for p in made.head.parameters())
    rows = made.head.num_embeddings_per_partition
    expected = rows * HIDDEN * scheme.bytes_per_weight()
    if scheme.rescored or tied:
        expected += rows * HIDDEN * 2 + (4 * rows if scheme.rescored else 0)
    assert kept == expected
    online = made.quant_config
    online = getattr(online, "online_quantization_config", None) or online
    assert online.quantized_layer_summaries == [
        f"lm_head: 1 (from targets: lm_head, {name})"
    ]


def test_padding_of_the_vocabulary_is_not_looked_at():
    made = make_head("int4_rescored")
    finish(made)
    missing = made.head.weight_error < 0
    assert missing[VOCABULARY:].all() and not missing[:VOCABULARY].any()


def test_rescoring_is_what_the_docstring_says():
    made = make_head("int4_rescored")
    finish(made)
    head = made.head
    x = torch.randn(8, HIDDEN).bfloat16().to(DEVICE)
    quantized = torch.empty(8, len(head.qweight), dtype=x.dtype, device=DEVICE)
    ops.wvSplitK_int_g(x, head.qweight, head.weight_scale, quantized, 1, 128, 4)
    got = head.quant_method.apply(head, x)
    asked = ops.rescored_rows(x, head.weight_error, quantized, WINDOW, BOUND)
    assert torch.equal(got[~asked], quantized[~asked])
    exact = x.double() @ head.weight.double().T
    assert ((got.double() - exact).abs() <= exact.abs() * 2**-7 + 1e-4)[asked].all()


def test_a_tied_head_follows_its_embedding():
    """The situation after reload_weights, which updates only the embedding."""
    made = make_head("int4_rescored", tied=True)
    finish(made)
    before = made.head.qweight.data_ptr()
    made.weight = torch.randn_like(made.weight)
    made.embedding.weight.data[:VOCABULARY].copy_(made.weight)
    made.embedding.update_param_tp_status()  # vLLM calls this after loading a layer
    got, exact = logits_of(made, 4)
    assert torch.equal(got.argmax(1), exact.bfloat16().argmax(1))
    assert made.head.qweight.data_ptr() == before


def test_off_by_default():
    assert isinstance(make_head(None).head.quant_method, UnquantizedEmbeddingMethod)


# fork: begin overlay
def test_the_variable_says_the_same(monkeypatch):
    monkeypatch.setenv(ENV_NAME, "int8_g32")
    method = make_head(None).head.quant_method
    assert isinstance(method, HybridW4A16HeadMethod) and method.name == "int8_g32"


def test_a_vllm_whose_heads_have_no_name(monkeypatch):
    """As vLLM 0.30 calls it: an error where it was asked for, nothing elsewhere."""
    head = ParallelLMHead.__new__(ParallelLMHead)
    torch.nn.Module.__init__(head)
    head.quant_method = UnquantizedEmbeddingMethod()
    with set_current_vllm_config(VllmConfig()):
        hybrid_w4a16_head.lm_head_built(head)
        assert isinstance(head.quant_method, UnquantizedEmbeddingMethod)
        monkeypatch.setenv(ENV_NAME, "int8_g32")
        with pytest.raises(ValueError, match="lm_head: .* needs vLLM 0.31 or newer"):
            hybrid_w4a16_head.lm_head_built(head)


# fork: end
def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="targets.lm_head. = int4_g99 is not a valid"):
        QuantizationConfigArgs(targets={"lm_head": "int4_g99"})


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(bias=True), "lm_head: a head with a bias is not supported"),
        (dict(dtype=torch.float32), "lm_head: weights in torch.float32, supported"),
        (dict(hidden=288), "hidden size 288 is not a multiple of the group size 128"),
        (dict(lora_config=object()), "lm_head: LoRA is enabled"),
        (
            dict(
                model_config=types.SimpleNamespace(
                    head_dtype=torch.float32, dtype=torch.bfloat16
                )
            ),
            "head_dtype torch.float32 is not the model's torch.bfloat16",
        ),
    ],
)
def test_heads_that_are_declined(options, reason):
    with pytest.raises(ValueError, match=reason) as error:
        make_head("int4_rescored", **options)
    assert "quantization_config.targets['lm_head']=int4_rescored" in str(error.value)


def test_weights_that_are_not_finite_are_refused():
    made = make_head("int8_g32")
    made.head.weight.data[7, 3] = float("inf")
    with pytest.raises(ValueError, match="lm_head.weight: expected finite.* row 7 has"):
        finish(made)


# fork: begin overlay
class Drafter(torch.nn.Module):
    """As MTP and EAGLE models: a head of its own, until vLLM gives it the target's."""

    def __init__(self):
        super().__init__()
        self.lm_head = ParallelLMHead(
            VOCABULARY, HIDDEN, params_dtype=torch.bfloat16, prefix=PREFIX
        )
        self.logits_processor = LogitsProcessor(VOCABULARY)

    def compute_logits(self, x):
        return self.logits_processor(self.lm_head, x)


class DrafterLoader:
    """Stands in for vLLM's loader, whose hook calls it."""

    def load_model(self, vllm_config, model_config, prefix=""):
        with set_current_vllm_config(vllm_config), torch.device(DEVICE):
            return Drafter()


def load_drafter(**speculative):
    speculative.setdefault("draft_model_config", object())
    config = VllmConfig()
    asked = types.SimpleNamespace(**speculative)
    object.__setattr__(config, "speculative_config", asked)
    return draft_model_loaded(DrafterLoader(), config, asked.draft_model_config)


@pytest.mark.parametrize("draft", ["int4_g128", "int8_g32"])
@pytest.mark.parametrize("name", [None, "int4_rescored", "int8_g32"])
def test_a_drafter_reads_the_shared_head_in_its_own_scheme(monkeypatch, name, draft):
    asked = {DRAFT_ATTRIBUTE: draft}
    made = make_head(name, speculative_config=types.SimpleNamespace(**asked))
    finish(made)
    if name is not None:  # a drafter's own head is left alone, whatever is asked for
        monkeypatch.setenv(ENV_NAME, name)
    drafter = load_drafter(**asked)
    assert isinstance(drafter.lm_head.quant_method, UnquantizedEmbeddingMethod)
    own = {n for n, _ in made.head.named_parameters() if n.startswith("draft_")}
    shares = SCHEMES.get(name) and name.split("_")[0] == draft.split("_")[0]
    assert own == (set() if shares else {"draft_qweight", "draft_weight_scale"})

    drafter.lm_head = made.head
    x = torch.randn(3, HIDDEN).bfloat16().to(DEVICE)
    scheme = SCHEMES[draft]
    packed, scales, _ = ops.quantize(
        made.head.weight.data if hasattr(made.head, "weight") else padded(made),
        scheme.bits,
        scheme.group_size,
    )
    expected = x.float() @ ops.dequantize(packed, scales, scheme.bits).T
    got = drafter.compute_logits(x)
    assert torch.allclose(got.float(), expected[:, :VOCABULARY], rtol=0.02, atol=0.05)
    # The target's own logits are what they are without a drafter.
    alone = make_head(name)
    alone.head.weight.data.copy_(padded(made))
    finish(alone)
    of_target = made.head.quant_method.apply(made.head, x)
    assert torch.equal(of_target, alone.head.quant_method.apply(alone.head, x))


def padded(made):
    weight = torch.zeros(len(made.embedding.weight), HIDDEN, dtype=torch.bfloat16)
    weight[:VOCABULARY] = made.weight
    return weight.to(DEVICE)


def test_a_drafter_with_a_head_of_its_own_is_warned_about(monkeypatch):
    warnings = []
    monkeypatch.setattr(
        hybrid_w4a16_head.logger, "warning", lambda text, *a: warnings.append(text % a)
    )
    monkeypatch.setattr(Drafter, "has_own_lm_head", True, raising=False)
    drafter = load_drafter(**{DRAFT_ATTRIBUTE: "int4_g128"})
    (warning,) = warnings
    assert "brings an lm_head of its own" in warning
    x = torch.randn(1, HIDDEN).bfloat16().to(DEVICE)
    own = drafter.lm_head
    own.weight.data.normal_()
    own.quant_method.process_weights_after_loading(own)
    expected = own.quant_method.apply(own, x)[:, :VOCABULARY]
    assert torch.equal(drafter.compute_logits(x), expected)


def test_without_the_option_a_drafter_shares_the_head_as_it_is():
    drafter = load_drafter()
    assert "_apply_head" not in vars(drafter.logits_processor)


def test_a_target_names_the_drafts_scheme():
    config = {"lm_head": "int4_rescored", DRAFT_TARGET: "int8_g32"}
    made = make_head(config, speculative_config=types.SimpleNamespace())
    assert made.head.quant_method.draft_name == "int8_g32"
    config[DRAFT_TARGET] = "int4_rescored"
    with pytest.raises(ValueError, match="draft_lm_head'.=int4_rescored: expected one"):
        make_head(config, speculative_config=types.SimpleNamespace())


class Arguments:
    """Stands in for EngineArgs, whose hook calls it."""

    def __init__(self, method, value):
        self.speculative_config = {
            "method": method,
            "draft-lm-head-quantization": value,
        }

    def create_speculative_config(self, model_config, parallel_config):
        assert "draft-lm-head-quantization" not in self.speculative_config
        return types.SimpleNamespace(**self.speculative_config)


@pytest.mark.parametrize(
    ("value", "scheme"),
    [("int4", "int4_g128"), ("int8", "int8_g32"), ("int4_g32", "int4_g32")],
)
def test_the_option_is_taken_out_and_remembered(value, scheme):
    arguments = Arguments("mtp", value)
    config = draft_head_config(arguments, None, None)
    assert getattr(config, DRAFT_ATTRIBUTE) == scheme
    assert arguments.speculative_config["draft-lm-head-quantization"] == value


@pytest.mark.parametrize("value", ["fp8", "nvfp4", "int4_rescored", None])
def test_other_values_are_left_to_vllm(value):
    assert draft_head_config(Arguments("mtp", value), None, None) is None


def test_a_method_without_a_head_to_share_is_refused():
    with pytest.raises(ValueError, match="expected a method of eagle.*, got ngram"):
        draft_head_config(Arguments("ngram", "int4"), None, None)


# fork: end
