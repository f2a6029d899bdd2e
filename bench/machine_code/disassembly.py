"""Machine code as text, read into instructions: one `Dialect` for NVIDIA's SASS, one for AMD's GCN.

What differs between vendors is here and nowhere else: how a line looks, what its opcode does to
control flow, which opcodes reach global memory and how wide, where the register count is written.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from triton import knobs

from bench.machine_code.control_flow import Instruction

Access = tuple[str, int]  # ("load" | "store" | "atomic", width in bits)


@dataclass(frozen=True)
class Listing:
    """One kernel's labels (`str`) and instructions in address order, and what a thread of it occupies."""

    items: list[str | Instruction]
    registers: int
    stack_bytes: int
    spilled_registers: int  # AMD: also those that found room in other registers; NVIDIA tells no number


@dataclass(frozen=True)
class Dialect:
    """How to read one vendor's machine code."""

    artifact: str  # key of the machine code in Triton's `asm`
    read: Callable[[str | bytes, str], Listing]
    access: Callable[[str], Access | None]  # to global memory, by opcode
    local: Callable[[str], Access | None]  # to a thread's own memory, where spilled registers live
    barrier: re.Pattern[str]
    call: re.Pattern[str]  # of a subroutine


# --- NVIDIA -----------------------------------------------------------------------------------------

_SASS_LINE = re.compile(
    r"/\*[0-9a-f]{4,}\*/\s+(?:@(?P<guard>!?U?P\w+)\s+)?(?P<opcode>[A-Z][\w.]*)(?P<operands>[^;]*);"
)
_SASS_LABEL = re.compile(r"([.$\w]+):$")
_SASS_TARGET = re.compile(r"`\((.+?)\)")
_SASS_MOVES = {
    "LDG": "load", "LD": "load", "LDGSTS": "load", "STG": "store", "ST": "store",
    "ATOMG": "atomic", "ATOM": "atomic", "RED": "atomic", "REDG": "atomic",
}  # fmt: skip
_SASS_LOCAL = {"LDL": "load", "STL": "store"}
_SASS_JUMPS = {"BRA", "JMP"}
_SASS_ENDS = {"EXIT", "RET", "KILL"}
_SASS_INDIRECT = {"BRX", "JMX", "BRXU", "JMXU"}
_SASS_WIDTHS = {"256": 256, "128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8, "16": 16, "8": 8}


def _sass_access(opcode: str, moves: dict[str, str] = _SASS_MOVES) -> Access | None:
    root, *modifiers = opcode.split(".")
    if root not in moves:
        return None
    return moves[root], next((_SASS_WIDTHS[m] for m in modifiers if m in _SASS_WIDTHS), 32)


def _sass_instruction(line: re.Match[str]) -> Instruction:
    opcode, operands = line["opcode"], line["operands"].strip()
    root = opcode.split(".")[0]
    if root in _SASS_INDIRECT:
        raise ValueError(f"indirect jumps are not followed: {opcode} {operands}")
    guarded = line["guard"] is not None
    text = " ".join(filter(None, (f"@{line['guard']}" if guarded else "", opcode, operands)))
    if root in _SASS_JUMPS:
        target = _SASS_TARGET.search(operands)
        if target is None:
            raise ValueError(f"jump without a target: {text}")
        # `BRA UP0, label` and `BRA.DIV URZ, label` are conditional without a guard.
        conditional = guarded or operands != target[0]
        return Instruction(opcode, text, guarded, jump=target[1], falls=conditional)
    if root == "CALL" and (local := _SASS_TARGET.search(operands)) and local[1].startswith(".L"):
        # ptxas leaves a loop this way where it must keep the return address: a jump by another name.
        return Instruction(opcode, text, guarded, jump=local[1], falls=guarded)
    ends = root in _SASS_ENDS
    return Instruction(opcode, text, guarded, falls=guarded or not ends, ends=ends, padding=root == "NOP")


def _sass_items(disassembly: str, name: str) -> Iterator[str | Instruction]:
    section = ""
    for line in map(str.strip, disassembly.splitlines()):
        if line.startswith(".section\t"):
            section = line.split()[1].split(",")[0]
        elif section == f".text.{name}":
            if label := _SASS_LABEL.match(line):
                yield label[1]
            elif instruction := _SASS_LINE.match(line):
                yield _sass_instruction(instruction)


def _read_cubin(code: str | bytes, name: str) -> Listing:
    assert isinstance(code, bytes)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(code)
        disassembly = _run(knobs.nvidia.nvdisasm.path, "-c", cubin)
        usage = _run(knobs.nvidia.cuobjdump.path, "-res-usage", cubin)
    return Listing(
        list(_sass_items(disassembly, name)),
        registers=_find(rf"Function {re.escape(name)}:\s+REG:(\d+)", usage),
        stack_bytes=_find(rf"Function {re.escape(name)}:\s+REG:\d+ STACK:(\d+)", usage),
        spilled_registers=0,
    )


def _run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _find(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"no {pattern!r} in the compiler's output")
    return int(match[1])


# --- AMD --------------------------------------------------------------------------------------------

_GCN_LABEL = re.compile(r"(\.LBB\w+):")  # others (.Ltmp, .Lfunc_begin) are the debugger's
_GCN_LINE = re.compile(r"([a-z]\w+)(?:\s+(.*))?$")
_GCN_GLOBAL = re.compile(r"(?:global|flat|buffer)_(load|store|atomic)_(\w+)")
_GCN_LOCAL = re.compile(r"scratch_(load|store)_(\w+)")
_GCN_PADDING = {"s_nop", "s_delay_alu"}  # s_delay_alu tells the scheduler what a nop would have enforced
_GCN_NARROWS = re.compile(r"s_\w+_saveexec_|v_cmpx_")
_GCN_RESTORES = re.compile(r"exec(_lo)?\s*,")
# The first that matches: `d16_u8` holds 8 bits, `ushort` and `d16_hi_b16` 16.
_GCN_WIDTHS = [
    (re.compile(r"x4|b128"), 128),
    (re.compile(r"x3|b96"), 96),
    (re.compile(r"x2|[bui]64|f64"), 64),
    (re.compile(r"byte|[uib]8"), 8),
    (re.compile(r"short|[uib]16|d16"), 16),
    (re.compile(r"dword|[buif]32"), 32),
]


def _gcn_access(opcode: str, pattern: re.Pattern[str] = _GCN_GLOBAL) -> Access | None:
    match = pattern.match(opcode)
    if match is None:
        return None
    return match[1], next(width for suffix, width in _GCN_WIDTHS if suffix.search(match[2]))


def _gcn_items(assembly: str, name: str) -> Iterator[str | Instruction]:
    body = assembly[
        assembly.index(f"\n{name}:") : assembly.index("\n\t.section", assembly.index(f"\n{name}:"))
    ]
    guarded = False
    for line in (line.split(";")[0].strip() for line in body.splitlines()):
        if label := _GCN_LABEL.match(line):
            # A label can be jumped to with every lane active; what lies under a narrowed mask has none.
            guarded = False
            yield label[1]
        elif match := _GCN_LINE.match(line):
            opcode, operands = match[1], match[2] or ""
            if _GCN_NARROWS.match(opcode):
                guarded = True
            elif _GCN_RESTORES.match(operands):
                guarded = False
            yield _gcn_instruction(opcode, operands, guarded)


def _gcn_instruction(opcode: str, operands: str, guarded: bool) -> Instruction:
    text = f"{opcode} {operands}".strip()
    if opcode == "s_setpc_b64":
        raise ValueError(f"indirect jumps are not followed: {text}")
    if opcode == "s_cbranch_execz":  # never taken: on the hot path some lane wants the work
        return Instruction(opcode, text, guarded)
    if opcode == "s_branch" or opcode.startswith("s_cbranch"):
        return Instruction(opcode, text, guarded, jump=operands, falls=opcode != "s_branch")
    ends = opcode == "s_endpgm"
    return Instruction(opcode, text, guarded, falls=not ends, ends=ends, padding=opcode in _GCN_PADDING)


def _read_amdgcn(code: str | bytes, name: str) -> Listing:
    assert isinstance(code, str)
    return Listing(
        list(_gcn_items(code, name)),
        registers=_find(r"\.vgpr_count:\s+(\d+)", code),
        stack_bytes=_find(r"\.private_segment_fixed_size:\s+(\d+)", code),
        spilled_registers=_find(r"\.vgpr_spill_count:\s+(\d+)", code),
    )


DIALECTS: dict[str, Dialect] = {
    "cuda": Dialect(
        artifact="cubin",
        read=_read_cubin,
        access=_sass_access,
        local=lambda opcode: _sass_access(opcode, _SASS_LOCAL),
        barrier=re.compile(r"(@\S+ )?BAR\b"),
        call=re.compile(r"(@\S+ )?CALL\b(?!.*`\(\.L)"),
    ),
    "hip": Dialect(
        artifact="amdgcn",
        read=_read_amdgcn,
        access=_gcn_access,
        local=lambda opcode: _gcn_access(opcode, _GCN_LOCAL),
        barrier=re.compile(r"s_barrier"),
        call=re.compile(r"s_swappc"),
    ),
}
