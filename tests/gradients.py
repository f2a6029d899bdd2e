"""Gradients of another dtype than their parameter's, where torch knows them: from 2.10 on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor


def allow(param: Tensor, dtype: torch.dtype) -> None:
    """Let ``param`` have gradients of that dtype, or skip the test."""
    if dtype is param.dtype:
        return
    if not hasattr(param, "grad_dtype"):
        pytest.skip("this torch refuses gradients of another dtype than their parameter's")
    param.grad_dtype = None
