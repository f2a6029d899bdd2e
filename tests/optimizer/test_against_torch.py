"""The optimizer beside torch.optim.AdamW: its accuracy, its inputs, its errors, its state."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.testing._internal.common_optimizers import (
    optim_error_inputs_func_adamw,
    optim_inputs_func_adamw,
)

from adamw_triton import AdamW
from tests.optimizer.problems import DTYPES, bits, parameters, set_grads, train

INPUTS = {dtype: {i.desc: i.kwargs for i in optim_inputs_func_adamw("cpu", dtype)} for dtype in DTYPES}
ERRORS = {i.optimizer_error_input.desc: i for i in optim_error_inputs_func_adamw("cpu", torch.float32)}


def relative(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_200_steps_are_as_exact_as_torchs_own(seed: int, weight_decay: float, backend: str) -> None:
    """Against AdamW in float64 on the same fp32 gradients, of many magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    steps = 200 if backend == "torch" else 20
    ours, theirs = (parameters(((100, 100), (50,)), seed=seed) for _ in range(2))
    exact = [Parameter(p.detach().double()) for p in ours]
    settings: dict[str, Any] = {"lr": 1e-3, "weight_decay": weight_decay}
    optimizers = [
        AdamW(ours, variant="32bit", **settings),
        torch.optim.AdamW(theirs, **settings),
        torch.optim.AdamW(exact, **settings),
    ]
    scales = [10 ** (-6 * torch.rand(p.shape, generator=generator)) for p in ours]
    for _ in range(steps):
        for scale, *trio in zip(scales, ours, theirs, exact, strict=True):
            grad = torch.randn(scale.shape, generator=generator) * scale
            for p in trio:
                p.grad = grad.to(p.dtype)
        for optimizer in optimizers:
            optimizer.step()
    flat_ours, flat_theirs, flat_exact = (
        torch.cat([p.detach().flatten().double() for p in params]) for params in (ours, theirs, exact)
    )
    assert relative(flat_ours, flat_exact) <= 5e-7
    assert relative(flat_ours, flat_exact) <= 1.5 * relative(flat_theirs, flat_exact)
    assert (flat_ours - flat_exact).abs().max() <= 2e-6 * flat_exact.abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("desc", INPUTS[torch.float32])
def test_all_inputs_of_torchs_own_tests(desc: str, dtype: torch.dtype) -> None:
    """fp32 as torch's; 16-bit as torch's fp32 AdamW whose weights are rounded after each step, since
    our state is fp32 there and torch's is not."""
    kwargs = INPUTS[dtype][desc]
    ours = parameters(dtype=dtype)
    exact = [Parameter(p.detach().float()) for p in ours]
    train(AdamW(ours, variant="32bit", **kwargs), 7)
    reference = torch.optim.AdamW(exact, **kwargs)
    for step in range(1, 8):
        set_grads(ours, step)  # the same gradients in the same dtype
        for p, q in zip(ours, exact, strict=True):
            assert p.grad is not None
            q.grad = p.grad.float()
        reference.step()
        for q in exact:
            q.data = q.data.to(dtype).float()
    for p, q in zip(ours, exact, strict=True):
        if dtype is torch.float32:
            torch.testing.assert_close(p, q, rtol=2e-6, atol=1e-8)
        else:
            torch.testing.assert_close(p.float(), q, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)
            assert (p.float() == q).float().mean() > 0.99


@pytest.mark.parametrize("desc", ERRORS)
def test_all_error_inputs_of_torchs_own_tests(desc: str) -> None:
    case = ERRORS[desc]
    given = case.optimizer_error_input
    params = given.params if given.params is not None else parameters()
    if "foreach" in given.kwargs:  # what torch's implementation of that name cannot do
        AdamW(params, **given.kwargs)
    elif issubclass(case.error_type, Warning):
        with pytest.warns(case.error_type, match=case.error_regex):
            AdamW(params, **given.kwargs)
    else:
        with pytest.raises(case.error_type, match=case.error_regex):
            AdamW(params, **given.kwargs)


def test_positional_arguments_are_torchs() -> None:
    ours, theirs = (
        cls(parameters(), 1e-2, (0.8, 0.9), 1e-6, 0.3, True, maximize=True)
        for cls in (AdamW, torch.optim.AdamW)
    )
    common = ours.defaults.keys() & theirs.defaults.keys()
    assert {"lr", "betas", "eps", "weight_decay", "amsgrad", "maximize"} <= common
    assert {k: ours.defaults[k] for k in common} == {k: theirs.defaults[k] for k in common}
    defaults = AdamW(parameters()).defaults, torch.optim.AdamW(parameters()).defaults
    assert {k: defaults[0][k] for k in common} == {k: defaults[1][k] for k in common}


@pytest.mark.parametrize("amsgrad", [False, True])
def test_torchs_state_loads_here(amsgrad: bool) -> None:
    theirs = torch.optim.AdamW(parameters(), amsgrad=amsgrad, lr=1e-2)
    train(theirs, 3)
    params = [Parameter(p.detach().clone()) for p in theirs.param_groups[0]["params"]]
    ours = AdamW(params, amsgrad=amsgrad)
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["lr"] == 1e-2
    for ours_p, theirs_p in zip(params, theirs.param_groups[0]["params"], strict=True):
        for key, value in theirs.state[theirs_p].items():
            assert torch.equal(ours.state[ours_p][key], value), key
    for a, b in zip(train(ours, 3, first=4), train(theirs, 3, first=4), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("implementation", [{}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_our_state_loads_in_torchs(amsgrad: bool, implementation: dict[str, bool]) -> None:
    ours = AdamW(parameters(), lr=1e-2, amsgrad=amsgrad)
    train(ours, 3)
    params = [Parameter(p.detach().clone()) for p in ours.param_groups[0]["params"]]
    theirs = torch.optim.AdamW(params, amsgrad=amsgrad, **implementation)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    if not implementation:
        train(theirs, 3, first=4)
        for a, b in zip(train(ours, 3, first=4), params, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    for entry in theirs.state.values():
        assert entry.keys() == {"step", "exp_avg", "exp_avg_sq"} | ({"max_exp_avg_sq"} if amsgrad else set())


def test_the_same_inputs_give_the_same_bits() -> None:
    for variant in ("32bit", "8bit"):
        runs = [bits(train(AdamW(parameters(), variant=variant), 4)) for _ in range(2)]
        assert runs[0] == runs[1]
