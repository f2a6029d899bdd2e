"""Plain torch on devices without double precision: Apple's GPUs, some of Intel's. Meta stands for one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adamw_triton.state.buffers import make_slots
from adamw_triton.state.formats import Blockwise8, Float32, Format
from adamw_triton.step import hyperparameters
from adamw_triton.step.hyperparameters import OnDevice, Settings
from adamw_triton_kernels import Hyper, Layout, hyper_table, tables, update_for


class NoFloat64(TorchDispatchMode):
    """As Metal refuses it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for made in tree_leaves(outputs):
            if isinstance(made, Tensor) and made.is_meta and made.dtype is torch.float64:
                raise TypeError("Cannot convert a tensor to float64: the framework doesn't support it")
        return outputs


@pytest.fixture
def forgetful() -> Iterator[None]:
    tables.has_float64.cache_clear()
    yield
    tables.has_float64.cache_clear()


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_format", [Float32(), Float32(amsgrad=True), Blockwise8()], ids=str)
def test_a_step_needs_no_float64(
    state_format: Format, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    device = torch.device("meta")
    hyper = hyper_table([Hyper.at(1, lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)])
    with NoFloat64():
        params = [torch.empty(n, dtype=dtype, device=device) for n in (5000, 30, 128)]
        slots = make_slots(state_format, [(p, "p") for p in params], device)
        layout = Layout((5000, 30, 128), tuple(slot.start for slot in slots), (0,) * 3, (0,) * 3)
        grads = [torch.empty_like(p) for p in params]
        update_for(state_format.update, device)(params, grads, slots[0].buffer.arrays, layout, hyper)


def test_numbers_made_on_such_a_device_are_made_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a capturable optimizer, from step counts that are there."""
    group = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "maximize": False}
    groups = [{"lr": lr, **group} for lr in (0.1, 0.2)]
    steps = torch.tensor([0.0, 4.0, 7.0])
    found = []
    for has_float64 in (True, False):
        monkeypatch.setattr(hyperparameters, "has_float64", lambda device, has=has_float64: has)
        numbers = OnDevice([0, 1, 1], steps, [0, 1, 2])
        found.append(numbers.at_next_step(Settings(groups, None)))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1].view(torch.int32), found[1][1].view(torch.int32))
    assert found[1][1].device.type == "cpu"
