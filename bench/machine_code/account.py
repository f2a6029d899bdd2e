"""Compile a Triton kernel for a GPU that is not here, and account for the machine code it becomes.

Nothing runs: Triton's own ptxas and LLVM produce the very code that a GPU of the target would
execute, nvdisasm turns it back into text, and this module counts. It knows nothing of optimizers.

The *hot path* is what one full tile executes, once per trip of the loop over tiles:

1.  Cut the code into basic blocks and draw the edges between them.
2.  Give each global access the weight ``width ** 2``, halved where a predicate (NVIDIA) or a narrowed
    execution mask (AMD) guards it. The block with the most weight in loads and the one with the most
    in stores are the *anchors*. Wide and unmasked beats narrow or masked, so they lie in the code for
    full tiles and not in that for a masked tail, though both move the same bytes per element.
3.  If a loop contains the anchors, the hot path is the cycle through them with the fewest
    instructions; otherwise the path with the fewest from entry through them to an exit.

So where code forks, the side that is not needed to get past the anchors (a tail, the slow path of a
division, the copy for a diverged warp) is not counted. A predicated instruction is, for it is issued
even when it does nothing. AMD code jumps over work that no lane wants (``s_cbranch_execz``): some lane
of the hot path wants it. NOPs and AMD's ``s_delay_alu`` do no work and are not counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from bench.machine_code.control_flow import Block, Graph, Instruction
from bench.machine_code.disassembly import DIALECTS, Access, Dialect

TARGETS: dict[str, GPUTarget] = {
    "sm_75": GPUTarget("cuda", 75, 32),
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
    "gfx1201": GPUTarget("hip", "gfx1201", 32),
}

_MOVES = ("load", "store")


@dataclass(frozen=True)
class Compiled:
    """The machine code of one kernel for one target."""

    name: str
    target: GPUTarget
    threads: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    spilled_registers: int
    graph: Graph

    @property
    def dialect(self) -> Dialect:
        """How this target's code is read."""
        return DIALECTS[self.target.backend]

    @cached_property
    def hot_blocks(self) -> list[Block]:
        """The blocks that one full tile executes, in order (see the module's docstring)."""
        anchors = [anchor for kind in _MOVES if (anchor := self._heaviest(kind)) is not None]
        if not anchors:
            raise ValueError(f"{self.name} neither loads nor stores global memory")
        return self.graph.route(anchors)

    @property
    def hot_path(self) -> list[Instruction]:
        """The instructions that one full tile executes, without those that do no work."""
        return [line for block in self.hot_blocks for line in block.instructions if not line.padding]

    @property
    def everything(self) -> list[Instruction]:
        """Every instruction of the kernel, in address order."""
        return [line for block in self.graph.blocks for line in block.instructions]

    def dump(self) -> str:
        """The hot path's machine code as text, one header line per basic block."""
        return "\n".join(
            "\n    ".join([f"block {block.index}", *(line.text for line in block.instructions)])
            for block in self.hot_blocks
        )

    def _heaviest(self, kind: str) -> Block | None:
        """The block with the most weight in global accesses of `kind`, if any has one."""
        blocks = self.graph.reachable()
        heaviest = max(blocks, key=lambda block: self._weight(block, kind))
        return heaviest if self._weight(heaviest, kind) else None

    def _weight(self, block: Block, kind: str) -> int:
        accesses = ((self.dialect.access(line.opcode), line.guarded) for line in block.instructions)
        return sum(
            access[1] ** 2 * (1 if guarded else 2)
            for access, guarded in accesses
            if access is not None and access[0] == kind
        )


@dataclass(frozen=True)
class Account:
    """What one full tile costs; `str()` of it is one line."""

    target: GPUTarget
    elements: int
    threads: int
    instructions: int  # on the hot path, for each thread
    accesses: Mapping[Access, int]  # global accesses on the hot path, by kind and width in bits
    barriers: int  # on the hot path
    registers: int  # for each thread
    stack_bytes: int  # for each thread
    shared_bytes: int  # for each program
    spilled_registers: int  # where the compiler tells (AMD), also those spilled to other registers
    spills: Mapping[Access, int]  # accesses to spilled registers anywhere in the kernel
    flags: tuple[str, ...]  # what makes the figures doubtful

    @property
    def per_element(self) -> float:
        """Machine instructions, counted for every lane, to each element."""
        return self.instructions * self.threads / self.elements

    @property
    def spill_bytes(self) -> dict[str, int]:
        """Bytes of spilled registers that a thread's code loads and stores, each place once."""
        return {kind: _bytes(self.spills, kind) for kind in _MOVES}

    @property
    def bytes_per_element(self) -> dict[str, float]:
        """Bytes that the hot path asks of global memory; what several lanes load alike counts for each."""
        return {kind: _bytes(self.accesses, kind) * self.threads / self.elements for kind in _MOVES}

    def __str__(self) -> str:
        widths = " ".join(
            f"{kind}{width}x{count}" for (kind, width), count in sorted(self.accesses.items(), reverse=True)
        )
        moved, spilled = self.bytes_per_element, self.spill_bytes
        return (
            f"{self.per_element:.1f} instructions/element ({self.instructions} x {self.threads} threads"
            f" / {self.elements}) | {widths} | {moved['load']:.2f}+{moved['store']:.2f} B/element"
            f" | {self.registers} registers | spills {spilled['load']}+{spilled['store']} B in"
            f" {sum(self.spills.values())} accesses, stack {self.stack_bytes} B"
            f" | shared {self.shared_bytes} B | {self.barriers} barriers"
            + "".join(f" | {flag}" for flag in self.flags)
        )


def compile_for(
    fn: JITFunction[Any],
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    attrs: Mapping[tuple[int, ...], list[list[Any]]],
    target: str | GPUTarget,
    num_warps: int = 4,
    **options: Any,
) -> Compiled:
    """Compile `fn` for `target` (a name in `TARGETS` or any `GPUTarget`) and read its machine code.

    `signature`, `constexprs` and `attrs` are those of `triton.compiler.ASTSource`, `options` the compiler's:
    for those not given the target's default holds, as it does for a launch.
    """
    if not isinstance(fn, JITFunction):
        raise TypeError(
            f"{fn!r} is not a compiled Triton function. Was it imported with TRITON_INTERPRET set? Unset it."
        )
    if isinstance(target, str):
        target = TARGETS[target]
    source = ASTSource(fn, dict(signature), dict(constexprs), dict(attrs))
    kernel = triton.compile(source, target=target, options={"num_warps": num_warps, **options})
    dialect = DIALECTS[target.backend]
    listing = dialect.read(kernel.asm[dialect.artifact], kernel.metadata.name)
    return Compiled(
        name=kernel.metadata.name,
        target=target,
        threads=num_warps * target.warp_size,
        registers=listing.registers,
        stack_bytes=listing.stack_bytes,
        shared_bytes=kernel.metadata.shared,
        spilled_registers=listing.spilled_registers,
        graph=Graph(listing.items),
    )


def account(compiled: Compiled, elements_per_tile: int) -> Account:
    """Count what `compiled` executes for one full tile of `elements_per_tile` elements."""
    dialect, path = compiled.dialect, compiled.hot_path
    accesses = _tally(dialect.access(line.opcode) for line in path)
    calls = sum(bool(dialect.call.match(line.text)) for line in path)
    atomics = sum(count for (kind, _), count in accesses.items() if kind == "atomic")
    spills = _tally(dialect.local(line.opcode) for line in path)
    doubts = {
        "calls on the hot path": calls,
        "atomics": atomics,
        "spills on the hot path": sum(spills.values()),
    }
    return Account(
        target=compiled.target,
        elements=elements_per_tile,
        threads=compiled.threads,
        instructions=len(path),
        accesses=accesses,
        barriers=sum(bool(dialect.barrier.match(line.text)) for line in path),
        registers=compiled.registers,
        stack_bytes=compiled.stack_bytes,
        shared_bytes=compiled.shared_bytes,
        spilled_registers=compiled.spilled_registers,
        spills=_tally(dialect.local(line.opcode) for line in compiled.everything),
        flags=tuple(f"{count} {what}" for what, count in doubts.items() if count),
    )


def histogram(compiled: Compiled, parts: int = 2) -> Counter[str]:
    """How often each opcode, cut to its first `parts` dotted parts, stands on the hot path."""
    return Counter(".".join(line.opcode.split(".")[:parts]) for line in compiled.hot_path)


def _tally(accesses: Iterable[Access | None]) -> Counter[Access]:
    return Counter(access for access in accesses if access is not None)


def _bytes(accesses: Mapping[Access, int], kind: str) -> int:
    return sum(width * count for (of, width), count in accesses.items() if of == kind) // 8
