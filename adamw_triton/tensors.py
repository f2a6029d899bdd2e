"""Which tensors can be stepped: each refusal names the parameter, what it was and what is allowed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from adamw_triton.state import shards

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.complex64)


def is_flattened(param: Tensor) -> bool:
    """Whether FSDP (version 1) has made it a part of one vector, of which each rank has a shard."""
    return bool(getattr(param, "_fsdp_flattened", False))


def is_trained(param: Tensor) -> bool:
    """Whether a parameter's state is to have a place: it may get gradients, or has one, and can be stepped.
    Not yet so are those of lazy modules and on the meta device."""
    if param.grad is None and not (param.requires_grad and _is_there(param)):
        return False
    return _fault(param) is None


def check_new_param(param: Tensor, name: str, stochastic: bool) -> None:
    """Of a parameter that is handed over. What is frozen or not there yet may be anything until it is
    stepped.

    Raises:
        TypeError, ValueError: it requires gradients, and a step would refuse it.
    """
    if param.requires_grad and _is_there(param):
        check_param(param, name, stochastic)


def check_params(params: object) -> None:
    """Of what an optimizer is made for. What an iterator gives is seen later, by torch.

    Raises:
        TypeError: it is a whole model, text, or nothing of which there could be several.
    """
    allowed = "params must be parameters, named parameters or groups in a list or from a generator"
    if isinstance(params, nn.Module) and not isinstance(params, nn.ParameterList):
        raise TypeError(f"{allowed}, not a whole {type(params).__name__}: pass its parameters()")
    if isinstance(params, Mapping):
        raise TypeError(f"{allowed}, not a mapping of {list(params)!r:.60}: pass [group], or values()")
    if isinstance(params, str) or not isinstance(params, Iterable):
        called = ": call it" if callable(params) else ""
        raise TypeError(f"{allowed}, not {params!r:.60}{called}")


def check_param(param: Tensor, name: str, stochastic: bool) -> None:
    """Of a parameter that is stepped. ``stochastic``: somebody asks for stochastic rounding.

    Raises:
        TypeError, ValueError: there is no update for such tensors.
    """
    if fault := _fault(param):
        error, what = fault
        raise error(f"{name} {what}")
    if stochastic and param.dtype is torch.float16:
        raise ValueError(
            f"{name} has dtype torch.float16, and stochastic_rounding=True is for bfloat16: fp16 ends at "
            "6e-8, where it would still lose small updates; use master_weights=True"
        )


def _is_there(param: Tensor) -> bool:
    return not (is_lazy(param) or param.is_meta)


def _fault(param: Tensor) -> tuple[type[Exception], str] | None:
    """Why a parameter cannot be stepped: what is raised, and the message but for its name."""
    if wrong := shards.fault(param):
        return ValueError, wrong
    param = shards.local(param)
    if param.dtype not in DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        return TypeError, f"has dtype {param.dtype}; AdamW supports {allowed}, and computes in float32"
    if param.layout is not torch.strided:
        return TypeError, f"has layout {param.layout}; AdamW supports dense parameters only"
    if is_traceable_wrapper_subclass(param):
        return TypeError, f"is a {type(param).__name__}; AdamW does not support wrapped tensors yet"
    if param.is_inference():
        return RuntimeError, (
            "was made in inference mode, and outside of it cannot be written to by views: pass a copy made "
            "there (param.detach().clone())"
        )
    if _overlaps(param):
        return ValueError, (
            f"of shape {tuple(param.shape)} and stride {param.stride()} has elements that share memory (an "
            "expanded tensor?): they cannot be updated one by one; pass a contiguous copy"
        )
    return None


def check_grad(param: Tensor, grad: Tensor, name: str) -> None:
    """Of the gradient of a parameter that is stepped, whose name this is.

    Raises:
        RuntimeError, TypeError: there is no update with such gradients.
    """
    if grad.layout is not torch.strided:
        raise RuntimeError(
            f"AdamW does not support sparse gradients: that of {name} has layout {grad.layout}; "
            "use torch.optim.SparseAdam for it"
        )
    if is_traceable_wrapper_subclass(grad):
        raise TypeError(
            f"the gradient of {name} is a {type(grad).__name__}; AdamW does not support wrapped tensors yet"
        )
    if grad.shape != param.shape:
        shapes = f"{tuple(grad.shape)}, the parameter {tuple(param.shape)}"
        raise RuntimeError(f"the gradient of {name} has shape {shapes}")
    if grad.device != param.device:
        raise RuntimeError(f"the gradient of {name} is on {grad.device}, the parameter on {param.device}")
    if grad.dtype not in DTYPES or grad.is_complex() != param.is_complex():
        raise TypeError(f"the gradient of {name} has dtype {grad.dtype}, the parameter {param.dtype}")


def name_of(group: Mapping[str, Any], group_index: int, index: int) -> str:
    """What messages call a parameter: its own name if the user passed named parameters, and took none out or
    in by hand since."""
    names = group.get("param_names", ())
    if len(names) == len(group["params"]):
        return f"parameter {names[index]!r}"
    return f"parameter {index} of group {group_index}"


def keys_of(groups: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """By id of each parameter, the name that the user gave it; else its group and its place there: "0.3".
    Names that several groups have are told apart by their group, too."""
    found, counts = {}, Counter(name for group in groups for name in group.get("param_names", ()))
    for group_index, group in enumerate(groups):
        names = group.get("param_names", ())
        known = len(names) == len(group["params"])
        for index, param in enumerate(group["params"]):
            name = str(names[index]) if known else str(index)
            found[id(param)] = name if known and counts[name] == 1 else f"{group_index}.{name}"
    return found


def model_names(model: torch.nn.Module, groups: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """A model's names of parameters, by those of ``keys_of``."""
    keys = keys_of(groups)
    return {keys[id(param)]: name for name, param in model.named_parameters() if id(param) in keys}


def named(groups: Sequence[Mapping[str, Any]]) -> list[tuple[Any, str]]:
    """Each parameter of all groups, or the index that stands for it, with what messages call it."""
    return [
        (param, name_of(group, group_index, index))
        for group_index, group in enumerate(groups)
        for index, param in enumerate(group["params"])
    ]


def _overlaps(tensor: Tensor) -> bool:
    """Whether two elements may share memory: from the smallest stride on, each must step over all
    that the smaller ones reach."""
    if tensor.numel() == 0:
        return False
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False
