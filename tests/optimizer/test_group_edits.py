"""Groups and parameters edited by hand between steps, in any order: each step is that of torch.optim.AdamW in
float64 on the same groups."""

from __future__ import annotations

import os
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

from adamw_triton import AdamW
from adamw_triton.arguments import VARIANTS
from tests.amount import searched

pytestmark = pytest.mark.bookkeeping

SHAPES = ((7, 6), (5,), (1,), (3, 2, 4), (), (0,))
EXACT = {torch.float32: torch.float64, torch.bfloat16: torch.float64, torch.complex64: torch.complex128}
"""A parameter's dtype, and its twin's."""


class Beside:
    """Our optimizer and torch's, whose parameters are copies in double precision. Edits are made to both."""

    def __init__(self, variant: str) -> None:
        self.twins: dict[int, Parameter] = {}
        self.keep: list[Tensor] = []
        groups = [{"params": [self.made(), self.made(), self.made()], "lr": 0.1}]
        groups += [{"params": [self.made()], "lr": 0.01}, {"params": [self.made(torch.complex64)]}]
        self.ours = AdamW(groups, variant=variant)
        self.theirs = torch.optim.AdamW(
            [{**group, "params": [self.twins[id(p)] for p in group["params"]]} for group in groups]
        )

    def made(self, dtype: torch.dtype = torch.float32, random: Random | None = None) -> Parameter:
        shape = (random or Random(len(self.keep))).choice(SHAPES)
        param = Parameter(torch.randn(shape, dtype=dtype))
        self.keep.append(param)
        self.twins[id(param)] = Parameter(param.detach().to(EXACT[dtype]))
        return param

    def params(self) -> list[Parameter]:
        return [p for group in self.ours.param_groups for p in group["params"]]

    @property
    def groups(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        return self.ours.param_groups, self.theirs.param_groups

    def step(self, random: Random) -> None:
        """Perhaps with some gradients missing, and some of another layout."""
        params, present = self.params(), random.choice((1.0, 1.0, 0.7))
        for p in params:
            twin, p.grad = self.twins[id(p)], None
            twin.grad = None
            if random.random() < present:
                grad = torch.randn(p.shape, dtype=p.dtype)
                twin.grad = grad.to(twin.dtype)
                p.grad = random.choice(LAYOUTS)(grad)
        before = [twin.detach().clone() for twin in map(self.twins.get, map(id, params))]
        self.ours.step()
        self.theirs.step()
        for p, start in zip(params, before, strict=True):
            twin = self.twins[id(p)].detach()
            changed = (p.detach().to(twin.dtype) - start, twin - start)
            rounding = (
                {"rtol": 1e-2, "atol": 2e-2} if p.dtype is torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-6}
            )
            torch.testing.assert_close(*changed, **rounding)
            twin.copy_(p.detach())  # the next step from the same
            assert p in self.ours.state or twin.grad is None


def _transposed(t: Tensor) -> Tensor:
    return t.mT.contiguous().mT if t.dim() > 1 else t.clone()


def _gapped(t: Tensor) -> Tensor:
    return torch.stack([t, t], dim=-1)[..., 0]


def _negative(t: Tensor) -> Tensor:
    return torch._neg_view(-t)


def _conjugate(t: Tensor) -> Tensor:
    return torch.conj_physical(t).conj() if t.is_complex() else t.clone()


LAYOUTS: tuple[Callable[[Tensor], Tensor], ...] = (torch.clone, _transposed, _gapped, _negative, _conjugate)
"""The same values in another memory."""


def _two(groups: list[dict[str, Any]], random: Random) -> tuple[list[Any], list[Any]]:
    first, second = (random.choice(groups)["params"] for _ in range(2))
    return first, second


def move(beside: Beside, seed: int) -> None:
    """The last of a group to the front of one, or anything to anywhere."""
    for groups in beside.groups:
        random = Random(seed)
        source, target = _two(groups, random)
        if source:
            taken = source.pop(random.choice((-1, random.randrange(len(source)))))
            target.insert(random.choice((0, random.randint(0, len(target)))), taken)


def cut_anew(beside: Beside, seed: int) -> None:
    """All in the same order, in other groups."""
    for groups in beside.groups:
        members = [p for group in groups for p in group["params"]]
        random = Random(seed)
        cuts = sorted(random.randint(0, len(members)) for _ in groups[1:])
        for group, begin, end in zip(groups, [0, *cuts], [*cuts, len(members)], strict=True):
            group["params"] = members[begin:end]


def swap_groups(beside: Beside, seed: int) -> None:
    for groups in beside.groups:
        Random(seed).shuffle(groups)


def swap_members(beside: Beside, seed: int) -> None:
    for groups in beside.groups:
        first, second = groups[0], groups[-1]
        first["params"], second["params"] = second["params"], first["params"]


def copy_groups(beside: Beside, seed: int) -> None:
    """New dicts and new lists in a new list."""
    for optimizer in (beside.ours, beside.theirs):
        optimizer.param_groups = [
            {**group, "params": list(group["params"])} for group in optimizer.param_groups
        ]


def delete_group(beside: Beside, seed: int) -> None:
    for groups in beside.groups:
        if len(groups) > 1:
            del groups[Random(seed).randrange(len(groups))]


def insert_group(beside: Beside, seed: int) -> None:
    """As add_param_group does, but in front; of whatever torch puts there."""
    param = beside.made(random=Random(seed))
    for groups, member in zip(beside.groups, (param, beside.twins[id(param)]), strict=True):
        groups.insert(0, {**beside.theirs.defaults, "lr": 0.03, "params": [member]})


def add_group(beside: Beside, seed: int) -> None:
    param = beside.made(random=Random(seed))
    for optimizer, member in ((beside.ours, param), (beside.theirs, beside.twins[id(param)])):
        optimizer.add_param_group({"params": [member], "lr": 0.2, "weight_decay": 0.5, "initial_lr": 1.0})


def append(beside: Beside, seed: int) -> None:
    param = beside.made(random=Random(seed))
    for groups, member in zip(beside.groups, (param, beside.twins[id(param)]), strict=True):
        groups[-1]["params"].append(member)


def change_settings(beside: Beside, seed: int) -> None:
    for groups in beside.groups:
        random = Random(seed)
        group = random.choice(groups)
        group["lr"] = random.choice((0.0, 0.5, 1e-5))
        group["weight_decay"], group["betas"] = (
            random.random(),
            (random.random(), 0.9 + 0.09 * random.random()),
        )
        group["maximize"] = not group["maximize"]


def other_memory(beside: Beside, seed: int) -> None:
    """``data`` replaced by the same values elsewhere, in another order or of the other sign."""
    random = Random(seed)
    for p in beside.params():
        if random.random() < 0.5:
            p.data = random.choice(LAYOUTS)(p.data)


def other_dtype(beside: Beside, seed: int) -> None:
    random = Random(seed)
    for p in beside.params():
        if random.random() < 0.5 and not p.is_complex():
            p.grad = None
            p.data = p.data.to(torch.float32 if p.dtype is torch.bfloat16 else torch.bfloat16)
            with torch.no_grad():
                beside.twins[id(p)].copy_(p)


def real_or_complex(beside: Beside, seed: int) -> None:
    """Torch's own state of another kind is in the way there too: it has to be deleted."""
    p = Random(seed).choice(beside.params() or [beside.made()])
    other = torch.float32 if p.is_complex() else torch.complex64
    p.grad = None
    p.data = torch.randn(p.shape, dtype=other)
    twin = beside.twins[id(p)]
    twin.grad = None
    twin.data = p.data.to(EXACT[other])
    beside.ours.state.pop(p, None)
    beside.theirs.state.pop(twin, None)


def freeze(beside: Beside, seed: int) -> None:
    random = Random(seed)
    for p in beside.params():
        p.requires_grad_(random.random() < 0.5)


def forget(beside: Beside, seed: int) -> None:
    """Some state deleted: it begins anew."""
    for p in beside.params()[seed % 3 :: 3]:
        beside.ours.state.pop(p, None)
        beside.theirs.state.pop(beside.twins[id(p)], None)


def take_away(beside: Beside, seed: int) -> None:
    beside.ours.offload()


EDITS: dict[str, Callable[[Beside, int], None]] = {
    edit.__name__: edit
    for edit in (
        *(
            move,
            cut_anew,
            swap_groups,
            swap_members,
            copy_groups,
            delete_group,
            insert_group,
            add_group,
            append,
        ),
        *(change_settings, other_memory, other_dtype, real_or_complex, freeze, forget, take_away),
    )
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("edit", EDITS)
def test_each_edit_alone(edit: str, variant: str) -> None:
    for seed in range(3):
        beside, random = Beside(variant), Random(seed)
        torch.manual_seed(seed)
        beside.step(random)
        for _ in range(2):
            EDITS[edit](beside, seed)
            beside.step(random)


@searched(
    "EXAMPLES",
    100,
    30,
    edits=st.lists(st.tuples(st.sampled_from(sorted(EDITS)), st.integers(0, 999)), min_size=1, max_size=10),
    variant=st.sampled_from(sorted(VARIANTS)),
    seed=st.integers(0, 999),
)
def test_any_sequence_of_edits(edits: list[tuple[str, int]], variant: str, seed: int) -> None:
    torch.manual_seed(seed)
    beside, random = Beside(variant), Random(seed)
    for edit, how in edits[: 3 if os.environ.get("TRITON_INTERPRET") else None]:
        EDITS[edit](beside, how)
        if random.random() < 0.8:
            beside.step(random)
    beside.step(random)


@pytest.mark.parametrize("key", ["amsgrad", "state_bits"])
def test_a_parameter_moved_to_a_group_that_asks_for_other_state(key: str) -> None:
    """The groups ask for what they did; it is the parameter that is elsewhere."""
    p, q = (Parameter(torch.ones(5000)) for _ in range(2))
    optimizer = AdamW([{"params": [p, q]}, {"params": [], key: {"amsgrad": True, "state_bits": 8}[key]}])
    names = []
    for _ in range(2):
        p.grad, q.grad = torch.ones(5000), torch.ones(5000)
        optimizer.step()
        names.append([{"max_exp_avg_sq", "exp_avg_codes"} & optimizer.state[t].keys() for t in (p, q)])
        optimizer.param_groups[1]["params"].append(optimizer.param_groups[0]["params"].pop())
    assert names[0] == [set(), set()]
    assert names[1] == [set(), {"max_exp_avg_sq" if key == "amsgrad" else "exp_avg_codes"}]
    assert float(optimizer.state[q]["step"]) == 2
