# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Writes the C++ file that embeds AMD code objects in the op library (device_code.h).

``python embed_device_code.py OUT.cpp ARCH=CODE_OBJECT [ARCH=CODE_OBJECT ...]``

Each code object is compressed with zlib into a file beside OUT.cpp, which includes it.
The names of its kernels come from its symbol table. A code object without kernels (from
a source for other GPUs) is left out. Standard library only.
"""

import struct
import sys
import zlib
from pathlib import Path

EM_AMDGPU = 224
SHT_DYNSYM = 11

HEAD = """\
// Written by embed_device_code.py.
#include "device_code.h"

"""
INCLUDE = """\
extern "C" __attribute__((visibility("hidden"))) const uint8_t hybrid_w4a16_code_{i}[];
asm(R"(
.pushsection .rodata
.globl hybrid_w4a16_code_{i}
.hidden hybrid_w4a16_code_{i}
.balign 16
hybrid_w4a16_code_{i}:
.incbin "{file}"
.popsection
)");

"""


def kernel_names(code_object: bytes) -> list[str]:
    """Return the names of a code object's kernels: those with a descriptor (NAME.kd).

    Raises ``ValueError`` if it is not a code object.
    """
    if code_object[:4] != b"\x7fELF" or struct.unpack_from("<H", code_object, 18) != (
        EM_AMDGPU,
    ):
        raise ValueError("not an AMDGPU code object")
    (table_at,) = struct.unpack_from("<Q", code_object, 40)
    entry_size, count = struct.unpack_from("<HH", code_object, 58)
    # Per section: type, offset, size, link (for symbols: the section with their names).
    sections = []
    for i in range(count):
        fields = struct.unpack_from("<IIQQQQI", code_object, table_at + i * entry_size)
        sections.append((fields[1], fields[4], fields[5], fields[6]))
    names = []
    for kind, offset, size, link in sections:
        if kind != SHT_DYNSYM:
            continue
        for at in range(offset, offset + size, 24):
            start = sections[link][1] + struct.unpack_from("<I", code_object, at)[0]
            name = code_object[start : code_object.index(b"\0", start)].decode()
            if name.endswith(".kd"):
                names.append(name.removesuffix(".kd"))
    return sorted(names)


def main(out: Path, entries: list[str]) -> None:
    text = HEAD
    rows = []
    for i, entry in enumerate(entries):
        arch, _, file = entry.partition("=")
        code_object = Path(file).read_bytes()
        try:
            names = kernel_names(code_object)
        except ValueError as error:
            sys.exit(f"{file}: {error}")
        if not names:
            continue
        blob = out.parent / (Path(file).name + ".z")
        blob.write_bytes(zlib.compress(code_object, 9))
        lines = "".join(f'\n     "{name}\\n"' for name in names)
        rows.append(
            f'    {{"{arch}",{lines},\n     hybrid_w4a16_code_{i}, '
            f"{blob.stat().st_size}, {len(code_object)}}},\n"
        )
        text += INCLUDE.format(i=i, file=blob)
    text += "namespace gpu {\n\nconst CodeObject kCodeObjects[] = {\n" + "".join(rows)
    text += (
        f"}};\nconst size_t kNumCodeObjects = {len(rows)};\n\n}}  // namespace gpu\n"
    )
    out.write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2:])
