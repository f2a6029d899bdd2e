"""fp32 -> the parameter's dtype, in a kernel: to nearest, ties to even, as torch's own cast."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from adamw_triton_kernels.launch import TL_DTYPES
from adamw_triton_kernels.rounding import to_dtype, up_to_bf16

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="not interpreted")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
SIZE = 8192


@triton.jit
def _cast(source, target, DTYPE: tl.constexpr, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(target + at, to_dtype(tl.load(source + at), DTYPE))


@triton.jit
def _up(source, target, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(target + at, up_to_bf16(tl.load(source + at)))


def floats(bits: Tensor) -> Tensor:
    """The fp32 numbers of these bit patterns."""
    return (bits & 0xFFFFFFFF).to(torch.uint32).view(torch.float32)


def around_bf16(*, finite: bool = False) -> Tensor:
    """Every bf16 number (all signs, subnormals, inf, NaN), the midpoint to the next, and their neighbours."""
    every = torch.arange(1 << 16) << 16
    x = floats((every[:, None] + torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])).flatten())
    return x[torch.isfinite(x)] if finite else x


def around_fp16() -> Tensor:
    """Every finite fp16 number, the midpoint to the next, and both sides of each."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    here = every[torch.isfinite(every)].float()
    there = torch.where(
        here.abs() == 65504, here, torch.nextafter(here.half(), here.half().sign() * torch.inf)
    )
    x = torch.cat([here, (here + there.float()) / 2])
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 65519.996, 65520, -65520, 1e30, 1e-30])
    return torch.cat([x, torch.nextafter(x, -x - 1), torch.nextafter(x, x + x.abs() + 1), special])


def padded(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_zeros(-len(x) % SIZE)])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_casts_round_to_nearest_even(dtype: torch.dtype, device: str) -> None:
    x = padded(around_fp16() if dtype == torch.float16 else around_bf16()).to(device)
    actual = torch.empty_like(x, dtype=dtype)
    _cast[(len(x) // SIZE,)](x, actual, TL_DTYPES[dtype], SIZE)
    expected = x.to(dtype)
    nan = expected.isnan()
    assert actual.isnan().equal(nan)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert actual.view(bits)[~nan].equal(expected.view(bits)[~nan])  # also the sign of zeros


@pytest.mark.parametrize("device", DEVICES)
def test_scales_round_up_to_the_next_bf16(device: str) -> None:
    x = around_bf16(finite=True)
    x = padded(x[(x >= 0) & (x <= torch.finfo(torch.bfloat16).max)]).to(device)
    up = torch.empty_like(x)
    _up[(len(x) // SIZE,)](x, up, SIZE)
    assert up.equal(up.bfloat16().float())
    assert (up >= x).all()
    below = ((up.view(torch.int32) >> 16) - 1 << 16).view(torch.float32)
    assert (below < x)[up > 0].all()
    assert (x == 0)[up == 0].all()
