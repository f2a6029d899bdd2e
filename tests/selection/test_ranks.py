"""All ranks of a job choose the same, and the tightest wins."""

from __future__ import annotations

import datetime
import itertools
import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import distributed
from torch.nn import Parameter

from adamw_triton import AdamW
from adamw_triton.memory import host as memory
from adamw_triton.selection import auto, ranks
from adamw_triton.selection.auto import Auto
from adamw_triton.selection.plans import Limits, Plan
from adamw_triton.selection.ranks import Share, merged
from adamw_triton.selection.selector import Demand, Trained, select
from tests.optimizer.problems import parameters, train

SHAPES = ((128, 128),) * 4


def test_what_fits_on_one_rank_alone_fits_on_none() -> None:
    shares = [
        Share("a", 100, (10, 20), ("", ""), 0),
        Share("b", 100, (10, 20), ("needs 3 GiB more GPU memory", ""), 1),
    ]
    assert merged(shares) == ["needs 3 GiB more GPU memory on rank 1", ""]


def test_ranks_of_one_machine_share_its_memory() -> None:
    """Each sees all of it as available."""
    shares = [Share("a", 100, (40, 60), ("", ""), rank) for rank in range(2)]
    assert merged(shares) == ["", "needs 20 B more host memory for the 2 ranks on a"]
    assert merged([*shares[:1], Share("b", 100, (40, 60), ("", ""), 1)]) == ["", ""]


def test_the_smallest_figure_counts() -> None:
    shares = [Share("a", 100, (40,), ("",), 0), Share("a", 70, (40,), ("",), 1)]
    assert merged(shares) == ["needs 10 B more host memory for the 2 ranks on a"]


def work(rank: int, rendezvous: str, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    # Rank 1 may take enough for 8-bit state only.
    room = [1 << 40, 200_000][rank]
    auto.host_limit = lambda: memory.Limit(room, f"rank {rank}")  # type: ignore[attr-defined]
    socket.gethostname = lambda: f"machine {rank}"
    optimizer = AdamW(parameters(SHAPES))
    train(optimizer, 2)
    assert optimizer.plan is not None
    assert optimizer.plan.chosen is not None
    told = [optimizer.plan.chosen.name, optimizer.plan.candidates[0].obstacle]
    Path(folder, f"{rank}").write_text("\n".join(told))
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not distributed.is_available(), reason="torch without torch.distributed")
def test_two_processes_choose_what_fits_both(tmp_path: Path) -> None:
    rendezvous = f"file://{tmp_path / 'rendezvous'}"
    mp.spawn(work, (rendezvous, str(tmp_path)), nprocs=2)
    told = [(tmp_path / str(rank)).read_text().splitlines() for rank in range(2)]
    assert told[0] == ["8bit", "needs 316.7 KiB more host memory on rank 1"]
    assert told[1][0] == "8bit"


# Who waits for whom: ranks as threads, with the store of a process group


class Job:
    """torch.distributed as each of some threads sees it: nothing but ranks and a store."""

    def __init__(self, world: int, store: Any = None) -> None:
        self.world = world
        self.store = distributed.HashStore() if store is None else store
        self.distributed_c10d = self
        self._own = threading.local()

    def is_available(self) -> bool:
        return True

    is_initialized = is_available

    def get_world_size(self) -> int:
        return self.world

    def get_rank(self) -> int:
        return int(self._own.rank)

    def _get_default_store(self) -> Any:
        return self.store

    def run(self, ranks: Mapping[int, Callable[[], Any]]) -> dict[int, Any]:
        """What each found, or raised."""
        found: dict[int, Any] = {}

        def one(rank: int) -> None:
            self._own.rank = rank
            try:
                found[rank] = ranks[rank]()
            except RuntimeError as error:
                found[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr(ranks, "PATIENCE", 0.4)
    return 0.4


def groups(*shapes: tuple[int, ...]) -> list[dict[str, Any]]:
    return [{"params": [Parameter(torch.ones(shape)) for shape in shapes]}]


def plan_for(room: int) -> Plan:
    """Of a GPU with so many bytes for the state of 2**20 elements: 8 MiB in 32 bits, or 2."""
    limits = Limits("cuda:0", room, 1e12, 1e10, "known")
    return select([Demand(limits, [Trained(1 << 20, torch.bfloat16, 2)])], 1 << 40)


def coming(job: Job, monkeypatch: pytest.MonkeyPatch, delay: float, room: int, *shapes: Any) -> Any:
    monkeypatch.setattr(ranks, "distributed", job)
    asked = groups(*(shapes or ((4, 5), (7,))))

    def come() -> Plan:
        time.sleep(delay)
        return ranks.agree(plan_for(room), asked, "settings")[0]

    return come


MANY, SOME, FEW = 100 << 20, 3 << 20, 1 << 20


@pytest.mark.parametrize("seed", range(8))
def test_ranks_that_come_in_any_order_choose_what_fits_all(
    seed: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    choose = random.Random(seed)
    world = choose.randint(2, 6)
    rooms = [choose.choice((MANY, MANY, SOME, FEW)) for _ in range(world)]
    job = Job(world)
    found = job.run(
        {rank: coming(job, monkeypatch, choose.random() / 5, room) for rank, room in enumerate(rooms)}
    )
    expected = plan_for(min(rooms)).chosen
    assert expected is not None
    assert {plan.chosen.name for plan in found.values()} == {expected.name}
    assert caplog.records == []


def test_a_rank_alone_steps_in_time_and_says_so(
    patience: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    job = Job(3)
    begin = time.monotonic()
    (plan,) = job.run({1: coming(job, monkeypatch, 0, SOME)}).values()
    assert patience <= time.monotonic() - begin < 10 * patience
    assert plan.chosen.name == "8bit"
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("auto: of 3 ranks only 1 came to the first step of an optimizer like this one.")
    assert "variant='32bit'" in line


@pytest.mark.parametrize("seconds", [0.2, 1.2])
def test_nobody_waits_longer_than_others_in_a_collective_can(
    seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quarter of what the process group allows."""
    job = Job(2)
    job.store.set_timeout(datetime.timedelta(seconds=seconds))
    begin = time.monotonic()
    job.run({0: coming(job, monkeypatch, 0, SOME)})
    assert time.monotonic() - begin < seconds / 4 + 0.25


@pytest.mark.parametrize(("first", "late"), list(itertools.product((MANY, SOME, FEW), repeat=2)))
def test_who_comes_late_keeps_to_the_bits_or_says_why_not(
    first: int, late: int, patience: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(3)
    rooms = {0: coming(job, monkeypatch, 0, first), 2: coming(job, monkeypatch, 2 * patience, late)}
    found = job.run(rooms)
    assert found[2].chosen.bits == found[0].chosen.bits
    if found[2].chosen.bits != plan_for(late).chosen.bits:  # type: ignore[union-attr]
        kept = plan_for(first).chosen
        assert kept is not None
        assert f"rank 0 chose {kept.bits}-bit state before rank 2 came" in found[2].summary() + str(found[2])


def test_a_late_rank_that_cannot_follow_names_the_way_out(
    patience: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU there is no paging, and 32 bits do not fit."""
    job = Job(2)
    late = coming(job, monkeypatch, 2 * patience, FEW)
    monkeypatch.setattr(sys.modules[__name__], "plan_for", on_cpu)
    error = job.run({0: coming(job, monkeypatch, 0, MANY), 1: late})[1]
    assert isinstance(error, RuntimeError)
    assert "rank 0 chose 32-bit state before rank 1 came" in str(error)
    assert "32bit needs" in str(error)
    assert "variant='32bit'" in str(error)


def on_cpu(room: int) -> Plan:
    limits = Limits("cpu", 1 << 50, 1e11, 1e11, "known", shared=True)
    return select([Demand(limits, [Trained(1 << 20, torch.bfloat16, 2)])], 4 * room)


def test_optimizers_that_differ_are_decided_apart_and_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 steps the large one first, rank 1 the small one."""
    job = Job(2)

    def both(*order: tuple[tuple[int, ...], int]) -> Callable[[], dict[Any, str]]:
        acts = [(shape, coming(job, monkeypatch, 0, room, shape)) for shape, room in order]
        return lambda: {shape: act().chosen.name for shape, act in acts}

    # Each waits in its first for the other's second, so it has to be decided before.
    monkeypatch.setattr(ranks, "PATIENCE", 0.2)
    found = job.run({0: both(((8, 8), MANY), ((2, 2), MANY)), 1: both(((2, 2), MANY), ((8, 8), MANY))})
    assert found[0] == found[1] == {(8, 8): "32bit", (2, 2): "32bit"}


def test_the_first_of_a_kind_goes_with_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A generator and a discriminator of one shape, say."""
    job = Job(2)

    def two(*rooms: int) -> Callable[[], list[str]]:
        acts = [coming(job, monkeypatch, 0, room) for room in rooms]
        return lambda: [act().chosen.name for act in acts]

    found = job.run({0: two(MANY, SOME), 1: two(SOME, MANY)})
    assert found == {0: ["8bit", "8bit"], 1: ["8bit", "8bit"]}
    found = job.run({0: two(MANY), 1: two(MANY)})
    assert found == {0: ["32bit"], 1: ["32bit"]}


def test_shards_of_one_model_look_alike() -> None:
    """FSDP's flat ones have any length, or none; everything else has to be the same."""
    looks = [ranks._look(Parameter(torch.ones(shape))) for shape in ((0,), (7,), (3, 4), (4, 3))]
    assert looks[0] == looks[1] != looks[2] != looks[3]
    assert ranks._look(Parameter(torch.ones(7, dtype=torch.bfloat16))) != looks[1]
    assert ranks._look(torch.nn.parameter.UninitializedParameter()) == ("torch.float32", None)


class Broken:
    """A store whose server is gone."""

    def add(self, *arguments: Any) -> int:
        raise RuntimeError("Connection reset by peer")


@pytest.mark.parametrize("store", [Broken(), object()], ids=["gone", "none"])
def test_where_nobody_can_be_asked_a_rank_decides_alone_and_says_so(
    store: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    job = Job(2, store)
    (plan,) = job.run({0: coming(job, monkeypatch, 0, MANY)}).values()
    assert plan.chosen.name == "32bit"
    (line,) = [record.getMessage() for record in caplog.records]
    assert "could not ask the others and decides alone" in line
    assert "variant='32bit'" in line


def test_what_ranks_agreed_on_is_kept_to_by_one_that_runs_out_of_memory() -> None:
    """Other bits would part the replicas: only the place may be another."""
    chooser = Auto(None, 128)
    chooser.plan, chooser._agreed = plan_for(MANY), True
    seen = []
    while chooser.retreat():
        assert chooser.plan.chosen is not None
        seen.append(chooser.plan.chosen.name)
    assert seen == ["32bit, partly paged", "32bit, paged"]


# Processes


def alone(rank: int, rendezvous: str, folder: str) -> None:
    """Rank 1 has a collective of its own meanwhile, and then goes without a word."""
    wait = datetime.timedelta(seconds=12)
    distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2, timeout=wait)
    total = torch.ones(3)
    if rank == 0:
        train(AdamW(parameters(SHAPES)), 2)
    distributed.all_reduce(total)
    assert total.tolist() == [2, 2, 2]
    Path(folder, str(rank)).write_text("right")
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    train(AdamW(parameters(((4, 4),))), 1)
    Path(folder, "0").write_text("right without rank 1")


@pytest.mark.slow
@pytest.mark.skipif(not distributed.is_available(), reason="torch without torch.distributed")
def test_a_rank_steps_alone_beside_anothers_collective_and_after_its_end(tmp_path: Path) -> None:
    rendezvous = f"file://{tmp_path / 'rendezvous'}"
    context = mp.get_context("spawn")
    ranks_ = [context.Process(target=alone, args=(rank, rendezvous, str(tmp_path))) for rank in range(2)]
    for process in ranks_:
        process.start()
    for process in ranks_:
        process.join(120)
    assert [process.exitcode for process in ranks_] == [0, -signal.SIGKILL]
    assert (tmp_path / "1").read_text() == "right"
    assert (tmp_path / "0").read_text() == "right without rank 1"


def test_one_process_asks_nobody() -> None:
    assert not distributed.is_initialized()
    optimizer = AdamW([torch.nn.Parameter(torch.ones(5000))])
    train(optimizer, 1)
    assert optimizer.plan is not None
