"""One pass over memory instead of many: functions of CPU tensors, compiled once that pays.

torch runs a formula operation by operation, each a pass over its operands. ``torch.compile`` makes one loop
of it in C++, several times faster, but takes seconds. So a function runs as it stands until all of them
together have done about as much work as compiling costs, and compiled from then on. No result tells which:
the bits are the same (tests/kernels/test_fusion.py).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

PATIENCE = 1 << 28
"""Elements that are updated before anything is compiled: some seconds of work for 8-bit state."""
SMALL = 4096
"""Calls on fewer elements are not compiled: the call itself is what they cost."""

_log = logging.getLogger("adamw_triton")


class _Work:
    done = 0
    refused = False
    """No compiler, most often."""


def compiles() -> bool:
    """Whether calls are compiled by now."""
    return _Work.done >= PATIENCE and not _Work.refused


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` of tensors, which may write into them; its work is the size of the first."""
    compiled: list[Callable[..., Any]] = []  # asking for it imports the compiler

    @functools.wraps(function)
    def run(*tensors: torch.Tensor) -> Any:
        first = tensors[0]
        if first.device.type != "cpu" or torch.compiler.is_compiling():
            return function(*tensors)
        if not compiles() or first.numel() < SMALL:
            _Work.done += first.numel()
            return function(*tensors)
        try:
            if not compiled:
                _log.info("AdamW on CPU tensors is compiled: some seconds, once (%s)", function.__name__)
                compiled.append(torch.compile(function, dynamic=True))
            return compiled[0](*tensors)
        except Exception as error:  # whatever a compiler throws, before anything has been written
            _Work.refused = True
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            _log.warning("torch.compile failed: AdamW on CPU tensors runs several times slower. %s", reason)
            return function(*tensors)

    return run
