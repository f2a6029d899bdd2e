"""Paged and resident steps give the same bits."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import Parameter

from adamw_triton import AdamW
from adamw_triton.places import store
from adamw_triton.state import placement
from adamw_triton.step.release import Release
from tests.amount import asked
from tests.optimizer.problems import bits, parameters, set_grads, state_bits
from tests.paging.simulated import SimulatedDevice, random_order

Result = tuple[list[bytes], list[dict[str, bytes]]]
EXAMPLES = asked("EXAMPLES", 15)
ORDERS = asked("ORDERS", 200)
"""A thousand pass."""
PAGE_SIZES = (1, 700, 5_000, 20_000, 64 << 20)
"""Bytes: from one block to everything."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def result(optimizer: AdamW) -> Result:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.state_dict()  # waits
    return bits(params), state_bits(optimizer)


class Story:
    """Some steps of training, the same for every optimizer that is told it: sizes, missing gradients, when a
    second group comes in."""

    def __init__(self, seed: int) -> None:
        generator = random.Random(seed)
        sizes = [
            generator.choice((1, 5, 127, 128, 4096, 4097, 9_000)) for _ in range(generator.randint(1, 6))
        ]
        self.shapes = [(size,) for size in sizes] + [(70, 65)]
        self.dtype = generator.choice(DTYPES)
        self.late = generator.randint(1, 4)
        self.missing = [
            {i for i in range(len(self.shapes) + 1) if generator.random() < 0.25} for _ in range(5)
        ]

    def __call__(self, variant: str, **arguments: Any) -> Result:
        params = parameters(self.shapes, self.dtype)
        late = Parameter(torch.linspace(-1, 1, 6000).to(self.dtype))
        optimizer = AdamW(params, variant=variant, **arguments)
        for step, missing in enumerate(self.missing):
            if step == self.late:
                optimizer.add_param_group({"params": [late], "lr": 0.01, "state_bits": 8})
            everything = [*params, late]
            set_grads(everything, step)
            for index in missing:
                everything[index].grad = None
            optimizer.step()
        return result(optimizer)


@pytest.mark.parametrize("bits_", ["32bit", "8bit"])
@pytest.mark.parametrize(
    "transfer",
    ["copy", pytest.param("zero_copy", marks=pytest.mark.slow), pytest.param("auto", marks=pytest.mark.slow)],
)
@settings(max_examples=EXAMPLES, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    page_bytes=st.sampled_from(PAGE_SIZES),
    resident=st.none() | st.floats(0, 1.1),
)
def test_paged_and_resident_steps_give_the_same_bits(
    bits_: str, transfer: str, seed: int, page_bytes: int, resident: float | None
) -> None:
    """``resident``: the budget, as a part of the state's bytes."""
    story = Story(seed)
    with small_pages(page_bytes):
        budget = None if resident is None else int(resident * 80_000)
        paged = story("paged_" + bits_, transfer=transfer, memory_budget=budget)
    assert paged == story(bits_)


class small_pages:
    """Pages of at most so many bytes, and budgets as small as one likes."""

    def __init__(self, page_bytes: int) -> None:
        self.patch = pytest.MonkeyPatch()
        self.page_bytes = page_bytes

    def __enter__(self) -> None:
        self.patch.setattr(placement, "PAGE_BYTES", self.page_bytes)
        self.patch.setattr(placement, "SMALLEST_BUDGET", 0)

    def __exit__(self, *_: object) -> None:
        self.patch.undo()


@pytest.mark.slow
@pytest.mark.parametrize("bits_", ["32bit", "8bit"])
@pytest.mark.parametrize("page_bytes", PAGE_SIZES)
def test_one_tensor_over_many_pages(bits_: str, page_bytes: int) -> None:
    """Its pieces step as the whole does: offsets, dither, blocks."""

    def train(variant: str, **arguments: Any) -> Result:
        params = parameters([(200, 301)], torch.bfloat16)
        optimizer = AdamW(params, variant=variant, **arguments)
        for step in range(3):
            set_grads(params, step)
            optimizer.step()
        return result(optimizer)

    with small_pages(page_bytes):
        paged = train("paged_" + bits_, transfer="copy")
    assert paged == train(bits_)


@pytest.mark.parametrize(
    "layout", [lambda p: p.t(), lambda p: p[:, ::2], lambda p: p.unflatten(0, (10, 20)).mT]
)
def test_parameters_in_any_order_of_memory(layout: Callable[[torch.Tensor], torch.Tensor]) -> None:
    def train(variant: str) -> Result:
        param = Parameter(layout(torch.linspace(-1, 1, 200 * 301).view(200, 301)))
        optimizer = AdamW([param], variant=variant)
        for step in range(3):
            set_grads([param], step)
            optimizer.step()
        return result(optimizer)

    with small_pages(10_000):
        paged = train("paged_8bit")
    assert paged == train("8bit")


@pytest.mark.slow
@pytest.mark.parametrize("bits_", ["32bit", "8bit"])
def test_on_the_simulated_device_in_any_order(bits_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole optimizer, with the real update."""
    expected = whole_training(bits_, [])
    devices: list[SimulatedDevice] = []
    monkeypatch.setattr(store, "device_for", lambda _: devices[-1])
    with small_pages(9_000):
        for seed in range(ORDERS):
            devices.append(SimulatedDevice(random_order(seed)))
            assert whole_training("paged_" + bits_, devices) == expected, seed


@pytest.mark.slow
@pytest.mark.parametrize("bits_", ["32bit", "8bit"])
def test_released_on_the_simulated_device_in_any_order(bits_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward and the next forward are on the compute stream, updates beside it."""
    monkeypatch.setattr(placement, "BUCKET_BYTES", 20_000)
    monkeypatch.setattr(Release, "_note_backward", lambda self, is_last: None)
    expected = released_training(bits_, [])
    devices: list[SimulatedDevice] = []
    monkeypatch.setattr(store, "device_for", lambda _: devices[-1])
    with small_pages(9_000):
        for seed in range(ORDERS // 2):
            devices.append(SimulatedDevice(random_order(seed)))
            assert released_training("paged_" + bits_, devices) == expected, seed


def released_training(variant: str, devices: list[SimulatedDevice]) -> tuple[Result, list[bytes]]:
    """Also what a forward sees behind each step."""
    params = parameters([(4500,), (10,), (4100,), (3000,), (4096,)])
    optimizer = AdamW(params, variant=variant, gradient_release=True)
    assert optimizer._release is not None
    queue = devices[-1].compute.run if devices else lambda work: work()
    seen: list[torch.Tensor] = []
    for step in range(3):
        set_grads(params, step)
        grads = [param.grad for param in params]
        for param in params:
            param.grad = None
        for param, grad in reversed(list(zip(params, grads, strict=True))):
            param.grad = torch.full_like(grad, torch.nan)  # not there before its stream has come so far
            queue(partial(param.grad.copy_, grad))
            optimizer._release.arrived(param)
        optimizer.step()
        queue(lambda: seen.extend(param.detach().clone() for param in params))
    if devices:
        optimizer.state_dict()
        devices[-1].synchronize()
    return result(optimizer), bits(seen)


def whole_training(variant: str, devices: list[SimulatedDevice]) -> Result:
    params = parameters([(4500,), (10,), (4100,)])
    optimizer = AdamW(params, variant=variant)
    for step in range(2):
        set_grads(params, step)
        optimizer.step()
    if devices:
        optimizer.state_dict()
        assert not devices[-1].inbound.queue
        devices[-1].synchronize()  # the parameters, which a user reads after the compute stream's work
    return result(optimizer)


def test_pages_without_gradients_are_not_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[int] = []
    params = parameters([(4096,)] * 6)
    optimizer = AdamW(params, variant="paged_32bit", transfer="copy")
    with small_pages(4096 * 8 + 3 * 256):  # a page a parameter
        set_grads(params, 0)
        optimizer.step()
        walk = next(iter(optimizer._store._pagers.values()))._copying

        def watched(work: Any, *how: Any) -> Any:
            moved.extend(page.start // 4096 for page, _ in work)
            return walk(work, *how)

        monkeypatch.setattr(next(iter(optimizer._store._pagers.values())), "_copying", watched)
        for index in (0, 3, 4):
            params[index].grad = None
        optimizer.step()
    assert moved == [1, 2, 5]
