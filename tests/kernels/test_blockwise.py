"""Laws of the blockwise 8-bit code, on its specification."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adamw_triton_kernels import Hyper, Layout, hyper_table
from adamw_triton_kernels.codes import COARSE, TINY_RATIO, TINY_SCALE, decode_8bit, encode_8bit
from adamw_triton_kernels.reference import adamw_8bit
from adamw_triton_kernels.work import DITHER_STEP

ROUNDING = 1 + 1e-5  # of the fp32 arithmetic in between
NEXT_BF16 = 1 + 2**-7


def empty(numel: int, block: int) -> dict[str, Tensor]:
    blocks = -(-numel // block)
    return {
        "exp_avg_codes": torch.zeros(numel, dtype=torch.int8),
        "exp_avg_scales": torch.zeros(blocks, dtype=torch.bfloat16),
        "exp_avg_sq_codes": torch.zeros(numel, dtype=torch.uint8),
        "exp_avg_sq_scales": torch.zeros(blocks, dtype=torch.bfloat16),
    }


@st.composite
def moments(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """m and sqrt(v): any scale, the elements of a block up to 20 powers of ten apart, some of them zero."""
    numel = draw(st.integers(1, 600))
    scale = 10.0 ** draw(st.floats(-15, 15))
    spread, density = draw(st.floats(0, 20)), draw(st.sampled_from([0.0, 0.01, 0.5, 1.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    noise, size, ratio = torch.rand(3, numel, generator=generator, dtype=torch.float64)
    root_v = scale * 10 ** (-spread * size) * (noise < density)
    m = root_v * (2 * ratio - 1) * 10.0 ** draw(st.floats(-6, 1))
    return m.float(), root_v.float()


@given(moments(), st.sampled_from([128, 256]), st.integers(0, 2**32 - 1), st.integers(0, 2**40))
def test_decoded_moments_are_within_the_formats_bounds(
    pair: tuple[Tensor, Tensor], block: int, phase: int, first: int
) -> None:
    m, root_v = pair
    v = root_v * root_v
    root_v = v.sqrt()  # v may have underflown
    state = empty(m.numel(), block)
    for _ in range(2):  # with no scale before, and with one that fits
        encode_8bit(m, v, state, block, first=first, phase=phase)
        decoded_m, decoded_v = (x.double() for x in decode_8bit(state, block))
        decoded_root = decoded_v.sqrt()
        for start in range(0, m.numel(), block):
            at = slice(start, start + block)
            scale = float(state["exp_avg_sq_scales"][start // block])
            ratio_scale = float(state["exp_avg_scales"][start // block])
            peak = float(root_v[at].max())
            codes = state["exp_avg_sq_codes"][at]
            if peak < TINY_SCALE:
                assert scale == 0
                assert not decoded_m[at].any()
                assert not decoded_v[at].any()
                continue
            assert peak <= scale <= 1.125 * peak * NEXT_BF16 * ROUNDING
            assert codes.min() >= 1  # a zero under an m would throw the weight away
            # v: a code is next to the exact one, below or above.
            exact = 255 * (root_v[at].double() / scale).sqrt()
            assert (codes > exact / ROUNDING - 1).all()
            assert (codes < exact * ROUNDING + 1).logical_or(codes == 1).all()
            # m: within half a level of its ratio to the decoded sqrt(v).
            level = max(ratio_scale / 127, TINY_RATIO if ratio_scale == 0 else 0.0)
            error = (m[at].double() - decoded_m[at]).abs()
            tiny = 1e-40  # fp32's subnormal numbers
            assert (error <= 0.5 * level * decoded_root[at] * 1.01 + tiny).all() or ratio_scale == 0
            assert ratio_scale > 0 or (m[at].abs() <= level * decoded_root[at] * 1.01 + tiny).all()


@given(st.integers(0, 2**32 - 1), st.floats(0.05, COARSE - 0.05))
def test_the_lowest_codes_are_rounded_up(phase: int, exact: float) -> None:
    state = empty(128, 128)
    state["exp_avg_sq_scales"].fill_(1.0)
    v = torch.full((128,), (exact / 255) ** 4)
    v[0] = 0.9
    encode_8bit(torch.zeros(128), v, state, 128, phase=phase)
    wanted = math.floor(exact) + 1
    near_an_integer = abs(exact - round(exact)) < 1e-3
    assert near_an_integer or (state["exp_avg_sq_codes"][1:] == wanted).all()
    assert (decode_8bit(state, 128)[1][1:] >= v[1:] / ROUNDING).all()


@pytest.mark.slow
def test_v_is_unbiased_over_the_phases() -> None:
    exact = torch.linspace(COARSE + 1, 250, 256, dtype=torch.float64)
    v = ((exact / 255) ** 4).float()
    total, steps = torch.zeros(256, dtype=torch.float64), 4096
    seen: set[int] = set()
    for step in range(steps):
        state = empty(256, 256)
        state["exp_avg_sq_scales"].fill_(1.0)
        encode_8bit(torch.zeros(256), v, state, 256, phase=step * DITHER_STEP % 2**32)
        total += decode_8bit(state, 256)[1]
        seen.add(int(state["exp_avg_sq_codes"][100]))
    assert len(seen) == 2  # it was dithered
    assert (total / steps / v - 1).abs().max() < 1e-3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30, -1e20])
def test_a_gradient_that_is_not_finite_spoils_its_own_element_alone(bad: float) -> None:
    """1e20 squared is infinite in fp32."""
    lr, steps, at = 1e-3, 12, 5
    state = empty(256, 128)
    param, layout = torch.zeros(256), Layout((256,), (0,), (0,), (0,))
    others = torch.arange(256) != at
    generator = torch.Generator().manual_seed(0)
    for step in range(1, steps + 1):
        grad = torch.randn(256, generator=generator)
        if step == 4:
            grad[at] = bad
        before = param.clone()
        hyper = Hyper.at(step, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
        adamw_8bit([param], [grad], state, layout, hyper_table([hyper]))
        for name in ("exp_avg_scales", "exp_avg_sq_scales"):
            assert state[name].isfinite().all(), (step, name)
        for decoded in decode_8bit(state, 128):
            assert decoded[others].isfinite().all(), step
        assert (param - before)[others].abs().max() <= 7 * lr, step
