"""What of a table is usual has what it promises."""

from __future__ import annotations

import itertools

import pytest

from tests import amount

TABLES = [("ab", range(5)), ("abc", "de", (True, False)), (range(4), range(3), range(2), range(2))]


@pytest.mark.parametrize("together", [1, 2, 3])
@pytest.mark.parametrize("table", TABLES)
def test_so_many_values_at_once_are_all_there(
    table: tuple[list[object], ...], together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(amount, "WHOLE", False)
    some = amount.some(*table, together=together)
    whole = list(itertools.product(*table))
    assert some == [case for case in whole if case in some]
    for columns in itertools.combinations(range(len(table)), min(together, len(table))):
        there = {tuple(case[column] for column in columns) for case in some}
        assert there == set(itertools.product(*(table[column] for column in columns)))
    assert (len(some) < len(whole)) == (together < len(table))
    monkeypatch.setattr(amount, "WHOLE", True)
    assert amount.some(*table, together=together) == whole


def test_what_is_left_over_is_spread_evenly() -> None:
    cases = {(edit, variant): {"edit": edit, "variant": variant} for edit in range(16) for variant in "abcd"}
    chosen = amount.covering(cases)
    assert len(chosen) == 16
    assert {sum(variant == each for _, variant in chosen) for each in "abcd"} == {4}


def test_examples_are_as_many_as_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    st = pytest.importorskip("hypothesis.strategies")
    seen: list[int] = []

    @amount.searched("OF_THIS_TEST", 30, 7, number=st.integers())
    def search(number: int) -> None:
        seen.append(number)

    for backend, asked, count in (("torch", "", 30), ("triton", "", 7), ("triton", "40", 40)):
        seen.clear()
        if asked:
            monkeypatch.setenv("ADAMW_TRITON_OF_THIS_TEST", asked)
        search(backend)
        assert len(seen) == count
