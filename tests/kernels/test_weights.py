"""How weights of 16 bits are kept: exact ones lose nothing, stochastic ones are right on average."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from adamw_triton.state.buffers import make_slots
from adamw_triton.state.formats import Blockwise8, Float32, Format
from adamw_triton_kernels import Hyper, Layout, adamw_8bit, adamw_32bit, hyper_table, reference
from adamw_triton_kernels.weights import ELEMENT, PHASE, read, write
from adamw_triton_kernels.work import DITHER_STEP, MASTER, REMAINDER, STOCHASTIC

TRITON = {"adamw_32bit": adamw_32bit.adamw_32bit, "adamw_8bit": adamw_8bit.adamw_8bit}
NUMELS = (1, 127, 128, 1000, 4097)
FIRSTS = (0, 7, 1 << 33, 0, 256)
FORMATS = [Float32(), Float32(amsgrad=True), Blockwise8(128), Blockwise8(256)]
EXACT = [(REMAINDER, torch.bfloat16), (MASTER, torch.float16)]
KEPT = {REMAINDER: torch.int16, MASTER: torch.float32}
SPECIAL = (0.0, -0.0, math.inf, -math.inf, math.nan, 3.4e38, -3.4e38, 3.39e38, 1e-45, -1e-38, 1.0, 65504.0)


class Problem:
    """Parameters with their state in one buffer, from the same numbers for each dtype."""

    def __init__(self, state_format: Format, dtype: torch.dtype, weights: str = "nearest") -> None:
        generator = torch.Generator().manual_seed(0)
        self.format, self.weights = state_format, weights
        self.params = [
            torch.randn(n, generator=generator).bfloat16().half().bfloat16().to(dtype) for n in NUMELS
        ]
        slots = make_slots(state_format, [(p, "p") for p in self.params], torch.device("cpu"))
        self.layout = Layout(NUMELS, tuple(slot.start for slot in slots), FIRSTS, (0,) * len(NUMELS))
        self.arrays = dict(slots[0].buffer.arrays)
        if weights in KEPT:
            self.arrays[weights] = torch.zeros(slots[0].buffer.numel, dtype=KEPT[weights])

    def step(self, number: int, *, in_triton: bool) -> None:
        generator = torch.Generator().manual_seed(number)
        grads = [torch.randn(n, generator=generator).bfloat16().float() for n in NUMELS]
        hyper = hyper_table([Hyper.at(number, lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)])
        name = self.format.update
        update = TRITON[name] if in_triton else getattr(reference, name)
        update(self.params, grads, self.arrays, self.layout, hyper, self.weights)

    def exact(self) -> list[Tensor]:
        kept = [
            self.arrays[self.weights][at : at + n] for at, n in zip(self.layout.offsets, NUMELS, strict=True)
        ]
        return [read(p, [k], self.weights) for p, k in zip(self.params, kept, strict=True)]

    def bits(self) -> list[Tensor]:
        return [t.view(torch.uint8) for t in (*self.params, *self.arrays.values())]


@pytest.mark.parametrize("in_triton", [False, True], ids=["torch", "triton"])
@pytest.mark.parametrize(("weights", "dtype"), EXACT, ids=["bf16", "fp16"])
@pytest.mark.parametrize("state_format", FORMATS, ids=str)
def test_exact_weights_are_those_of_fp32_parameters(
    state_format: Format, weights: str, dtype: torch.dtype, in_triton: bool
) -> None:
    exact, plain = Problem(state_format, dtype, weights), Problem(state_format, torch.float32)
    for number in range(1, 6):
        exact.step(number, in_triton=in_triton)
        plain.step(number, in_triton=in_triton)
        for ours, p, theirs in zip(exact.exact(), exact.params, plain.params, strict=True):
            assert torch.equal(ours, theirs), number
            assert (
                torch.equal(p, theirs.to(dtype)) or (p.float() - theirs).abs().le(theirs.abs() * 2**-8).all()
            )


@pytest.mark.parametrize("weights", [REMAINDER, MASTER, STOCHASTIC])
@pytest.mark.parametrize("state_format", FORMATS, ids=str)
def test_triton_keeps_weights_as_plain_torch_does(state_format: Format, weights: str) -> None:
    dtype = torch.float16 if weights == MASTER else torch.bfloat16
    ours, theirs = Problem(state_format, dtype, weights), Problem(state_format, dtype, weights)
    for number in (1, 2):
        ours.step(number, in_triton=True)
        theirs.step(number, in_triton=False)
    for a, b in zip(ours.params, theirs.params, strict=True):
        assert (a == b).float().mean() > 0.99 or a.numel() < 200
        assert ((a.float() - b.float()).abs() <= b.float().abs() * 2**-7 + 1e-7).all()


def test_a_pair_is_one_to_one_and_its_weight_the_nearest() -> None:
    x = torch.randint(-(2**31), 2**31, (1 << 20,), dtype=torch.int64).to(torch.int32).view(torch.float32)
    x[: len(SPECIAL)] = torch.tensor(SPECIAL)
    p, kept = torch.empty(len(x), dtype=torch.bfloat16), torch.empty(len(x), dtype=torch.int16)
    write(x, p, [kept], REMAINDER)
    again = read(p, [kept], REMAINDER)
    number = ~x.isnan()
    assert torch.equal(again[number].view(torch.int32), x[number].view(torch.int32))
    assert p[~number].isnan().all()
    assert again[~number].isnan().all()
    finite = number & x.isfinite()
    ties = x.view(torch.int32) % 2**16 == 2**15
    assert torch.equal(p[finite & ~ties], x[finite & ~ties].bfloat16())


def test_a_master_counts_while_the_weight_is_its_rounding() -> None:
    x = torch.randn(1000)
    p, master = torch.empty(1000, dtype=torch.float16), torch.empty(1000)
    write(x, p, [master], MASTER)
    assert torch.equal(read(p, [master], MASTER), x)
    p[::2] += 1
    assert torch.equal(read(p, [master], MASTER)[::2], p[::2].float())
    assert torch.equal(read(p, [master], MASTER)[1::2], x[1::2])


def noise(index: Tensor, step: int | Tensor) -> Tensor:
    """By the formula, for elements or for steps."""
    bits = (index * ELEMENT + step * (DITHER_STEP * PHASE % 2**32)) % 2**32
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32)


def rounded(x: Tensor, dither: Tensor) -> Tensor:
    p = torch.empty(len(x), dtype=torch.bfloat16)
    write(x, p, [dither], STOCHASTIC)
    return p.float()


@pytest.mark.parametrize("x", [1.0009765, -0.30001, 1.5, 3.3e38, -7e-39])
def test_stochastic_rounding_is_unbiased(x: float) -> None:
    many = torch.full((100_000,), x)
    up, down = (float(rounded(many, torch.full_like(many, bits).int())[0]) for bits in (-1, 0))
    error = abs(up - down) / 2 / math.sqrt(len(many))  # of the mean, at most
    count = torch.arange(len(many))
    for dither in (noise(count, 5), noise(torch.tensor(77), count)):
        assert abs(float(rounded(many, dither).double().mean()) - float(many[0])) <= 4 * error


def test_sums_of_a_thousand_steps_err_less_than_with_random_numbers() -> None:
    """A weight near 1 that every step takes by a tenth of its last bit."""
    errors = {}
    for kind in ("ours", "random"):
        generator = torch.Generator().manual_seed(1)
        x = torch.ones(4096)
        for step in range(1, 1001):
            random_bits = torch.randint(-(2**31), 2**31, (4096,), generator=generator).to(torch.int32)
            x = rounded(x + 2**-7 * 0.03, noise(torch.arange(4096), step) if kind == "ours" else random_bits)
        errors[kind] = float((x.double() - (1 + 1000 * 2**-7 * 0.03)).square().mean().sqrt())
    assert errors["ours"] < 0.5 * errors["random"]


def test_special_numbers_stay_what_they_are() -> None:
    x = torch.tensor(SPECIAL)
    for dither in (0, -1, 12345):
        p = rounded(x, torch.full(x.shape, dither, dtype=torch.int32))
        assert torch.equal(p.isnan(), x.isnan())
        assert torch.equal(p[x.isinf()], x[x.isinf()])
        assert (p[x == 0] == 0).all()
