"""Which way state goes: as it was named, or under "auto" the faster one of four measured steps."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adamw_triton.choices import TRANSFERS
from adamw_triton.paging.device import Device
from adamw_triton.paging.transfer import COPY, ZERO_COPY, Choice

TRIALS = [COPY, COPY, ZERO_COPY, ZERO_COPY]


class Clock:
    """A device that knows only how long each step took, and may be asked only about a step that ran."""

    def __init__(self, seconds: Sequence[float]) -> None:
        self.table = seconds
        self.asked: list[int] = []

    def seconds(self, begin: tuple[str, int], end: tuple[str, int]) -> float:
        assert begin == ("begin", end[1])
        assert end == ("end", begin[1])
        self.asked.append(begin[1])
        return self.table[begin[1]]


class Steps:
    """The steps of a run, one after the other; ``seconds`` and ``nbytes`` of each."""

    def __init__(self, transfer: str, seconds: Sequence[float] = (), nbytes: Sequence[int] = ()) -> None:
        self.clock = Clock(seconds)
        self.choice = Choice(cast(Device, self.clock), transfer)
        self.nbytes = nbytes
        self.count = 0

    def take(self, steps: int, *, reachable: bool = True) -> list[str]:
        """The ways of the next steps."""
        return list(self._take(steps, reachable))

    def _take(self, steps: int, reachable: bool) -> Iterator[str]:
        for _ in range(steps):
            number = self.count
            self.count += 1
            way = self.choice.next(reachable)
            nbytes = self.nbytes[number] if number < len(self.nbytes) else 1000
            self.choice.ran(way, nbytes, ("begin", number), ("end", number))
            yield way


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """Level and text of what is logged."""
    caplog.set_level(logging.INFO, logger="adamw_triton")
    records: list[tuple[int, str]] = []
    monkeypatch.setattr(
        caplog.handler, "emit", lambda record: records.append((record.levelno, record.getMessage()))
    )
    return records


OUTCOMES: dict[str, tuple[list[float], list[int], str]] = {
    "copies are faster": ([9, 1, 9, 2], [1000] * 4, COPY),
    "zero-copy is faster": ([9, 2, 9, 1], [1000] * 4, ZERO_COPY),
    "the first time of each way does not count": ([0.1, 2, 9, 1], [1000] * 4, ZERO_COPY),
    "of zero-copy neither": ([9, 1, 0.1, 2], [1000] * 4, COPY),
    "more bytes in the same time": ([1, 1, 1, 1], [1000, 1000, 1000, 1001], ZERO_COPY),
    "more bytes in a longer time": ([1, 2, 1, 1], [1000, 3000, 1000, 1000], COPY),
    "steps too short for the clock": ([0, 0, 0, 0], [1000, 1000, 1000, 2000], ZERO_COPY),
}


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_auto_tries_both_ways_twice_and_stays_with_the_faster(outcome: str) -> None:
    seconds, nbytes, faster = OUTCOMES[outcome]
    steps = Steps("auto", seconds, nbytes)
    for way in TRIALS:
        assert not steps.choice.settled
        assert steps.take(1) == [way]
    assert steps.choice.settled
    assert steps.take(10) == [faster] * 10


@given(
    st.lists(st.floats(1e-4, 10), min_size=4, max_size=4),
    st.lists(st.integers(1, 10**12), min_size=4, max_size=4),
)
def test_the_higher_rate_wins(seconds: list[float], nbytes: list[int]) -> None:
    steps = Steps("auto", seconds, nbytes)
    steps.take(4)
    (way,) = steps.take(1)
    number = {COPY: 1, ZERO_COPY: 3}
    other = {COPY: ZERO_COPY, ZERO_COPY: COPY}[way]
    rates = {which: nbytes[step] / seconds[step] for which, step in number.items()}
    assert rates[way] >= rates[other]


def test_the_host_waits_for_measured_steps_only_and_when_they_are_over() -> None:
    """Asking how long a step took waits for its end: when the next begins, and four times in all."""
    steps = Steps("auto", [1.0] * 4)
    for number in range(8):
        steps.take(1)
        assert steps.clock.asked == list(range(min(number, 4)))


def test_the_outcome_is_told_once(told: list[tuple[int, str]]) -> None:
    steps = Steps("auto", [9, 0.5, 9, 0.25], [10**9, 10**9, 10**9, 3 * 10**9])
    steps.take(4)
    assert told == []
    steps.take(10)
    assert told == [
        (logging.INFO, "paged state: copy 2.0 GB/s, zero_copy 12.0 GB/s each way; zero_copy is used")
    ]


def test_a_step_that_did_not_run_is_no_trial() -> None:
    """Its staging buffers did not fit, say."""
    steps = Steps("auto", [9, 2, 9, 1])
    for way in (*TRIALS, ZERO_COPY):
        assert steps.choice.next(True) == way
        assert steps.choice.next(True) == way
        assert steps.take(1) == [way]


@pytest.mark.parametrize("transfer", [COPY, ZERO_COPY])
def test_named_ways_are_used_from_the_first_step_and_never_measured(
    transfer: str, told: list[tuple[int, str]]
) -> None:
    steps = Steps(transfer)
    assert steps.choice.settled
    assert steps.take(10) == [transfer] * 10
    assert steps.clock.asked == []
    assert told == []


def test_all_names_are_covered_here() -> None:
    assert set(TRANSFERS) == {"auto", COPY, ZERO_COPY}


WARNING = (logging.WARNING, "the GPU cannot reach this host memory itself: transfer='copy' is used")


@pytest.mark.parametrize(("transfer", "warnings"), [("auto", []), (COPY, []), (ZERO_COPY, [WARNING])])
def test_memory_out_of_reach_is_copied(
    transfer: str, warnings: list[Any], told: list[tuple[int, str]]
) -> None:
    """Whoever named the other way is told, once."""
    steps = Steps(transfer)
    assert steps.take(10, reachable=False) == [COPY] * 10
    assert steps.choice.settled
    assert told == warnings
    assert steps.clock.asked == []


@pytest.mark.parametrize("before", range(1, 5))
def test_memory_that_gets_out_of_reach_ends_the_trials(before: int, told: list[tuple[int, str]]) -> None:
    """A group came later whose state could not be pinned."""
    steps = Steps("auto", [9, 2, 9, 1])
    assert steps.take(before) == TRIALS[:before]
    assert steps.take(5, reachable=False) == [COPY] * 5
    assert steps.choice.settled


def test_memory_that_gets_out_of_reach_after_zero_copy_was_chosen(told: list[tuple[int, str]]) -> None:
    steps = Steps("auto", [9, 2, 9, 1])
    assert steps.take(6)[-2:] == [ZERO_COPY] * 2
    told.clear()
    assert steps.take(5, reachable=False) == [COPY] * 5
    assert told == [WARNING]
