"""Rounding to the parameter's dtype, and the dither of the 8-bit code."""

import os

import triton
import triton.language as tl

# Triton's interpreter truncates fp32 -> bf16 where a GPU rounds to nearest even: under the
# interpreter the same rounding is done on the bits. (On a GPU the native cast costs 3 instructions
# an element less.)
ROUND_BITS = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")

DITHER_ELEMENT = tl.constexpr(0xC13FA9A9)  # 2**32 / plastic number, to the nearest odd integer


@triton.jit
def to_dtype(x, DTYPE: tl.constexpr):
    """fp32 -> ``DTYPE``, to nearest, ties to even."""
    if ROUND_BITS and DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        rounded = tl.where(x == x, rounded, 0x7FC00000)  # the carry would turn some NaN into zero
        return (rounded >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)


@triton.jit
def up_to_bf16(x):
    """The smallest bf16 value >= x, as fp32; x finite and >= 0."""
    bits = x.to(tl.uint32, bitcast=True)
    return ((bits + 0xFFFF) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def dither(index, phase):
    """A number in [0, 2**32] from an element's index and the step's phase: a Weyl sequence.

    One multiply-add an element and the same at every run; over the steps of one element it covers
    the interval more evenly than random numbers do, so rounding noise averages out sooner.
    """
    return (index.to(tl.uint32) * DITHER_ELEMENT + phase).to(tl.float32)
