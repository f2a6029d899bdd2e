"""Runs a parsed kernel on the host, all threads of several CTAs at once.

Every thread is at a block of instructions; the earliest block that any is at runs next, for all that are
there, so threads that took different ways meet again where the ways do. A block ends at a branch, a barrier
or a label that is branched to. Instructions run for one warp after another would give the same: within a
block nothing passes from thread to thread but through shuffles, for which the warp must be together, and
memory, where `records.Races` finds what depends on an order.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from bench.ptx import floats
from bench.ptx.floats import Array
from bench.ptx.instructions import decode
from bench.ptx.memory import GlobalMemory, SharedMemory
from bench.ptx.operands import Step
from bench.ptx.program import Immediate, Instruction, Program, PtxError, Symbol, Unsupported
from bench.ptx.records import Who
from bench.ptx.warps import WARP, require_whole_warps

_ENDS = ("bra", "ret", "exit", "bar", "barrier")
_DONE, _WAITING = np.int32(1 << 30), np.int32(1 << 29)


@dataclass
class Threads:
    """The context of an instruction: registers of all threads that run together, and what they can reach."""

    program: Program
    parameters: bytes
    ctas: Array
    """Numbers in the grid of the CTAs."""
    grid: int
    memory: GlobalMemory
    shared: SharedMemory
    registers: list[Array | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        threads = self.program.threads
        self.shape = (len(self.ctas) * threads,)
        self.lane = np.tile(np.arange(threads, dtype=np.uint32), len(self.ctas))
        self.row = np.repeat(np.arange(len(self.ctas)), threads)
        self.cta = self.ctas[self.row]
        self.epochs = np.zeros(len(self.ctas), dtype=np.int64)
        self.waiting = np.full(len(self.ctas), -1, dtype=np.int64)
        """The block that ends with the barrier at which threads of each CTA wait; -1: none does."""
        self.registers = [None] * len(self.program.registers)

    def special(self, name: str) -> Array:
        values: dict[str, Callable[[], Array]] = {
            "%tid.x": lambda: self.lane,
            "%ctaid.x": lambda: self.cta.astype(np.uint32),
            "%ntid.x": lambda: np.full(self.shape, self.program.threads, dtype=np.uint32),
            "%nctaid.x": lambda: np.full(self.shape, self.grid, dtype=np.uint32),
            "%laneid": lambda: self.lane % np.uint32(WARP),
            "%warpid": lambda: self.lane // np.uint32(WARP),
        }
        if name.endswith((".y", ".z")):
            return np.full(self.shape, 1 if name.startswith("%n") else 0, dtype=np.uint32)
        return values[name]()

    def symbol(self, name: str, instruction: Instruction) -> int:
        if name in self.program.shared:
            return SharedMemory.BASE
        raise Unsupported(instruction, f"variable {name} in")

    def who(self, at: Array | None, instruction: Instruction) -> Who:
        rows = self.row if at is None else self.row[at]
        lanes = self.lane if at is None else self.lane[at]
        cta = self.ctas[rows]
        # An epoch belongs to one CTA.
        epoch = cta * (1 << 20) + self.epochs[rows]
        return Who(cta * self.program.threads + lanes, cta, epoch, str(instruction))


@dataclass
class Block:
    steps: list[tuple[Instruction, Step]] = field(default_factory=list)
    end: Instruction | None = None
    """A branch, a barrier, a return; None: goes on with the next block."""
    target: int = -1


class Emulator:
    """A kernel that can be launched many times."""

    def __init__(self, program: Program, approximation: floats.Approximation | None = None) -> None:
        self.program = program
        self.approximation = approximation or floats.Approximation()
        self.blocks = self._blocks()
        self.executed: Counter[str] = Counter()
        """Times that threads have executed each opcode, over all launches."""

    # Preparation

    def _blocks(self) -> list[Block]:
        instructions, labels = self.program.instructions, self.program.labels
        targets = {
            _place_of(o, i, labels)
            for i in instructions
            if i.parts[0] == "bra"
            for o in i.operands
            if isinstance(o, Symbol)
        }
        blocks, starts = [Block()], {0: 0}
        for at, instruction in enumerate(instructions):
            if at in targets and (blocks[-1].steps or at not in starts):
                blocks.append(Block())
                starts[at] = len(blocks) - 1
            if instruction.parts[0] in _ENDS and instruction.opcode != "bar.warp.sync":
                blocks[-1].end = instruction
                blocks.append(Block())
                starts[at + 1] = len(blocks) - 1
            else:
                blocks[-1].steps.append((instruction, decode(instruction, self.approximation)))
        for block in blocks:
            if block.end is not None and block.end.parts[0] == "bra":
                (label,) = block.end.operands
                if not isinstance(label, Symbol):
                    raise Unsupported(block.end)
                block.target = starts[_place_of(label, block.end, labels)]
        return blocks

    # Launching

    def launch(
        self,
        grid: int,
        arguments: Sequence[int],
        memory: GlobalMemory,
        shared_bytes: int,
        together: int = 32,
        order: Sequence[int] | None = None,
    ) -> list[SharedMemory]:
        """
        Args:
            grid: CTAs; or of them only those in ``order``, in that order.
            arguments: of all parameters, as integers.
            together: CTAs that run at the same time.
            order: numbers of CTAs.

        Returns:
            The shared memory of every ``together`` CTAs.

        Raises:
            AccessError: memory is touched that is not to be, or misaligned.
            PtxError: the kernel does what is not modelled, or what no kernel may.
        """
        parameters = self._parameters(arguments)
        numbers = np.arange(grid, dtype=np.int64) if order is None else np.array(order, dtype=np.int64)
        used = []
        for begin in range(0, len(numbers), together):
            ctas = numbers[begin : begin + together]
            shared = SharedMemory(len(ctas), shared_bytes, races=memory.races is not None)
            with np.errstate(all="ignore"):
                self._run(Threads(self.program, parameters, ctas, grid, memory, shared))
            used.append(shared)
        return used

    def _parameters(self, arguments: Sequence[int]) -> bytes:
        if len(arguments) != len(self.program.parameters):
            raise PtxError(f"{len(arguments)} arguments for {len(self.program.parameters)} parameters")
        last = self.program.parameters[-1]
        packed = bytearray(last.offset + last.bits // 8)
        for parameter, value in zip(self.program.parameters, arguments, strict=True):
            code = {32: "I", 64: "Q"}[parameter.bits]
            struct.pack_into(f"<{code}", packed, parameter.offset, value % (1 << parameter.bits))
        return bytes(packed)

    def _run(self, t: Threads) -> None:
        at = np.zeros(t.shape, dtype=np.int32)
        while True:
            current = int(at.min())
            if current == _DONE:
                return
            if current == _WAITING:
                raise PtxError("a barrier that not all threads of a CTA reach")
            here = at == current
            mask = None if here.all() else here
            block = self.blocks[current]
            self._run_steps(block, t, mask)
            self._go_on(block, current, at, t, mask)
            self._open_barriers(at, t)

    def _run_steps(self, block: Block, t: Threads, mask: Array | None) -> None:
        count = t.shape[0] if mask is None else int(mask.sum())
        for instruction, step in block.steps:
            active = mask
            if instruction.guard is not None:
                active = _guarded(instruction, t, mask)
                if active is not None and not active.any():
                    continue
            try:
                step(t, active)
            except (PtxError, ArithmeticError, ValueError, TypeError, IndexError) as error:
                error.add_note(f"at {instruction} of {self.program.name} for {self.program.target}")
                raise
            self.executed[instruction.opcode] += count

    def _go_on(self, block: Block, current: int, at: Array, t: Threads, mask: Array | None) -> None:
        here = slice(None) if mask is None else mask
        end = block.end
        if end is None:
            at[here] = current + 1
        elif end.parts[0] == "bra":
            taken = _guarded(end, t, mask) if end.guard is not None else mask
            at[here] = current + 1
            at[slice(None) if taken is None else taken] = block.target
        elif end.parts[0] in ("ret", "exit"):
            leaving = _guarded(end, t, mask) if end.guard is not None else mask
            at[here] = current + 1
            at[slice(None) if leaving is None else leaving] = _DONE
        else:
            if end.guard is not None or end.opcode not in (
                "bar.sync",
                "barrier.sync",
                "barrier.sync.aligned",
            ):
                raise Unsupported(end)
            if end.operands != (Immediate(0),):
                raise Unsupported(end, "a barrier of some threads, or another than number 0, in")
            require_whole_warps(end, t, mask)
            at[here] = _WAITING
            rows = np.unique(t.row[here])
            if ((t.waiting[rows] >= 0) & (t.waiting[rows] != current)).any():
                raise PtxError(f"threads of a CTA wait at different barriers: {end}")
            t.waiting[rows] = current

    def _open_barriers(self, at: Array, t: Threads) -> None:
        if (at == _WAITING).any():
            by_cta = at.reshape(len(t.ctas), -1)
            full = (by_cta == _WAITING).all(axis=1)
            if ((by_cta == _WAITING).any(axis=1) & (by_cta == _DONE).any(axis=1)).any():
                raise PtxError("some threads of a CTA have returned, others wait at a barrier")
            if full.any():
                by_cta[full] = (t.waiting[full] + 1)[:, None]
                t.waiting[full] = -1
                t.epochs[full] += 1


def _place_of(label: Symbol, branch: Instruction, labels: Mapping[str, int]) -> int:
    if label.name not in labels:
        raise Unsupported(branch, f"no label {label.name!r} for")
    return labels[label.name]


def _guarded(instruction: Instruction, t: Threads, mask: Array | None) -> Array | None:
    """The threads of the mask for which the guard holds; None: all."""
    guard = t.registers[instruction.guard.index]  # type: ignore[union-attr]
    if guard is None:
        raise PtxError(f"guard {instruction.guard} is read before anything was written: {instruction}")
    if instruction.negated:
        guard = ~guard
    if mask is not None:
        return guard & mask
    return None if guard.all() else guard
