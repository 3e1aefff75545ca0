# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Check style, types and layers: ruff, clang-format, mypy, tools/check_imports.py.

python tools/lint.py          report problems; exit status 1 if there are any
python tools/lint.py --fix    fix what can be fixed automatically, then check
"""

import argparse
import subprocess
import sys
import sysconfig
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
CXX_SUFFIXES = {".h", ".cpp", ".cuh", ".cu", ".hip"}


def cxx_sources() -> list[str]:
    """Return the C++ and GPU sources below csrc and tests."""
    files = [*(CHECKOUT / "csrc").rglob("*"), *(CHECKOUT / "tests").rglob("*")]
    return sorted(str(file) for file in files if file.suffix in CXX_SUFFIXES)


def commands(fix: bool) -> list[list[str]]:
    """Return the checks in order; with ``fix`` the first three rewrite files."""
    clang_format = ["-i"] if fix else ["--dry-run", "-Werror"]
    return [
        ["ruff", "check", *(["--fix"] if fix else [])],
        ["ruff", "format", *([] if fix else ["--check"])],
        ["clang-format", *clang_format, *cxx_sources()],
        ["mypy"],
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fix", action="store_true", help="rewrite files")
    scripts = Path(sysconfig.get_path("scripts"))
    failed = []
    for tool, *arguments in commands(parser.parse_args().fix):
        print(f"== {tool} {' '.join(arguments[:2])}", flush=True)
        run = subprocess.run([scripts / tool, *arguments], cwd=CHECKOUT, check=False)
        if run.returncode != 0:
            failed.append(tool)
    print("== tools/check_imports.py", flush=True)
    check = [sys.executable, str(CHECKOUT / "tools/check_imports.py")]
    if subprocess.run(check, cwd=CHECKOUT, check=False).returncode != 0:
        failed.append("check_imports")
    if failed:
        print(f"FAILED: {', '.join(failed)} (make format fixes what it can)")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
