"""A tensor of more than 2**31 elements, where 32-bit arithmetic would come to another place."""

from __future__ import annotations

import pytest
import torch

from adamw_triton import AdamW
from adamw_triton.memory.units import format_bytes

pytestmark = [pytest.mark.gpu, pytest.mark.alone]
NUMEL = 2**31 + 16_384 + 77  # so that the ends below do not overlap
BYTES_PER_ELEMENT = {"32bit": 12, "8bit": 7}
"""bf16 weights and gradients, the state, and some room."""


@pytest.mark.parametrize("variant", BYTES_PER_ELEMENT)
def test_both_ends_of_a_huge_tensor_are_updated_as_small_ones_are(variant: str) -> None:
    """And so is what lies around 2**31. The dither of 8-bit state follows the index: weights do not see it
    in the first step, whose update is made before the state is stored."""
    needed = NUMEL * BYTES_PER_ELEMENT[variant]
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"it takes {format_bytes(needed)} of GPU memory")
    param = torch.zeros(NUMEL, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    param.grad = torch.zeros_like(param)
    ends = [slice(0, 8192), slice(2**31 - 4096, 2**31 + 4096), slice(NUMEL - 5000, NUMEL)]
    small = []
    for number, end in enumerate(ends):
        generator = torch.Generator("cuda").manual_seed(number)
        size = end.stop - end.start
        with torch.no_grad():
            param[end] = torch.randn(size, generator=generator, device="cuda").bfloat16()
            param.grad[end] = torch.randn(size, generator=generator, device="cuda").bfloat16()
        small.append(param.detach()[end].clone().requires_grad_())
        small[-1].grad = param.grad[end].clone()
    for params in ([param], small):
        AdamW(params, lr=1e-2, variant=variant).step()
    for end, alone in zip(ends, small, strict=True):
        assert param.detach()[end].equal(alone.detach())
    assert param.detach()[8192:16384].count_nonzero() == 0
