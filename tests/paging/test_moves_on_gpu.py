"""State that moves on a real device while a step still runs on another stream: what the simulated one shows,
and what it cannot: torch's allocator, pinned memory, forks and inference mode."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from adamw_triton import AdamW
from adamw_triton.memory.pinned import host_bytes
from tests.optimizer.problems import bits, state_bits

pytestmark = pytest.mark.gpu

CYCLES = 200_000_000
"""About a tenth of a second, for which a step is held up."""
NUMEL = 4_000_000


def optimizer_of(variant: str) -> AdamW:
    return AdamW([Parameter(torch.ones(NUMEL, device="cuda")) for _ in range(3)], variant=variant)


def step(optimizer: AdamW, number: int, *, late: bool) -> None:
    if late:
        torch.cuda._sleep(CYCLES)
    for index, param in enumerate(optimizer.param_groups[0]["params"]):
        param.grad = torch.full_like(param, 0.1 * (number + index) - 0.3)
    optimizer.step()


def taken_anew() -> list[Tensor]:
    """Whatever torch's allocator gives, filled at once by the current stream."""
    return [torch.full((NUMEL,), 7.0, device="cuda") for _ in range(12)]


MOVES: dict[str, Callable[[AdamW], object]] = {
    "spill": lambda optimizer: optimizer._spill(torch.device("cuda", 0), 1),
    "offload": lambda optimizer: optimizer.offload(),
    "offload and reload": lambda optimizer: (optimizer.offload(), optimizer.reload()),
    "spill and take back": lambda optimizer: (
        optimizer._spill(torch.device("cuda", 0), 1),
        optimizer._unspill(torch.device("cuda", 0), 1 << 40),
    ),
    "load": lambda optimizer: optimizer.load_state_dict(optimizer.state_dict()),
}


@pytest.mark.parametrize("variant", ["32bit", "8bit"])
@pytest.mark.parametrize("move", MOVES)
def test_a_move_from_another_stream_and_thread_waits_for_the_step(variant: str, move: str) -> None:
    expected = optimizer_of(variant)
    for number in range(3):
        step(expected, number, late=False)
    optimizer = optimizer_of(variant)
    step(optimizer, 0, late=False)
    torch.cuda.synchronize()
    stepping, moving = torch.cuda.Stream(), torch.cuda.Stream()
    others: list[Tensor] = []

    def act() -> None:
        with torch.cuda.stream(moving), torch.no_grad():
            MOVES[move](optimizer)
            others.extend(taken_anew())

    for number in (1, 2):
        with torch.cuda.stream(stepping):
            step(optimizer, number, late=True)
        if number == 1:
            thread = threading.Thread(target=act)
            thread.start()
            thread.join()
            others += taken_anew()  # by the stream that the state was allocated on
    torch.cuda.synchronize()
    assert all(bool((other == 7).all()) for other in others)
    assert state_bits(optimizer) == state_bits(expected)
    assert bits(optimizer.param_groups[0]["params"]) == bits(expected.param_groups[0]["params"])


def test_an_optimizer_that_goes_leaves_memory_that_nothing_writes_to() -> None:
    optimizer = optimizer_of("32bit")
    step(optimizer, 0, late=False)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        step(optimizer, 1, late=True)
    del optimizer
    others = taken_anew()
    torch.cuda.synchronize()
    assert all(bool((other == 7).all()) for other in others)


@pytest.mark.parametrize("variant", ["32bit", "8bit", "paged_32bit", "paged_8bit", "auto"])
def test_inference_mode_changes_nothing(variant: str) -> None:
    found = []
    for inside in (False, True):
        optimizer = optimizer_of(variant)
        for number in range(0, 6, 2):
            with torch.inference_mode(inside):
                step(optimizer, number, late=False)
                optimizer.offload()
            step(optimizer, number + 1, late=False)
        torch.cuda.synchronize()
        found.append((bits(optimizer.param_groups[0]["params"]), state_bits(optimizer)))
    assert found[0] == found[1]


def test_pinned_memory_is_not_inherited_by_a_fork() -> None:
    """As the kernel says; a forked child can do nothing with CUDA, so it looks at its own mappings alone."""
    memory = host_bytes(256 << 20, torch.device("cuda", 0))
    assert memory.is_pinned()
    address = memory.data_ptr()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        ranges = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines()]
        there = any(int(start, 16) <= address < int(end, 16) for start, end in ranges)
        os.write(write, b"there" if there else b"gone")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 10) == b"gone"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_pinned_memory_waits_for_its_own_gpu() -> None:
    other = torch.device("cuda", 1)
    memory = host_bytes(64 << 20, other)
    target = torch.zeros(64 << 20, dtype=torch.uint8, device=other)
    memory.fill_(7)
    with torch.cuda.device(other):
        torch.cuda._sleep(CYCLES)
        target.copy_(memory, non_blocking=True)
    del memory  # the current device is the first one
    assert bool((target == 7).all())
