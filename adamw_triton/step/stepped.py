"""What a step is given: the parameters that have gradients; and the refusal of what cannot be stepped.

It is looked at in every step, for anything may have changed since the last: a group's members, a parameter's
``data``, the memory of a gradient. What is looked at are facts that compare quickly; only where one is new
are the tensors checked."""

from __future__ import annotations

import functools
import itertools
import operator
from array import array
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adamw_triton.memory.overlaps import Ranges, share_memory, span
from adamw_triton.state.shards import any_shard, local, local_like
from adamw_triton.tensors import check_grad, check_param, name_of

Groups = Sequence[Mapping[str, Any]]
Facts = tuple[list[Any], ...]


@dataclass(frozen=True, eq=False)
class Stepped:
    """The parameters that have gradients, in the groups' order."""

    groups: Groups
    owners: list[Tensor]
    """As the groups have them."""
    params: list[Tensor]
    """What of them is here, and so of the gradients."""
    grads: list[Tensor]
    counts: list[int]
    """How many of them each group has."""
    addresses: tuple[array[int], array[int]]
    """Of parameters and of gradients."""
    among: Collection[int] | None = None
    """Ids of the parameters that may be stepped; None: all."""

    @classmethod
    def of(cls, groups: Groups, among: Collection[int] | None = None) -> Stepped:
        """
        Args:
            among: ids of the parameters that may be stepped; None: all.

        Raises:
            RuntimeError, TypeError, ValueError: a tensor is of a kind that cannot be stepped at all.
        """
        params: list[Tensor] = []
        grads: list[Tensor] = []
        counts = []
        for group in groups:
            before = len(params)
            for param in group["params"]:
                grad = param.grad
                if grad is not None and (among is None or id(param) in among):
                    params.append(param)
                    grads.append(grad)
            counts.append(len(params) - before)
        owners = params
        if any_shard(owners):
            grads = list(map(local_like, grads, owners))
            params = list(map(local, owners))
        try:
            addresses = _addresses(params), _addresses(grads)
        except (RuntimeError, TypeError, ValueError):  # what is not strided has none
            cls(groups, owners, params, grads, counts, (_addresses([]), _addresses([])), among).check()
            raise
        return cls(groups, owners, params, grads, counts, addresses, among)

    @functools.cached_property
    def facts(self) -> Facts:
        """Of the tensors, all that a check or a launch may depend on, but where the memory is."""
        try:
            there = [not grad._is_zerotensor() for grad in self.grads]
            return (there, *_facts(self.params), *_facts(self.grads))
        except (RuntimeError, TypeError, ValueError):  # what is not strided has no strides to tell
            self.check()
            raise

    @property
    def names(self) -> list[str]:
        """What messages call each parameter."""
        return [
            name_of(group, group_index, index)
            for group_index, group in enumerate(self.groups)
            for index, param in enumerate(group["params"])
            if param.grad is not None and (self.among is None or id(param) in self.among)
        ]

    @property
    def group_indices(self) -> list[int]:
        """Of each parameter's group."""
        return list(itertools.chain.from_iterable([i] * n for i, n in enumerate(self.counts)))

    def check(self, stochastic: bool = False) -> None:
        """
        Args:
            stochastic: somebody asks for stochastic rounding.

        Raises:
            RuntimeError, TypeError, ValueError: what is wrong with which parameter, or its gradient.
        """
        for param, grad, name in zip(self.params, self.grads, self.names, strict=True):
            check_param(param, name, stochastic)
            check_grad(param, grad, name)


def _addresses(tensors: Sequence[Tensor]) -> array[int]:
    return array("q", list(map(Tensor.data_ptr, tensors)))  # of a list, whose length it knows, it is faster


def _facts(tensors: Sequence[Tensor]) -> Facts:
    """Of the parameters, or of the gradients."""
    return (
        list(map(type, tensors)),
        [t.dtype for t in tensors],
        [t.shape for t in tensors],
        [t.stride() for t in tensors],
        [t.get_device() for t in tensors],
        [t.is_neg() for t in tensors],
    )


class Alike:
    """What a step was given: tells whether a later one is of the same parameters, with the same facts."""

    def __init__(self, stepped: Stepped) -> None:
        self._owners = stepped.owners  # alive, so that no other parameter is taken for one of them
        self._counts = stepped.counts
        self._facts = stepped.facts
        self._guards = _guards([*stepped.params, *stepped.grads])

    def holds_for(self, stepped: Stepped) -> bool:
        params, grads = stepped.params, stepped.grads
        if stepped.counts != self._counts or not all(map(operator.is_, stepped.owners, self._owners)):
            return False
        return (
            # They end the process where a tensor has no sizes, as a nested one that was swapped in.
            not any([param.is_nested for param in params]) and self._guards(*params, *grads)
        ) or stepped.facts == self._facts


def _guards(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """Whether other tensors have the types, dtypes, shapes, strides and devices of these, and are negative or
    zero where these are. If it says no, that may be for something that is no fact of ours.

    With these guards torch tells whether a compiled graph may be used again: they take in one look what
    Python takes seven for. They are not public, so we are prepared to be without."""
    try:
        from torch._C._dynamo.guards import TensorGuards

        make: Any = TensorGuards
        sizes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
        guards = make(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        guards.check(*tensors)
    except Exception:
        return lambda *_: False
    check: Callable[..., bool] = guards.check
    return check


class Apart:
    """That no parameter shares memory with another one or with a gradient: one would be written while the
    other is read. For steps of the same facts; looks again where a tensor has moved."""

    def __init__(self, stepped: Stepped) -> None:
        self._param_spans = list(map(span, stepped.params))
        self._grad_spans = torch.tensor(list(map(span, stepped.grads)), dtype=torch.int64, device="cpu")
        self._ranges = Ranges([], [])
        self._params: array[int] | None = None
        self._grads: array[int] | None = None

    def check(self, stepped: Stepped) -> None:
        """
        Raises:
            ValueError: which of them do, by name.
        """
        params, grads = stepped.addresses
        if params != self._params:
            ranges = Ranges(params, self._param_spans)
            for a, b in ranges.meeting:
                self._refuse(stepped, a, b, stepped.params[b])
            self._params, self._ranges, self._grads = params, ranges, None
        if grads and grads != self._grads:
            starts = torch.frombuffer(grads, dtype=torch.int64)
            for b in self._ranges.met_by(starts, self._grad_spans):
                for a in range(len(params)):
                    self._refuse(stepped, a, b, stepped.grads[b])
            self._grads = grads

    def _refuse(self, stepped: Stepped, a: int, b: int, other: Tensor) -> None:
        """If ``other``, the parameter ``b`` or its gradient, has memory of the parameter ``a``."""
        param = stepped.params[a]
        if not share_memory(param, other):
            return
        first, second = stepped.names[a], stepped.names[b]
        if other is param:
            raise ValueError(f"{first} is {second} too, and a step would update it twice: pass it once")
        if other is stepped.params[b]:
            raise ValueError(
                f"{first} and {second} share memory, which a step would update twice: pass one of them, "
                "or a copy"
            )
        whose = "its own gradient" if a == b else f"the gradient of {second}"
        raise ValueError(
            f"{first} shares memory with {whose}, which a step would overwrite: give it a copy (grad.clone())"
        )
