"""A step that is refused has written nothing, and the next good one goes on as if it had not been tried."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.testing._internal.two_tensor import TwoTensor

from adamw_triton import AdamW
from adamw_triton.arguments import VARIANTS
from tests import gradients
from tests.optimizer.problems import bits, parameters, set_grads, state_bits, train

pytestmark = pytest.mark.bookkeeping

SHAPES = ((70, 70), (40, 30), (3,))


def _as(dtype: torch.dtype) -> Callable[[AdamW, Tensor], None]:
    """What ``model.to(dtype)`` does to a parameter and its gradient."""

    def spoil(optimizer: AdamW, p: Tensor) -> None:
        grad, p.grad = p.grad, None
        p.data = p.data.to(dtype)
        assert grad is not None
        p.grad = grad.to(dtype)

    return spoil


def _data(change: Callable[[Tensor], Tensor]) -> Callable[[AdamW, Tensor], None]:
    def spoil(optimizer: AdamW, p: Tensor) -> None:
        p.data = change(p.data)

    return spoil


def _gradient(change: Callable[[Tensor], Tensor]) -> Callable[[AdamW, Tensor], None]:
    def spoil(optimizer: AdamW, p: Tensor) -> None:
        grad = change(torch.ones_like(p))
        gradients.allow(p, grad.dtype)
        p.grad = grad

    return spoil


def _append(make: Callable[[], Tensor]) -> Callable[[AdamW, Tensor], None]:
    """Put into the group of ``p``, in its place, by hand."""

    def spoil(optimizer: AdamW, p: Tensor) -> None:
        q = make()
        q.grad = make()
        optimizer.param_groups[1]["params"].insert(0, q)

    return spoil


FAULTS: dict[str, tuple[Callable[[AdamW, Tensor], None], type[Exception], str]] = {
    "double": (_as(torch.float64), TypeError, "has dtype torch.float64; AdamW supports float32, bfloat16"),
    "double, the gradient not": (_data(Tensor.double), TypeError, "has dtype torch.float64"),
    "complex128": (_as(torch.complex128), TypeError, "has dtype torch.complex128"),
    "fp8": (_as(torch.float8_e5m2), TypeError, "has dtype torch.float8_e5m2"),
    "complex": (_as(torch.complex64), RuntimeError, r"had shape \(40, 30\) .* \(40, 30\) of complex numbers"),
    "complex, the gradient not": (
        _data(lambda t: t.to(torch.complex64)),
        TypeError,
        "gradient .* torch.float32, the parameter torch.complex64",
    ),
    "expanded": (_data(lambda t: t[:1].expand(40, 30)), ValueError, "share memory"),
    "overlapping": (_data(lambda t: t.flatten().as_strided((40, 30), (1, 2))), ValueError, "share memory"),
    "shorter": (_data(lambda t: t[:20]), RuntimeError, r"gradient .* \(40, 30\), the parameter \(20, 30\)"),
    "float64 by hand": (_append(lambda: torch.ones(3, dtype=torch.float64)), TypeError, "torch.float64"),
    "integers by hand": (_append(lambda: torch.ones(3, dtype=torch.int32)), TypeError, "torch.int32"),
    "sparse by hand": (_append(lambda: torch.eye(3).to_sparse()), TypeError, "layout torch.sparse_coo"),
    "wrapped by hand": (_append(lambda: TwoTensor(torch.ones(3), torch.ones(3))), TypeError, "TwoTensor"),
    "expanded by hand": (_append(lambda: torch.ones(1).expand(9)), ValueError, "share memory"),
    "sparse gradient": (_gradient(Tensor.to_sparse), RuntimeError, "layout torch.sparse_coo.*SparseAdam"),
    "wrapped gradient": (_gradient(lambda t: TwoTensor(t, t)), TypeError, "gradient .* is a TwoTensor"),
    "double gradient": (_gradient(Tensor.double), TypeError, "gradient .* torch.float64, the parameter"),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("ordered", [True, False], ids=["contiguous", "transposed"])
def test_refused_by_name_and_then_goes_on(kind: str, variant: str, ordered: bool) -> None:
    spoil, error, message = FAULTS[kind]

    def made() -> tuple[list[Parameter], AdamW]:
        params = parameters(SHAPES)
        if not ordered:
            params[1].data = params[1].data.t().contiguous().t()
        return params, AdamW([{"params": params[:1]}, {"params": params[1:]}], variant=variant)

    (params, optimizer), (alone, undisturbed) = made(), made()
    train(optimizer, 2)
    train(undisturbed, 3)
    spoilt, data = params[1], params[1].data
    set_grads(params, 9)
    spoil(optimizer, spoilt)
    before = bits([params[0], params[2], data]), state_bits(optimizer)
    for _ in range(2):
        with pytest.raises(error, match=message) as refusal:
            optimizer.step()
        assert "parameter 0 of group 1 " in str(refusal.value)
        assert (bits([params[0], params[2], data]), state_bits(optimizer)) == before
    spoilt.grad, spoilt.data = None, data
    optimizer.param_groups[1]["params"] = params[1:]
    train(optimizer, 1, first=3)
    assert bits(params) == bits(alone)
    assert state_bits(optimizer) == state_bits(undisturbed)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_changed_between_steps_can_still_be_moved_and_saved(variant: str) -> None:
    params = parameters(SHAPES)
    optimizer = AdamW(params, variant=variant)
    train(optimizer, 1)
    before = state_bits(optimizer)
    params[0].data = torch.ones(3, 5)
    params[1].data = params[1].data.to(torch.complex64)
    optimizer.offload()
    optimizer.reload()
    assert state_bits(optimizer) == before
    assert optimizer.state_dict()["state"].keys() == {0, 1, 2}
