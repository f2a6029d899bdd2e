"""Tensors that torch makes and few have seen: without memory, without a shape, of inference mode."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import Parameter

from adamw_triton import AdamW
from tests.optimizer.problems import bits, saved, state_bits

VARIANTS = ["32bit", "8bit", "paged_8bit", "auto"]
SHAPES = ((5,), (70, 70))


def with_zero_gradient(p: Parameter, kind: str) -> None:
    """autograd knows that they are zero, and gives them no memory."""
    if kind == "none":
        p.grad = torch.zeros_like(p)
    elif kind == "backward":
        (p * torch._efficientzerotensor(p.shape)).sum().backward()
    else:
        p.grad = torch._efficientzerotensor(p.shape)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["backward", "by hand"])
def test_a_gradient_of_zeros_without_memory_is_one_of_zeros(kind: str, variant: str) -> None:
    found = []
    for each in (kind, "none"):
        params = [
            Parameter(torch.linspace(-1, 1, 4900)[: s[0] * s[-1] if len(s) > 1 else 5].reshape(s))
            for s in SHAPES
        ]
        optimizer = AdamW(params, lr=0.1, variant=variant)
        for step in range(3):
            for p in params:
                p.grad = torch.ones_like(p)
            if step:
                for p in params:
                    p.grad = None
                    with_zero_gradient(p, each)
                assert params[0].grad is not None
                assert params[0].grad._is_zerotensor() == (each != "none")
            optimizer.step()
        found.append((bits(params), state_bits(optimizer)))
    assert found[0] == found[1]


def test_state_of_zeros_without_memory_loads() -> None:
    p = Parameter(torch.ones(5))
    optimizer = AdamW([p], variant="32bit")
    p.grad = torch.ones(5)
    optimizer.step()
    state = optimizer.state_dict()
    state["state"][0]["exp_avg"] = torch._efficientzerotensor(5)
    optimizer.load_state_dict(state)
    assert torch.equal(optimizer.state[p]["exp_avg"], torch.zeros(5))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_parameter_of_inference_mode_is_refused_by_name(variant: str) -> None:
    other = Parameter(torch.ones(5000))
    with torch.inference_mode():
        param = Parameter(torch.ones(7), requires_grad=False)
    optimizer = AdamW([other, param], lr=0.1, weight_decay=0.0, variant=variant)
    for p in (other, param):
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=r"parameter 1 of group 0 was made in inference mode"):
        optimizer.step()
    assert torch.equal(other, torch.ones(5000))
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"parameter 1 of group 0 was made in"):
        optimizer.step()
    assert torch.equal(other, torch.ones(5000))
    param.grad = None
    optimizer.step()
    assert torch.allclose(other, torch.full((5000,), 0.9), atol=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_on_the_meta_device_is_in_the_way_of_nothing(variant: str) -> None:
    real, meta = Parameter(torch.ones(5000)), Parameter(torch.ones(300, device="meta"))
    optimizer = AdamW([real, meta], lr=0.1, variant=variant)
    for _ in range(2):
        for p in (real, meta):
            p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.offload()
        optimizer.state_dict()
        optimizer.state_dict(state_format="portable")
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert len(other.state) == 2
    assert len(optimizer.state) == 2


def test_what_was_loaded_for_a_lazy_module_waits_until_it_has_a_shape() -> None:
    def model(*, lazy: bool) -> nn.Module:
        torch.manual_seed(0)
        return nn.LazyLinear(3) if lazy else nn.Linear(4, 3)

    def train(module: nn.Module, optimizer: AdamW) -> None:
        module(torch.ones(2, 4)).sum().backward()
        optimizer.step()

    first = model(lazy=False)
    optimizer = AdamW(first.parameters(), variant="32bit")
    train(first, optimizer)
    second = model(lazy=True)
    resumed = AdamW(second.parameters(), variant="32bit")
    resumed.load_state_dict(saved(optimizer))
    second(torch.ones(2, 4))
    second.load_state_dict(first.state_dict())
    for module, each in ((first, optimizer), (second, resumed)):
        module.zero_grad()
        train(module, each)
    assert bits(list(first.parameters())) == bits(list(second.parameters()))
    assert state_bits(optimizer) == state_bits(resumed)
