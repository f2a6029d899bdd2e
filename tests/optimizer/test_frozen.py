"""What is passed along and not trained is left alone, whatever it is; until it is to be trained after all."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.testing._internal.two_tensor import TwoTensor

from adamw_triton import AdamW
from adamw_triton.arguments import VARIANTS
from tests.optimizer.problems import bits

FROZEN: dict[str, Callable[[], Tensor]] = {
    "uint8": lambda: torch.zeros(64, 1, dtype=torch.uint8),
    "int8": lambda: torch.zeros(8, 8, dtype=torch.int8),
    "int64": lambda: torch.zeros(8, dtype=torch.int64),
    "bool": lambda: torch.zeros(8, dtype=torch.bool),
    "fp8": lambda: torch.zeros(8, 8).to(torch.float8_e4m3fn),
    "float64": lambda: torch.zeros(8, 8, dtype=torch.float64),
    "complex128": lambda: torch.zeros(8, dtype=torch.complex128),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "csr": lambda: torch.eye(3).to_sparse_csr(),
    "expanded": lambda: torch.zeros(1).expand(9),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "wrapped": lambda: TwoTensor(torch.zeros(3), torch.zeros(3)),
    "meta": lambda: torch.zeros(8, device="meta"),
}

pytestmark = [
    pytest.mark.bookkeeping,
    pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:Lazy modules", "ignore:.*quantized.*"),
]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", FROZEN)
@pytest.mark.parametrize("named", [False, True])
def test_frozen_parameters_may_be_anything(kind: str, variant: str, named: bool) -> None:
    frozen, adapter, alone = (
        Parameter(FROZEN[kind](), requires_grad=False),
        Parameter(torch.ones(8, 8)),
        Parameter(torch.ones(8, 8)),
    )
    members = [("base", frozen), ("adapter", adapter)] if named else [frozen, adapter]
    optimizer = AdamW(members, variant=variant)
    single = AdamW([alone], variant=variant)
    for _ in range(2):
        adapter.grad, alone.grad = torch.ones(8, 8), torch.ones(8, 8)
        optimizer.step()
        single.step()
    assert bits([adapter]) == bits([alone])
    assert list(optimizer.state) == [adapter]
    assert optimizer.memory() == single.memory()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.offload()
    optimizer.zero_grad()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["float64", "complex128", "expanded"])
def test_thawed_ones_are_refused_at_the_step_and_named(kind: str, variant: str) -> None:
    frozen, adapter = Parameter(FROZEN[kind](), requires_grad=False), Parameter(torch.ones(8, 8))
    optimizer = AdamW([{"params": [adapter]}, {"params": [frozen]}], variant=variant)
    adapter.grad = torch.ones(8, 8)
    optimizer.step()
    frozen.requires_grad_()
    optimizer.step()  # it has no gradient yet
    assert list(optimizer.state) == [adapter]
    frozen.grad = torch.ones_like(frozen)
    before = bits([adapter]), dict(optimizer.state)
    with pytest.raises((TypeError, ValueError), match=r"^parameter 0 of group 1 (has|of) "):
        optimizer.step()
    assert (bits([adapter]), dict(optimizer.state)) == before
    frozen.grad = None
    optimizer.step()
    assert float(optimizer.state[adapter]["step"]) == 3


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_thawed_later_are_trained(variant: str) -> None:
    late, first = Parameter(torch.ones(70, 70), requires_grad=False), Parameter(torch.ones(8))
    optimizer = AdamW([late, first], variant=variant, lr=0.1, weight_decay=0.0)
    first.grad = torch.ones(8)
    optimizer.step()
    late.requires_grad_()
    late.grad = torch.ones(70, 70)
    optimizer.step()
    assert late.max() < 0.91
    assert [float(optimizer.state[p]["step"]) for p in (late, first)] == [1, 2]


@pytest.mark.parametrize("variant", VARIANTS)
def test_lazy_modules(variant: str) -> None:
    """Their parameters have no shape before the first forward, and some never get one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, unused = nn.LazyLinear(4), nn.LazyLinear(4)
    optimizer = AdamW([*model.parameters(), *unused.parameters()], variant=variant)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    assert list(optimizer.state) == list(model.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_meta_parameters_have_no_memory_to_update(variant: str) -> None:
    """Dry runs step on them, and torch.optim.AdamW lets them."""
    ghost, real = Parameter(torch.ones(70, 70, device="meta")), Parameter(torch.ones(8))
    optimizer = AdamW([ghost, Parameter(torch.ones(5000, device="meta")), real], variant=variant)
    for _ in range(2):
        ghost.grad, real.grad = torch.ones(70, 70, device="meta"), torch.ones(8)
        optimizer.step()
    assert {t.device.type for k, t in optimizer.state[ghost].items() if k != "step"} == {"meta"}
    assert optimizer.state[real]["step"] == 2
    assert real.max() < 1
