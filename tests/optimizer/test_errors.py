"""Bad input: a clear exception, at once, and nothing written."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.testing._internal.two_tensor import TwoTensor

from adamw_triton import AdamW
from adamw_triton.tensors import check_grad
from tests import gradients
from tests.optimizer.problems import bits, parameters, set_grads, state_bits, train

BAD_ARGUMENTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"lr": -1.0}, ValueError, "learning rate: -1.0"),
    ({"lr": math.nan}, ValueError, "learning rate: nan"),
    ({"lr": math.inf}, ValueError, "learning rate: inf"),
    ({"lr": torch.tensor(-1.0)}, ValueError, "learning rate: -1.0"),
    ({"betas": (1.0, 0.9)}, ValueError, "index 0: 1.0"),
    ({"betas": (0.9, -0.1)}, ValueError, "index 1: -0.1"),
    ({"betas": (0.9, math.nan)}, ValueError, "index 1: nan"),
    ({"betas": (0.9,)}, ValueError, "betas must be"),
    ({"eps": -1e-8}, ValueError, "epsilon value: -1e-08"),
    ({"eps": math.nan}, ValueError, "epsilon value: nan"),
    ({"weight_decay": -0.1}, ValueError, "weight_decay value: -0.1"),
    ({"weight_decay": math.inf}, ValueError, "weight_decay value: inf"),
    ({"variant": "16bit"}, ValueError, "'16bit'.*'32bit', '8bit'"),
    ({"variant": None}, ValueError, "Invalid variant: None"),
    ({"prefer": "accuracy"}, ValueError, "Invalid prefer: 'accuracy'; it must be one of 'speed', 'exact'"),
    ({"prefer": "exact", "variant": "8bit"}, ValueError, "prefer='exact' needs variant='auto'"),
    ({"variant": "8bit", "block_size": 64}, ValueError, "block_size: 64.*128 or 256"),
    ({"variant": "8bit", "amsgrad": True}, ValueError, "amsgrad.*state_bits=32"),
    ({"variant": "paged_8bit", "amsgrad": True}, ValueError, "amsgrad.*state_bits=32"),
    (
        {"variant": "8bit", "memory_budget": "4GiB"},
        ValueError,
        "'4GiB' needs variant='auto' or a paged one.*'8bit'",
    ),
    (
        {"variant": "8bit", "transfer": "copy"},
        ValueError,
        "transfer='copy' needs variant='auto' or a paged one",
    ),
    ({"variant": "paged_8bit", "transfer": "dma"}, ValueError, "transfer: 'dma'.*'copy', 'zero_copy'"),
    ({"variant": "paged_8bit", "memory_budget": "lots"}, ValueError, "memory_budget: 'lots'.*'4GiB'"),
    ({"variant": "paged_8bit", "memory_budget": -1}, ValueError, "memory_budget: -1"),
    ({"variant": "auto", "memory_budget": "10KiB"}, ValueError, "10.0 KiB is too small.*192.0 KiB"),
    ({"variant": "paged_8bit", "memory_budget": 1.5}, ValueError, "memory_budget: 1.5"),
    ({"variant": "paged_8bit", "memory_budget": "10KiB"}, ValueError, "10.0 KiB is too small.*192.0 KiB"),
    (
        {"maximize": 32},
        ValueError,
        "Invalid maximize: 32; it must be True or False",
    ),  # bitsandbytes' optim_bits
    ({"maximize": "False"}, ValueError, "Invalid maximize: 'False'"),
    ({"amsgrad": "False"}, ValueError, "Invalid amsgrad: 'False'"),
    ({"capturable": "no"}, ValueError, "Invalid capturable: 'no'"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_ARGUMENTS, ids=lambda value: str(value)[:40])
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AdamW(parameters(), **arguments)


def test_bad_state_bits_of_a_group() -> None:
    with pytest.raises(ValueError, match=r"Invalid state_bits: 4; it must be 8, 32 or None"):
        AdamW([{"params": parameters(), "state_bits": 4}])
    with pytest.raises(ValueError, match="amsgrad"):
        AdamW([{"params": parameters(), "state_bits": 8, "amsgrad": True}])


BAD_PARAMETERS: dict[str, tuple[Callable[[], Tensor], type[Exception], str]] = {
    "float64": (lambda: torch.zeros(3, dtype=torch.float64), TypeError, "float64; AdamW supports float32"),
    "complex128": (lambda: torch.zeros(3, dtype=torch.complex128), TypeError, "complex128"),
    "sparse": (lambda: torch.eye(3).to_sparse(), TypeError, "layout torch.sparse_coo"),
    "expanded": (lambda: torch.zeros(1).expand(3), ValueError, "share.*memory"),
    "overlapping": (lambda: torch.zeros(9).as_strided((3, 3), (2, 1)), ValueError, "share.*memory"),
    "wrapped": (lambda: TwoTensor(torch.zeros(3), torch.zeros(3)), TypeError, "TwoTensor"),
}


@pytest.mark.parametrize("kind", BAD_PARAMETERS)
def test_bad_parameters_are_named(kind: str) -> None:
    make, error, message = BAD_PARAMETERS[kind]
    good = Parameter(torch.ones(3))
    with pytest.raises(error, match=f"parameter 1 of group 0.*{message}"):
        AdamW([good, make().requires_grad_()])
    with pytest.raises(error, match=f"parameter 'odd'.*{message}"):
        AdamW([("good", good), ("odd", make().requires_grad_())])
    optimizer = AdamW([good])
    with pytest.raises(error, match="parameter 0 of group 1"):
        optimizer.add_param_group({"params": [make().requires_grad_()]})
    assert len(optimizer.param_groups) == 1
    train(optimizer, 1)


def _half_shape(p: Tensor) -> None:
    """A gradient of another shape: torch refuses to assign one, but the parameter may be replaced."""
    p.data = p.data[: len(p) // 2].clone()


def _other_dtype(p: Tensor) -> None:
    gradients.allow(p, torch.float64)
    p.grad = p.detach().double()


def _sparse(p: Tensor) -> None:
    p.grad = p.detach().to_sparse()


def _conjugate_dtype(p: Tensor) -> None:
    gradients.allow(p, torch.complex64)
    p.grad = p.detach().to(torch.complex64)


BAD_GRADIENTS: dict[str, tuple[Callable[[Tensor], None], type[Exception], str]] = {
    "sparse": (_sparse, RuntimeError, "sparse gradients: that of {name} .*SparseAdam"),
    "other shape": (
        _half_shape,
        RuntimeError,
        r"gradient of {name} has shape \(500,\), the parameter \(250,\)",
    ),
    "float64": (
        _other_dtype,
        TypeError,
        "gradient of {name} has dtype torch.float64, the parameter torch.float32",
    ),
    "complex": (
        _conjugate_dtype,
        TypeError,
        "gradient of {name} has dtype torch.complex64, the parameter torch.float32",
    ),
}


@pytest.mark.parametrize("kind", BAD_GRADIENTS)
@pytest.mark.parametrize("variant", ["32bit", "8bit"])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_bad_gradients_are_named_and_nothing_is_written(kind: str, variant: str, steps_before: int) -> None:
    spoil, error, message = BAD_GRADIENTS[kind]
    params = parameters(((5000,), (500,)))
    optimizer = AdamW([{"params": params[:1]}, {"params": params[1:]}], variant=variant)
    train(optimizer, steps_before)
    set_grads(params, 9)
    spoil(params[1])
    before = bits(params), state_bits(optimizer)
    with pytest.raises(error, match=message.format(name="parameter 0 of group 1")):
        optimizer.step()
    assert (bits(params), state_bits(optimizer)) == before


def test_a_gradient_on_another_device() -> None:
    """torch lets nobody assign one on the CPU; a model that was moved half may hold one."""
    p = Parameter(torch.ones(3))
    with pytest.raises(RuntimeError, match="of parameter 'p' is on meta, the parameter on cpu"):
        check_grad(p, torch.ones(3, device="meta"), "parameter 'p'")


@pytest.mark.parametrize("change", [{"lr": -1.0}, {"betas": (0.9, 1.5)}, {"eps": math.nan}])
def test_hyperparameters_that_went_bad_later_write_nothing(change: dict[str, Any]) -> None:
    params = parameters(((5000,), (5,)))
    optimizer = AdamW([{"params": params[:1]}, {"params": params[1:]}])
    train(optimizer, 1)
    before = bits(params), state_bits(optimizer)
    optimizer.param_groups[1].update(change)
    with pytest.raises(ValueError, match=r"Invalid|betas"):
        optimizer.step()
    assert (bits(params), state_bits(optimizer)) == before


def test_a_parameter_that_changed_its_shape_keeps_its_state_until_told() -> None:
    p = Parameter(torch.ones(6))
    optimizer = AdamW([p])
    train(optimizer, 1)
    p.data = torch.ones(8)
    p.grad = torch.ones(8)
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0 had shape \(6,\).*has now \(8,\)"):
        optimizer.step()
    del optimizer.state[p]
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].shape == (8,)


@pytest.mark.parametrize(
    "wrong", [{"lr": "x"}, {"lr": None}, {"betas": None}, {"eps": None}, {"eps": torch.ones(2)}], ids=str
)
def test_hyperparameters_that_are_no_numbers_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=f"must be numbers .*, got {next(iter(wrong))}="):
        AdamW([Parameter(torch.ones(3))], **wrong)
    param = Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = AdamW([param])
    optimizer.param_groups[0].update(wrong)
    with pytest.raises(TypeError, match=f"must be numbers .*, got {next(iter(wrong))}="):
        optimizer.step()
    assert torch.equal(param, torch.ones(3))


@pytest.mark.parametrize("count", [-5.0, float("nan")])
def test_a_step_count_that_is_none_is_named(count: float) -> None:
    param = Parameter(torch.ones(3))
    optimizer = AdamW([param], variant="32bit")
    for _ in range(2):
        param.grad = torch.ones(3)
        optimizer.step()
    before = param.detach().clone()
    optimizer.state[param]["step"].fill_(count)
    with pytest.raises(ValueError, match=r"a parameter of group 0 has taken -?\d+ steps by its"):
        optimizer.step()
    assert torch.equal(param, before)
