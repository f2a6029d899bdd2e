"""Inputs for the kernels, and how far two results are apart."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from adamw_triton_kernels import Hyper, Layout, hyper_table, reference
from torch import Tensor

NUMELS = (1, 31, 127, 128, 129, 2047, 2048, 4097, 9000)
FIRSTS = (0, 0, 2**31 - 64, 0, 2**33 + 256, 0, 128, 0, 0)
"""Some tensors are pieces of larger parameters."""
GUARD = 64
"""Elements before and after each array, which nobody may touch."""


@dataclass(frozen=True)
class Kernel:
    """A kernel and the variant of it."""

    name: str
    update: str
    block: int = 0
    amsgrad: bool = False

    @property
    def alignment(self) -> int:
        return self.block or 32

    def arrays(self, numel: int) -> dict[str, tuple[int, torch.dtype]]:
        """Entries and dtype of each state array."""
        if self.block:
            blocks = numel // self.block
            return {
                "exp_avg_codes": (numel, torch.int8),
                "exp_avg_scales": (blocks, torch.bfloat16),
                "exp_avg_sq_codes": (numel, torch.uint8),
                "exp_avg_sq_scales": (blocks, torch.bfloat16),
            }
        names = ("exp_avg", "exp_avg_sq") + (("max_exp_avg_sq",) if self.amsgrad else ())
        return {name: (numel, torch.float32) for name in names}


KERNELS = {
    kernel.name: kernel
    for kernel in (
        Kernel("32bit", "adamw_32bit"),
        Kernel("32bit amsgrad", "adamw_32bit", amsgrad=True),
        Kernel("8bit 128", "adamw_8bit", block=128),
        Kernel("8bit 256", "adamw_8bit", block=256),
    )
}


def guarded(numel: int, dtype: torch.dtype, shift: int = 0) -> tuple[Tensor, Tensor]:
    """An array of zeros that begins ``shift`` entries after a multiple of 64 bytes, and all its memory."""
    size = dtype.itemsize
    memory = torch.full(((numel + 2 * GUARD + 8) * size,), 0xAB, dtype=torch.uint8)
    begin = GUARD * size + shift * size
    begin += -(memory.data_ptr() + GUARD * size) % 64
    array = memory[begin : begin + numel * size].view(dtype)
    array.zero_()
    return array, memory


@dataclass
class Problem:
    """Parameters, gradients and state, each with guards around it."""

    kernel: Kernel
    params: list[Tensor]
    grads: list[Tensor]
    state: dict[str, Tensor]
    layout: Layout
    hyper: Tensor
    memories: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        kernel: Kernel,
        param_dtype: torch.dtype,
        grad_dtype: torch.dtype,
        hyper: Tensor,
        numels: Sequence[int] = NUMELS,
        aligned: bool = True,
        firsts: Sequence[int] | None = None,
        rows: int = 2,
    ) -> Problem:
        """All zeros."""
        params, grads, memories = [], [], []
        for index, n in enumerate(numels):
            for dtype, shift, arrays in ((param_dtype, 1, params), (grad_dtype, 3, grads)):
                # Of misaligned ones, some are misaligned by other distances, and some are not.
                array, memory = guarded(n, dtype, 0 if aligned or index % 3 == 2 else shift * (index % 3 + 1))
                arrays.append(array)
                memories.append(memory)
        offsets = [0]
        for n in numels:
            offsets.append(offsets[-1] + -(-n // kernel.alignment) * kernel.alignment)
        state = {}
        for name, (entries, dtype) in kernel.arrays(offsets.pop()).items():
            state[name], memory = guarded(entries, dtype)
            memories.append(memory)
        layout = Layout(
            tuple(numels),
            tuple(offsets),
            tuple(firsts or FIRSTS[: len(numels)]),
            tuple(i % rows for i in range(len(numels))),
        )
        return cls(kernel, params, grads, state, layout, hyper, memories)

    def copy(self, max_chunks: int | None = None) -> Problem:
        """With the same addresses modulo 64."""
        by_memory = {}
        for memory in self.memories:
            other = torch.empty(memory.numel() + 64, dtype=torch.uint8)
            shift = (memory.data_ptr() - other.data_ptr()) % 64
            by_memory[memory.data_ptr()] = other[shift : shift + memory.numel()].copy_(memory)

        def moved(t: Tensor) -> Tensor:
            owner = next(m for m in self.memories if m.data_ptr() <= t.data_ptr() < m.data_ptr() + m.numel())
            begin = t.data_ptr() - owner.data_ptr()
            return by_memory[owner.data_ptr()][begin : begin + t.numel() * t.element_size()].view(t.dtype)

        layout = Layout(
            self.layout.numels,
            self.layout.offsets,
            self.layout.firsts,
            self.layout.rows,
            max_chunks or self.layout.max_chunks,
        )
        params, grads = list(map(moved, self.params)), list(map(moved, self.grads))
        state = {name: moved(array) for name, array in self.state.items()}
        return Problem(self.kernel, params, grads, state, layout, self.hyper, list(by_memory.values()))

    def step_in_torch(self) -> None:
        getattr(reference, self.kernel.update)(self.params, self.grads, self.state, self.layout, self.hyper)

    def step_compiled(self) -> None:
        """Within `run_compiled.compiled`."""
        module = importlib.import_module(f"adamw_triton_kernels.{self.kernel.update}")
        getattr(module, self.kernel.update)(self.params, self.grads, self.state, self.layout, self.hyper)

    def bits(self) -> list[Tensor]:
        """Everything, guards too."""
        return self.memories

    def untouched(self, before: Problem) -> bool:
        """Whether nothing has changed but parameters and state of these tensors: not guards, gradients, or gaps."""
        ours, theirs = self.copy(), before.copy()
        for problem in (ours, theirs):
            for param in problem.params:
                param.zero_()
            for name, array in problem.state.items():
                per = problem.layout_per(name)
                for offset, n in zip(problem.layout.offsets, problem.layout.numels, strict=True):
                    array[offset // per : -(-(offset + n) // per)] = 0
        return all(map(torch.equal, ours.bits(), theirs.bits()))

    def layout_per(self, name: str) -> int:
        """Elements that share an entry of the array."""
        return self.kernel.block if name.endswith("scales") else 1

    def of_tensors(self, flat: Tensor, per: int = 1) -> Tensor:
        """The entries of an array that belong to tensors, one after another."""
        places = zip(self.layout.offsets, self.layout.numels, strict=True)
        return torch.cat([flat[offset // per : -(-(offset + n) // per)] for offset, n in places])


def hypers(step: int, eps: Sequence[float] = (1e-8, 1e-6)) -> Tensor:
    return hyper_table(
        [
            Hyper.at(step, lr=1e-2, betas=(0.9, 0.999), eps=eps[0], weight_decay=0.01),
            Hyper.at(step, lr=3e-2, betas=(0.8, 0.95), eps=eps[1], weight_decay=0.1, grad_scale=-0.5),
        ]
    )


def ordinary(
    kernel: Kernel,
    param_dtype: torch.dtype,
    grad_dtype: torch.dtype,
    aligned: bool,
    numels: Sequence[int] = NUMELS,
) -> Problem:
    """Weights of a normal distribution, and no state yet."""
    problem = Problem.of(kernel, param_dtype, grad_dtype, hypers(1), numels, aligned)
    generator = torch.Generator().manual_seed(1)
    for param in problem.params:
        param.copy_(torch.randn(param.shape, generator=generator))
    return problem


def set_gradients(problem: Problem, step: int) -> None:
    """Of many magnitudes, with zeros and dead blocks."""
    generator = torch.Generator().manual_seed(100 + step)
    for grad in problem.grads:
        g = torch.randn(grad.shape, generator=generator) * 10 ** (
            -3 * torch.rand(grad.shape, generator=generator)
        )
        g[torch.rand(g.shape, generator=generator) < 0.05] = 0
        g[1024:1280] = 0
        grad.copy_(g)
    problem.hyper = hypers(step)


EXTREMES = (0.0, -0.0, 1e-45, -1e-40, 1.1e-38, 1.3e-38, 1e-30, -1e-20, 1e-12, 1e-8, -1.0, 300.0, 1e10, 1e18,
            -1e19, 1e30, 3e38, float("inf"), float("-inf"), float("nan"))  # fmt: skip
FEW = (0.0, -1.0, 1e-40, 1e30, float("inf"), float("nan"))
VARIANCES = sorted({abs(x) for x in EXTREMES if x == x})


def adversarial_32bit(
    kernel: Kernel, param_dtype: torch.dtype, grad_dtype: torch.dtype, eps: float, step: int
) -> Problem:
    """Every combination of extreme weights, gradients and moments, an element each."""
    table = torch.tensor(list(itertools.product(FEW, EXTREMES, (0.0, -1e-40, 1e-21, 1.0, 1e30), VARIANCES)))
    problem = Problem.of(kernel, param_dtype, grad_dtype, hypers(step, (eps, eps)), (len(table),), rows=1)
    p, g, m, v = table.unbind(1)
    problem.params[0].copy_(p)
    problem.grads[0].copy_(g)
    problem.state["exp_avg"][: len(p)] = m
    problem.state["exp_avg_sq"][: len(p)] = v
    if kernel.amsgrad:
        problem.state["max_exp_avg_sq"][: len(p)] = v[
            torch.randperm(len(v), generator=torch.Generator().manual_seed(3))
        ]
    return problem


V_SCALES = (0.0, 9e-19, 1.2e-18, 1e-9, 1.0, 1e10, 1.7e19)
M_SCALES = (0.0, 1e-12, 1.0, 1e15)


def adversarial_8bit(
    kernel: Kernel, param_dtype: torch.dtype, grad_dtype: torch.dtype, eps: float, step: int
) -> Problem:
    """Every combination of extreme gradients and scales, a block each; a last block that is not whole."""
    block = kernel.block
    generator = torch.Generator().manual_seed(2)
    patterns = [torch.full((block,), x) for x in EXTREMES]
    for huge in (1e30, 3e38, float("inf"), float("nan"), 1.0, 1e-30):
        pattern = torch.randn(block, generator=generator) * 1e-10
        pattern[block // 3] = huge
        patterns.append(pattern)
    patterns.append(
        torch.randn(block, generator=generator) * 10 ** (40 * torch.rand(block, generator=generator) - 20)
    )
    cases = list(itertools.product(patterns, V_SCALES, M_SCALES))
    numel = len(cases) * block - 5
    problem = Problem.of(kernel, param_dtype, grad_dtype, hypers(step, (eps, eps)), (numel,), rows=1)
    problem.params[0].copy_(torch.randn(numel, generator=generator))
    problem.grads[0].copy_(torch.cat([pattern for pattern, _, _ in cases])[:numel])
    state = problem.state
    used = slice(0, len(cases))
    state["exp_avg_sq_scales"][used] = torch.tensor([v for _, v, _ in cases]).bfloat16()
    state["exp_avg_scales"][used] = torch.tensor([m for _, _, m in cases]).bfloat16()
    state["exp_avg_sq_codes"][:numel] = torch.randint(0, 256, (numel,), generator=generator).to(torch.uint8)
    state["exp_avg_codes"][:numel] = torch.randint(-127, 128, (numel,), generator=generator).to(torch.int8)
    return problem


def distance(actual: Tensor, expected: Tensor, *took_part: Tensor) -> Tensor:
    """In ulps of the largest magnitude that took part; 0 where both are the same or both NaN, infinite where one is
    not finite and the other differs from it."""
    dtype = actual.dtype
    size = torch.stack([t.float().abs().nan_to_num(0.0, 0.0, 0.0) for t in (expected, *took_part)]).amax(0)
    exponent = torch.frexp(size).exponent.double()
    ulp = torch.exp2(exponent - 1) * torch.finfo(dtype).eps
    ulp = ulp.clamp(min=torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)
    apart = (actual.double() - expected.double()).abs() / ulp
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    apart[~same & ~(actual.isfinite() & expected.isfinite())] = float("inf")
    apart[same] = 0
    return apart
