"""Whether the assembler changed arithmetic after the PTX: it may fuse a product and a sum that have no
rounding modifier. Counts floating-point instructions in PTX and in machine code: where they are the same,
what the emulator computes is what the machine code computes. Tells of spills, too."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass

from triton import knobs

from bench.compiled.checks import Case
from bench.compiled.driver import Launcher
from bench.compiled.problems import ordinary
from bench.ptx.parser import parse

_SASS = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
_GROUPS = {"fma": ("FFMA",), "mul": ("FMUL",), "add, sub": ("FADD", "FHADD"), "sqrt, rsqrt": ("MUFU",)}


@dataclass(frozen=True)
class Assembled:
    """What the assembler made of a case."""

    case: Case
    fused: str
    """Instructions of the PTX that are not in the machine code; empty: none."""
    again: str
    """Those that are there more than once: computed again instead of kept."""
    local: str
    """Accesses to local memory: spills."""


def assembled(case: Case) -> Assembled:
    """Of the kernels that a launch of this case compiles; none runs."""
    session = ordinary(*case.of, case.aligned, (1,)).step_compiled(case.capability, only=())
    fused, again, local = Counter[str](), Counter[str](), Counter[str]()
    for kernel in session.kernels:
        ptx, (sass, every) = _of_ptx(kernel), _of_machine_code(kernel)
        fused += ptx - sass
        again += Counter() if ptx - sass else sass - ptx
        local += Counter({name: n for name, n in every.items() if name.startswith(("LDL", "STL"))})
    return Assembled(
        case, *(", ".join(f"{n} {name}" for name, n in each.items()) for each in (fused, again, local))
    )


def _of_ptx(kernel: Launcher) -> Counter[str]:
    counts: Counter[str] = Counter()
    for instruction in parse(kernel.ptx).instructions:
        family, kind = instruction.parts[0], instruction.parts[-1]
        group = next((name for name in _GROUPS if family in name.split(", ")), None)
        if group is not None and kind in ("f32", "f32x2", "bf16", "f16"):
            counts[group] += 2 if kind == "f32x2" else 1  # which sm_120 has in PTX only
    return counts


def _of_machine_code(kernel: Launcher) -> tuple[Counter[str], Counter[str]]:
    """By the same groups, and all opcodes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.cubin)
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    every = Counter(match[1] for match in _SASS.finditer(text))
    counts: Counter[str] = Counter()
    for opcode, count in every.items():
        first = opcode.split(".")[0].removeprefix("U")  # of a warp's common numbers
        for group, names in _GROUPS.items():
            if first.removesuffix("2") in names:
                counts[group] += count * (2 if first.endswith("2") else 1)
    return counts, every
