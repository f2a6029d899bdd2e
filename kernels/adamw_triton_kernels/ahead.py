"""Compile a kernel for a GPU that is not here: whether Triton and its compilers work at all."""

from __future__ import annotations

import importlib

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

AMPERE = GPUTarget("cuda", 80, 32)


def compile_ahead(name: str, target: GPUTarget = AMPERE) -> None:
    """The update ``name`` ("adamw_32bit", "adamw_8bit") of bf16 parameters, down to machine code."""
    module = importlib.import_module(f"adamw_triton_kernels.{name}")
    build = module.build(torch.bfloat16, torch.bfloat16)
    source = ASTSource(build.fn, build.signature, build.constexprs, build.attrs)
    triton.compile(source, target=target, options=build.options(target.warp_size))
