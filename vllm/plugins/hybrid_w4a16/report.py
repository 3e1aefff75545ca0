# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""``vllm-hybrid-w4a16 report CHECKPOINT``: all measurements to send, in one run.

It runs doctor, explain and selftest, measures the tuning table with ``--tune``, and
compares stock vLLM with the hybrid path. It writes an archive to send and a block of
Markdown to paste. If a step fails, the report says so and the other steps still run.
Ctrl-C skips the remaining steps and writes the report.

Exit status: 0 if every step succeeded; 1 if one failed; 2 for a bad argument; 130 after
Ctrl-C.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import io
import json
import shlex
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import doctor, machine, selftest

# Version of the report's format; tools/merge_reports.py checks it.
FORM = 1
STEPS = ("doctor", "explain", "selftest", "tune", "compare")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``report`` to ``parser``."""
    add = parser.add_argument
    add("checkpoint", help="folder, or name of a model on the Hub")
    add("--out", type=Path, default=Path("hybrid-w4a16-report"), help="folder to write")
    add("--rounds", type=int, default=3, help="servers per variant (default: 3)")
    add(
        "--serve-args",
        default="--enforce-eager --max-model-len 4096",
        help="arguments for vllm serve, as one string (default: %(default)s)",
    )
    add("--tune", action="store_true", help="measure a tuning table first (minutes)")
    add(
        "--skip",
        action="append",
        default=[],
        choices=STEPS,
        help="skip a step; may be repeated",
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    if args.rounds < 1:
        print("error: --rounds must be at least 1", file=sys.stderr)
        return 2
    from vllm.model_executor.layers.fused_moe.oracle import (
        hybrid_w4a16_switch as switch,
    )

    switch.register()
    args.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"form": FORM, "checkpoint": _name(args.checkpoint)}
    report["environment"] = environment()
    report["steps"], report["results"] = {}, {}
    status = 0
    try:
        for name in STEPS:
            if name in args.skip or (name == "tune" and not args.tune):
                report["steps"][name] = "not run"
                continue
            print(f"{name} ...", flush=True)
            start = time.monotonic()
            outcome = _step(STEP_FUNCTIONS[name], args, report)
            seconds = time.monotonic() - start
            report["steps"][name] = f"{outcome} ({seconds:.0f} s)"
            print(f"{name}: {report['steps'][name]}", flush=True)
            status = status or int(outcome != "ok")
    except KeyboardInterrupt:
        for name in STEPS:
            report["steps"].setdefault(name, "not run: interrupted")
        status = 130
    report["table"] = table_in_use(report["environment"]["device"])
    archive = write(report, args.out)
    print(f"\n{as_markdown(report)}\nsend {archive}, and paste the lines above")
    return status


def _name(checkpoint: str) -> str:
    """The checkpoint's name for the report: only the last part of a folder's path, as
    the rest may identify the owner.
    """
    folder = Path(checkpoint)
    return folder.resolve().name if folder.is_dir() else checkpoint


def _step(
    step: Callable[[argparse.Namespace, dict[str, Any]], str],
    args: argparse.Namespace,
    report: dict[str, Any],
) -> str:
    # a failing step is a result too; the other steps still run
    try:
        return step(args, report)
    except Exception as error:  # noqa: BLE001
        reason = (str(error).splitlines() or [""])[0]
        return f"failed: {type(error).__name__}: {reason}"


def _doctor(args: argparse.Namespace, report: dict[str, Any]) -> str:
    from vllm.plugins.hybrid_w4a16.progress import quiet

    with quiet():
        checks = doctor.diagnose()
    report["results"]["doctor"] = [vars(check) for check in checks]
    fix = next((check.fix for check in checks if not check.ok), None)
    return "ok" if fix is None else f"found: {fix}"


def _explain(args: argparse.Namespace, report: dict[str, Any]) -> str:
    from vllm.plugins.hybrid_w4a16 import explain
    from vllm.plugins.hybrid_w4a16.progress import quiet

    with quiet():
        report["results"]["explain"] = explain.explain(args.checkpoint)
    return "ok"


def _selftest(args: argparse.Namespace, report: dict[str, Any]) -> str:
    from vllm.plugins.hybrid_w4a16 import selftest_run
    from vllm.plugins.hybrid_w4a16.progress import Progress

    with Progress("selftest") as progress:
        found = selftest_run.selftest(0, selftest.TIME_LIMIT_S, progress)
    report["results"]["selftest"] = found
    return "ok" if found["ok"] else f"failed: {selftest.as_text(found)[-1]}"


def _tune(args: argparse.Namespace, report: dict[str, Any]) -> str:
    from vllm.plugins.hybrid_w4a16 import tune

    parser = argparse.ArgumentParser()
    tune.add_arguments(parser)
    status = tune.run(parser.parse_args([args.checkpoint]))
    return "ok" if status == 0 else f"failed: status {status}"


def _compare(args: argparse.Namespace, report: dict[str, Any]) -> str:
    from vllm.plugins.hybrid_w4a16 import compare
    from vllm.plugins.hybrid_w4a16.explain_checkpoint import read_checkpoint

    vocabulary = read_checkpoint(args.checkpoint).value("vocab_size")
    found = compare.compare(
        args.checkpoint,
        vocabulary,
        shlex.split(args.serve_args),
        args.rounds,
        args.out,
        lambda text: print(f"  {text}", flush=True),
    )
    report["results"]["compare"] = found
    if not found["failures"]:
        return "ok"
    return "failed: " + "; ".join(f"{n}: {why}" for n, why in found["failures"].items())


STEP_FUNCTIONS = {
    "doctor": _doctor,
    "explain": _explain,
    "selftest": _selftest,
    "tune": _tune,
    "compare": _compare,
}


def environment() -> dict[str, Any]:
    """Facts about the device and software; nothing identifies a person or a network."""
    import torch

    import vllm
    from vllm.model_executor.layers.fused_moe import hybrid_w4a16_device as devices
    from vllm.platforms import current_platform

    family = devices.device_family()
    known = None if isinstance(family, str) else family
    memory = None
    if current_platform.is_rocm() and torch.cuda.is_available():
        memory = machine.read_memory(*torch.cuda.mem_get_info())
    gpu = None
    if not current_platform.is_cpu() and torch.cuda.is_available():
        gpu = torch.cuda.get_device_name()
    return {
        "date": datetime.date.today().isoformat(),
        "device": known.name if known else None,
        "unsupported": None if known else family,
        "gpu": gpu,
        "compute_units": known.cu_count if known else None,
        "torch": torch.__version__,
        "hip": torch.version.hip,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "vllm": vllm.__version__,
        "project": _version(doctor.DISTRIBUTION),
        "commit": commit(),
        **machine.as_facts(memory),
    }


def table_in_use(arch: str | None) -> dict[str, list[dict[str, Any]]]:
    """What the owner's tuning table has, in the form in which it can be shipped."""
    from vllm.model_executor.layers.fused_moe import hybrid_w4a16_tuning as tuning
    from vllm.model_executor.layers.quantization import (
        hybrid_w4a16_linear_table as linear_table,
    )

    if arch is None:
        return {"shapes": [], "linears": []}
    return {
        "shapes": tuning.owner_entries(arch),
        "linears": linear_table.entries(arch),
    }


def commit() -> str | None:
    """Commit of the installed version or of the checkout; ``None``: unknown."""
    _, _, named = (_version(doctor.DISTRIBUTION) or "").partition("+g")
    if named:
        return named.partition(".")[0]
    folder = Path(__file__).resolve().parent
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def write(report: dict[str, Any], folder: Path) -> Path:
    """Write report.json, report.md and the servers' logs into one archive.

    Returns its path.
    """
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "report.md").write_text(as_markdown(report))
    archive = folder.with_name(folder.name + ".tar.gz")
    with tarfile.open(archive, "w:gz") as tar:
        for file in sorted(folder.iterdir()):
            if file.suffix in (".json", ".md", ".log"):
                tar.add(file, f"{folder.name}/{file.name}", filter=_anonymous)
    return archive


def _anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
    """Remove the owner's account names from an archive member."""
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    return info


def as_markdown(report: dict[str, Any]) -> str:
    """The report as a block of Markdown to paste."""
    facts, results = report["environment"], report["results"]
    versions = [f"vLLM {facts['vllm']}", f"torch {facts['torch']}"]
    versions += [f"HIP {facts['hip']}"] if facts["hip"] else []
    versions += [f"CUDA {facts['cuda']}"] if facts["cuda"] else []
    versions += [f"Triton {facts['triton']}"] if facts["triton"] else []
    versions += [f"{name} {text}" for name, text in facts["versions"].items()]
    limit = facts["power_limit_watts"]
    power = f"profile {facts['power_profile'] or 'unknown'}, limit " + (
        f"{limit:.0f} W" if limit else "unknown"
    )
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        print(f"### {facts['gpu'] or facts['cpu']}: {report['checkpoint']}\n")
        print(f"* device: {facts['device'] or facts['unsupported']}; power: {power}")
        print(f"* {', '.join(versions)}")
        print(
            f"* vllm-hybrid-w4a16 {facts['project']}, commit "
            f"{str(facts['commit'])[:12]}; {len(report['table']['shapes'])} tuned "
            "shapes"
        )
        _print_linears(report["table"]["linears"])
        for name, text in report["steps"].items():
            print(f"* {name}: {text}")
        if results.get("explain"):
            _print_explain(results["explain"])
        if results.get("compare"):
            _print_compare(results["compare"])
    return out.getvalue()


def _print_linears(entries: list[dict[str, Any]]) -> None:
    from vllm.model_executor.layers.quantization import (
        hybrid_w4a16_linear_table as linear_table,
    )

    for entry in entries:
        times = [
            f"{row['us']} us ({row['peer_us']})"
            for row in entry["rows"]
            if row["rows"] in (1, 4)
        ]
        reason = linear_table.why_not(entry)
        print(
            f"* {linear_table.entry_shape(entry)}: {', '.join(times)} at 1 and 4 rows "
            f"({entry['peer']}); {'used' if reason is None else f'not used: {reason}'}"
        )


def _print_explain(found: dict[str, Any]) -> None:
    limit, size = found["roofline_tokens_per_s"], found["token_bytes"]
    text = f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
    print(
        f"* a token reads {text}" + (f", at most {limit:.0f} tokens/s" if limit else "")
    )


def _print_compare(found: dict[str, Any]) -> None:
    print(
        f"\n{found['input_tokens']} tokens in, {found['output_tokens']} out, one "
        f"request at a time, `{shlex.join(found['serve_arguments'])}`; median (least "
        "to largest) over servers\n"
    )
    print("| | TTFT ms | TPOT ms | output tokens/s |\n| --- | --- | --- | --- |")
    for name, row in found["summary"].items():
        if row is None:
            why = found["failures"].get(name, "not run").replace("|", "/")
            print(f"| {name} | {why} | | |")
            continue
        cells = [
            _cell(row[column], digits)
            for column, digits in (("ttft_ms", 1), ("tpot_ms", 2), ("tokens_per_s", 1))
        ]
        print(f"| {name} | {' | '.join(cells)} |")
    if found["ratio"]:
        print(f"\nhybrid / stock, output tokens/s: {_cell(found['ratio'], 2)}")


def _cell(values: dict[str, float], digits: int) -> str:
    median, least, most = (
        f"{values[name]:.{digits}f}" for name in ("median", "min", "max")
    )
    return f"{median} ({least} to {most})"
