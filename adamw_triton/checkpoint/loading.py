"""State into the optimizer: everything is checked, then every tensor is placed into the flat buffers.

torch's ``load_state_dict`` casts every tensor but ``step`` to its parameter's dtype, 8-bit codes
included. So tensors go through it in boxes.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adamw_triton.arguments import named
from adamw_triton.checkpoint.entries import Entry, check_values, flat_of, read
from adamw_triton.checkpoint.saving import VERSION, VERSION_KEY
from adamw_triton.state.buffers import Slot
from adamw_triton.state.formats import as_real

Groups = Sequence[dict[str, Any]]

_NEEDED = {"lr", "betas", "eps", "weight_decay", "params"}

_log = logging.getLogger("adamw_triton")


@dataclass(frozen=True)
class _Box:
    content: Entry


def unbox(state: Mapping[Any, Any]) -> dict[Any, Any]:
    return {key: dict(value.content) if isinstance(value, _Box) else value for key, value in state.items()}


@dataclass(frozen=True)
class Reader:
    """A ``load_state_dict`` pre-hook that refuses what ``place`` could not take, and boxes the rest. It sees
    what the user's own hooks have made of the state_dict."""

    check_group: Callable[[dict[str, Any]], None]
    """Refuses bad hyperparameters."""
    slots: Mapping[int, Slot]
    """The present ones, by id of their parameter: the state_dict may be views of them."""

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
        for key, (param, name) in zip(keys, named(groups), strict=True):
            if state.get(key):
                state[key] = _Box(self._checked(state[key], param, name))
        return {**state_dict, "state": state}

    def _check_hyperparameters(self, group: dict[str, Any], index: int) -> None:
        try:
            self.check_group(group)
        except (TypeError, ValueError) as error:
            raise ValueError(f"param_groups[{index}]: {error}") from error
        if group.get("decoupled_weight_decay") is False and group["weight_decay"] != 0:
            _log.warning(
                "param_groups[%d] is torch.optim.Adam's, with weight_decay=%s added to the gradient; AdamW "
                "goes on with the same number, decoupled",
                *(index, group["weight_decay"]),
            )

    def _checked(self, entry: Entry, param: Tensor, name: str) -> Entry:
        saved = read(entry, name, as_real(param).shape)
        check_values(saved, name)
        parts = {key: self._apart(part, param) for key, part in saved.parts.items()}
        return {"step": torch.tensor(saved.step, dtype=torch.float32, device="cpu"), **parts}

    @functools.cached_property
    def _arrays(self) -> list[Tensor]:
        buffers = dict.fromkeys(slot.buffer for slot in self.slots.values())
        return [array for buffer in buffers for array in buffer.arrays.values()]

    def _apart(self, part: Tensor, param: Tensor) -> Tensor:
        """A copy if it is the state of another parameter here, which may be overwritten before it is read."""
        if not any(_overlap(part, array) for array in self._arrays):
            return part
        own = self.slots.get(id(param))
        is_own = own is not None and any(_overlap(part, array) for array in own.flat().values())
        return part if is_own else part.clone()


def check_form(state_dict: Any) -> None:
    """
    Raises:
        ValueError: it is no state_dict of an AdamW, or a newer release's.
    """
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        has = list(state_dict)[:20] if isinstance(state_dict, Mapping) else type(state_dict).__name__
        raise ValueError(f"not an optimizer's state_dict, which has 'state' and 'param_groups': it has {has}")
    version = state_dict.get(VERSION_KEY, VERSION)
    if version not in range(1, VERSION + 1):
        raise ValueError(
            f"the state_dict has {VERSION_KEY}={version!r}, and this release reads up to {VERSION}: load it "
            "with the release that wrote it, or a newer one"
        )
    state, groups = state_dict["state"], state_dict["param_groups"]
    if not isinstance(state, Mapping) or not isinstance(groups, list | tuple):
        raise ValueError("not an optimizer's state_dict: state is no dict, or param_groups no list")
    for index, group in enumerate(groups):
        if missing := sorted(_NEEDED - set(group)):
            raise ValueError(
                f"param_groups[{index}] is no AdamW's: it has no {', '.join(missing)}, "
                f"only {', '.join(map(str, group))}"
            )
        if len(group.get("param_names", group["params"])) != len(group["params"]):
            raise ValueError(f"param_groups[{index}] has not as many param_names as params")


def check_keys(state_dict: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: there is state of no parameter.
    """
    keys = {key for group in state_dict["param_groups"] for key in group["params"]}
    if strange := [key for key in state_dict["state"] if key not in keys]:
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


def place(entry: Entry, slot: Slot) -> None:
    """Copy a parameter's state, of any dialect, into its slot: code by code if the codes are the slot's."""
    saved = read(entry, slot.name, as_real(slot.param).shape)
    into = slot.flat()
    if saved.format == slot.format and _same_order(saved.elements, slot):
        for name, target in into.items():
            target.copy_(flat_of(saved.parts[name]))
    else:
        where = next(iter(into.values())).device  # paged: the host, for the moments may not fit the GPU
        moments = saved.to(where).moments()
        moments.setdefault("max_exp_avg_sq", moments["exp_avg_sq"])
        slot.format.encode({key: _in_order_of(slot, moment) for key, moment in moments.items()}, into)
    slot.buffer.steps[slot.index] = saved.step


def _same_order(tensor: Tensor, slot: Slot) -> bool:
    pairs = zip(tensor.shape, tensor.stride(), slot.strides, strict=True)
    return all(size == 1 or stride == ours for size, stride, ours in pairs)


def _in_order_of(slot: Slot, real: Tensor) -> Tensor:
    """One-dimensional, in the slot's memory order."""
    if not _same_order(real, slot):
        ordered = torch.empty_strided(real.shape, slot.strides, dtype=real.dtype, device=real.device)
        real = ordered.copy_(real)
    return real.as_strided((slot.numel,), (1,))


def _overlap(a: Tensor, b: Tensor) -> bool:
    if a.device != b.device:
        return False
    starts = [tensor.data_ptr() for tensor in (a, b)]
    return starts[0] < starts[1] + b.nbytes and starts[1] < starts[0] + _span(a)


def _span(tensor: Tensor) -> int:
    """Bytes from its first to its last element."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (reach + 1) * tensor.element_size() if tensor.numel() else 0
