"""One thing wrong in a compiled kernel, its launch or its tables: the emulator or the comparison finds it."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest

from adamw_triton_kernels import Hyper
from tests.compiling import in_compiling_process

KERNELS = ("32bit", "32bit amsgrad", "8bit 128", "8bit 256")
NUMELS = (4097, 1500, 2048)
CAPABILITY = 90
CHUNKS = 3
"""Several tiles to a program: a barrier may be there for the next tile's sake."""


def found(kernel: str, *, aligned: bool = True, **settings: Any) -> str:
    """What there is to say of a step: empty if nothing is wrong."""
    import torch

    from bench.compiled.comparison import Report, compare
    from bench.compiled.problems import KERNELS, ordinary, set_gradients
    from bench.ptx.memory import AccessError
    from bench.ptx.program import PtxError

    expected = ordinary(KERNELS[kernel], torch.bfloat16, torch.float32, aligned, NUMELS)
    for number in (1, 2):
        set_gradients(expected, number)
        before = expected.copy()
        expected.step_in_torch()
    ours, report = before.copy(CHUNKS), Report()
    try:
        session = ours.step_compiled(CAPABILITY, together=1, races=True, **settings)
    except (AccessError, PtxError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    races = [kind for kind in session.conflicts() if "harmless" not in kind]
    report.require(not races, f"races: {races}")
    report.require(ours.untouched(before), "memory outside the tensors has changed")
    compare(ours, expected, before, report, "results")
    return "; ".join(report.problems)


# --- In the code ---------------------------------------------------------------------------------------


def each_without(kernel: str, what: str, instead: str) -> list[str]:
    """The findings, once without each piece of the PTX that matches."""
    texts: list[str] = []
    assert found(kernel, edit=lambda ptx: texts.append(ptx) or ptx) == ""
    count = len(re.findall(what, texts[0]))

    def but(number: int) -> Callable[[str], str]:
        numbers = itertools.count()
        return lambda ptx: re.sub(what, lambda m: m.expand(instead) if next(numbers) == number else m[0], ptx)

    return [found(kernel, edit=but(number)) for number in range(count)]


ALL = [
    "32bit",
    "8bit 128",
    pytest.param("32bit amsgrad", marks=pytest.mark.slow),
    pytest.param("8bit 256", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("kernel", ALL)
def test_nothing_wrong(kernel: str) -> None:
    assert in_compiling_process(found, kernel) == ""


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_removed_mask(kernel: str) -> None:
    """Of each access alone. That of two stores is none: it has one of several threads store their number.
    That of a tail's first scales is always true."""
    findings = in_compiling_process(each_without, kernel, r"@%p\d+ ((?:ld|st)\.global)", r"\1")
    assert len(findings) > 10
    assert findings.count("") <= (4 if kernel.startswith("8bit") else 0), findings
    assert any("AccessError" in one and "outside" in one for one in findings)


@pytest.mark.parametrize("kernel", ALL)
def test_a_dropped_barrier(kernel: str) -> None:
    """Each alone."""
    findings = in_compiling_process(each_without, kernel, r"bar\.sync\s+0;", "")
    assert len(findings) >= 4
    assert all("no barrier between" in one for one in findings), findings


CHANGES = {
    "shfl.sync.bfly.b32": "shfl.sync.up.b32",
    "cvt.rmi": "cvt.rpi",
    "cvt.rn.f32.u32": "cvt.rn.f32.s32",
    "max.f32": "min.f32",
}


@pytest.mark.parametrize("instruction", CHANGES)
def test_another_instruction(instruction: str) -> None:
    """Everywhere: no peak of a block, other codes, signed codes."""
    finding = in_compiling_process(with_another, instruction)
    assert "results" in finding, finding


def with_another(instruction: str) -> str:
    def edit(ptx: str) -> str:
        assert instruction in ptx
        return ptx.replace(instruction, CHANGES[instruction])

    return found("8bit 128", edit=edit)


# --- In the launch -------------------------------------------------------------------------------------


def with_wrong_alignment(kernel: str) -> str:
    """The build for aligned memory, whatever the addresses are."""
    from bench.compiled.problems import KERNELS

    module = KERNELS[kernel].module
    build = module.build
    module.build = lambda *dtypes, aligned, **variant: build(*dtypes, aligned=True, **variant)
    try:
        return found(kernel, aligned=False)
    finally:
        module.build = build


@pytest.mark.parametrize("kernel", ALL)
def test_a_wrong_alignment_hint(kernel: str) -> None:
    finding = in_compiling_process(with_wrong_alignment, kernel)
    assert re.match("AccessError: load of (8|16) bytes at .*: misaligned, in grad 0", finding), finding


def with_each_pair_swapped(kernel: str) -> dict[tuple[str, str], str]:
    """The findings, by names of two arguments that have changed places."""
    from bench.compiled.problems import KERNELS

    def swap(i: int, j: int) -> Callable[[list[Any]], list[Any]]:
        def swapped(arguments: list[Any]) -> list[Any]:
            arguments = list(arguments)
            arguments[i], arguments[j] = arguments[j], arguments[i]
            return arguments

        return swapped

    given = KERNELS[kernel].module._kernel.arg_names
    names = [name for name in given if name == name.lower() and name != "left"]  # of statistics alone
    return {
        (names[i], names[j]): found(kernel, arguments=swap(i, j))
        for i, j in itertools.combinations(range(len(names)), 2)
    }


@pytest.mark.parametrize("kernel", ALL)
def test_two_arguments_swapped(kernel: str) -> None:
    """Every two."""
    findings = in_compiling_process(with_each_pair_swapped, kernel)
    # What is not read may be anything.
    same = {
        "32bit": {("exp_avg_sq", "max_exp_avg_sq"), ("exp_avg", "kept"), ("max_exp_avg_sq", "kept")},
        "32bit amsgrad": {("exp_avg", "kept")},
        "8bit 128": {("exp_avg_codes", "kept")},
        "8bit 256": {("exp_avg_codes", "kept")},
    }
    assert len(findings) == {"32bit": 55, "32bit amsgrad": 55}.get(kernel, 66)
    assert {pair for pair, finding in findings.items() if not finding} == same[kernel]


# --- In the tables -------------------------------------------------------------------------------------

COLUMNS = {
    "tensors": ("offset", "elements", "first", "row", "factor"),
    "chunks": ("tensor", "chunk"),
    "addresses": ("params", "grads"),
    "hyper": Hyper._fields,
    "factors": ("factor",),
}
UNUSED = {"32bit": {"tensors: first", "hyper: phase"}, "8bit 128": set[str]()}
"""A 32-bit state has no dither."""


def with_a_changed_column(kernel: str, change: str) -> dict[str, str]:
    """The findings, by column. ``change``: "stale": as of another layout or step; "next": one too far."""
    from bench.compiled.problems import KERNELS

    names = [name for name in KERNELS[kernel].module._kernel.arg_names if name == name.lower()]
    findings = {}
    for table, columns in COLUMNS.items():
        for number, column in enumerate(columns):
            if change == "next" and table in ("hyper", "factors"):
                continue

            change_it = functools.partial(_changed, names=names, table=table, column=number, change=change)
            findings[f"{table}: {column}"] = found(kernel, arguments=change_it)
    return findings


def _changed(arguments: list[Any], names: list[str], table: str, column: int, change: str) -> list[Any]:
    from bench.compiled.problems import hypers

    at = names.index(table)
    new = arguments[at].clone()
    place = new.view(2, -1)[column] if table == "addresses" else new.view(len(new), -1)[:, column]
    if table == "hyper":
        place.copy_((1.5 * hypers(7, eps=(0.1, 0.1)))[:, column])
    elif change == "stale":
        place.copy_(place.flip(0) if table == "chunks" else place.roll(1))
    else:
        place += ONE[table][column]
    return [*arguments[:at], new, *arguments[at + 1 :]]


ONE = {"tensors": (256, 1, 1, 1, 1), "chunks": (1, 1), "addresses": (2, 4)}
"""What one too far is: a block, a row, a bf16 parameter, an fp32 gradient."""


@pytest.mark.parametrize("change", ["stale", "next"])
@pytest.mark.parametrize("kernel", UNUSED)
def test_a_column_of_a_table_is_wrong(kernel: str, change: str) -> None:
    """Each alone: out of date, or one too far."""
    findings = in_compiling_process(with_a_changed_column, kernel, change)
    missed = {column for column, finding in findings.items() if not finding}
    assert missed == UNUSED[kernel] & set(findings), missed
