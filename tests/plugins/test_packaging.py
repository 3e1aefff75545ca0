# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Installs of the overlay into temporary virtual environments.

Most of them hold a stand-in for vLLM: a few empty modules at the places that matter,
installed as a wheel, as setuptools' editable install (an import hook) or as a folder on
the path. One holds a copy of the real vLLM. The op library is the one that this
environment has; ``make venv`` built it with the same setup.py.
"""

import base64
import csv
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest
import tomllib

from tools import overlay_target
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_ops

pytestmark = pytest.mark.packaging

CHECKOUT = Path(__file__).resolve().parents[2]
OUR_TREE = CHECKOUT / "vllm"
FILES = [*OUR_TREE.rglob("*.py"), *OUR_TREE.rglob("*.json")]
OURS = sorted(str(file.relative_to(OUR_TREE)) for file in FILES)
MODULES = [file for file in OURS if file.endswith(".py")]
LIBRARY = "_hybrid_w4a16_C.so"
SKIP_CHECK = {"HYBRID_W4A16_SKIP_VLLM_CHECK": "1"}


def module_name(file: str) -> str:
    """Import name of a file given relative to the vllm folder."""
    return ".".join(("vllm", *Path(file).with_suffix("").parts)).removesuffix(
        ".__init__"
    )


def entry_modules() -> list[str]:
    """Those of our modules whose parent package is vLLM's."""
    own_packages = [module_name(file) for file in OURS if file.endswith("__init__.py")]
    names = [module_name(file) for file in MODULES]
    return [name for name in names if name.rpartition(".")[0] not in own_packages]


def vllm_packages() -> list[str]:
    """The packages of vLLM that our modules go into, with all their parents."""
    found = set()
    for name in entry_modules():
        while name := name.rpartition(".")[0]:
            found.add(name)
    return sorted(found)


def run(*command: object, env: dict[str, str] | None = None, cwd: object = None) -> str:
    """Output of a command that must succeed."""
    result = attempt(*command, env=env, cwd=cwd)
    assert result.returncode == 0, result.stdout
    return result.stdout


def attempt(*command, env=None, cwd=None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(part) for part in command],
        env={**os.environ, **(env or {})},
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@dataclass
class Env:
    """A virtual environment without pip, served by the pip of this one."""

    root: Path

    @property
    def python(self) -> Path:
        return self.root / "bin" / "python"

    @property
    def site(self) -> Path:
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        return self.root / "lib" / version / "site-packages"

    def pip(self, *arguments: object) -> list[object]:
        return [sys.executable, "-m", "pip", "--python", self.python, *arguments]

    def install(self, *arguments: object, env: dict[str, str] | None = None) -> str:
        options = ["install", "--no-index", "--no-deps", "--no-build-isolation", "-v"]
        return run(*self.pip(*options, *arguments), env=env)

    def files(self) -> dict[str, bytes]:
        """Every file in site-packages with its hash, byte code left out."""
        return {
            str(file.relative_to(self.site)): hashlib.sha256(file.read_bytes()).digest()
            for file in self.site.rglob("*")
            if file.is_file() and file.suffix != ".pyc"
        }


def link_packages(site: Path, *distributions: str) -> None:
    """Make installed distributions of this environment importable from ``site``."""
    for name in distributions:
        dist = distribution(name)
        tops = {file.parts[0] for file in dist.files or () if file.parts[0] != ".."}
        for top in tops - {"__pycache__"}:
            link = site / top
            if not link.exists():
                link.symlink_to(Path(str(dist.locate_file(top))))


def vllm_files(version: str = "0.32.0") -> dict[str, str]:
    """The stand-in: vLLM's packages, each with a module ``vllms_own``."""
    files = {"vllm/_version.py": f"__version__ = version = {version!r}\n"}
    for package in vllm_packages():
        folder = package.replace(".", "/")
        files |= {f"{folder}/__init__.py": "", f"{folder}/vllms_own.py": ""}
    return files


def torch_files(version="2.13.0+cpu", cuda=None, hip=None) -> dict[str, str]:
    return {
        "torch/__init__.py": "",
        "torch/version.py": f"__version__ = {version!r}\n"
        f"cuda: Optional[str] = {cuda!r}\nhip: Optional[str] = {hip!r}\n",
    }


@pytest.fixture(scope="session")
def library() -> dict[str, str]:
    """Environment variable that makes setup.py take the op library that is here."""
    error = hybrid_w4a16_ops.load_error()
    assert error is None, error
    root = Path(hybrid_w4a16_ops.__file__).parents[3]
    return {"HYBRID_W4A16_PREBUILT": str(root / LIBRARY)}


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """A copy of what is installed, under a name that needs quoting."""
    copy = tmp_path_factory.mktemp("source") / "check 'out'"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, copy)
    shutil.copy(CHECKOUT / "vllm_hybrid_w4a16.py", copy)
    shutil.copytree(CHECKOUT / "tools", copy / "tools")
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(OUR_TREE, copy / "vllm", ignore=ignore)
    return copy


@pytest.fixture(scope="session")
def make_env(tmp_path_factory):
    """Makes environments with setuptools and, unless told otherwise, a torch."""

    def make(torch: str | None = "2.13.0+cpu") -> Env:
        env = Env(tmp_path_factory.mktemp("env"))
        run(sys.executable, "-m", "venv", "--without-pip", env.root)
        link_packages(env.site, "setuptools", "setuptools-scm", "vcs-versioning")
        link_packages(env.site, "packaging")
        if torch is not None:
            write_files(env.site, torch_files(torch))
        return env

    return make


@pytest.fixture(scope="session")
def wheel(source, library, tmp_path_factory) -> Path:
    """Our wheel, built where there is no vLLM."""
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-index", "--no-deps", "--no-build-isolation", "-w", folder]
    pip = [sys.executable, "-m", "pip"]
    run(*pip, "wheel", *options, source, env={**library, **SKIP_CHECK})
    (path,) = folder.glob("*.whl")
    return path


def write_files(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def add_vllm(env: Env, version: str = "0.32.0") -> Path:
    """The stand-in for vLLM as a regular install; returns the folder of its package."""
    write_files(env.site, vllm_files(version))
    return env.site / "vllm"


def add_editable_vllm(env: Env, how: str, project: Path) -> Path:
    """The stand-in, its package elsewhere: found by an import hook or on the path."""
    write_files(project, vllm_files())
    if how == "path":
        (env.site / "vllm.pth").write_text(f"{project}\n")
    else:
        (project / "setup.py").write_text(
            "from setuptools import find_packages, setup\n"
            "setup(name='vllm', version='0.32.0', packages=find_packages())\n"
        )
        env.install("-e", project)
    return project / "vllm"


PROBE = """
import importlib.util, json, sys
import vllm
from vllm.plugins import vllms_own
origins = {name: importlib.util.find_spec(name).origin for name in sys.argv[1:]}

from importlib.metadata import entry_points
(entry,) = entry_points(group="vllm.general_plugins", name="hybrid_w4a16")
register = entry.load()
sys.modules[register.__module__].extend_vllm_path()
print(json.dumps({
    "entry": [register.__module__, register.__qualname__],
    "origins": origins,
    "vllm_path": list(vllm.__path__),
    "plugins_path": list(vllm.plugins.__path__),
}))
"""


def probe(env: Env, cwd: Path, names: list[str]) -> dict:
    return json.loads(run(env.python, "-c", PROBE, *names, cwd=cwd))


@pytest.mark.slow
@pytest.mark.parametrize("ours", ["wheel", "editable"])
@pytest.mark.parametrize("vllm", ["regular", "hook", "path"])
def test_install_beside(vllm, ours, make_env, source, library, wheel, tmp_path):
    env = make_env()
    if vllm == "regular":
        vllm_folder = add_vllm(env)
    else:
        vllm_folder = add_editable_vllm(env, vllm, tmp_path / "vllm source")
    before = env.files()
    if ours == "wheel":
        env.install(wheel)
        our_folder = env.site / "vllm"
    else:
        log = env.install("-e", source, env=library)
        assert f"vLLM         0.32.0 ({vllm_folder})" in log
        our_folder = source / "vllm"
    assert {name: env.files()[name] for name in before} == before

    vllms = vllm_packages() + [f"{name}.vllms_own" for name in vllm_packages()]
    for cwd in (tmp_path, source, CHECKOUT / "vllm" / "plugins"):
        seen = probe(env, cwd, entry_modules() + vllms)
        assert seen["entry"] == ["vllm_hybrid_w4a16", "register"]
        for name in entry_modules():
            assert Path(seen["origins"][name]).is_relative_to(our_folder), name
            assert Path(seen["origins"][name]).is_file()
        for name in vllms:
            assert Path(seen["origins"][name]).is_relative_to(vllm_folder), name
        both = [vllm_folder] if vllm_folder == our_folder else [vllm_folder, our_folder]
        assert seen["vllm_path"] == [str(folder) for folder in both]
        assert seen["plugins_path"] == [str(folder / "plugins") for folder in both]

    run(*env.pip("uninstall", "-y", "vllm-hybrid-w4a16"))
    assert env.files() == before
    run(env.python, "-c", "import vllm.plugins.vllms_own", cwd=tmp_path)


def test_extends_packages_that_are_already_imported(make_env, source):
    """As where no .pth file has run: site-packages is on PYTHONPATH alone."""
    env = make_env()
    vllm_folder = add_vllm(env)
    code = f"""
import sys
sys.path.insert(0, {str(env.site)!r})
import vllm.plugins
sys.path.append({str(source)!r})
import vllm_hybrid_w4a16
vllm_hybrid_w4a16.extend_vllm_path()
{PROBE.partition("from importlib")[0]}
print(json.dumps({{"path": vllm.plugins.__path__, "origins": origins}}))
"""
    output = run(env.python, "-S", "-c", code, *entry_modules(), cwd=source)
    seen = json.loads(output)
    assert seen["path"] == [str(vllm_folder / "plugins"), str(source / "vllm/plugins")]
    for origin in seen["origins"].values():
        assert Path(origin).is_relative_to(source / "vllm")


def test_wheel_holds_our_files_and_none_of_vllms(wheel):
    info = "vllm_hybrid_w4a16-0.1.0.dist-info"
    metadata = ["METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt"]
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        top_level = archive.read(f"{info}/top_level.txt").decode().split()
        metadata_lines = archive.read(f"{info}/METADATA").decode().splitlines()
    assert names == {
        "vllm_hybrid_w4a16.py",
        "vllm_hybrid_w4a16.pth",
        f"vllm/{LIBRARY}",
        *(f"vllm/{file}" for file in OURS),
        *(f"{info}/{file}" for file in metadata),
        f"{info}/licenses/LICENSE",
    }
    vllm_dist = distribution(vllm_distribution())
    assert not names & {str(file) for file in vllm_dist.files or ()}
    assert top_level == ["vllm_hybrid_w4a16"]
    required = [line for line in metadata_lines if line.startswith("Requires-Dist")]
    assert all(line.endswith('; extra == "fork"') for line in required), required
    assert wheel.name.startswith("vllm_hybrid_w4a16-0.1.0-py3-none-linux_")


def test_version_carries_the_commit(source, library, tmp_path):
    """In a checkout without tags; what is built from its sdist has the same version."""
    checkout = tmp_path / "checkout"
    shutil.copytree(source, checkout)
    git = ["git", "-C", checkout, "-c", "user.name=t", "-c", "user.email=t@localhost"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "t"]):
        run(*git, *command)
    commit = run(*git, "rev-parse", "HEAD").strip()
    setup = [sys.executable, "setup.py", "-q"]
    env = {**library, **SKIP_CHECK}
    run(*setup, "sdist", "-d", tmp_path, env=env, cwd=checkout)
    (sdist,) = tmp_path.glob("*.tar.gz")
    version = sdist.name.removeprefix("vllm_hybrid_w4a16-").removesuffix(".tar.gz")
    release, _, local = version.partition("+g")
    assert release == "0.1.0"
    assert len(local) >= 7 and commit.startswith(local)
    shutil.unpack_archive(sdist, tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert run(*setup, "--version", env=env, cwd=unpacked).split()[-1] == version


LOAD_FILE = """
import sys
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_ops
hybrid_w4a16_ops._LIBRARY = sys.argv[1]
print(hybrid_w4a16_ops.load_error())
"""


@pytest.mark.parametrize("missing", [1, 4096, "all but 20"])
def test_library_that_is_cut_short_is_told_before_it_is_loaded(
    missing, library, tmp_path
):
    whole = Path(library["HYBRID_W4A16_PREBUILT"]).read_bytes()
    size = 20 if missing == "all but 20" else len(whole) - missing
    file = tmp_path / LIBRARY
    file.write_bytes(whole[:size])
    message = run(sys.executable, "-c", LOAD_FILE, file).splitlines()[-1]
    fault = f"is truncated: {size} of {len(whole)} bytes"
    fault = "is not an ELF library" if size == 20 else fault
    assert message == f"the op library {file} {fault}: install it again"


def vllm_distribution() -> str:
    """Name of the distribution that this environment's vLLM belongs to."""
    names = set(packages_distributions()["vllm"]) - {"vllm-hybrid-w4a16"}
    (name,) = names
    return name


def test_reinstall_over_itself(make_env, source, library, wheel):
    env = make_env()
    add_vllm(env)
    env.install(wheel)
    first = env.files()
    env.install("--force-reinstall", source, env=library)
    # direct_url.json names the folder or the wheel that was installed
    assert {name for name in env.files() if "direct_url" not in name} == {
        name for name in first if "direct_url" not in name
    }


REAL_PROBE = """
import importlib, json, sys
import vllm
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.model_executor.layers.fused_moe import hybrid_w4a16_ops
from vllm.plugins.hybrid_w4a16 import hooks
hooks.apply_hooks()
print(json.dumps({
    "vllm": vllm.__file__,
    "ops": hybrid_w4a16_ops.__file__,
    "load_error": hybrid_w4a16_ops.load_error(),
    "modules": {n: importlib.import_module(n).__file__ for n in sys.argv[1:]},
}))
"""


@pytest.mark.slow
def test_wheel_beside_the_real_vllm(make_env, wheel, tmp_path):
    env = make_env(torch=None)
    copy_real_vllm(env)
    before = record_mismatches(env)
    assert before == []
    env.install(wheel)

    modules = [name for name in map(module_name, MODULES) if "__main__" not in name]
    output = run(env.python, "-c", REAL_PROBE, *modules, cwd=tmp_path)
    seen = json.loads(output.splitlines()[-1])
    assert Path(seen["vllm"]) == env.site / "vllm" / "__init__.py"
    assert seen["load_error"] is None
    for file in [seen["ops"], *seen["modules"].values()]:
        assert Path(file).is_relative_to(env.site / "vllm")

    run(*env.pip("uninstall", "-y", "vllm-hybrid-w4a16"))
    assert record_mismatches(env) == []
    assert not [file for file in OURS if (env.site / "vllm" / file).exists()]
    assert not list(env.site.glob("*hybrid_w4a16*"))
    assert not list(env.site.glob("vllm/*hybrid_w4a16*"))


def copy_real_vllm(env: Env) -> None:
    """vLLM as a regular install of ``env``, everything that it needs by links."""
    dist = distribution(vllm_distribution())
    for file in dist.files or ():
        if ".." in file.parts or file.suffix == ".pyc":
            continue
        target = env.site / file
        target.parent.mkdir(parents=True, exist_ok=True)
        original = Path(str(file.locate()))
        if file.suffix == ".so":  # hundreds of MB
            target.symlink_to(original)
            continue
        shutil.copy2(original, target)
        compiled = Path(importlib.util.cache_from_source(str(original)))
        if compiled.exists():  # saves most of the first import's time
            copy = Path(importlib.util.cache_from_source(str(target)))
            copy.parent.mkdir(exist_ok=True)
            shutil.copy2(compiled, copy)
    for entry in Path(str(dist.locate_file(""))).iterdir():
        ours_or_vllm = entry.name.startswith("vllm") or entry.suffix == ".pth"
        if not ours_or_vllm and not (env.site / entry.name).exists():
            (env.site / entry.name).symlink_to(entry)


def record_mismatches(env: Env) -> list[str]:
    """Files of vLLM's RECORD that are not there or not what they were."""
    (record,) = env.site.glob("vllm*.dist-info/RECORD")
    wrong = []
    for name, digest, _ in csv.reader(record.read_text().splitlines()):
        if ".." in Path(name).parts or not digest:
            continue
        file = env.site / name
        if not file.is_file():
            wrong.append(name)
        elif file.suffix == ".py":
            found = base64.urlsafe_b64encode(hashlib.sha256(file.read_bytes()).digest())
            if f"sha256={found.rstrip(b'=').decode()}" != digest:
                wrong.append(name)
    return wrong


def failing_install(env: Env, source: Path) -> str:
    """Output of ``pip install`` of our source, which must fail and install nothing."""
    before = env.files()
    options = ["install", "--no-index", "--no-deps", "--no-build-isolation"]
    result = attempt(*env.pip(*options, source))
    assert result.returncode != 0
    assert env.files() == before
    return " ".join(result.stdout.split())


def test_message_when_vllm_is_missing(make_env, source):
    message = failing_install(make_env(), source)
    assert (
        "vLLM is not installed. Supported: vLLM 0.30.x, 0.31.x, 0.32.x and 0.33.x."
        in message
    )
    assert "HYBRID_W4A16_SKIP_VLLM_CHECK=1" in message


def test_message_when_vllm_is_unsupported(make_env, source):
    env = make_env()
    add_vllm(env, "0.29.2")
    message = failing_install(env, source)
    assert f"vLLM 0.29.2 ({env.site / 'vllm'}) is not supported." in message
    assert "Supported: vLLM 0.30.x, 0.31.x, 0.32.x and 0.33.x." in message


@pytest.mark.parametrize(
    "version, expected",
    [
        (None, "torch is not installed, torch >= 2.11 is needed"),
        ("2.10.1", "is too old: its stable ABI lacks what the op library needs."),
    ],
)
def test_message_when_torch_is_missing_or_old(version, expected, make_env, source):
    env = make_env(torch=version)
    add_vllm(env)
    message = failing_install(env, source)
    assert expected in message
    assert "torch >= 2.11" in message


def test_message_when_vllm_has_a_file_of_ours(make_env, source):
    env = make_env()
    write_files(add_vllm(env), {MODULES[0]: ""})
    message = failing_install(env, source)
    assert f"already has {MODULES[0]}. Nothing is overwritten" in message


@pytest.fixture
def plan_gpu(tmp_path, monkeypatch):
    """What setup.py decides for a torch, the compilers that are found, variables."""
    for name in ("CUDA_HOME", "CUDA_PATH", "HYBRID_W4A16_GPU"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("HYBRID_W4A16_GPU_ARCHS", raising=False)

    def plan(torch: dict[str, str], nvcc: str = "", **variables: str):
        """The plan, or the message of the error that stops the build."""
        write_files(tmp_path, torch_files(**torch))
        path = tmp_path / "bin"
        if nvcc:
            write_files(path, {"nvcc": f"#!/bin/sh\necho release {nvcc}, V{nvcc}\n"})
            (path / "nvcc").chmod(0o755)
        for name, value in variables.items():
            monkeypatch.setenv(f"HYBRID_W4A16_{name}", value)
        # nothing of this machine: /usr/local/cuda may be there
        monkeypatch.setattr(
            overlay_target,
            "_find_tool",
            lambda name, *_: shutil.which(name, path=str(path)),
        )
        package = overlay_target.find_package("torch", "version.py", [tmp_path])
        try:
            return overlay_target.plan_gpu(package)
        except overlay_target.TargetError as error:
            return str(error)

    return plan


ROCM, CUDA, CPU = {"hip": "7.1"}, {"cuda": "13.0"}, {}


@pytest.mark.parametrize(
    "torch, nvcc, variables, kind, reason",
    [
        (CPU, "13.0", {}, "none", "is a CPU build (HYBRID_W4A16_GPU=hip builds"),
        (CPU, "", {"GPU": "hip"}, "hip", "HYBRID_W4A16_GPU=hip"),
        (CPU, "", {"GPU_ARCHS": "gfx1151"}, "hip", "HYBRID_W4A16_GPU_ARCHS=gfx1151"),
        (ROCM, "", {}, "hip", "torch 2.13.0+cpu is a ROCm build"),
        (ROCM, "", {"GPU": "none"}, "none", "not built: HYBRID_W4A16_GPU=none"),
        (CUDA, "13.1", {}, "cuda", "release 13.1"),
        (CUDA, "12.9", {}, "none", "needs nvcc release 13"),
        (CUDA, "", {}, "none", "NOT BUILT: found no nvcc"),
        (CUDA, "", {"GPU": "hip"}, "hip", "HYBRID_W4A16_GPU=hip"),
        (CUDA, "13.0", {"GPU_ARCHS": "sm_90"}, "cuda", "release 13.0"),
    ],
)
def test_gpu_plan(plan_gpu, torch, nvcc, variables, kind, reason):
    plan = plan_gpu(torch, nvcc, **variables)
    assert plan.kind == kind
    assert reason in plan.reason
    assert bool(plan.nvcc) == (kind == "cuda")


@pytest.mark.parametrize(
    "torch, variables, message",
    [
        (CPU, {"GPU": "cuda"}, "linked with a CUDA build of torch"),
        (CUDA, {"GPU": "cuda"}, "NOT BUILT: found no nvcc"),
        (CUDA, {"GPU_ARCHS": "sm_90"}, "HYBRID_W4A16_GPU_ARCHS=sm_90 asks for CUDA"),
        (CPU, {"GPU": "rocm"}, "expected none, hip or cuda"),
        (CPU, {"GPU": "hip", "GPU_ARCHS": "sm_90"}, "expected architectures of hip"),
        (CPU, {"GPU_ARCHS": "gfx1151 sm_90"}, "expected architectures of one kind"),
    ],
)
def test_gpu_plan_refuses_what_cannot_be_built(plan_gpu, torch, variables, message):
    assert message in plan_gpu(torch, **variables)


@pytest.mark.slow
def test_build_isolation(make_env, source, library, tmp_path):
    """Plain ``pip install .`` finds vLLM and torch of the environment it is for."""
    wheelhouse = tmp_path / "wheelhouse"
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
    requires = project["build-system"]["requires"]
    pip = [sys.executable, "-m", "pip"]
    download = attempt(*pip, "download", "-d", wheelhouse, *requires)
    if download.returncode != 0:
        reason = download.stdout.strip().splitlines()[-1]
        pytest.skip(f"pip cannot download the build requirements: {reason}")
    env = make_env()
    vllm_folder = add_vllm(env)
    offline = ["--no-index", "--no-deps", "-f", wheelhouse]
    log = run(*env.pip("install", "-v", *offline, source), env=library)
    assert f"vLLM         0.32.0 ({vllm_folder})" in log
    assert f"torch        2.13.0+cpu ({env.site / 'torch'})" in log
    assert (env.site / "vllm" / LIBRARY).is_file()
