"""What a profiler and a memory snapshot see of us."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import adamw_triton
from adamw_triton.state.buffers import StateBuffer
from adamw_triton.state.formats import Float32
from adamw_triton.telemetry import spans


def step(**settings: Any) -> adamw_triton.AdamW:
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    optimizer = adamw_triton.AdamW(model.parameters(), lr=1e-3, **settings)
    model(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    return optimizer


IN, UPDATE, OUT, RELEASE = spans.PAGE_IN, spans.UPDATE, spans.PAGE_OUT, spans.RELEASE


@pytest.mark.parametrize(
    ("settings", "seen"),
    [
        ({"variant": "32bit"}, {UPDATE}),
        ({"variant": "8bit"}, {UPDATE}),
        ({"variant": "paged_8bit", "transfer": "copy"}, {IN, UPDATE, OUT}),
        ({"variant": "paged_8bit", "transfer": "zero_copy"}, {UPDATE}),
        (
            {"variant": "paged_32bit", "transfer": "copy", "gradient_release": True},
            {IN, UPDATE, OUT, RELEASE},
        ),
    ],
    ids=lambda value: " ".join(sorted(map(str, value if isinstance(value, set) else value.values()))),
)
def test_ranges_in_a_profile(settings: dict[str, Any], seen: set[str]) -> None:
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step(**settings)
    events = [event for event in profiled.events() or [] if event.name.startswith("adamw_triton::")]
    assert {event.name for event in events} == seen
    counted = Counter(event.name for event in events)
    assert counted[IN] == counted[OUT]


def test_nothing_is_recorded_where_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    monkeypatch.setattr(spans, "record_function", refuse)
    step(variant="paged_8bit", transfer="copy")
    assert spans.span("a") is spans.span("b")


class Memory:
    """Of a GPU that is not here."""

    def __init__(self) -> None:
        self.name = "the user's"
        self.seen: list[str] = []

    def _get_memory_metadata(self) -> str:
        return self.name

    def _set_memory_metadata(self, name: str) -> None:
        self.seen.append(name)
        self.name = name


def test_allocations_are_named_and_the_name_from_before_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory()
    monkeypatch.setattr(torch.cuda, "memory", memory)
    device = torch.device("cpu")
    StateBuffer(Float32(), device, 256, 1)
    assert memory.seen == []  # no GPU is in use
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    StateBuffer(Float32(), device, 256, 1)
    assert memory.seen == [spans.STATE, "the user's"]
    with contextlib.suppress(torch.OutOfMemoryError), spans.allocated_as(spans.STAGING):
        assert memory.name == spans.STAGING
        raise torch.OutOfMemoryError
    assert memory.name == "the user's"
