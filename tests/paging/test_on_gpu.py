"""Paging on a real device: the bits, the bytes, the overlap."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType
from torch.nn import Parameter
from torch.profiler import ProfilerActivity, profile

from adamw_triton import AdamW
from adamw_triton.state import placement
from tests.optimizer.problems import bits, parameters, state_bits

pytestmark = pytest.mark.gpu

MiB = 1 << 20
SHAPES = ((1000, 1000), (10,), (4096, 129), (70_001,))


def train(variant: str, steps: int = 4, dtype: torch.dtype = torch.bfloat16, **arguments: Any) -> AdamW:
    params = [Parameter(param.detach().cuda()) for param in parameters(SHAPES, dtype)]
    optimizer = AdamW(params, variant=variant, **arguments)
    generator = torch.Generator("cuda").manual_seed(0)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator, device="cuda").to(dtype)
        optimizer.step()
    return optimizer


def everything(optimizer: AdamW) -> tuple[list[bytes], list[dict[str, bytes]]]:
    optimizer.state_dict()  # waits for the last pages
    return bits(optimizer.param_groups[0]["params"]), state_bits(optimizer)


@pytest.mark.parametrize("bits_", ["32bit", "8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transfer", ["copy", "zero_copy", "auto"])
@pytest.mark.parametrize("budget", [None, "1MiB", "2MiB"])
def test_paged_and_resident_steps_give_the_same_bits(
    bits_: str, dtype: torch.dtype, transfer: str, budget: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "PAGE_BYTES", MiB // 4)
    paged = train("paged_" + bits_, 6, dtype, transfer=transfer, memory_budget=budget)
    assert paged.memory()["host"] > 0
    assert everything(paged) == everything(train(bits_, 6, dtype))


@pytest.mark.parametrize("variant", ["paged_32bit", "paged_8bit"])
def test_state_takes_no_more_of_the_gpu_than_its_staging(variant: str) -> None:
    params = [Parameter(torch.zeros(200_000_000, dtype=torch.bfloat16, device="cuda"))]
    params[0].grad = torch.ones_like(params[0])
    gc.collect()  # what other tests left
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    optimizer = AdamW(params, variant=variant, transfer="copy")
    for _ in range(2):
        optimizer.step()
    memory = optimizer.memory()
    tables = MiB
    assert memory["gpu"] == 0
    assert memory["staging"] <= 192 * MiB
    assert memory["host"] == pytest.approx({"paged_32bit": 8, "paged_8bit": 2.031}[variant] * 2e8, rel=0.01)
    assert torch.cuda.memory_allocated() - before <= memory["staging"] + tables
    assert torch.cuda.max_memory_allocated() - before <= memory["staging"] + tables
    optimizer.offload()
    assert torch.cuda.memory_allocated() - before <= tables
    del optimizer
    gc.collect()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.alone
def test_pages_come_in_while_others_are_updated_and_go_out() -> None:
    """In the profiler's timeline copies both ways run beside each other for part of their time, and updates
    beside copies."""
    param = Parameter(torch.zeros(100_000_000, dtype=torch.bfloat16, device="cuda"))
    param.grad = torch.ones_like(param)
    optimizer = AdamW([param], variant="paged_32bit", transfer="copy")
    for _ in range(2):
        optimizer.step()
    optimizer.state_dict()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        optimizer.step()
        optimizer.state_dict()
        torch.cuda.synchronize()
    events = [event for event in profiled.events() if event.device_type == DeviceType.CUDA]
    spans = {
        "in": [spanned(event) for event in events if "HtoD" in event.name],
        "out": [spanned(event) for event in events if "DtoH" in event.name],
        "update": [spanned(event) for event in events if event.name.startswith("_kernel")],
    }
    assert all(len(found) >= 10 for found in spans.values()), {k: len(v) for k, v in spans.items()}
    spans["copies"] = spans["in"] + spans["out"]  # of a page that is soon updated, an update lies between two
    for one, other in (("in", "out"), ("copies", "update")):
        shared = overlap(spans[one], spans[other])
        shorter = min(sum(end - start for start, end in spans[name]) for name in (one, other))
        assert shared > 0.3 * shorter, f"{one} and {other} share {shared:.0f} us of {shorter:.0f} us"


def spanned(event: Any) -> tuple[float, float]:
    return event.time_range.start, event.time_range.end


def overlap(some: list[tuple[float, float]], others: list[tuple[float, float]]) -> float:
    return sum(
        max(0.0, min(a_end, b_end) - max(a_start, b_start))
        for a_start, a_end in some
        for b_start, b_end in others
    )


def test_a_refused_registration_leaves_no_error_behind() -> None:
    """The driver's interface refuses, and the next kernel runs."""
    from adamw_triton.memory.pinned import CudaRegistrar

    torch.cuda.mem_get_info()
    assert CudaRegistrar().register(4096, 1 << 50) is not None
    assert float(torch.ones(3, device="cuda").sum()) == 3
