"""AdamW with fp32 state: kernel and launcher. Plain torch: ``reference.adamw_32bit``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from adamw_triton_kernels.launch import KEPT, Build, locate, prepare
from adamw_triton_kernels.rounding import kept_as, read_weight, write_weight
from adamw_triton_kernels.statistic_kernels import leave, leave_gradients, leave_no_codes, nothing, see
from adamw_triton_kernels.update_rule import change_of, load_hyper, mix
from adamw_triton_kernels.work import NEAREST, Addresses, Arrays, Call, Layout, Update

# 8 elements a thread: 128-bit accesses of bf16. Programs of 256 threads move 2% more than of 128 on an H100
# (`bench tune`), in no more instructions (`bench audit`).
THREADS = 256
TILE = 2048
TAIL = 512
NEAR = tl.constexpr(4)  # neighbours in a thread, whose sums it makes
TELLING_TAIL = 1024
TELLING_REGISTERS = 128  # as the assembler likes, sm_75 takes 80 and spills two


@Update
def adamw_32bit(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    state: Arrays,
    layout: Layout,
    hyper: torch.Tensor,
    weights: str,
    factors: torch.Tensor | None,
    addresses: Addresses | None,
    sums: torch.Tensor | None,
) -> Call:
    """One AdamW step in place, in one launch. See ``reference.adamw_32bit``."""
    amsgrad = "max_exp_avg_sq" in state
    largest = "max_exp_avg_sq" if amsgrad else "exp_avg_sq"  # not read without amsgrad
    kept = weights if weights in KEPT else "exp_avg"  # not read then
    names = ("exp_avg", "exp_avg_sq", largest, kept)
    return prepare(
        build, params, grads, names, layout, hyper, factors, addresses, sums, AMSGRAD=amsgrad, WEIGHTS=weights
    )


def build(
    param_dtype: torch.dtype,
    grad_dtype: torch.dtype,
    *,
    aligned: bool = True,
    AMSGRAD: bool = False,
    WEIGHTS: str = NEAREST,
    TELLS: bool = False,
) -> Build:
    """The specialization that is compiled for these dtypes and this way to keep weights; with ``TELLS``, one
    that leaves statistics."""
    return Build.of(
        _kernel,
        param_dtype,
        grad_dtype,
        aligned,
        state={
            "exp_avg": "*fp32",
            "exp_avg_sq": "*fp32",
            "max_exp_avg_sq": "*fp32",
            "kept": KEPT.get(WEIGHTS, "*fp32"),
        },
        constexprs={
            "AMSGRAD": AMSGRAD,
            "WEIGHTS": WEIGHTS,
            "TELLS": TELLS,
            "TILE": TILE,
            "TAIL": TELLING_TAIL if TELLS else TAIL,
        },
        threads=THREADS,
        registers=TELLING_REGISTERS if TELLS else None,
        tells=TELLS,
    )


@triton.jit
def _tile(
    param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, kept, start, count, first,
    grad_scale, gap1, gap2, inv_root_correction2, eps, step_size, decay, phase, seen,
    PARAM: tl.constexpr, AMSGRAD: tl.constexpr, WEIGHTS: tl.constexpr, TELLS: tl.constexpr,
    SIZE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    at = start + tl.arange(0, SIZE)
    mask = at < count if MASKED else None
    g = tl.load(grad + at, mask).to(tl.float32) * grad_scale
    p = read_weight(tl.load(param + at, mask), kept, at, mask, None, WEIGHTS)
    if AMSGRAD:  # with the others: later, it would cost registers that sm_86 does not have
        largest = tl.load(max_exp_avg_sq + at, mask)
    m = mix(tl.load(exp_avg + at, mask), g, gap1)
    v = mix(tl.load(exp_avg_sq + at, mask), g * g, gap2)
    tl.store(exp_avg + at, m, mask)
    tl.store(exp_avg_sq + at, v, mask)
    if AMSGRAD:
        v = tl.maximum(v, largest, propagate_nan=tl.PropagateNan.ALL)
        tl.store(max_exp_avg_sq + at, v, mask)
    change = change_of(p, m, tl.sqrt(v), inv_root_correction2, eps, decay)
    new = tl.fma(-step_size, change, p)
    stored = write_weight(new, kept, at, mask, first + at, phase, PARAM, WEIGHTS)
    tl.store(param + at, stored, mask)
    if TELLS:
        new = kept_as(new, stored, WEIGHTS)
        peaks = tl.max(tl.reshape(v, [SIZE // NEAR, NEAR]), 1)
        seen = see(seen, g, p, new, change, m, v, peaks, mask, NEAR, MASKED)
    return seen


@triton.jit(do_not_specialize=["n_tensors", "chunk_size"])
def _kernel(
    addresses, tensors, chunks, hyper, factors, exp_avg, exp_avg_sq, max_exp_avg_sq, kept,
    n_tensors, chunk_size, left,
    PARAM: tl.constexpr, GRAD: tl.constexpr, PARAM_ALIGN: tl.constexpr, GRAD_ALIGN: tl.constexpr,
    AMSGRAD: tl.constexpr, WEIGHTS: tl.constexpr, TELLS: tl.constexpr,
    TILE: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    param, grad, offset, count, first, row, factor, here = locate(
        addresses, tensors, chunks, factors, n_tensors, chunk_size, PARAM, GRAD, PARAM_ALIGN, GRAD_ALIGN
    )
    scale, gap1, gap2, inv_root_correction2, eps, step_size, decay, phase = load_hyper(hyper, row)
    grad_scale = scale * factor
    exp_avg += offset
    exp_avg_sq += offset
    max_exp_avg_sq += offset
    kept += offset
    # Whole tiles without a mask: a mask that depends on a loaded count makes accesses scalar. (With `whole`
    # for a bound the counter would be 64 bits wide: two instructions an element of 32-bit state.)
    whole = count // TILE * TILE
    seen = nothing(TILE, NEAR, TILE // NEAR) if TELLS else 0
    seen_of_tail = nothing(TAIL, NEAR, TAIL // NEAR) if TELLS else 0
    for start in range(0, count - TILE + 1, TILE):
        seen = _tile(
            param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, kept, start, count, first,
            grad_scale, gap1, gap2, inv_root_correction2, eps, step_size, decay, phase, seen,
            PARAM, AMSGRAD, WEIGHTS, TELLS, TILE, False,
        )  # fmt: skip
    for start in range(whole, count, TAIL):
        seen_of_tail = _tile(
            param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, kept, start, count, first,
            grad_scale, gap1, gap2, inv_root_correction2, eps, step_size, decay, phase, seen_of_tail,
            PARAM, AMSGRAD, WEIGHTS, TELLS, TAIL, True,
        )  # fmt: skip
    if TELLS:
        leave(left, seen, seen_of_tail, step_size, factor)
        leave_no_codes(left)
        leave_gradients(left, seen, seen_of_tail, grad, here, scale, factor, TAIL)
