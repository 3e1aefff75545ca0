#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Compares ways to serve a model: ``vllm serve`` under ``vllm bench serve``.

Each round starts every variant's server once, warms it up and runs all load points; the
order alternates between rounds. With --together all servers start once, side by side,
and take turns at each load point. Writes DIR/serve.json, serve.md and serve.png. Exit
status: 0; 1 if a variant did not run; 2 for a bad argument; 130 after Ctrl-C, which
stops the servers.
"""

import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from serve_bench import facts, load, report
from serve_bench.cases import (
    MODES,
    PRESETS,
    Point,
    Variant,
    check_checkpoint,
    parse_image,
    parse_points,
    parse_variant,
)
from serve_bench.progress import MilestoneWatch, Progress
from serve_bench.summary import summarize
from serve_bench.vllm_server import ServerError, VllmServer

CHECKOUT = Path(__file__).resolve().parent.parent
Case = tuple[Variant, str]  # and its mode


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line; a bad one ends the process with status 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", nargs="?", help="checkpoint folder, or name of a model on the Hub")
    add(
        "--variant",
        action="append",
        metavar="NAME[=WORDS]",
        help=f"one to compare, may be repeated; the first is the baseline. A preset "
        f"({', '.join(PRESETS)}), or any NAME with words: VAR=value sets the "
        "environment, --model X another checkpoint, the rest goes to vllm serve; words "
        "after a preset's name add to the preset (default: stock and hybrid)",
    )
    add("--mode", default="eager", help="eager, compiled or eager,compiled")
    add(
        "--lengths",
        metavar="INPUT:OUTPUT[@N],...",
        help="tokens, at every --concurrency or at N alone (default 100:128, none with "
        "--requests)",
    )
    add("--concurrency", default="1", help="requests at a time, e.g. 1,4 (default 1)")
    add(
        "--requests",
        type=Path,
        metavar="FILE",
        help="prompts and lengths from a file of make_requests.py, after --lengths",
    )
    add("--image", help="WIDTHxHEIGHT: one synthetic image per request, e.g. 640x480")
    add(
        "--prompts", type=int, default=8, help="requests per slot and point (default 8)"
    )
    add(
        "--most-prompts",
        type=int,
        metavar="N",
        help="requests per point at most, but two per slot (default: no limit)",
    )
    add("--warmups", type=int, default=2, help="requests before each point (default 2)")
    add("--repeats", type=int, default=3, help="rounds (default 3)")
    add(
        "--together",
        action="store_true",
        help="start all servers side by side and keep them for all rounds; only one is "
        "loaded at a time, but their memory must fit (--serve-args)",
    )
    add(
        "--serve-args", default="", help="arguments for every vllm serve, as one string"
    )
    add("--vllm", type=Path, help="the vllm command (default: beside this Python)")
    add("--start-timeout", type=float, default=1800, help="seconds (default 1800)")
    add("--bandwidth", type=float, help="memory bandwidth in GB/s, for the roofline")
    add("--out", type=Path, default=CHECKOUT / "build/serve", metavar="DIR")
    add("--title", help="heading of the plot (default: the checkpoint's name)")
    add("--note", default="", help="text to record in the results")
    options = parser.parse_args(arguments)
    try:
        options.variants = [
            parse_variant(text, options.model)
            for text in options.variant or ["stock", "hybrid"]
        ]
        names = [variant.name for variant in options.variants]
        if len(set(names)) < len(names):
            raise ValueError(f"--variant: names repeat: {', '.join(names)}")
        options.modes = options.mode.split(",")
        for mode in options.modes:
            if mode not in MODES:
                raise ValueError(f"--mode: {mode!r} is none of {', '.join(MODES)}")
        if options.lengths is None:
            options.lengths = "" if options.requests else "100:128"
        options.points = parse_points(
            options.lengths, options.concurrency, options.requests
        )
        options.size = parse_image(options.image) if options.image else None
        if options.requests is not None and options.size is not None:
            raise ValueError("--requests and --image exclude each other")
        for name in ("prompts", "repeats", "most_prompts"):
            value = getattr(options, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} is at least 1")
        for variant in options.variants:
            check_checkpoint(variant.model)
        _make_folder(options.out)
    except ValueError as error:
        parser.error(str(error))
    options.command = shlex.join(["serve_compare.py", *arguments])
    return options


def _make_folder(out: Path) -> None:
    """Create ``--out``; raises ``ValueError`` if it is not writable."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {out}: {error.strerror}") from None
    if not os.access(out, os.W_OK):
        raise ValueError(f"--out {out}: nothing can be written there")


class Comparison:
    """One run: the measurements so far and where they are written."""

    def __init__(self, options: argparse.Namespace, progress: Progress) -> None:
        self.options = options
        self.progress = progress
        self.samples: list[dict[str, Any]] = []
        self.failures: dict[str, str] = {}
        self.moe_log: dict[str, list[str]] = {v.name: [] for v in options.variants}
        self.facts: dict[str, Any] = {}

    def run(self) -> None:
        """Run all rounds; results are written after each, or after each point."""
        options = self.options
        self.progress.say("looking at the machine and the checkpoints")
        contexts = sorted({p.input_len + p.output_len // 2 for p in options.points})
        models = list(dict.fromkeys(v.model for v in options.variants))
        self.facts = facts.gather(models, contexts, options.bandwidth)
        cases = [(v, mode) for mode in options.modes for v in options.variants]
        every = options.points
        turns = [[point] for point in every] if options.together else [every]
        with contextlib.ExitStack() as kept:
            servers = self.start_all(cases, kept) if options.together else {}
            for number in range(options.repeats):
                for points in turns:
                    for case in cases if number % 2 == 0 else cases[::-1]:
                        if _name(case) not in self.failures:
                            server = servers.get(_name(case))
                            self.take_turn(number, case, server, points)
                    self.write()

    def take_turn(
        self, number: int, case: Case, running: VllmServer | None, points: list[Point]
    ) -> None:
        """Run load points on the case's server, which is started unless it runs."""
        self.progress.say(f"round {number + 1}/{self.options.repeats}: {_name(case)}")
        with self.noting_failure(case), contextlib.ExitStack() as stack:
            server = running
            if server is None:
                server = stack.enter_context(self.server(case, number))
                self.wait_ready(server)
            self.measure(number, case, server, points)

    def server(self, case: Case, number: int) -> VllmServer:
        """A server that starts when the context is entered."""
        variant, mode = case
        log = self.options.out / f"{variant.name}-{mode}-{number + 1}.log"
        words = [*MODES[mode], *shlex.split(self.options.serve_args)]
        return VllmServer(
            variant.model,
            log,
            [*words, *variant.arguments],
            variant.environment,
            program=self.options.vllm,
        )

    def start_all(
        self, cases: list[Case], kept: contextlib.ExitStack
    ) -> dict[str, VllmServer]:
        """Start a server per case; returns those that are ready, by the case's name."""
        self.progress.say(f"starting {len(cases)} servers")
        servers = {_name(c): kept.enter_context(self.server(c, 0)) for c in cases}
        for case in cases:
            with self.noting_failure(case):
                self.wait_ready(servers[_name(case)])
        return servers

    @contextlib.contextmanager
    def noting_failure(self, case: Case) -> Iterator[None]:
        """Context manager that records a ``ServerError`` as the case's failure."""
        try:
            yield
        except ServerError as error:
            self.failures[_name(case)] = str(error)
            self.progress.say(f"  FAILED: {_name(case)}: {error}")

    def wait_ready(self, server: VllmServer) -> None:
        """Wait for the server, showing progress. Raises ``ServerError``."""
        server.wait_ready(
            self.options.start_timeout, MilestoneWatch(server, self.progress)
        )
        self.progress.say("  the server is ready")

    def measure(
        self, number: int, case: Case, server: VllmServer, points: list[Point]
    ) -> None:
        """Run load points on a server that is ready. Raises ``ServerError``."""
        variant, mode = case
        for point in points:
            values = self.drive(server, variant, point)
            self.samples.append(
                {
                    "variant": variant.name,
                    "mode": mode,
                    "round": number,
                    **vars(point),
                    **values,
                }
            )
            self.progress.say(
                f"  {point}: TTFT {values['ttft_ms']:.1f} ms, TPOT "
                f"{values['tpot_ms']:.2f} ms, "
                f"{values['output_tokens_per_s']:.1f} tokens/s"
            )
        self.moe_log[variant.name] = moe_lines(server.log_text())

    def drive(
        self, server: VllmServer, variant: Variant, point: Point
    ) -> dict[str, float]:
        """Run one load point; returns its metrics. Raises ``ServerError``."""
        options = self.options
        result = options.out / "bench.json"
        count = options.prompts * point.concurrency
        if options.most_prompts is not None:
            count = min(count, max(options.most_prompts, 2 * point.concurrency))
        words = load.command(
            server.program,
            server.url,
            variant.model,
            point,
            count,
            options.warmups,
            options.size,
            result,
            options.requests if point.from_file else None,
        )
        return load.drive(words, result, options.out / "bench.log")

    def result(self) -> dict[str, Any]:
        """All results, in the form of serve.json."""
        options = self.options
        return {
            **self.facts,
            "command": options.command,
            "title": options.title or Path(options.variants[0].model).name,
            "settings": {
                "repeats": options.repeats,
                "prompts": options.prompts,
                "most_prompts": options.most_prompts,
                "warmups": options.warmups,
                "image": options.image,
                "requests": options.requests and options.requests.name,
                "serve_args": options.serve_args,
                "together": options.together,
                "note": options.note,
            },
            "variants": [
                {**vars(variant), "moe_log": self.moe_log[variant.name]}
                for variant in options.variants
            ],
            "baseline": options.variants[0].name,
            "failures": self.failures,
            "samples": self.samples,
            "summary": summarize(self.samples, options.variants[0].name),
        }

    def write(self) -> None:
        """Write serve.json, serve.md and serve.png."""
        result = self.result()
        out = self.options.out
        (out / "serve.json").write_text(json.dumps(result, indent=1) + "\n")
        (out / "serve.md").write_text(report.markdown(result))
        (out / "serve.png").unlink(missing_ok=True)  # from an earlier run
        if result["summary"]:
            report.plot(out / "serve.png", result)


def _name(case: Case) -> str:
    return f"{case[0].name}, {case[1]}"


def moe_lines(log: str) -> list[str]:
    """The server's log lines about its MoE layers."""
    return list(dict.fromkeys(re.findall(r"HybridW4A16 MoE.*", log)))


def interrupt(number: int, frame: FrameType | None) -> None:
    """Signal handler; stopping takes seconds, so print at once that it has begun."""
    print("\ninterrupted, stopping the servers", file=sys.stderr, flush=True)
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison; returns its exit status."""
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    # also if SIGINT is ignored, as in a shell's background jobs
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    comparison = Comparison(options, Progress())
    try:
        comparison.run()
    except KeyboardInterrupt:
        print("the servers are stopped", file=sys.stderr)
        return 130
    print()
    print((options.out / "serve.md").read_text())
    print(f"written: {options.out}/serve.json, serve.md, serve.png")
    return 1 if comparison.failures else 0


if __name__ == "__main__":
    sys.exit(main())
