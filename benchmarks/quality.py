#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Quality of the hybrid path: perplexity and greedy agreement on a text file.

Compares an int4 checkpoint, served by vLLM on the hybrid path, with the same checkpoint
dequantized (transformers, float32), which shows errors of the kernels, and with the
16-bit model before quantization, which shows the cost of int4. With ``--heads`` it
compares settings of the lm_head with the first one instead.
Exit status: 0; 1 if a model cannot run; 2 for a bad argument.
"""

import argparse
import concurrent.futures
import json
import math
import multiprocessing
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_bench.machine import describe, device_here
from quality_bench.dequantize import dequantize_checkpoint
from quality_bench.engines import Score, transformers_scores, vllm_scores
from quality_bench.heads import as_lines, compare_heads

HYBRID, DEQUANTIZED, SIXTEEN_BIT = "hybrid", "dequantized", "16-bit"


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line; a bad one ends the process with status 2."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("checkpoint", type=Path, help="int4 checkpoint folder")
    add("text", type=Path, help="UTF-8 text file, or a folder of .py files")
    add(
        "--heads",
        nargs="+",
        metavar="NAME",
        help="compare lm_head settings with the first one: 16-bit, int8_g32, "
        "int4_g32, int4_g128, int4_rescored",
    )
    add("--model-16bit", type=Path, help="folder of the model before quantization")
    add("--window", type=int, default=512, help="tokens per window (default 512)")
    add("--windows", type=int, default=16, help="windows of the text (default 16)")
    add("--prompt", type=int, default=32, help="tokens per prompt (default 32)")
    add("--tokens", type=int, default=64, help="tokens per completion (default 64)")
    add("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    add("--json", type=Path, metavar="F", help="write the results")
    options = parser.parse_args(arguments)
    for folder in (options.checkpoint, options.model_16bit):
        if folder is not None and not (folder / "config.json").is_file():
            parser.error(f"{folder} holds no config.json")
    if not options.text.exists():
        parser.error(f"there is no text file or folder {options.text}")
    if not 2 <= options.prompt < options.window or options.tokens < 1:
        parser.error("expected 2 <= --prompt < --window and --tokens >= 1")
    options.command = shlex.join(["quality.py", *arguments])
    return options


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a new process, so that its memory is freed afterwards."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(function, *arguments).result()


def windows_of(options: argparse.Namespace) -> list[list[int]]:
    """Token ids of the text, cut into full windows."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    files = [options.text]
    if options.text.is_dir():
        files = sorted(options.text.glob("*.py"))
    size, found = options.window, []
    most = -(-options.windows // max(1, len(files)))  # per file
    for file in files:
        text = file.read_text(encoding="utf-8")
        tokens = tokenizer.encode(text, verbose=False)
        starts = range(0, len(tokens) - size + 1, size)
        found += [tokens[i : i + size] for i in starts[:most]]
    if not found:
        raise ValueError(f"{options.text} has fewer tokens than a window of {size}")
    return found[: options.windows]


def compare(
    scores: dict[str, list[Score]], completions: list[list[int]], windows: int
) -> dict[str, Any]:
    """Figures per model, and of hybrid against each of the others.

    Args:
        scores: by model, of the text's windows and then of prompts with hybrid's
            completions (for hybrid of the windows only).
        completions: hybrid's greedy completions.
        windows: number of sequences that are windows of the text.
    """
    text = {
        name: (
            [x for s in mine[:windows] for x in s[0]],
            [t for s in mine[:windows] for t in s[1]],
        )
        for name, mine in scores.items()
    }
    result: dict[str, Any] = {
        "perplexity": {
            name: math.exp(-statistics.fmean(logprobs))
            for name, (logprobs, _) in text.items()
        },
        "tokens": len(text[HYBRID][0]),
        "against": {},
    }
    for name, mine in scores.items():
        if name == HYBRID:
            continue
        differences = [
            a - b for a, b in zip(text[HYBRID][0], text[name][0], strict=True)
        ]
        agree = [a == b for a, b in zip(text[HYBRID][1], text[name][1], strict=True)]
        greedy = [
            [a == b for a, b in zip(given, first[-len(given) :], strict=True)]
            for given, (_, first) in zip(completions, mine[windows:], strict=True)
        ]
        result["against"][name] = {
            "mean_difference_nats": statistics.fmean(differences),
            "mean_absolute_difference_nats": statistics.fmean(map(abs, differences)),
            "same_first_choice": statistics.fmean(agree),
            "greedy_tokens": sum(map(len, greedy)),
            "greedy_agreement": statistics.fmean(x for one in greedy for x in one),
            "completions": len(greedy),
            "identical_completions": sum(map(all, greedy)),
        }
    return result


def as_text(result: dict[str, Any]) -> str:
    """The figures as lines of text."""
    lines = [f"{result['tokens']} tokens of text"]
    for name, value in result["perplexity"].items():
        lines.append(f"perplexity  {name:<12} {value:.4f}")
    for name, found in result["against"].items():
        mean = f"{found['mean_difference_nats']:+.5f}"
        absolute = f"{found['mean_absolute_difference_nats']:.5f}"
        greedy = f"{found['greedy_agreement']:.2%} of {found['greedy_tokens']}"
        whole = f"{found['identical_completions']} of {found['completions']}"
        lines.append(f"hybrid against {name}:")
        lines.append(f"  nats per token    {mean} on average, {absolute} absolute")
        lines.append(
            f"  same first choice {found['same_first_choice']:.2%} of the text"
        )
        lines.append(f"  greedy            {greedy} tokens, {whole} completions whole")
    return "\n".join(lines)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run all models, one after the other. Raises ``ValueError``."""
    windows = windows_of(options)
    if options.heads:
        return in_process(
            compare_heads,
            str(options.checkpoint),
            windows,
            options.heads,
            options.dtype,
        )
    prompts = [window[: options.prompt] for window in windows]
    print(f"{HYBRID}: vLLM, {options.dtype}", flush=True)
    served = in_process(
        vllm_scores,
        str(options.checkpoint),
        windows,
        prompts,
        options.tokens,
        options.dtype,
        "require",
    )
    completions = served["completions"]
    sequences = windows + [
        prompt + completion
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    scores: dict[str, list[Score]] = {HYBRID: served["scores"]}
    with tempfile.TemporaryDirectory() as folder:
        print(f"{DEQUANTIZED}: transformers, float32", flush=True)
        dense = dequantize_checkpoint(options.checkpoint, Path(folder) / "dense")
        scores[DEQUANTIZED] = in_process(transformers_scores, str(dense), sequences)
    if options.model_16bit:
        print(f"{SIXTEEN_BIT}: transformers, float32", flush=True)
        model = str(options.model_16bit)
        scores[SIXTEEN_BIT] = in_process(transformers_scores, model, sequences)
    return compare(scores, completions, len(windows))


def machine_facts() -> dict[str, Any]:
    """Facts about the machine and the device that vLLM uses on it."""
    return describe(device_here(), 0)


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison; returns its exit status."""
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    try:
        result = run(options)
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(as_lines(result)) if options.heads else as_text(result))
    if options.json:
        facts = in_process(machine_facts)
        document = {"command": options.command, "machine": facts, **result}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
