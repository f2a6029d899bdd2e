"""Compile a kernel for a GPU that is not here: whether Triton and its compilers work at all."""

from __future__ import annotations

import importlib

import torch
from triton.backends.compiler import GPUTarget

AMPERE = GPUTarget("cuda", 80, 32)


def compile_ahead(name: str, target: GPUTarget = AMPERE) -> None:
    """The update ``name`` ("adamw_32bit", "adamw_8bit") of bf16 parameters, down to machine code."""
    module = importlib.import_module(f"adamw_triton_kernels.{name}")
    module.build(torch.bfloat16, torch.bfloat16).compiled(target)
