"""A few misaligned tensors are launched apart, and the others keep their wide accesses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adamw_triton.state.buffers import make_slots
from adamw_triton.state.formats import Blockwise8, Float32, Format
from adamw_triton_kernels import Hyper, Layout, adamw_8bit, adamw_32bit, hyper_table, launch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="not interpreted")

UPDATES = {"adamw_32bit": adamw_32bit.adamw_32bit, "adamw_8bit": adamw_8bit.adamw_8bit}
NUMELS = (130, 5, 2048, 300)


def at_shift(values: Tensor, shifted: bool) -> Tensor:
    """A copy that begins at a multiple of 16 bytes, or one element behind it."""
    memory = torch.empty(values.numel() + 1, dtype=values.dtype)
    return memory[int(shifted) : values.numel() + int(shifted)].copy_(values)


class Problem:
    def __init__(self, state_format: Format) -> None:
        generator = torch.Generator().manual_seed(0)
        self.format = state_format
        self.params = [torch.randn(n, generator=generator).bfloat16() for n in NUMELS]
        self.grads = [torch.randn(n, generator=generator).bfloat16() for n in NUMELS]
        slots = make_slots(state_format, [(p, "p") for p in self.params], torch.device("cpu"))
        self.arrays = slots[0].buffer.arrays
        offsets = tuple(slot.start for slot in slots)
        self.layout = Layout(NUMELS, offsets, (0, 7, 0, 1 << 33), (0, 1, 1, 0))

    def step(self, number: int, params: list[bool], grads: list[bool]) -> None:
        """The flags say what is shifted."""
        self.params = list(map(at_shift, self.params, params))
        hypers = [
            Hyper.at(number, lr=lr, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1) for lr in (0.1, 0.02)
        ]
        moved = list(map(at_shift, self.grads, grads))
        UPDATES[self.format.update](self.params, moved, self.arrays, self.layout, hyper_table(hypers))

    def bits(self) -> list[Tensor]:
        return [t.view(torch.uint8) for t in (*self.params, *self.arrays.values())]


flags = st.lists(st.booleans(), min_size=len(NUMELS), max_size=len(NUMELS))


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(
    state_format=st.sampled_from([Float32(), Float32(amsgrad=True), Blockwise8(128)]),
    shifts=st.lists(st.tuples(flags, flags), min_size=1, max_size=3),
)
def test_what_is_misaligned_is_launched_apart_to_the_same_bits(
    state_format: Format, shifts: list[tuple[list[bool], list[bool]]]
) -> None:
    """Also where other tensors are misaligned at every step."""
    plain, moved = Problem(state_format), Problem(state_format)
    straight = [False] * len(NUMELS)
    launches: list[tuple[bool, int]] = []
    call = launch.call

    def noted(spec: launch.Build, key: Any, device: torch.device, programs: int, arguments: Any) -> None:
        wide = spec.constexprs["PARAM_ALIGN"] == 16 == spec.constexprs["GRAD_ALIGN"]
        launches.append((wide, arguments[-2]))
        call(spec, key, device, programs, arguments)

    for number, (params, grads) in enumerate(shifts, 1):
        plain.step(number, straight, straight)
        with pytest.MonkeyPatch.context() as patch:
            launches.clear()
            patch.setattr(launch, "call", noted)
            moved.step(number, params, grads)
        apart = sum(map(max, params, grads))
        wide, narrow = (True, len(NUMELS) - apart), (False, apart)
        assert launches == [part for part in (wide, narrow) if part[1]]
        assert all(map(torch.equal, plain.bits(), moved.bits()))
