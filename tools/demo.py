# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Serve the bundled checkpoint with vLLM and stream a completion from it.

    python -m tools.demo

Exit status: 0 on success; 1 if a step failed; 2 if the server works but not all of its
MoE layers are hybrid; 130 after Ctrl-C.
"""

import argparse
import importlib
import os
import re
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from benchmarks.serve_bench.progress import MilestoneWatch, Progress
from benchmarks.serve_bench.vllm_server import MODEL_NAME, ServerError, VllmServer

CHECKOUT = Path(__file__).resolve().parent.parent
CHECKPOINT = CHECKOUT / "demo/int4-autoround-g128"
LOG = CHECKOUT / "build/demo.log"

PROMPT = 'def copyfile(src, dst):\n    """'
MAX_TOKENS = 96
MAX_MODEL_LEN = 2048

START_TIMEOUT_S = 300.0
REQUEST_TIMEOUT_S = 120.0
LOG_TAIL_LINES = 25

OMP_BIND = "VLLM_CPU_OMP_THREADS_BIND"
RESERVED_CPU = "VLLM_CPU_NUM_OF_RESERVED_CPU"
SMALL_MACHINE_CORES = 2

# The plugin logs this when a model's MoE layers are ready (vllm/plugins/hybrid_w4a16).
SUMMARY = re.compile(
    r"HybridW4A16 MoE: (?P<taken>\d+)/(?P<all>\d+) layers "
    r"\(decode: (?P<decode>.+), prefill: (?P<prefill>.+)\), \d+ declined"
)
DECLINED = re.compile(r"HybridW4A16 MoE: (layer .*)")


def stream_completion(
    openai: ModuleType, server: VllmServer, prompt: str
) -> tuple[int, float, float]:
    """Print a completion as it arrives.

    Returns the number of tokens and the seconds until the first and the last token.
    Raises ``openai.OpenAIError``.
    """
    client = openai.OpenAI(
        base_url=f"{server.url}/v1",
        api_key="none",
        timeout=REQUEST_TIMEOUT_S,
        max_retries=0,
    )
    print(f"\n{prompt}", end="", flush=True)
    started = time.monotonic()
    arrivals = []
    tokens = 0
    for chunk in client.completions.create(
        model=MODEL_NAME,
        prompt=prompt,
        stream=True,
        stream_options={"include_usage": True},
        max_tokens=MAX_TOKENS,
        temperature=0.6,  # with greedy decoding such a small model soon repeats itself
        top_p=0.9,
        seed=0,
    ):
        if chunk.usage is not None:
            tokens = chunk.usage.completion_tokens
        if chunk.choices:
            arrivals.append(time.monotonic())
            print(chunk.choices[0].text, end="", flush=True)
    print("\n")
    return tokens, arrivals[0] - started, arrivals[-1] - started


def show_method(log: str) -> bool:
    """Print which kernels run the MoE layers; return whether all layers are hybrid."""
    summaries = list(SUMMARY.finditer(log))
    for found in summaries:
        print(
            f"MoE layers   {found['taken']} of {found['all']} on the hybrid int4 path\n"
            f"  decode     {found['decode']}\n"
            f"  prefill    {found['prefill']}"
        )
    for line in DECLINED.findall(log):
        print(f"  declined   {line}")
    if not summaries:
        print("MoE layers   none on the hybrid int4 path")
    return bool(summaries) and all(s["taken"] == s["all"] for s in summaries)


def cpu_threads(cores: int, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that make vLLM's CPU backend use all ``cores``.

    vLLM keeps one core free for its front end: half of a machine with two cores, and
    all of one with a single core. Empty if ``environment`` already sets one of them.
    """
    if cores > SMALL_MACHINE_CORES or OMP_BIND in environment:
        return {}
    return {} if RESERVED_CPU in environment else {RESERVED_CPU: "0"}


def run(options: argparse.Namespace, progress: Progress) -> int:
    """Run the demo and return its exit status.

    Raises ``ServerError``, or ``ImportError`` without the OpenAI client.
    """
    arguments = [f"--max-model-len={MAX_MODEL_LEN}"]
    if options.enforce_eager:
        arguments.append("--enforce-eager")
    mode = "eager" if options.enforce_eager else "compiled"
    cores = len(os.sched_getaffinity(0))
    environment = cpu_threads(cores, os.environ)
    for name, value in environment.items():
        progress.say(
            f"{name}={value}, so that vLLM's CPU backend uses all {cores} cores"
        )
    progress.step(f"vllm serve {options.model} ({mode} mode)")
    with VllmServer(
        options.model, options.log, arguments, environment, options.port, options.vllm
    ) as server:
        openai = importlib.import_module(
            "openai"
        )  # slow, so it is imported while the server starts
        server.wait_ready(START_TIMEOUT_S, MilestoneWatch(server, progress))
        progress.step(f"completion through the OpenAI API at {server.url}/v1")
        try:
            tokens, first_s, total_s = stream_completion(openai, server, options.prompt)
        except openai.OpenAIError as error:
            raise ServerError(f"the request failed: {error}") from error
        print(f"prompt       first token after {first_s * 1e3:.0f} ms")
        print(f"completion   {tokens} tokens, {tokens / total_s:.0f} tokens/s")
        hybrid = show_method(server.log_text())
        if options.keep:
            progress.step(f'serving "{MODEL_NAME}" until Ctrl-C')
            status = server.wait_exit(None)
            raise ServerError(f"the server exited with status {status}")
        progress.step("stopping the server")
    progress.say("done")
    return 0 if hybrid else 2


def explain_failure(step: str, error: Exception, log: Path) -> None:
    """Print which step failed, why, and what to do."""
    if log.exists():
        lines = log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        print("\n".join([f"--- end of {log}", *lines, "---"]), file=sys.stderr)
    print(
        f"\nFAILED      {step}\n"
        f"why         {error}\n"
        f"what to do  read {log}; `make demo` rebuilds and reinstalls changed files",
        file=sys.stderr,
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--log", type=Path, default=LOG, help="file for its output")
    parser.add_argument("--model", default=CHECKPOINT, help="checkpoint folder")
    parser.add_argument("--port", type=int, default=0, help="default: any free port")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument(
        "--enforce-eager",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="without torch.compile: starts sooner (default); --no-enforce-eager is "
        "vLLM's own default",
    )
    parser.add_argument("--vllm", type=Path, help="default: the one beside this Python")
    parser.add_argument(
        "--keep", action="store_true", help="leave the server running until Ctrl-C"
    )
    return parser.parse_args()


def main() -> int:
    options = parse_arguments()
    # Handle SIGINT even if it is ignored, as in a shell's background jobs: the server
    # must be stopped.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    progress = Progress()
    options.log.unlink(missing_ok=True)
    try:
        return run(options, progress)
    except (ServerError, ImportError) as error:
        explain_failure(progress.current, error, options.log)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted, the server is stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
