# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Runs the cases of test_moe_int4_on_host.py on an NVIDIA GPU, with compute-sanitizer.

And those of test_wvSplitK_int_g_on_host.py and test_router_on_host.py.

``python tests/kernels/sanitize_gpu.py [--arch sm_90] [--tools memcheck,racecheck,...]
[--amd-path]``

Builds the kernels, their launchers and csrc/rocm/host/runner.cpp with nvcc into one
program without torch, so that the sanitizer only reports on our code. Runs every case
twice, first without a tool and then under each one. Compares the results with float64,
and both runs bit for bit. Prints a line per tool. Exit status 1: a report or a wrong
result; 2: no nvcc, or it failed. ``--program`` runs what ``--build`` built elsewhere.
``--amd-path`` builds the code path of AMD: no matrix instructions, no asynchronous
copies. Needs numpy and pytest.
"""

import argparse
import concurrent.futures
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.kernels import test_moe_int4_on_host as host  # noqa: E402
from tests.kernels import test_router_on_host as router  # noqa: E402
from tests.kernels import test_wvSplitK_int_g_on_host as dense  # noqa: E402
from tests.support.kernels_on_host import SEED, read_records, record  # noqa: E402

ROCM = ROOT / "csrc" / "rocm"
TOOLS = "memcheck,racecheck,initcheck,synccheck"


def build(nvcc, arch, folder, amd_path):
    """Compiles the program in `folder`, one process per object; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    number = arch.removeprefix("sm_")
    common = [nvcc, "-std=c++17", "-O3", f"-I{ROCM}", f"-I{ROCM.parent}"]
    if amd_path:
        common.append("-DHYBRID_W4A16_AMD_PATH")
    kernels = ["-x", "cu", "-gencode", f"arch=compute_{number},code={arch}"]
    jobs = [(source, kernels) for source in sorted(ROCM.glob("*.hip"))]
    plain = ["-x", "c++", "-DHYBRID_W4A16_CUDA"]
    launchers = [*sorted(ROCM.glob("launch*.cpp")), ROCM / "host" / "runner.cpp"]
    jobs += [(source, plain) for source in launchers]

    def compile_one(source, flags):
        out = folder / f"{source.stem}.o"
        subprocess.run([*common, *flags, "-c", source, "-o", out], check=True)
        return out

    with concurrent.futures.ThreadPoolExecutor() as pool:
        objects = list(pool.map(lambda job: compile_one(*job), jobs))
    program = folder / "runner"
    subprocess.run([nvcc, "-cudart", "static", *objects, "-o", program], check=True)
    return program


def cases_of(mma):
    """All calls for a program with or without matrix instructions."""
    for key in host.COMBINATIONS:
        if key[0] == mma:
            yield from host.Maker(*key).cases()
    for key in dense.COMBINATIONS:
        if key[0] == mma:
            yield from dense.Maker(*key[1:]).cases(every=False)
    yield from dense.rescorings(mma)
    yield from router.cases(router.SHAPES, (1, 3, 5))


def run(command, mma):
    """Runs all cases in one process; returns (wrong results, printed text, cases)."""
    cases = list(cases_of(mma))
    calls = b"".join(record(case.fields) for case in cases)
    done = subprocess.run(command, input=calls, capture_output=True, check=False)
    text = done.stderr.decode(errors="replace")
    replies = list(read_records(done.stdout))
    wrong = []
    if done.returncode or len(replies) != len(cases):
        wrong.append(f"{len(replies)} of {len(cases)} replies, exit {done.returncode}")
    for case, reply in zip(cases, replies, strict=False):
        try:
            case.check_reply(reply)
        except AssertionError as error:
            wrong.append(str(error))
    return wrong, text, len(cases)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--tools", default=TOOLS)
    parser.add_argument("--build", type=Path, help="only build, into this folder")
    parser.add_argument("--program", type=Path, help="what --build made")
    parser.add_argument("--nvcc", default=shutil.which("nvcc"))
    parser.add_argument("--amd-path", action="store_true", help="what AMD runs")
    parser.add_argument("--logs", type=Path, default=Path("build/sanitizer"))
    options = parser.parse_args()
    program = options.program
    if program is None:
        if options.nvcc is None:
            print("no nvcc on the PATH", file=sys.stderr)
            return 2
        try:
            folder = options.build or Path("build/sanitizer")
            folder = folder.resolve()
            program = build(options.nvcc, options.arch, folder, options.amd_path)
        except subprocess.CalledProcessError:
            return 2
        if options.build:
            print(program)
            return 0
    options.logs.mkdir(parents=True, exist_ok=True)
    print(f"seed {SEED}")

    def check(tool):
        command = [program.resolve()]
        if tool != "none":
            sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
            command = [*sanitizer, "--log-file", options.logs / f"{tool}.log", *command]
        wrong, text, count = run(command, not options.amd_path)
        log = options.logs / f"{tool}.log"
        report = log.read_text().splitlines()[-1] if log.exists() else text[-300:]
        verdict = "ok" if not wrong else f"FAILED: {wrong[:3]} {text[-500:]}"
        print(f"{tool}: {count} calls, twice each: {verdict}  {report}", flush=True)
        return bool(wrong)

    # In parallel, because a sanitizer spends most of its time on the host.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        failed = list(pool.map(check, ["none", *options.tools.split(",")]))
    return int(any(failed))


if __name__ == "__main__":
    sys.exit(main())
