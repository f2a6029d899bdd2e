"""Exact weights are those of the same training with fp32 parameters, whatever happens to the state."""

from __future__ import annotations

import copy
import logging
import math
import pickle
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

from adamw_triton import AdamW
from adamw_triton.state import placement
from adamw_triton.state.buffers import OFTEN
from adamw_triton_kernels.weights import read
from adamw_triton_kernels.work import MASTER, REMAINDER
from tests.amount import searched
from tests.optimizer.problems import bits, saved, state_bits

VARIANTS = ("32bit", "8bit", "paged_32bit", "paged_8bit", "auto")
SIZES = ((1,), (5,), (127,), (70, 65), (4097,), (9000,), (33, 200))


def made(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [
        Parameter(torch.randn(shape, generator=generator).half().bfloat16().to(dtype)) for shape in shapes
    ]


def set_grads(params: Sequence[Parameter], step: int, missing: set[int] = frozenset()) -> None:  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(step)
    for index, param in enumerate(params):
        grad = torch.randn(param.shape, generator=generator).bfloat16()
        param.grad = None if index in missing else (grad * 0.25).to(param.dtype)


def exact(optimizer: AdamW) -> list[Tensor]:
    optimizer.state_dict()  # waits
    found = []
    for param in optimizer.param_groups[0]["params"]:
        entry = optimizer.state.get(param, {})
        how = next((how for how in (REMAINDER, MASTER) if how in entry), "nearest")
        found.append(read(param.detach().cpu(), [entry[how].cpu()] if how in entry else [], how))
    return found


def optimizer_for(params: Sequence[Parameter], variant: str, **arguments: Any) -> AdamW:
    return AdamW(params, lr=3e-5, weight_decay=0.1, variant=variant, **arguments)


class Moves:
    """What may happen between two steps of a training with exact weights, and must not be seen."""

    def __init__(self, generator: random.Random) -> None:
        self._random = generator

    def __call__(self, optimizer: AdamW, params: list[Parameter]) -> tuple[AdamW, list[Parameter]]:
        kind = self._random.choice(("nothing", "nothing", "offload", "load", "copy", "resume"))
        if kind == "offload":
            optimizer.offload()
        elif kind == "load":
            optimizer.load_state_dict(saved(optimizer))
        elif kind == "copy":
            optimizer, params = copy.deepcopy((optimizer, params))
        elif kind == "resume":  # by a process that has another variant, of as many bits
            state = saved(optimizer)
            variant = self._random.choice([v for v in VARIANTS if ("8" in v) == ("8" in optimizer.variant)])
            params = [Parameter(p.detach().clone()) for p in params]
            optimizer = optimizer_for(params, variant, master_weights=True)
            optimizer.load_state_dict(state)
        return optimizer, params


@searched(
    "SEQUENCES",
    12,
    6,
    seed=st.integers(0, 10**9),
    variant=st.sampled_from(VARIANTS),
    dtype=st.sampled_from([torch.bfloat16, torch.bfloat16, torch.float16]),
    page_bytes=st.sampled_from([1, 700, 5_000, 20_000, 64 << 20]),
)
def test_any_sequence_ends_with_the_weights_of_fp32(
    seed: int, variant: str, dtype: torch.dtype, page_bytes: int
) -> None:
    generator = random.Random(seed)
    shapes = generator.sample(SIZES, generator.randint(1, 4))
    params, theirs = made(shapes, dtype), made(shapes, torch.float32)
    moves = Moves(generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement, "PAGE_BYTES", page_bytes)
        ours = optimizer_for(params, variant, master_weights=True)
        plain = optimizer_for(theirs, "8bit" if "8" in variant else "32bit")
        for step in range(generator.randint(1, 6)):
            missing = {i for i in range(len(shapes)) if generator.random() < 0.2}
            for some in (params, theirs):
                set_grads(some, step, missing)
            ours.step()
            plain.step()
            if step == 0 and len(missing) == len(shapes):
                continue
            ours, params = moves(ours, params)
    assert bits(exact(ours)) == bits(theirs)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_weight_that_somebody_writes_begins_anew(variant: str, caplog: pytest.LogCaptureFixture) -> None:
    """Of others nothing is lost, and it is said once a step."""
    params, theirs = made(SIZES, torch.bfloat16), made(SIZES, torch.float32)
    ours = optimizer_for(params, variant, master_weights=True)
    plain = optimizer_for(theirs, "8bit" if "8" in variant else "32bit")
    for step in range(4):
        set_grads(params, step)
        set_grads(theirs, step)
        if step == 2:
            with torch.no_grad():
                for index in (0, 3, 5):
                    params[index].mul_(2.0)
                    theirs[index].copy_(params[index])
        with caplog.at_level(logging.INFO, "adamw_triton"):
            ours.step()
        plain.step()
    assert bits(exact(ours)) == bits(theirs)
    said = [r.getMessage() for r in caplog.records if "begin anew" in r.getMessage()]
    assert said == ["3 exact weights have been changed since the last step, and begin anew"]


def test_written_at_every_step_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """Once."""
    params = made(SIZES, torch.bfloat16)
    ours = optimizer_for(params, "32bit", master_weights=True)
    for step in range(OFTEN + 5):
        set_grads(params, step)
        ours.step()
        with torch.no_grad():
            params[1].clamp_(-10, 10)
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(said) == 1
    assert "parameter 1 of group 0 and 0 others between steps, 20 times" in said[0]


def stepped(steps: int) -> tuple[list[Parameter], AdamW]:
    """Exact bf16 weights after some steps."""
    params = made(SIZES, torch.bfloat16)
    ours = optimizer_for(params, "32bit", master_weights=True)
    for step in range(steps):
        set_grads(params, step)
        ours.step()
    return params, ours


@pytest.mark.parametrize("how", ["load", "pickle"])
def test_written_where_a_step_after_loading_had_no_gradient(how: str) -> None:
    """A load's own weights may come after its state, but not after a step."""
    params, ours = stepped(3)
    if how == "pickle":
        params, ours = pickle.loads(pickle.dumps((params, ours)))
    else:
        state, params = saved(ours), [Parameter(torch.zeros_like(p)) for p in params]
        kept = ours.param_groups[0]["params"]
        ours = optimizer_for(params, "32bit", master_weights=True)
        ours.load_state_dict(state)
        with torch.no_grad():
            for param, old in zip(params, kept, strict=True):
                param.copy_(old)
    before = ours.master_weight(params[2])
    assert not torch.equal(before, params[2].float())
    set_grads(params, 5)
    params[2].grad = None
    ours.step()
    assert torch.equal(ours.master_weight(params[2]), before)
    with torch.no_grad():
        params[2].mul_(2.0)
    assert torch.equal(ours.master_weight(params[2]), params[2].float())


@pytest.mark.parametrize("value", [0.0, -0.0, math.inf, -math.inf, 1.0])
def test_an_unseen_write_makes_no_nan(value: float) -> None:
    """Through ``.data``, as a mask or EMA's swap does: with any remainder beside it."""
    params, ours = stepped(3)
    for param in params:
        param.data.fill_(value)
        ours.state[param][REMAINDER][...] = torch.arange(param.numel()).view(param.shape) * 7919
        weight = ours.master_weight(param)
        assert not weight.isnan().any()
    set_grads(params, 3)
    ours.step()
    assert math.isinf(value) or not any(param.isnan().any() for param in params)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_through_torchs_optimizer_and_back(dtype: torch.dtype) -> None:
    """torch casts what it does not know: what goes with exact weights begins anew."""
    params = made(SIZES, dtype)
    ours = optimizer_for(params, "32bit", master_weights=True)
    set_grads(params, 0)
    ours.step()
    theirs = torch.optim.AdamW(params, lr=1e-3)
    theirs.load_state_dict(ours.state_dict(state_format="portable"))
    set_grads(params, 1)
    theirs.step()
    back = optimizer_for(params, "32bit", master_weights=True)
    back.load_state_dict(saved(theirs))
    set_grads(params, 2)
    back.step()
    assert all(int(entry["step"]) == 3 for entry in back.state.values())


def test_state_without_remainders_loads_as_exact_as_its_weights() -> None:
    params = made(SIZES, torch.bfloat16)
    theirs = torch.optim.AdamW([Parameter(p.detach().float()) for p in params], lr=3e-5)
    set_grads(theirs.param_groups[0]["params"], 0)
    theirs.step()
    ours = optimizer_for(params, "32bit", master_weights=True)
    ours.load_state_dict(theirs.state_dict())
    set_grads(params, 1)
    ours.step()
    twin = optimizer_for(made(SIZES, torch.float32), "32bit")
    twin.load_state_dict(theirs.state_dict())
    set_grads(twin.param_groups[0]["params"], 1)
    twin.step()
    for (weights,) in zip(zip(exact(ours), twin.param_groups[0]["params"], strict=True), strict=True):
        assert torch.equal(weights[0], weights[1].detach())


def test_what_is_no_longer_exact_is_said(caplog: pytest.LogCaptureFixture) -> None:
    params = made(SIZES, torch.bfloat16)
    ours = optimizer_for(params, "32bit", master_weights=True)
    set_grads(params, 0)
    ours.step()
    other = optimizer_for([Parameter(p.detach().clone()) for p in params], "32bit")
    other.load_state_dict(saved(ours))
    set_grads(other.param_groups[0]["params"], 1)
    other.step()
    assert any("are no longer: master_weights is off" in r.getMessage() for r in caplog.records)
    assert all(REMAINDER not in entry for entry in other.state.values())


@pytest.mark.parametrize("variant", ["32bit", "8bit", "paged_8bit"])
def test_stochastic_steps_are_the_same_whatever_the_pages(variant: str) -> None:
    found = []
    for page_bytes in (1, 5_000, 64 << 20):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(placement, "PAGE_BYTES", page_bytes)
            params = made(SIZES, torch.bfloat16)
            ours = optimizer_for(params, variant, stochastic_rounding=True)
            for step in range(3):
                set_grads(params, step)
                ours.step()
            ours.state_dict()
            found.append((bits(params), state_bits(ours)))
    assert found[0] == found[1] == found[2]


def test_named_variants_round_to_nearest_as_ever() -> None:
    params, others = made(SIZES, torch.bfloat16), made(SIZES, torch.bfloat16)
    named, off = optimizer_for(params, "8bit"), optimizer_for(others, "8bit", master_weights=False)
    for some in (params, others):
        set_grads(some, 0)
    named.step()
    off.step()
    assert bits(params) == bits(others)
    assert all({REMAINDER, MASTER}.isdisjoint(entry) for entry in named.state.values())


def test_auto_keeps_weights_exact() -> None:
    params = made(SIZES, torch.bfloat16)
    ours = AdamW(params)
    set_grads(params, 0)
    ours.step()
    assert ours.plan is not None
    assert ours.plan.chosen is not None
    assert ours.plan.chosen.label == "32bit, exact weights"
    assert all(REMAINDER in entry for entry in ours.state.values())
    off = AdamW(made(SIZES, torch.bfloat16), master_weights=False, stochastic_rounding=False)
    set_grads(off.param_groups[0]["params"], 0)
    off.step()
    assert not any(REMAINDER in entry for entry in off.state.values())


@pytest.mark.parametrize(
    ("arguments", "dtype", "message"),
    [
        ({"master_weights": "yes"}, torch.bfloat16, "Invalid master_weights: 'yes'; it must be 'auto', True"),
        ({"stochastic_rounding": 2}, torch.bfloat16, "Invalid stochastic_rounding: 2"),
        ({"master_weights": True, "stochastic_rounding": True}, torch.bfloat16, "contradict each other"),
        ({"stochastic_rounding": True}, torch.float16, "parameter 0 of group 0 has dtype torch.float16"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, Any], dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdamW(made(SIZES, dtype), **arguments)


@pytest.mark.parametrize("variant", ["auto", "8bit"])
@pytest.mark.parametrize("later", ["frozen", "bf16"])
def test_fp16_that_comes_later_is_not_rounded_to_nearest_unasked(variant: str, later: str) -> None:
    param = Parameter(torch.ones(5000, dtype=torch.bfloat16 if later == "bf16" else torch.float16))
    param.requires_grad_(later == "bf16")
    ours = AdamW([param], variant=variant, stochastic_rounding=True)
    param.data = param.data.half()
    param.requires_grad_(True)
    param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match=r"parameter 0 of group 0 has dtype torch\.float16, and stochastic"):
        ours.step()
    assert (param == 1).all()


def test_moved_to_another_dtype_the_weight_is_still_trained() -> None:
    """``model.float()`` and back: the exact part goes, and no other number."""
    params = made(SIZES, torch.bfloat16)
    ours = optimizer_for(params, "32bit", master_weights=True)
    for step, dtype in enumerate((torch.bfloat16, torch.float32, torch.float16, torch.bfloat16)):
        for param in params:
            param.grad = None
            param.data = param.data.to(dtype)
        before = [p.detach().float().clone() for p in params]
        set_grads(params, step)
        ours.step()
        for param, old in zip(params, before, strict=True):
            assert param.dtype is dtype
            assert ((param.detach().float() - old).abs() <= 1e-3 + old.abs() * 2**-7).all()
            assert int(ours.state[param]["step"]) == step + 1
