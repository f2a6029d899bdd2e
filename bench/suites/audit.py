"""`python -m bench audit`: compile every kernel for every target, and hold the machine code to the goals.

Compiled, not run: no GPU is needed and none is used, so the figures are the same on every machine
with the same Triton. What is counted, and on which path, is defined in `bench.machine_code`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

from rich.progress import track
from triton import knobs

from bench import report
from bench.compiled import work
from bench.machine_code import report as audit_report
from bench.machine_code.account import TARGETS, Account, account, compile_for
from bench.machine_code.cases import Case, Row
from bench.machine_code.disassembly import Access
from bench.machine_code.kernels import DTYPES, KERNELS

RESULTS = report.RESULTS / "aot"
PAIRS = [("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "bf16")]
GOAL_TARGET, GOAL_PAIRS = "sm_90", (("bf16", "bf16"), ("fp16", "fp16"))
QUICK_TARGETS, QUICK_PAIRS = ["sm_90", "gfx942"], [GOAL_PAIRS[0]]
WIDEST = 128  # bits that one thread moves with one instruction


def cases(pairs: Sequence[tuple[str, str]] = PAIRS, targets: Sequence[str] = tuple(TARGETS)) -> list[Case]:
    """Every kernel with every pair of types that it has, for every target."""
    return [
        Case(name, params, grads, target)
        for target in targets
        for name, kernel in KERNELS.items()
        for params, grads in pairs
        if params in kernel.params
    ]


def audit(case: Case) -> Row:
    """Compile one case and judge it."""
    kernel = KERNELS[case.kernel]
    param, grad = DTYPES[case.params], DTYPES[case.grads]
    row = Row(case, kernel.judged, to_move=kernel.moves(param, grad))
    at_goal = case.target == GOAL_TARGET and (case.params, case.grads) in GOAL_PAIRS
    try:
        counted = count(case)
        goal = kernel.goal
        if at_goal and kernel.beside:
            goal = count(replace(case, kernel=kernel.beside)).per_element + kernel.more
    except Exception as error:  # whatever a compiler throws: the row says it, and the others go on
        reason = str(error).strip().splitlines() or [""]
        return replace(row, failure=f"{type(error).__name__}: {reason[0]}")
    row = replace(row, account=counted)
    if not kernel.judged:
        return row
    bits = [8 * dtype.itemsize for dtype in (param, *kernel.state)]
    wanted = widest_accesses(bits, [*bits, 8 * grad.itemsize], counted.elements // counted.threads)
    return replace(row, misses=tuple(_misses(counted, goal if at_goal else None, wanted)))


def count(case: Case) -> Account:
    """Of its hot path."""
    source = KERNELS[case.kernel].build(DTYPES[case.params], DTYPES[case.grads])
    options = source.options(TARGETS[case.target].warp_size)
    compiled = compile_for(
        source.fn, source.signature, source.constexprs, source.attrs, case.target, **options
    )
    return account(compiled, source.tile)


def widest_accesses(stored: Sequence[int], loaded: Sequence[int], per_thread: int) -> Counter[Access]:
    """The accesses of one thread that moves `per_thread` elements of each array, by bits per element."""
    accesses: Counter[Access] = Counter()
    for kind, arrays in (("load", loaded), ("store", stored)):
        for bits in arrays:
            width = min(WIDEST, bits * per_thread)
            accesses[kind, width] += bits * per_thread // width
    return accesses


def _misses(counted: Account, goal: float | None, wanted: Mapping[Access, int]) -> Iterator[str]:
    if goal is not None and counted.per_element > goal:
        yield f"{counted.per_element:.1f} instructions/element, goal {goal:.3g}"
    if counted.spills or counted.stack_bytes or counted.spilled_registers:
        yield f"spills: {sum(counted.spills.values())} accesses, stack of {counted.stack_bytes} B"
    for kind, width in sorted(wanted):
        has, should = (_bits_at_least(accesses, kind, width) for accesses in (counted.accesses, wanted))
        if has < should:
            yield f"narrow: {has} of {should} bits per thread in {kind}s of {width} bits or more"
    yield from counted.flags


def _bits_at_least(accesses: Mapping[Access, int], kind: str, width: int) -> int:
    return sum(bits * count for (of, bits), count in accesses.items() if of == kind and bits >= width)


def main(argv: Sequence[str] | None = None) -> int:
    """Audit, print, write; 1 if a goal is missed."""
    parser = argparse.ArgumentParser(prog="python -m bench audit", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="bf16 on sm_90 and gfx942; written only with --out"
    )
    parser.add_argument("--out", type=Path, help=f"folder for audit.json and audit.md (default: {RESULTS})")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    arguments = parser.parse_args(argv)
    if knobs.runtime.interpret:
        # Decorated under the interpreter, the kernels are plain Python and nothing can be compiled.
        print("TRITON_INTERPRET is set: unset it to compile ahead of time.", file=sys.stderr)
        return 2
    chosen = cases(QUICK_PAIRS, QUICK_TARGETS) if arguments.quick else cases()
    console = report.console()
    # Not forked: the compilers keep threads.
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        rows = list(track(pool.map(audit, chosen), "compiling", total=len(chosen), console=console))
    counted = list(work.count())
    audit_report.show(rows, console, counted)
    out = arguments.out or (None if arguments.quick else RESULTS)
    if out is not None:
        audit_report.write(rows, out, counted)
        console.print(f"written to {out}")
    return int(any(row.missed for row in rows))


if __name__ == "__main__":
    sys.exit(main())
