# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Stock vLLM against the hybrid path: ``vllm serve``, one request at a time.

``report`` runs this on an owner's machine. It needs only what vLLM installs. Each
round starts a server per variant, in alternating order, and streams completions of
random prompts. More loads and more variants: ``benchmarks/serve_compare.py`` of the
project's checkout.
"""

import contextlib
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm.model_executor.layers.fused_moe.oracle import hybrid_w4a16_switch as switch

VARIANTS = {"stock": "0", "hybrid": "require"}
INPUT_TOKENS, OUTPUT_TOKENS = 100, 128
WARMUPS, REQUESTS = 2, 6
START_S, STOP_S = 1800.0, 30.0
_FIRST_TOKEN_ID = 100  # below are special tokens in most vocabularies


class CompareError(RuntimeError):
    """A server did not start, or did not answer."""


@dataclass(frozen=True)
class Sample:
    """Medians of one server's requests."""

    variant: str
    round: int
    ttft_ms: float
    tpot_ms: float
    tokens_per_s: float
    """Output tokens over the time of whole requests."""
    start_s: float


def compare(
    checkpoint: str,
    vocabulary: int,
    serve_arguments: list[str],
    rounds: int,
    folder: Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """All rounds; logs of the servers go to ``folder``.

    Returns samples, a summary per variant (median, least, largest), the ratio of output
    tokens/s per round, and why a variant failed, if one did.
    """
    samples: list[Sample] = []
    failures: dict[str, str] = {}
    for number in range(rounds):
        order = list(VARIANTS) if number % 2 == 0 else list(VARIANTS)[::-1]
        for variant in order:
            if variant in failures:
                continue
            say(f"round {number + 1} of {rounds}: {variant}")
            log = folder / f"serve-{variant}-{number + 1}.log"
            try:
                sample = _measure(
                    checkpoint, vocabulary, serve_arguments, variant, number, log
                )
            except CompareError as error:
                failures[variant] = str(error)
                say(f"  failed: {error}")
                continue
            samples.append(sample)
            say(
                f"  TTFT {sample.ttft_ms:.1f} ms, TPOT {sample.tpot_ms:.2f} ms, "
                f"{sample.tokens_per_s:.1f} tokens/s"
            )
    return {
        "input_tokens": INPUT_TOKENS,
        "output_tokens": OUTPUT_TOKENS,
        "requests": REQUESTS,
        "serve_arguments": serve_arguments,
        "samples": [vars(sample) for sample in samples],
        "summary": {name: _summary(samples, name) for name in VARIANTS},
        "ratio": _ratio(samples),
        "failures": failures,
    }


def _summary(samples: list[Sample], variant: str) -> dict[str, Any] | None:
    mine = [sample for sample in samples if sample.variant == variant]
    if not mine:
        return None
    return {
        name: spread([getattr(sample, name) for sample in mine])
        for name in ("ttft_ms", "tpot_ms", "tokens_per_s", "start_s")
    }


def spread(values: list[float]) -> dict[str, float]:
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
    }


def _ratio(samples: list[Sample]) -> dict[str, float] | None:
    """Output tokens/s of hybrid over stock in the same round; above 1 it is faster."""
    by_round: dict[int, dict[str, float]] = {}
    for sample in samples:
        by_round.setdefault(sample.round, {})[sample.variant] = sample.tokens_per_s
    both = [found for found in by_round.values() if len(found) == len(VARIANTS)]
    return (
        spread([found["hybrid"] / found["stock"] for found in both]) if both else None
    )


def _measure(
    checkpoint: str,
    vocabulary: int,
    serve_arguments: list[str],
    variant: str,
    number: int,
    log: Path,
) -> Sample:
    start = time.monotonic()
    with server(checkpoint, serve_arguments, VARIANTS[variant], log) as url:
        start_s = time.monotonic() - start
        rng = random.Random(0)  # the same prompts for every server
        done = []
        for index in range(WARMUPS + REQUESTS):
            ids = [
                rng.randrange(_FIRST_TOKEN_ID, vocabulary) for _ in range(INPUT_TOKENS)
            ]
            times = stream(url, ids)
            if index >= WARMUPS:
                done.append(times)
    ttft = [times[1] - times[0] for times in done]
    tpot = [(times[-1] - times[1]) / (OUTPUT_TOKENS - 1) for times in done]
    whole = [OUTPUT_TOKENS / (times[-1] - times[0]) for times in done]
    return Sample(
        variant,
        number,
        1e3 * statistics.median(ttft),
        1e3 * statistics.median(tpot),
        statistics.median(whole),
        start_s,
    )


@contextlib.contextmanager
def server(
    checkpoint: str, arguments: list[str], switch_value: str, log: Path
) -> Iterator[str]:
    """``vllm serve`` on a free port of this machine only; its URL once it is ready.

    Raises ``CompareError`` with the log's first error if it does not become ready. The
    server and all its processes are stopped when the block ends, for any reason.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = Path(sys.executable).with_name("vllm")
    words = [str(program)] if program.exists() else [sys.executable, "-m", "vllm"]
    words += ["serve", checkpoint, "--host=127.0.0.1", f"--port={port}"]
    words += ["--served-model-name=model", *arguments]
    environment = {**os.environ, switch.NAME: switch_value, "VLLM_NO_USAGE_STATS": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            words,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_ready(process, url, log)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_ready(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        with contextlib.suppress(urllib.error.URLError, OSError):
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return
        if process.poll() is not None:
            raise CompareError(
                f"vllm serve ended with status {process.returncode}: {_cause(log)}"
            )
        if time.monotonic() > deadline:
            raise CompareError(f"not ready after {START_S:.0f} s: {_cause(log)}")
        time.sleep(0.3)


_IS_NO_ERROR = re.compile(r"(?:\(.*?\) )?(?:DEBUG|INFO|WARNING) ")
# The last line of a traceback, behind what vLLM's log puts before it.
_RAISED = re.compile(r"(?:^|\s)((?:\w+\.)*\w*(?:Error|Exception): .+)")


def _cause(log: Path) -> str:
    """The first error in a log; later ones are its echoes in other processes."""
    for line in log.read_text(errors="replace").splitlines():
        found = _RAISED.search(line)
        if found and not _IS_NO_ERROR.match(line):
            return found[1].strip()[:300]
    return f"see {log.name}"


def stream(url: str, prompt: list[int]) -> list[float]:
    """When the request was sent and when each token arrived, in seconds.

    Raises ``CompareError`` unless ``OUTPUT_TOKENS`` tokens were generated.
    """
    body = {
        "model": "model",
        "prompt": prompt,
        "max_tokens": OUTPUT_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    request = urllib.request.Request(
        f"{url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    times = [time.monotonic()]
    made = 0
    try:
        with urllib.request.urlopen(request, timeout=600) as answer:
            for line in answer:
                text = line.decode().strip().removeprefix("data: ")
                if not text or text == "[DONE]":
                    continue
                event = json.loads(text)
                if event.get("choices"):
                    times.append(time.monotonic())
                if event.get("usage"):
                    made = event["usage"]["completion_tokens"]
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise CompareError(f"a request failed: {error}") from error
    if made != OUTPUT_TOKENS:
        raise CompareError(f"{made} tokens came, expected {OUTPUT_TOKENS}")
    return times
