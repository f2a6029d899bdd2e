"""Whatever allocates state gives ordinary tensors, whoever calls it and under whatever mode."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from adamw_triton import AdamW
from adamw_triton.memory.lasting import lasting
from adamw_triton.memory.pinned import host_bytes, register_bytes
from adamw_triton.paging.device import HostDevice
from adamw_triton.state.buffers import StateBuffer
from adamw_triton.state.formats import Float32
from tests.optimizer.problems import bits, parameters, state_bits, train

CPU = torch.device("cpu")
SHAPES = ((4500,), (10,), (70, 70))
VARIANTS = ("32bit", "8bit", "paged_32bit", "paged_8bit", "auto")


class Registrar:
    def register(self, address: int, size: int) -> str | None:
        return None

    def unregister(self, address: int) -> None: ...


def moved() -> Tensor:
    buffer = StateBuffer(Float32(), CPU, 100, 1)
    buffer.move(Tensor.copy_, to_host=True)
    return buffer.arrays["exp_avg"]


ALLOCATIONS: dict[str, Callable[[], Tensor | str]] = {
    "the host's": lambda: host_bytes(100, CPU),
    "pinned": lambda: register_bytes(100, Registrar(), lambda: None),
    "staging": lambda: HostDevice().allocate(100),
    "a buffer": lambda: StateBuffer(Float32(), CPU, 100, 1).arrays["exp_avg"],
    "its step counts": lambda: StateBuffer(Float32(), CPU, 100, 1).steps,
    "a buffer that has moved": moved,
}


@pytest.mark.parametrize("what", ALLOCATIONS)
def test_memory_that_is_allocated_in_inference_mode_lasts(what: str) -> None:
    with torch.inference_mode():
        made = ALLOCATIONS[what]()
    assert isinstance(made, Tensor)
    assert not made.is_inference()
    assert not made.requires_grad
    made.zero_()


def test_modes_are_as_before_afterwards() -> None:
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
            with lasting():
                assert not torch.is_inference_mode_enabled()
                assert torch.is_grad_enabled() == (mode is torch.enable_grad)
            assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before


ACTS: dict[str, Callable[[AdamW], object]] = {
    "nothing": lambda optimizer: None,
    "offload": lambda optimizer: optimizer.offload(),
    "offload and reload": lambda optimizer: (optimizer.offload(), optimizer.reload()),
    "load": lambda optimizer: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())),
    "load its own": lambda optimizer: optimizer.load_state_dict(optimizer.state_dict()),
    "spill": lambda optimizer: optimizer._spill(CPU, 1),
    "spill and take back": lambda optimizer: (optimizer._spill(CPU, 1), optimizer._unspill(CPU, 1 << 30)),
    "begin anew": lambda optimizer: optimizer.state.clear(),
}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_whatever_is_done_in_inference_mode_changes_nothing(variant: str, act: str) -> None:
    """The first step too, and steps before and after."""
    found = []
    for inside in (False, True):
        optimizer = AdamW(parameters(SHAPES), variant=variant)
        for first in (1, 3):
            with torch.inference_mode(inside):
                train(optimizer, 1, first=first)
                ACTS[act](optimizer)
            train(optimizer, 1, first=first + 1)
        values = optimizer.param_groups[0]["params"]
        shown = [tensor for entry in optimizer.state.values() for tensor in entry.values()]
        assert not any(tensor.is_inference() for tensor in shown)
        found.append((bits(values), state_bits(optimizer)))
    assert found[0] == found[1]


@pytest.mark.parametrize("way", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_optimizer_and_copies(variant: str, way: Callable[[AdamW], AdamW]) -> None:
    saved = AdamW(parameters(SHAPES), variant=variant)
    train(saved, 2)
    fresh = AdamW(saved.param_groups[0]["params"], variant=variant)
    with torch.inference_mode():
        fresh.load_state_dict(copy.deepcopy(saved.state_dict()))
        twin = way(saved)
        state = state_bits(saved)
    assert state_bits(twin) == state_bits(fresh) == state
    train(fresh, 2, first=3)
    assert not any(t.is_inference() for entry in fresh.state.values() for t in entry.values())
