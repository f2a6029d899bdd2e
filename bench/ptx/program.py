"""A kernel in PTX as data: instructions, their operands, registers."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property


class PtxError(Exception):
    """The text is not understood, or means something that is not modelled."""


@dataclass(frozen=True)
class Register:
    index: int
    bits: int
    name: str


@dataclass(frozen=True)
class Immediate:
    """A constant: an integer, or the bits of a floating-point number."""

    value: int
    float_bits: int = 0
    """32 or 64 where ``value`` is the bits of a float; 0: an integer."""


@dataclass(frozen=True)
class Special:
    """A special register such as ``%tid.x``."""

    name: str


@dataclass(frozen=True)
class Symbol:
    """A variable or a label."""

    name: str


@dataclass(frozen=True)
class Address:
    """``[base + offset]``"""

    base: Register | Symbol | Immediate
    offset: int


@dataclass(frozen=True)
class Sink:
    """``_``: a result that nobody wants."""


@dataclass(frozen=True)
class Vector:
    """``{a, b, ...}``"""

    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Pair:
    """``d|p``: a result and a predicate."""

    first: Register | Sink
    second: Register | Sink


Operand = Register | Immediate | Special | Symbol | Address | Sink | Vector | Pair


@dataclass(frozen=True)
class Instruction:
    opcode: str
    operands: tuple[Operand, ...]
    guard: Register | None
    negated: bool
    text: str
    line: int

    @cached_property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.opcode.split("."))

    def __str__(self) -> str:
        return f"line {self.line}: {self.text}"


@dataclass(frozen=True)
class Parameter:
    name: str
    bits: int
    offset: int


@dataclass
class Program:
    """One kernel."""

    name: str
    target: str
    version: str
    parameters: list[Parameter]
    threads: int
    """Of a CTA: ``.reqntid``."""
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    """Index of the instruction that follows."""
    registers: list[Register] = field(default_factory=list)
    shared: list[str] = field(default_factory=list)
    """Variables in shared memory whose size is given at the launch."""


class Unsupported(PtxError):
    """An instruction that the emulator does not have."""

    def __init__(self, instruction: Instruction, why: str = "unknown opcode") -> None:
        super().__init__(f"{why} {instruction.opcode!r}: {instruction}")
