"""A rank dies, and the others end in bounded time; the last whole checkpoint loads on fewer ranks."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from adamw_triton import AdamW
from adamw_triton.memory import host as memory
from adamw_triton.selection import auto, ranks
from adamw_triton.state.shards import local
from adamw_triton.step.clipping import Clipping
from tests.distributed.ranks import context, together
from tests.distributed.training import whole
from tests.optimizer.problems import bits

WORLD = 3
PATIENCE = 12
"""Seconds that a collective may take; a decision waits for a quarter of it."""
BOUND = 3 * PATIENCE
"""Within which all must have ended, once a rank is dead."""


def sharded() -> nn.Module:
    """Shards of whole blocks on any number of ranks, if not of the same size."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 128))
    fully_shard(model)
    return model


def train(model: nn.Module, optimizer: AdamW, steps: range) -> None:
    for step in steps:
        inputs = torch.randn(4, 128, generator=torch.Generator().manual_seed(step))
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def save(model: nn.Module, optimizer: AdamW, folder: str) -> None:
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)


def contents(model: nn.Module, optimizer: AdamW) -> list[bytes]:
    """Of all ranks together."""
    tensors: list[Tensor] = [whole(param.detach()) for param in model.parameters()]
    for param in model.parameters():
        tensors += [whole(value) for _, value in sorted(optimizer.state[param].items())]
    return bits(tensors)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_a_step(model: nn.Module, optimizer: AdamW, folder: str, victim: bool) -> None:
    """The others wait for its part of the norm. They have not stepped then, nor are they halfway."""
    if victim:
        Clipping.begin = lambda _: die()  # type: ignore[method-assign]
    before = bits([local(param.detach()) for param in model.parameters()])
    try:
        train(model, optimizer, range(2, 3))
    finally:
        assert bits([local(param.detach()) for param in model.parameters()]) == before
        assert {float(entry["step"]) for entry in optimizer.state_dict()["state"].values()} == {2}


def in_a_save(model: nn.Module, optimizer: AdamW, folder: str, victim: bool) -> None:
    """Into another folder, half of which is written."""
    train(model, optimizer, range(2, 4))
    if victim:
        FileSystemWriter.finish = FileSystemWriter.write_data = lambda *_: die()  # type: ignore
    save(model, optimizer, f"{folder}/B")


def before_it_tells(model: nn.Module, optimizer: AdamW, folder: str, victim: bool) -> None:
    """In the decision: the others wait for it in vain, and step."""
    _decide(model, victim, "come")


def after_it_told(model: nn.Module, optimizer: AdamW, folder: str, victim: bool) -> None:
    _decide(model, victim, "shares")


def _decide(model: nn.Module, victim: bool, where: str) -> None:
    if victim:
        setattr(ranks._Meeting, where, lambda *_: die())
    chooser = AdamW(model.parameters())
    train(model, chooser, range(2, 3))
    assert chooser.plan is not None
    train(model, chooser, range(3, 4))


Fate = Callable[[nn.Module, AdamW, str, bool], None]


def live(rank: int, folder: str, address: str, fate: Fate, victim: int) -> None:
    torch.set_num_threads(1)
    wait = timedelta(seconds=PATIENCE)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=WORLD, timeout=wait)
    model = sharded()
    optimizer = AdamW(model.parameters(), variant="paged_8bit", max_grad_norm=1.0)
    train(model, optimizer, range(2))
    save(model, optimizer, f"{folder}/A")
    saved = contents(model, optimizer)
    if rank == 0:
        torch.save(saved, f"{folder}/saved")
    dist.barrier()
    error, begin = "", time.monotonic()
    try:
        fate(model, optimizer, folder, rank == victim)
    except BaseException as raised:  # torch's CheckpointException is no Exception
        error = f"{type(raised).__name__}: {raised}"
    told = {"error": error, "seconds": time.monotonic() - begin}
    Path(folder, f"{rank}.json").write_text(json.dumps(told))
    os._exit(0)  # the group cannot be taken down together any more


def started(folder: Path, address: str, fate: Fate, victim: int) -> list[Any]:
    arguments = (str(folder), address, fate, victim)
    processes = [context().Process(target=live, args=(rank, *arguments)) for rank in range(WORLD)]
    for process in processes:
        process.start()
    return processes


def ended(processes: list[Any], folder: Path, victim: int) -> list[dict[str, Any]]:
    """What the others tell."""
    end = time.monotonic() + 60 + BOUND
    try:
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [-signal.SIGKILL if rank == victim else 0 for rank in range(WORLD)]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD) if rank != victim]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return int(found.getsockname()[1])


FATES: dict[str, tuple[Fate, int]] = {
    "step": (in_a_step, 1),
    "save": (in_a_save, 1),
    "decision": (before_it_tells, 2),
    "decision, told": (after_it_told, 1),
    "decision, with the store": (before_it_tells, 0),
}
"""With the rank that dies. Rank 0 keeps the store, where there is one."""


def resumed(folders: list[str]) -> Any:
    """On two ranks; then a decision of ranks with different memory."""
    found = []
    for folder in folders:
        model = sharded()
        optimizer = AdamW(model.parameters(), variant="paged_8bit", max_grad_norm=1.0)
        weights, state = get_state_dict(model, optimizer)
        loaded = {"model": weights, "optimizer": state}
        dcp.load(loaded, checkpoint_id=f"{folder}/A")
        set_state_dict(
            model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"]
        )
        found.append(contents(model, optimizer) == torch.load(f"{folder}/saved"))
        train(model, optimizer, range(2, 4))
    rank, room = dist.get_rank(), [1 << 40, 100_000][dist.get_rank()]
    auto.host_limit = lambda: memory.Limit(room, f"rank {rank}")  # type: ignore[attr-defined]
    socket.gethostname = lambda: f"machine {rank}"
    model = sharded()
    chooser = AdamW(model.parameters())
    train(model, chooser, range(2))
    assert chooser.plan is not None
    assert chooser.plan.chosen is not None
    return found, chooser.plan.chosen.name, chooser.plan.candidates[0].obstacle


@pytest.mark.slow
def test_the_others_end_in_time_and_the_last_checkpoint_loads_on_them(tmp_path: Path) -> None:
    running = {}
    for name, (fate, victim) in FATES.items():
        folder = tmp_path / name
        folder.mkdir()
        address = f"tcp://localhost:{free_port()}" if "store" in name else f"file://{folder}/meeting"
        running[name] = folder, started(folder, address, fate, victim), victim
    for name, (folder, processes, victim) in running.items():
        for told in ended(processes, folder, victim):
            assert "Error: " in told["error"], (name, told)
            assert "AssertionError" not in told["error"], (name, told)
            assert told["seconds"] < BOUND, (name, told)
    assert (tmp_path / "save" / "B").is_dir()
    assert not (tmp_path / "save" / "B" / ".metadata").exists()
    on_two = together(2, resumed, [str(folder) for folder, _, _ in running.values()])
    assert [found for found, _, _ in on_two] == [[True] * len(FATES)] * 2
    assert [name for _, name, _ in on_two] == ["8bit", "8bit"]
    assert [obstacle.removesuffix(" on rank 1") for _, _, obstacle in on_two] == [on_two[1][2]] * 2
    assert on_two[1][2].startswith("needs ")
