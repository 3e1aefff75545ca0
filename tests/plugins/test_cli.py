# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The command line as a whole: ``--help`` and bad arguments are answered at once."""

import subprocess
import sys

from vllm.plugins.hybrid_w4a16 import cli

ASK_FOR_HELP = """
import contextlib, io, sys
import vllm_hybrid_w4a16
for words in sys.argv[1:]:
    sys.argv[1:] = words.split()
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            vllm_hybrid_w4a16.main()
        except SystemExit as end:
            print(end.code, file=sys.__stdout__)
    assert "usage: vllm-hybrid-w4a16" in out.getvalue(), out.getvalue()
print(sorted({"torch", "vllm", "numpy", "tqdm"} & set(sys.modules)))
"""


def test_help_and_bad_arguments_import_neither_vllm_nor_torch():
    calls = ["--help", *(f"{name} --help" for name in cli.COMMANDS)]
    bad = ["nonsense", *(f"{name} --nonsense" for name in cli.COMMANDS)]
    command = [sys.executable, "-c", ASK_FOR_HELP, *calls, *bad]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    *statuses, imported = run.stdout.splitlines()
    assert statuses == ["0"] * len(calls) + ["2"] * len(bad)
    assert imported == "[]"
