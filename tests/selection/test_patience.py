"""How long a rank waits for others, whatever optimizers it has; by a clock that passes while it sleeps."""

from __future__ import annotations

import datetime

import pytest

from adamw_triton.selection import ranks
from tests.selection.test_ranks import MANY, Job, coming, groups, plan_for


class Clock:
    """Time that passes while somebody sleeps."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(ranks, "time", found)
    return found


def waits(job: Job, clock: Clock, monkeypatch: pytest.MonkeyPatch, order: str) -> list[float]:
    """Seconds that rank 0 waits at the first step of each of some optimizers: "a" it has alone, of "b" all
    others have come before, of "l" they have decided without it."""
    monkeypatch.setattr(ranks, "distributed", job)
    found = []
    for number, kind in enumerate(order, 1):
        asked, plan = groups((number, 2)), plan_for(MANY)
        first = plan.candidates
        for rank in range(1, job.world) if kind in "bl" else ():
            meeting = ranks._Meeting.of(asked, "settings", rank)
            meeting.come(ranks.Share("a", plan.host_room, (0,) * len(first), ("",) * len(first), rank))
        if kind == "l":
            meeting.decided(ranks.Outcome(("",) * len(first), (32, "nearest"), tuple(range(1, job.world))))
        begin = clock.now
        job.run({0: lambda asked=asked, plan=plan: ranks.agree(plan, asked, "settings")})  # type: ignore[misc]
        found.append(clock.now - begin)
    return found


@pytest.mark.parametrize("timeout", [4, 20, 1800])
@pytest.mark.parametrize("order", ["aaaaa", "a" * 700, "alalalala"], ids=["5", "700", "late in between"])
def test_however_many_a_rank_has_alone_it_waits_little_longer_than_for_one(
    order: str, timeout: int, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others may be in a collective all the while. That they went on without it is no sign that they come."""
    job = Job(3)
    job.store.set_timeout(datetime.timedelta(seconds=timeout))
    found = waits(job, clock, monkeypatch, order)
    patience = min(ranks.PATIENCE, timeout / 4)
    assert found[0] == pytest.approx(patience)
    assert sum(found) <= patience * 4 / 3 + 1e-6


def test_once_all_come_again_they_are_waited_for_as_before(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = waits(Job(3), clock, monkeypatch, "aabaaba")
    assert found == pytest.approx([10, 2.5, 0, 10, 2.5, 0, 10])


def test_ranks_wear_out_apart(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(2)
    waits(job, clock, monkeypatch, "aaa")
    begin = clock.now
    job.run({1: coming(job, monkeypatch, 0, MANY)})
    assert clock.now - begin == pytest.approx(10)
