# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""``report`` and ``tools/merge_reports.py``: what they write, and how they fail."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from tools import merge_reports
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_tuning as tuning
from vllm.model_executor.layers.quantization import (
    hybrid_w4a16_linear_table as linear_table,
)
from vllm.model_executor.layers.quantization.hybrid_w4a16_linear_table import (
    LinearShape,
)
from vllm.plugins.hybrid_w4a16 import cli, compare, report, selftest_run

BUNDLED = Path(__file__).resolve().parents[2] / "demo/int4-autoround-g128"


def sample(variant, number, tokens_per_s):
    return compare.Sample(variant, number, 20.0, 1e3 / tokens_per_s, tokens_per_s, 30.0)


@pytest.fixture
def made_up(monkeypatch, tmp_path):
    """Replace servers and kernels by fixed results."""
    rates = {"stock": [20.0, 22.0], "hybrid": [40.0, 55.0]}

    def measure(checkpoint, vocabulary, arguments, variant, number, log):
        assert vocabulary > 1000 and arguments == ["--enforce-eager"]
        log.write_text("a log\n")
        rate = rates[variant][number]
        if rate is None:
            raise compare.CompareError("vllm serve ended with status 1: OSError: no")
        return sample(variant, number, rate)

    monkeypatch.setattr(compare, "_measure", measure)
    monkeypatch.setattr(
        selftest_run,
        "selftest",
        lambda *args: {"ok": True, "device": "cpu", "seconds": 1.0, "groups": []},
    )
    return rates


def run(tmp_path, *arguments):
    out = tmp_path / "machine"
    words = ["report", str(BUNDLED), "--out", str(out), "--rounds", "2"]
    status = cli.main([*words, "--serve-args=--enforce-eager", *arguments])
    return status, out.with_name("machine.tar.gz")


def test_a_report_of_everything(made_up, tmp_path, capsys):
    status, archive = run(tmp_path)
    out = capsys.readouterr().out
    assert status == 0
    found = merge_reports.read_report(archive)
    assert found["results"]["compare"]["ratio"] == {
        "median": 2.25,
        "min": 2.0,
        "max": 2.5,
    }
    assert found["steps"]["tune"] == "not run"
    assert all(found["steps"][s].startswith("ok") for s in ("explain", "selftest"))
    assert "| hybrid | 20.0 (20.0 to 20.0) |" in out
    assert "47.5 (40.0 to 55.0)" in out and "hybrid / stock" in out
    assert "tune: not run" in out
    assert out.splitlines()[-1].startswith(f"send {archive}")
    # only the last part of the folder's path
    assert f": {BUNDLED.name}\n" in out and str(BUNDLED.parent) not in out
    assert found["checkpoint"] == BUNDLED.name
    assert "* a token reads " in out and " MB" in out
    with tarfile.open(archive) as tar:
        names = {member.name for member in tar}
        owners = {(m.uid, m.uname) for m in tar}
    assert {"machine/report.json", "machine/report.md"} <= names
    assert "machine/serve-stock-1.log" in names and owners == {(0, "")}


def test_the_report_has_the_table_in_use(made_up, monkeypatch, tmp_path, capsys):
    """Entries as tune wrote them, so that they can be shipped."""
    monkeypatch.setenv("VLLM_CONFIG_ROOT", str(tmp_path / "config"))
    rows = [(1, 10.0, 12.0), (4, 11.0, 14.0), (64, 50.0, 90.0)]
    entry = {
        **linear_table.shape_fields(LinearShape(1024, 512, 128, False, "bf16")),
        "compute_units": 40,
        "kernel_version": tuning.KERNEL_VERSION,
        "source": "made up",
        "peer": "StockKernel",
        "rows": [
            {"rows": n, "way": "tiles", "us": us, "peer_us": peer}
            for n, us, peer in rows
        ],
    }
    linear_table.write("cpu", entry)
    _, archive = run(tmp_path)
    found = merge_reports.read_report(archive)
    assert found["table"] == {"shapes": [], "linears": [entry]}
    assert (
        "* linear 1024 x 512, g128, bf16, sym: 10.0 us (12.0), 11.0 us (14.0) at 1 and "
        "4 rows (StockKernel); used\n"
    ) in capsys.readouterr().out


def test_a_server_that_does_not_start_is_part_of_the_report(made_up, tmp_path, capsys):
    made_up["stock"][:] = [None, None]
    status, archive = run(tmp_path, "--skip", "selftest")
    assert status == 1
    found = merge_reports.read_report(archive)
    assert found["results"]["compare"]["failures"]["stock"].endswith("OSError: no")
    assert found["results"]["compare"]["ratio"] is None
    assert found["steps"]["selftest"] == "not run"
    out = capsys.readouterr().out
    assert "| stock | vllm serve ended with status 1: OSError: no |" in out
    assert "* compare: failed: stock: vllm serve ended with status 1: OSError" in out
    assert found["results"]["compare"]["summary"]["hybrid"]  # the run continued
    assert "| machine" not in merge_reports.row(found)
    assert " | - | 47.5 (40.0 to 55.0) | - | " in merge_reports.row(found)


LOG = """\
(APIServer pid=1) WARNING 11-28 18:48 [u.py:2] errors like `OSError: [Errno 24] Too many
(APIServer pid=1) INFO 11-28 18:48 [u.py:3] Exception: none so far
(Worker pid=2) ERROR 11-28 18:50 [m.py:953]     raise AttributeError(
(Worker pid=2) ERROR 11-28 18:50 [m.py:953] AttributeError: Layer x has no parameter 'w'
(EngineCore pid=3) ERROR 11-28 18:50 [c.py:15] Exception: WorkerProc failed
RuntimeError: Engine core initialization failed.
"""


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (LOG, "AttributeError: Layer x has no parameter 'w'"),
        ("INFO fine\ntorch.cuda.OutOfMemoryError: 2 GiB\n", "torch.cuda.OutOfMemory"),
        ("INFO fine\nKilled\n", "see serve.log"),
    ],
)
def test_the_cause_is_the_first_error_of_the_log(text, cause, tmp_path):
    log = tmp_path / "serve.log"
    log.write_text(text)
    assert compare._cause(log).startswith(cause)


def test_a_failing_step_leaves_the_others(made_up, monkeypatch, tmp_path):
    def broken(*args):
        raise RuntimeError("the device is gone\nmore")

    monkeypatch.setattr(selftest_run, "selftest", broken)
    status, archive = run(tmp_path)
    found = merge_reports.read_report(archive)
    assert status == 1
    expected = "failed: RuntimeError: the device is gone"
    assert found["steps"]["selftest"].startswith(expected)
    assert found["results"]["compare"]["summary"]["hybrid"]


def test_an_interrupted_report_is_written(made_up, monkeypatch, tmp_path):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(selftest_run, "selftest", interrupted)
    status, archive = run(tmp_path)
    found = merge_reports.read_report(archive)
    assert status == 130 and found["steps"]["compare"] == "not run: interrupted"
    assert "explain" in found["results"]


def test_merging_reports_keeps_one_row_for_each(made_up, tmp_path):
    _, archive = run(tmp_path)
    results = tmp_path / "results.md"
    results.write_text(merge_reports.RESULTS.read_text())
    words = [str(archive), "--results", str(results)]
    assert merge_reports.main(words) == 0
    once = results.read_text()
    assert merge_reports.main(words) == 0
    assert results.read_text() == once
    row = next(line for line in once.splitlines() if "2.25 (2.00 to 2.50)" in line)
    found = merge_reports.read_report(archive)
    assert f"| {str(found['environment']['commit'])[:12]} |" in row
    assert "| 21.0 (20.0 to 22.0) | 47.5 (40.0 to 55.0) |" in row
    assert "passed" in row
    assert row.count("|") == merge_reports.HEADER.count("|")
    assert "No report has been received" not in once

    # a report of another commit gets its own row
    found["environment"]["commit"] = "f" * 40
    other = archive_of(tmp_path / "other.tar.gz", found)
    assert merge_reports.main([str(archive), str(other), *words[1:]]) == 0
    twice = results.read_text()
    table = twice.partition(merge_reports.BEGIN)[2].partition(merge_reports.END)[0]
    assert len(table.strip().splitlines()) == 2 + 2 and "| ffffffffffff |" in table


def archive_of(path, content):
    data = json.dumps(content).encode()
    info = tarfile.TarInfo("x/report.json")
    info.size = len(data)
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("content", [[], {}, {"form": 99}])
def test_what_is_no_report_changes_nothing(content, tmp_path, capsys):
    results = tmp_path / "results.md"
    results.write_text(merge_reports.RESULTS.read_text())
    archive = archive_of(tmp_path / "a.tar.gz", content)
    assert merge_reports.main([str(archive), "--results", str(results)]) == 1
    assert "expected 1" in capsys.readouterr().err
    assert results.read_text() == merge_reports.RESULTS.read_text()


def test_text_of_a_report_cannot_break_the_table(made_up, tmp_path):
    _, archive = run(tmp_path)
    found = merge_reports.read_report(archive)
    found["checkpoint"] = "a|b\n<script>"
    assert "| ab" in merge_reports.row(found)
    assert merge_reports.row(found).count("\n") == 0


def test_the_form_is_the_one_that_is_merged():
    assert report.FORM == merge_reports.FORM


def test_the_commit_is_that_of_the_installed_version(monkeypatch):
    monkeypatch.setattr(report, "_version", lambda name: "0.2.0+g0123abc.d20260101")
    assert report.commit() == "0123abc"
