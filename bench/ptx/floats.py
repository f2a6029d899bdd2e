"""Floating-point arithmetic as the PTX manual has it, on numpy arrays.

Basic operations and fma are correctly rounded, to nearest even, with subnormals. What the manual calls
``approx`` is computed in double precision and rounded once; `Approximation` can add an error up to the
manual's bound. Every NaN that arithmetic makes is the canonical one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]

NAN32 = np.uint32(0x7FFFFFFF)
NAN16 = np.uint16(0x7FFF)
_SIGN32 = np.uint32(0x80000000)
_SMALLEST_NORMAL = np.float32(2.0**-126)


def canonical(x: Array) -> Array:
    """fp32 with every NaN replaced by the canonical one."""
    wrong = np.isnan(x)
    if wrong.any():
        x = np.where(wrong, NAN32, x.view(np.uint32)).view(np.float32)
    return x


def flushed(x: Array) -> Array:
    """fp32 subnormals become zeros of their sign."""
    small = np.abs(x) < _SMALLEST_NORMAL
    if small.any():
        bits = x.view(np.uint32)
        x = np.where(small, bits & _SIGN32, bits).view(np.float32)
    return x


def fma(a: Array, b: Array, c: Array) -> Array:
    """a*b + c of fp32, rounded once."""
    product = a.astype(np.float64) * b.astype(np.float64)  # exact
    c = c.astype(np.float64)
    total = product + c
    # Rounding a double to fp32 is right unless the double is itself a rounded sum and lies on a tie of fp32,
    # or among subnormals, whose ties are elsewhere.
    on_tie = (total.view(np.uint64) & np.uint64(0x1FFFFFFF)) == np.uint64(0x10000000)
    if on_tie.any() or ((np.abs(total) < 2.0**-126) & (total != 0)).any():
        total = _to_odd(product, c, total)
    return canonical(total.astype(np.float32))


def _to_odd(x: Array, y: Array, total: Array) -> Array:
    """x + y, truncated to double with the last bit set if anything was cut off: rounds right to any narrower
    type."""
    part = total - x
    error = (x - (total - part)) + (y - part)
    inexact = np.isfinite(total) & (error != 0)
    towards_zero = np.where((error > 0) != (total > 0), np.nextafter(total, 0.0), total)
    odd = (towards_zero.view(np.uint64) | np.uint64(1)).view(np.float64)
    return np.where(inexact, odd, total)


def from_bf16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(x: Array) -> Array:
    """To nearest even."""
    bits = x.view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(
        np.uint16
    )
    return np.where(np.isnan(x), NAN16, rounded)


def from_f16(bits: Array) -> Array:
    return bits.view(np.float16).astype(np.float32)


def to_f16(x: Array) -> Array:
    """To nearest even; what is too large becomes infinite."""
    return np.where(np.isnan(x), NAN16, x.astype(np.float16).view(np.uint16))


def maximum(a: Array, b: Array) -> Array:
    """The number, if one of them is NaN; +0 is larger than -0."""
    return _extremum(np.fmax, np.bitwise_and, a, b)


def minimum(a: Array, b: Array) -> Array:
    """The number, if one of them is NaN; -0 is smaller than +0."""
    return _extremum(np.fmin, np.bitwise_or, a, b)


def _extremum(
    function: Callable[[Array, Array], Array], sign: Callable[[Array, Array], Array], a: Array, b: Array
) -> Array:
    result = function(a, b)
    zeros = (a == 0) & (b == 0)
    if zeros.any():
        result = np.where(zeros, sign(a.view(np.uint32), b.view(np.uint32)), result.view(np.uint32)).view(
            np.float32
        )
    return canonical(result)


def or_nan(function: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    """``maximum`` or ``minimum``, NaN if either is."""

    def extremum(a: Array, b: Array) -> Array:
        wrong = np.isnan(a) | np.isnan(b)
        return np.where(wrong, NAN32, function(a, b).view(np.uint32)).view(np.float32)

    return extremum


class Approximation:
    """What a GPU's special function unit may be off by: the exact value times ``1 + bound*noise``.

    Args:
        noise: 0: exact; 1 or -1: always the manual's largest relative error, up or down; "random": anything
            between, the same for the same input bits.
        flush: False: as if no instruction had .ftz, to find out whether a difference comes from that.
    """

    def __init__(self, noise: float | str = 0.0, flush: bool = True) -> None:
        self.noise = noise
        self.flush = flush

    def function(self, name: str, flush: bool) -> Callable[[Array], Array]:
        """sqrt, rsqrt, rcp, ex2, lg2 of fp32."""
        exact, flush = _EXACT[name], flush and self.flush
        bound = _BOUNDS[name]

        def approximate(x: Array) -> Array:
            given = flushed(x) if flush else x
            value = exact(given.astype(np.float64))
            if self.noise == "random":
                hashed = (given.view(np.uint32) ^ np.uint32(0x9E3779B9)) * np.uint32(0x85EBCA6B)
                hashed = (hashed ^ (hashed >> np.uint32(15))) * np.uint32(0xC2B2AE35)
                value = value * (1 + bound * (hashed.astype(np.float64) * 2.0**-31 - 1))
            elif self.noise:
                value = value * (1 + bound * float(self.noise))
            result = value.astype(np.float32)
            return canonical(flushed(result) if flush else result)

        return approximate


_BOUNDS = {"sqrt": 2.0**-23, "rsqrt": 2.0**-22.9, "rcp": 2.0**-23, "ex2": 2.0**-22.5, "lg2": 2.0**-22.6}
"""Largest relative errors, by the manual."""
_EXACT: dict[str, Callable[[Array], Array]] = {
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1.0 / np.sqrt(x),  # of -0 too: sqrt(-0) is -0
    "rcp": lambda x: 1.0 / x,
    "ex2": np.exp2,
    "lg2": np.log2,
}
