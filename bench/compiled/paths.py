"""Whether an element gets the same bits whichever code updates it: whole tiles or the masked tail, of the build for
aligned memory or of the other. A page or a chunk that ends elsewhere, or a tensor at another address, would change
results otherwise.

    python check_paths.py [--targets 75 80 90 100]
"""

from __future__ import annotations

import argparse
import itertools
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor

import torch

from bench.compiled.problems import KERNELS, Problem, hypers
from bench.compiled.session import compiled

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STEPS = 2


def after(
    capability: int, name: str, param: str, grad: str, aligned: bool, whole: bool
) -> dict[str, torch.Tensor]:
    """One tile, or all of it but the last element; what both have."""
    kernel = KERNELS[name]
    tile = 2048 if kernel.block else 1024
    numel = tile if whole else tile - 1
    problem = Problem.of(kernel, DTYPES[param], DTYPES[grad], hypers(1), (numel,), aligned, rows=1)
    generator = torch.Generator().manual_seed(4)
    problem.params[0].copy_(torch.randn(tile, generator=generator)[:numel])
    for step in range(1, STEPS + 1):
        problem.grads[0].copy_((torch.randn(tile, generator=generator) * 0.1)[:numel])
        problem.hyper = hypers(step)
        with compiled(capability):
            problem.step_compiled()
    last = tile // (kernel.block or 1) - 1 if kernel.block else tile - 1  # the last block has other elements
    found = {"weight": problem.params[0]}
    for key, array in problem.state.items():
        per = problem.layout_per(key)
        found[key] = array[: last if per > 1 else tile - (kernel.block or 1)]
    found["weight"] = found["weight"][: tile - (kernel.block or 1)]
    return found


def check(case: tuple[int, str, str, str]) -> tuple[str, list[str]]:
    torch.set_num_threads(1)
    capability, name, param, grad = case
    results = {
        f"{'aligned' if aligned else 'misaligned'} {'whole tile' if whole else 'tail'}": after(
            capability, name, param, grad, aligned, whole
        )
        for aligned, whole in itertools.product((True, False), (True, False))
    }
    first = "aligned whole tile"
    differences = []
    for label, found in results.items():
        for key, array in found.items():
            differ = int((array != results[first][key]).sum())
            if differ:
                differences.append(f"{label}: {key} {differ} of {array.numel()}")
    return f"sm_{capability} {name} {param}/{grad}", differences


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--targets", type=int, nargs="+", default=[75, 80, 90, 100])
    arguments.add_argument("--processes", type=int, default=2)
    given = arguments.parse_args()
    cases = list(itertools.product(given.targets, KERNELS, DTYPES, DTYPES))
    kinds: dict[str, list[str]] = defaultdict(list)
    with ProcessPoolExecutor(given.processes) as pool:
        for label, differences in pool.map(check, cases, chunksize=3):
            if differences:
                kinds[label.rsplit(" ", 1)[0]].append(f"{label}: " + "; ".join(differences))
    for kind, examples in kinds.items():
        print(f"{kind}: {len(examples)} of 9 pairs of dtypes")
        for example in examples:
            print(f"  {example}")
    print(f"{len(cases)} cases, of which {sum(map(len, kinds.values()))} depend on the path")


if __name__ == "__main__":
    main()
