"""A compiled kernel against its specification, `adamw_triton_kernels.reference`, on the emulator.

- ordinary: some steps on tensors of many sizes, each from the specification's state of the step before: ulps
  of weights and 32-bit state, codes and scales of 8-bit state
- same bits: once more with other CTAs together, in the reverse order, and with chunks of several tiles
- bounds: every access within the step's own tensors, and aligned, and nothing else changed
- skipped: with factors that say so, nothing changes
- told: with statistics the same bits of all else, and sums as the specification's; also of a skipped step and
  of gradients that are not finite
- races: between CTAs, and between threads that no barrier separates, in global and shared memory
- paths: the same bits from whole tiles and masked tails, from the builds for aligned and misaligned memory
- noise: with the approximate instructions off by as much as the manual allows
- full scale: elements as large as their scale
- adversarial: see `bench.compiled.adversarial`
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adamw_triton_kernels.work import SKIP
from bench.compiled.adversarial import check_adversarial
from bench.compiled.comparison import Report, compare, compare_sums
from bench.compiled.problems import KERNELS, Kernel, Problem, hypers, ordinary, set_gradients
from bench.suite import DTYPES

CAPABILITIES = (75, 80, 86, 89, 90, 100, 120)
QUICK_PAIRS = (("bf16", "bf16"), ("fp32", "fp16"))


@dataclass(frozen=True)
class Case:
    """One build for one target. Names only, so that it travels between processes."""

    capability: int
    kernel: str
    param: str
    grad: str
    aligned: bool

    def __str__(self) -> str:
        place = "" if self.aligned else " misaligned"
        return f"sm_{self.capability} {self.kernel} {self.param}/{self.grad}{place}"

    @property
    def of(self) -> tuple[Kernel, torch.dtype, torch.dtype]:
        """Kernel, dtypes of parameters and gradients."""
        return KERNELS[self.kernel], DTYPES[self.param], DTYPES[self.grad]


def cases(capabilities: Sequence[int], pairs: Sequence[tuple[str, str]] | None = None) -> list[Case]:
    """Every kernel with what it has of these pairs of dtypes, or with all, for aligned memory and not."""
    return [
        Case(capability, kernel.name, *pair, aligned)
        for capability, kernel in itertools.product(capabilities, KERNELS.values())
        for pair, aligned in itertools.product(_pairs(kernel, pairs), (True, False))
    ]


def _pairs(kernel: Kernel, pairs: Sequence[tuple[str, str]] | None) -> list[tuple[str, str]]:
    """If it has none of these, one that it has."""
    chosen = itertools.product(DTYPES, repeat=2) if pairs is None else pairs
    return [pair for pair in chosen if pair[0] in kernel.params] or [(kernel.params[0], kernel.params[0])]


def check_ordinary(case: Case, report: Report, steps: int) -> None:
    expected = ordinary(*case.of, case.aligned)
    for step in range(1, steps + 1):
        set_gradients(expected, step)
        before, ours = expected.copy(), expected.copy()
        expected.step_in_torch()
        session = ours.step_compiled(case.capability)
        report.opcodes.update(session.executed)
        compare(ours, expected, before, report, "ordinary")
        report.require(ours.untouched(before), "bounds: memory outside the tensors has changed")
        if step == 2:
            for max_chunks, settings in ((None, {"together": 5, "backwards": True}), (4, {})):
                other = before.copy(max_chunks)
                other.step_compiled(case.capability, **settings)
                how = settings or f"{max_chunks} chunks"
                report.require(other.same_bits(ours), f"same bits: others with {how}")
            skipped = before.copy()
            skipped.factors = torch.full((len(skipped.params),), SKIP)
            skipped.step_compiled(case.capability)
            report.require(skipped.same_bits(before), "skipped: something has changed")


def check_told(case: Case, report: Report) -> None:
    expected = ordinary(*case.of, case.aligned)
    set_gradients(expected, 1)
    expected.step_in_torch()
    set_gradients(expected, 2)
    before, plain, ours = expected.copy(), expected.copy(), expected.copy().tell()
    session = ours.step_compiled(case.capability, races=True)
    races = [kind for kind in session.conflicts() if "harmless" not in kind]
    report.require(not races, f"told: races: {races}")
    plain.step_compiled(case.capability)
    report.require(ours.same_bits(plain), "told: not the bits of a step without statistics")
    expected.tell().step_in_torch()
    compare_sums(ours, expected, report, "told")
    several = before.copy(4).tell()
    several.step_compiled(case.capability, together=5, backwards=True)
    compare_sums(several, expected, report, "told, 4 chunks")
    for factor in (None, SKIP):
        ours, theirs = expected.copy().tell(), expected.copy().tell()
        for problem in (ours, theirs):
            problem.grads[-1][5], problem.grads[-1][-1], problem.grads[-2][::7] = (
                math.nan,
                math.inf,
                -math.inf,
            )
            if factor is not None:
                problem.factors = torch.full((len(problem.params),), factor)
        ours.step_compiled(case.capability)
        theirs.step_in_torch()
        compare_sums(ours, theirs, report, "told, not finite" if factor is None else "told, skipped")
        report.require(factor is None or ours.same_bits(theirs), "told, skipped: something has changed")


def check_races(case: Case, report: Report) -> None:
    problem = ordinary(*case.of, case.aligned, (1, 129, 2047, 4097))
    set_gradients(problem, 1)
    session = problem.step_compiled(case.capability, races=True, together=4)
    for kind, example in session.conflicts().items():
        if "harmless" in kind:
            report.notes[f"races: {kind}"] = example
        else:
            report.problems.append(f"races: {kind}, e.g. {example}")


def check_paths(case: Case, report: Report) -> None:
    """A page or a chunk that ends elsewhere, or a tensor at another address, changes no result."""
    first = _after(case, True, True)
    for aligned, is_whole in ((True, False), (False, True), (False, False)):
        found = _after(case, aligned, is_whole)
        different = {name: int((array != first[name]).sum()) for name, array in found.items()}
        path = f"{'' if aligned else 'misaligned '}{'whole tile' if is_whole else 'tail'}"
        what = ", ".join(f"{count} of {name}" for name, count in different.items() if count)
        report.require(not what, f"paths: {path}: {what} differ from those of an aligned whole tile")


def _after(case: Case, aligned: bool, is_whole: bool) -> dict[str, Tensor]:
    """Weights and state of two steps of one tile, or of it without the last element; what both have of it."""
    kernel, param, grad = case.of
    numel = kernel.tile if is_whole else kernel.tile - 1
    problem = Problem.of(kernel, param, grad, hypers(1), (numel,), aligned, rows=1)
    generator = torch.Generator().manual_seed(4)
    problem.params[0].copy_(torch.randn(kernel.tile, generator=generator)[:numel])
    for step in (1, 2):
        problem.grads[0].copy_((torch.randn(kernel.tile, generator=generator) * 0.1)[:numel])
        problem.hyper = hypers(step)
        problem.step_compiled(case.capability)
    common = kernel.tile - (kernel.block or 1)  # the last block has other elements
    state = {name: array[: common // problem.per(name)] for name, array in problem.state.items()}
    return {"weight": problem.params[0][:common], **state}


def check_noise(case: Case, report: Report) -> None:
    expected = ordinary(*case.of, case.aligned)
    for step, noise in enumerate((-1, 1, "random"), 1):
        set_gradients(expected, step)
        before, ours = expected.copy(), expected.copy()
        expected.step_in_torch()
        ours.step_compiled(case.capability, noise=noise)
        compare(ours, expected, before, report, "noise")


def check_full_scale(case: Case, report: Report) -> None:
    """Elements as large as their scale, of every bf16 mantissa: code 256 would be stored as 0. With beta2 = 1
    decoded and encoded again they stay what they are."""
    kernel, param, grad = case.of
    mantissas = torch.arange(0x3F80, 0x4000, dtype=torch.int16).view(torch.bfloat16)
    for noise in (0.0, -1.0, 1.0, "random"):
        nothing = torch.zeros(1, 8)
        problem = Problem.of(kernel, param, grad, nothing, (len(mantissas) * kernel.block,), rows=1)
        problem.hyper[0, 0], problem.hyper[0, 3], problem.hyper[0, 4] = 1.0, 1.0, 1e-8
        problem.state["exp_avg_sq_codes"][:] = 255
        problem.state["exp_avg_sq_codes"][1::2] = 254
        problem.state["exp_avg_sq_scales"][: len(mantissas)] = mantissas
        problem.step_compiled(case.capability, noise=noise)
        codes = problem.state["exp_avg_sq_codes"].view(-1, kernel.block)
        kept = problem.state["exp_avg_sq_scales"][: len(mantissas)] == mantissas
        report.require(bool(noise) or bool(kept.all()), "full scale: a scale has changed without noise")
        lowest, highest = codes[kept][:, 0::2].min(), codes[:, 0::2].max()
        good = int(lowest) >= 253 and int(highest) <= 255
        report.require(good, f"full scale, noise {noise}: codes {lowest}...{highest}")


def check_extremes(case: Case, report: Report) -> None:
    for eps, step, flush in ((1e-8, 1, True), (0.0, 1000, True), (0.0, 1000, False)):
        if not flush and case.param != case.grad:
            continue
        problems, explained, examples = check_adversarial(case.capability, *case.of, eps, step, flush)
        report.problems += [problem if flush else f"without .ftz, {problem}" for problem in problems]
        for key, count in explained.items() if flush else ():
            report.explained[f"eps={eps:g} {key}"] += count
            report.notes.setdefault(f"eps={eps:g} {key}", examples[key])


def parts(case: Case, report: Report, quick: bool) -> Iterator[None]:
    """The parts that there are for a case, done one by one."""
    yield check_ordinary(case, report, 2 if quick else 3)
    yield check_races(case, report)
    if case.param == case.grad:
        yield check_told(case, report)
    if not case.aligned:
        return
    yield check_paths(case, report)
    yield check_extremes(case, report)
    if case.param == case.grad:
        yield check_noise(case, report)
        if case.of[0].block:
            yield check_full_scale(case, report)


def check(case: Case, quick: bool = False) -> Report:
    """All that there is to check of a case. What stops the emulator is a finding, too."""
    torch.set_num_threads(1)
    begin = time.perf_counter()
    report = Report()
    try:
        for _ in parts(case, report, quick):
            pass
    except Exception as error:
        notes = "; ".join(getattr(error, "__notes__", []))
        report.problems.append(f"stopped: {type(error).__name__}: {error} ({notes})")
    report.seconds = time.perf_counter() - begin
    return report
