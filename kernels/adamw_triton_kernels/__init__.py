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
from types import ModuleType

import torch

from adamw_triton_kernels import norms, reference
from adamw_triton_kernels.work import MAX_CHUNKS, Arrays, Call, Hyper, Layout, Update, Verdict, hyper_table

__all__ = [
    "MAX_CHUNKS",
    "Arrays",
    "Call",
    "Hyper",
    "Layout",
    "Update",
    "Verdict",
    "hyper_table",
    "norms_for",
    "update_for",
]

_log = logging.getLogger("adamw_triton")
_told: set[str] = set()


def update_for(name: str, device: torch.device) -> Update:
    """The update ``name`` ("adamw_32bit", "adamw_8bit") for tensors on ``device``.

    Triton on CUDA and ROCm devices, and on the CPU under ``TRITON_INTERPRET=1``; plain torch
    elsewhere.
    """
    update: Update = getattr(_in_triton(name, device) or reference, name)
    return update


def norms_for(device: torch.device) -> ModuleType:
    """``norms``, or its like in Triton: chosen as updates are."""
    return _in_triton("norm_kernels", device) or norms


def _in_triton(name: str, device: torch.device) -> ModuleType | None:
    """A module of kernels; None: plain torch is to do its work."""
    interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interpreted:
        return None
    try:
        return importlib.import_module(f"adamw_triton_kernels.{name}")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        if device.type not in _told:
            _told.add(device.type)
            _log.warning("triton is not installed: AdamW on %s runs in plain torch, slowly", device.type)
        return None
