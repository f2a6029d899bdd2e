"""A kernel writes its own elements and nothing beside them, wherever they begin."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from adamw_triton.state.buffers import make_slots
from adamw_triton.state.formats import Blockwise8, Float32, Format
from adamw_triton_kernels import Hyper, Layout, adamw_8bit, adamw_32bit, hyper_table, reference

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="not interpreted")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
FORMATS = [Float32(), Float32(amsgrad=True), Blockwise8(128), Blockwise8(256)]
UPDATES = {"adamw_32bit": adamw_32bit.adamw_32bit, "adamw_8bit": adamw_8bit.adamw_8bit}
NUMELS = (1, 130, 128, 2048, 4097)
GUARD = 512
POISON = 0x5B


class Guarded:
    """Zeros whose memory is surrounded by poison; they begin ``shift`` elements after 16 aligned bytes."""

    def __init__(self, numel: int, dtype: torch.dtype, device: str, shift: int = 0) -> None:
        size = dtype.itemsize
        self.memory = torch.full(
            ((numel + shift) * size + 2 * GUARD,), POISON, dtype=torch.uint8, device=device
        )
        self.start, self.stop = GUARD + shift * size, GUARD + (shift + numel) * size
        self.inside = self.memory[self.start : self.stop].view(dtype)
        self.inside.zero_()
        assert (self.inside.data_ptr() % 16 == 0) == (shift == 0)

    @property
    def intact(self) -> bool:
        return bool(
            (self.memory[: self.start] == POISON).all() and (self.memory[self.stop :] == POISON).all()
        )


class Problem:
    """Guarded parameters, gradients and state arrays."""

    def __init__(self, state_format: Format, dtype: torch.dtype, device: str, shift: int = 0) -> None:
        torch.manual_seed(0)
        self.format = state_format
        self.guarded = [Guarded(n, dtype, device, shift) for n in NUMELS for _ in ("param", "grad")]
        self.params = [
            guarded.inside.copy_(torch.randn(guarded.inside.numel())) for guarded in self.guarded[::2]
        ]
        self.grads = [
            guarded.inside.copy_(torch.randn(guarded.inside.numel())) for guarded in self.guarded[1::2]
        ]
        slots = make_slots(state_format, [(p, "p") for p in self.params], torch.device("meta"))
        self.offsets = tuple(slot.start for slot in slots)
        self.layout = Layout(NUMELS, self.offsets, (0,) * len(NUMELS), (0,) * len(NUMELS))
        self.arrays: dict[str, Tensor] = {}
        for name, array in slots[0].buffer.arrays.items():
            self.guarded.append(Guarded(array.numel(), array.dtype, device))
            self.arrays[name] = self.guarded[-1].inside

    def padding(self, name: str) -> Tensor:
        """The entries of an array that belong to no element."""
        array = self.arrays[name]
        per = self.format.alignment
        free = torch.ones_like(array, dtype=torch.bool)
        for offset, numel in zip(self.offsets, NUMELS, strict=True):
            if name.endswith("scales"):
                free[offset // per : -(-(offset + numel) // per)] = False
            else:
                free[offset : offset + numel] = False
        return free

    def run(self, *, in_triton: bool = True) -> None:
        name = self.format.update
        update = UPDATES[name] if in_triton else getattr(reference, name)
        hyper = hyper_table([Hyper.at(1, lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)])
        update(self.params, self.grads, self.arrays, self.layout, hyper)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("state_format", FORMATS, ids=str)
def test_memory_around_the_tensors_is_untouched(state_format: Format, shift: int, device: str) -> None:
    problem = Problem(state_format, torch.bfloat16, device, shift)
    before = [p.clone() for p in problem.params]
    grads = [g.clone() for g in problem.grads]
    problem.run()
    assert all(guarded.intact for guarded in problem.guarded)
    assert all(map(torch.equal, problem.grads, grads))
    assert not any(map(torch.equal, problem.params, before))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("state_format", FORMATS, ids=str)
def test_padding_of_the_last_block_is_untouched(state_format: Format, device: str) -> None:
    problem = Problem(state_format, torch.float32, device)
    paddings = {name: problem.padding(name) for name in problem.arrays}
    for name, padding in paddings.items():
        assert padding.any() or name.endswith("scales")
        problem.arrays[name][padding] = 77
    problem.run()
    for name, padding in paddings.items():
        assert (problem.arrays[name][padding] == 77).all()
        assert problem.arrays[name][~padding].count_nonzero()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("state_format", [Blockwise8(128), Blockwise8(256)], ids=str)
def test_padding_has_no_part_in_its_blocks_scales(state_format: Format, device: str) -> None:
    clean, dirty = (Problem(state_format, torch.float32, device) for _ in range(2))
    for name in ("exp_avg_codes", "exp_avg_sq_codes"):
        dirty.arrays[name][dirty.padding(name)] = 127
    for problem in (clean, dirty):
        problem.arrays["exp_avg_scales"].fill_(1.0)
        problem.arrays["exp_avg_sq_scales"].fill_(64.0)
        problem.run()
    for name in ("exp_avg_scales", "exp_avg_sq_scales"):
        assert clean.arrays[name].equal(dirty.arrays[name])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("state_format", [Float32(), Blockwise8(128)], ids=str)
def test_misaligned_tensors_are_updated_the_same(
    state_format: Format, dtype: torch.dtype, device: str
) -> None:
    aligned, misaligned = (Problem(state_format, dtype, device, shift) for shift in (0, 1))
    assert all(map(torch.equal, aligned.params, misaligned.params))
    aligned.run()
    misaligned.run()
    assert all(map(torch.equal, aligned.params, misaligned.params))
    assert all(aligned.arrays[name].equal(array) for name, array in misaligned.arrays.items())
