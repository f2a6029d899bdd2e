"""AdamW with blockwise 8-bit state: kernel and launcher. Plain torch: ``reference.adamw_8bit``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from adamw_triton_kernels.blockwise import (
    LEVELS,
    RATIO_LEVELS,
    byte,
    encode_root_v,
    levels_per_ratio,
    levels_per_unit,
    ratio_scale,
    sticky_scale,
)
from adamw_triton_kernels.launch import KEPT, Build, locate, prepare
from adamw_triton_kernels.rounding import kept_as, read_weight, write_weight
from adamw_triton_kernels.statistic_kernels import (
    leave,
    leave_codes,
    leave_gradients,
    no_codes,
    nothing,
    see,
    see_codes,
)
from adamw_triton_kernels.update_rule import change_of, load_hyper, of_gap, reciprocal
from adamw_triton_kernels.work import NEAREST, Addresses, Arrays, Call, Layout, Update

# By block, threads of a program, elements of its tile, and of a masked one. With 16 elements a thread,
# accesses of the codes are 128 bits wide. Programs of 64 threads leave room for more warps on an H100, which
# then moves 96% of what a copy does instead of 91% (`bench tune`); with blocks of 256 they would cost two
# instructions an element. A masked tile of 2,048 takes 254 registers instead of 80, other choices spill on
# sm_75 or cost an instruction an element on sm_90 (`bench audit`).
SHAPES = {128: (64, 1024, 256), 256: (128, 2048, 1024)}
# Registers: left to itself, the assembler takes 128 where there is much to hold, and spills on some targets.
# With 168 three programs share a multiprocessor, as they do with what it takes on others. For fp16 parameters
# with fp32 gradients it takes 96 on sm_90 and spills two; between 96 and 128, sm_100 spills; with a master
# kept, sm_75 spills at 128 and none does at its own choice (`bench compiled`).
MIXED, MANY, MOST = 128, 168, 255
# With statistics: left to itself it takes 216 and more, and at 168 it needs an instruction an element more.
TELLING = 192


@Update
def adamw_8bit(
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
    """One AdamW step in place, in one launch. See ``reference.adamw_8bit``."""
    names = ("exp_avg_codes", "exp_avg_scales", "exp_avg_sq_codes", "exp_avg_sq_scales")
    kept = weights if weights in KEPT else names[0]  # not read then
    block = state["exp_avg_codes"].numel() // state["exp_avg_scales"].numel()
    return prepare(
        build,
        params,
        grads,
        (*names, kept),
        layout,
        hyper,
        factors,
        addresses,
        sums,
        BLOCK=block,
        WEIGHTS=weights,
    )


def build(
    param_dtype: torch.dtype,
    grad_dtype: torch.dtype,
    *,
    aligned: bool = True,
    BLOCK: int = 128,
    WEIGHTS: str = NEAREST,
    TELLS: bool = False,
) -> Build:
    """The specialization that is compiled for these dtypes, this block size and this way to keep weights;
    with ``TELLS``, one that leaves statistics."""
    threads, tile, tail = SHAPES[BLOCK]
    return Build.of(
        _kernel,
        param_dtype,
        grad_dtype,
        aligned,
        state={
            "exp_avg_codes": "*i8",
            "exp_avg_scales": "*bf16",
            "exp_avg_sq_codes": "*u8",
            "exp_avg_sq_scales": "*bf16",
            "kept": KEPT.get(WEIGHTS, "*i8"),
        },
        constexprs={"BLOCK": BLOCK, "WEIGHTS": WEIGHTS, "TELLS": TELLS, "TILE": tile, "TAIL": tail},
        threads=threads,
        registers=_registers(aligned, BLOCK, WEIGHTS, (param_dtype, grad_dtype), TELLS),
        tells=TELLS,
    )


def _registers(
    aligned: bool, block: int, weights: str, dtypes: tuple[torch.dtype, torch.dtype], tells: bool
) -> int | None:
    if tells:
        return TELLING if aligned else MOST
    if not aligned and weights in KEPT:
        return MOST
    if not aligned or block != 128:
        return MANY
    return MIXED if dtypes == (torch.float16, torch.float32) and weights == NEAREST else None


@triton.jit
def _tile(
    param, grad, m_codes, m_scales, v_codes, v_scales, kept, start, count, first,
    grad_scale, gap1, gap2, inv_root_correction2, eps, step_size, decay, phase, seen, coded,
    PARAM: tl.constexpr, PARAM_ALIGN: tl.constexpr, BLOCK: tl.constexpr, WEIGHTS: tl.constexpr,
    TELLS: tl.constexpr, SIZE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    block = tl.arange(0, SIZE // BLOCK)
    at = start + block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = at < count if MASKED else None
    # Elements past the end must not raise their block's peaks.
    OTHER: tl.constexpr = 0 if MASKED else None
    block_mask = start + block * BLOCK < count if MASKED else None
    # Where a thread can take but one parameter at a time, a warp's should be neighbours: taken in a row, not
    # by blocks. For accesses of one shape get one layout, with as many elements a thread as the widest takes:
    # in that of the codes, scalar loads would touch 16 times the bytes that they want.
    near = at if 8 * PARAM_ALIGN > param.dtype.element_ty.primitive_bitwidth else start + tl.arange(0, SIZE)
    near_mask = near < count if MASKED else None
    m_scales += start // BLOCK
    v_scales += start // BLOCK

    # In this order no build spills; in others, some do (`python -m bench compiled`).
    g = tl.reshape(tl.load(grad + near, near_mask, OTHER), at.shape).to(tl.float32) * grad_scale
    r = tl.load(m_codes + at, mask, OTHER).to(tl.float32)
    q = tl.load(v_codes + at, mask, OTHER).to(tl.float32)
    p = tl.reshape(tl.load(param + near, near_mask, OTHER), at.shape)
    p = read_weight(p, kept, at, mask, OTHER, WEIGHTS)
    v_scale = tl.load(v_scales + block, block_mask, OTHER).to(tl.float32)
    m_scale = tl.load(m_scales + block, block_mask, OTHER).to(tl.float32)

    root_v = q * q * (v_scale * (1 / LEVELS))[:, None]
    before = root_v
    # What the betas keep of the moments, while these are decoded. (That beta2 is rounded to fp32 is nothing
    # beside a code's few percent.)
    _, beta1, lerp1 = of_gap(gap1)
    _, beta2, lerp2 = of_gap(gap2)
    m = r * (m_scale * (beta1 * (1 / RATIO_LEVELS)))[:, None] * root_v
    v = root_v * (root_v * beta2)
    m = tl.fma(lerp1, g, m)
    v = tl.fma(lerp2, g * g, v)
    root_v = tl.sqrt(v)
    change = change_of(p, m, root_v, inv_root_correction2, eps, decay)
    new = tl.fma(-step_size, change, p)
    stored = write_weight(new, kept, at, mask, first + at, phase, PARAM, WEIGHTS)
    tl.store(param + near, tl.reshape(stored, near.shape), near_mask)

    peaks = tl.max(root_v, 1)
    if TELLS:
        new = kept_as(new, stored, WEIGHTS)
        NEAR: tl.constexpr = 4 if MASKED else 16
        seen = see(seen, g, p, new, change, m, v, peaks * peaks, mask, NEAR, MASKED)
        old_q, old_root_v = q, before
    v_scale = sticky_scale(v_scale, peaks)
    per_unit = levels_per_unit(v_scale)
    q = encode_root_v(root_v, per_unit[:, None], first + at, phase)
    tl.store(v_codes + at, byte(q, 1.0, 255, tl.uint8), mask)
    tl.store(v_scales + block, v_scale.to(tl.bfloat16), block_mask)

    # By the q that is stored, or, where that has stopped at 255, the one that should be: m shrinks with it.
    inv_q = reciprocal(q)
    ratio = m * inv_q * inv_q  # m/root_v in units of 1/per_unit
    m_scale = ratio_scale(tl.max(tl.abs(ratio), 1) * per_unit)
    per_ratio = per_unit * levels_per_ratio(m_scale)
    r = byte(ratio, per_ratio[:, None], 127, tl.int8)
    tl.store(m_codes + at, r, mask)
    tl.store(m_scales + block, m_scale.to(tl.bfloat16), block_mask)
    if TELLS:
        coded = see_codes(coded, old_q, q, old_root_v, root_v, r, mask, MASKED)
    return seen, coded


@triton.jit(do_not_specialize=["n_tensors", "chunk_size"])
def _kernel(
    addresses, tensors, chunks, hyper, factors,
    exp_avg_codes, exp_avg_scales, exp_avg_sq_codes, exp_avg_sq_scales, kept, n_tensors, chunk_size, left,
    PARAM: tl.constexpr, GRAD: tl.constexpr, PARAM_ALIGN: tl.constexpr, GRAD_ALIGN: tl.constexpr,
    BLOCK: tl.constexpr, WEIGHTS: tl.constexpr, TELLS: tl.constexpr, TILE: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    param, grad, offset, count, first, row, factor, here = locate(
        addresses, tensors, chunks, factors, n_tensors, chunk_size, PARAM, GRAD, PARAM_ALIGN, GRAD_ALIGN
    )
    scale, gap1, gap2, inv_root_correction2, eps, step_size, decay, phase = load_hyper(hyper, row)
    grad_scale = scale * factor
    m_codes = exp_avg_codes + offset
    m_scales = exp_avg_scales + offset // BLOCK
    v_codes = exp_avg_sq_codes + offset
    v_scales = exp_avg_sq_scales + offset // BLOCK
    kept += offset
    seen = nothing(TILE, 16, TILE // BLOCK) if TELLS else 0
    coded = no_codes(TILE) if TELLS else 0
    seen_of_tail = nothing(TAIL, 4, TAIL // BLOCK) if TELLS else 0
    coded_of_tail = no_codes(TAIL) if TELLS else 0
    # Whole tiles without a mask: a mask that depends on a loaded count makes accesses scalar. (With the end
    # of the last for a bound the counter would be 64 bits wide: two instructions an element of 32-bit state.)
    for start in range(0, count - TILE + 1, TILE):
        seen, coded = _tile(
            param, grad, m_codes, m_scales, v_codes, v_scales, kept, start, count, first,
            grad_scale, gap1, gap2, inv_root_correction2, eps, step_size, decay, phase, seen, coded,
            PARAM, PARAM_ALIGN, BLOCK, WEIGHTS, TELLS, TILE, False,
        )  # fmt: skip
    # Worked out of the count again, the first loop has less to hold on to, and no build spills; by the hint a
    # thread still has elements of one block.
    for start in range(tl.multiple_of(count - count % TILE, TILE), count, TAIL):
        seen_of_tail, coded_of_tail = _tile(
            param, grad, m_codes, m_scales, v_codes, v_scales, kept, start, count, first,
            grad_scale, gap1, gap2, inv_root_correction2, eps, step_size, decay, phase,
            seen_of_tail, coded_of_tail,
            PARAM, PARAM_ALIGN, BLOCK, WEIGHTS, TELLS, TAIL, True,
        )  # fmt: skip
    if TELLS:
        leave(left, seen, seen_of_tail, step_size, factor)
        leave_codes(left, coded, coded_of_tail)
        leave_gradients(left, seen, seen_of_tail, grad, here, scale, factor, TAIL)
