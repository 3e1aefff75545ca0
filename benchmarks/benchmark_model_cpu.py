#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Decode of a whole model on the CPU: vLLM with several lm_heads, beside llama.cpp.

Models of random weights in the layer shape of Qwen3-30B-A3B: an AutoRound int4
checkpoint for vLLM, a GGUF with Q4_0 weights and a Q8_0 head for llama.cpp. Every
engine is a process that stays loaded. They take turns, so that all see the machine
slow down and speed up: a turn is ``--steps`` decode steps of one batch size. Printed
are the median over turns of a step's median time, and the fastest and slowest turn.

Needs llama-cpp-python (which brings the native library) and gguf; without --llama it
does without. Memory, with 8 layers: about 7 GB for each head and 4 GB for llama.cpp.
Exit status: 0; 1 when an engine cannot be run; 2 for a bad argument.
"""

import argparse
import functools
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from moe_bench.machine import describe
from moe_bench.shapes import SHAPES
from random_checkpoint import HEAD_DIM, HEADS, KV_HEADS, make_checkpoint

SHAPE = SHAPES["qwen3-30b-a3b"]
PROMPT = 16  # tokens
CONTEXT = 1024
VARIABLE = "VLLM_HYBRID_W4A16_LM_HEAD"
LLAMA = "llama.cpp"

# Runs decode steps of a batch and returns each one's seconds.
Turn = Callable[[int, int], list[float]]


def prompts(batch: int, vocabulary: int) -> list[list[int]]:
    rng = np.random.default_rng(batch)
    return rng.integers(0, vocabulary, (batch, PROMPT)).tolist()


# ---------------------------------------------------------------- engines


def vllm_engine(folder: Path, head: str, options: argparse.Namespace) -> Turn:
    """vLLM in this process, on ``options.threads`` threads."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{options.threads - 1}"
    if head != "16-bit":
        os.environ[VARIABLE] = head
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(folder),
        dtype="bfloat16",
        skip_tokenizer_init=True,
        max_model_len=CONTEXT,
        max_num_seqs=max(options.batches),
        enable_prefix_caching=False,
        enforce_eager=options.eager,
    )
    engine = llm.llm_engine

    def turn(batch: int, steps: int) -> list[float]:
        sampling = SamplingParams(
            temperature=0, max_tokens=steps + 2, ignore_eos=True, detokenize=False
        )
        for i, tokens in enumerate(prompts(batch, options.vocabulary)):
            engine.add_request(f"{batch}-{i}", {"prompt_token_ids": tokens}, sampling)
        seconds = []
        while engine.has_unfinished_requests():
            begin = time.perf_counter()
            engine.step()
            seconds.append(time.perf_counter() - begin)
        return seconds[2 : 2 + steps]  # without the prompt and the first token

    return turn


def llama_engine(file: Path, options: argparse.Namespace) -> Turn:
    """llama.cpp in this process."""
    import llama_cpp

    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(
        str(file).encode(), llama_cpp.llama_model_default_params()
    )
    if model is None:
        raise RuntimeError(f"llama.cpp cannot load {file}")
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = CONTEXT * max(options.batches)
    parameters.n_seq_max = max(options.batches)
    parameters.n_threads = parameters.n_threads_batch = options.threads
    context = llama_cpp.llama_init_from_model(model, parameters)
    if context is None:
        raise RuntimeError("llama.cpp cannot make a context")

    def decode(rows: list[tuple[int, int, int]], wanted: list[bool]) -> list[int]:
        """Of (token, position, sequence): the likeliest next tokens of wanted rows."""
        batch = llama_cpp.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for i, (token, position, sequence) in enumerate(rows):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = wanted[i]
        status = llama_cpp.llama_decode(context, batch)
        llama_cpp.llama_batch_free(batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        logits = (
            llama_cpp.llama_get_logits_ith(context, i)
            for i in range(len(rows))
            if wanted[i]
        )
        size = (options.vocabulary,)
        return [int(np.ctypeslib.as_array(x, size).argmax()) for x in logits]

    def turn(batch: int, steps: int) -> list[float]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        rows = [
            (token, position, sequence)
            for sequence, tokens in enumerate(prompts(batch, options.vocabulary))
            for position, token in enumerate(tokens)
        ]
        last = [position == PROMPT - 1 for _, position, _ in rows]
        following, seconds = decode(rows, last), []
        for position in range(PROMPT, PROMPT + steps + 1):
            begin = time.perf_counter()
            rows = [(token, position, i) for i, token in enumerate(following)]
            following = decode(rows, [True] * batch)
            seconds.append(time.perf_counter() - begin)
        return seconds[1:]

    return turn


def write_gguf(file: Path, options: argparse.Namespace) -> Path:
    """A random model in llama.cpp's own layout, unless it is there."""
    if file.exists():
        return file
    import gguf

    kinds = gguf.GGMLQuantizationType
    sizes = {
        kinds.Q4_0: (18, 1 / 4.6),
        kinds.Q8_0: (34, 1 / 73.9),
    }  # bytes, 1/deviation
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(file), "qwen3moe")
    writer.add_block_count(options.layers)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(SHAPE.hidden)
    writer.add_feed_forward_length(3 * SHAPE.hidden)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_expert_count(SHAPE.num_experts)
    writer.add_expert_used_count(SHAPE.top_k)
    writer.add_expert_feed_forward_length(SHAPE.intermediate)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(options.vocabulary)

    @functools.cache
    def blocks(kind: Any, *shape: int) -> np.ndarray:
        """Random weights; layers share them, as in vLLM's checkpoint."""
        size, scale = sizes[kind]
        *rows, columns = shape
        made = rng.integers(0, 256, (*rows, columns // 32, size), dtype=np.uint8)
        scales = np.full((*rows, columns // 32), scale / columns**0.5, dtype=np.float16)
        made[..., :2] = scales[..., None].view(np.uint8)
        return made.reshape(*rows, columns // 32 * size)

    def quantized(name: str, kind: Any, *shape: int) -> None:
        writer.add_tensor(f"{name}.weight", blocks(kind, *shape), raw_dtype=kind)

    def plain(name: str, values: np.ndarray) -> None:
        writer.add_tensor(f"{name}.weight", values.astype(np.float32))

    hidden, inner, experts = SHAPE.hidden, SHAPE.intermediate, SHAPE.num_experts
    quantized("token_embd", kinds.Q8_0, options.vocabulary, hidden)
    quantized("output", kinds.Q8_0, options.vocabulary, hidden)
    plain("output_norm", np.ones(hidden))
    for i in range(options.layers):
        layer = f"blk.{i}"
        for norm in ("attn_norm", "ffn_norm"):
            plain(f"{layer}.{norm}", np.ones(hidden))
        for norm in ("attn_q_norm", "attn_k_norm"):
            plain(f"{layer}.{norm}", np.ones(HEAD_DIM))
        plain(f"{layer}.ffn_gate_inp", rng.normal(0, 0.05, (experts, hidden)))
        for name, n, k in (
            ("attn_q", HEADS * HEAD_DIM, hidden),
            ("attn_k", KV_HEADS * HEAD_DIM, hidden),
            ("attn_v", KV_HEADS * HEAD_DIM, hidden),
            ("attn_output", hidden, HEADS * HEAD_DIM),
        ):
            quantized(f"{layer}.{name}", kinds.Q4_0, n, k)
        for name, n, k in (
            ("ffn_gate_exps", inner, hidden),
            ("ffn_up_exps", inner, hidden),
            ("ffn_down_exps", hidden, inner),
        ):
            quantized(f"{layer}.{name}", kinds.Q4_0, experts, n, k)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


# ---------------------------------------------------------------- turns


def serve(name: str, options: argparse.Namespace, pipe: Connection) -> None:
    """A process that runs turns of one engine, as the pipe asks for them."""
    try:
        if name == LLAMA:
            turn = llama_engine(options.work / "model.gguf", options)
        else:
            turn = vllm_engine(options.work / "checkpoint", name, options)
        for batch in options.batches:  # warm, compiled
            turn(batch, 4)
        pipe.send("ready")
        while (batch := pipe.recv()) is not None:
            pipe.send(turn(batch, options.steps))
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")


class Engine:
    """The parent's side of a process of ``serve``."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._pipe, child = context.Pipe()
        self._process = context.Process(target=serve, args=(name, options, child))
        self._process.start()
        child.close()
        if (answer := self._receive()) != "ready":
            raise RuntimeError(f"{name}: {answer}")

    def _receive(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            return "the process ended"

    def turn(self, batch: int) -> float:
        """Median seconds of a decode step."""
        try:
            self._pipe.send(batch)
            answer = self._receive()
        except BrokenPipeError:
            answer = "the process ended"
        if isinstance(answer, str):
            raise RuntimeError(f"{self.name}: {answer}")
        return statistics.median(answer)

    def close(self) -> None:
        self._process.terminate()
        self._process.join()


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    names = [*options.heads, *([LLAMA] if options.llama else [])]
    engines: list[Engine] = []
    try:
        for name in names:
            engines.append(Engine(name, options))
            print(f"{name}: loaded", file=sys.stderr, flush=True)
        for batch in options.batches:
            turns: dict[str, list[float]] = {name: [] for name in names}
            for _ in range(options.turns):
                for engine in engines:
                    turns[engine.name].append(engine.turn(batch))
            yield from (row(name, batch, turns) for name in names)
    finally:
        for engine in engines:
            engine.close()


def row(name: str, batch: int, turns: dict[str, list[float]]) -> dict[str, Any]:
    """One line of the result; ratios are of turns beside each other."""
    mine = turns[name]
    found = {
        "engine": name,
        "batch": batch,
        "ms": round(1e3 * statistics.median(mine), 2),
        "ms_fastest": round(1e3 * min(mine), 2),
        "ms_slowest": round(1e3 * max(mine), 2),
        "tokens_per_s": round(batch / statistics.median(mine), 1),
    }
    if LLAMA in turns:
        ratios = [b / a for a, b in zip(mine, turns[LLAMA], strict=True)]
        found["speed_of_llama_cpp"] = round(statistics.median(ratios), 2)
    return found


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("work", type=Path, help="folder for the models; made once, then kept")
    add("--heads", nargs="+", default=["16-bit", "int4_rescored"], metavar="NAME")
    add("--llama", action="store_true", help="also llama.cpp")
    add("--layers", type=int, default=8)
    add("--vocabulary", type=int, default=151936)
    add("--batches", type=int, nargs="+", default=[1, 4])
    add("--steps", type=int, default=24, help="decode steps of a turn")
    add("--turns", type=int, default=9, help="of each engine and batch size")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--eager", action="store_true", help="vLLM without torch.compile")
    add("--json", type=Path, metavar="F", help="also write F")
    options = parser.parse_args(arguments)
    if not 0 < options.steps < CONTEXT - PROMPT:
        parser.error(f"--steps: expected 1 to {CONTEXT - PROMPT - 1}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    make_checkpoint(
        options.work / "checkpoint",
        options.layers,
        vocabulary=options.vocabulary,
        alike=True,
    )
    if options.llama:
        write_gguf(options.work / "model.gguf", options)
    rows = []
    print("engine           batch       ms  fastest  slowest  tok/s")
    try:
        for found in measure(options):
            rows.append(found)
            print(
                f"{found['engine']:16} {found['batch']:5} {found['ms']:8.2f} "
                f"{found['ms_fastest']:8.2f} {found['ms_slowest']:8.2f} "
                f"{found['tokens_per_s']:6.1f}"
                + (
                    f"  {found['speed_of_llama_cpp']:.2f} x llama.cpp"
                    if "speed_of_llama_cpp" in found
                    else ""
                ),
                flush=True,
            )
    except RuntimeError as error:
        print(f"benchmark_model_cpu: {error}", file=sys.stderr)
        return 1
    if options.json:
        document = {"machine": describe("cpu", options.threads), "rows": rows}
        document["arguments"] = {k: str(v) for k, v in vars(options).items()}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
