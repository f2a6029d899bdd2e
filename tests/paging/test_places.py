"""Where state is, who moves it, and that it is handed back."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from adamw_triton import AdamW
from adamw_triton.memory import host as memory
from adamw_triton.places import store
from adamw_triton.state import placement
from tests.measuring import printed, staging
from tests.optimizer.problems import bits, parameters, set_grads, state_bits, train

SHAPES = ((4500,), (10,), (70, 70))
PAGED = ("paged_32bit", "paged_8bit")


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "PAGE_BYTES", 9000)


def everything(optimizer: AdamW) -> tuple[list[bytes], list[dict[str, bytes]]]:
    return bits(optimizer.param_groups[0]["params"]), state_bits(optimizer)


def trained(variant: str, steps: int) -> AdamW:
    arguments = {"transfer": "copy"} if variant in PAGED else {}
    optimizer = AdamW(parameters(SHAPES), variant=variant, **arguments)
    train(optimizer, steps)
    return optimizer


MOVES: dict[str, Callable[[AdamW], Any]] = {
    "Lightning: every tensor of the state to a device": lambda optimizer: [
        entry.update({name: tensor.clone() for name, tensor in entry.items()})
        for entry in optimizer.state.values()
    ],
    "one parameter's state": lambda optimizer: optimizer.state[optimizer.param_groups[0]["params"][0]].update(
        {
            name: tensor.clone()
            for name, tensor in optimizer.state[optimizer.param_groups[0]["params"][0]].items()
        }
    ),
    "offload": lambda optimizer: optimizer.offload(),
    "offload twice": lambda optimizer: (optimizer.offload(), optimizer.offload()),
    "offload and reload": lambda optimizer: (optimizer.offload(), optimizer.reload()),
    "reload": lambda optimizer: optimizer.reload(),
    "its own state dict": lambda optimizer: optimizer.load_state_dict(optimizer.state_dict()),
    "a state dict while offloaded": lambda optimizer: (
        optimizer.offload(),
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())),
    ),
    "moved by someone, then offloaded": lambda optimizer: (
        MOVES["one parameter's state"](optimizer),
        optimizer.offload(),
    ),
}


@pytest.mark.parametrize("variant", ["32bit", "8bit", *PAGED])
@pytest.mark.parametrize("move", MOVES)
def test_moved_state_goes_back_and_training_goes_on(variant: str, move: str) -> None:
    optimizer = trained(variant, 3)
    MOVES[move](optimizer)
    assert state_bits(optimizer) == state_bits(trained(variant, 3))
    train(optimizer, 2, first=4)
    assert everything(optimizer) == everything(trained(variant, 5))
    for slot in optimizer._store.slots.values():
        assert slot.is_shown_by(optimizer.state[slot.param])
        assert slot.buffer.on_host == variant.startswith("paged")
        for name, array in slot.flat().items():
            assert optimizer.state[slot.param][name].data_ptr() == array.data_ptr()


@pytest.mark.parametrize("source", ["32bit", "8bit", *PAGED])
@pytest.mark.parametrize("target", ["32bit", "8bit", *PAGED])
def test_checkpoints_know_nothing_of_paging(source: str, target: str) -> None:
    saved = trained(source, 3)
    resumed = AdamW(saved.param_groups[0]["params"], variant=target)
    resumed.load_state_dict(saved.state_dict())
    if source.removeprefix("paged_") == target.removeprefix("paged_"):
        assert state_bits(resumed) == state_bits(saved)
        train(resumed, 2, first=4)
        assert everything(resumed) == everything(trained(source, 5))
    else:
        train(resumed, 2, first=4)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_copies_are_paged_too(way: Callable[[AdamW], AdamW]) -> None:
    optimizer = trained("paged_8bit", 3)
    twin = way(optimizer)
    assert twin.variant == "paged_8bit"
    train(twin, 2, first=4)
    assert everything(twin) == everything(trained("paged_8bit", 5))
    assert twin.memory() == trained("paged_8bit", 5).memory()
    assert state_bits(optimizer) == state_bits(trained("paged_8bit", 3))


def test_offloading_hands_back_staging() -> None:
    optimizer = AdamW(parameters(SHAPES), variant="paged_8bit", transfer="copy")
    train(optimizer, 1)
    assert staging(optimizer) > 0
    optimizer.offload()
    assert staging(optimizer) == 0
    train(optimizer, 1, first=2)
    assert staging(optimizer) > 0
    assert optimizer.memory()["staging"] == 0, "of GPUs"


def test_offloading_that_runs_out_of_memory_halfway(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has moved is shown where it is, and a step takes it back."""
    optimizer = trained("8bit", 3)
    real = store.StateBuffer.move
    moves = 0

    def move(self: store.StateBuffer, copy: Any, *, to_host: bool) -> None:
        nonlocal moves
        moves += 1
        if moves == 2:
            raise MemoryError
        real(self, copy, to_host=to_host)

    monkeypatch.setattr(store.StateBuffer, "move", move)
    with pytest.raises(MemoryError):
        optimizer.offload()
    assert sorted(buffer.on_host for buffer in optimizer._store.buffers) == [False, True]
    train(optimizer, 2, first=4)
    assert everything(optimizer) == everything(trained("8bit", 5))
    assert not any(buffer.on_host for buffer in optimizer._store.buffers)


@pytest.mark.parametrize("call", ["step", "offload"])
def test_state_that_the_host_has_no_room_for(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = AdamW(parameters(SHAPES), variant="paged_8bit") if call == "step" else trained("8bit", 1)
    set_grads(optimizer.param_groups[0]["params"], 1)
    before = everything(optimizer)
    with monkeypatch.context() as patch:
        patch.setattr(memory, "host_limit", lambda: memory.Limit(10_000, "the control group /jail"))
        message = r"optimizer state needs 19\.3 KiB of host memory, and 9\.8 KiB .*/jail"
        with pytest.raises(MemoryError, match=message):
            getattr(optimizer, call)()
    assert everything(optimizer) == before
    optimizer.step()


def test_a_group_that_comes_later_pushes_state_out_of_a_budget() -> None:
    """All was resident; then it is shared out anew, and the same bits go on."""
    first, second = parameters(SHAPES), parameters(((9000,),))
    optimizer = AdamW(first, variant="paged_32bit", memory_budget="196608", transfer="copy")
    train(optimizer, 2)
    assert not any(buffer.paged for buffer in optimizer._store.buffers)
    optimizer.add_param_group({"params": second})
    resident = AdamW(parameters(SHAPES), variant="32bit")
    train(resident, 2)
    resident.add_param_group({"params": parameters(((9000,),))})
    for step in (3, 4):
        for each in (optimizer, resident):
            set_grads([p for group in each.param_groups for p in group["params"]], step)
            each.step()
    assert any(buffer.paged for buffer in optimizer._store.buffers) == (sum(sizes()) > 196608)
    assert everything(optimizer) == everything(resident)


def sizes() -> list[int]:
    return [8 * placement.round_up(n, 32) for n in (4500, 10, 4900, 9000)]


def test_dropping_the_optimizer_drops_its_memory_at_once() -> None:
    """Without waiting for the garbage collector: a notebook that makes a new one has no room for both."""
    gc.disable()
    try:
        optimizer = trained("paged_8bit", 2)
        optimizer.offload()
        train(optimizer, 1, first=3)
        arrays = [
            weakref.ref(array) for buffer in optimizer._store.buffers for array in buffer.arrays.values()
        ]
        assert all(array() is not None for array in arrays)
        del optimizer
        assert all(array() is None for array in arrays)
    finally:
        gc.enable()


REPEAT = """
import json, sys, torch
from pathlib import Path
import adamw_triton, adamw_triton.state.buffers
from adamw_triton.memory import pinned
from adamw_triton_kernels import fusion

fusion.PATIENCE = 1 << 60  # the compiler takes memory of its own, and keeps it

if sys.argv[1] == "registered":  # the memory that a GPU gets, with a driver that has nothing to do
    class Registrar:
        def register(self, address, size): return None
        def unregister(self, address): pass
    def register(size, device): return pinned.register_bytes(size, Registrar(), lambda: None)
    adamw_triton.state.buffers.host_bytes = register

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

param = torch.nn.Parameter(torch.zeros(9_000_000))
param.grad = torch.ones(9_000_000)
sizes = []
for _ in range(20):
    optimizer = adamw_triton.AdamW([param], variant="paged_32bit", transfer="copy")
    optimizer.step()
    state = optimizer.memory()["host"]
    del optimizer
    sizes.append(resident())
print(json.dumps({"grown": max(sizes[1:]) - sizes[0], "state": state}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "registered"])
def test_twenty_optimizers_leave_no_memory_behind(kind: str) -> None:
    found = json.loads(printed(REPEAT, kind))
    assert found["state"] == 8 * 9_000_000
    assert found["grown"] < found["state"] / 8
