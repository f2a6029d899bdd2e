"""A state_dict into the optimizer's ``state``: all of it is checked before any of it is there.

torch's ``load_state_dict`` casts every tensor but ``step`` to its parameter's dtype, 8-bit codes
included. So tensors go through it in boxes.
"""

from __future__ import annotations

import copy
import logging
import numbers
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adamw_triton.checkpoint.entries import Entry, check_others, check_values, has_state, others_of
from adamw_triton.checkpoint.parts import put_together, read_part
from adamw_triton.checkpoint.saving import VERSION, VERSION_KEY
from adamw_triton.tensors import named

Groups = Sequence[dict[str, Any]]

_NEEDED = {"lr", "betas", "eps", "weight_decay", "params"}
_SWITCHES = ("amsgrad", "maximize")

_log = logging.getLogger("adamw_triton")


@dataclass(frozen=True)
class _Box:
    content: Entry


def unbox(state: Mapping[Any, Any]) -> defaultdict[Any, Any]:
    """As every torch optimizer's ``state`` is."""
    content = ((key, value.content if isinstance(value, _Box) else value) for key, value in state.items())
    return defaultdict(dict, content)


@dataclass(frozen=True)
class Reader:
    """A ``load_state_dict`` pre-hook that refuses what ``prepare`` could not take, and boxes the rest. It
    sees what the user's own hooks have made of the state_dict."""

    check_group: Callable[[dict[str, Any]], None]
    """Refuses bad hyperparameters."""

    def __call__(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """
        Raises:
            ValueError: what is wrong with which parameter, or with which group.
        """
        check_form(state_dict)
        saved_groups, groups = state_dict["param_groups"], optimizer.param_groups
        _check_same(saved_groups, groups)
        check_keys(state_dict)
        for index, group in enumerate(saved_groups):
            self._check_hyperparameters(group, index)
        state = dict(state_dict["state"])
        keys = [key for group in saved_groups for key in group["params"]]
        _check_numbering(keys, groups)
        for key, (param, name) in zip(keys, named(groups), strict=True):
            if key in state and not isinstance(state[key], _Box):
                state[key] = _Box(_checked(state[key], param, name))
        return {**state_dict, "state": state}

    def _check_hyperparameters(self, group: dict[str, Any], index: int) -> None:
        try:
            check_numbers(group)
            self.check_group(group)
            copy.deepcopy(group)  # torch will
        except Exception as error:  # whatever somebody's values do when they are compared or copied
            raise ValueError(f"param_groups[{index}]: {error}") from error
        if group.get("decoupled_weight_decay") is False and group["weight_decay"] != 0:
            _log.warning(
                "param_groups[%d] is torch.optim.Adam's, with weight_decay=%s added to the gradient; AdamW "
                "goes on with the same number, decoupled",
                *(index, group["weight_decay"]),
            )


def _check_numbering(keys: Sequence[Any], groups: Groups) -> None:
    """Two parameters cannot have one state; one that a group lists twice has it twice."""
    found: dict[Any, Tensor] = {}
    for key, (param, name) in zip(keys, named(groups), strict=True):
        if found.setdefault(key, param) is not param:
            raise ValueError(f"{name} and another have the same number, {key!r}, in the loaded state dict")


def _checked(entry: Any, param: Tensor, name: str) -> Entry:
    checked: dict[Any, Any] = {}
    if has_state(entry):
        saved = read_part(entry, param, name)
        check_values(saved, name)
        checked = {**saved.scalars, **put_together(saved.parts, param, saved.block)}
    else:
        check_others(entry, name)
    for key, value in others_of(entry).items():
        try:
            checked[key] = _cast(value, param)
        except Exception as error:  # a tensor without values, a container that cannot be made of its items
            raise ValueError(f"state of {name}: {key!r} cannot be copied: {error}") from error
    return checked


def _cast(value: Any, param: Tensor) -> Any:
    """As torch's ``load_state_dict`` does with what it does not know."""
    if isinstance(value, Tensor):
        return value.to(device=param.device, dtype=param.dtype if param.is_floating_point() else None)
    if isinstance(value, dict):
        return {key: _cast(item, param) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        items = [_cast(item, param) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def check_numbers(group: Mapping[str, Any]) -> None:
    """Whether a group's hyperparameters are numbers at all.

    Raises:
        ValueError: naming what is not.
    """
    betas = group["betas"]
    if not isinstance(betas, list | tuple) or len(betas) != 2:
        raise ValueError(f"betas must be two numbers, got {betas!r}")
    named_values = {key: group[key] for key in ("lr", "eps", "weight_decay")}
    for key, value in {**named_values, "betas[0]": betas[0], "betas[1]": betas[1]}.items():
        if not _is_number(value):
            raise ValueError(f"{key} must be a number, got {value!r}")
    for key in _SWITCHES:
        if not (isinstance(group.get(key, False), int) and group.get(key, False) in (0, 1)):
            raise ValueError(f"{key} must be True or False, got {group[key]!r}")


def check_form(state_dict: Any) -> None:
    """
    Raises:
        ValueError: it is no state_dict of an AdamW, or a newer release's.
    """
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        has = list(state_dict)[:20] if isinstance(state_dict, Mapping) else type(state_dict).__name__
        raise ValueError(f"not an optimizer's state_dict, which has 'state' and 'param_groups': it has {has}")
    version = state_dict.get(VERSION_KEY, VERSION)
    if type(version) is not int or not 1 <= version <= VERSION:
        raise ValueError(
            f"the state_dict has {VERSION_KEY}={version!r}, and this release reads up to {VERSION}: load it "
            "with the release that wrote it, or a newer one"
        )
    state, groups = state_dict["state"], state_dict["param_groups"]
    if not isinstance(state, Mapping) or not isinstance(groups, list | tuple):
        raise ValueError("not an optimizer's state_dict: state is no dict, or param_groups no list")
    for index, group in enumerate(groups):
        if not isinstance(group, dict):
            raise ValueError(f"param_groups[{index}] is a {type(group).__name__}, not a dict")
        if missing := sorted(_NEEDED - set(group)):
            raise ValueError(
                f"param_groups[{index}] is no AdamW's: it has no {', '.join(missing)}, "
                f"only {', '.join(map(str, group))}"
            )
        for key in ("params", "param_names"):
            if not isinstance(group.get(key, []), list | tuple):
                raise ValueError(f"param_groups[{index}]: {key} is a {type(group[key]).__name__}, not a list")
        for key in group["params"]:
            if not isinstance(key, Hashable):
                raise ValueError(f"param_groups[{index}]: {key!r} in params cannot be a key of the state")
        names = group.get("param_names", ())
        if wrong := [name for name in names if not isinstance(name, str)]:
            raise ValueError(f"param_groups[{index}]: {wrong[0]!r} in param_names is no name")
        if "param_names" in group and len(names) != len(group["params"]):
            raise ValueError(f"param_groups[{index}] has not as many param_names as params")


def check_keys(state_dict: Mapping[str, Any]) -> None:
    """State under keys of no parameter may be a wrapper's, but not look like a parameter's.

    Raises:
        ValueError: there is state of no parameter.
    """
    keys = {key for group in state_dict["param_groups"] for key in group["params"]}
    if strange := [
        key
        for key, entry in state_dict["state"].items()
        if key not in keys and isinstance(entry, Mapping) and has_state(entry)
    ]:
        raise ValueError(f"the state has entries for {strange}, which are in no group of its param_groups")


def _check_same(saved: Groups, groups: Groups) -> None:
    sizes, saved_sizes = ([len(group["params"]) for group in some] for some in (groups, saved))
    names, saved_names = (
        [name for group in some for name in group.get("param_names", ())] for some in (groups, saved)
    )
    if sizes != saved_sizes:
        differing = ""
        if names and saved_names:
            missing, extra = sorted(set(names) - set(saved_names)), sorted(set(saved_names) - set(names))
            differing = f"; missing: {', '.join(missing) or 'none'}; unknown: {', '.join(extra) or 'none'}"
        raise ValueError(
            f"loaded state dict doesn't match the size of optimizer's groups: it has groups of {saved_sizes} "
            f"parameters, the optimizer of {sizes}{differing}"
        )
    # torch goes by position alone. A wrapper may have changed all names, but one that is now elsewhere
    # would get another parameter's state.
    for position, (here, there) in enumerate(zip(names, saved_names, strict=False)):
        if here != there and there in names:
            raise ValueError(
                f"parameter {there!r} is number {position} in the loaded state dict, where the optimizer has "
                f"{here!r}: pass the parameters in the same order"
            )


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not (value.is_meta or value.is_complex() or value.dtype is torch.bool)
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 1e300  # a double
    return isinstance(value, numbers.Real)
