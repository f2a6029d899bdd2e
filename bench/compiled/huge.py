"""Tensors of more than 2**31 elements and states beyond 2**31 bytes, whose pages are never touched but where the CTAs
that run here work: the 64-bit address arithmetic of the compiled kernels.

    python check_huge.py [--targets 80 90]
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import Tensor

from adamw_triton_kernels import Layout, adamw_8bit, adamw_32bit, reference
from adamw_triton_kernels.launch import chunk_table
from bench.compiled.problems import KERNELS, Kernel, distance, hypers
from bench.compiled.session import compiled

NUMEL = 2**32 + 4096 + 77
"""Elements of one tensor: its number overflows 32 bits, signed and unsigned."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def untouched(numel: int, dtype: torch.dtype) -> Tensor:
    """Zeros, in pages that the system makes when they are first written."""
    memory = np.zeros(numel * dtype.itemsize + 64, dtype=np.uint8)  # calloc: no page is there yet
    begin = -memory.ctypes.data % 64
    return torch.from_numpy(memory)[begin : begin + numel * dtype.itemsize].view(dtype)


def check(
    capability: int, kernel: Kernel, param_dtype: torch.dtype, grad_dtype: torch.dtype, numel: int
) -> list[str]:
    """The first and last chunks, and those around 2**31 and 2**32, against the specification on copies of them."""
    padded = -(-numel // 256) * 256
    small = 300  # a tensor before it, so that offsets are no multiples of a tile
    start = -(-small // kernel.alignment) * kernel.alignment
    param, grad = untouched(numel, param_dtype), untouched(numel, grad_dtype)
    before_it = [torch.randn(small).to(dtype) for dtype in (param_dtype, grad_dtype)]
    state = {
        name: untouched(entries, dtype)
        for name, (entries, dtype) in kernel.arrays(padded + start + 256).items()
    }
    module = adamw_8bit if kernel.block else adamw_32bit
    tile = module.TILE
    layout = Layout((small, numel), (0, start), (0, 2**33), (0, 1))
    chunks, size = chunk_table(layout.numels, tile, layout.max_chunks)
    wanted = sorted({1, 2**31 // size + 1, 2**32 // size + 1 if numel > 2**32 else 1, len(chunks) - 1})
    generator = torch.Generator().manual_seed(1)
    pieces = []
    for chunk in wanted:
        begin = int(chunks[chunk, 1]) * size
        # A part of the chunk would do, but a CTA works through all of it.
        end = min(begin + size, numel)
        at = slice(begin, end)
        param[at] = torch.randn(end - begin, generator=generator).to(param_dtype)
        grad[at] = torch.randn(end - begin, generator=generator).to(grad_dtype)
        pieces.append((at, param[at].clone(), grad[at].clone()))
    hyper = hypers(1)
    name = f"adamw_{'8bit' if kernel.block else '32bit'}"
    with compiled(capability, only=[0, *wanted]):
        getattr(module, name)([before_it[0], param], [before_it[1], grad], state, layout, hyper)
    found = []
    for at, p, g in pieces:
        old, n = p.clone(), p.numel()
        mine = {
            key: torch.zeros(entries, dtype=dtype)
            for key, (entries, dtype) in kernel.arrays(-(-n // 256) * 256).items()
        }
        alone = Layout((n,), (0,), (2**33 + at.start,), (1,))
        getattr(reference, name)([p], [g], mine, alone, hyper)
        change = 2 * (p.float() - old.float())
        apart = float(distance(param[at], p, old, change).max())
        if apart > (8 if param_dtype == torch.float32 else 1):
            found.append(f"weights {at.start}...{at.stop}: {apart} ulps")
        found += _different_state(kernel, state, mine, start, at)
    return found


def _different_state(
    kernel: Kernel, state: dict[str, Tensor], mine: dict[str, Tensor], start: int, at: slice
) -> list[str]:
    """Codes more than 1 apart, scales more than one bf16 number, fp32 more than 4 ulps."""
    differ = {}
    for key, array in mine.items():
        per = kernel.block if key.endswith("scales") else 1
        first, last = (start + at.start) // per, -(-(start + at.stop) // per)
        a, b = state[key][first:last], array[: last - first]
        if key.endswith("codes"):
            differ[key] = (a.float() - b.float()).abs() > 1
        else:
            differ[key] = distance(a, b) > (1 if kernel.block else 4)
    if kernel.block:  # m is stored relative to the decoded v: only blocks with the same v can be compared
        v = differ["exp_avg_sq_codes"]
        same = ~torch.nn.functional.pad(v, (0, -len(v) % kernel.block)).view(-1, kernel.block).any(1)
        differ["exp_avg_scales"] &= same
        differ["exp_avg_codes"] &= same.repeat_interleave(kernel.block)[: len(v)]
    return [
        f"{key} of {at.start}...{at.stop}: {int(bad.sum())} differ"
        for key, bad in differ.items()
        if bad.any()
    ]


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--targets", type=int, nargs="+", default=[75, 80, 90, 100])
    given = arguments.parse_args()
    for capability in given.targets:
        for name, kernel in KERNELS.items():
            found = check(capability, kernel, torch.bfloat16, torch.bfloat16, NUMEL)
            print(f"sm_{capability} {name}: {'; '.join(found) or 'as the specification'}", flush=True)


if __name__ == "__main__":
    main()
