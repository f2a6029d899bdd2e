"""Paging beside other work: a busy compute stream, full copy queues, no synchronization between steps.

The weights of a step are read, and its gradients overwritten, by what is queued right behind it, as forward
and backward do. What comes of it is compared with resident state on an idle device, bit for bit. On the CPU,
where everything happens at once, the same code shows that the comparison holds.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from adamw_triton import AdamW
from adamw_triton.state import placement
from tests.optimizer.problems import bits, parameters, state_bits

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
MiB = 1 << 20
SHAPES = {"cpu": ((300, 100), (10,), (9_001,)), "cuda": ((1000, 1000), (10,), (4096, 129), (70_001,))}
STEPS = {"cpu": 6, "cuda": 24}
SLEEP = 20_000_000
"""Cycles of a GPU, some 12 ms: longer than a step's pages take."""


class Load:
    """Work on streams of its own and on the current one; none on the CPU."""

    def __init__(self, device: str, kinds: tuple[str, ...]) -> None:
        self.kinds = kinds if device == "cuda" else ()
        if not self.kinds:
            return
        self.streams = [torch.cuda.Stream() for _ in range(3)]
        self.host = [torch.zeros(16 * MiB, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self.there = [torch.zeros(16 * MiB, dtype=torch.uint8, device="cuda") for _ in range(2)]

    def add(self) -> None:
        """Before a step."""
        if "compute" in self.kinds:
            torch.cuda._sleep(SLEEP)  # what comes behind it is late
            with torch.cuda.stream(self.streams[0]):
                torch.cuda._sleep(SLEEP)
        if "copies" in self.kinds:
            for _ in range(8):
                with torch.cuda.stream(self.streams[1]):
                    self.there[0].copy_(self.host[0], non_blocking=True)
                with torch.cuda.stream(self.streams[2]):
                    self.host[1].copy_(self.there[1], non_blocking=True)


class Training:
    """Gradients that depend on the weights, in memory that every step uses anew."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.params = [Parameter(p.detach().to(device)) for p in parameters(SHAPES[device], dtype)]
        self.grads = [torch.empty_like(param) for param in self.params]
        self.noise = [torch.linspace(-1, 1, param.numel(), device=device) for param in self.params]

    @torch.no_grad()
    def backward(self, step: int) -> None:
        for param, grad, noise in zip(self.params, self.grads, self.noise, strict=True):
            grad.copy_(param.float() * 0.1 + noise.roll(step).view(param.shape))
            param.grad = grad

    @torch.no_grad()
    def clear(self) -> None:
        """Right behind a step, whose update must have read them."""
        for grad in self.grads:
            grad.fill_(float("nan"))


def result(device: str, dtype: torch.dtype, load: Load, *, own: bool = False, **arguments: Any) -> Any:
    """The bits of weights and state after training."""
    training = Training(device, dtype)
    optimizer = AdamW(training.params, lr=1e-2, **arguments)
    stream = torch.cuda.Stream() if own and device == "cuda" else None
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream())
    seen: list[Tensor] = []
    with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
        for step in range(STEPS[device]):
            load.add()
            training.backward(step)
            optimizer.step()
            training.clear()
            seen.append(torch.stack([param.detach().float().sum() for param in training.params]))
            if not load.kinds and device == "cuda":
                torch.cuda.synchronize()
        optimizer.state_dict()  # waits for the last pages
        if device == "cuda":
            torch.cuda.synchronize()
    return bits(training.params), state_bits(optimizer), bits(seen)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("load", [("compute",), ("copies",), ("compute", "copies")], ids="+".join)
@pytest.mark.parametrize("transfer", ["copy", "zero_copy", "auto"])
@pytest.mark.parametrize("bits_", ["32bit", "8bit"])
def test_paged_steps_under_load_give_the_bits_of_resident_ones(
    bits_: str, transfer: str, load: tuple[str, ...], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "PAGE_BYTES", MiB // 4 if device == "cuda" else 20_000)
    idle = result(device, torch.bfloat16, Load(device, ()), variant=bits_)
    busy = result(device, torch.bfloat16, Load(device, load), variant="paged_" + bits_, transfer=transfer)
    assert busy == idle


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits_", ["32bit", "8bit"])
def test_the_users_own_stream_is_the_one_that_is_waited_for(
    bits_: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "PAGE_BYTES", MiB // 4 if device == "cuda" else 20_000)
    idle = result(device, torch.float32, Load(device, ()), variant=bits_)
    load = Load(device, ("compute", "copies"))
    busy = result(device, torch.float32, load, own=True, variant="paged_" + bits_, transfer="copy")
    assert busy == idle


@pytest.mark.parametrize("device", DEVICES)
def test_the_comparison_sees_a_difference(device: str) -> None:
    one, other = (
        result(device, torch.bfloat16, Load(device, ()), variant=variant) for variant in ("32bit", "8bit")
    )
    assert one[0] != other[0]
