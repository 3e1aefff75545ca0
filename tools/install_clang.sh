#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
#
# clang 22, with which the GPU checks compile for AMD without ROCm. On a CI machine
# (CI=true, root, apt-get) it is installed; elsewhere this only says what is missing, and
# the tests that need it are skipped.
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
  echo "== clang 22 not found, checks of the GPU code for AMD will be skipped."
  echo "   On Debian: apt-get install ${packages[*]}"
fi
