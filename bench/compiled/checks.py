"""Compiled kernels against their specification, without a GPU: the PTX of each target runs on the emulator, and
`adamw_triton_kernels.reference` says what must come out.

    python check_kernels.py [--quick] [--targets 75 80 90 100] [--processes 2]

For every target, pair of dtypes, alignment and kernel:

- ordinary: some steps on tensors of many sizes, each from the specification's state of the step before; ulps of
  weights and 32-bit state, codes and scales of 8-bit state
- same bits: once more with other CTAs together, in the reverse order, and with chunks of several tiles
- bounds: every access inside the launch's own tensors and aligned (else the emulator stops), and nothing else changed
- races: between CTAs, and between threads that no barrier separates, in global and shared memory
- noise: with the approximate instructions off by as much as the manual allows
- adversarial: zeros, NaN, infinities, subnormals, huge numbers, eps=0 in every combination
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.compiled.adversarial import check_adversarial
from bench.compiled.problems import (
    KERNELS,
    NUMELS,
    Kernel,
    Problem,
    distance,
    ordinary,
    set_gradients,
)
from bench.compiled.session import compiled

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LIMITS = {"state": 4.0, "weight": 8.0}
"""Ulps, as tests/kernels/test_against_reference.py allows a GPU."""
SHARE = 1e-3
"""Of codes, and of 16-bit weights, that may be rounded the other way."""


@dataclass
class Report:
    """What one case showed: the worst of each figure, and disagreements in words."""

    figures: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)
    """Kind -> example: races that are none, and differences on extreme inputs of which the cause is known."""
    explained: Counter[str] = field(default_factory=Counter)
    opcodes: Counter[str] = field(default_factory=Counter)

    def worst(self, name: str, value: float) -> None:
        self.figures[name] = max(self.figures.get(name, 0.0), value)

    def require(self, condition: bool, message: str) -> None:
        if not condition:
            self.problems.append(message)


@dataclass(frozen=True)
class Case:
    capability: int
    kernel: str
    param: str
    grad: str
    aligned: bool

    def __str__(self) -> str:
        return f"sm_{self.capability} {self.kernel} {self.param}/{self.grad}{'' if self.aligned else ' misaligned'}"


# --- comparisons ------------------------------------------------------------------------------------


def compare(ours: Problem, theirs: Problem, before: Problem, report: Report, label: str) -> None:
    """After one step from the same state."""
    hyper = theirs.hyper
    scale = torch.cat(
        [hyper[row, 0].expand(n) for row, n in zip(theirs.layout.rows, theirs.layout.numels, strict=True)]
    )
    g = torch.cat([grad.float() for grad in theirs.grads]) * scale
    p, q, old = (torch.cat(problem.params) for problem in (ours, theirs, before))
    change = 2 * (q.float() - old.float())
    apart = distance(p, q, old, change)
    report.worst(f"{label}: weight, ulps", float(apart.max()))
    if p.dtype == torch.float32:
        report.require(
            float(apart.max()) <= LIMITS["weight"], f"{label}: weights {float(apart.max()):.1f} ulps apart"
        )
    else:
        share = float((apart > 0).float().mean())
        report.worst(f"{label}: weights rounded the other way", share)
        report.require(
            float(apart.max()) <= 1 and share <= SHARE,
            f"{label}: weights {float(apart.max())} ulps, {share:.2%}",
        )
    if theirs.kernel.block:
        compare_codes(ours, theirs, report, label)
        return
    took_part = {"exp_avg": g, "exp_avg_sq": g * g, "max_exp_avg_sq": g * g}
    for name in theirs.state:
        a, b, o = (problem.of_tensors(problem.state[name]) for problem in (ours, theirs, before))
        apart = distance(a, b, o, took_part[name])
        report.worst(f"{label}: {name}, ulps", float(apart.max()))
        report.require(
            float(apart.max()) <= LIMITS["state"], f"{label}: {name} {float(apart.max()):.1f} ulps apart"
        )


def compare_codes(ours: Problem, theirs: Problem, report: Report, label: str) -> None:
    block = theirs.kernel.block
    whole = {name: (ours.state[name].float(), theirs.state[name].float()) for name in theirs.state}
    codes = {name: (a - b).abs().view(-1, block) for name, (a, b) in whole.items() if name.endswith("codes")}
    # m is stored relative to the decoded v: where a code of v differs, its block's m may.
    comparable = codes["exp_avg_sq_codes"].amax(1) == 0
    for name, apart in codes.items():
        rows = comparable if name == "exp_avg_codes" else slice(None)
        share = float((apart != 0).float().mean())
        report.worst(f"{label}: {name} that differ", share)
        report.worst(f"{label}: {name}, by", float(apart[rows].max()))
        report.require(
            float(apart[rows].max()) <= 1 and share <= SHARE,
            f"{label}: {name} {float(apart.max())}, {share:.3%}",
        )
    for name in ("exp_avg_sq_scales", "exp_avg_scales"):
        rows = comparable if name == "exp_avg_scales" else slice(None)
        a, b = (array[rows] for array in (ours.state[name], theirs.state[name]))
        different = int((a != b).sum())
        report.worst(f"{label}: {name} that differ", different / max(1, len(a)))
        report.require(
            float(distance(a, b).max()) <= 1, f"{label}: {name} {float(distance(a, b).max())} ulps apart"
        )


# --- the parts of a check ---------------------------------------------------------------------------


def check_ordinary(case: Case, kernel: Kernel, report: Report, steps: int, again: bool) -> None:
    pair = DTYPES[case.param], DTYPES[case.grad]
    expected = ordinary(kernel, *pair, case.aligned)
    for step in range(1, steps + 1):
        set_gradients(expected, step)
        before, ours = expected.copy(), expected.copy()
        expected.step_in_torch()
        with compiled(case.capability) as session:
            ours.step_compiled()
        report.opcodes.update(session.executed)
        compare(ours, expected, before, report, "ordinary")
        report.require(ours.untouched(before), "ordinary: memory outside the tensors has changed")
        if again and step == 2:
            for max_chunks, settings in ((None, {"together": 5, "backwards": True}), (4, {})):
                other = before.copy(max_chunks)
                with compiled(case.capability, **settings):
                    other.step_compiled()
                same = all(map(torch.equal, other.bits(), ours.bits()))
                report.require(same, f"same bits: others with {settings or f'{max_chunks} chunks'}")


def check_races(case: Case, kernel: Kernel, report: Report) -> None:
    problem = ordinary(kernel, DTYPES[case.param], DTYPES[case.grad], case.aligned, (1, 129, 2047, 4097))
    set_gradients(problem, 1)
    with compiled(case.capability, races=True, together=4) as session:
        problem.step_compiled()
    for kind, example in session.conflicts().items():
        if "harmless" in kind:
            report.notes[f"races: {kind}"] = example
        else:
            report.problems.append(f"races: {kind}, e.g. {example}")


def check_noise(case: Case, kernel: Kernel, report: Report) -> None:
    expected = ordinary(kernel, DTYPES[case.param], DTYPES[case.grad], case.aligned)
    for step, noise in enumerate((-1, 1, "random"), 1):
        set_gradients(expected, step)
        before, ours = expected.copy(), expected.copy()
        expected.step_in_torch()
        with compiled(case.capability, noise=noise):
            ours.step_compiled()
        compare(ours, expected, before, report, "noise")


def check_full_scale(case: Case, kernel: Kernel, report: Report) -> None:
    """Elements as large as their scale, of every bf16 mantissa: code 256 would be stored as 0. With beta2 = 1 decoded
    and encoded again they stay what they are."""
    mantissas = torch.arange(0x3F80, 0x4000, dtype=torch.int16).view(torch.bfloat16)
    numel = len(mantissas) * kernel.block
    for noise in (0.0, -1.0, 1.0, "random"):
        problem = Problem.of(
            kernel, DTYPES[case.param], DTYPES[case.grad], torch.zeros(1, 8), (numel,), rows=1
        )
        problem.hyper[0, 0], problem.hyper[0, 3], problem.hyper[0, 4] = 1.0, 1.0, 1e-8
        problem.state["exp_avg_sq_codes"][:] = 255
        problem.state["exp_avg_sq_codes"][1::2] = 254
        problem.state["exp_avg_sq_scales"][: len(mantissas)] = mantissas
        with compiled(case.capability, noise=noise):
            problem.step_compiled()
        codes = problem.state["exp_avg_sq_codes"].view(-1, kernel.block)
        kept = problem.state["exp_avg_sq_scales"][: len(mantissas)] == mantissas
        report.worst("full scale: blocks that kept their scale", float(kept.float().mean()))
        lowest, highest = codes[kept][:, 0::2].min(), codes[:, 0::2].max()
        report.require(
            int(lowest) >= 253 and int(highest) <= 255,
            f"full scale, noise {noise}: codes {lowest}...{highest}",
        )


# --- all of it --------------------------------------------------------------------------------------


def check(case: Case, quick: bool) -> tuple[Case, Report, float]:
    """In a process of its own."""
    torch.set_num_threads(1)
    begin = time.perf_counter()
    report, kernel = Report(), KERNELS[case.kernel]
    try:
        check_ordinary(case, kernel, report, 2 if quick else 3, again=True)
        check_races(case, kernel, report)
        if case.aligned:
            if case.param == case.grad:
                check_noise(case, kernel, report)
                if kernel.block:
                    check_full_scale(case, kernel, report)
            for eps, step, flush in ((1e-8, 1, True), (0.0, 1000, True), (0.0, 1000, False)):
                if not flush and case.param != case.grad:
                    continue
                problems, explained, examples = check_adversarial(
                    case.capability, kernel, DTYPES[case.param], DTYPES[case.grad], eps, step, LIMITS, flush
                )
                report.problems += [problem if flush else f"without .ftz, {problem}" for problem in problems]
                for key, count in explained.items() if flush else ():
                    report.explained[f"eps={eps:g} {key}"] += count
                    report.notes.setdefault(f"eps={eps:g} {key}", examples[key])
    except Exception as error:  # an access outside, an unknown opcode: a finding too
        notes = "; ".join(getattr(error, "__notes__", []))
        report.problems.append(f"stopped: {type(error).__name__}: {error} ({notes})")
    return case, report, time.perf_counter() - begin


def cases(targets: list[int], quick: bool) -> list[Case]:
    pairs = list(itertools.product(DTYPES, repeat=2))
    if quick:
        pairs = [("bf16", "bf16"), ("fp32", "fp16")]
    return [
        Case(capability, kernel, *pair, aligned)
        for capability, kernel, pair, aligned in itertools.product(targets, KERNELS, pairs, (True, False))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="two targets and two pairs of dtypes: about a minute"
    )
    parser.add_argument("--targets", type=int, nargs="+")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write everything there")
    given = parser.parse_args()
    targets = given.targets or ([75, 90] if given.quick else [75, 80, 90, 100])
    begin = time.perf_counter()
    worst: dict[str, dict[str, float]] = {name: {} for name in KERNELS}
    found: dict[str, list[str]] = {}
    notes: dict[str, str] = {}
    explained: dict[str, Counter[str]] = {name: Counter() for name in KERNELS}
    everything: dict[str, Any] = {}
    opcodes: Counter[str] = Counter()
    todo = cases(targets, given.quick)
    with ProcessPoolExecutor(given.processes) as pool:
        for done, future in enumerate(
            as_completed([pool.submit(check, case, given.quick) for case in todo]), 1
        ):
            case, report, seconds = future.result()
            everything[str(case)] = {
                "figures": report.figures,
                "problems": report.problems,
                "notes": report.notes,
                "seconds": seconds,
            }
            opcodes.update(report.opcodes)
            for name, value in report.figures.items():
                worst[case.kernel][name] = max(worst[case.kernel].get(name, 0.0), value)
            for problem in report.problems:
                kind = problem.split(", e.g.")[0]
                found.setdefault(kind, []).append(f"{case}: {problem}")
            for key, example in report.notes.items():
                notes.setdefault(f"{case.kernel}: {key}", f"{case}: {example}")
            explained[case.kernel].update(report.explained)
            if done % 24 == 0:
                print(f"  {done} of {len(todo)} cases, {time.perf_counter() - begin:.0f} s", flush=True)
    for name, figures in worst.items():
        print(f"\n{name}: the worst of all targets, dtypes and alignments")
        for figure, value in sorted(figures.items()):
            print(f"  {figure:58} {value:.4g}")
    print(
        f"\n{len(NUMELS)} tensors a launch; {len(todo)} cases; {time.perf_counter() - begin:.0f} s; sizes {NUMELS}"
    )
    print(f"\n{sum(map(len, found.values()))} disagreements of {len(found)} kinds")
    for examples in found.values():
        print(f"- {len(examples)} cases: {examples[0][:900]}")
    print(f"\n{len(notes)} kinds of differences with a known cause, and harmless races (one example of each)")
    for key, example in sorted(notes.items()):
        kernel, kind = key.split(": ", 1)
        count = explained[kernel].get(kind)
        print(f"- {key}{f', {count} elements' if count else ''}: {example[:500]}")
    if given.json:
        given.json.write_text(json.dumps({"cases": everything, "opcodes": opcodes}, indent=1))


if __name__ == "__main__":
    main()
