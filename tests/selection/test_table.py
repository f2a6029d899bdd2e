"""A table fits the terminal, and a wide one puts what is said of a row beside it."""

from __future__ import annotations

import io
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import adamw_triton
from adamw_triton.selection.plans import Plan
from adamw_triton.selection.table import WIDTH, Table, fill

MODEL = [torch.nn.Parameter(torch.empty(3_000_000_000, dtype=torch.bfloat16, device="meta"))]
ASKED = [("T4", "25GiB"), ("H100", "8GiB"), ("RTX 4090", "1TiB"), ("100MiB", "0GiB"), (1 << 45, 1 << 45)]


def plans() -> list[Plan]:
    return [
        adamw_triton.plan(MODEL, gpu, host, activations="1GiB", tokens=2048, ranks=ranks)
        for gpu, host in ASKED
        for ranks in (1, 8)
    ]


def squeezed(text: str) -> str:
    return "".join(text.split())


def test_a_plan_as_text_fits_80_columns() -> None:
    for plan in plans():
        assert max(map(len, str(plan).splitlines())) <= WIDTH == 80
        assert squeezed(str(plan.limits[0])) in squeezed(str(plan))
        for line in str(plan).splitlines():
            assert not line.rstrip().endswith((" -", " =")), "what is taken goes with its sign"
            assert not line[-1:].isdigit() or line.lstrip()[:1] != "-", "a number goes with its unit"


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_rich_prints_it_as_wide_as_the_terminal(width: int) -> None:
    rich = pytest.importorskip("rich.console")
    for plan in plans():
        console = rich.Console(width=width, file=io.StringIO())
        console.print(plan)
        lines = console.file.getvalue().splitlines()
        assert max(map(len, lines)) <= max(width, 67), "the columns of the table do not wrap"
        (row,) = [line for line in lines if line.lstrip("→ ").startswith("8bit, paged ")]
        assert width < 200 or row.endswith(tuple(map(plan.reason, plan.candidates)))


def test_what_is_said_of_a_row_is_beside_it_where_there_is_room() -> None:
    table = Table("T", ("a", "b", ""), [("x", "1", "long enough"), ("yy", "22", "")], marked=0)
    assert table.text(24) == "T\n   a    b\n→  x    1  long enough\n   yy  22"
    assert table.text(20) == "T\n   a    b\n→  x    1\n       long enough\n   yy  22"


WORDS = ["1.5 GiB", "- 30.0 MiB", "= -2.0 B", "3 ms", "11.0 GB/s", "1 word", "word", "of", "a", "B"]


@given(st.lists(st.sampled_from(WORDS)), st.integers(20, 90))
def test_lines_are_no_longer_and_break_no_number_from_its_unit(words: list[str], width: int) -> None:
    text = " ".join(words)
    lines = fill(text, width, "  ").splitlines()
    assert " ".join(lines).split() == text.split()
    assert all(len(line) <= width for line in lines)
    for line, after in itertools.pairwise(lines):
        assert not (line[-1].isdigit() and after.split()[0] in ("GiB", "MiB", "B", "ms", "GB/s"))
        assert line.split()[-1] not in ("-", "=")
