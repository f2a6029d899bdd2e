"""The ends of the arithmetic, in the kernels and in plain torch: any betas, gradients that jump over 30
orders of magnitude, an eps of nothing, squares that overflow, NaN.

Each step is judged from the state that the last one left, against the same step in float64.
"""

from __future__ import annotations

import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adamw_triton.state.buffers import make_slots
from adamw_triton.state.formats import Blockwise8, Float32, Format
from adamw_triton_kernels import Hyper, Layout, adamw_8bit, adamw_32bit, codes, hyper_table, reference
from adamw_triton_kernels.work import SMALLEST_EPS, hyper_table_at

LR = 1e-3
BLOCK = 128
EXAMPLES = int(os.environ.get("EDGES_EXAMPLES", "20"))
BETAS = (0.0, 1e-30, 1e-9, 1e-4, 0.1, 0.499999, 0.5, 0.9, 0.999, 1 - 1e-7)
PAIRS = (
    (0.0, 0.0),
    (0.9, 0.0),
    (0.0, 0.999),
    (0.9, 1e-9),
    (1e-9, 1e-9),
    (1e-4, 0.1),
    (0.49, 0.51),
    (0.9, 0.999),
)
EPS = (0.0, 1e-45, 1e-30, 1e-19, 1e-15, 1e-8, 1.0)
BACKENDS = {
    ("torch", "32bit"): reference.adamw_32bit,
    ("torch", "8bit"): reference.adamw_8bit,
    ("triton", "32bit"): adamw_32bit.adamw_32bit,
    ("triton", "8bit"): adamw_8bit.adamw_8bit,
}
FORMATS: dict[str, Format] = {"32bit": Float32(), "8bit": Blockwise8(BLOCK)}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

every_backend = pytest.mark.parametrize(
    ("backend", "bits"), [pytest.param(*key, id="-".join(key)) for key in BACKENDS]
)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Of numpy's warnings about infinities, in the interpreter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


@triton.jit
def _least(at):
    tl.store(at, tl.minimum(tl.load(at), 1.0))


def least_of_nan_and_one() -> float:
    """1, as a GPU has it and Triton documents it; NaN in the interpreter before Triton 3.7 or so."""
    x = torch.full((1,), math.nan, device=DEVICE)
    _least[(1,)](x)
    return float(x)


needs_minima = pytest.mark.skipif(
    math.isnan(least_of_nan_and_one()), reason="this interpreter's minimum of NaN is NaN"
)


class Settings(NamedTuple):
    betas: tuple[float, float]
    eps: float
    weight_decay: float = 0.0


class Run:
    """One tensor, all zeros, and its state."""

    def __init__(self, backend: str, bits: str, numel: int) -> None:
        self.device = DEVICE if backend == "triton" else "cpu"
        self.update: Callable[..., None] = BACKENDS[backend, bits]
        self.bits, self.numel, self.steps = bits, numel, 0
        self.param = torch.zeros(numel, device=self.device)
        slot = make_slots(FORMATS[bits], [(self.param, "p")], torch.device(self.device))[0]
        self.state = slot.buffer.arrays
        self.layout = Layout((numel,), (slot.start,), (0,), (0,))

    def step(self, grad: Tensor, how: Settings, lr: float = LR) -> Tensor:
        """The change of the weights, in learning rates, of weights that are zero before it."""
        self.steps += 1
        self.param.zero_()
        hyper = Hyper.at(self.steps, lr=lr, **how._asdict())
        self.update([self.param], [grad.to(self.device)], self.state, self.layout, hyper_table([hyper]))
        return self.param.double().cpu() / -LR

    def moments(self) -> tuple[Tensor, Tensor]:
        """m and v, float64."""
        state = {name: array.cpu() for name, array in self.state.items()}
        if self.bits == "8bit":
            m, v = codes.decode_8bit(state, BLOCK)
        else:
            m, v = state["exp_avg"], state["exp_avg_sq"]
        return m[: self.numel].double(), v[: self.numel].double()

    def codes(self) -> tuple[Tensor, Tensor]:
        """Of v and of m."""
        found = (self.state[name][: self.numel].cpu().int() for name in ("exp_avg_sq_codes", "exp_avg_codes"))
        return next(found), next(found)


def check_step(run: Run, grad: Tensor, how: Settings) -> None:
    """The change of the weights as in float64, to 24 roundings of the terms of m, and 32-bit state to 4."""
    old_m, old_v = run.moments()
    change = run.step(grad, how)
    (beta1, beta2), g = how.betas, grad.double()
    m, terms = beta1 * old_m + (1 - beta1) * g, beta1 * old_m.abs() + (1 - beta1) * g.abs()
    v = beta2 * old_v + (1 - beta2) * g * g
    denominator = (v / (1 - beta2**run.steps)).sqrt() + max(how.eps, SMALLEST_EPS)
    to_update = 1 / (1 - beta1**run.steps) / denominator
    least = 1e-44
    tolerance = 24 * 2.0**-24 + 2.0**-148 / v.clamp(min=2.0**-149)
    if run.device == "cuda":  # its square roots take such v for zero
        tolerance[v < 2.0**-126] = 1.01
    apart = (change - m * to_update).abs()
    assert (apart <= tolerance * terms * to_update + least * to_update + 1e-37).all(), float(apart.max())
    if run.bits == "32bit":
        new_m, new_v = run.moments()
        assert ((new_m - m).abs() <= 4 * 2.0**-24 * terms + least).all()
        assert ((new_v - v).abs() <= 4 * 2.0**-24 * v + least).all()


@every_backend
@pytest.mark.parametrize("betas", PAIRS)
def test_gradients_may_jump_whatever_the_betas(backend: str, bits: str, betas: tuple[float, float]) -> None:
    """By ten orders down, and up again; beside a gradient that does not, in another block."""
    run, how = Run(backend, bits, 2 * BLOCK), Settings(betas, 1e-8)
    for size in (1.6, 2e-5, -1e-10, 0.0, 1e3, 1e-3):
        grad = torch.full((2 * BLOCK,), size)
        grad[BLOCK:] = 1.0
        check_step(run, grad, how)


beta = st.sampled_from(BETAS) | st.floats(1e-30, 1 - 1e-7) | st.floats(-12, -1).map(lambda x: 10**x)


@every_backend
@settings(max_examples=EXAMPLES, deadline=None)
@given(
    betas=st.sampled_from(PAIRS) | st.tuples(beta, beta),
    eps=st.sampled_from(EPS),
    exponents=st.lists(st.integers(-15, 15), min_size=2, max_size=4),
    seed=st.integers(0, 2**32),
)
def test_a_step_is_that_of_float64(
    backend: str, bits: str, betas: tuple[float, float], eps: float, exponents: list[int], seed: int
) -> None:
    run, how = Run(backend, bits, 3 * BLOCK - 5), Settings(betas, eps)
    generator = torch.Generator().manual_seed(seed)
    for exponent in exponents:
        check_step(run, torch.randn(run.numel, generator=generator) * 10.0**exponent, how)


@pytest.mark.slow
@every_backend
@pytest.mark.parametrize("eps", [0.0, 1e-30, 1e-8])
def test_finite_gradients_leave_weights_finite_wherever_torch_does(
    backend: str, bits: str, eps: float
) -> None:
    """Every sequence of three of these gradients, of 8-bit state a block each; torch in fp32 is beside it."""
    sizes = (0.0, 1e-45, -1e-40, 1e-19, 1.0, 1e20, 3e38)[:: 2 if bits == "8bit" else 1]
    table = torch.tensor(list(itertools.product(sizes, repeat=3))).repeat_interleave(
        BLOCK if bits == "8bit" else 1, 0
    )
    for betas in ((0.9, 0.999), (0.9, 0.3), (0.0, 0.0)):
        run, how = Run(backend, bits, len(table)), Settings(betas, eps, weight_decay=0.1)
        theirs = torch.nn.Parameter(torch.zeros(len(table)))
        optimizer = torch.optim.AdamW([theirs], lr=LR, betas=betas, eps=eps, weight_decay=0.1)
        lost = torch.zeros(len(table), dtype=torch.bool)
        for grad in table.unbind(1):
            change = run.step(grad.contiguous(), how)
            theirs.grad = grad.clone()
            optimizer.step()
            lost |= ~theirs.isfinite()
            finite = change.isfinite() | lost
            assert finite.all(), (betas, table[~finite][0])


@every_backend
def test_a_learning_rate_of_zero_changes_nothing(backend: str, bits: str) -> None:
    run = Run(backend, bits, BLOCK)
    for size in (1.0, 0.0, 1e-30):
        assert not run.step(torch.full((BLOCK,), size), Settings((0.9, 0.999), 0.0, 0.1), lr=0.0).any()


def overflown(backend: str, growth: float, bad: float) -> Run:
    """Two blocks of which gradients have grown after three steps; in the first, an element's v overflows."""
    run, how = Run(backend, "8bit", 2 * BLOCK), Settings((0.9, 0.999), 1e-8)
    for _ in range(3):
        run.step(torch.full((2 * BLOCK,), 1e-3), how)
    grad = torch.full((2 * BLOCK,), 1e-3 * growth)
    grad[torch.arange(2 * BLOCK) % BLOCK % 3 == 1] *= -0.1
    grad[0] = bad
    run.step(grad, how)
    return run


@pytest.mark.slow
@needs_minima
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("bad", [1e25, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("growth", [1.0, 2.0, 30.0, 1e3, 1e9, 1e18])
def test_codes_stop_at_the_last_beside_what_has_overflown(backend: str, growth: float, bad: float) -> None:
    """They are not less than those of elements that have not outgrown the scale, m shrinks with sqrt(v), and
    the next step throws nobody."""
    run = overflown(backend, growth, bad)
    scale = float(run.state["exp_avg_sq_scales"][0])
    (m, v), (q, _) = run.moments(), run.codes()
    assert m.isfinite().all()
    assert v.isfinite().all()
    assert int(q[0]) == 255
    others = slice(1, BLOCK)
    free_m, free_v = m[BLOCK + 1 :], v[BLOCK + 1 :]  # the same elements in the block that nothing holds
    if math.isfinite(bad):
        assert (v[others].sqrt() >= 0.97 * free_v.sqrt().clamp(max=scale)).all()
        ratio, free = m[others] / v[others].sqrt(), free_m / free_v.sqrt()
        assert ((ratio - free).abs() <= 0.05 * free.abs().max()).all()
    change = run.step(torch.zeros(2 * BLOCK), Settings((0.9, 0.999), 1e-8))
    assert (change[1:].abs() <= 7).all()


@needs_minima
@pytest.mark.parametrize("growth", [1.0, 30.0, 1e9])
@pytest.mark.parametrize("bad", [1e25, math.inf, -math.inf, math.nan, -math.nan])
def test_kernel_and_twin_agree_on_the_codes_of_what_is_lost(growth: float, bad: float) -> None:
    codes = [torch.stack(overflown(backend, growth, bad).codes()) for backend in ("torch", "triton")]
    assert codes[0].equal(codes[1])
    assert codes[0][:, 0].tolist() == [255, 0 if bad == 1e25 else 127]


@needs_minima
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0xFFC00000, 0x7F800001, 0xFFFFFFFF, 0x7FC12345])
def test_every_nan_has_the_same_codes(bits: int) -> None:
    """A GPU's own is 0x7fffffff, and what a gradient brings is anything."""
    grad = torch.ones(2 * BLOCK)
    grad[5] = torch.tensor(bits, dtype=torch.int64).to(torch.uint32).view(torch.float32)
    for backend in ("torch", "triton"):
        run = Run(backend, "8bit", 2 * BLOCK)
        run.step(grad, Settings((0.9, 0.999), 1e-8))
        q, r = run.codes()
        assert (int(q[5]), int(r[5])) == (255, 127)
        assert q.unique().numel() <= 3
        assert (run.moments()[1][6:] > 0).all()


@pytest.mark.parametrize("betas", PAIRS)
@pytest.mark.parametrize("eps", EPS)
def test_the_table_that_is_made_on_a_device_is_the_same(betas: tuple[float, float], eps: float) -> None:
    """To an ulp, and with the same signs, of zero too; betas that are integers as floats."""
    for passed in (betas, tuple(int(beta) if beta == 0 else beta for beta in betas)):
        rows = [Hyper.at(step, lr=LR, betas=passed, eps=eps, weight_decay=0.1) for step in (1, 2, 1000)]
        numbers = torch.tensor([[1.0, *betas, eps, LR, 0.1]] * 3, dtype=torch.float64)
        made, found = hyper_table(rows), hyper_table_at(torch.tensor([1, 2, 1000]), numbers)
        assert made[:, 7].view(torch.int32).equal(found[:, 7].view(torch.int32))
        assert torch.allclose(made[:, :7], found[:, :7], rtol=2e-7, atol=0)
        assert made[:, :7].signbit().equal(found[:, :7].signbit())
