"""Exact weights as fp32: of one parameter, of a whole model, and back into both of their halves."""

from __future__ import annotations

import logging
from collections import OrderedDict, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from adamw_triton.checkpoint.parts import read_part
from adamw_triton.state.buffers import Slot, State, remember
from adamw_triton.state.formats import KEPT, kept_with
from adamw_triton.state.shards import like, local, part
from adamw_triton_kernels import weights
from adamw_triton_kernels.work import REMAINDER

_log = logging.getLogger("adamw_triton")

_HOST = torch.device("cpu")
_MOST_NAMES = 5
"""That an error tells."""


@dataclass(frozen=True)
class Incoming:
    """A model's weights that were found to fit it."""

    model: nn.Module
    exact: Mapping[int, tuple[Tensor, Tensor]]
    """By id of the parameter, it and what it is to be."""
    rest: Mapping[str, Any]
    """What the model loads by itself."""
    rounded: int
    """How many of the optimizer's weights among them are to have 16 bits."""


@dataclass(frozen=True)
class Masters:
    """Those of one optimizer, whose store has been renewed."""

    groups: Sequence[Mapping[str, Any]]
    state: State
    exact: Collection[int]
    """Ids of the parameters that are kept exactly."""

    def weight(self, param: Tensor) -> Tensor:
        """Of one parameter: a new tensor where it is.

        Raises:
            ValueError: the parameter is in no group.
        """
        if id(param) not in self._ours:
            shape = f" of shape {tuple(param.shape)}" if isinstance(param, Tensor) else ""
            raise ValueError(f"a {type(param).__name__}{shape} is no parameter of this optimizer")
        return self._exact(param, param.device)

    def state_dict(self, model: nn.Module) -> dict[str, Any]:
        """The model's, on the host, in fp32 where weights are exact. Tied ones are one tensor there, too.

        Raises:
            ValueError: the model has none of the parameters.
        """
        found = self._tensors(model)
        once: dict[int, Tensor] = {}
        for value in found.values():
            if isinstance(value, Tensor) and id(value) not in once:
                exact = id(value) in self.exact
                once[id(value)] = self._exact(value, _HOST) if exact else value.detach().to(_HOST, copy=True)
        found.update([(name, once.get(id(value), value)) for name, value in found.items()])
        return found

    def check(self, model: nn.Module, state_dict: object) -> Incoming:
        """Refuse what the model could not take whole. Of a tied weight, one name is enough.

        Raises:
            ValueError: what is missing, unknown or wrong, by name.
        """
        targets = self._tensors(model)
        if not isinstance(state_dict, Mapping):
            raise ValueError(f"not a model's state_dict but a {type(state_dict).__name__}")
        same: dict[Any, list[str]] = defaultdict(list)
        for name, target in targets.items():
            same[id(target) if isinstance(target, Tensor) else name].append(name)
        given = [[name for name in names if name in state_dict] for names in same.values()]
        missing = [names[0] for names, there in zip(same.values(), given, strict=True) if not there]
        unknown = [str(name) for name in state_dict if name not in targets]
        if missing or unknown:
            what = (("missing", missing), ("unknown", unknown))
            wrong = "; ".join(f"{kind}: {_listed(names)}" for kind, names in what if names)
            raise ValueError(f"the state_dict does not fit the model; {wrong}")
        for name, target in targets.items():
            if isinstance(target, Tensor) and name in state_dict:
                _check(state_dict[name], target, name)
        for first, *others in filter(None, given):
            for name in others:
                if not _equal(state_dict[first], state_dict[name]):
                    raise ValueError(f"{first!r} and {name!r} are one weight of the model, and differ")
        return self._sorted(model, targets, state_dict)

    def _sorted(self, model: nn.Module, targets: Mapping[str, Any], values: Mapping[str, Any]) -> Incoming:
        exact, rounded = {}, set()
        rest: OrderedDict[str, Any] = OrderedDict()
        rest._metadata = getattr(values, "_metadata", None)  # type: ignore[attr-defined]
        for name, value in values.items():
            target = targets[name]
            if id(target) in self.exact:
                exact[id(target)] = target, value
            else:
                rest[name] = value
                if id(target) in self._ours and target.requires_grad and kept_with(target.dtype):
                    rounded.add(id(target))
        return Incoming(model, exact, rest, len(rounded))

    def load(self, incoming: Incoming, slots: Mapping[int, Slot]) -> None:
        """Write what was checked: both halves of exact weights, which ``state`` has to show, others as the
        model loads them.

        Args:
            slots: by id of their parameter.
        """
        incoming.model.load_state_dict(incoming.rest, strict=False)
        for param, value in incoming.exact.values():
            self._write(param, value)
            slot = slots.get(id(param))
            if slot is not None and slot.format.weights == REMAINDER:
                remember([slot])
        if incoming.rounded:
            _log.warning("%d weights were rounded to 16 bits: master_weights is off", incoming.rounded)

    @cached_property
    def _ours(self) -> set[int]:
        return {id(param) for group in self.groups for param in group["params"]}

    def _tensors(self, model: nn.Module) -> dict[str, Any]:
        """The model's own, by name."""
        found: dict[str, Any] = model.state_dict(keep_vars=True)
        if self._ours.isdisjoint(map(id, found.values())):
            what = f"the {type(model).__name__} has no parameter of this optimizer"
            raise ValueError(f"{what}: pass the model that it trains")
        return found

    def _kept(self, param: Tensor) -> Tensor | None:
        """What ``state`` shows beside a weight."""
        entry = self.state.get(param)
        name = kept_with(param.dtype)
        return entry.get(name) if name and isinstance(entry, Mapping) else None

    def _exact(self, param: Tensor, device: torch.device) -> Tensor:
        kept, value = self._kept(param), local(param.detach())
        name = kept_with(param.dtype)
        if kept is None or name is None:
            dtype = value.dtype if value.is_complex() else torch.float32
            return like(param, value.to(device, dtype, copy=True))
        return like(param, weights.read(value.to(device), [local(kept).to(device)], name))

    def _write(self, param: Tensor, value: Tensor) -> None:
        """Worked out on the host, so that a GPU needs no room for it."""
        entry, name = self.state[param], kept_with(param.dtype)
        assert name is not None
        if name not in entry:  # of another optimizer, without a place yet
            similar = read_part(entry, param, "parameter").elements
            entry[name] = torch.empty_like(similar, dtype=KEPT[name].dtype, device=_HOST)
        value = part(value.detach(), param).to(_HOST, torch.float32)
        weights.write(value, local(param), [local(entry[name])], name)


def _check(value: object, target: Tensor, name: str) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name!r} is a {type(value).__name__}, not a tensor")
    if value.is_meta or target.is_meta:
        whose = "it" if value.is_meta else "the model's"
        raise ValueError(f"{name!r}: {whose} is on the meta device, where nothing has values")
    if value.layout is not target.layout or value.is_nested:
        layout = "nested" if value.is_nested else value.layout
        raise ValueError(f"{name!r} has layout {layout}, expected {target.layout}")
    if value.shape != target.shape:
        raise ValueError(f"{name!r} has shape {tuple(value.shape)}, expected {tuple(target.shape)}")
    if _kind(value) != _kind(target):
        raise ValueError(f"{name!r} has dtype {value.dtype}, expected {_kind(target)} numbers")


def _kind(tensor: Tensor) -> str:
    if tensor.is_complex():
        return "complex"
    return "floating" if tensor.is_floating_point() else "whole"


def _equal(a: Any, b: Any) -> bool:
    if a is b or (a.data_ptr() == b.data_ptr() and a.dtype is b.dtype and a.stride() == b.stride()):
        return True
    return torch.allclose(a.to(_HOST), b.to(_HOST, a.dtype), rtol=0, atol=0, equal_nan=True)


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
