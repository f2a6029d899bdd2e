"""What is left of a GPU, by what driver and allocator say; each of the ways in which those mislead."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adamw_triton.memory import gpu
from adamw_triton.memory.gpu import CudaAllocator, Snapshot

MiB, GiB = 1 << 20, 1 << 30
CUDA = torch.device("cuda", 0)


def snapshot(**changes: Any) -> Snapshot:
    """16 GiB, of which another process has 2; this one reserves 6 and had 5 in use at its peak."""
    return Snapshot(8 * GiB, 16 * GiB, 6 * GiB, 5 * GiB, 0)._replace(**changes)


SLACK = int(0.02 * 16 * GiB)


def test_room_is_what_the_peak_leaves_of_free_and_cached_memory() -> None:
    assert snapshot().room() == (8 + 6 - 5) * GiB - SLACK


def test_free_memory_alone_would_be_too_much() -> None:
    """Between backward and the next forward activations are gone: 10 of them were in use."""
    assert snapshot(free=2 * GiB, reserved=12 * GiB, active_peak=12 * GiB).room() == 2 * GiB - SLACK


def test_what_other_processes_take_is_gone() -> None:
    assert snapshot(free=3 * GiB).room() == snapshot().room() - 5 * GiB
    assert dict(snapshot().spent())["other processes"] == 2 * GiB


def test_a_driver_that_promises_more_than_there_is() -> None:
    """WSL swaps to the host: 30 GiB of tensors on 16."""
    assert snapshot(free=20 * GiB).room() == (16 - 5) * GiB - SLACK
    assert snapshot(free=0, reserved=30 * GiB, active_peak=30 * GiB).room() == (16 - 30) * GiB - SLACK


def test_fragmented_memory_is_no_room() -> None:
    assert snapshot(fragmented=GiB).room() == snapshot().room() - GiB


def test_state_that_was_there_at_the_peak_is_counted_once() -> None:
    assert snapshot().room(ours=3 * GiB) == snapshot().room() + 3 * GiB


@pytest.mark.parametrize("ours", [0, GiB])
@pytest.mark.parametrize("fragmented", [0, 300 * MiB])
def test_the_words_add_up_to_the_room(ours: int, fragmented: int) -> None:
    found = snapshot(fragmented=fragmented)
    (_, total), *rest = found.spent(ours)
    assert total - sum(count for _, count in rest) == found.room(ours)


# torch's allocator


def counts(peak: int, current: int = 0) -> dict[str, dict[str, int]]:
    return {"all": {"peak": peak, "current": current}}


STATS = {
    "active_bytes": counts(5 * GiB),
    "allocated_bytes": counts(4 * GiB),
    "reserved_bytes": counts(7 * GiB, 6 * GiB),
    "inactive_split_bytes": counts(GiB),
    "num_alloc_retries": 3,
}


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What torch.cuda says."""
    says = SimpleNamespace(stats=dict(STATS), integrated=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA T4")
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(is_integrated=says.integrated)
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 * GiB, 16 * GiB))
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda device: says.stats)
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    return says


def test_a_snapshot_of_torchs_allocator(cuda: SimpleNamespace) -> None:
    assert CudaAllocator(CUDA).name == "cuda:0 (NVIDIA T4)"
    assert CudaAllocator(CUDA).snapshot() == Snapshot(8 * GiB, 16 * GiB, 6 * GiB, 5 * GiB, GiB, 3, False)


def test_what_is_fragmented_is_at_most_what_the_peak_left_unused(cuda: SimpleNamespace) -> None:
    cuda.stats["inactive_split_bytes"] = counts(10 * GiB)
    assert CudaAllocator(CUDA).snapshot().fragmented == 2 * GiB


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_segments_that_expand_are_not_fragmented(
    name: str, cuda: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "max_split_size_mb:512, expandable_segments:True")
    assert CudaAllocator(CUDA).snapshot().fragmented == 0


def test_a_backend_that_counts_no_active_bytes(cuda: SimpleNamespace) -> None:
    """cudaMallocAsync."""
    cuda.stats = {**STATS, "active_bytes": counts(0), "inactive_split_bytes": counts(0)}
    assert CudaAllocator(CUDA).snapshot().active_peak == 4 * GiB
    cuda.stats = {}
    assert CudaAllocator(CUDA).snapshot() == Snapshot(8 * GiB, 16 * GiB, 0, 0, 0, 0, False)


def test_a_gpu_without_memory_of_its_own(cuda: SimpleNamespace) -> None:
    cuda.integrated = True
    assert CudaAllocator(CUDA).snapshot().shared


# Allocations that fail


class Listener:
    def __init__(self) -> None:
        self.heard: list[int] = []

    def hear(self, size: int) -> None:
        self.heard.append(size)

    def break_down(self, size: int) -> None:
        raise ZeroDivisionError


@pytest.fixture
def observers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was attached to torch."""
    attached: list[Any] = []
    monkeypatch.setattr(torch._C, "_cuda_attach_out_of_memory_observer", attached.append, raising=False)
    monkeypatch.setattr(gpu, "_observed", False)
    monkeypatch.setattr(gpu, "_listeners", {})
    return attached


def test_listeners_hear_of_their_device_alone(cuda: SimpleNamespace, observers: list[Any]) -> None:
    first, second = Listener(), Listener()
    CudaAllocator(CUDA).on_out_of_memory(first.hear)
    CudaAllocator(torch.device("cuda", 1)).on_out_of_memory(second.hear)
    (observer,) = observers  # once, for all
    observer(0, 10, 100, 5)
    observer(1, 20, 100, 5)
    observer(2, 30, 100, 5)
    assert (first.heard, second.heard) == ([10], [20])


def test_a_listener_that_is_gone_hears_nothing_and_is_forgotten(
    cuda: SimpleNamespace, observers: list[Any]
) -> None:
    listener = Listener()
    CudaAllocator(CUDA).on_out_of_memory(listener.hear)
    del listener
    observers[0](0, 10, 100, 5)
    assert gpu._listeners == {0: []}


def test_a_listener_that_fails_does_not_hide_the_users_error(
    cuda: SimpleNamespace, observers: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    broken, other = Listener(), Listener()
    CudaAllocator(CUDA).on_out_of_memory(broken.break_down)
    CudaAllocator(CUDA).on_out_of_memory(other.hear)
    observers[0](0, 10, 100, 5)
    assert other.heard == [10]
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


@pytest.mark.gpu
def test_a_real_failure_is_heard_and_the_snapshot_is_sane() -> None:
    allocator = CudaAllocator(CUDA)
    listener = Listener()
    allocator.on_out_of_memory(listener.hear)
    before = allocator.snapshot()
    assert 0 < before.free <= before.total
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(before.total * 2, dtype=torch.uint8, device="cuda")
    assert listener.heard == [before.total * 2]
    assert float(torch.ones(3, device="cuda").sum()) == 3
