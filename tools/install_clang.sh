#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
#
# Installs clang 22, with which the GPU checks compile for AMD without ROCm, on a CI machine
# (CI=true, root, apt-get). Elsewhere it only reports what is missing; the tests that need clang are
# then skipped.
set -euo pipefail

packages=(clang-22 lld-22 llvm-22 libclang-rt-22-dev)
if type -P clang++-22 ld.lld-22 llvm-mca-22 >/dev/null; then
  exit 0
fi
if [[ "${CI:-}" == true && $EUID == 0 ]] && command -v apt-get >/dev/null; then
  echo "== Installing ${packages[*]}"
  apt-get -qq update
  apt-get -qq install -y --no-install-recommends "${packages[@]}" >/dev/null
else
  echo "== clang 22 not found: the checks of the AMD GPU code will be skipped."
  echo "   On Debian: apt-get install ${packages[*]}"
fi
