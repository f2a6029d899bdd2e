"""Tensors of more than 2**32 elements, whose memory is never touched but where the programs that run here
work: the 64-bit arithmetic of addresses in the compiled kernels."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from adamw_triton_kernels import Layout
from adamw_triton_kernels.launch import chunk_table
from bench.compiled.comparison import distance
from bench.compiled.problems import Kernel, Problem, hypers

NUMEL = 2**32 + 4096 + 77
"""Elements of one tensor: its number overflows 32 bits, signed and unsigned."""
BEFORE = 300
"""Elements of a tensor before it: its place is no multiple of a tile."""


def check_huge(capability: int, kernel: Kernel, param: torch.dtype, grad: torch.dtype) -> list[str]:
    """What differs of the first and last chunks, and those around 2**31 and 2**32, from the specification on
    copies of them.

    Raises:
        MemoryError: the system does not give out so much memory that is not there.
    """
    start = -(-BEFORE // kernel.alignment) * kernel.alignment
    p, g = _untouched(NUMEL, param), _untouched(NUMEL, grad)
    small = [torch.randn(BEFORE).to(dtype) for dtype in (param, grad)]
    entries = -(-(start + NUMEL) // 256) * 256
    state = {name: _untouched(count, dtype) for name, (count, dtype) in kernel.arrays(entries).items()}
    layout = Layout((BEFORE, NUMEL), (0, start), (0, 2**33), (0, 1))
    problem = Problem(kernel, [small[0], p], [small[1], g], state, layout, hypers(1))
    chunks, size = chunk_table(layout.numels, kernel.tile, layout.max_chunks)
    wanted = sorted({1, 2**31 // size + 1, 2**32 // size + 1, len(chunks) - 1})
    generator = torch.Generator().manual_seed(1)
    given = []
    for chunk in wanted:
        begin = int(chunks[chunk, 1]) * size
        at = slice(begin, min(begin + size, NUMEL))
        for array in (p, g):
            array[at] = torch.randn(at.stop - at.start, generator=generator).to(array.dtype)
        given.append((at, p[at].clone(), g[at].clone()))
    problem.step_compiled(capability, only=[0, *wanted])
    return [line for at, *numbers in given for line in _different(problem, at, *numbers)]


def _untouched(numel: int, dtype: torch.dtype) -> Tensor:
    """Zeros, in pages that the system makes when they are first written."""
    memory = np.zeros(numel * dtype.itemsize + 64, dtype=np.uint8)  # calloc: no page is there yet
    begin = -memory.ctypes.data % 64
    return torch.from_numpy(memory)[begin : begin + numel * dtype.itemsize].view(dtype)


def _different(problem: Problem, at: slice, old: Tensor, g: Tensor) -> list[str]:
    """These elements of the large tensor, and the same numbers as a tensor of their own."""
    kernel, n = problem.kernel, len(old)
    expected = {
        key: torch.zeros(entries, dtype=dtype)
        for key, (entries, dtype) in kernel.arrays(-(-n // 256) * 256).items()
    }
    layout = Layout((n,), (0,), (problem.layout.firsts[1] + at.start,), (1,))
    alone = Problem(kernel, [old.clone()], [g], expected, layout, problem.hyper)
    alone.step_in_torch()
    begin = problem.layout.offsets[1] + at.start
    there = Layout((n,), (begin,), (0,), (1,))
    p = Problem(kernel, [problem.params[1][at]], [g], problem.state, there, problem.hyper).weights()
    q = alone.weights()
    apart = float(distance(p, q, old, 2 * (q.float() - old.float())).max())
    differ = {"weights": torch.tensor([apart > (8 if p.dtype == torch.float32 else 1)])}
    for key in kernel.moments:
        array = expected[key]
        begin, end = (-(-(problem.layout.offsets[1] + i) // problem.per(key)) for i in (at.start, at.stop))
        a, b = problem.state[key][begin:end], array[: end - begin]
        if key.endswith("codes"):
            differ[key] = (a.float() - b.float()).abs() > 1
        else:
            differ[key] = distance(a, b) > (1 if kernel.block else 4)
    if kernel.block:  # m is stored relative to the decoded v: only blocks with the same v can be compared
        v = differ["exp_avg_sq_codes"]
        same = ~torch.nn.functional.pad(v, (0, -len(v) % kernel.block)).view(-1, kernel.block).any(1)
        differ["exp_avg_scales"] &= same
        differ["exp_avg_codes"] &= same.repeat_interleave(kernel.block)[: len(v)]
    where = f"of {at.start}...{at.stop}"
    return [f"{int(bad.sum())} {key} {where} differ" for key, bad in differ.items() if bad.any()]
