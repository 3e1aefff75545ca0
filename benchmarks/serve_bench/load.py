# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Runs one load point with ``vllm bench serve``."""

import json
import subprocess
from pathlib import Path
from typing import Any

from .cases import Point
from .vllm_server import MODEL_NAME, ServerError

# Our name: name in the result of vllm bench serve. Medians are over requests.
METRICS = {
    "ttft_ms": "median_ttft_ms",
    "tpot_ms": "median_tpot_ms",
    "itl_p50_ms": "p50_itl_ms",
    "itl_p99_ms": "p99_itl_ms",
    "output_tokens_per_s": "output_throughput",
    "ttft_mean_ms": "mean_ttft_ms",
    "tpot_mean_ms": "mean_tpot_ms",
}
# Missing in older results, or without speculative decoding.
OPTIONAL_METRICS = {
    "ttft_p99_ms": "p99_ttft_ms",
    "tpot_p99_ms": "p99_tpot_ms",
    "accepted_drafts_pct": "spec_decode_acceptance_rate",
}


def command(
    program: Path,
    url: str,
    tokenizer: str,
    point: Point,
    prompts: int,
    warmups: int,
    image: tuple[int, int] | None,
    result: Path,
    requests: Path | None = None,
) -> list[str]:
    """The ``vllm bench serve`` command line of a load point with ``prompts`` requests.

    Random prompts of exactly the point's length, greedy, ignoring end of text; with
    ``image`` each request has one synthetic image (width, height). With ``requests``,
    a file of make_requests.py, its prompts and lengths in order.
    """
    options: dict[str, object] = {
        "base-url": url,
        "model": MODEL_NAME,
        "tokenizer": tokenizer,
        "num-prompts": prompts,
        "num-warmups": warmups,
        "max-concurrency": point.concurrency,
        "percentile-metrics": "ttft,tpot,itl",
        "metric-percentiles": "50,99",
        "temperature": 0,
        "seed": 0,
        "result-dir": result.parent,
        "result-filename": result.name,
    }
    flags = ["--ignore-eos", "--save-result"]
    if requests is not None:
        options |= {
            "backend": "openai",
            "dataset-name": "sharegpt",
            "dataset-path": requests,
        }
        flags += ["--disable-shuffle"]
    else:
        options |= {
            "random-input-len": point.input_len,
            "random-output-len": point.output_len,
        }
    if requests is None and image is None:
        options |= {"backend": "openai", "dataset-name": "random"}
    elif image is not None:
        width, height = image
        options |= {
            "backend": "openai-chat",
            "endpoint": "/v1/chat/completions",
            "dataset-name": "random-mm",
            "random-mm-base-items-per-request": 1,
            "random-mm-num-mm-items-range-ratio": 0,
            "random-mm-limit-mm-per-prompt": '{"image": 1, "video": 0}',
            "random-mm-bucket-config": f"{{({height}, {width}, 1): 1.0}}",
        }
    words = [word for name, v in options.items() for word in (f"--{name}", str(v))]
    return [str(program), "bench", "serve", *words, *flags]


def drive(words: list[str], result: Path, log: Path) -> dict[str, float]:
    """Run ``words``, a result of ``command`` that writes ``result``; log to ``log``.

    Returns the values of ``METRICS``, and those of ``OPTIONAL_METRICS`` that the result
    has. Raises ``ServerError`` if the command or any request fails. The process never
    outlives the call.
    """
    result.unlink(missing_ok=True)
    with log.open("a") as output:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            status = process.wait()
        finally:
            process.kill()
            process.wait()
    if status != 0 or not result.exists():
        raise ServerError(f"vllm bench serve ended with status {status}, see {log}")
    answer: dict[str, Any] = json.loads(result.read_text())
    if answer["failed"] or not answer["completed"]:
        raise ServerError(
            f"{answer['completed']} requests completed, {answer['failed']} not: {log}"
        )
    optional = {k: v for k, v in OPTIONAL_METRICS.items() if v in answer}
    return {k: answer[v] for k, v in (METRICS | optional).items()}
