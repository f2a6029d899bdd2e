"""How a weight is kept, and the dither of the 8-bit code. Plain torch: ``weights.py``, ``codes.py``."""

import os

import triton
import triton.language as tl

# Triton's interpreter truncates fp32 -> bf16 where a GPU rounds to nearest even: under the
# interpreter the same rounding is done on the bits. (On a GPU the native cast costs 3 instructions
# an element less.)
ROUND_BITS = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")

DITHER_ELEMENT = tl.constexpr(0xC13FA9A9)  # 2**32 / plastic number, to the nearest odd integer
WEIGHT_ELEMENT = tl.constexpr(0x91E10DA5)  # 2**32 / plastic number**2
WEIGHT_PHASE = tl.constexpr(0x7713F11F)  # see ``weights.py``


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
def read_weight(p, kept, at, mask, OTHER: tl.constexpr, WEIGHTS: tl.constexpr):
    """fp32, of the parameter's element and what its state array ``kept`` has at ``at``."""
    if WEIGHTS == "remainder":
        upper = p.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        lower = tl.load(kept + at, mask, OTHER).to(tl.int32).to(tl.uint32, bitcast=True)
        exact = (upper + lower).to(tl.float32, bitcast=True)
        # No pair of ours makes a NaN of another number: somebody has written the weight, unseen.
        # (Asked so, ptxas compiles it to an instruction less in eight elements.)
        return tl.where(exact != exact, upper.to(tl.float32, bitcast=True), exact)
    elif WEIGHTS == "master":
        master = tl.load(kept + at, mask, OTHER)
        return tl.where(master.to(p.dtype) == p, master, p.to(tl.float32))
    else:
        return p.to(tl.float32)


@triton.jit
def write_weight(x, kept, at, mask, index, phase, PARAM: tl.constexpr, WEIGHTS: tl.constexpr):
    """Stores what goes into ``kept``; the parameter's element. ``index``: in the whole parameter."""
    if WEIGHTS == "remainder":
        bits = one_nan(x)
        tl.store(kept + at, bits.to(tl.uint16).to(tl.int16, bitcast=True), mask)
        return upper_half(bits + 0x8000)
    elif WEIGHTS == "stochastic":
        noise = (index.to(tl.uint32) * WEIGHT_ELEMENT + phase * WEIGHT_PHASE) >> 16
        return upper_half(one_nan(x) + noise)
    else:
        if WEIGHTS == "master":
            tl.store(kept + at, x, mask)
        return to_dtype(x, PARAM)


@triton.jit
def kept_as(x, stored, WEIGHTS: tl.constexpr):
    """fp32: what is kept of a weight x of which the parameter's element is ``stored``."""
    if WEIGHTS == "remainder" or WEIGHTS == "master":
        return x
    else:
        return stored.to(tl.float32)


@triton.jit
def one_nan(x):
    """The bits of x, of which what is added cannot make another number if it is NaN."""
    return tl.where(x == x, x.to(tl.uint32, bitcast=True), 0x7FC00000)


@triton.jit
def upper_half(bits):
    return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


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
