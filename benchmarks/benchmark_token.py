#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Times whole decoded tokens and prompts of a model at full size with random weights.

Every setting is an engine of vLLM in a process of its own:

  hybrid                  this project
  hybrid+int4_rescored    with a quantized lm_head
  marlin                  stock vLLM with Marlin for experts and dense linears (CUDA)
  triton                  stock vLLM with its Triton experts
  stock                   stock vLLM as it chooses by itself

Settings run one after the other. With --together all are loaded at once and take turns,
so that a slow phase of the machine affects all of them. A turn measures all batch
sizes, prompts and loads; engines never run at the same time. The table has the median
and deciles over the steps of all turns, and how many times as fast as the first stock
setting they are. --load adds tokens/s with requests that come and go, whose lengths
differ. --trace adds the GPU's time by part of the model.

No checkpoint is needed: weights are made at load. Random MTP layers predict nothing, so
with --speculative a step costs what it would, but gains one token.
Exit status: 0; 1 if a setting failed (its cause is printed and the others continue); 2
for a bad argument.
"""

import argparse
import json
import os
import signal
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_bench.arguments import positive_numbers
from moe_bench.report import write_json
from serve_bench import facts
from serve_bench.progress import Progress
from token_bench import report
from token_bench.engines import END_S, EngineError, EngineProcess
from token_bench.models import MODELS, write_config
from token_bench.settings import NAMES, Setting, parse_settings
from token_bench.worker import SKIPPED_STEPS, Job

CHECKOUT = Path(__file__).resolve().parent.parent
PROMPTS_PER_TURN = 3


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; a bad one ends the process with status 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", choices=MODELS, default="qwen3.5-35b-a3b")
    add("--tiny", action="store_true", help="a small model of the same kind, for tests")
    add("--layers", type=int, help="decoder layers (default: all)")
    add(
        "--settings",
        metavar="NAME,...",
        help=f"of {', '.join(NAMES)} (default: what the device has)",
    )
    add("--batch", default="1,2,4", help="requests at a time (default 1,2,4)")
    add("--prompt", default="128,512,2048", help="tokens (default 128,512,2048)")
    add(
        "--load",
        metavar="N,...",
        help="also requests at a time that come and go; 256 of them need about "
        "--kv-gib 18 with qwen3.5-35b-a3b, by arithmetic",
    )
    add("--context", type=int, default=128, help="prompt of a decoding request")
    add("--tokens", type=int, default=128, help="new tokens per request (default 128)")
    add("--repeats", type=int, default=3, help="turns per setting (default 3)")
    add("--speculative", type=int, default=0, metavar="K", help="MTP drafts per step")
    add("--tensor-parallel", type=int, default=1, metavar="N", help="GPUs per engine")
    add("--together", action="store_true", help="load all engines and take turns")
    add(
        "--trace",
        action="store_true",
        help="also trace decode steps and prompts on the GPU",
    )
    add("--eager", action="store_true", help="without torch.compile and graphs")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU only")
    add("--kv-gib", type=float, default=1.5, help="KV cache per GPU and engine")
    add(
        "--engine",
        type=json.loads,
        default={},
        metavar="JSON",
        help="""more arguments of vllm.LLM, such as '{"attention_backend": "..."}'""",
    )
    add("--timeout", type=float, default=1800, help="seconds to wait for an answer")
    add("--out", type=Path, default=CHECKOUT / "build/token", help="logs and traces")
    add("--json", type=Path, metavar="F", help="write the results to F")
    add("--note", default="", help="text to record in the JSON file")
    options = parser.parse_args(arguments)
    try:
        _check(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def _check(options: argparse.Namespace) -> None:
    """Split the lists in place; raises ``ValueError`` that names the option."""
    options.device = find_device()
    options.settings = parse_settings(options.settings, options.device)
    options.batch = tuple(positive_numbers("--batch", options.batch))
    options.prompt = tuple(positive_numbers("--prompt", options.prompt))
    load = positive_numbers("--load", options.load) if options.load else ()
    options.load = tuple(load)
    for name in ("layers", "context", "repeats", "tensor_parallel", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            option = name.replace("_", "-")
            raise ValueError(f"--{option}: {value} is not a positive number")
    if options.tokens <= SKIPPED_STEPS:
        raise ValueError(f"--tokens: expected more than {SKIPPED_STEPS}")
    if options.speculative < 0:
        raise ValueError(f"--speculative: {options.speculative} is negative")
    if options.speculative and not MODELS[options.model].has_mtp:
        raise ValueError(f"--speculative: {options.model} has no MTP layer")
    if options.trace and options.device == "cpu":
        raise ValueError("--trace: there is no GPU")
    cards = options.threads if options.device == "cpu" else gpu_count()
    if options.tensor_parallel > cards:
        kind = "threads" if options.device == "cpu" else "GPUs"
        raise ValueError(
            f"--tensor-parallel: {options.tensor_parallel} exceeds the {cards} {kind}"
        )
    if not isinstance(options.engine, dict):
        raise ValueError(f"--engine: expected a JSON object, got {options.engine!r}")
    if options.json is not None and not options.json.resolve().parent.is_dir():
        raise ValueError(f"--json: the folder of {options.json} does not exist")


def find_device() -> str:
    """cpu, cuda or rocm."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    return "rocm" if torch.version.hip else "cuda"


def gpu_count() -> int:
    """GPUs that this process may use."""
    import torch

    return torch.cuda.device_count()


class Benchmark:
    """One run: what was measured so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.progress = Progress()
        self.failures: dict[str, str] = {}
        self.logs: dict[str, list[str]] = {}
        self.decoded: dict[tuple[str, int], list[Any]] = defaultdict(list)
        self.prefilled: dict[tuple[str, int], list[float]] = defaultdict(list)
        self.loaded: dict[tuple[str, int], list[Any]] = defaultdict(list)
        self.traces: list[dict[str, Any]] = []

    def run(self) -> None:
        """Measure all settings."""
        settings = self.options.settings
        groups = [settings] if self.options.together else [[s] for s in settings]
        for group in groups:
            engines: list[EngineProcess] = []
            wait_s = 0.0  # after an interrupt
            try:
                for setting in group:
                    self.progress.say(f"{setting.name}: loading")
                    job = self.job(setting)
                    engines.append(EngineProcess(job, self.options.timeout))
                self.measure(engines)
                wait_s = END_S
            finally:
                for engine in engines:
                    engine.close(wait_s)

    def job(self, setting: Setting) -> Job:
        """Write the setting's checkpoint; returns what its engine needs to know."""
        options = self.options
        folder = options.out / setting.name
        config = write_config(
            folder / "model",
            MODELS[options.model],
            options.layers,
            options.tiny,
            setting.checkpoint,
            setting.in_16_bit,
        )
        traces = folder / "traces"
        for old in traces.glob("*"):
            old.unlink()
        common = (
            *("device", "batch", "prompt", "load", "context", "tokens", "speculative"),
            *("tensor_parallel", "eager", "trace", "threads", "kv_gib", "engine"),
        )
        return Job(
            setting=setting,
            model=folder / "model",
            log=folder / "log.txt",
            traces=traces.resolve(),
            vocabulary=config["vocab_size"],
            **{name: getattr(options, name) for name in common},
        )

    def measure(self, engines: list[EngineProcess]) -> None:
        """Measure the engines in turns; one that fails is dropped."""
        options = self.options
        for engine in engines:
            self.attempt(engine, "loaded", engine.wait_ready)
        for turn in range(options.repeats):
            # the order alternates
            for engine in engines[:: -1 if turn % 2 else 1]:
                self.attempt(engine, f"turn {turn + 1}", lambda e=engine: self.turn(e))
        if options.trace:
            for engine in engines:
                self.attempt(engine, "traced", lambda e=engine: self.trace(e))

    def attempt(self, engine: EngineProcess, what: str, call: Any) -> None:
        """Run a step of an engine that has not failed, and record a failure."""
        name = engine.job.setting.name
        if name in self.failures:
            return
        try:
            call()
            self.progress.say(f"{name}: {what}")
        except EngineError as error:
            self.failures[name] = str(error)
            self.progress.say(f"{name}: FAILED: {error} (see {engine.job.log})")
        self.logs[name] = engine.log_lines()

    def turn(self, engine: EngineProcess) -> None:
        """Measure all batch sizes, prompts and loads once."""
        name = engine.job.setting.name
        for batch in self.options.batch:
            self.decoded[name, batch].append(engine.ask("decode", batch))
        for tokens in self.options.prompt:
            for _ in range(PROMPTS_PER_TURN):
                self.prefilled[name, tokens].append(engine.ask("prefill", tokens))
        for requests in self.options.load:
            self.loaded[name, requests].append(engine.ask("load", requests))

    def trace(self, engine: EngineProcess) -> None:
        """Trace decode steps at all batch sizes, prompts, and steps under load."""
        for kind, question, sizes in (
            ("batch", "trace", self.options.batch),
            ("prompt", "trace_prefill", self.options.prompt),
            ("load", "trace_load", self.options.load),
        ):
            for size in sizes:
                found = engine.ask(question, size)
                row = {"setting": engine.job.setting.name, kind: size, **found}
                self.traces.append(row)

    def result(self) -> dict[str, Any]:
        """All results, in the form of the JSON file."""
        options = self.options
        plain = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(options).items()
            if name != "settings"
        }
        return {
            "options": plain,
            "settings": [
                {**vars(setting), "log": self.logs.get(setting.name, [])}
                for setting in options.settings
            ],
            "failures": self.failures,
            "decode": [report.decode_row(*k, v) for k, v in self.decoded.items()],
            "prefill": [report.prefill_row(*k, v) for k, v in self.prefilled.items()],
            "load": [report.load_row(*k, v) for k, v in self.loaded.items()],
            "traces": self.traces,
        }


def report_result(result: dict[str, Any], options: argparse.Namespace) -> None:
    """Print the tables and write the JSON file."""
    names = [setting.name for setting in options.settings]
    measured = {row["setting"] for row in result["decode"]}
    peers = [s.name for s in options.settings if s.is_peer and s.name in measured]
    peer = peers[0] if peers else None
    machine = result["machine"]
    size = "tiny" if options.tiny else f"{options.layers or 'all'} layers"
    print(f"\n{options.model} ({size}), {machine.get('gpu') or machine['cpu']}")
    print("median (deciles)" + (f", times as fast as {peer}" if peer else ""))
    print(*report.time_table(names, peer, result), sep="\n")
    print(*report.part_tables(names, result["traces"]), sep="\n")
    for name, reason in result["failures"].items():
        print(f"{name}: FAILED: {reason}")
    if options.json is not None:
        write_json(options.json, result)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns its exit status."""
    options = parse_arguments(arguments)
    # in a process of its own, so that this one holds no GPU memory
    machine = facts.gather([], [], None)["machine"]
    benchmark = Benchmark(options)
    try:
        benchmark.run()
    finally:  # what was measured before an interrupt counts, too
        report_result({"machine": machine, **benchmark.result()}, options)
    return 1 if benchmark.failures else 0


if __name__ == "__main__":
    # engines are ended before this process ends
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
