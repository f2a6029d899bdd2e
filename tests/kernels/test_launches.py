"""How often the optimizer launches kernels, and what it sends to the device for that."""

from __future__ import annotations

import itertools
from array import array
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import adamw_triton
from adamw_triton_kernels import launch
from tests import gradients

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="not interpreted")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PAIRS = list(itertools.product(DTYPES, repeat=2))
NUMELS = (1, 7, 64, 128, 300, 500, 900, 1000, 1024, 4097)
TENSORS = 300


class Watch:
    """Counts launches by (param dtype, grad dtype, kernel), tables made and addresses sent."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: Counter[tuple[torch.dtype, torch.dtype, str]] = Counter()
        self.tables = 0
        self.sent_addresses = 0
        call, tables = launch.call, launch._Tables
        watch = self

        class Tables(tables):  # type: ignore[misc, valid-type]
            def __init__(self, *args: Any) -> None:
                watch.tables += 1
                super().__init__(*args)

        class Addresses(launch.DeviceTable):
            def of(self, values: array[int] | array[float], *, capturable: bool = False) -> torch.Tensor:
                before = self._sent
                sent = super().of(values, capturable=capturable)
                watch.sent_addresses += self._sent is not before
                return sent

        def counting(spec: launch.Build, key: tuple[Any, ...], *rest: Any) -> None:
            build, param_dtype, grad_dtype, *_ = key
            self.calls[param_dtype, grad_dtype, build.__module__.rpartition(".")[2]] += 1
            call(spec, key, *rest)

        monkeypatch.setattr(launch, "_Tables", Tables)
        monkeypatch.setattr(launch, "DeviceTable", Addresses)
        monkeypatch.setattr(launch, "call", counting)

    def reset(self) -> None:
        self.calls.clear()
        self.tables = self.sent_addresses = 0


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    return Watch(monkeypatch)


def model(device: str, variant: str) -> adamw_triton.AdamW:
    """An optimizer of 300 tensors in two groups: every size with every pair of dtypes, aligned or not
    as they come, and their gradients."""
    params = []
    for i in range(TENSORS):
        param_dtype, grad_dtype = PAIRS[i % len(PAIRS)]
        param = torch.ones(NUMELS[i % len(NUMELS)], device=device, dtype=param_dtype, requires_grad=True)
        gradients.allow(param, grad_dtype)
        param.grad = torch.ones(param.shape, device=device, dtype=grad_dtype)
        params.append(param)
    groups = [{"params": params[::2]}, {"params": params[1::2], "lr": 0.2}]
    return adamw_triton.AdamW(groups, lr=0.1, variant=variant)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("variant", "kernels"), [("32bit", ["adamw_32bit"]), ("8bit", ["adamw_32bit", "adamw_8bit"])]
)
def test_300_tensors_take_one_launch_for_each_pair_and_format(
    variant: str, kernels: list[str], device: str, watch: Watch
) -> None:
    optimizer = model(device, variant)
    expected = {(*pair, kernel): 1 for pair in PAIRS for kernel in kernels}

    optimizer.step()
    assert watch.calls == expected
    assert watch.tables == watch.sent_addresses == len(expected)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(params) == TENSORS
    assert not any((p == 1).any() for p in params)

    watch.reset()
    optimizer.step()  # nothing has moved
    assert watch.calls == expected
    assert watch.tables == watch.sent_addresses == 0

    watch.reset()
    moved = params[0]
    assert moved.grad is not None
    moved.grad = moved.grad.clone()
    optimizer.step()
    assert watch.calls == expected
    assert watch.tables == 0
    assert watch.sent_addresses == 1


@pytest.mark.parametrize("device", DEVICES)
def test_changed_hyperparameters_need_no_new_tables(device: str, watch: Watch) -> None:
    params = [torch.ones(n, device=device, requires_grad=True) for n in NUMELS]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = adamw_triton.AdamW(params, lr=1e-3, weight_decay=0.0)
    optimizer.step()
    watch.reset()
    before = params[0].item()
    optimizer.param_groups[0].update(lr=0.5, betas=(0.5, 0.9))
    optimizer.step()
    assert watch.calls.total() == 1
    assert watch.tables == watch.sent_addresses == 0
    assert before - params[0].item() > 1e-2


@pytest.mark.parametrize("device", DEVICES)
def test_empty_tensors_launch_nothing_to_do(device: str) -> None:
    param = torch.ones(0, device=device, requires_grad=True)
    param.grad = torch.ones_like(param)
    adamw_triton.AdamW([param]).step()
