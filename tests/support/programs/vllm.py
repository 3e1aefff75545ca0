#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Replaces the ``vllm`` command in tests of the code that supervises it.

``serve`` answers /health and starts a child that also has the log open, like vLLM's
front end and its engine. ``bench serve`` writes a result. Words in ``STAND_IN`` change
that: ``broken`` (exits with an error), ``silent`` (never becomes healthy), ``stubborn``
(none of its processes ends when asked to).
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

BEHAVIOUR = os.environ.get("STAND_IN", "").split(",")
CHILD = "import sys, time; print('EngineCore', flush=True); time.sleep(600)"
IGNORING_CHILD = f"import signal; signal.signal(15, signal.SIG_IGN); {CHILD}"


class Health(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()


def serve(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    port = parser.parse_known_args(arguments)[0].port
    print(f"INFO non-default args: {arguments}", flush=True)
    if "broken" in BEHAVIOUR or "--broken" in arguments:
        print("ValueError: the first error is the cause", flush=True)
        sys.exit("RuntimeError: Engine core initialization failed.")
    stubborn = "stubborn" in BEHAVIOUR
    child = subprocess.Popen(
        [sys.executable, "-c", IGNORING_CHILD if stubborn else CHILD]
    )

    def stop(number: int, frame: object) -> None:
        if not stubborn:
            child.terminate()
            child.wait()
            sys.exit(0)

    signal.signal(signal.SIGTERM, stop)
    print("INFO Initializing a V1 LLM engine", flush=True)
    print("INFO HybridW4A16 MoE: 6/6 layers (decode: A, prefill: B), 0 declined")
    sys.stdout.flush()
    if "silent" in BEHAVIOUR:
        time.sleep(600)
    HTTPServer(("127.0.0.1", port), Health).serve_forever()


def bench(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--result-dir", type=Path)
    parser.add_argument("--result-filename")
    options = parser.parse_known_args(arguments)[0]
    names = ("median_ttft_ms", "median_tpot_ms", "p50_itl_ms", "p99_itl_ms")
    names += ("output_throughput", "mean_ttft_ms", "mean_tpot_ms")
    result = {**dict.fromkeys(names, 10.0), "completed": 2, "failed": 0}
    (options.result_dir / options.result_filename).write_text(json.dumps(result))


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2:])
    else:
        assert sys.argv[1:3] == ["bench", "serve"], sys.argv
        bench(sys.argv[3:])
