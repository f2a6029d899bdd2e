"""The blockwise 8-bit code on one tile of blocks, in fp32. Plain torch: ``codes.py``.

Formulas and reasons stand there, beside the twins of these functions.
"""

import triton
import triton.language as tl

from adamw_triton_kernels.rounding import dither, up_to_bf16
from adamw_triton_kernels.update_rule import reciprocal

LARGEST = tl.constexpr(3.0e38)
LARGEST_ROOT = tl.constexpr(1.6e19)  # the square of 1.125 times this is still finite
# Below these a block counts as zero. v = 1e-36 is near the end of fp32's range, and the product of
# the two reciprocals stays inside it.
TINY_SCALE = tl.constexpr(1e-18)
TINY_RATIO = tl.constexpr(1e-12)
LEVELS = tl.constexpr(65025.0)  # 255**2: codes of exp_avg_sq are in units of its fourth root
BELOW_ONE = tl.constexpr(1 - 2.0**-20)
COARSE = tl.constexpr(3.0)
RATIO_LEVELS = tl.constexpr(127.0)
ZERO = tl.constexpr(12582912.0)  # 1.5 * 2**23, where the ulp is 1: an integer without a conversion


@triton.jit
def sticky_scale(scale, peak):
    """The block's scale of sqrt(v): the old one while it fits, else 1.125 times the peak; the old one
    too when an element's v has overflowed, which the others need not pay for."""
    keeps = ((peak <= scale) & (peak >= 0.5 * scale)) | (peak > LARGEST_ROOT)
    scale = tl.where(keeps, scale, up_to_bf16(1.125 * peak))
    return tl.where(peak >= TINY_SCALE, scale, 0.0)


@triton.jit
def levels_per_unit(scale):
    """255**2/scale, and 0 for a block of scale 0."""
    return tl.where(scale > 0, LEVELS * reciprocal(tl.maximum(scale, TINY_SCALE)), 0.0)


@triton.jit
def encode_root_v(root_v, per_unit, index, phase):
    """The code q of sqrt(v), as fp32: unbiased in v = (scale*(q/255)**2)**2. More than 255 where the element
    has outgrown a scale that is kept beside one that has overflowed."""
    squared = root_v * (per_unit * BELOW_ONE)
    low = tl.floor(tl.sqrt(squared))
    # width = (low+1)**4 - low**4 = (2*low+1)*((2*low+1)**2 + 1)/2, in units of 2**-32 of the dither.
    odd = tl.fma(low, 2.0**-10, 2.0**-11)
    width = odd * tl.fma(odd, odd, 2.0**-22)
    above = tl.fma(-low, low, squared) * tl.fma(low, low, squared)  # squared**2 - low**4
    return tl.where((dither(index, phase) * width < above) | (low < COARSE), low + 1.0, low)


@triton.jit
def ratio_scale(peak):
    """The block's scale of m/sqrt(v)."""
    return tl.where(peak >= TINY_RATIO, up_to_bf16(tl.minimum(peak, LARGEST)), 0.0)


@triton.jit
def levels_per_ratio(scale):
    """127/scale, and 0 for a block of scale 0."""
    return tl.where(scale > 0, RATIO_LEVELS * reciprocal(tl.maximum(scale, TINY_RATIO)), 0.0)


@triton.jit
def byte(x, factor, LAST: tl.constexpr, DTYPE: tl.constexpr):
    """The code of x*factor: the nearest integer, ties to even; ``LAST`` for what is more, and for NaN."""
    shifted = tl.minimum(tl.fma(x, factor, ZERO), ZERO + LAST)
    return shifted.to(tl.uint32, bitcast=True).to(DTYPE)  # the low bits are the integer, whatever its sign
