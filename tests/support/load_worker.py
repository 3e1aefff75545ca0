# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Tries to load checkpoints in one process, which saves a server start for each.

    python -m tests.support.load_worker '{"NAME": ["FOLDER", {"VARIABLE": "VALUE"}]}'

Prints ``=== NAME: loaded`` or ``=== NAME: failed`` after the log of each load.
"""

import json
import os
import sys
import traceback

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def main() -> None:
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    for name, (folder, variables) in json.loads(sys.argv[1]).items():
        os.environ.update(variables)
        try:
            LLM(folder, enforce_eager=True, max_model_len=128)
            outcome = "loaded"
        except Exception:
            print(traceback.format_exc())
            outcome = "failed"
        cleanup_dist_env_and_memory()
        print(f"=== {name}: {outcome}", flush=True)


if __name__ == "__main__":
    main()
