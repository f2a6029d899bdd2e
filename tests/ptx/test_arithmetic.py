"""The emulator's arithmetic against exact fractions, torch's conversions and Python's integers."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from bench.ptx import floats
from tests.ptx.kernel import bits, interesting, run, value


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
    with np.errstate(all="ignore"):
        a, b = (close[:, i].view(np.float32).astype(np.float64) for i in (0, 1))
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


def test_fma_of_mixed_types() -> None:
    given = np.array([bits(1.5, -2.25, 1e-3, 0), bits(3.0, 2.0**-100, 2.0**-120, 0)], dtype=np.uint32)
    narrowed = "cvt.rn.bf16.f32 %h1, %r10; cvt.rn.bf16.f32 %h2, %r11;"
    got, *_ = run(f"{narrowed} fma.rn.f32.bf16 %r20, %h1, %h2, %r12;", given)
    want, *_ = run("fma.rn.f32 %r20, %r10, %r11, %r12;", given)
    assert list(got) == list(want)


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
    for name, want in (
        ("lt", [True, False, False, False, False, False]),
        ("ltu", [True, True, True, False, False, True]),
        ("nan", [False, True, True, False, False, True]),
    ):
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


MASK = 0xFFFFFFFF


def signed(word: int, bits: int = 32) -> int:
    """Two's complement of the low bits."""
    word &= (1 << bits) - 1
    return word - (1 << bits) if word >> (bits - 1) else word


INTEGERS = {
    "prmt.b32 %r20, %r10, %r11, 0x5410;": lambda a, b, c, d: (a & 0xFFFF) | (b & 0xFFFF) << 16,
    "prmt.b32 %r20, %r10, 0, 0x7771;": lambda a, b, c, d: a >> 8 & 0xFF,
    "prmt.b32 %r20, %r10, 0, 0x9991;": lambda a, b, c, d: (-(a >> 15 & 1) << 8) | a >> 8 & 0xFF,
    "popc.b32 %r20, %r10;": lambda a, b, c, d: (a & 0xFFFFFFFF).bit_count(),
    "bfe.u32 %r20, %r10, 16, 1;": lambda a, b, c, d: a >> 16 & 1,
    "bfe.s32 %r20, %r10, 3, 1;": lambda a, b, c, d: -(a >> 3 & 1),
    "bfe.s32 %r20, %r10, 5, 6;": lambda a, b, c, d: signed(a >> 5, 6),
    "mad.lo.s32 %r20, %r10, %r11, %r12;": lambda a, b, c, d: a * b + c,
    "mul.hi.u32 %r20, %r10, %r11;": lambda a, b, c, d: a * b >> 32,
    "mul.wide.s32 %d20, %r10, %r11; shr.u64 %d20, %d20, 16; cvt.u32.u64 %r20, %d20;": (
        lambda a, b, c, d: signed(a) * signed(b) >> 16
    ),
    "shr.s32 %r20, %r10, 40;": lambda a, b, c, d: -(a >> 31),
    "shl.b32 %r20, %r10, 32;": lambda a, b, c, d: 0,
    "shf.l.wrap.b32 %r20, %r10, %r11, 8;": lambda a, b, c, d: b << 8 | a >> 24,
    "lop3.b32 %r20, %r10, %r11, %r12, 0x96;": lambda a, b, c, d: a ^ b ^ c,
    "cvt.s8.s32 %h1, %r10; cvt.s16.s8 %h2, %h1; cvt.rn.f32.s16 %r20, %h2;": (
        lambda a, b, c, d: bits(signed(a, 8))[0]
    ),
    "cvt.rn.f32.u32 %r20, %r10;": lambda a, b, c, d: bits(rounded(Fraction(a)))[0],
    "mov.b32 {%h1, %h2}, %r10; mov.b32 %r20, {%h2, %h1};": lambda a, b, c, d: a >> 16 | a << 16,
    "setp.lt.s32 %p1, %r10, %r11; setp.lt.u32 %p2, %r10, %r11; and.pred %p3, %p1, %p2;"
    "selp.b32 %r20, %r12, %r13, %p3;": lambda a, b, c, d: c if signed(a) < signed(b) and a < b else d,
}


@pytest.mark.parametrize("body", INTEGERS)
def test_integers(body: str) -> None:
    words = interesting(256, 5).reshape(-1, 4)
    got, *_ = run(body, words)
    assert [int(x) for x in got] == [INTEGERS[body](*map(int, row)) & MASK for row in words]


def test_pairs_of_floats() -> None:
    words = interesting(256, 5).reshape(-1, 4)
    pack = "mov.b64 %d20, {%r10, %r11}; mov.b64 %d21, {%r12, %r13};"
    got, *_ = run(f"{pack} mul.f32x2 %d22, %d20, %d21; mov.b64 {{_, %r20}}, %d22;", words)
    with np.errstate(all="ignore"):
        product = floats.canonical(words[:, 1].copy().view(np.float32) * words[:, 3].copy().view(np.float32))
    assert (got == product.view(np.uint32)).all()


@pytest.mark.parametrize(("kind", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("name", ["eq", "lt", "geu"])
def test_comparisons_of_two_halves(kind: str, dtype: torch.dtype, name: str) -> None:
    words = interesting(256, 5).reshape(-1, 4)
    words[::3, 1] = words[::3, 0]
    words[1::3, 1] = (words[1::3, 1] & 0xFFFF0000) | (words[1::3, 0] & 0xFFFF)
    got, *_ = run(
        f"setp.{name}.{kind}x2 %p1|%p2, %r10, %r11; selp.b32 %r20, 1, 0, %p1; selp.b32 %r21, 2, 0, %p2;"
        "or.b32 %r20, %r20, %r21;",
        words,
    )
    halves = torch.from_numpy(words[:, :2].astype(np.uint32).copy().view(np.int16)).view(dtype).view(-1, 2, 2)
    a, b = halves[:, 0].float(), halves[:, 1].float()
    unordered = a.isnan() | b.isnan()
    want = {"eq": a == b, "lt": a < b, "geu": (a >= b) | unordered}[name]
    assert (torch.from_numpy(got[: len(words)].astype(np.int64)) == want[:, 0] + 2 * want[:, 1]).all()
    assert 0 < want.sum() < want.numel()
