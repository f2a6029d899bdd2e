"""An optimizer of ours and torch's AdamW in float64, under the same operations, compared after each.

Before a step torch's takes over our weights and moments, decoded, so that each step is judged by itself and
to the limits of its arithmetic and of its format. Between steps nothing may change but what an operation is
there to change.
"""

from __future__ import annotations

import copy
import io
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from adamw_triton import AdamW
from adamw_triton_kernels.weights import read
from adamw_triton_kernels.work import MASTER, REMAINDER

VARIANTS = ("32bit", "8bit", "paged_32bit", "paged_8bit", "auto")
SHAPES = ((64, 80), (3, 40, 40), (8, 16, 6, 6), (5000,), (7,), (), (0,), (2, 3))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.complex64)
EPSILON = 2.0**-23

Moments = dict[str, Tensor]


class Pair:
    """Parameter ``i`` of ``params`` and of ``twins``, which are float64, stand for the same."""

    def __init__(self, seed: int, variant: str) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.variant = variant
        self.params: list[Parameter] = []
        self.twins: list[Parameter] = []
        groups = [
            self._group([self.new() for _ in range(n)], lr) for n, lr in ((3, 1e-2), (2, 1e-3), (1, 0.1))
        ]
        self.ours, self.theirs = (self._made(side, groups) for side in (0, 1))
        self.known: dict[int, Moments] = {}
        """By id of the parameter, its decoded moments and step count in ``ours``."""
        self.log: list[str] = []

    # Construction

    def new(self) -> int:
        """The number of a new parameter."""
        shape = self.random.choice(SHAPES)
        self.params.append(Parameter(self.noise(shape, self.random.choice(DTYPES))))
        self.twins.append(Parameter(_doubled(self.params[-1].detach())))
        return len(self.params) - 1

    def noise(self, shape: Any, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        """Magnitudes over a few orders within a block."""
        real = (*shape, 2) if dtype.is_complex else tuple(shape)
        drawn = torch.randn(real, generator=self.generator) * torch.exp(
            torch.randn(real, generator=self.generator)
        )
        drawn *= scale
        return torch.view_as_complex(drawn) if dtype.is_complex else drawn.to(dtype)

    def _group(self, members: list[int], lr: float) -> dict[str, Any]:
        return {"members": members, "lr": lr, "weight_decay": self.random.choice((0.0, 0.1))}

    def _made(self, side: int, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        own = (self.params, self.twins)[side]
        told = [
            {
                "params": [own[i] for i in group["members"]],
                **{k: v for k, v in group.items() if k != "members"},
            }
            for group in groups
        ]
        if side == 0:
            return AdamW(told, variant=self.variant)
        return torch.optim.AdamW(told, foreach=False)

    @property
    def both(self) -> tuple[tuple[torch.optim.Optimizer, list[Parameter]], ...]:
        return (self.ours, self.params), (self.theirs, self.twins)

    def places(self) -> list[tuple[int, int]]:
        """(group, position) of every parameter that the optimizers have."""
        groups = enumerate(self.ours.param_groups)
        return [(g, i) for g, group in groups for i in range(len(group["params"]))]

    def number(self, param: Tensor) -> int:
        return next(i for i, own in enumerate(self.params) if own is param)

    # What is so

    def moments(self) -> dict[int, Moments]:
        """Of every parameter that has state, decoded, float64, by its number."""
        state = self.ours.state_dict(state_format="portable")["state"]
        flat = [param for group in self.ours.param_groups for param in group["params"]]
        return {
            self.number(flat[key]): {name: _doubled(entry[name].clone()) for name in _names(entry)}
            for key, entry in state.items()
            if "exp_avg" in entry
        }

    def check_unchanged(self, but: Callable[[int], bool] = lambda number: False) -> None:
        """The moments are what they were, except of some."""
        now = self.moments()
        assert {n for n in now if not but(n)} == {n for n in self.known if not but(n)}
        for number, moments in now.items():
            if not but(number):
                for name, value in moments.items():
                    assert torch.equal(value, self.known[number][name]), (number, name)
        self.known = now

    # A step

    def exact(self, param: Tensor) -> Tensor:
        """The weight that our step begins with: where it is kept exactly, and nobody has written to it since,
        more than the parameter shows."""
        kept = {torch.bfloat16: REMAINDER, torch.float16: MASTER}.get(param.dtype, "")
        entry, slot = self.ours.state.get(param, {}), self.ours._store.slots.get(id(param))
        chosen = self.ours._chooser.weights == "exact" and kept in entry
        written = slot is not None and slot.version not in (None, param._version) and kept == REMAINDER
        if not chosen or written:
            return param.detach()
        array = entry[kept]
        dense = torch.empty_strided(param.shape, array.stride(), dtype=param.dtype).copy_(param.detach())
        return read(dense, [array], kept)

    def step(self, scale: float | None = None) -> None:
        """A step of both on the gradients that are there; ``scale``: gradients are multiplied by it."""
        before = [param.detach().clone() for param in self.params]
        for param, twin in zip(self.params, self.twins, strict=True):
            twin.data = _doubled(self.exact(param))
            twin.grad = None if param.grad is None else _doubled(param.grad) / (scale or 1.0)
        self.theirs.state.clear()
        for number, moments in self.known.items():
            entry = {name: value.clone() for name, value in moments.items()}
            entry["step"] = entry["step"].float()
            self.theirs.state[self.twins[number]] = entry
        if scale is not None:
            self.ours.grad_scale = torch.tensor(scale)
            self.ours.found_inf = torch.tensor(0.0)
        self.ours.step()
        if scale is not None:
            del self.ours.grad_scale, self.ours.found_inf
        self.theirs.step()
        stepped = {self.number(self.ours.param_groups[g]["params"][i]): g for g, i in self.places()}
        stepped = {number: g for number, g in stepped.items() if self.params[number].grad is not None}
        now, old = self.moments(), self.known
        for number in range(len(self.params)):
            if number in stepped:
                self._judge(number, self.ours.param_groups[stepped[number]], before[number], old, now[number])
            else:
                assert torch.equal(self.params[number], before[number]), number
                assert (number in now) == (number in old)
        self.known = {**now}
        for number in now:
            if number not in stepped:
                assert all(torch.equal(now[number][k], old[number][k]) for k in now[number]), number

    def _judge(
        self, number: int, group: dict[str, Any], before: Tensor, old: dict[int, Moments], now: Moments
    ) -> None:
        param, twin = self.params[number], self.twins[number]
        right = {name: _real(value) for name, value in self.theirs.state[twin].items() if name != "step"}
        was = old.get(number)
        m0, v0 = (_real(was[name]).abs() if was else 0.0 for name in ("exp_avg", "exp_avg_sq"))
        g = _real(twin.grad).abs()
        ours = {name: _real(value) for name, value in now.items() if name != "step"}
        assert float(now["step"]) == float(self.theirs.state[twin]["step"])

        step, (beta1, beta2) = float(now["step"]), map(float, group["betas"])
        largest = right.get("max_exp_avg_sq", right["exp_avg_sq"])
        denominator = largest.sqrt() / (1 - beta2**step) ** 0.5 + float(group["eps"])
        reach = float(group["lr"]) / (1 - beta1**step) * (m0 + g) / denominator
        expected = _real(twin.detach())
        allowed = 16 * EPSILON * reach + _ulp(expected, _real(before), param) * (2 if _fp32(param) else 0.51)
        _within(_real(_doubled(param.detach())), expected, allowed, f"weight of {number}")

        coded = self.ours.state[param].get("exp_avg_codes")
        if coded is None:
            _within(ours["exp_avg"], right["exp_avg"], 4 * EPSILON * (m0 + g), f"exp_avg of {number}")
            for name in set(right) & {"exp_avg_sq", "max_exp_avg_sq"}:
                _within(
                    ours[name], right[name], 8 * EPSILON * (right[name] + v0) + 1e-44, f"{name} of {number}"
                )
        else:
            self.judge_codes(ours, right, coded, 4 * EPSILON * (m0 + g), f"of {number}")

    def judge_codes(
        self, ours: Moments, right: Moments, codes: Tensor, rounded: Tensor | float, what: str
    ) -> None:
        """Whether what was encoded is the nearest that the format has, or beside it.

        Args:
            rounded: how far exp_avg was off before, at most.
        """
        block = 128
        order = torch.empty_strided(codes.shape, codes.stride(), dtype=torch.int64)
        order.as_strided((codes.numel(),), (1,)).copy_(torch.arange(codes.numel()) // block)
        root, there = right["exp_avg_sq"].sqrt(), ours["exp_avg_sq"].sqrt()
        top = 2.02 * _peaks(root, order)  # the largest scale that is kept for such a block
        room = (510 * (root * top).sqrt() + 12 * top) / 65025
        _within(there, root, room * 1.01, f"sqrt(exp_avg_sq) {what}")
        ratio = torch.where(there > 0, right["exp_avg"].abs() / there, 0.0)
        room = there * _peaks(ratio, order) * 1.02 / 254 + rounded
        _within(ours["exp_avg"], right["exp_avg"], room, f"exp_avg {what}")

    # Copies and files

    def take(self, ours: AdamW, theirs: torch.optim.Optimizer) -> None:
        """Go on with other optimizers of the same parameters."""
        self.ours, self.theirs = ours, theirs

    def fresh(self) -> tuple[AdamW, torch.optim.Optimizer]:
        """New optimizers with the same groups."""
        groups = [
            {
                "members": [self.number(param) for param in group["params"]],
                "lr": group["lr"],
                "amsgrad": group["amsgrad"],
            }
            for group in self.ours.param_groups
        ]
        ours = self._made(
            0,
            [
                {**group, "state_bits": own.get("state_bits")}
                for group, own in zip(groups, self.ours.param_groups, strict=True)
            ],
        )
        return ours, self._made(1, groups)  # type: ignore[return-value]

    def copied(self, copier: Callable[[Any], Any]) -> None:
        self.params, self.twins, self.ours, self.theirs = copier(
            (self.params, self.twins, self.ours, self.theirs)
        )


def through_a_file(what: Any, weights_only: bool = False) -> Any:
    file = io.BytesIO()
    torch.save(what, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def copier(kind: str) -> Callable[[Any], Any]:
    return copy.deepcopy if kind == "deepcopy" else through_a_file


def _names(entry: dict[str, Any]) -> list[str]:
    return [name for name in ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq") if name in entry]


def _doubled(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _real(tensor: Any) -> Any:
    return torch.view_as_real(tensor) if torch.is_tensor(tensor) and tensor.is_complex() else tensor


def _fp32(param: Tensor) -> bool:
    return param.dtype in (torch.float32, torch.complex64)


def _ulp(right: Tensor, before: Tensor, param: Tensor) -> Tensor:
    """Of the parameter's dtype, at the larger of what a weight was and is to be."""
    info = torch.finfo(torch.float32 if _fp32(param) else param.dtype)
    size = torch.maximum(right.abs(), before.double().abs()) if _fp32(param) else right.abs() * (1 + 1e-6)
    ulp = torch.exp2(torch.frexp(size).exponent.double() - 1) * info.eps
    return ulp.clamp(min=info.smallest_normal * info.eps)


def _peaks(values: Tensor, order: Tensor) -> Tensor:
    """For each element the largest of its block."""
    blocks = int(order.max()) + 1 if order.numel() else 1
    peaks = torch.zeros(blocks, dtype=values.dtype)
    peaks.scatter_reduce_(0, order.flatten(), values.flatten(), "amax")
    return peaks[order]


def _within(actual: Tensor, right: Tensor, allowed: Tensor, what: str) -> None:
    off = (actual - right).abs() - allowed
    assert not bool((~(off <= 0)).any()), (
        f"{what}: off by {float((off / allowed).max()) + 1:.3g} times what is allowed, "
        f"{int((~(off <= 0)).sum())} of {off.numel()} elements"
    )
