"""What the kernels are given: parameters, gradients and state, of ordinary numbers, with guards around."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from adamw_triton.state.formats import KEPT
from adamw_triton_kernels import Hyper, Layout, Update, hyper_table, reference
from adamw_triton_kernels.statistics import WIDTH
from adamw_triton_kernels.weights import read, write
from adamw_triton_kernels.work import MASTER, NEAREST, REMAINDER, STOCHASTIC
from bench.compiled.session import Session, compiled, in_triton, pieces, whole
from bench.ptx.memory import Range

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
    weights: str = NEAREST

    @property
    def params(self) -> tuple[str, ...]:
        """Dtypes of parameters that it has, by name."""
        return _PARAMS[self.weights]

    @property
    def exact(self) -> bool:
        """Whether a state array goes with the weights."""
        return self.weights in KEPT

    @property
    def module(self) -> ModuleType:
        return importlib.import_module(f"adamw_triton_kernels.{self.update}")

    @property
    def tile(self) -> int:
        """Elements of a whole tile."""
        return int(self.module.SHAPES[self.block][1] if self.block else self.module.TILE)

    @property
    def alignment(self) -> int:
        """Elements, of a tensor's place in the state arrays."""
        return self.block or 32

    def arrays(self, numel: int) -> dict[str, tuple[int, torch.dtype]]:
        """Entries and dtype of each state array."""
        kept = {self.weights: (numel, KEPT[self.weights].dtype)} if self.exact else {}
        return self._moments(numel) | kept

    @property
    def moments(self) -> tuple[str, ...]:
        """Names of the state arrays without that of the weights."""
        return tuple(self._moments(0))

    def _moments(self, numel: int) -> dict[str, tuple[int, torch.dtype]]:
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


_PARAMS = {
    NEAREST: ("fp32", "fp16", "bf16"),
    STOCHASTIC: ("bf16",),
    REMAINDER: ("bf16",),
    MASTER: ("fp16",),
}
_NEAREST = (
    Kernel("32bit", "adamw_32bit"),
    Kernel("32bit amsgrad", "adamw_32bit", amsgrad=True),
    Kernel("8bit 128", "adamw_8bit", block=128),
    Kernel("8bit 256", "adamw_8bit", block=256),
)
KERNELS = {kernel.name: kernel for kernel in _NEAREST} | {
    (name := f"{kernel.name} {weights}"): replace(kernel, name=name, weights=weights)
    for kernel in _NEAREST
    for weights in (STOCHASTIC, REMAINDER, MASTER)
}


def _guarded(numel: int, dtype: torch.dtype, shift: int = 0) -> tuple[Tensor, Tensor]:
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
    factors: Tensor | None = None
    sums: Tensor | None = None
    """What statistics are added to; None: there are none."""

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
        """All zeros; with ``rows`` rows of hyperparameters, which take turns."""
        params, grads, memories = [], [], []
        for index, n in enumerate(numels):
            for dtype, shift, arrays in ((param_dtype, 1, params), (grad_dtype, 3, grads)):
                # Of misaligned ones, some are misaligned by other distances, and some are not.
                array, memory = _guarded(
                    n, dtype, 0 if aligned or index % 3 == 2 else shift * (index % 3 + 1)
                )
                arrays.append(array)
                memories.append(memory)
        offsets = [0]
        for n in numels:
            offsets.append(offsets[-1] + -(-n // kernel.alignment) * kernel.alignment)
        state = {}
        for name, (entries, dtype) in kernel.arrays(offsets.pop()).items():
            state[name], memory = _guarded(entries, dtype)
            memories.append(memory)
        layout = Layout(
            tuple(numels),
            tuple(offsets),
            tuple(firsts or FIRSTS[: len(numels)]),
            tuple(i % rows for i in range(len(numels))),
            sums=tuple(reversed(range(len(numels)))),
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

        layout = replace(self.layout, max_chunks=max_chunks or self.layout.max_chunks, tables={})
        params, grads = list(map(moved, self.params)), list(map(moved, self.grads))
        state = {name: moved(array) for name, array in self.state.items()}
        memories = list(by_memory.values())
        sums = None if self.sums is None else self.sums.clone()
        return Problem(self.kernel, params, grads, state, layout, self.hyper, memories, self.factors, sums)

    def tell(self) -> Problem:
        """From now on it leaves statistics."""
        self.sums = torch.zeros(len(self.params), WIDTH)
        return self

    def step_in_torch(self) -> None:
        self._step(getattr(reference, self.kernel.update))

    def _step(self, update: Update) -> None:
        weights = self.kernel.weights
        update(self.params, self.grads, self.state, self.layout, self.hyper, weights, self.factors, self.sums)

    def step_compiled(self, capability: int, **settings: Any) -> Session:
        """By the kernel that is compiled for sm_``capability``.

        Args:
            settings: of the `Session` that it runs in.

        Raises:
            AccessError, PtxError, TypeError: see `Session.run`.
        """
        with compiled(capability, **{"reach": self.reach(), **settings}) as session:
            self._step(in_triton(self.kernel.update, self.params[0].device))
        return session

    def reach(self) -> list[Range]:
        """What a step may touch, whatever its tables say."""
        layout = self.layout
        ranges = [whole(param, f"param {i}") for i, param in enumerate(self.params)]
        ranges += [whole(grad, f"grad {i}", writable=False) for i, grad in enumerate(self.grads)]
        for name, array in self.state.items():
            names = [f"{name} of tensor {i}" for i in range(len(layout.numels))]
            places = list(zip(layout.offsets, layout.numels, names, strict=True))
            ranges += pieces(array, self.per(name), places)
        return ranges

    def same_bits(self, other: Problem) -> bool:
        """Of everything, guards too."""
        return all(map(torch.equal, self.memories, other.memories))

    def untouched(self, before: Problem) -> bool:
        """Whether only parameters and state of these tensors have changed, not guards, gradients or gaps."""
        ours, theirs = self.copy(), before.copy()
        for problem in (ours, theirs):
            for param in problem.params:
                param.zero_()
            for name, array in problem.state.items():
                per = problem.per(name)
                for offset, n in zip(problem.layout.offsets, problem.layout.numels, strict=True):
                    array[offset // per : -(-(offset + n) // per)] = 0
        return ours.same_bits(theirs)

    def per(self, name: str) -> int:
        """Elements that share an entry of the array."""
        return self.kernel.block if name.endswith("scales") else 1

    def weights(self) -> Tensor:
        """Of all tensors, one after another: where they are exact, in fp32."""
        params = torch.cat(self.params)
        if not self.kernel.exact:
            return params
        return read(params, [self.of_tensors(self.state[self.kernel.weights])], self.kernel.weights)

    def settled(self) -> bool:
        """Whether weights are the rounding of what is kept exactly: read and written, all stays as it is."""
        if not self.kernel.exact:
            return True
        before = torch.cat(self.params), self.of_tensors(self.state[self.kernel.weights])
        p, kept = map(torch.empty_like, before)
        write(self.weights(), p, [kept], self.kernel.weights)
        same = ((a == b) | (a.isnan() & b.isnan()) for a, b in zip((p, kept), before, strict=True))
        return all(bool(each.all()) for each in same)

    def of_tensors(self, flat: Tensor, per: int = 1) -> Tensor:
        """The entries of an array that belong to tensors, one after another."""
        places = zip(self.layout.offsets, self.layout.numels, strict=True)
        return torch.cat([flat[offset // per : -(-(offset + n) // per)] for offset, n in places])


def hypers(step: int, eps: Sequence[float] = (1e-8, 1e-6)) -> Tensor:
    betas = (0.0, 0.3) if step == 2 else (0.8, 0.95)  # arithmetic of their own begins below a half, and at 0
    return hyper_table(
        [
            Hyper.at(step, lr=1e-2, betas=(0.9, 0.999), eps=eps[0], weight_decay=0.01),
            Hyper.at(step, lr=3e-2, betas=betas, eps=eps[1], weight_decay=0.1, grad_scale=-0.5),
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
    if step == 2:  # each tensor has a factor of its own
        count = len(problem.params)
        problem.factors = 0.5 + torch.rand(count, generator=generator)
        factors = tuple(reversed(range(count)))
        problem.layout = replace(problem.layout, factors=factors, tables={})
    if step == 2 and problem.kernel.block:
        # Half of the blocks are far below their scale, and have to get another one.
        codes = problem.state["exp_avg_sq_codes"].view(-1, problem.kernel.block)
        codes[::2] = codes[::2].clamp(max=150)
