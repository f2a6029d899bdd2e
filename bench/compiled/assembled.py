"""Whether the assembler changed arithmetic after the PTX: it may fuse a product and a sum that have no rounding
modifier. Counts floating-point instructions in PTX and in the machine code of every build: where they are the same,
what the emulator computes is what the machine code computes. Tells of spills, too.

    python check_machine_code.py [--targets 75 80 90 100]
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

from adamw_triton_kernels import adamw_8bit, adamw_32bit
from triton import knobs

from bench.compiled.checks import DTYPES
from bench.compiled.problems import KERNELS
from bench.compiled.session import Compiled, compile_build

_SASS = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
_GROUPS = {"fma": ("FFMA",), "mul": ("FMUL",), "add, sub": ("FADD", "FHADD"), "sqrt, rsqrt": ("MUFU",)}


def of_ptx(made: Compiled) -> Counter[str]:
    counts: Counter[str] = Counter()
    for instruction in made.program.instructions:
        family, kind = instruction.parts[0], instruction.parts[-1]
        if family not in ("fma", "mul", "add", "sub", "sqrt", "rsqrt") or kind not in (
            "f32",
            "f32x2",
            "bf16",
            "f16",
        ):
            continue
        group = next(name for name in _GROUPS if family in name.split(", "))
        counts[group + (" x2" if kind == "f32x2" else "")] += 1
    return counts


def of_machine_code(made: Compiled) -> tuple[Counter[str], Counter[str]]:
    """By the same groups, and all opcodes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.cubin)
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    every = Counter(match[1] for match in _SASS.finditer(text))
    counts: Counter[str] = Counter()
    for opcode, count in every.items():
        first = opcode.split(".")[0]
        for group, names in _GROUPS.items():
            for name in names:
                if first in (name, f"{name}2"):
                    counts[group + (" x2" if first.endswith("2") else "")] += count
    return counts, every


def look(case: tuple[int, str, str, str, bool]) -> tuple[str, list[str], int]:
    capability, name, param, grad, aligned = case
    kernel = KERNELS[name]
    module = adamw_8bit if kernel.block else adamw_32bit
    variant = {"BLOCK": kernel.block} if kernel.block else {"AMSGRAD": kernel.amsgrad}
    made = compile_build(module.build(DTYPES[param], DTYPES[grad], aligned=aligned, **variant), capability)
    ptx, (sass, every) = of_ptx(made), of_machine_code(made)
    found = []
    if ptx - sass:
        found.append(f"fused or dropped: PTX {dict(ptx)}, machine code {dict(sass)}")
    elif sass - ptx:
        found.append(f"computed again instead of kept: {dict(sass - ptx)}")
    local = {opcode: count for opcode, count in every.items() if opcode.startswith(("LDL", "STL"))}
    if local:
        found.append(f"local memory: {local}")
    label = f"sm_{capability} {name} {param}/{grad}{'' if aligned else ' misaligned'}"
    return label, found, sum(every.values())


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--targets", type=int, nargs="+", default=[75, 80, 90, 100])
    arguments.add_argument("--processes", type=int, default=2)
    given = arguments.parse_args()
    cases = list(itertools.product(given.targets, KERNELS, DTYPES, DTYPES, (True, False)))
    different = again = 0
    with ProcessPoolExecutor(given.processes) as pool:
        for label, found, _ in pool.map(look, cases, chunksize=4):
            different += any(line.startswith("fused") for line in found)
            again += any(line.startswith("computed again") for line in found)
            for line in found:
                print(f"{label}: {line}")
    print(
        f"{len(cases)} builds; in {different} the assembler fused or dropped floating-point instructions of the PTX, in "
        f"{again} it has some more than once"
    )


if __name__ == "__main__":
    main()
