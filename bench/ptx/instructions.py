"""From an instruction to the step that it is: one table of opcodes, of which each module has its own."""

from __future__ import annotations

from dataclasses import replace

from bench.ptx import accesses, arithmetic, bits, conversions, warps
from bench.ptx.floats import Approximation
from bench.ptx.operands import Decoder, Step
from bench.ptx.program import Instruction, PtxError, Unsupported

_FAMILIES: dict[str, Decoder] = {
    **arithmetic.FAMILIES,
    **bits.FAMILIES,
    **conversions.FAMILIES,
    **accesses.FAMILIES,
    **warps.FAMILIES,
}
"""By the first part of the opcode. What ends a block (branches, barriers, returns) is `emulator`'s own."""


def decode(instruction: Instruction, approximation: Approximation) -> Step:
    """
    Raises:
        Unsupported: there is no such opcode, or not with these modifiers; it names the line.
    """
    decoder = _FAMILIES.get(instruction.parts[0])
    if decoder is None:
        raise Unsupported(instruction)
    if not approximation.flush:
        opcode = ".".join(part for part in instruction.parts if part != "ftz")
        instruction = replace(instruction, opcode=opcode)
    try:
        return decoder(instruction, approximation)
    except PtxError:
        raise
    except Exception as error:  # of a family that has the opcode, but not with these types or operands
        raise Unsupported(instruction) from error
