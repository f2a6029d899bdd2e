"""``AdamW``: a ``torch.optim.Optimizer`` over flat state buffers and multi-tensor updates."""

from __future__ import annotations

import itertools
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from adamw_triton import checkpoint
from adamw_triton.arguments import check_grad, check_group, check_param, check_variant, name_of
from adamw_triton.batch import Item, Launch, pair_of
from adamw_triton.state import Blockwise8, Float32, Format, Slot, StateBuffer, as_real

SMALLEST_8BIT = 4096
"""Tensors with fewer elements keep 32-bit state: biases and norms are few and sensitive."""

_KEPT_LAUNCHES = 16
"""Sets of parameters whose launches are kept, for training that alternates between a few."""

_BITS = {"auto": 32, "32bit": 32, "8bit": 8}
_ADDED_KEYS: dict[str, Any] = {"state_bits": None, "maximize": False, "amsgrad": False}


class AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) with 32-bit or blockwise 8-bit state.

    A drop-in for ``torch.optim.AdamW``: the arguments up to ``maximize`` are the same. Parameters
    and gradients may be fp32, bf16, fp16 (mixed at will) or complex64; all arithmetic is in fp32.

    Args:
        params: parameters, parameter groups or named parameters. A group may set ``state_bits`` (8
            or 32) to override the variant.
        variant: where and how the moments m and v are kept.

            - ``"32bit"``: fp32, 8 bytes a parameter
            - ``"8bit"``: blockwise 8-bit codes, 2.03 bytes a parameter; tensors of under 4,096
              elements keep 32-bit state
            - ``"auto"``: for now, ``"32bit"``
        block_size: elements of the 8-bit format that share their scales, 128 or 256 (2.02 bytes).

    State is allocated at the first ``step()``, for all parameters that require gradients.

    Raises:
        ValueError: a hyperparameter is out of range, or ``amsgrad`` meets 8-bit state.
        TypeError: a parameter's dtype is not supported.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        maximize: bool = False,
        *,
        variant: str = "auto",
        block_size: int = 128,
    ) -> None:
        check_variant(variant, block_size)
        self.variant = variant
        self.block_size = block_size
        self._reset()
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "state_bits": None,
        }
        check_group(defaults, _BITS[variant])
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; also between steps."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_group(group, _BITS[self.variant])
            for index, param in enumerate(group["params"]):
                check_param(param, name_of(group, len(self.param_groups) - 1, index))
        except Exception:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have gradients.

        Everything is checked before anything is written. ``grad_scale`` and ``found_inf``, if a
        gradient scaler has set them on the optimizer, are honoured.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and float(found_inf) != 0:
            return loss
        items = self._gather()
        launches = self._launches_for(items)
        pairs = [pair_of(item) for item in items]
        loss_scale = getattr(self, "grad_scale", None)
        grad_scale = 1.0 if loss_scale is None else 1.0 / float(loss_scale)
        for launch in launches:
            launch.buffer.steps[launch.slots] += 1
            launch.run(pairs, self.param_groups, grad_scale)
        for item, pair in zip(items, pairs, strict=True):
            if pair.param is not item.param and pair.param.data_ptr() != item.param.data_ptr():
                as_real(item.param).copy_(pair.param)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """As torch's. 32-bit state has torch.optim.AdamW's names; 8-bit state its codes and scales,
        exactly. Call it between steps; the tensors are views of the live state."""
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of ours, of any variant, or of torch.optim.AdamW or Adam.

        Raises:
            ValueError: a parameter's state has unknown or missing entries or a wrong shape; nothing
                is changed then.
        """
        checkpoint.check(state_dict, self.param_groups)
        boxing = self.register_load_state_dict_pre_hook(checkpoint.box)  # behind the user's own
        try:
            super().load_state_dict(state_dict)
        finally:
            boxing.remove()
        self._reset()
        with torch.no_grad():
            self._reserve(self._trained(stateful_only=True))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "state": checkpoint.unbox(state["state"])})
        self._reset()
        for group in self.param_groups:
            for key, value in _ADDED_KEYS.items():
                group.setdefault(key, value)

    def __getstate__(self) -> dict[str, Any]:
        # Buffers and tables are rebuilt from ``state`` at the next step.
        return {**super().__getstate__(), "variant": self.variant, "block_size": self.block_size}

    def _reset(self) -> None:
        self._slots: dict[int, Slot] = {}  # by id of the parameter, which the slot keeps alive
        self._shown: list[Tensor] = []  # all tensors of ``state``, while it shows our buffers
        self._formats_key: list[tuple[Any, Any]] = []
        self._launches: dict[tuple[Any, ...], list[Launch]] = {}

    # One step: gather and check, find each parameter's place, group into launches.

    def _gather(self) -> list[Item]:
        """All parameters that have gradients, checked, each with its slot."""
        found: list[tuple[int, int, Tensor, Tensor]] = []
        ready = self._intact()
        for group_index, group in enumerate(self.param_groups):
            check_group(group, _BITS[self.variant])
            for index, param in enumerate(group["params"]):
                grad = param.grad
                if grad is None:
                    continue
                check_grad(param, grad, group, group_index, index)
                slot = self._slots.get(id(param))
                if slot is None or slot.shape != param.shape or slot.device_index != param.get_device():
                    ready = False
                found.append((group_index, index, param, grad))
        if not ready:
            self._reserve(self._trained())
        return [Item(group, self._slots[id(param)], param, grad) for group, _, param, grad in found]

    def _launches_for(self, items: list[Item]) -> list[Launch]:
        """One launch for each buffer and pair of dtypes; kept for steps on the same parameters."""
        key = tuple((id(item.slot), item.param.dtype, item.grad.dtype) for item in items)
        launches = self._launches.get(key)
        if launches is None:
            members: dict[Any, list[int]] = defaultdict(list)
            for position, (_, slot, param, grad) in enumerate(items):
                if not slot.entry:
                    self.state[param] = slot.attach()
                    self._shown.extend(slot.entry.values())
                members[slot.buffer, param.dtype, grad.dtype].append(position)
            if len(self._launches) >= _KEPT_LAUNCHES:
                self._launches.clear()
            launches = [Launch.of(items, positions) for positions in members.values()]
            self._launches[key] = launches
        return launches

    def _trained(self, *, stateful_only: bool = False) -> list[tuple[Tensor, str, Format]]:
        """Parameters that have state or, unless ``stateful_only``, can have: with names and formats."""
        found = []
        for group_index, group in enumerate(self.param_groups):
            for index, param in enumerate(group["params"]):
                trained = not stateful_only and (param.requires_grad or param.grad is not None)
                if trained or param in self.state:
                    name = name_of(group, group_index, index)
                    found.append((param, name, self._format_of(param, group)))
        return found

    def _format_of(self, param: Tensor, group: dict[str, Any]) -> Format:
        bits = group["state_bits"] or _BITS[self.variant]
        if bits == 8 and as_real(param).numel() >= SMALLEST_8BIT:
            return Blockwise8(self.block_size)
        return Float32(bool(group["amsgrad"]))

    def _intact(self) -> bool:
        """Whether ``state`` shows our buffers and nothing that someone else put there (loaders move
        its tensors about), and the groups still ask for the formats that these have."""
        shown = itertools.chain.from_iterable(map(dict.values, self.state.values()))
        return self._formats_key == self._wanted_formats() and all(
            itertools.starmap(operator.is_, itertools.zip_longest(shown, self._shown))
        )

    def _wanted_formats(self) -> list[tuple[Any, Any]]:
        return [(group["amsgrad"], group["state_bits"]) for group in self.param_groups]

    def _reserve(self, params: list[tuple[Tensor, str, Format]]) -> None:
        """Give each parameter a slot in a buffer, and put there what ``state`` shows for it."""
        homeless: dict[tuple[torch.device, Format], list[tuple[Tensor, str]]] = defaultdict(list)
        for param, name, state_format in params:
            slot = self._slots.get(id(param))
            if slot is not None and slot.shape != param.shape and param in self.state:
                raise RuntimeError(
                    f"{name} had shape {tuple(slot.shape)} when its state was made and has now "
                    f"{tuple(param.shape)}: delete its state (del optimizer.state[param]) first"
                )
            if slot is None or not slot.fits(param, state_format):
                homeless[param.device, state_format].append((param, name))
        for (device, state_format), members in homeless.items():
            for slot in StateBuffer(state_format, members, device).slots:
                self._slots[id(slot.param)] = slot
        for param, _, _ in params:
            slot = self._slots[id(param)]
            shown = self.state.get(param)
            if shown and not slot.is_shown_by(shown):
                checkpoint.place(shown, slot)
                self.state[param] = slot.attach()
            elif not shown and slot.entry:  # someone deleted it: begin anew
                slot.clear()
        self._shown = [tensor for entry in self.state.values() for tensor in entry.values()]
        self._formats_key = self._wanted_formats()
        self._launches.clear()
