"""The emulator against exact arithmetic, torch's conversions, and planted faults: `python test_emulator.py`."""

from __future__ import annotations

import re
import struct
import sys
import traceback
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import torch

import floats
from emulator import Emulator
from memory import AccessError, GlobalMemory, Range
from parser import PtxError, parse
from problems import KERNELS, Problem, hypers, ordinary, set_gradients
from run_compiled import compiled

HEAD = """
.version 8.8
.target sm_90
.address_size 64
.extern .shared .align 16 .b8 smem[];
.visible .entry kernel(
    .param .u64 .ptr .global .align 1 kernel_param_0,
    .param .u64 .ptr .global .align 1 kernel_param_1
)
.reqntid 64
{
    .reg .pred %p<9>;
    .reg .b16 %h<99>;
    .reg .b32 %r<99>;
    .reg .b64 %d<99>;
    ld.param.b64 %d1, [kernel_param_0];
    ld.param.b64 %d2, [kernel_param_1];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
    mov.u32 %r3, %ntid.x;
    mad.lo.s32 %r4, %r2, %r3, %r1;
    mul.wide.u32 %d3, %r4, 16;
    add.s64 %d4, %d1, %d3;
    mul.wide.u32 %d5, %r4, 4;
    add.s64 %d6, %d2, %d5;
    ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%d4];
"""
TAIL = """
    st.global.b32 [%d6], %r20;
    ret;
}
"""


def run(
    body: str, inputs: np.ndarray, ctas: int = 1, races: bool = False, flush: bool = True, shared: int = 1024
) -> tuple[np.ndarray, GlobalMemory, list]:
    """Each thread has four 32-bit numbers in %r10...%r13 and leaves one in %r20."""
    given = np.zeros((64 * ctas, 4), dtype=np.uint32)
    given[: len(inputs)] = inputs
    result = np.zeros(64 * ctas, dtype=np.uint32)
    memory = GlobalMemory(
        [
            Range(given.ctypes.data, given.nbytes, "given", False),
            Range(result.ctypes.data, result.nbytes, "result"),
        ],
        races,
    )
    emulator = Emulator(parse(HEAD + body + TAIL), floats.Approximation(flush=flush))
    used = emulator.launch(ctas, [given.ctypes.data, result.ctypes.data], memory, shared)
    return result[: len(inputs)], memory, used


def bits(*numbers: float) -> list[int]:
    return [struct.unpack("<I", struct.pack("<f", x))[0] for x in numbers]


def value(word: int) -> float:
    return struct.unpack("<f", struct.pack("<I", int(word)))[0]


def interesting(count: int, seed: int = 0) -> np.ndarray:
    """fp32 bit patterns: random ones, of near magnitudes, and every kind of special number."""
    rng = np.random.default_rng(seed)
    special = np.array(
        [0, 1, 0x7FFFFF, 0x800000, 0x3F800000, 0x3F7FFFFF, 0x7F7FFFFF, 0x7F800000, 0x7FC00000, 0x7F800001, 0x477FF000,
         0x33000000, 0x38800000, 0x387FC000], dtype=np.uint32,
    )  # fmt: skip
    special = np.concatenate([special, special | 0x80000000])
    near = rng.normal(size=count).astype(np.float32).view(np.uint32)
    anything = rng.integers(0, 1 << 32, size=count, dtype=np.uint64).astype(np.uint32)
    return rng.permutation(np.concatenate([special, near, anything]))[:count]


def rounded(exact: Fraction) -> float:
    """To fp32, to nearest even, with integers."""
    if exact == 0:
        return 0.0
    sign, size = (-1 if exact < 0 else 1), abs(exact)
    exponent = max(size.numerator.bit_length() - size.denominator.bit_length(), -200)
    while size >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while size < Fraction(2) ** exponent:
        exponent -= 1
    ulp = Fraction(2) ** (max(exponent, -126) - 23)
    steps = size / ulp
    whole, rest = divmod(steps.numerator, steps.denominator)
    twice = 2 * rest
    if twice > steps.denominator or (twice == steps.denominator and whole % 2):
        whole += 1
    result = whole * ulp
    return sign * (float(result) if result < Fraction(2) ** 128 else float("inf"))


def test_fma_is_rounded_once() -> None:
    words = interesting(4096 * 3).reshape(-1, 3)
    close = words[:2000].copy()  # sums that cancel or lie on ties
    a, b = (close[:, i].view(np.float32).astype(np.float64) for i in (0, 1))
    with np.errstate(all="ignore"):
        close[:, 2] = (-a * b * (1 + 2.0**-24)).astype(np.float32).view(np.uint32)
    words = np.concatenate(
        [words, close, [bits(1 + 2.0**-23, 1 + 2.0**-23, 2.0**-60), bits(3 * 2.0**-75, 2.0**-75, 2.0**-149)]]
    )
    with np.errstate(all="ignore"):
        got = floats.fma(*(words[:, i].astype(np.uint32).view(np.float32) for i in range(3)))
    checked = 0
    for row, result in zip(words, got, strict=True):
        x, y, z = map(value, row)
        if all(map(np.isfinite, (x, y, z))):
            exact = Fraction(x) * Fraction(y) + Fraction(z)
            if exact != 0:
                assert rounded(exact) == float(result), (x, y, z, float(result))
                checked += 1
    assert checked > 5000


def test_conversions_are_torchs() -> None:
    words = interesting(4000)
    given = torch.from_numpy(words.astype(np.int64)).to(torch.int32).view(torch.float32)
    for kind, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        padded = np.stack([words, words[::-1], words, words], 1).astype(np.uint32)
        got, *_ = run(f"cvt.rn.{kind}x2.f32 %r20, %r11, %r10;", padded, ctas=63)
        one, *_ = run(f"cvt.rn.{kind}.f32 %h1, %r10; cvt.u32.u16 %r20, %h1;", padded, ctas=63)
        back, *_ = run(f"cvt.rn.{kind}.f32 %h1, %r10; cvt.f32.{kind} %r20, %h1;", padded, ctas=63)
        want = given.to(dtype)
        want_bits = want.view(torch.int16).to(torch.int32).numpy() & 0xFFFF
        nan = given.isnan().numpy()
        assert (one[~nan] == want_bits[~nan]).all()
        assert (one[nan] == 0x7FFF).all()
        assert (got[~nan] & 0xFFFF == want_bits[~nan]).all()
        assert (got >> 16 == one[::-1]).all()
        assert (back.view(np.float32)[~nan] == want.float().numpy()[~nan]).all()


def test_nan_and_zeros_in_extrema() -> None:
    inf, nan = float("inf"), float("nan")
    cases = [
        (1, 2, 2, 1),
        (nan, 2, 2, 2),
        (2, nan, 2, 2),
        (0.0, -0.0, 0.0, -0.0),
        (-0.0, 0.0, 0.0, -0.0),
        (-inf, nan, -inf, -inf),
    ]
    given = np.array([bits(a, b, 0, 0) for a, b, _, _ in cases], dtype=np.uint32)
    for name, column in (("max", 2), ("min", 3)):
        got, *_ = run(f"{name}.f32 %r20, %r10, %r11;", given)
        assert [int(x) for x in got] == [bits(case[column])[0] for case in cases], name
        got, *_ = run(f"{name}.NaN.f32 %r20, %r10, %r11;", given)
        assert [int(x) == 0x7FFFFFFF for x in got] == [a != a or b != b for a, b, _, _ in cases]
    both, *_ = run("max.f32 %r20, %r10, %r11;", np.array([bits(nan, nan, 0, 0)], dtype=np.uint32))
    assert both[0] == 0x7FFFFFFF
    for name, want in (("lt", [True, False, False, False, False, False]), ("ltu", [True, True, True, False, False, True]),
                       ("nan", [False, True, True, False, False, True])):  # fmt: skip
        got, *_ = run(f"setp.{name}.f32 %p1, %r10, %r11; selp.b32 %r20, 1, 0, %p1;", given)
        assert [bool(x) for x in got] == want, name


def test_subnormals_are_flushed_where_it_says_so() -> None:
    given = np.array(
        [bits(1e-40, 1, 0, 0), bits(-1e-40, 1, 0, 0), bits(4.0, 1, 0, 0), bits(-1.0, 1, 0, 0)],
        dtype=np.uint32,
    )
    flushed, *_ = run("sqrt.approx.ftz.f32 %r20, %r10;", given)
    assert [int(x) for x in flushed] == [0, 0x80000000, bits(2.0)[0], 0x7FFFFFFF]
    kept, *_ = run("sqrt.approx.f32 %r20, %r10;", given)
    assert 0.99e-20 < value(kept[0]) < 1.01e-20
    ignored, *_ = run("sqrt.approx.ftz.f32 %r20, %r10;", given, flush=False)
    assert ignored[0] == kept[0]
    inverse, *_ = run("rsqrt.approx.ftz.f32 %r20, %r10;", given)
    assert [int(x) for x in inverse] == [0x7F800000, 0xFF800000, bits(0.5)[0], 0x7FFFFFFF]
    product, *_ = run("mul.f32 %r20, %r10, %r11;", given)
    assert product[0] == given[0, 0]
    product, *_ = run("mul.ftz.f32 %r20, %r10, %r11;", given)
    assert product[0] == 0


def test_integers() -> None:
    words = interesting(256, 5).reshape(-1, 4)
    a, b, c, d = (words[:, i].astype(np.uint64) for i in range(4))
    signed = [words[:, i].astype(np.uint32).view(np.int32).astype(np.int64) for i in range(4)]
    mask = np.uint64(0xFFFFFFFF)
    expectations = {
        "prmt.b32 %r20, %r10, %r11, 0x5410;": (a & 0xFFFF) | (b & 0xFFFF) << 16,
        "prmt.b32 %r20, %r10, 0, 0x7771;": (a >> 8) & 0xFF,
        "prmt.b32 %r20, %r10, 0, 0x9991;": np.where(a & 0x8000, a >> 8 & 0xFF | 0xFFFFFF00, a >> 8 & 0xFF),
        "bfe.u32 %r20, %r10, 16, 1;": (a >> 16) & 1,
        "bfe.s32 %r20, %r10, 3, 1;": np.where(a & 8, mask, 0),
        "bfe.s32 %r20, %r10, 5, 6;": (((signed[0] << 21 & 0xFFFFFFFF) ^ 1 << 31) - (1 << 31) >> 26).astype(np.uint64),
        "mad.lo.s32 %r20, %r10, %r11, %r12;": a * b + c,
        "mul.hi.u32 %r20, %r10, %r11;": a * b >> 32,
        "mul.wide.s32 %d20, %r10, %r11; shr.u64 %d20, %d20, 16; cvt.u32.u64 %r20, %d20;": (signed[0] * signed[1] >> 16).astype(np.uint64),
        "shr.s32 %r20, %r10, 40;": np.where(a >> 31 == 1, mask, 0),
        "shl.b32 %r20, %r10, 32;": a * 0,
        "shf.l.wrap.b32 %r20, %r10, %r11, 8;": b << 8 | a >> 24,
        "lop3.b32 %r20, %r10, %r11, %r12, 0x96;": a ^ b ^ c,
        "cvt.s8.s32 %h1, %r10; cvt.s16.s8 %h2, %h1; cvt.s64.s32 %d20, %r11; cvt.rn.f32.s16 %r21, %h2; mov.b32 %r20, %r21;":
            ((signed[0] & 0xFF ^ 0x80) - 0x80).astype(np.float32).view(np.uint32),
        "cvt.rn.f32.u32 %r20, %r10;": np.array([bits(rounded(Fraction(int(x))))[0] for x in a]),
        "mov.b32 {%h1, %h2}, %r10; mov.b32 %r20, {%h2, %h1};": a >> 16 | a << 16,
        "setp.lt.s32 %p1, %r10, %r11; setp.lt.u32 %p2, %r10, %r11; and.pred %p3, %p1, %p2; selp.b32 %r20, %r12, %r13, %p3;":
            np.where((signed[0] < signed[1]) & (a < b), c, d),
        "mov.b64 %d20, {%r10, %r11}; mov.b64 %d21, {%r12, %r13}; mul.f32x2 %d22, %d20, %d21; mov.b64 {_, %r20}, %d22;": None,
    }  # fmt: skip
    for body, want in expectations.items():
        got, *_ = run(body, words)
        if want is not None:
            assert (got == (np.asarray(want).astype(np.uint64) & mask)).all(), body
        else:
            with np.errstate(all="ignore"):
                product = floats.canonical(
                    words[:, 1].astype(np.uint32).view(np.float32)
                    * words[:, 3].astype(np.uint32).view(np.float32)
                )
            assert (got == product.view(np.uint32)).all(), body


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


def refuses(error: type[Exception], message: str, action: Callable[[], object]) -> None:
    try:
        action()
    except error as caught:
        assert re.search(message, str(caught)), str(caught)
        return
    raise AssertionError(f"no {error.__name__}: {message}")


def test_faults_are_found() -> None:
    zeros = np.zeros((64, 4), dtype=np.uint32)
    refuses(AccessError, "outside", lambda: run("ld.global.b32 %r20, [%d4+1024];", zeros))
    refuses(AccessError, "misaligned", lambda: run("ld.global.b32 %r20, [%d1+2];", zeros))
    refuses(AccessError, "misaligned", lambda: run("ld.global.v2.b32 {%r20, %r21}, [%d1+4];", zeros))
    refuses(AccessError, "read only", lambda: run("st.global.b32 [%d4], %r1;", zeros))
    refuses(AccessError, "shared", lambda: run("mov.b32 %r30, smem; ld.shared.b32 %r20, [%r30+1024];", zeros))
    refuses(PtxError, "tanh", lambda: run("tanh.approx.f32 %r20, %r10;", zeros))
    refuses(PtxError, "before anything was written", lambda: run("mov.b32 %r20, %r77;", zeros))
    refuses(PtxError, "not declared", lambda: run("mov.b32 %r20, %r99;", zeros))
    uneven = "setp.lt.u32 %p1, %r1, 5; @%p1 bra SKIP; shfl.sync.bfly.b32 %r20, %r1, 1, 31, -1; SKIP: mov.b32 %r20, 1;"
    refuses(PtxError, "member mask", lambda: run(uneven, zeros))
    late = "setp.lt.u32 %p1, %r1, 32; @%p1 ret; bar.sync 0; mov.b32 %r20, 1;"
    refuses(PtxError, "returned", lambda: run(late, zeros))


def test_races_are_found() -> None:
    zeros = np.zeros((64, 4), dtype=np.uint32)
    exchange = """
        shl.b32 %r30, %r1, 2; mov.b32 %r31, smem; add.s32 %r32, %r31, %r30; st.shared.b32 [%r32], %r1; {barrier}
        xor.b32 %r33, %r30, 4; add.s32 %r34, %r31, %r33; ld.shared.b32 %r20, [%r34];
    """
    _, _, (shared,) = run(exchange.replace("{barrier}", "bar.sync 0;"), zeros, races=True)
    assert not shared.races.conflicts
    _, _, (shared,) = run(exchange.replace("{barrier}", ""), zeros, races=True)
    assert any("no barrier between" in kind for kind in shared.races.conflicts)
    _, _, (shared,) = run("mov.b32 %r31, smem; ld.shared.b32 %r20, [%r31];", zeros, races=True)
    assert shared.unwritten
    _, memory, _ = run("st.global.b32 [%d2], 1; mov.b32 %r20, 1;", zeros, ctas=2, races=True)
    assert any("between CTAs" in kind for kind in memory.races.conflicts)
    _, memory, _ = run("ld.global.b32 %r20, [%d2];", zeros, ctas=2, races=True)
    assert any("read by another" in kind for kind in memory.races.conflicts)


def _step(
    edit: Callable[[str], str] | None, races: bool = False, kernel: str = "8bit 128"
) -> tuple[Problem, Problem, dict]:
    expected = ordinary(KERNELS[kernel], torch.bfloat16, torch.float32, True, (4097, 129))
    set_gradients(expected, 1)
    expected.hyper = hypers(1)
    ours = expected.copy()
    expected.step_in_torch()
    with compiled(80, edit=edit, races=races, together=1) as session:
        ours.step_compiled()
    return ours, expected, session.conflicts()


def test_faults_planted_in_a_kernel_are_found() -> None:
    """The real kernel's PTX, changed by one thing."""
    ours, expected, conflicts = _step(None, races=True)
    assert not {kind for kind in conflicts if "harmless" not in kind}, conflicts
    assert (ours.state["exp_avg_sq_codes"] != expected.state["exp_avg_sq_codes"]).float().mean() < 1e-3
    refuses(
        AccessError,
        "outside",
        lambda: _step(lambda ptx: re.sub(r"@%p\d+ (ld|st)\.global", r"\1.global", ptx)),
    )
    _, _, conflicts = _step(lambda ptx: re.sub(r"bar\.sync\s+0;", "", ptx), races=True)
    assert {kind for kind in conflicts if "no barrier" in kind or "different values" in kind}
    once = iter(range(10**6))
    _, _, conflicts = _step(
        lambda ptx: re.sub(r"bar\.sync\s+0;", lambda m: "" if next(once) == 1 else m[0], ptx), races=True
    )
    assert {kind for kind in conflicts if "no barrier" in kind}, "one barrier less"
    ours, expected, _ = _step(lambda ptx: ptx.replace("shfl.sync.bfly.b32", "shfl.sync.up.b32"))
    assert not torch.equal(ours.state["exp_avg_sq_scales"], expected.state["exp_avg_sq_scales"])
    ours, expected, _ = _step(lambda ptx: ptx.replace("cvt.rmi.ftz", "cvt.rpi.ftz"))
    assert (ours.state["exp_avg_sq_codes"] != expected.state["exp_avg_sq_codes"]).float().mean() > 0.1
    ours, expected, _ = _step(lambda ptx: ptx.replace("cvt.rn.f32.u32", "cvt.rn.f32.s32"))
    assert (ours.state["exp_avg_sq_codes"] != expected.state["exp_avg_sq_codes"]).float().mean() > 0.05


def main() -> int:
    failed = 0
    for name, test in [(name, test) for name, test in globals().items() if name.startswith("test_")]:
        try:
            with np.errstate(all="ignore"):
                test()
            print(f"passed  {name}")
        except Exception:
            failed += 1
            print(f"FAILED  {name}\n{traceback.format_exc()}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
