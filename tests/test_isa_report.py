# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""isa_report.py: parsing assembly, judging kernels, real runs if clang-22 is there."""

import importlib
import json
import re
import shutil

import pytest

needs_clang = pytest.mark.skipif(
    shutil.which("clang++-22") is None or shutil.which("llvm-mca-22") is None,
    reason="needs clang++-22 and llvm-mca-22 (Debian: clang-22, llvm-22)",
)


@pytest.fixture
def asm():
    return importlib.import_module("amdgpu_assembly")


@pytest.fixture
def isa():
    return importlib.import_module("isa_report")


def assembly(code, name="toy", vgpr=40, scratch=0):
    """Return a kernel with this code as clang would print it."""
    return f"""
\t.text
\t.type\t{name},@function
{name}:                                    ; @{name}
{code}
\ts_endpgm
.Lfunc_end0:
\t.size\t{name}, .Lfunc_end0-{name}
\t.amdgpu_metadata
---
amdhsa.kernels:
  - .args:
      - .offset:         0
        .size:           8
    .group_segment_fixed_size: 4096
    .max_flat_workgroup_size: 256
    .name:           {name}
    .private_segment_fixed_size: {scratch}
    .sgpr_count:     20
    .symbol:         {name}.kd
    .vgpr_count:     {vgpr}
amdhsa.target:   amdgcn-amd-amdhsa--gfx1151
...
\t.end_amdgpu_metadata
"""


def loops_of(asm, code):
    (kernel,) = asm.parse_assembly(assembly(code))
    return [asm.analyse(loop) for loop in kernel.main_loops()]


def test_kernel_resources_are_read(asm):
    (kernel,) = asm.parse_assembly(assembly("\ts_nop 0", vgpr=97, scratch=12))
    assert (kernel.name, kernel.vgpr, kernel.sgpr) == ("toy", 97, 20)
    assert (kernel.lds, kernel.scratch, kernel.block_size) == (4096, 12, 256)


def test_main_loop_is_counted_per_turn(asm):
    (loop,) = loops_of(
        asm,
        """
\tglobal_load_b128 v[0:3], v[20:21], off slc dlc
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
\tglobal_load_b128 v[4:7], v[20:21], off slc dlc
\tglobal_load_b128 v[8:11], v[20:21], off offset:16 slc dlc
\tglobal_load_u16 v30, v[22:23], off
\tglobal_load_d16_hi_b16 v31, v[22:23], off
\tv_and_or_b32 v12, v4, s4, 0x64006400
\tv_dot2acc_f32_f16 v13, v12, v14       ; a comment with slc in it
\tv_dual_dot2acc_f32_f16 v15, v12, v16 :: v_dual_add_nc_u32 v17, 0x800, v17
\ts_cbranch_execnz .LBB0_1
\tglobal_store_b32 v[20:21], v13, off""",
    )
    assert loop.weight_loads == {16: 2}
    assert loop.lane_loads == 2
    assert loop.dot2_per_512B == 2 / 2
    assert loop.valu_per_512B == 4 / 2
    assert loop.instructions_per_512B == 8 / 2
    assert loop.weight_bytes == loop.weight_bytes_in_flight == 2 * 512
    assert loop.faults() == []


def test_innermost_loop_with_weights_is_the_main_loop(asm):
    (loop,) = loops_of(
        asm,
        """
.LBB0_1:                                ; =>This Loop Header: Depth=1
\tglobal_load_b128 v[0:3], v[20:21], off slc
.LBB0_2:                                ; =>  This Inner Loop Header: Depth=2
\tds_store_b32 v1, v2
\ts_cbranch_scc1 .LBB0_2
.LBB0_3:                                ; =>  This Inner Loop Header: Depth=2
\tglobal_load_b128 v[4:7], v[20:21], off slc
\tv_dot2acc_f32_f16 v13, v4, v5
\ts_cbranch_scc1 .LBB0_3
\ts_cbranch_vccnz .LBB0_1""",
    )
    assert (loop.weight_loads, loop.dot2_per_512B) == ({16: 1}, 1)


def test_block_out_of_line_belongs_to_its_loop(asm):
    """A cold block after the loop jumps back into it; it is not a separate loop."""
    (loop,) = loops_of(
        asm,
        """
\ts_branch .LBB0_2
.LBB0_1:
\tv_mov_b32_e32 v4, 0
\tv_mov_b32_e32 v5, 0
.LBB0_2:
\tglobal_load_b128 v[4:7], v[20:21], off slc
\ts_cbranch_execz .LBB0_5
.LBB0_3:
\tv_dot2acc_f32_f16 v13, v4, v5
\ts_cbranch_scc1 .LBB0_1
\ts_branch .LBB0_6
.LBB0_5:
\tglobal_load_b128 v[8:11], v[22:23], off slc
\ts_branch .LBB0_3
.LBB0_6:""",
    )
    assert (loop.weight_loads, loop.dot2_per_512B) == ({16: 2}, 1 / 2)
    assert loop.valu_per_512B == 3 / 2


def test_every_main_loop_is_judged(asm):
    good, bad = loops_of(
        asm,
        """
.LBB0_1:
\tglobal_load_b128 v[4:7], v[20:21], off slc
\ts_cbranch_scc1 .LBB0_1
.LBB0_2:
\tglobal_load_b64 v[4:5], v[20:21], off slc
\ts_cbranch_scc1 .LBB0_2""",
    )
    assert good.faults() == []
    assert bad.faults() == ["weight loads of 8 bytes in the main loop (1)"]


def test_unrolled_kernel_is_its_own_main_loop(asm):
    (loop,) = loops_of(
        asm, "\tglobal_load_b128 v[4:7], v[20:21], off th:TH_LOAD_NT\n" * 3
    )
    assert loop.weight_loads == {16: 3}


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("global_load_b32 v4, v[20:21], off slc", "weight loads of 4 bytes"),
        ("buffer_load_dwordx2 v[4:5], off, s[0:3], 0 nt", "weight loads of 8 bytes"),
        ("global_load_b32 v4, v[20:21], off", "no non-temporal weight load"),
        (
            """global_load_b128 v[0:3], v[20:21], off slc
            global_load_b128 v[4:7], v[20:21], off
            ds_load_b128 v[12:15], v22
            v_and_or_b32 v8, v0, s4, 0x64006400""",
            "weight loads that are not non-temporal in the main loop (1)",
        ),
    ],
)
def test_bad_loads_are_faults(asm, body, fault):
    (loop,) = loops_of(asm, f".LBB0_1:\n\t{body}\n\ts_cbranch_scc1 .LBB0_1")
    assert len(loop.faults()) == 1
    assert fault in loop.faults()[0]


@pytest.mark.parametrize("unpack", ["", "\n\tv_and_or_b32 v8, v0, s4, 0x64006400"])
def test_activations_may_come_from_memory_where_nothing_uses_lds(asm, unpack):
    body = "global_load_b128 v[0:3], v[20:21], off slc\n\t"
    body += "global_load_b128 v[4:7], v[20:21], off" + unpack
    (loop,) = loops_of(asm, f".LBB0_1:\n\t{body}\n\ts_cbranch_scc1 .LBB0_1")
    assert loop.faults() == []


LOAD = "global_load_b128 v[0:3], v20, s[4:5] slc dlc"


@pytest.mark.parametrize(
    ("wait", "early"),
    [
        ("s_delay_alu instid0(VALU_DEP_1)", 1024),
        ("s_waitcnt_depctr 0xfffe", 1024),
        ("s_wait_alu 0xfffe", 1024),
        ("s_waitcnt vmcnt(1)", 512),
        ("s_waitcnt lgkmcnt(0)", 512),
        ("s_wait_loadcnt 0x0", 512),
        ("s_wait_loadcnt_dscnt 0x100", 512),
        ("s_wait_dscnt 0x0", 512),
        ("s_barrier", 512),
        ("s_barrier_wait 0xffff", 512),
    ],
)
def test_wait_between_weight_loads_is_a_fault(asm, wait, early):
    (loop,) = loops_of(
        asm,
        f""".LBB0_1:
\ts_waitcnt vmcnt(0)
\t{LOAD}
\t{wait}
\t{LOAD}
\ts_waitcnt vmcnt(0)
\ts_cbranch_scc1 .LBB0_1""",
    )
    assert (loop.weight_bytes, loop.weight_bytes_in_flight) == (1024, early)
    expected = [f"{early} of a turn's 1024 weight bytes are requested before a wait"]
    assert loop.faults() == ([] if early == 1024 else expected)


def test_flight_is_that_of_the_path_with_most_weights(asm):
    """Among the paths with most loads the worst counts: here the branch that waits."""
    (loop,) = loops_of(
        asm,
        f""".LBB0_1:
\ts_cbranch_execz .LBB0_3
\t{LOAD}
\t{LOAD}
\ts_cbranch_execz .LBB0_2
\tglobal_load_u16 v4, v[20:21], off
\ts_waitcnt vmcnt(0)
.LBB0_2:
\t{LOAD}
\t{LOAD}
.LBB0_3:
\ts_cbranch_scc1 .LBB0_1""",
    )
    assert (loop.weight_bytes, loop.weight_bytes_in_flight) == (2048, 1024)


def test_turn_begins_where_the_loop_is_entered(asm):
    """The end of a rotated loop precedes its beginning."""
    (loop,) = loops_of(
        asm,
        f"""\ts_branch .LBB0_2
.LBB0_1:
\t{LOAD}
\ts_waitcnt vmcnt(0)
\ts_cbranch_scc1 .LBB0_3
.LBB0_2:
\t{LOAD}
\ts_branch .LBB0_1
.LBB0_3:""",
    )
    assert (loop.weight_bytes, loop.weight_bytes_in_flight) == (1024, 1024)


def test_inner_rotated_loop_is_found(asm):
    """Both loops are entered in the middle; a turn of the inner loop has one load."""
    (loop,) = loops_of(
        asm,
        f"""\ts_branch .LBB0_3
.LBB0_1:
\tv_mov_b32_e32 v4, 0
.LBB0_2:
\t{LOAD}
\ts_cbranch_scc1 .LBB0_4
.LBB0_3:
\tv_dot2acc_f32_f16 v13, v4, v5
\ts_cbranch_scc1 .LBB0_2
\ts_branch .LBB0_1
.LBB0_4:""",
    )
    assert (loop.weight_bytes, loop.dot2_per_512B) == (512, 1)


def trips(asm, code):
    (kernel,) = asm.parse_assembly(assembly(code))
    return kernel.round_trips()


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (LOAD, (0, 0)),
        ("s_nop 0", None),
        # Arguments, then ids: the code waits for each before the next request.
        (
            f"""s_load_b128 s[0:3], s[0:1], 0x0
            s_waitcnt lgkmcnt(0)
            global_load_b32 v1, v0, s[0:1]
            s_waitcnt vmcnt(0)
            {LOAD}""",
            (2, 2),
        ),
        # On gfx12.
        (
            """s_load_b128 s[0:3], s[0:1], 0x0
            s_wait_kmcnt 0x0
            global_load_b32 v1, v0, s[0:1]
            s_wait_loadcnt_dscnt 0x0
            global_load_b128 v[0:3], v20, s[4:5] th:TH_LOAD_NT""",
            (2, 2),
        ),
        # Requested together, waited for one by one, except the last.
        (
            f"""global_load_b32 v1, v0, s[0:1]
            global_load_b32 v2, v0, s[2:3]
            global_load_b32 v3, v0, s[2:3]
            s_waitcnt vmcnt(2)
            s_waitcnt vmcnt(1)
            {LOAD}
            s_waitcnt vmcnt(0)""",
            (1, 1),
        ),
        # LDS accesses do not count.
        (f"ds_load_b32 v1, v2\ns_wait_dscnt 0x0\n{LOAD}", (0, 0)),
        # An expert map adds one.
        (
            f"""s_load_b32 s2, s[0:1], 0x0
            s_waitcnt lgkmcnt(0)
            s_cbranch_scc1 .LBB0_1
            s_load_b32 s2, s[2:3], 0x0
            .LBB0_1:
            s_waitcnt lgkmcnt(0)
            {LOAD}""",
            (1, 2),
        ),
        # A loop without weights on the way is skipped
        (
            f"""s_cbranch_scc1 .LBB0_2
            .LBB0_1:
            s_load_b32 s2, s[2:3], 0x0
            s_waitcnt lgkmcnt(0)
            s_cbranch_scc0 .LBB0_1
            .LBB0_2:
            {LOAD}""",
            (0, 0),
        ),
        # ... if possible.
        (
            f""".LBB0_1:
            s_load_b32 s2, s[2:3], 0x0
            s_waitcnt lgkmcnt(0)
            s_cbranch_scc0 .LBB0_1
            {LOAD}""",
            (1, 1),
        ),
    ],
)
def test_round_trips_before_the_first_weights(asm, code, expected):
    assert trips(asm, code) == expected


def test_activations_on_their_way_to_lds_are_no_fault(asm):
    (loop,) = loops_of(
        asm,
        """.LBB0_1:
\tglobal_load_b128 v[0:3], v[20:21], off th:TH_LOAD_NT
\tglobal_load_b128 v[4:7], v[22:23], off
\tds_store_b128 v8, v[4:7]
\ts_cbranch_scc1 .LBB0_1""",
    )
    assert loop.faults() == []


def test_scratch_instruction_counts_as_scratch(asm):
    text = assembly("\tscratch_store_b32 off, v1, s32")
    assert asm.parse_assembly(text)[0].scratch > 0


def test_kernel_without_code_is_an_error(asm):
    text = assembly("\ts_nop 0").replace(".type\ttoy", ".type\tother")
    with pytest.raises(ValueError, match="'toy' has metadata but no code"):
        asm.parse_assembly(text)


@pytest.mark.parametrize(
    ("arch", "vgpr", "lds", "waves"),
    [
        ("gfx1151", 96, 0, 16),
        ("gfx1151", 97, 0, 12),
        ("gfx1151", 256, 0, 5),
        ("gfx1102", 64, 0, 16),
        ("gfx1102", 65, 0, 12),
        ("gfx1201", 24, 65536, 4),  # two blocks of 8 waves on a WGP's four SIMDs
    ],
)
def test_occupancy(asm, arch, vgpr, lds, waves):
    assert asm.occupancy(arch, vgpr, lds, block_size=256) == waves


def test_mca_report_is_read(asm):
    text = "[0] Code Region - loop0\nIterations: 1\nBlock RThroughput: 101.0\n"
    assert asm.parse_mca(text + text.replace("101.0", "7.5")) == [101.0, 7.5]


def test_budget_is_560_cycles(isa):
    assert round(isa.budget_cycles()) == 560


@pytest.mark.parametrize("package", ["clang-22", "llvm-22"])
def test_missing_tool_names_the_package(isa, monkeypatch, tmp_path, capsys, package):
    if package == "llvm-22":
        (tmp_path / "clang++-22").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("ROCM_PATH", str(tmp_path))
    assert isa.main(["--arch", "gfx1151"]) == 2
    assert f"Debian has it in package {package}" in capsys.readouterr().err


# Five kernels in plain clang HIP. `spills` keeps 300 words alive across an asm barrier.
KERNELS = r"""
typedef unsigned Word;
typedef Word Quad __attribute__((ext_vector_type(4)));
__attribute__((device)) inline Word id() { return __builtin_amdgcn_workitem_id_x(); }
#define KERNEL(name)                                \
  extern "C" __attribute__((global)) void name(     \
      const Quad* w, const Word* s, Word* out)

KERNEL(good) {
  Word sum = 0;
#pragma clang loop unroll(disable)
  for (Word i = 0; i < 64; ++i) {
    const Quad q = __builtin_nontemporal_load(w + 32 * i + id());
    sum += (q.x ^ q.y ^ q.z ^ q.w) * s[i + id()];
  }
  out[id()] = sum;
}
KERNEL(narrow) {
  Word sum = 0;
#pragma clang loop unroll(disable)
  for (Word i = 0; i < 64; ++i) {
    const Word q = __builtin_nontemporal_load((const Word*)w + 32 * i * i + id());
    sum += q * s[i + id()];
  }
  out[id()] = sum;
}
KERNEL(cached) {
  Word sum = 0;
#pragma clang loop unroll(disable)
  for (Word i = 0; i < 64; ++i) {
    const Quad q = w[32 * i * i + id()];
    sum += (q.x ^ q.y ^ q.z ^ q.w) * s[i + id()];
  }
  out[id()] = sum;
}
KERNEL(waits_t1) {
  Word sum = 0;
#pragma clang loop unroll(disable)
  for (Word i = 0; i < 64; ++i) {
    const Quad q = __builtin_nontemporal_load(w + 32 * i + id());
    Quad next = __builtin_nontemporal_load(w + 32 * (q.x & 63) + id());
    sum += next.x ^ next.y ^ next.z ^ next.w ^ q.y ^ q.z ^ q.w;
  }
  out[id()] = sum;
}
KERNEL(spills) {
  Word kept[300];
#pragma clang loop unroll(full)
  for (Word i = 0; i < 300; ++i) kept[i] = s[i * 37 * id()];
  const Quad q = __builtin_nontemporal_load(w + id());
  asm volatile("" : : "v"(q) : "memory");
#pragma clang loop unroll(full)
  for (Word i = 0; i < 300; ++i) asm volatile("" : "+v"(kept[i]));
#pragma clang loop unroll(full)
  for (Word i = 0; i < 300; ++i) out[i * 41 * id()] = kept[i];
}
"""


@needs_clang
@pytest.mark.parametrize("arch", ["gfx1151", "gfx1102", "gfx1201"])
def test_bad_kernels_are_named_with_the_reason(isa, tmp_path, capsys, arch):
    source = tmp_path / "kernels.hip"
    source.write_text(KERNELS)
    report = tmp_path / "report.json"
    assert isa.main([str(source), "--arch", arch, "--json", str(report)]) == 1
    out = capsys.readouterr().out
    assert f"{arch} narrow: weight loads of 4 bytes in the main loop (1)" in out
    assert f"{arch} cached: no non-temporal weight load in the main loop" in out
    assert (
        f"{arch} waits_t1: 512 of a turn's 1024 weight bytes are requested before a "
        "wait"
    ) in out
    assert f"{arch} waits_t1: 512 weight bytes in flight, expected at least 2048" in out
    assert re.search(rf"{arch} spills: \d+ bytes of scratch per lane", out)
    assert f"{arch} good" not in out

    kernels = json.loads(report.read_text())["archs"][arch]["kernels"]
    good = next(kernel for kernel in kernels if kernel["name"] == "good")
    assert good["weight_load_bytes"] == 16
    assert good["scratch"] == good["lds"] == 0
    assert good["occupancy"] == 16
    assert 5 < good["mca_cycles_per_512B"] < 100
    assert good["weight_bytes_in_flight"] == 512
    assert good["round_trips"] == good["round_trips_at_most"] == 1  # its arguments
    assert 5 < good["valu_per_512B"] <= good["instructions_per_512B"] < 50


@needs_clang
def test_occupancy_is_the_compilers(asm, isa, tmp_path):
    """The constants match LLVM's own on both sides of a step."""
    counts = (24, 25, 63, 64, 65, 95, 96, 97, 128, 129, 168, 192, 193)
    source = tmp_path / "registers.hip"
    source.write_text(
        "".join(
            f'extern "C" __attribute__((global)) void k{n}() '
            f'{{ asm volatile("" ::: "v{n - 1}"); }}\n'
            for n in counts
        )
    )
    for arch in asm.VGPR_FILE:
        text = isa.compile_to_assembly("clang++-22", source, arch)
        theirs = [
            int(x) for x in re.findall(r"^; Occupancy: (\d+)", text, re.MULTILINE)
        ]
        kernels = asm.parse_assembly(text)
        assert [asm.occupancy(arch, kernel.vgpr) for kernel in kernels] == theirs
        assert len(theirs) == len(counts)


# A kernel of each kind: dtype, bits, zero points, rows.
FEW_DENSE_KERNELS = r"""
#include "entry_points_dense.h"
#undef DENSE_FOR_ALL
#define DENSE_FOR_ALL(X)                            \
  X(bf16, gpu::BFloat16, 4, 128, sym, false, 1)     \
  X(bf16, gpu::BFloat16, 8, 32, sym, false, 1)      \
  X(bf16, gpu::BFloat16, 4, 128, sym, false, 8)     \
  X(f16, gpu::Half, 4, 32, zp, true, 4)
#include "wvSplitK_int_g.hip"
"""


def check_real_kernels(isa, capsys, report, *arguments):
    status = isa.main([*arguments, "--json", str(report)])
    assert status == 0, capsys.readouterr().out
    for arch in json.loads(report.read_text())["archs"].values():
        assert arch["kernels"]
        for kernel in arch["kernels"]:
            check_real_kernel(kernel)


def check_real_kernel(kernel):
    name = kernel["name"]
    assert kernel["scratch"] == 0
    if name.startswith("rescore_largest"):
        return  # reads no weights
    assert kernel["weight_load_bytes"] == 16
    assert kernel["mca_cycles_per_512B"] > 0
    assert kernel["weight_bytes_in_flight"] >= 2048
    # Of MoE kernels: arguments, ids, expert map. Of the others: arguments. In down some
    # paths through the shared expert's blocks have more.
    is_moe = name.startswith("moe_int4")
    trips = 4 if "_down_" in name else 3 if is_moe else 1
    assert kernel["round_trips_at_most"] <= trips, name
    vgpr, valu = 130, 71
    if is_moe:
        # gate_up and gemm multiply 8 rows with a weight that was read, down 4.
        valu = 71 if name.endswith("1") else 145 if "_down_" in name else 275
    elif name.startswith("wvSplitK"):
        vgpr = {"1": 116, "4": 152, "8": 172}[name[-1]]
        valu = {"1": 82, "4": 152, "8": 260}[name[-1]]
    else:
        valu = 85
    assert kernel["vgpr"] < vgpr, name
    assert kernel["valu_per_512B_through_lds"] < valu, name
    assert kernel["valu_per_512B"] < max(valu, 115), name  # a shared expert's included


@needs_clang
@pytest.mark.slow
def test_real_kernels_on_gfx1151(isa, tmp_path, capsys):
    few = tmp_path / "few_dense.hip"
    few.write_text(FEW_DENSE_KERNELS)
    sources = [p for p in isa.kernel_sources() if p.stem != "wvSplitK_int_g"]
    arguments = [*map(str, sources), str(few), "--arch", "gfx1151"]
    check_real_kernels(isa, capsys, tmp_path / "report.json", *arguments)


@needs_clang
@pytest.mark.nightly
def test_all_kernels(isa, tmp_path, capsys):
    archs = "--arch", "gfx1151", "gfx1100", "gfx1201"
    check_real_kernels(isa, capsys, tmp_path / "report.json", *archs)
