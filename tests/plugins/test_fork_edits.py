# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The fork series without a vLLM tree: its tables, its text tools, the command."""

import re

import pytest

from vllm.plugins.hybrid_w4a16 import (
    cli,
    fork,
    fork_conditions,
    fork_edits,
    fork_files,
    fork_series,
)

PROJECT = fork_files.project_folder()


def texts(commit: str) -> dict[str, str]:
    return fork_files.texts(fork_files.carried(PROJECT), commit)


# ------------------------------------------------------------------------ edits
def insertion(after: str, text: str, instead_of: str = "") -> fork_edits.Insertion:
    return fork_edits.Insertion("ops", "f.py", "f", after, text, instead_of)


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (insertion(r"^a = \[\n", "    0,\n"), "a = [\n    0,\n    1,\n]\nb = 2\n"),
        (insertion(r"(?=^b)", "c = 3\n"), "a = [\n    1,\n]\nc = 3\nb = 2\n"),
        (insertion(r"^b = ", "4", "2"), "a = [\n    1,\n]\nb = 4\n"),
    ],
)
def test_text_goes_to_its_place_once(edit, expected):
    assert edit.apply("a = [\n    1,\n]\nb = 2\n") == expected
    assert edit.apply(expected) == expected


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (insertion(r"^missing", "x"), "0 places match '\\^missing', expected one"),
        (insertion(r" = ", "x"), "2 places match ' = ', expected one"),
        (insertion(r"^b = ", "4", "3"), "'\\^b = ' is not followed by '3'"),
    ],
)
def test_a_place_that_moved_is_a_conflict(edit, message):
    with pytest.raises(fork_edits.Conflict, match=message):
        edit.apply("a = 1\nb = 2\n")


# ------------------------------------------------------------------------ files
def test_an_unlisted_file_is_an_error_that_names_it(tmp_path):
    for path in (*fork_files.TESTS, "csrc/rocm/mystery.cuh"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("")
    with pytest.raises(fork_files.ProjectError, match="^csrc/rocm/mystery.cuh: no row"):
        fork_files.carried(tmp_path)


@pytest.mark.parametrize(
    ("name", "commit"),
    [
        ("csrc/rocm/dense_other.cuh", "lm_head"),
        ("csrc/cpu/rescore_avx512.cpp", "lm_head"),
        ("vllm/model_executor/layers/quantization/hybrid_w4a16_head_x.py", "lm_head"),
        ("vllm/model_executor/kernels/linear/mixed_precision/hybrid.py", "token"),
        ("csrc/rocm/shared_expert.hip", "token"),
        ("csrc/rocm/router_topk.hip", "token"),
        ("csrc/cpu/anything_else.cpp", "cpu"),
        ("csrc/rocm/host/anything.cpp", fork_files.OVERLAY),
        ("csrc/rocm/anything_else.hip", None),
        ("vllm/model_executor/layers/fused_moe/hybrid_w4a16_new.py", None),
    ],
)
def test_new_files_go_to_a_commit_by_their_name(name, commit):
    assert fork_files.commit_of(name) == commit


def test_lines_between_markers_come_with_their_commit():
    text = "a\n# fork: begin cpu\nb\n# fork: end\n  // fork: begin overlay\nc\n"
    text += "  // fork: end\nd\n"
    assert fork_files.select(text, {"ops"}, "f") == "a\nd\n"
    assert fork_files.select(text, {"ops", "cpu"}, "f") == "a\nb\nd\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# fork: begin cpu\n", "f: fork: begin cpu has no end"),
        ("a\n# fork: end\n", "f:2: # fork: end does not pair up"),
        ("# fork: begin cpu\n# fork: begin ops\n", "f:2: .* does not pair up"),
        ("# fork: begin gpu\n", "f:1: no commit gpu; there are kernels, ops"),
        ("# fork: stop\n", "f:1: # fork: stop is no marker"),
    ],
)
def test_markers_that_do_not_fit_are_errors(text, message):
    with pytest.raises(fork_files.ProjectError, match=message):
        fork_files.select(text, set(), "f")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("#if defined(__CUDACC__)\na\n#else\nb\n#endif\n", "b\n"),
        ("#ifdef __CUDACC__\na\n#endif\nb\n", "b\n"),
        ("#ifndef __CUDACC__\na\n#endif\n", "a\n"),
        ("#if !defined(__HIP__)\na\n#endif\n", "#if !defined(__HIP__)\na\n#endif\n"),
        (
            "#if defined(__CUDACC__)\na\n#elif defined(__HIP__)\nb\n#else\nc\n#endif\n",
            "#if defined(__HIP__)\nb\n#else\nc\n#endif\n",
        ),
        (
            "#if defined(HYBRID_W4A16_CUDA) || defined(HYBRID_W4A16_HIP)\na\n#endif\n",
            "#if defined(HYBRID_W4A16_HIP)\na\n#endif\n",
        ),
        (
            "#if GPU_HAS_MMA\n#if X\na\n#else\nb\n#endif\n#endif\nc\n",
            "c\n",
        ),
        (
            "#if X\na\n#elif !GPU_HAS_MMA\nb\n#else\nc\n#endif\n",
            "#if X\na\n#else\nb\n#endif\n",
        ),
    ],
)
def test_conditions_for_cuda_are_resolved(text, expected):
    assert fork_conditions.resolve(text) == expected


@pytest.mark.parametrize("commit", fork_files.COMMITS)
def test_every_include_is_there_at_each_commit(commit):
    assert list(fork_files.missing_includes(texts(commit))) == []


def test_nothing_of_the_overlay_is_carried():
    """No switch, no plugin, no command line, no CUDA, in code or in comments."""
    words = re.compile(
        r"VLLM_HYBRID|vllm-hybrid-w4a16|plugins\.hybrid_w4a16|hybrid_w4a16_switch"
        r"|__CUDACC__|cuda_runtime|HYBRID_W4A16_CUDA|fork: (begin|end)"
        r"|SPDX.*hybrid-w4a16|[Oo]verlay|[Pp]lugin|\b[Hh]ook|[Oo]pt-in|first release"
        r"|HAS_MMA|kHasMma|kStreams|matrix instructions|\bH100|HYBRID_W4A16_GPU"
    )
    files = texts(fork_files.COMMITS[-1])
    matches = {path: words.search(text) for path, text in files.items()}
    found = {path: match[0] for path, match in matches.items() if match}
    assert found == {}
    assert len(files) > 60


def test_no_file_of_the_overlay_is_mentioned():
    files = texts(fork_files.COMMITS[-1])
    folders = ("benchmarks", "csrc", "docs", "tests", "tools", "vllm")
    names = {p.name for f in folders for p in (PROJECT / f).rglob("*.*")}
    stay = names - {path.rpartition("/")[2] for path in files}
    for path, text in files.items():
        mentioned = set(re.findall(r"\b\w+\.(?:py|md|h|hip|cuh|cpp|cmake)\b", text))
        assert not stay & mentioned, path


def test_a_missing_import_is_found(tmp_path):
    (tmp_path / "vllm/there").mkdir(parents=True)
    (tmp_path / "vllm/there/__init__.py").write_text(
        "import os\nif os.name:\n    A = 1\ntry:\n    from x import y as B\n"
        "except ImportError:\n    B = None\ndef f(): inner = 1\n"
    )
    files = {
        "vllm/new.py": "from vllm.there import A, B, f, os, inner, gone\n"
        "def g():\n    from vllm.nowhere import x\n    from vllm import there, new\n"
    }
    assert list(fork_files.missing_imports(tmp_path, files)) == [
        ("vllm/new.py", "vllm.there has no inner"),
        ("vllm/new.py", "vllm.there has no gone"),
        ("vllm/new.py", "there is no module vllm.nowhere"),
    ]


# ----------------------------------------------------------------------- series
@pytest.mark.parametrize("name", fork_files.COMMITS)
def test_each_commit_says_why_what_how_tested_and_what_was_not_measured(name):
    commit = fork_series.SERIES[name]
    assert re.match(r"(\[\w+\])+ [A-Z].{20,72}$", commit.title)
    message = commit.message()
    assert max(map(len, message.splitlines()[1:])) <= 72
    request = commit.pull_request(10, 20, 3)
    headings = ["Why", "What", "How it was tested", "What was not measured"]
    assert re.findall(r"^## (.*)$", request, re.M) == headings
    assert "10 lines without tests, 3 of them in files that vLLM has" in request
    assert all(test in request for test in commit.tests)
    parts = re.split(r"^## .*$", request, flags=re.M)
    assert all(len(part.split()) > 4 for part in parts)


def test_the_tests_of_a_commit_are_there_by_then():
    for name, commit in fork_series.SERIES.items():
        assert commit.tests
        assert set(commit.tests) <= texts(name).keys(), name


def test_subcommands_keep_the_contract():
    for name, (_, summary) in cli.COMMANDS.items():
        assert summary
        with pytest.raises(SystemExit) as exit_:
            cli.main([name, "--help"])
        assert exit_.value.code == 0


def test_series_on_what_is_no_vllm_tree_is_an_error(tmp_path, capsys):
    assert cli.main(["fork", "--vllm-src", str(tmp_path)]) == 1
    assert f"{tmp_path} is not a vLLM source tree" in capsys.readouterr().err


def test_without_a_checkout_the_error_says_what_to_do(tmp_path, monkeypatch):
    installed = tmp_path / "vllm/plugins/hybrid_w4a16/fork_files.py"
    monkeypatch.setattr(fork_files, "__file__", str(installed))
    with pytest.raises(fork_files.ProjectError, match="not a checkout.*VLLM_SRC"):
        fork_files.project_folder()


def test_added_lines_are_counted():
    assert fork.added_lines("a\nb\n", "a\nc\nb\nd\n") == 2
    assert fork.added_lines("", "a\nb\n") == 2
    assert fork.added_lines("a\n", "a\n") == 0
