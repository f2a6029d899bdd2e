"""Steps of the optimizer on the device against AdamW in float64 on the CPU: every pair of dtypes, sizes
around the kernels' tiles, tensors that begin anywhere, groups, gradient scalers.

Each step is judged alone, from the state that the last one left, so that errors do not add up.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from adamw_triton import AdamW
from adamw_triton.state.formats import Blockwise8
from tests.gradients import allow
from tests.kernels.ulps import ulps

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="not interpreted")
DEVICES = [pytest.param("cpu", marks=NO_GPU), pytest.param("cuda", marks=pytest.mark.gpu)]
TILES = (256, 1024, 2048)
NUMELS = {
    "cpu": (1, 257, 1025, 2047, 4096, 6145),
    "cuda": (1, *(tile + beside for tile in TILES for beside in (-1, 0, 1)), 4096, 4097, 6143, 6145, 1 << 20),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCALE = 8.0
"""Of a gradient scaler."""
GROUPS: tuple[dict[str, Any], ...] = (
    {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "maximize": False},
    {"lr": 3e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1, "maximize": True},
)
ROUNDED = {"cpu": 4, "cuda": 8}
"""Ulps of the weight's change, of which ``check_weights`` counts the double: on a GPU twice rsqrt's 2**-22.4,
sqrt's 2**-23 and six roundings of 2**-24 make 8.4e-7 of it, 7 of its smallest ulps of 2**-23; the interpreter
rounds each once."""
KINDS: dict[str, dict[str, Any]] = {
    "32bit": {"variant": "32bit"},
    "32bit amsgrad": {"variant": "32bit", "amsgrad": True},
    "8bit": {"variant": "8bit"},
    "8bit block 256": {"variant": "8bit", "block_size": 256},
}


def cases() -> list[Any]:
    """Everything on a GPU; in the interpreter one pair of dtypes, which the other tests of this room vary."""
    found = []
    for kind, shift, pair in itertools.product(KINDS, (0, 1), itertools.product(DTYPES, repeat=2)):
        device, marks = "cuda", [pytest.mark.gpu]
        name = "-".join(str(dtype).removeprefix("torch.") for dtype in pair)
        place = "misaligned" if shift else "aligned"
        found.append(pytest.param(device, kind, shift, *pair, marks=marks, id=f"{kind}-{place}-{name}"))
        if pair == (torch.bfloat16, torch.float32) or (pair == (torch.float32,) * 2 and not shift):
            found.append(
                pytest.param("cpu", kind, shift, *pair, marks=NO_GPU, id=f"cpu-{kind}-{place}-{name}")
            )
    return found


@dataclass
class Moments:
    """float64, on the CPU."""

    m: Tensor
    v: Tensor
    largest: Tensor

    @classmethod
    def of(cls, entry: dict[str, Tensor], block: int, param: Tensor) -> Moments:
        """What the state of ``param`` says."""
        if not entry:
            return cls(*(torch.zeros(param.numel(), dtype=torch.float64) for _ in range(3)))
        entry = {name: value.detach().cpu() for name, value in entry.items()}
        if "exp_avg_codes" in entry:
            decoded = Blockwise8(block).decode(entry)
            entry = {name: decoded[name][: param.numel()] for name in ("exp_avg", "exp_avg_sq")}
        m, v = (entry[name].flatten().double() for name in ("exp_avg", "exp_avg_sq"))
        return cls(m, v, entry.get("max_exp_avg_sq", entry["exp_avg_sq"]).flatten().double())


def exact(
    p: Tensor, g: Tensor, old: Moments, step: int, group: dict[str, Any]
) -> tuple[Tensor, Tensor, Moments]:
    """One step of AdamW in float64: arXiv:1711.05101, Algorithm 2. The second is the sum of what the change
    is made of, by magnitude: where these cancel, their roundings stay."""
    beta1, beta2 = group["betas"]
    m = old.m + (1 - beta1) * (g - old.m)
    v = old.v + (1 - beta2) * (g * g - old.v)
    largest = torch.maximum(old.largest, v) if group["amsgrad"] else v
    root = (largest / (1 - beta2**step)).sqrt() + group["eps"]
    denominator = (1 - beta1**step) * root
    change = group["lr"] * (m / denominator + group["weight_decay"] * p)
    parts = (beta1 * old.m.abs() + (1 - beta1) * g.abs()) / denominator + group["weight_decay"] * p.abs()
    return p - change, group["lr"] * parts, Moments(m, v, largest)


def parameters(dtype: torch.dtype, device: str, shift: int) -> list[Parameter]:
    """They begin ``shift`` elements after 16 aligned bytes."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(n, generator=generator) for n in NUMELS[device]]
    return [
        Parameter(torch.empty(len(x) + 8, device=device, dtype=dtype)[shift : shift + len(x)].copy_(x))
        for x in drawn
    ]


def gradients(step: int, dtype: torch.dtype, device: str, shift: int) -> list[Tensor]:
    """Of magnitudes from 1e-3 to 1, some of them zero."""
    generator = torch.Generator().manual_seed(step)
    found = []
    for n in NUMELS[device]:
        grad = torch.randn(n, generator=generator) * 10 ** (-3 * torch.rand(n, generator=generator))
        grad[torch.rand(n, generator=generator) < 0.05] = 0
        found.append(torch.empty(n + 8, device=device, dtype=dtype)[shift : shift + n].copy_(grad))
    return found


def flat(tensor: Tensor) -> Tensor:
    return tensor.detach().flatten().cpu()


def check_weights(actual: Tensor, expected: Tensor, before: Tensor, parts: Tensor, fp32_ulps: float) -> None:
    """fp32 within so many ulps. 16 bits: the nearest number to within what fp32 was off, half an ulp and a
    little. What took part are the weight, before and after, and the parts of its change, products of rounded
    factors."""
    most = fp32_ulps if actual.dtype == torch.float32 else 0.51
    assert ulps(actual, expected, before, 2 * parts) <= most


def check_8bit(entry: dict[str, Tensor], expected: Moments, block: int) -> None:
    """sqrt(v) to within one code, since it is dithered; m to within half of one; and a thousandth of a code
    for fp32, whose error of 1e-6 is 127 times as much of one."""
    n = len(expected.m)
    codes = {name: flat(value).double() for name, value in entry.items() if value.numel() > 1}
    m_scale, v_scale = (
        codes[f"{name}_scales"].repeat_interleave(block)[:n] for name in ("exp_avg", "exp_avg_sq")
    )
    q, r = codes["exp_avg_sq_codes"][:n], codes["exp_avg_codes"][:n]
    root = v_scale * (q / 255) ** 2
    assert ((root - expected.v.sqrt()).abs() <= 1.001 * v_scale * (2 * q + 1) / 65025).all()
    one = m_scale / 127 * root
    assert ((r * one - expected.m).abs() <= 0.501 * one + 1e-30).all()


@pytest.mark.parametrize(("device", "kind", "shift", "param_dtype", "grad_dtype"), cases())
def test_a_step_is_within_rounding_of_float64(
    device: str, kind: str, shift: int, param_dtype: torch.dtype, grad_dtype: torch.dtype
) -> None:
    params = parameters(param_dtype, device, shift)
    assert all((p.data_ptr() % 16 == 0) == (shift == 0) for p in params)
    halves = [{"params": params[i::2], **group} for i, group in enumerate(GROUPS)]
    optimizer = AdamW(halves, **KINDS[kind])
    optimizer.grad_scale = torch.tensor(SCALE, device=device)  # type: ignore[attr-defined]
    optimizer.found_inf = torch.tensor(0.0, device=device)  # type: ignore[attr-defined]
    block = KINDS[kind].get("block_size", 128)
    for param in params:
        allow(param, grad_dtype)
    for step in (1, 2, 3):
        grads = gradients(step, grad_dtype, device, shift)
        before = [flat(p).double() for p in params]
        old = [Moments.of(optimizer.state.get(p, {}), block, p) for p in params]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()
        for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
            group = optimizer.param_groups[i % 2]
            sign = -1 if group["maximize"] else 1
            g = flat(grad).double() * (sign / SCALE)
            weight, parts, moments = exact(before[i], g, old[i], step, group)
            entry = optimizer.state[param]
            if "exp_avg_codes" in entry:
                check_weights(flat(param), weight, before[i], parts, ROUNDED[device])
                check_8bit(entry, moments, block)
                continue
            check_weights(flat(param), weight, before[i], parts, ROUNDED[device])
            assert ulps(flat(entry["exp_avg"]), moments.m, old[i].m, g) <= 2
            assert ulps(flat(entry["exp_avg_sq"]), moments.v, old[i].v, g * g) <= 2
            if "max_exp_avg_sq" in entry:
                assert ulps(flat(entry["max_exp_avg_sq"]), moments.largest, old[i].v, g * g) <= 2


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_stays_where_it_is(kind: str, device: str) -> None:
    """Its element is lost, in its block all stays finite, beyond it nothing changes. 1e20 squared
    overflows."""
    numel, bad = 8192, {5: math.nan, 700: math.inf, 3000: -math.inf, 4097: 1e20}
    block = KINDS[kind].get("block_size", 128)
    runs = []
    for poisoned in (False, True):
        param = Parameter(torch.linspace(-1, 1, numel, device=device))
        optimizer = AdamW([param], lr=1e-2, **KINDS[kind])
        for step in (1, 2, 3):
            grad = torch.randn(numel, generator=torch.Generator().manual_seed(step))
            if poisoned and step == 2:
                for at, value in bad.items():
                    grad[at] = value
            param.grad = grad.to(device)
            optimizer.step()
        runs.append(flat(param))
    clean, spoiled = runs
    elements = torch.arange(numel)
    lost = torch.isin(elements, torch.tensor([*bad]))
    near = torch.isin(elements // block, torch.tensor([at // block for at in bad]))
    assert not spoiled[[at for at in bad if not math.isfinite(bad[at])]].isfinite().any()
    assert spoiled[near & ~lost].isfinite().all()
    apart = ~near if kind.startswith("8bit") else ~lost
    assert spoiled[apart].equal(clean[apart])
