"""How far two tensors are apart, in units of their rounding."""

from __future__ import annotations

import torch
from torch import Tensor


def ulps(actual: Tensor, expected: Tensor, *took_part: Tensor) -> float:
    """The largest difference, in ulps of the largest magnitude that took part: the distance from it
    to the next number of its dtype. A sum's rounding error is half of that, however small the sum."""
    dtype = actual.dtype
    size = torch.stack([t.float().abs() for t in (expected, *took_part)]).amax(0)
    ulp = torch.exp2(torch.frexp(size).exponent.float() - 1) * torch.finfo(dtype).eps
    ulp = ulp.clamp(min=torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)
    return float(((actual.double() - expected.double()).abs() / ulp).max())
