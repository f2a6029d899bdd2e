"""The Triton kernels against their specification in plain torch on the CPU, step by step."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from adamw_triton.state.buffers import make_slots
from adamw_triton.state.formats import Blockwise8, Float32, Format
from adamw_triton_kernels import MAX_CHUNKS, Hyper, Layout, adamw_8bit, adamw_32bit, hyper_table, reference
from tests.kernels.ulps import ulps

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="not interpreted")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
UPDATES = {"adamw_32bit": adamw_32bit.adamw_32bit, "adamw_8bit": adamw_8bit.adamw_8bit}
NUMELS = (1, 31, 127, 128, 129, 4097, 70_001)
FIRSTS = (0, 0, 2**31 - 64, 0, 2**33 + 256, 0, 0)  # some tensors are pieces of larger parameters
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WEIGHTS = {"cpu": 4, "cuda": 8}
"""Ulps of fp32 weights: a GPU's rsqrt and sqrt are approximate (see test_against_float64)."""
MIXED = (torch.bfloat16, torch.float32)
PLAIN = (torch.bfloat16, torch.bfloat16)


def _cases(common: Format, *others: Format) -> list[object]:
    """Every pair of dtypes; most of them are slow tests, and all but one of the other formats."""
    found = []
    for pair in itertools.product(DTYPES, repeat=2):
        name = "-".join(str(dtype).removeprefix("torch.") for dtype in pair)
        for state_format in (common, *others):
            quick = pair == MIXED or (state_format is common and pair == PLAIN)
            marks = () if quick else pytest.mark.slow
            found.append(pytest.param(state_format, *pair, id=f"{state_format}-{name}", marks=marks))
    return found


@dataclass
class Problem:
    """Parameters and their state; two rows of hyperparameters take turns over the tensors."""

    format: Format
    params: list[Tensor]
    arrays: dict[str, Tensor]
    layout: Layout

    @classmethod
    def of(cls, state_format: Format, dtype: torch.dtype, device: str) -> Problem:
        generator = torch.Generator().manual_seed(1)
        params = [torch.randn(n, generator=generator).to(device, dtype) for n in NUMELS]
        slots = make_slots(state_format, [(p, "p") for p in params], torch.device(device))
        offsets = tuple(slot.start for slot in slots)
        rows = tuple(i % 2 for i in range(len(NUMELS)))
        return cls(state_format, params, slots[0].buffer.arrays, Layout(NUMELS, offsets, FIRSTS, rows))

    def on(self, device: str) -> Problem:
        """A copy."""
        arrays = {name: array.to(device, copy=True) for name, array in self.arrays.items()}
        params = [p.to(device, copy=True) for p in self.params]
        return Problem(self.format, params, arrays, dataclasses.replace(self.layout, tables={}))

    def step(self, number: int, grads: list[Tensor], *, in_triton: bool = True) -> None:
        name = self.format.update
        update = UPDATES[name] if in_triton else getattr(reference, name)
        update(self.params, grads, self.arrays, self.layout, hyper_table(hypers(number)))

    def flat(self, tensors: list[Tensor]) -> Tensor:
        """The tensors at the places of their state, fp32; zeros between them."""
        flat = torch.zeros(next(iter(self.arrays.values())).numel(), device=self.params[0].device)
        for offset, tensor in zip(self.layout.offsets, tensors, strict=True):
            flat[offset : offset + tensor.numel()] = tensor
        return flat

    def bits(self) -> list[Tensor]:
        return [t.view(torch.uint8) for t in (*self.params, *self.arrays.values())]


def hypers(step: int) -> list[Hyper]:
    return [
        Hyper.at(step, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01),
        Hyper.at(step, lr=3e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, grad_scale=-0.5),
    ]


def gradients(step: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Of many magnitudes, with zeros and one dead block."""
    generator = torch.Generator().manual_seed(100 + step)
    grads = []
    for n in NUMELS:
        grad = torch.randn(n, generator=generator) * 10 ** (-3 * torch.rand(n, generator=generator))
        grad[torch.rand(n, generator=generator) < 0.05] = 0
        grad[1024:1280] = 0
        grads.append(grad.to(device, dtype))
    return grads


def check_params(actual: Problem, expected: Problem, old: Problem, most: float) -> None:
    """fp32 within so many ulp; 16-bit the same but for at most 0.1% that were rounded the other way.

    What took part are the weight, before and after, and the change, counted twice: it is a product
    of several rounded factors, off by up to 3 eps itself, and shows where it exceeds the weight.
    """
    ours, theirs, before = (torch.cat(problem.params) for problem in (actual, expected, old))
    assert (theirs != before).float().mean() > 0.5
    change = 2 * (theirs.float() - before.float())
    if ours.dtype == torch.float32:
        assert ulps(ours, theirs, before, change) <= most
    else:
        assert ulps(ours, theirs, before, change) <= 1
        assert (ours != theirs).float().mean() <= 1e-3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("state_format", "param_dtype", "grad_dtype"), _cases(Float32(), Float32(amsgrad=True))
)
def test_32bit_is_within_4_ulp(
    state_format: Format, param_dtype: torch.dtype, grad_dtype: torch.dtype, device: str
) -> None:
    expected = Problem.of(state_format, param_dtype, "cpu")
    for step in (1, 2, 3):
        old, actual = expected.on("cpu"), expected.on(device)
        grads = gradients(step, grad_dtype, "cpu")
        expected.step(step, grads, in_triton=False)
        actual.step(step, [grad.to(device) for grad in grads])
        actual = actual.on("cpu")
        scales = [hypers(step)[row].grad_scale for row in expected.layout.rows]
        g = expected.flat([g.float() * scale for g, scale in zip(grads, scales, strict=True)])
        took_part = {"exp_avg": g, "exp_avg_sq": g * g, "max_exp_avg_sq": g * g}
        for name, array in expected.arrays.items():
            assert ulps(actual.arrays[name], array, old.arrays[name], took_part[name]) <= 4, name
        check_params(actual, expected, old, WEIGHTS[device])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("state_format", "param_dtype", "grad_dtype"), _cases(Blockwise8(128), Blockwise8(256))
)
def test_8bit_codes_are_the_same(
    state_format: Blockwise8, param_dtype: torch.dtype, grad_dtype: torch.dtype, device: str
) -> None:
    expected = Problem.of(state_format, param_dtype, "cpu")
    for step in (1, 2, 3):
        old, actual = expected.on("cpu"), expected.on(device)
        grads = gradients(step, grad_dtype, "cpu")
        expected.step(step, grads, in_triton=False)
        actual.step(step, [grad.to(device) for grad in grads])
        actual = actual.on("cpu")
        differences = {
            name: (actual.arrays[name].float() - array.float()).abs().view(-1, state_format.block)
            for name, array in expected.arrays.items()
            if name.endswith("codes")
        }
        # m is stored relative to the decoded v: where a code of v differs, its block's m may.
        comparable = differences["exp_avg_sq_codes"].amax(1) == 0
        assert differences["exp_avg_sq_codes"].max() <= 1
        assert differences["exp_avg_codes"][comparable].max() <= 1
        for name, difference in differences.items():
            assert difference.count_nonzero() <= 1e-3 * difference.numel(), name
        for name in ("exp_avg_scales", "exp_avg_sq_scales"):
            rows = comparable if name == "exp_avg_scales" else slice(None)
            assert ulps(actual.arrays[name][rows], expected.arrays[name][rows]) <= 1, name
        check_params(actual, expected, old, WEIGHTS[device] + 4)  # decoding m and sqrt(v)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "state_format",
    [Float32()]
    + [
        pytest.param(other, marks=pytest.mark.slow)
        for other in (Blockwise8(128), Float32(amsgrad=True), Blockwise8(256))
    ],
    ids=str,
)
def test_the_same_inputs_give_the_same_bits(state_format: Format, device: str) -> None:
    """Twice, and cut into chunks of several tiles."""
    runs = []
    for max_chunks in (MAX_CHUNKS, MAX_CHUNKS, 8):
        problem = Problem.of(state_format, torch.bfloat16, device)
        problem.layout = dataclasses.replace(problem.layout, max_chunks=max_chunks)
        for step in (1, 2):
            problem.step(step, gradients(step, torch.bfloat16, device))
        runs.append(problem)
    assert all(map(torch.equal, runs[0].bits(), runs[1].bits()))
    assert all(map(torch.equal, runs[0].bits(), runs[2].bits()))
