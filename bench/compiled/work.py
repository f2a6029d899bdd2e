"""What a compiled kernel executes and moves for an element, whole tiles and tails apart: PTX instructions of
a thread (not machine instructions), and the sectors of 32 bytes that accesses to global memory ask for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from bench.compiled.problems import KERNELS, ordinary, set_gradients
from bench.report import Table
from bench.suite import DTYPES

_ACCESS = re.compile(r"(ld|st)\.global\.([\w.:]+)")
SECTOR = 32
"""Bytes."""


@dataclass(frozen=True)
class Access:
    """Of one kind of loads or stores, for an element."""

    kind: str
    """As the PTX has it: ``ld v4.b32``."""
    moved: float
    """Bytes, in whole sectors."""
    wanted: float
    """Bytes that are used."""


@dataclass(frozen=True)
class Work:
    """For an element, by code that updates it."""

    label: str
    tail: bool
    instructions: float
    """Executed by its thread, with all that a program does once."""
    accesses: tuple[Access, ...]

    @property
    def moved(self) -> float:
        return sum(access.moved for access in self.accesses)

    @property
    def wanted(self) -> float:
        return sum(access.wanted for access in self.accesses)


def measure(capability: int, kernel: str, param: str, grad: str, *, aligned: bool, tail: bool) -> Work:
    """Run one tile, or in masked tails all of it but one element."""
    made = KERNELS[kernel]
    numel = made.tile - tail
    problem = ordinary(made, DTYPES[param], DTYPES[grad], aligned, (numel,))
    set_gradients(problem, 1)
    session = problem.step_compiled(capability, sectors=True)
    (memory,) = session.memories
    accesses: dict[str, list[int]] = {}
    for instruction, sectors in memory.traffic.sectors.items():
        found = _ACCESS.search(instruction)
        kind = f"{found[1]} {found[2]}"
        of_kind = accesses.setdefault(kind, [0, 0])
        of_kind[0] += sectors * SECTOR
        of_kind[1] += memory.traffic.wanted[instruction]
    label = f"sm_{capability} {kernel} {param}/{grad}{'' if aligned else ' misaligned'}"
    counted = (Access(kind, moved / numel, wanted / numel) for kind, (moved, wanted) in accesses.items())
    return Work(label, tail, sum(session.executed.values()) / numel, tuple(counted))


def count(capability: int = 90, pair: tuple[str, str] = ("bf16", "bf16")) -> Iterator[Work]:
    """Every kernel: whole tiles and tails, of the builds for aligned and for misaligned memory."""
    for kernel in KERNELS.values():
        own = pair if pair[0] in kernel.params else (kernel.params[0], kernel.params[0])
        for aligned in (True, False):
            for tail in (False, True):
                yield measure(capability, kernel.name, *own, aligned=aligned, tail=tail)


def table(counted: Iterable[Work]) -> Table:
    """Of `count`, for the audit and the suite."""
    rows = [
        [
            one.label,
            "tails" if one.tail else "whole tile",
            f"{one.instructions:.1f}",
            f"{one.moved:.2f}",
            f"{one.wanted:.2f}",
            f"{one.moved / one.wanted:.1f}x",
        ]
        for one in counted
    ]
    columns = ["kernel, params/grads", "elements in", "PTX instructions", "bytes of sectors", "wanted", ""]
    notes = [
        "Counted by the emulator over one tile; instructions of PTX, with all that a program does once.",
        "Bytes: what warps' accesses ask for in whole sectors of 32; a cache serves some of them twice.",
    ]
    return Table("Work of an element", columns, rows, notes)
