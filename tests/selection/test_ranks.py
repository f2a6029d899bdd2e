"""All ranks of a job choose the same, and the tightest wins."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import distributed

from adamw_triton import AdamW
from adamw_triton.memory import host as memory
from adamw_triton.selection import auto
from adamw_triton.selection.ranks import Share, merged
from tests.optimizer.problems import parameters, train

SHAPES = ((128, 128),) * 4


def test_what_fits_on_one_rank_alone_fits_on_none() -> None:
    shares = [
        Share("a", 100, (10, 20), ("", "")),
        Share("b", 100, (10, 20), ("needs 3 GiB more GPU memory", "")),
    ]
    assert merged(shares) == ["needs 3 GiB more GPU memory on rank 1", ""]


def test_ranks_of_one_machine_share_its_memory() -> None:
    """Each sees all of it as available."""
    shares = [Share("a", 100, (40, 60), ("", ""))] * 2
    assert merged(shares) == ["", "needs 20 B more host memory for the 2 ranks on a"]
    assert merged([*shares[:1], Share("b", 100, (40, 60), ("", ""))]) == ["", ""]


def test_the_smallest_figure_counts() -> None:
    shares = [Share("a", 100, (40,), ("",)), Share("a", 70, (40,), ("",))]
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


def test_one_process_asks_nobody() -> None:
    assert not distributed.is_initialized()
    optimizer = AdamW([torch.nn.Parameter(torch.ones(5000))])
    train(optimizer, 1)
    assert optimizer.plan is not None
