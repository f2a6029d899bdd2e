"""The AdamW arithmetic on one tile of elements, in fp32: the one copy of it for all kernels.

Loshchilov & Hutter 2019, arXiv:1711.05101, Algorithm 2. Plain torch: ``reference.py``.
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
def new_moments(m, v, g, lerp1, lerp2):
    """m + (1-beta1)*(g - m) and v + (1-beta2)*(g*g - v).

    In this form only the small factors are rounded to fp32; 0.999 rounded would move the
    equilibrium of v by 1e-5.
    """
    return m + lerp1 * (g - m), v + lerp2 * (g * g - v)


@triton.jit
def new_weight(p, m, root_v, inv_root_correction2, eps, step_size, decay):
    """p - lr*weight_decay*p - lr/correction1 * m / (root_v/sqrt(correction2) + eps).

    The change is summed before it is taken from p, so p is rounded once a step.
    """
    inv_root = tl.rsqrt(root_v * inv_root_correction2 + eps)
    return p - (decay * p + (step_size * inv_root) * (m * inv_root))
