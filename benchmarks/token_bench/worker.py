# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""One engine in a process of its own, which answers questions about its speed."""

import contextlib
import itertools
import os
import random
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from make_requests import length
from serve_bench.cases import SWITCH

from token_bench.parts import attribute, read_trace
from token_bench.settings import LM_HEAD, Setting

SKIPPED_STEPS = 8  # of each request, so that all requests of a batch decode
TRACED_STEPS = 16
TRACED_PROMPTS = 5
LOAD_STEPS = 96  # measured, after as many requests have ended as run at a time
_WARM_UP_TOKENS = SKIPPED_STEPS + 4
# Tokens of prompts and completions under load: make_requests.py's log-normal lengths.
_PROMPT_MEDIAN, _OUTPUT_MEDIAN, _LONGEST = 110, 130, 1024
_LENGTHS = SimpleNamespace(spread=1.0, longest=_LONGEST)
# Of a step with prompts under load, as in vLLM's server on GPUs with 70 GiB or more.
_LOAD_BATCHED_TOKENS = 8192
# vLLM captures graphs up to this many tokens by itself
_LARGEST_GRAPH = 512
# A fraction of the GPU that is free in any case: --kv-gib decides instead.
_GPU_FRACTION = 0.1

_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_NO_USAGE_STATS": "1",
}


@dataclass(frozen=True)
class Job:
    """What an engine needs to know; the names are those of the options."""

    setting: Setting
    model: Path
    log: Path
    traces: Path
    vocabulary: int
    device: str
    batch: tuple[int, ...]
    prompt: tuple[int, ...]
    load: tuple[int, ...]
    context: int
    tokens: int
    speculative: int
    tensor_parallel: int
    eager: bool
    trace: bool
    threads: int
    kv_gib: float
    engine: dict[str, Any]


class Engine:
    """vLLM with random weights, and what is measured with it."""

    def __init__(self, job: Job) -> None:
        from token_bench import dummy_format
        from vllm import LLM

        self.job = job
        self.calls = self.requests = 0
        self.llm = LLM(
            str(job.model),
            load_format="dummy",
            worker_extension_cls=dummy_format.WORKER,
            **engine_arguments(job),
        )

    def warm_up(self) -> None:
        """Compile what is compiled at the first use of a batch size or length."""
        for batch in self.job.batch:
            self._run(batch, self.job.context, _WARM_UP_TOKENS)
        for tokens in self.job.prompt * 2:
            self.prefill(tokens)
        for requests in self.job.load:
            self.load(requests)

    def decode(self, batch: int) -> dict[str, Any]:
        """Decode ``batch`` requests at a time.

        Returns "ms", the time of each step; "tokens", how many a request gained per
        step (more than 1 if drafts were accepted); "distinct", the share of different
        tokens among all: of a model that repeats itself, the caches hold the experts.
        """
        times, counts, seen = self._run(batch, self.job.context, self.job.tokens)
        whole = [i for i in range(SKIPPED_STEPS, len(times)) if counts[i][0] == batch]
        return {
            "ms": [1e3 * (times[i] - times[i - 1]) for i in whole],
            "tokens": sum(counts[i][1] for i in whole) / (batch * len(whole)),
            "distinct": len(set(seen)) / len(seen),
        }

    def prefill(self, tokens: int) -> float:
        """Milliseconds from a request of ``tokens`` tokens to its first output."""
        begin = time.perf_counter()
        times, _, _ = self._run(1, tokens, 1)
        return 1e3 * (times[0] - begin)

    def load(
        self, requests: int, on_step: Callable[[int], None] = lambda step: None
    ) -> dict[str, Any]:
        """Answer ``requests`` requests at a time; one that ends is followed by another.

        Their lengths differ, so most steps under load decode and process a prompt.
        Every call answers the same requests.

        Returns, for ``LOAD_STEPS`` steps, "ms", the time of each; "tokens_per_s" of
        output; "requests", the mean with a token in a step; "first_ms", from the
        arrival to the first token of each request. ``on_step`` is called with the
        number of measured steps so far.
        """
        engine, generator = self.llm.llm_engine, random.Random(requests)
        waiting: dict[str, float] = {}  # when each request came
        running: set[str] = set()

        def begin() -> None:
            lengths = [
                length(generator, median, _LENGTHS)
                for median in (_PROMPT_MEDIAN, _OUTPUT_MEDIAN)
            ]
            name = self._add(generator, *lengths)
            waiting[name] = time.perf_counter()
            running.add(name)

        for _ in range(requests):
            begin()
        ended = 0
        times: list[float] = []
        first: list[float] = []
        counts: list[tuple[int, int]] = []  # of requests and tokens
        while len(times) <= LOAD_STEPS:
            outputs = engine.step()
            if not outputs:
                continue
            now = time.perf_counter()
            if ended >= requests:
                on_step(len(times))
                times.append(now)
                tokens = [len(output.outputs[0].token_ids) for output in outputs]
                counts.append((len(tokens), sum(tokens)))
            for output in outputs:
                came = waiting.pop(output.request_id, None)
                if came is not None and times:
                    first.append(1e3 * (now - came))
                if output.finished:
                    ended += 1
                    running.discard(output.request_id)
                    begin()
        engine.abort_request(list(running))
        while engine.has_unfinished_requests():
            engine.step()
        return {
            "ms": [1e3 * (b - a) for a, b in itertools.pairwise(times)],
            "tokens_per_s": sum(n for _, n in counts[1:]) / (times[-1] - times[0]),
            "requests": sum(n for n, _ in counts[1:]) / LOAD_STEPS,
            "first_ms": first,
        }

    def trace(self, batch: int) -> dict[str, Any]:
        """GPU time of decode steps by part, as ``parts.attribute`` returns it."""
        tokens = (SKIPPED_STEPS + TRACED_STEPS + 4) * (1 + self.job.speculative)
        name = f"batch{batch}"
        self._run(batch, self.job.context, tokens, self._profiler(name))
        return self._attributed(name)

    def trace_prefill(self, tokens: int) -> dict[str, Any]:
        """GPU time of prompts by part, as ``parts.attribute`` returns it."""
        name = f"prompt{tokens}"
        self.llm.start_profile(name)
        for _ in range(TRACED_PROMPTS):
            self.prefill(tokens)
        self.llm.stop_profile()
        return self._attributed(name, TRACED_PROMPTS)

    def trace_load(self, requests: int) -> dict[str, Any]:
        """GPU time of steps under load by part, as ``parts.attribute`` returns it."""
        name = f"load{requests}"
        self.load(requests, self._profiler(name))
        return self._attributed(name)

    def _profiler(self, name: str) -> Callable[[int], None]:
        """What traces ``TRACED_STEPS`` steps if called with the number of each step."""

        def switch(step: int) -> None:
            if step == SKIPPED_STEPS:
                self.llm.start_profile(name)
            elif step == SKIPPED_STEPS + TRACED_STEPS:
                self.llm.stop_profile()

        return switch

    def _attributed(self, name: str, steps: int = TRACED_STEPS) -> dict[str, Any]:
        first_rank = min(self.job.traces.glob(f"{name}_*.json*"))
        return attribute(read_trace(first_rank), steps)

    def _add(
        self, generator: random.Random, prompt_tokens: int, new_tokens: int
    ) -> str:
        """Add a random request and return its name."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(
            temperature=0,
            max_tokens=new_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        ids = generator.choices(range(1, self.job.vocabulary), k=prompt_tokens)
        self.requests += 1
        name = str(self.requests)
        self.llm.llm_engine.add_request(name, {"prompt_token_ids": ids}, sampling)
        return name

    def _run(
        self,
        batch: int,
        prompt_tokens: int,
        new_tokens: int,
        on_step: Callable[[int], None] = lambda step: None,
    ) -> tuple[list[float], list[tuple[int, int]], list[int]]:
        """Answer ``batch`` random requests at a time.

        Returns, for each step with output, the time of its end and the numbers of
        requests and tokens in it, and all tokens. ``on_step`` is called with the number
        of steps so far.
        """
        self.calls += 1
        generator = random.Random(self.calls)
        engine = self.llm.llm_engine
        for _ in range(batch):
            self._add(generator, prompt_tokens, new_tokens)
        times: list[float] = []
        counts: list[tuple[int, int]] = []
        seen: list[int] = []
        while engine.has_unfinished_requests():
            outputs = engine.step()
            if not outputs:
                continue
            times.append(time.perf_counter())
            new = [list(output.outputs[0].token_ids) for output in outputs]
            counts.append((len(new), sum(map(len, new))))
            seen.extend(token for tokens in new for token in tokens)
            on_step(len(times))
        return times, counts, seen


def engine_arguments(job: Job) -> dict[str, Any]:
    """Arguments of ``vllm.LLM`` for the job."""
    drafts = job.speculative
    longest = max(*job.prompt, job.context + job.tokens)
    batched = max(longest + 64, max(job.batch) * job.context)
    if job.load:
        longest = max(longest, 2 * _LONGEST)
        batched = max(batched, _LOAD_BATCHED_TOKENS)
    arguments: dict[str, Any] = {
        "dtype": "bfloat16",
        "skip_tokenizer_init": True,
        "max_model_len": longest + 64,
        "max_num_seqs": max(*job.batch, *job.load),
        "max_num_batched_tokens": batched,
        "enable_prefix_caching": False,
        "enforce_eager": job.eager,
        "seed": 0,
        "tensor_parallel_size": job.tensor_parallel,
    }
    if job.tensor_parallel > 1:
        arguments["distributed_executor_backend"] = "mp"
    if drafts:
        arguments["speculative_config"] = {
            "method": "mtp",
            "num_speculative_tokens": drafts,
        }
    if job.device != "cpu":
        arguments["gpu_memory_utilization"] = _GPU_FRACTION
        arguments["kv_cache_memory_bytes"] = int(job.kv_gib * 2**30)
        if not job.eager and not job.load:  # under load, vLLM's own sizes
            sizes = {batch * (1 + drafts) for batch in job.batch}
            sizes |= {tokens for tokens in job.prompt if tokens <= _LARGEST_GRAPH}
            arguments["compilation_config"] = {"cudagraph_capture_sizes": sorted(sizes)}
    if job.trace:
        arguments["profiler_config"] = {
            "profiler": "torch",
            "torch_profiler_dir": str(job.traces),
            "torch_profiler_activities": ["CUDA"],
            "torch_profiler_with_stack": False,
            "torch_profiler_dump_cuda_time_total": False,
        }
    return {**arguments, **job.setting.arguments, **job.engine}


def threads_by_rank(job: Job) -> str:
    """Cores of each rank, as VLLM_CPU_OMP_THREADS_BIND takes them: ``0-3|4-7``."""
    each = job.threads // job.tensor_parallel
    starts = range(0, each * job.tensor_parallel, each)
    return "|".join(f"{start}-{start + each - 1}" for start in starts)


def serve(job: Job, pipe: Connection) -> None:
    """Answer questions from the pipe until ``None`` comes or the other side ends.

    A question is the name of a method of ``Engine`` and its arguments. An answer is
    whether it succeeded, and the result or the error's text. The first answer comes
    unasked when the engine has warmed up. Everything printed goes to ``job.log``.
    """
    with job.log.open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    for name in (SWITCH, LM_HEAD):
        os.environ.pop(name, None)
    os.environ.update({**_ENVIRONMENT, **job.setting.environment})
    if job.device == "cpu":
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", threads_by_rank(job))
    try:
        engine = Engine(job)
        engine.warm_up()
        pipe.send((True, "ready"))
        while (question := pipe.recv()) is not None:
            name, *arguments = question
            pipe.send((True, getattr(engine, name)(*arguments)))
        engine.llm.llm_engine.engine_core.shutdown()
    except EOFError:
        pass
    except Exception as error:
        traceback.print_exc()
        with contextlib.suppress(OSError):
            pipe.send((False, f"{type(error).__name__}: {error}"))
    sys.stdout.flush()
    os._exit(0)  # some of vLLM's threads never end
