"""Whether a step is like an earlier one: by torch's guards, and to the same answer without them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from adamw_triton import AdamW
from adamw_triton.step import stepped
from adamw_triton.step.stepped import Alike, Stepped

Params = list[Parameter]


def give(param: Parameter, data: Tensor) -> None:
    """Other data, and a gradient like it."""
    grad = param.grad
    param.grad, param.data = None, data
    param.grad = data if grad is None else grad.to(data.dtype).reshape(data.shape)


def swap_grads(a: Parameter, b: Parameter) -> None:
    a.grad, b.grad = b.grad, a.grad


def set_grad(grad: Callable[[Tensor], Tensor]) -> Callable[[Params], None]:
    def change(params: Params) -> None:
        assert params[0].grad is not None
        params[0].grad = grad(params[0].grad)

    return change


ALIKE: dict[str, Callable[[Params], None]] = {
    "nothing": lambda params: None,
    "other memory": set_grad(Tensor.clone),
    "other data": lambda params: setattr(params[0], "data", params[0].data.clone()),
    "gradients swapped": lambda params: swap_grads(params[0], params[1]),
    "one gradient for two": lambda params: setattr(params[1], "grad", params[0].grad),
    "frozen after backward": lambda params: setattr(params[0], "requires_grad", False),
}
OTHER: dict[str, Callable[[Params], None]] = {
    "dtype": lambda params: give(params[0], params[0].data.bfloat16()),
    "shape": lambda params: give(params[0], params[0].data.view(6, 4)),
    "strides": lambda params: setattr(params[0], "data", torch.ones(6, 4).t()),
    "a gradient's strides": set_grad(lambda grad: grad.t().contiguous().t()),
    "negative": set_grad(torch._neg_view),
    "zero": set_grad(lambda grad: torch._efficientzerotensor(grad.shape)),
    "no gradient": lambda params: setattr(params[0], "grad", None),
    "another parameter": lambda params: params.reverse(),
}


def groups_of(params: Params) -> list[dict[str, Params]]:
    return [{"params": params}]


@pytest.fixture(params=["with guards", "without"], autouse=True)
def guards(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param == "without":
        monkeypatch.setattr(stepped, "_guards", lambda tensors: lambda *_: False)
    return bool(request.param == "with guards")


@pytest.mark.parametrize("change", [*ALIKE, *OTHER])
def test_what_is_alike_and_what_is_not(change: str) -> None:
    params = [Parameter(torch.ones(4, 6)) for _ in range(2)]
    for param in params:
        param.grad = torch.ones(4, 6)
    before = Alike(Stepped.of(groups_of(params)))
    assert before.holds_for(Stepped.of(groups_of(params)))
    (ALIKE | OTHER)[change](params)
    assert before.holds_for(Stepped.of(groups_of(params))) == (change in ALIKE)


def test_other_groups_of_the_same_parameters_are_not_alike() -> None:
    params = [Parameter(torch.ones(3)) for _ in range(2)]
    for param in params:
        param.grad = torch.ones(3)
    together, apart = groups_of(params), [*groups_of(params[:1]), *groups_of(params[1:])]
    assert not Alike(Stepped.of(together)).holds_for(Stepped.of(apart))


def test_this_torch_has_guards(guards: bool) -> None:
    """Or a step takes twice as long on the host, and nobody would know why."""
    params = [Parameter(torch.ones(4, 6)), Parameter(torch.ones(3))]
    for param in params:
        param.grad = torch.ones_like(param)
    before, again = Alike(Stepped.of(groups_of(params))), Stepped.of(groups_of(params))
    assert before.holds_for(again)
    assert ("facts" not in again.__dict__) == guards


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_that_was_swapped_in_is_refused() -> None:
    """torch's guards would end the process."""
    param = Parameter(torch.ones(4, 4))
    optimizer = AdamW([param], variant="32bit")
    param.grad = torch.ones(4, 4)
    optimizer.step()
    nested = torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(4, 4)])
    nested.requires_grad_().to_padded_tensor(0.0).sum().backward()
    param.grad = None
    torch.utils.swap_tensors(param, nested)
    with pytest.raises(RuntimeError):
        optimizer.step()
