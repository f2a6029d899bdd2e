"""The kernels: AdamW on many tensors at once, in Triton and in plain torch.

This package depends on torch and triton alone and knows nothing of parameter groups, paging or
checkpoints. ``reference`` holds every update in plain torch, which is the specification; each
Triton module has the function of the same name and signature. Triton is imported with the first
module that needs it, so importing this package is cheap.
"""

from __future__ import annotations

import importlib
import logging
import os

import torch

from adamw_triton_kernels import reference
from adamw_triton_kernels.work import MAX_CHUNKS, Arrays, Call, Hyper, Layout, Update, hyper_table

__all__ = ["MAX_CHUNKS", "Arrays", "Call", "Hyper", "Layout", "Update", "hyper_table", "update_for"]

_log = logging.getLogger("adamw_triton")
_told: set[str] = set()


def update_for(name: str, device: torch.device) -> Update:
    """The update ``name`` ("adamw_32bit", "adamw_8bit") for tensors on ``device``.

    Triton on CUDA and ROCm devices, and on the CPU under ``TRITON_INTERPRET=1``; plain torch
    elsewhere.
    """
    in_torch: Update = getattr(reference, name)
    interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interpreted:
        return in_torch
    try:
        module = importlib.import_module(f"adamw_triton_kernels.{name}")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        if device.type not in _told:
            _told.add(device.type)
            _log.warning("triton is not installed: AdamW on %s runs in plain torch, slowly", device.type)
        return in_torch
    in_triton: Update = getattr(module, name)
    return in_triton
