"""What a step is given: the parameters that have gradients; and the refusal of what cannot be stepped.

It is looked at in every step, for anything may have changed since the last: a group's members, a parameter's
``data``, the memory of a gradient. What is looked at are facts that compare quickly; only where one is new
are the tensors checked."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from adamw_triton.memory.overlaps import Ranges, share_memory, span
from adamw_triton.tensors import check_grad, check_param, name_of

Groups = Sequence[Mapping[str, Any]]
Facts = tuple[list[Any], ...]


@dataclass(frozen=True, eq=False)
class Stepped:
    """The parameters that have gradients, in the groups' order."""

    groups: Groups
    params: list[Tensor]
    grads: list[Tensor]
    facts: Facts
    """All that a check or a launch may depend on, but where the memory is and what the hyperparameters are.
    Steps of equal facts are of the same parameters; they have to be kept alive for that."""
    addresses: tuple[list[int], list[int]]
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
        try:
            there = [not grad._is_zerotensor() for grad in grads]
            facts: Facts = (list(map(id, params)), counts, there, *_facts(params), *_facts(grads))
            addresses = [t.data_ptr() for t in params], [t.data_ptr() for t in grads]
        except (RuntimeError, TypeError, ValueError):  # what is not strided has no strides to tell
            cls(groups, params, grads, (), ([], []), among).check()
            raise
        return cls(groups, params, grads, facts, addresses, among)

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
        return list(itertools.chain.from_iterable([i] * n for i, n in enumerate(self.facts[1])))

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


class Apart:
    """That no parameter shares memory with another one or with a gradient: one would be written while the
    other is read. For steps of the same facts; looks again where a tensor has moved."""

    def __init__(self, stepped: Stepped) -> None:
        self._param_spans = list(map(span, stepped.params))
        self._grad_spans = list(map(span, stepped.grads))
        self._ranges = Ranges([], [])
        self._params: list[int] | None = None
        self._grads: list[int] | None = None

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
        if grads != self._grads:
            for b in self._ranges.met_by(grads, self._grad_spans):
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
