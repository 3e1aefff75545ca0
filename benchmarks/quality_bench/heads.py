# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The effect of a quantized lm_head on the distribution of the next token.

vLLM runs the model over a text, and the hidden states before the head are kept. Each
setting of the head then computes logits from them, up to 16 rows at a time as in
decode, with the ops and the quantization of vLLM's lm_head.
"""

import os
from collections.abc import Iterator
from typing import Any

SIXTEEN_BIT = "16-bit"
TOP = 20


def compare_heads(
    model: str, sequences: list[list[int]], names: list[str], dtype: str
) -> dict[str, Any]:
    """Figures of head settings, each against the first one. Call it in a new process.

    Args:
        model: checkpoint folder.
        sequences: token ids; T tokens give T - 1 positions.
        names: ``SIXTEEN_BIT`` or names of ``hybrid_w4a16_head_schemes.SCHEMES``.
        dtype: of the activations, as ``--dtype`` of vLLM.
    """
    import torch

    hidden, weight = _hidden_states(model, sequences, dtype)
    given = torch.tensor([token for tokens in sequences for token in tokens[1:]])
    given = given.to(hidden.device)
    settings = {name: _Head(name, weight) for name in names}
    figures = {name: _Figures() for name in names}
    for begin in range(0, len(hidden), 512):
        part = slice(begin, begin + 512)
        reference = None
        for name, head in settings.items():
            logits, rescored = head(hidden[part])
            logprobs = torch.log_softmax(logits.float(), 1)
            first = logits.argmax(1)
            if reference is None:
                reference = (logprobs, first)
            figures[name].add(*reference, logprobs, first, given[part], rescored)
    return {
        "positions": len(hidden),
        "vocabulary": weight.shape[0],
        "reference": names[0],
        "heads": {name: found.summary() for name, found in figures.items()},
    }


def _hidden_states(model: str, sequences: list[list[int]], dtype: str) -> Any:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # keeps the 16-bit weights unchanged, which vLLM packs on the CPU
    os.environ["VLLM_HYBRID_W4A16_LM_HEAD"] = "int4_rescored"
    import torch

    from vllm import LLM, SamplingParams, TokensPrompt

    length = max(map(len, sequences)) + 1
    llm = LLM(model, dtype=dtype, enforce_eager=True, max_model_len=length)
    seen: list[Any] = []
    weights: list[Any] = []

    def record(network: Any) -> None:
        compute = network.compute_logits
        weights.append(network.lm_head.weight.detach().clone())

        def recording(hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(hidden_states.detach().clone())
            return compute(hidden_states, *args, **kwargs)

        network.compute_logits = recording

    scoring = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    found = []
    try:
        llm.apply_model(record)
        for tokens in sequences:
            seen.clear()
            llm.generate(TokensPrompt(prompt_token_ids=tokens), scoring, use_tqdm=False)
            # the other call is for the next token to sample; one of vLLM's two runners
            # also passes the last token
            rows, count = max(seen, key=len), len(tokens) - 1
            if len(rows) not in (count, count + 1):
                raise RuntimeError(
                    f"expected {count} rows or one more, got {len(rows)}"
                )
            found.append(rows[:count])
    finally:
        llm.llm_engine.engine_core.shutdown()
    return torch.cat(found), weights[0]


class _Head:
    """Computes logits of hidden states [M, K], and counts the rescored rows."""

    def __init__(self, name: str, weight: Any):
        from vllm.model_executor.layers.fused_moe.hybrid_w4a16_device import (
            DeviceFamily,
            device_family,
        )
        from vllm.model_executor.layers.quantization import (
            hybrid_w4a16_dense_ops as ops,
        )
        from vllm.model_executor.layers.quantization.hybrid_w4a16_head_schemes import (
            SCHEMES,
        )

        self.ops, self.weight = ops, weight
        self.scheme = None if name == SIXTEEN_BIT else SCHEMES[name]
        if self.scheme is not None:
            error = ops.load_error()
            if error is not None:
                raise RuntimeError(error)
            family = device_family()
            assert isinstance(family, DeviceFamily), family  # the engine ran on it
            self.cu_count = family.cu_count
            self.quantized = ops.quantize(
                weight, self.scheme.bits, self.scheme.group_size
            )

    def __call__(self, rows: Any) -> tuple[Any, list[int]]:
        import torch

        from vllm.model_executor.layers.quantization.hybrid_w4a16_head import (
            BOUND,
            WINDOW,
        )

        if self.scheme is None:
            return torch.nn.functional.linear(rows, self.weight), []
        packed, scales, errors = self.quantized
        logits = rows.new_empty(len(rows), len(packed))
        scheme, most = self.scheme, self.ops.MAX_ROWS
        parts = [slice(i, i + most) for i in range(0, len(rows), most)]
        for part in parts:
            self.ops.wvSplitK_int_g(
                rows[part],
                packed,
                scales,
                logits[part],
                self.cu_count,
                scheme.group_size,
                scheme.bits,
            )
        if not scheme.rescored:
            return logits, []
        asked = self.ops.rescored_rows(rows, errors, logits, WINDOW, BOUND)
        partials = torch.empty(most, 2 * self.ops.PARTS, device=rows.device)
        for part in parts:
            self.ops.wvSplitK_int_g_rescore(
                rows[part],
                self.weight,
                errors,
                logits[part],
                partials[: len(rows[part])],
                WINDOW,
                BOUND,
            )
        return logits, asked.sum(1).tolist()


class _Figures:
    def __init__(self) -> None:
        self.same: list[bool] = []
        self.divergence: list[float] = []
        self.top_error: list[float] = []
        self.given: list[float] = []
        self.rescored: list[int] = []

    def add(
        self,
        reference: Any,
        reference_first: Any,
        logprobs: Any,
        first: Any,
        given: Any,
        rescored: list[int],
    ) -> None:
        """Add positions: log-probabilities [M, N] and first tokens [M] of the reference
        and of this head, the given tokens [M], and rescored rows per position.
        """
        self.same += (first == reference_first).tolist()
        difference = reference.double() - logprobs.double()
        self.divergence += (reference.double().exp() * difference).sum(1).tolist()
        top = reference.topk(TOP, 1).indices
        self.top_error += difference.gather(1, top).abs().mean(1).tolist()
        self.given += logprobs.gather(1, given[:, None])[:, 0].tolist()
        self.rescored += rescored

    def summary(self) -> dict[str, Any]:
        """The figures over all positions."""
        import math
        import statistics

        found: dict[str, Any] = {
            "other_first_tokens": self.same.count(False),
            "kl_nats": statistics.fmean(self.divergence),
            f"top_{TOP}_error_nats": statistics.fmean(self.top_error),
            "perplexity": math.exp(-statistics.fmean(self.given)),
        }
        if self.rescored:
            ordered = sorted(self.rescored)
            found["rescored_rows"] = {
                "mean": statistics.fmean(ordered),
                "p99": ordered[int(0.99 * len(ordered))],
                "largest": ordered[-1],
            }
        return found


def as_lines(result: dict[str, Any]) -> Iterator[str]:
    """The figures as a table in Markdown."""
    positions = result["positions"]
    yield f"{positions} positions, against {result['reference']}:"
    yield ""
    yield (
        f"| head | other first token | KL, nats | top-{TOP} error, nats | perplexity "
        "| rescored rows: mean / p99 / largest |"
    )
    yield "| --- | --- | --- | --- | --- | --- |"
    for name, found in result["heads"].items():
        rescored = found.get("rescored_rows")
        rows = (
            f"{rescored['mean']:.1f} / {rescored['p99']} / {rescored['largest']}"
            if rescored
            else "-"
        )
        other = found["other_first_tokens"]
        yield (
            f"| {name} | {other} ({other / positions:.3%}) | {found['kl_nats']:.2e} "
            f"| {found[f'top_{TOP}_error_nats']:.2e} | {found['perplexity']:.4f} "
            f"| {rows} |"
        )
