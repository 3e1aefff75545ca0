# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Builds the overlay distribution vllm-hybrid-w4a16 (metadata: pyproject.toml).

A wheel contains vllm_hybrid_w4a16.py, a .pth file that runs it when Python starts, our
modules at their in-tree paths below ``vllm/``, and the op library. An editable install
contains only a .pth file that points to this checkout; the op library is built into the
checkout.

Environment variables:
    HYBRID_W4A16_SKIP_VLLM_CHECK=1   build without a supported vLLM installed
    HYBRID_W4A16_PREBUILT=FILE       use this op library instead of building one
    HYBRID_W4A16_GPU=hip|cuda|none   GPU kernels to build; default: torch's kind
    HYBRID_W4A16_GPU_ARCHS=...       GPU architectures, such as "gfx1151" or "sm_90"
    HYBRID_W4A16_CLANG=FILE          the clang++ that compiles for AMD GPUs
    MAX_JOBS=N                       parallel compile jobs (default: all processors)
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from wheel.wheelfile import WheelFile

CHECKOUT = Path(__file__).resolve().parent
sys.path.insert(0, str(CHECKOUT / "tools"))

import overlay_target as target  # noqa: E402

BOOTSTRAP = "vllm_hybrid_w4a16"
LIBRARY = "_hybrid_w4a16_C.so"
RELEASE = "0.1.0"


def our_modules() -> list[str]:
    """Return our modules and tables below ``vllm/``, as paths relative to it."""
    root = CHECKOUT / "vllm"
    files = [*root.rglob("*.py"), *root.rglob("*.json")]
    return sorted(str(file.relative_to(root)) for file in files)


def build_library(destination: Path) -> None:
    """Compile the op library, or copy a prebuilt one, to ``destination``.

    Prints what it found and what it builds. On an error it exits with a message.
    """
    path = target.search_path()
    try:
        vllm = target.find_vllm(path)
        torch = target.find_torch(path)
        gpu = target.plan_gpu(torch)
        if vllm is not None:
            target.refuse_overwriting(vllm, [*our_modules(), LIBRARY], path)
    except target.TargetError as error:
        sys.exit(f"\nerror: cannot build {target.DISTRIBUTION}:\n  {error}\n")
    report = [
        f"vLLM         {f'{vllm.version} ({vllm.folder})' if vllm else 'none'}",
        f"torch        {torch.version} ({torch.folder})",
    ]
    prebuilt = os.environ.get("HYBRID_W4A16_PREBUILT")
    if prebuilt:
        print_report([*report, f"op library   not built: copied from {prebuilt}"])
        library = Path(prebuilt)
    else:
        library = run_cmake(torch, gpu, report)
    # Replace the file atomically: a running process may have the old one mapped.
    new = destination.with_suffix(".new")
    new.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(library, new)
    new.replace(destination)


def print_report(lines: list[str]) -> None:
    """Print what was found and what is built, under a title."""
    title = f"------ {target.DISTRIBUTION} ------"
    print("\n".join([title, *lines, "-" * len(title)]), flush=True)


def run_cmake(torch: target.Package, gpu: target.GpuPlan, report: list[str]) -> Path:
    """Configure, print the completed report, and compile; return the library."""
    tools = [sysconfig.get_path("scripts"), os.environ.get("PATH", "")]
    cmake = shutil.which("cmake", path=os.pathsep.join(tools))
    ninja = shutil.which("ninja", path=os.pathsep.join(tools))
    if cmake is None:
        sys.exit("\nerror: cmake >= 3.25 not found: install it (pip install cmake)\n")
    build = CHECKOUT / "build" / f"overlay-gpu-{gpu.kind}"
    cache = build / "CMakeCache.txt"
    archs = os.environ.get("HYBRID_W4A16_GPU_ARCHS", "").replace(" ", ";")

    configure = [cmake, "-S", str(CHECKOUT), "-B", str(build)]
    if cache.exists() and f"CMAKE_COMMAND:INTERNAL={cmake}\n" not in cache.read_text():
        configure += ["--fresh"]  # made by another CMake, which may be gone
    if ninja:
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    configure += [
        f"-DTORCH_DIR={torch.folder}",
        f"-DHYBRID_W4A16_GPU={gpu.kind}",
        f"-DHYBRID_W4A16_NVCC={gpu.nvcc}",
        f"-DHYBRID_W4A16_CLANG={os.environ.get('HYBRID_W4A16_CLANG', '')}",
        f"-DPython3_EXECUTABLE={sys.executable}",
        f"-DHYBRID_W4A16_GPU_ARCHS={archs}" if archs else "-UHYBRID_W4A16_GPU_ARCHS",
    ]
    run_or_exit(configure)
    cached = dict(re.findall(r"^(\w+):\w+=(.*)$", cache.read_text(), re.M))
    report += ["CPU kernels  built", f"GPU kernels  {gpu.reason}"]
    if gpu.kind != "none":
        report += [
            f"GPU targets  {cached['HYBRID_W4A16_CHOSEN_ARCHS'].replace(';', ' ')}"
        ]
    if gpu.kind == "hip":
        report += [f"GPU compiler {cached['HYBRID_W4A16_FOUND_CLANG']}"]
    print_report(report)
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    run_or_exit([cmake, "--build", str(build), "--parallel", jobs])
    return build / LIBRARY


def run_or_exit(command: list[str]) -> None:
    """Run a command; exit with a message if it fails."""
    if subprocess.run(command).returncode != 0:
        sys.exit(f"\nerror: this command failed, see above: {' '.join(command)}\n")


class BuildOverlay(build_py):
    """Adds our files below ``vllm/``, the op library and the .pth file to a wheel.

    They are not ``packages`` of the distribution: its metadata would then claim the
    top-level name ``vllm``, which belongs to vLLM.
    """

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)  # may hold removed modules
        super().run()
        root = Path(self.build_lib)
        build_library(root / "vllm" / LIBRARY)
        for module in our_modules():
            copy = root / "vllm" / module
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(CHECKOUT / "vllm" / module, copy)
        (root / f"{BOOTSTRAP}.pth").write_text(
            f"import {BOOTSTRAP}; {BOOTSTRAP}.extend_vllm_path()\n"
        )


class OverlayWheel(bdist_wheel):
    """Tags the wheel for any Python 3: the op library uses no Python ABI."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


class EditableOverlay(Command):
    """PEP 660 wheel: a .pth file that loads the bootstrap from this checkout.

    The checkout must not be put on ``sys.path``, and ``vllm`` must not be mapped to it.
    Either would hide a vLLM that is itself installed in editable mode.
    """

    description = "create the wheel of an editable install"
    user_options = [
        ("dist-dir=", "d", "folder of the wheel"),
        ("dist-info-dir=", "I", "folder of the prepared metadata"),
    ]

    def initialize_options(self) -> None:
        self.dist_dir = str(CHECKOUT / "dist")
        self.dist_info_dir = ""

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        build_library(CHECKOUT / "vllm" / LIBRARY)
        if not self.dist_info_dir:
            dist_info = self.reinitialize_command("dist_info", output_dir=self.dist_dir)
            self.run_command("dist_info")
            self.dist_info_dir = dist_info.dist_info_dir
        wheel = self.get_finalized_command("bdist_wheel")
        tag = "-".join(wheel.get_tag())
        metadata = Path(self.dist_info_dir)
        wheel.write_wheelfile(str(metadata))
        stem = metadata.name.removesuffix(".dist-info")
        path = Path(self.dist_dir, f"{stem}-0.editable-{tag}.whl")
        with tempfile.TemporaryDirectory() as folder, WheelFile(path, "w") as archive:
            shutil.copytree(metadata, Path(folder, metadata.name))
            Path(folder, metadata.name, "RECORD").unlink(missing_ok=True)
            Path(folder, f"{BOOTSTRAP}.pth").write_text(self._pth())
            archive.write_files(folder)

    @staticmethod
    def _pth() -> str:
        file = str(CHECKOUT / f"{BOOTSTRAP}.py")
        return (
            "import sys, importlib.util as util; "
            f"spec = util.spec_from_file_location({BOOTSTRAP!r}, {file!r}); "
            "module = util.module_from_spec(spec); sys.modules[spec.name] = module; "
            "spec.loader.exec_module(module); module.extend_vllm_path()\n"
        )


class OverlayDistribution(Distribution):
    """Makes a platform wheel: the compiled part is not a Python extension."""

    def has_ext_modules(self) -> bool:
        return True


# The commit distinguishes two builds of a release. Outside of git (an sdist, a copy)
# the version is the one in PKG-INFO, or the release alone.
VERSION = {
    "version_scheme": lambda version: RELEASE,
    "local_scheme": "node-and-date",
    "fallback_version": RELEASE,
}

setup(
    use_scm_version=VERSION,
    py_modules=[BOOTSTRAP],
    distclass=OverlayDistribution,
    cmdclass={
        "build_py": BuildOverlay,
        "bdist_wheel": OverlayWheel,
        "editable_wheel": EditableOverlay,
    },
)
