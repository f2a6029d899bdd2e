"""Tensors that outlive the call that makes them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def lasting() -> Iterator[None]:
    """Around what allocates, as a context or a decorator: whoever calls, and under whatever mode, it is an
    ordinary tensor. One that is made in ``torch.inference_mode()`` could never be written outside of it."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():  # leaving inference mode alone would enable gradients
        yield
