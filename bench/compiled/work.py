"""What a compiled kernel executes and moves for an element, whole tiles and tails apart: PTX instructions of a thread
(not machine instructions), and sectors of 32 bytes that its accesses to global memory ask for.

    python count_work.py [--targets 80 90 100]
"""

from __future__ import annotations

import argparse
import re

import torch

from bench.compiled.problems import KERNELS, Kernel, ordinary, set_gradients
from bench.compiled.session import compiled

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def measure(
    capability: int, kernel: Kernel, param: str, grad: str, aligned: bool, numel: int
) -> tuple[float, dict[str, list[float]]]:
    """Instructions of all threads, and by kind of access: requests of warps, sectors, different bytes."""
    problem = ordinary(kernel, DTYPES[param], DTYPES[grad], aligned, (numel,))
    set_gradients(problem, 1)
    with compiled(capability, sectors=True) as session:
        problem.step_compiled()
    (memory,) = session.memories
    accesses: dict[str, list[float]] = {}
    for instruction, sectors in memory.traffic.sectors.items():
        found = re.search(r"(ld|st)\.global\.([\w.]+)", instruction)
        kind = f"{'load' if found[1] == 'ld' else 'store'} {found[2]}"
        of_kind = accesses.setdefault(kind, [0.0, 0.0, 0.0])
        of_kind[0] += memory.traffic.requests[instruction]
        of_kind[1] += sectors
        of_kind[2] += memory.traffic.wanted[instruction]
    return sum(session.executed.values()), accesses


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--targets", type=int, nargs="+", default=[90])
    arguments.add_argument("--param", default="bf16")
    arguments.add_argument("--grad", default="bf16")
    given = arguments.parse_args()
    for capability in given.targets:
        for name, kernel in KERNELS.items():
            for aligned in (True, False):
                tile = 2048 if kernel.block else 1024
                once, few = measure(capability, kernel, given.param, given.grad, aligned, tile)
                tail, short = measure(capability, kernel, given.param, given.grad, aligned, tile - 1)
                print(
                    f"sm_{capability} {name} {given.param}/{given.grad} {'aligned' if aligned else 'misaligned'}:"
                )
                print(
                    f"  a whole tile, with all that a CTA does once: {once / tile:.1f} instructions an element"
                )
                print(f"  {tile - 1} elements in tails: {tail / (tile - 1):.1f} instructions an element")
                for label, accesses, n in (("whole tile", few, tile), ("tails", short, tile - 1)):
                    for kind, (requests, sectors, wanted) in sorted(accesses.items()):
                        print(
                            f"    {label}: {kind:10} {requests:6.0f} warps' accesses, {sectors * 32 / n:6.2f} bytes of "
                            f"sectors an element, of which {wanted / n:.2f} wanted"
                        )


if __name__ == "__main__":
    main()
