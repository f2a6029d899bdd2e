"""Threads that part and meet, matrices of shared memory, and what the emulator refuses or reports."""

from __future__ import annotations

import re

import numpy as np
import pytest

from bench.ptx.memory import AccessError
from bench.ptx.program import PtxError, Unsupported
from tests.ptx.kernel import run

ZEROS = np.zeros((64, 4), dtype=np.uint32)


def test_threads_of_different_ways_meet_again() -> None:
    """Each thread counts to its own number, in a loop that ends at other times for each."""
    body = """
        and.b32 %r30, %r1, 7;
        mov.u32 %r31, 0;
        mov.u32 %r32, 0;
    LOOP:
        setp.ge.s32 %p1, %r31, %r30;
        @%p1 bra DONE;
        add.s32 %r31, %r31, 1;
        add.s32 %r32, %r32, %r31;
        bra.uni LOOP;
    DONE:
        shfl.sync.bfly.b32 %r33, %r32, 1, 31, -1;
        bar.sync 0;
        add.s32 %r20, %r32, %r33;
    """
    got, *_ = run(body, np.zeros((64, 4), dtype=np.uint32))
    sums = [n * (n + 1) // 2 for n in (t & 7 for t in range(64))]
    assert [int(x) for x in got] == [sums[t] + sums[t ^ 1] for t in range(64)]


def test_matrices_of_shared_memory() -> None:
    """stmatrix and ldmatrix are each other's inverse, and ldmatrix.trans transposes."""
    body = """
        shl.b32 %r30, %r1, 4;
        mov.b32 %r31, smem;
        add.s32 %r32, %r31, %r30;
        st.shared.v4.b32 [%r32], {%r10, %r11, %r12, %r13};
        bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x4TRANS.shared.b16 {%r40, %r41, %r42, %r43}, [%r32];
        mov.b32 %r20, %r4MATRIX;
    """
    back = """
        bar.sync 0;
        stmatrix.sync.aligned.m8n8.x4TRANS.shared.b16 [%r32], {%r40, %r41, %r42, %r43};
        bar.sync 0;
        ld.shared.v4.b32 {%r50, %r51, %r52, %r53}, [%r32];
        mov.b32 %r20, %r5MATRIX;
    """
    words = np.arange(256, dtype=np.uint32).reshape(64, 4) * 0x20003 + 7
    halves = words.view(np.uint16).reshape(64, 8)
    for matrix in range(4):
        got, *_ = run(_matrix(body, "", matrix), words)
        want = [int(words[32 * (t // 32) + 8 * matrix + t % 32 // 4, t % 4]) for t in range(64)]
        assert [int(x) for x in got] == want
        got, *_ = run(_matrix(body, ".trans", matrix), words)
        for t in range(64):
            rows = [32 * (t // 32) + 8 * matrix + 2 * (t % 4) + half for half in (0, 1)]
            assert int(got[t]) == int(halves[rows[0], t % 32 // 4]) | int(halves[rows[1], t % 32 // 4]) << 16

        for transposed in ("", ".trans"):
            got, *_ = run(_matrix(body + back, transposed, matrix), words)
            assert (got == words[:, matrix]).all()


def _matrix(body: str, transposed: str, matrix: int) -> str:
    return body.replace("TRANS", transposed).replace("MATRIX", str(matrix))


UNEVEN = (
    "setp.lt.u32 %p1, %r1, 5; @%p1 bra SKIP; shfl.sync.bfly.b32 %r20, %r1, 1, 31, -1; SKIP: mov.b32 %r20, 1;"
)
REFUSED = {
    "ld.global.b32 %r20, [%d4+1024];": (AccessError, "outside"),
    "ld.global.b32 %r20, [%d1+2];": (AccessError, "misaligned"),
    "ld.global.v2.b32 {%r20, %r21}, [%d1+4];": (AccessError, "misaligned"),
    "st.global.b32 [%d4], %r1;": (AccessError, "read only"),
    "mov.b32 %r30, smem; ld.shared.b32 %r20, [%r30+1024];": (AccessError, "shared"),
    "mov.b32 %r20, %r77;": (PtxError, "before anything was written"),
    "mov.b32 %r20, %r99;": (PtxError, "not declared"),
    UNEVEN: (PtxError, "member mask"),
    "setp.lt.u32 %p1, %r1, 32; @%p1 ret; bar.sync 0; mov.b32 %r20, 1;": (PtxError, "returned"),
}


@pytest.mark.parametrize("body", REFUSED)
def test_what_no_kernel_may_do_is_refused(body: str) -> None:
    error, message = REFUSED[body]
    with pytest.raises(error, match=message):
        run(body, ZEROS)


@pytest.mark.parametrize(
    "line",
    [
        "tanh.approx.f32 %r20, %r10;",
        "add.rz.f32 %r20, %r10, %r11;",
        "ld.global.L9::x.b32 %r20, [%d4];",
        "bar.red.popc.u32 %r20, 0, %p1;",
        "shfl.sync.bfly.b32 %r20|%p1, %r1, 1, 31, -1;",
        "bar.sync 0, 32;",
        "bar.sync 1;",
        "bar.sync %r1;",
        "add.bf16x2 %r20, %r10, %r11;",
        "abs.f16x2 %r20, %r10;",
        "cvt.rn.f32.e4m3 %r20, %r10;",
        "min.s16x2 %r20, %r10, %r11;",
        "mov.b128 %r20, %r10;",
        "st.param.b32 [kernel_param_0], %r1;",
        "ld.param.v2.b32 {%r20, %r21}, [kernel_param_0];",
        "bra NOWHERE;",
    ],
)
def test_what_is_not_modelled_names_itself_and_its_line(line: str) -> None:
    with pytest.raises(Unsupported) as caught:
        run(f"\n{line}", ZEROS)
    assert line.rstrip(";") in str(caught.value)
    assert re.search(r"line \d+: ", str(caught.value))


@pytest.mark.parametrize("line", ["bar.warp.sync 0xffffffff;", "membar.gl;", "fence.acq_rel.gpu;"])
def test_what_only_orders_accesses_does_nothing(line: str) -> None:
    got, *_ = run(f"{line} mov.b32 %r20, 7;", ZEROS)
    assert (got == 7).all()


EXCHANGE = """
    shl.b32 %r30, %r1, 2; mov.b32 %r31, smem; add.s32 %r32, %r31, %r30; st.shared.b32 [%r32], %r1; {barrier}
    xor.b32 %r33, %r30, 4; add.s32 %r34, %r31, %r33; ld.shared.b32 %r20, [%r34];
"""


def test_an_undefined_part_of_a_packed_register_is_poison() -> None:
    """As LLVM packs it for sm_100, to unpack only the other."""
    given = np.arange(64 * 4, dtype=np.uint32).reshape(-1, 4)
    pack = "mov.b64 %d9, {%r77, %r10};"
    found, _, _ = run(f"{pack} mov.b64 {{_, %r20}}, %d9;", given)
    assert (found == given[:, 0]).all()
    found, _, _ = run(f"{pack} mov.b64 {{%r20, _}}, %d9;", given)
    assert (found == 0xDEADBEEF).all()


def test_races_in_shared_memory_are_found() -> None:
    _, _, (shared,) = run(EXCHANGE.replace("{barrier}", "bar.sync 0;"), ZEROS, races=True)
    assert not shared.races.conflicts
    _, _, (shared,) = run(EXCHANGE.replace("{barrier}", ""), ZEROS, races=True)
    assert any("no barrier between" in kind for kind in shared.races.conflicts)
    _, _, (shared,) = run("mov.b32 %r31, smem; ld.shared.b32 %r20, [%r31];", ZEROS, races=True)
    assert shared.unwritten


def test_races_between_ctas_are_found() -> None:
    _, memory, _ = run("st.global.b32 [%d2], 1; mov.b32 %r20, 1;", ZEROS, ctas=2, races=True)
    assert any("between CTAs" in kind for kind in memory.races.conflicts)
    _, memory, _ = run("ld.global.b32 %r20, [%d2];", ZEROS, ctas=2, races=True)
    assert any("read by another" in kind for kind in memory.races.conflicts)
