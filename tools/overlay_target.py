# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Finds what the overlay is built for: the vLLM, the torch and the GPU compiler.

Used by setup.py; needs only the standard library. Packages are found by path and never
imported: under pip's build isolation the target environment is not importable, but
``sysconfig`` gives its folders; and importing vLLM or torch takes seconds.
"""

import json
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path
from urllib.parse import unquote, urlparse

DISTRIBUTION = "vllm-hybrid-w4a16"
SKIP_VLLM_CHECK = "HYBRID_W4A16_SKIP_VLLM_CHECK"
SUPPORTED_VLLM = ((0, 30), (0, 31), (0, 32), (0, 33))
# First release whose stable ABI has everything that csrc/ uses (TORCH_TARGET_VERSION).
MINIMUM_TORCH = (2, 11)

_ISOLATION_HINT = (
    f"Looked in the environment of {sys.executable}. If it is installed in another "
    "one, use that one's Python; if a front end other than pip builds in a temporary "
    "environment, pass --no-build-isolation."
)


class TargetError(Exception):
    """The environment cannot take the overlay; the message says what to do."""


@dataclass(frozen=True)
class Package:
    """An installed package: its folder and its version."""

    folder: Path
    version: str

    @property
    def release(self) -> tuple[int, ...]:
        """Major and minor version; empty if the version has another form."""
        match = re.match(r"(\d+)\.(\d+)", self.version)
        return tuple(int(part) for part in match.groups()) if match else ()


@dataclass(frozen=True)
class GpuPlan:
    """The GPU kernels to build, and the reason, as a line for the build log."""

    kind: str  # "hip", "cuda" or "none"
    reason: str
    nvcc: str = ""


def search_path() -> list[Path]:
    """The folders from which the target environment imports packages, in order."""
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    folders += site.getsitepackages()
    if site.ENABLE_USER_SITE:
        folders.append(site.getusersitepackages())
    folders += [entry for entry in sys.path if entry]
    found: dict[Path, None] = {}
    for folder in map(Path, folders):
        found[folder] = None
        for pth in sorted(folder.glob("*.pth")):
            for line in pth.read_text(errors="replace").splitlines():
                if line.strip() and not line.startswith(("#", "import ", "import\t")):
                    found[folder / line.strip()] = None
    return [folder for folder in found if folder.is_dir()]


def _distributions(name: str, path: list[Path]) -> Iterator[Distribution]:
    yield from distributions(name=name, path=[str(folder) for folder in path])


def _editable_projects(name: str, path: list[Path]) -> Iterator[Path]:
    """Source folders of the distribution ``name``, if its install is editable."""
    for dist in _distributions(name, path):
        direct_url = json.loads(dist.read_text("direct_url.json") or "{}")
        if direct_url.get("dir_info", {}).get("editable"):
            yield Path(unquote(urlparse(direct_url["url"]).path))


def find_package(name: str, version_file: str, path: list[Path]) -> Package | None:
    """Find the installed package ``name`` without importing it; ``None`` if missing.

    The version is read from ``version_file`` in the package, else from the metadata of
    the distribution of the same name.
    """
    for folder in [*path, *_editable_projects(name, path)]:
        package = folder / name
        if (package / "__init__.py").is_file():
            return Package(package, _version(package / version_file, name, path))
    return None


def _assigned_string(variable: str, file: Path) -> str | None:
    """The string assigned to ``variable`` at the top level of a Python file."""
    pattern = rf"^{variable}\b.*= *['\"](.+?)['\"]"
    match = re.search(pattern, file.read_text(), re.MULTILINE)
    return match[1] if match else None


def _version(version_file: Path, name: str, path: list[Path]) -> str:
    version = None
    if version_file.is_file():
        version = _assigned_string("__version__", version_file)
    from_metadata = (dist.version for dist in _distributions(name, path))
    return version or next(from_metadata, "of unknown version")


def find_torch(path: list[Path]) -> Package:
    """torch of the target environment; raises ``TargetError`` if missing or too old."""
    torch = find_package("torch", "version.py", path)
    minimum = ".".join(map(str, MINIMUM_TORCH))
    if torch is None:
        raise TargetError(
            f"torch is not installed, torch >= {minimum} is needed to build the op "
            f"library. Install vLLM with its torch first. {_ISOLATION_HINT}"
        )
    if torch.release < MINIMUM_TORCH:
        raise TargetError(
            f"torch {torch.version} ({torch.folder}) is too old: its stable ABI lacks "
            f"what the op library needs. Supported: torch >= {minimum}."
        )
    return torch


def find_vllm(path: list[Path]) -> Package | None:
    """vLLM of the target environment; ``TargetError`` if missing or unsupported.

    If the environment variable HYBRID_W4A16_SKIP_VLLM_CHECK is 1, which is for building
    a wheel for another machine, the package is returned unchecked, or ``None``.
    """
    vllm = find_package("vllm", "_version.py", path)
    if os.environ.get(SKIP_VLLM_CHECK) == "1":
        return vllm
    *others, newest = (".".join(map(str, v)) + ".x" for v in SUPPORTED_VLLM)
    supported = f"{', '.join(others)} and {newest}"
    advice = (
        f"Supported: vLLM {supported}. Install one of them first (a wheel, a source or "
        "an editable install, for ROCm, CUDA or the CPU). To build a wheel for another "
        f"machine, set {SKIP_VLLM_CHECK}=1."
    )
    if vllm is None:
        raise TargetError(f"vLLM is not installed. {advice} {_ISOLATION_HINT}")
    if vllm.release not in SUPPORTED_VLLM:
        raise TargetError(
            f"vLLM {vllm.version} ({vllm.folder}) is not supported. {advice}"
        )
    return vllm


def refuse_overwriting(vllm: Package, files: list[str], path: list[Path]) -> None:
    """Raise ``TargetError`` if vLLM has one of our ``files`` (relative to its folder).

    Files that an earlier install of this distribution put there are ours.
    """
    ours = {
        Path(str(file.locate())).resolve()
        for dist in _distributions(DISTRIBUTION, path)
        for file in dist.files or ()
    }
    clashes = [
        file
        for file in files
        if (vllm.folder / file).exists() and (vllm.folder / file).resolve() not in ours
    ]
    if clashes:
        raise TargetError(
            f"vLLM {vllm.version} ({vllm.folder}) already has {', '.join(clashes)}. "
            "Nothing is overwritten: if this vLLM is built from the hybrid-w4a16 fork "
            "branch, it needs no overlay; otherwise remove these files or reinstall "
            "vLLM first."
        )


def plan_gpu(torch: Package) -> GpuPlan:
    """Decide which GPU kernels to build: those requested, else those for torch's GPUs.

    HYBRID_W4A16_GPU requests a kind (hip, cuda or none), HYBRID_W4A16_GPU_ARCHS
    architectures of one kind. csrc/rocm/amd_device_code.cmake looks for the compiler
    for AMD GPUs later, and stops the build if there is none.

    Raises ``TargetError`` if something was requested that cannot be built.
    """
    version_file = torch.folder / "version.py"
    torch_cuda = _assigned_string("cuda", version_file)
    asked, why = _asked_for()
    if asked == "none":
        return GpuPlan("none", f"not built: {why}")
    if asked == "hip":
        return GpuPlan("hip", why)
    if not asked and _assigned_string("hip", version_file):
        return GpuPlan("hip", f"torch {torch.version} is a ROCm build")
    if not torch_cuda:
        if asked:
            raise TargetError(
                f"{why} asks for CUDA kernels, which are linked with a CUDA build of "
                f"torch; torch {torch.version} ({torch.folder}) is none."
            )
        reason = (
            f"not built: torch {torch.version} is a CPU build (HYBRID_W4A16_GPU=hip "
            "builds those for AMD GPUs)"
        )
        return GpuPlan("none", reason)
    nvcc, reason = _cuda_compiler(torch_cuda)
    if not nvcc and asked:
        raise TargetError(
            f"{why} asks for CUDA kernels: {reason}. Install the CUDA toolkit of "
            "that release, or set HYBRID_W4A16_GPU=none."
        )
    return GpuPlan("cuda" if nvcc else "none", reason, nvcc)


def _asked_for() -> tuple[str, str]:
    """The requested kind of GPU kernels, and the variable that requests it."""
    kind = os.environ.get("HYBRID_W4A16_GPU", "")
    archs = os.environ.get("HYBRID_W4A16_GPU_ARCHS", "")
    kinds = {"sm" if arch.startswith("sm_") else arch[:3] for arch in archs.split()}
    by_archs = {"gfx": "hip", "sm": "cuda"}.get("/".join(kinds), "")
    if kind not in ("", "none", "hip", "cuda"):
        raise TargetError(f"HYBRID_W4A16_GPU={kind}: expected none, hip or cuda.")
    if kind != "none" and archs and by_archs != (kind or by_archs or "?"):
        raise TargetError(
            f"HYBRID_W4A16_GPU_ARCHS={archs}: expected architectures of "
            f"{kind or 'one kind'}, such as "
            f"{'sm_90' if kind == 'cuda' else 'gfx1151 gfx1201'}."
        )
    if kind:
        return kind, f"HYBRID_W4A16_GPU={kind}"
    return by_archs, f"HYBRID_W4A16_GPU_ARCHS={archs}"


def _cuda_compiler(torch_cuda: str) -> tuple[str, str]:
    """Path of the nvcc that fits torch, empty if there is none; line for the log."""
    homes = [os.environ.get("CUDA_HOME", ""), os.environ.get("CUDA_PATH", "")]
    tool = _find_tool("nvcc", homes, "/usr/local/cuda")
    if not tool:
        return "", "NOT BUILT: found no nvcc (set CUDA_HOME)"
    run = subprocess.run([tool, "--version"], capture_output=True, text=True)
    match = re.search(r"release (\d+)\.\d+", run.stdout)
    major = torch_cuda.split(".")[0]
    if not match or match[1] != major:
        found = match[0] if match else "of unknown version"
        return "", f"NOT BUILT: torch needs nvcc release {major}, {tool} is {found}"
    return tool, f"by {tool} ({match[0]})"


def _find_tool(name: str, homes: list[str], default_home: str) -> str | None:
    """``name`` in ``bin`` of the homes, on PATH, beside Python, in the default home."""
    folders = [os.path.join(home, "bin") for home in homes if home]
    folders += [os.environ.get("PATH", ""), sysconfig.get_path("scripts")]
    folders += [os.path.join(default_home, "bin")]
    return shutil.which(name, path=os.pathsep.join(folders))
