"""The AdamW arithmetic on one tile of elements, in fp32: the one copy of it for all kernels.

Loshchilov & Hutter 2019, arXiv:1711.05101, Algorithm 2. Plain torch: ``reference.py``.

No product stands where it is added to something but in a ``tl.fma``: there is nothing left to contract, so
every compiler, for every target, rounds alike.
"""

import triton
import triton.language as tl


@triton.jit
def load_hyper(hyper, row):
    """The numbers of ``work.Hyper``, in its order; the last is a bit pattern."""
    at = hyper + 8 * row
    phase = tl.load(at + 7).to(tl.uint32, bitcast=True)
    return (
        tl.load(at),
        tl.load(at + 1),
        tl.load(at + 2),
        tl.load(at + 3),
        tl.load(at + 4),
        tl.load(at + 5),
        tl.load(at + 6),
        phase,
    )


@triton.jit
def reciprocal(x):
    """1/x for x > 0: two instructions on a GPU where a division takes seven or eight."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def of_gap(gap):
    """From a ``Hyper.gap1`` or ``gap2``: the integer next to beta, beta, and 1-beta."""
    integer = tl.where(gap.to(tl.int32, bitcast=True) < 0, 0.0, 1.0)
    return integer, integer - gap, (1.0 - integer) + gap


@triton.jit
def mix(old, new, gap):
    """beta*old + (1-beta)*new: rounded once but for what is small beside it, and right for any beta.

    beta is taken as the fp32 number before it and what is missing, for 0.999 rounded to fp32 would move the
    equilibrium of v by 1e-5. Both are positive: an infinite v stays infinite.
    """
    integer, beta, lerp = of_gap(gap)
    most = (tl.maximum(beta.to(tl.int32, bitcast=True), 1) - 1).to(tl.float32, bitcast=True)
    little = (integer - most) - gap
    return tl.fma(most, old, tl.fma(lerp, new, little * old))


@triton.jit
def change_of(p, m, root_v, inv_root_correction2, eps, decay):
    """m / (root_v/sqrt(correction2) + eps) + decay*p: lr/correction1 times this is taken from p.

    It is summed before that, so p is rounded once a step.
    """
    inverse = reciprocal(tl.fma(root_v, inv_root_correction2, eps))
    return tl.fma(decay, p, m * inverse)
