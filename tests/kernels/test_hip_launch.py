# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""The host side of the AMD kernels, without an AMD GPU.

The op library is built as for a wheel. A stand-in for HIP's runtime
(tests/kernels/hip_stand_in) loads its code objects and runs its launchers. It checks
every launch against the code object's metadata and then executes the kernel of the same
name in the host build; results are compared with float64. Tests also plant faults in
copies of the sources and check that they are found.
"""

import dataclasses
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.kernels.test_moe_int4_on_host import Maker
from tests.kernels.test_router_on_host import cases as router_cases
from tests.kernels.test_wvSplitK_int_g_on_host import (
    BITS_AND_ZEROS,
    check_rescored,
    rescore_case,
)
from tests.kernels.test_wvSplitK_int_g_on_host import Maker as DenseMaker
from tests.support.kernels_on_host import BF16, BUILD, HALF, read_records, record

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.machine() != "x86_64", reason="host kernels: x86-64"),
    pytest.mark.skipif(shutil.which("clang++-22") is None, reason="needs clang++-22"),
]

ROOT = Path(__file__).resolve().parents[2]
ROCM = ROOT / "csrc" / "rocm"
STAND_IN = Path(__file__).with_name("hip_stand_in")
WORK = ROOT / "build" / "hip_stand_in"
ARCHS = ("gfx1100", "gfx1151")
SONAME = "libamdhip64.so.7"
TIMEOUT_S = 300  # for one program; a planted fault must not run for hours
# The program must not export its kernel names, because the stand-in has the same ones.
FOR_HIP = ("-DHYBRID_W4A16_HIP", "-fvisibility=hidden")
LINK = ("clang++-22", "-fsanitize=address,undefined")


def run(*command, **options):
    """Run a command that must succeed; returns its standard output."""
    command = [str(part) for part in command]
    result = subprocess.run(command, capture_output=True, text=True, **options)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def objects(sources, *flags):
    """Sanitized object files of the sources, cached while the sources are unchanged."""
    flags = [f"--flag={flag}" for flag in flags]
    return run(sys.executable, BUILD, "--objects", *flags, *sources).split()


def launcher_sources():
    names = ["hip_runtime.cpp", "inflate.cpp", "host/runner.cpp"]
    return [ROCM / name for name in names] + sorted(ROCM.glob("launch*.cpp"))


@pytest.fixture(scope="module")
def library():
    """The op library with only AMD code, built by the project's own build."""
    build = WORK / "library"
    scripts = Path(sysconfig.get_path("scripts"))
    settings = {
        "CMAKE_MAKE_PROGRAM": scripts / "ninja",
        "Python3_EXECUTABLE": sys.executable,
        "TORCH_DIR": Path(torch.__file__).parent,
        "HYBRID_W4A16_CPU": "OFF",
        "HYBRID_W4A16_GPU": "hip",
        "HYBRID_W4A16_GPU_ARCHS": ";".join(ARCHS),
    }
    options = [f"-D{name}={value}" for name, value in settings.items()]
    run(scripts / "cmake", "-G", "Ninja", "-S", ROOT, "-B", build, *options)
    run(scripts / "cmake", "--build", build)
    return build / "_hybrid_w4a16_C.so"


@pytest.fixture(scope="module")
def code_objects(library):
    """Paths of the code objects, by (source, architecture)."""
    files = (library.parent / "csrc/rocm/device_code").glob("*.co")
    return {tuple(file.stem.split(".")): file for file in files}


@pytest.fixture(scope="module")
def runtime():
    """The stand-in, with the kernels of the host build."""
    sources = [STAND_IN / f"{name}.cpp" for name in ("host_kernels", "code_object")]
    sources += [STAND_IN / "runtime.cpp", ROCM / "host" / "scheduler.cpp"]
    path = WORK / "sanitized" / SONAME
    path.parent.mkdir(parents=True, exist_ok=True)
    soname = f"-Wl,-soname,{SONAME}"
    parts = objects([*sources, *sorted(ROCM.glob("*.hip"))])
    run(*LINK, "-shared", soname, *parts, "-o", path)
    return path


@dataclasses.dataclass
class Launcher:
    """Builds programs that run op calls on the stand-in, optionally with faults."""

    runtime: Path
    folder: Path
    code_objects: dict

    def embed(self, code_objects):
        """device_code.cpp with these code objects, (architecture, file) each."""
        out = self.folder / f"code{len(list(self.folder.iterdir()))}" / "code.cpp"
        out.parent.mkdir()
        entries = [f"{arch}={file}" for arch, file in code_objects]
        run(sys.executable, ROCM / "embed_device_code.py", out, *entries)
        return out

    def all_code(self):
        return [(arch, file) for (_, arch), file in sorted(self.code_objects.items())]

    def link(self, sources=None, code_objects=None):
        """A program, by default from the real sources and code objects."""
        sources = [*(sources or launcher_sources())]
        sources.append(self.embed(code_objects or self.all_code()))
        program = self.folder / f"program{len(list(self.folder.iterdir()))}"
        where = ["-L", self.runtime.parent, f"-Wl,-rpath,{self.runtime.parent}"]
        library = ["-Wl,--no-as-needed", f"-l:{SONAME}"]
        run(*LINK, *objects(sources, *FOR_HIP), *where, *library, "-o", program)
        return program

    def changed(self, name, pattern, replacement):
        """csrc/rocm/`name` with `pattern` replaced, in a new folder."""
        text, count = re.subn(pattern, replacement, (ROCM / name).read_text())
        assert count, f"{pattern} is not in {name}"
        copy = self.folder / f"source{len(list(self.folder.iterdir()))}" / name
        copy.parent.mkdir()
        copy.write_text(text)
        return copy

    def link_changed(self, name, pattern, replacement):
        """A program with a changed csrc/rocm/`name`."""
        sources = [s for s in launcher_sources() if s.name != name]
        return self.link([*sources, self.changed(name, pattern, replacement)])


@pytest.fixture(scope="module")
def launcher(runtime, code_objects, tmp_path_factory):
    return Launcher(runtime, tmp_path_factory.mktemp("launcher"), code_objects)


@pytest.fixture(scope="module")
def program(launcher):
    return launcher.link()


def prepare(device, arch=""):
    return record({"op": b"prepare", "device": device, "arch": arch.encode()})


# As in scheduler.cpp, whose options do not count here: AddressSanitizer asks only the
# program. With fake stacks, each switch to another lane would map memory.
ASAN_OPTIONS = "detect_stack_use_after_return=0:detect_leaks=0:redzone=2048"


def answer(program, *records, devices="gfx1151", **env):
    env = {"HIP_STAND_IN_DEVICES": devices, "ASAN_OPTIONS": ASAN_OPTIONS, **env}
    return subprocess.run(
        [program],
        input=b"".join(records),
        capture_output=True,
        env=os.environ | env,
        timeout=TIMEOUT_S,
    )


def failure(program, *records, devices="gfx1151"):
    """The error message of the program, which must fail."""
    result = answer(program, *records, devices=devices)
    assert result.returncode != 0
    return result.stderr.decode(errors="replace")


def gemm_case():
    return next(iter(Maker(False, "gemm", HALF, 128, False).cases()))


OPS = ("gemm", "gate_up", "down")


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    return tmp_path_factory.mktemp("launched") / "kernels"


def check_results(program, launched, cases):
    """Run the cases on one gfx1151; add the launched kernels to `launched`."""
    records = [prepare(0, "gfx1151"), *(record(case.fields) for case in cases)]
    result = answer(program, *records, HIP_STAND_IN_LOG=str(launched))
    assert result.returncode == 0, result.stderr.decode(errors="replace")[:4000]
    replies = list(read_records(result.stdout))[1:]
    for case, reply in zip(cases, replies, strict=True):
        case.check_reply(reply)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [HALF, BF16])
def test_results_are_right(program, launched, op, dtype):
    cases = []
    for group in (32, 64, 128):
        for zero_points in (False, True):
            every = list(Maker(False, op, dtype, group, zero_points).cases())
            # the last two request specific kernels; test_moe_int4_on_host.py has all
            cases += [every[0], every[len(every) // 2], *every[-2:]]
    check_results(program, launched, cases)


@pytest.mark.parametrize("dtype", [HALF, BF16])
def test_results_of_the_dense_op_are_right(program, launched, dtype):
    cases = []
    for bits, zero_points in BITS_AND_ZEROS:
        for group in (32, 64, 128):
            cases += DenseMaker(dtype, bits, group, zero_points).cases(every=False)
    check_results(program, launched, cases)


NIGHTLY = pytest.mark.nightly


@pytest.mark.parametrize(
    "dtype, rows, window",
    [
        (HALF, 1, 0.5),
        (BF16, 5, 1.0),
        pytest.param(BF16, 1, 0.5, marks=NIGHTLY),
        pytest.param(HALF, 5, 1.0, marks=NIGHTLY),
        pytest.param(HALF, 2, 1e6, marks=NIGHTLY),
        pytest.param(BF16, 2, 1e6, marks=NIGHTLY),
    ],
)
def test_rescoring_is_right(program, launched, dtype, rows, window):
    case = rescore_case(dtype, rows, 700, 264, window, np.random.default_rng(rows))
    records = [prepare(0, "gfx1151"), record(case[0])]
    result = answer(program, *records, HIP_STAND_IN_LOG=str(launched))
    assert result.returncode == 0, result.stderr.decode(errors="replace")[:4000]
    _, reply = read_records(result.stdout)
    check_rescored(case, dtype, reply["c"])


def test_results_of_the_router_are_right(program, launched):
    check_results(program, launched, list(router_cases(None, (1, 3, 5))))


def test_every_kernel_was_started(library, launched):
    """Runs after the tests above, which launch them."""
    assert launched.exists(), "run the whole file"
    embedded = (library.parent / "csrc/rocm/device_code/device_code.cpp").read_text()
    kernels = set(re.findall(r'"(\w+)\\n"', embedded))
    for start in ("moe_int4_", "wvSplitK_int_g_", "rescore_", "moe_router_"):
        assert any(name.startswith(start) for name in kernels)
    assert kernels - set(launched.read_text().split()) == set()


def test_devices_of_two_architectures(program):
    case = gemm_case()
    call = record(case.fields)
    records = [prepare(0, "gfx1151"), call, prepare(1, "gfx1100"), call, prepare(0)]
    result = answer(program, *records, call, devices="gfx1151 gfx1100")
    assert result.returncode == 0, result.stderr.decode(errors="replace")[:4000]
    replies = [reply for reply in read_records(result.stdout) if reply]
    assert len(replies) == 3
    for reply in replies:
        case.check(reply["c"])


def test_a_device_without_kernels_is_refused(program):
    call = record(gemm_case().fields)
    message = failure(
        program, prepare(0, "gfx1151"), prepare(1), call, devices="gfx1151 gfx1100"
    )
    assert (
        "moe_int4_gemm_f16_g128_sym_t1: no kernels were loaded on device 1" in message
    )
    assert "there is code for gfx1100 gfx1151" in message


# ------------------------------------------------------------------ planted faults

SHAPE = r"(gpu::launch\(\s*gemm_kernel\([^;]*?)"

DENSE = r"(gpu::launch\(\s*kernel\.entry[^;]*?)"
RESCORE = r"(rescore_rows_f16 : rescore_rows_bf16[^;]*?)"

# What a kernel shows that reads other memory than it should: wrong numbers, a read
# outside of an array, or numbers that change with the order in which the blocks run.
WRONG = "relative error|AddressSanitizer|another one in order"

PLANTED = {
    "n and k in the wrong order": (
        "launch.cpp",
        SHAPE + r"w\.num_experts, w\.n, w\.k",
        r"\1w.num_experts, w.k, w.n",
        WRONG + "|wrote elements|misaligned 16-byte load",
    ),
    "pointers in the wrong order": (
        "launch.cpp",
        SHAPE + r"args\.expert_ids, args\.sorted_token_ids",
        r"\1args.sorted_token_ids, args.expert_ids",
        WRONG + "|null pointer|wrote elements",
    ),
    "a host pointer": (
        "launch.cpp",
        SHAPE + r"args\.c,",
        r"\1static_cast<void*>(&stream),",
        "is not device memory",
    ),
    "too little LDS": (
        "launch.cpp",
        SHAPE + r"waves \* wave_lds, false",
        r"\1waves * wave_lds / 4, false",
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "too much LDS": (
        "launch.cpp",
        SHAPE + r"waves \* wave_lds, false",
        r"\1waves * wave_lds + 65536, false",
        r"\d+ bytes of LDS, and 0 that are fixed",
    ),
    "too many threads": (
        "launch.cpp",
        SHAPE + r"waves \* gpu::kWaveSize",
        r"\1 33 * gpu::kWaveSize",
        "a block of 1056 threads, at most 512",
    ),
    "half a wave": (
        "launch.cpp",
        SHAPE + r"waves \* gpu::kWaveSize",
        r"\1waves * gpu::kWaveSize + 16",
        r"a block of \d+ threads",
    ),
    "a grid that is too large": (
        "launch.cpp",
        SHAPE + r"\{tiles,",
        r"\1{1 << 27,",  # times 32 threads: one more than HIP can count
        "a grid of ",
    ),
    "an error left behind": (
        "hip_runtime.cpp",
        r"const OnDevice on_device\(device\);",
        "const OnDevice on_device(device); runtime().set_device(99);",
        "an error was left behind, 101",
    ),
}


def dense_cases():
    return list(DenseMaker(HALF, 4, 128, True).cases(every=True))


PLANTED_DENSE = {
    "strides in the wrong order": (
        DENSE + r"w\.q, static_cast<int>\(w\.q_stride_n\)",
        r"\1w.q, static_cast<int>(w.z_stride_n8)",
        WRONG + "|misaligned (address|16-byte load)",
    ),
    "too little LDS": (
        DENSE + r"kernel\.lds_bytes",
        r"\1kernel.lds_bytes - 512",
        r"AddressSanitizer: heap-buffer-overflow|LDS race",
    ),
    "no room for a mask": (
        r"2 \* columns \+ columns / gpu::kWaveSize",
        "2 * columns",
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "bound and window in the wrong order": (
        RESCORE + r"args\.window, args\.bound",
        r"\1args.bound, args.window",
        "was not computed as asked",
    ),
}


@pytest.mark.nightly  # each links a program
@pytest.mark.parametrize("fault", PLANTED_DENSE)
def test_finds_a_planted_fault_in_the_launcher_of_the_head(launcher, fault):
    pattern, replacement, expected = PLANTED_DENSE[fault]
    program = launcher.link_changed("launch_dense.cpp", pattern, replacement)
    cases = dense_cases()
    rescored = rescore_case(HALF, 3, 700, 264, 0.0, np.random.default_rng(0))
    calls = [*(record(case.fields) for case in cases), record(rescored[0])]
    result = answer(program, prepare(0, "gfx1151"), *calls)
    said = result.stderr.decode(errors="replace")
    replies = list(read_records(result.stdout))[1:]
    for case, reply in zip(cases, replies, strict=False):
        try:
            case.check(reply["c"])
        except AssertionError as error:
            said += str(error)
    if len(replies) > len(cases):
        try:
            check_rescored(rescored, HALF, replies[-1]["c"])
        except AssertionError:
            said += "the product was not computed as asked"
    assert re.search(expected, said), said[:4000]


@pytest.mark.parametrize("fault", PLANTED)
def test_finds_a_planted_fault_in_the_launcher(launcher, fault):
    name, pattern, replacement, expected = PLANTED[fault]
    program = launcher.link_changed(name, pattern, replacement)
    cases = list(Maker(False, "gemm", HALF, 128, False).cases())
    records = [prepare(0, "gfx1151"), *(record(case.fields) for case in cases)]
    result = answer(program, *records)
    said = result.stderr.decode(errors="replace")
    for case, reply in zip(cases, list(read_records(result.stdout))[1:], strict=False):
        try:
            case.check(reply["c"])
        except AssertionError as error:
            said += str(error)
    assert re.search(expected, said), said[:4000]


def test_finds_a_launch_on_the_wrong_device(launcher):
    """With the device check removed, handles of device 0 serve all devices."""
    program = launcher.link_changed(
        "hip_runtime.cpp", r"function\[device\]\.load", "function[0].load"
    )
    call = record(gemm_case().fields)
    message = failure(
        program, prepare(0, "gfx1151"), prepare(1), call, devices="gfx1151 gfx1100"
    )
    assert "code for gfx1151 on device 0 was started on device 1, a gfx1100" in message


def test_finds_code_for_another_architecture(launcher):
    """gfx1100's code objects under the name gfx1151."""
    code = [
        ("gfx1151", file) for arch, file in launcher.all_code() if arch == "gfx1100"
    ]
    message = failure(launcher.link(code_objects=code), prepare(0, "gfx1151"))
    assert "loading the gfx1151 kernels on device 0: hipErrorNoBinaryForGpu" in message


def test_finds_a_missing_kernel(launcher):
    code = [row for row in launcher.all_code() if "moe_int4_down" not in row[1].name]
    message = failure(launcher.link(code_objects=code), prepare(0, "gfx1151"))
    assert (
        "the code for gfx1151 in hybrid_w4a16 lacks the kernel moe_int4_down_"
        in message
    )


def test_finds_code_with_arguments_in_another_order(launcher, tmp_path):
    """The code object is built from a source with two arguments swapped."""
    header = launcher.changed(
        "entry_points.h", r"int n, int k, void \*c,", "void *c, int n, int k,"
    )
    text = (ROCM / "moe_int4_gemm.hip").read_text()  # passes them on, in order
    text = re.sub(r"num_experts, n, k, c,", "num_experts, c, n, k,", text)
    header.with_name("moe_int4_gemm.hip").write_text(text)
    gemm = tmp_path / "moe_int4_gemm.gfx1151.co"
    flags = "-x hip -std=c++17 -O1 --offload-arch=gfx1151 --offload-device-only"
    flags += f" --no-gpu-bundle-output -nogpulib -nogpuinc -I{ROCM} -I{ROCM.parent}"
    source = header.with_name("moe_int4_gemm.hip")
    run("clang++-22", *flags.split(), source, "-o", gemm)
    code = [
        row for row in launcher.all_code() if "moe_int4_gemm.gfx1151" not in row[1].name
    ]
    program = launcher.link(code_objects=[*code, ("gfx1151", gemm)])
    message = failure(program, prepare(0, "gfx1151"), record(gemm_case().fields))
    assert re.search(
        r"argument \d+ of the code object is a global_buffer of 8 bytes", message
    )


def test_finds_a_damaged_code_object(launcher):
    real = launcher.embed(
        [("gfx1151", launcher.code_objects["moe_int4_gemm", "gfx1151"])]
    )
    (blob,) = real.parent.glob("*.z")
    data = bytearray(blob.read_bytes())
    data[len(data) // 2] ^= 1
    blob.write_bytes(data)
    sources = [ROCM / "inflate.cpp", real, real.with_name("main.cpp")]
    sources[-1].write_text(
        "#include <cstdio>\n#include <stdexcept>\n#include <vector>\n"
        '#include "device_code.h"\n#include "inflate.h"\n'
        "int main() {\n  const gpu::CodeObject& code = gpu::kCodeObjects[0];\n"
        "  std::vector<uint8_t> out(code.size);\n  try {\n"
        "    gpu::inflate(code.data, code.compressed_size, out.data(), out.size());\n"
        '  } catch (const std::runtime_error& e) { std::printf("%s", e.what()); }\n}\n'
    )
    program = real.with_name("main")
    run(*LINK, *objects(sources), "-o", program)
    assert run(program).startswith("damaged zlib stream: ")


# ------------------------------------------------------------------ the op that loads

LOAD = """
import ctypes, sys
import torch
mode = ctypes.RTLD_GLOBAL if sys.argv[3] == "global" else ctypes.RTLD_LOCAL
hip = ctypes.CDLL(sys.argv[1], mode) if sys.argv[1] else None
torch.ops.load_library(sys.argv[2])
for call in sys.argv[4:]:
    device, arch = call.split(":")
    try:
        torch.ops._rocm_C.hybrid_w4a16_load_device(int(device), arch)
        counts = hip.hipStandInKernels(int(device)), hip.hipStandInModules(int(device))
        print(f"device {device} has %d kernels of %d modules" % counts)
    except RuntimeError as error:
        print(error)
if hip:
    print("modules", hip.hipStandInModules(0), "error", hip.hipGetLastError())
"""


@pytest.fixture(scope="module")
def loading_runtimes():
    """The stand-in without kernels, for Python: a current and an old release."""
    sources = [f"{name}.cpp" for name in ("runtime", "code_object", "metadata_only")]
    paths = []
    for name, flags in (("new", []), ("old", ["-DSTAND_IN_OLD"])):
        path = WORK / name / SONAME
        path.parent.mkdir(parents=True, exist_ok=True)
        command = ["clang++-22", "-std=c++17", "-O1", "-fPIC", "-shared", *flags]
        command += [f"-Wl,-soname,{SONAME}", *(STAND_IN / source for source in sources)]
        run(*command, "-o", path)
        paths.append(path)
    return paths


@pytest.fixture
def load(library, loading_runtimes):
    def load(*calls, devices="gfx1151", runtime="new", scope="local", **env):
        path = {"new": loading_runtimes[0], "old": loading_runtimes[1], "none": ""}[
            runtime
        ]
        env = os.environ | {"HIP_STAND_IN_DEVICES": devices} | env
        lines = run(sys.executable, "-c", LOAD, path, library, scope, *calls, env=env)
        return lines.splitlines()

    return load


@pytest.mark.parametrize("scope", ["local", "global"])
def test_loads_every_code_object_on_every_device(load, code_objects, scope):
    """The runtime is also found if torch's libraries are loaded with RTLD_LOCAL."""
    calls = ("0:gfx1151", "1:gfx1100", "0:gfx1151")
    lines = load(*calls, devices="gfx1151 gfx1100", scope=scope)
    on_0, on_1, again, end = lines
    counts = re.fullmatch(r"device 0 has (\d+) kernels of (\d+) modules", on_0)
    assert counts and int(counts[1]) >= 72
    assert again == on_0
    assert on_1 == on_0.replace("device 0", "device 1")
    assert end == f"modules {counts[2]} error 0"


@pytest.mark.parametrize(
    ("calls", "options", "expected"),
    [
        (
            ["0:gfx1201"],
            {"devices": "gfx1201"},
            "no kernels for device 0, a gfx1201; it was built for gfx1100 gfx1151",
        ),
        (
            ["0:gfx1151"],
            {"devices": "gfx1100"},
            "loading the gfx1151 kernels on device 0: hipErrorNoBinaryForGpu",
        ),
        (["3:gfx1151"], {}, "hipSetDevice: hipErrorInvalidDevice"),
        (["64:gfx1151"], {}, "device 64: expected 0..63"),
        (
            ["0:gfx1151"],
            {"HIP_STAND_IN_CAPTURING": "1"},
            "kernels cannot be loaded while a graph is captured: load them on device 0",
        ),
        (
            ["0:gfx1151"],
            {"runtime": "old"},
            f"old/{SONAME}, has no hipStreamIsCapturing: it is too old",
        ),
    ],
)
def test_says_why_it_does_not_load(load, calls, options, expected):
    message, end = load(*calls, **options)
    assert expected in message
    assert end == "modules 0 error 0", (
        "nothing stays behind, no error for torch to find"
    )


def test_says_that_there_is_no_runtime(load):
    (message,) = load("0:gfx1151", runtime="none")
    assert message == (
        "no HIP runtime is loaded in this process: torch is not a ROCm build"
    )


def test_out_of_memory_leaves_nothing_and_can_be_tried_again(load):
    first, second, end = load("0:gfx1151", "0:gfx1151", HIP_STAND_IN_FAIL_LOAD="1")
    assert first == (
        "loading the gfx1151 kernels on device 0: hipErrorOutOfMemory (out of memory)"
    )
    assert re.fullmatch(r"device 0 has \d+ kernels of \d+ modules", second)
    assert end.endswith("error 0")


def test_a_device_cannot_change_its_architecture(load):
    _, message, _ = load("0:gfx1151", "0:gfx1100")
    assert message == "device 0 is a gfx1151 by an earlier call, now a gfx1100"
