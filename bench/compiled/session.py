"""CPU tensors stepped by compiled kernels, and what was seen in it.

    from bench.compiled.session import compiled

    with compiled(90, races=True) as session:  # PTX of sm_90
        optimizer.step()
    print(session.conflicts())

What an optimizer takes at its first step, it keeps: that step has to be within. Triton's interpreter has to
be off: with TRITON_INTERPRET=1 ``@triton.jit`` makes something that cannot be compiled.
"""

from __future__ import annotations

import contextlib
import importlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import adamw_triton_kernels
from adamw_triton_kernels import Update, launch
from bench.compiled.driver import Launcher, running
from bench.ptx.emulator import Emulator
from bench.ptx.floats import Approximation
from bench.ptx.memory import GlobalMemory, Range, SharedMemory
from bench.ptx.parser import parse
from bench.ptx.program import PtxError

TABLES = (
    "addresses",
    "tensors",
    "numels",
    "chunks",
    "hyper",
    "factors",
    "loss_scale",
    "scalars",
    "ranges",
    "rows",
)
"""What the launcher makes for a launch, and kernels read."""
LEFT = ("left", "sums")
"""What they write for statistics; every other pointer is an array of the state."""


@dataclass
class Session:
    """How launches run, and what was seen in them."""

    capability: int
    """90: sm_90."""
    races: bool = False
    """Record them: see `conflicts`."""
    sectors: bool = False
    """Count what accesses cost: `bench.ptx.records.Traffic` of each of ``memories``."""
    noise: float | str = 0.0
    """Of the approximate instructions, see `Approximation`."""
    flush: bool = True
    """False: as if no instruction had .ftz."""
    together: int = 32
    """CTAs that run at the same time."""
    backwards: bool = False
    """CTAs in the reverse order."""
    only: Sequence[int] | None = None
    """Numbers of the CTAs that run; None: all."""
    reach: Sequence[Range] | None = None
    """All that may be touched, but for the launch's tables; None: what the tables say."""
    edit: Callable[[str], str] | None = None
    """Changes the kernel's PTX before it runs: to plant faults."""
    arguments: Callable[[list[Any]], list[Any]] | None = None
    """Changes the arguments of a launch: to plant faults."""
    launches: int = 0
    kernels: list[Launcher] = field(default_factory=list)
    """Those that were launched, in the order of their first launches."""
    executed: Counter[str] = field(default_factory=Counter)
    """Times that threads have executed each opcode."""
    memories: list[GlobalMemory] = field(default_factory=list)
    shared: list[SharedMemory] = field(default_factory=list)
    """Of launches with races recorded or accesses counted."""

    def run(self, kernel: Launcher, programs: int, arguments: list[Any]) -> None:
        """One launch.

        Raises:
            AccessError: memory outside of what it may touch, or misaligned.
            PtxError: what is not modelled, or what no kernel may do.
            TypeError: arguments of another number or type.
        """
        if self.arguments is not None:
            arguments = self.arguments(arguments)
        numbers = kernel.numbers(arguments)
        if kernel not in self.kernels:
            self.kernels.append(kernel)
        emulator = self._emulator(kernel.ptx)
        emulator.executed.clear()  # of a launch that was stopped
        given = dict(zip(kernel.signature, arguments, strict=True))
        tables = [whole(given[name], name, writable=False) for name in TABLES if name in given]
        tables += [whole(given[name], name) for name in LEFT if isinstance(given.get(name), torch.Tensor)]
        reach = reachable(given, kernel.constants) if self.reach is None else self.reach
        memory = GlobalMemory([*tables, *reach], self.races, self.sectors)
        order = range(programs - 1, -1, -1) if self.backwards else self.only
        numbers = numbers[: len(emulator.program.parameters)]
        shared = emulator.launch(programs, numbers, memory, kernel.shared_bytes, self.together, order)
        self.launches += 1
        self.executed.update(emulator.executed)
        emulator.executed.clear()
        if self.races or self.sectors:
            self.memories.append(memory)
            self.shared += shared

    def _emulator(self, ptx: str) -> Emulator:
        text = ptx if self.edit is None else self.edit(ptx)
        key = text, self.noise, self.flush
        if key not in _emulators:
            _emulators[key] = Emulator(parse(text), Approximation(self.noise, self.flush))
        return _emulators[key]

    def conflicts(self) -> dict[str, str]:
        """Kinds of races seen, and reads of shared memory that nobody had written, each with an example."""
        found: dict[str, str] = {}
        for memory in (*self.memories, *self.shared):
            if memory.races:
                for kind, count in memory.races.conflicts.items():
                    where = "global" if isinstance(memory, GlobalMemory) else "shared"
                    example = f"{count} bytes, e.g. {memory.races.examples[kind]}"
                    found.setdefault(f"{where}: {kind}", example)
        for shared in self.shared:
            for instruction in shared.unwritten:
                found.setdefault("shared: read before written", instruction)
        return found


_emulators: dict[tuple[str, float | str, bool], Emulator] = {}


def reachable(given: dict[str, Any], constants: dict[str, Any]) -> list[Range]:
    """What a launch may touch, by its own tables: the tensors, and of the state their elements, not the gaps.

    Args:
        given: arguments by name.
        constants: compile-time arguments by name.
    """
    if "tensors" not in given:
        return _of_norms(given, constants)
    tensors, addresses = given["tensors"].tolist(), given["addresses"].tolist()
    n = int(given["n_tensors"])
    param, grad = (constants[name].primitive_bitwidth // 8 for name in ("PARAM", "GRAD"))
    ranges = []
    for index, (_, numel, *_) in enumerate(tensors):
        ranges.append(Range(addresses[index], numel * param, f"param {index}"))
        ranges.append(Range(addresses[n + index], numel * grad, f"grad {index}", writable=False))
    state = {
        name: array
        for name, array in given.items()
        if isinstance(array, torch.Tensor) and name not in (*TABLES, *LEFT)
    }
    elements = max(array.numel() for array in state.values())
    for name, array in state.items():
        places = [(offset, numel, f"{name} of tensor {i}") for i, (offset, numel, *_) in enumerate(tensors)]
        ranges += pieces(array, elements // array.numel() if array.numel() else 1, places)
    return ranges


def _of_norms(given: dict[str, Any], constants: dict[str, Any]) -> list[Range]:
    """Of what works out the norm of gradients: these, and its own numbers."""
    ranges = [
        whole(given[name], name)
        for name in ("norms", "outcome", "skipped", "own", "averages")
        if name in given
    ]
    if "scalars" in given:
        places = given["scalars"].flatten().tolist()
        ranges += [Range(address, 4, f"scalar {i}", writable=False) for i, address in enumerate(places)]
    if "addresses" in given:
        size = constants["GRAD"].primitive_bitwidth // 8
        grads = zip(given["addresses"].tolist(), given["numels"].tolist(), strict=True)
        ranges += [
            Range(address, numel * size, f"grad {i}", writable=False)
            for i, (address, numel) in enumerate(grads)
            if numel
        ]
    return ranges


def pieces(array: torch.Tensor, per: int, places: Sequence[tuple[int, int, str]]) -> Iterator[Range]:
    """Of a state array of which ``per`` elements share an entry: the entries of (first element, number of
    elements, name)."""
    for offset, numel, name in places:
        begin, end = offset // per, -(-(offset + numel) // per)
        if not 0 <= begin <= end <= array.numel():
            raise PtxError(f"by its tables a launch has entries {begin} to {end} of {array.numel()}: {name}")
        size = array.element_size()
        yield Range(array.data_ptr() + begin * size, (end - begin) * size, name)


def whole(tensor: torch.Tensor, name: str, writable: bool = True) -> Range:
    """All of a contiguous tensor's memory."""
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous")
    return Range(tensor.data_ptr(), tensor.numel() * tensor.element_size(), name, writable)


def in_triton(name: str, device: torch.device) -> Update:
    """`adamw_triton_kernels.update_for`, but Triton's on the CPU too."""
    update: Update = getattr(importlib.import_module(f"adamw_triton_kernels.{name}"), name)
    return update


@contextlib.contextmanager
def compiled(capability: int, **settings: Any) -> Iterator[Session]:
    """Within, updates of CPU tensors are compiled for sm_``capability``, and run.

    Args:
        settings: of a `Session`.

    Raises:
        RuntimeError: Triton's interpreter is on.
    """
    from adamw_triton.step import batch, clipping
    from adamw_triton_kernels import norm_kernels

    if launch.INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set: nothing can be compiled in this process")
    session = Session(capability, **settings)
    instead: list[tuple[Any, str, Any]] = [
        *((module, "update_for", in_triton) for module in (adamw_triton_kernels, batch)),
        *((module, "norms_for", lambda device: norm_kernels) for module in (adamw_triton_kernels, clipping)),
        (launch, "_compiled", _compiled.setdefault(capability, {})),
    ]
    before = [(module, name, getattr(module, name)) for module, name, _ in instead]
    for module, name, value in instead:
        setattr(module, name, value)
    try:
        with running(session):
            yield session
    finally:
        for module, name, value in before:
            setattr(module, name, value)


_compiled: dict[int, dict[Any, Any]] = {}
"""By target, what the launcher has compiled and keeps."""
