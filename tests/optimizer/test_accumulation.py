"""Gradients of micro-batches that add up in host memory: the bits of those that stay, and few alive."""

from __future__ import annotations

import copy
import functools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from adamw_triton import AdamW
from adamw_triton.memory import host
from adamw_triton.places import store
from adamw_triton.state import placement
from adamw_triton.trainer_arguments import parse_optim_args
from tests.amount import asked, searched
from tests.measuring import staging
from tests.optimizer.problems import bits, state_bits
from tests.optimizer.test_release import Loose, Model, failing, groups_of, train
from tests.paging.simulated import SimulatedDevice, random_order

CASES = asked("CASES", 10)
VARIANTS = ("32bit", "8bit", "paged_32bit", "paged_8bit")
BUCKET, PAGE = 40_000, 9_000
HOST: dict[str, Any] = {"gradient_release": True, "accumulate_on": "host"}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buckets, and pages, of which each has some."""
    monkeypatch.setattr(placement, "BUCKET_BYTES", BUCKET)
    monkeypatch.setattr(placement, "PAGE_BYTES", PAGE)


def pair(seed: int, **arguments: Any) -> tuple[Model, AdamW, Model, AdamW]:
    """A model and its optimizer: accumulating where gradients are, and on the host."""
    torch.manual_seed(seed)
    model = Model(random.Random(seed))
    other = copy.deepcopy(model)
    return model, AdamW(groups_of(model), **arguments), other, AdamW(groups_of(other), **HOST, **arguments)


@pytest.mark.parametrize("seed", range(CASES))
def test_the_bits_of_accumulation_on_the_gpu(seed: int) -> None:
    """Tied, frozen, unused and checkpointed layers, weights of either dtype kept in any way."""
    chance = random.Random(seed)
    arguments: dict[str, Any] = {"variant": (*VARIANTS, "auto")[seed % 5], "weight_decay": 0.1}
    arguments |= chance.choice(({}, {"master_weights": True}, {"stochastic_rounding": True}))
    arguments |= chance.choice(
        ({}, {"adaptive_clip": 1.05}, {"max_grad_norm": math.inf}, {"nonfinite": "skip"})
    )
    model, plain, other, released = pair(seed, **arguments)
    before, after = [], []
    for step, micro in enumerate((seed % 8 + 1, 1, chance.randint(1, 8), 2)):
        before += train(model, plain, 1, micro, first=step)
        after += train(other, released, 1, micro, first=step)
        assert bits(list(model.parameters())) == bits(list(other.parameters())), (step, micro)
        assert not released._places.sums.held  # type: ignore[union-attr]
    assert state_bits(plain) == state_bits(released)
    if before[0] is not None:
        assert list(map(float, after)) == pytest.approx(list(map(float, before)), rel=1e-5)


def step_in(model: Loose, optimizer: AdamW, orders: Sequence[Sequence[int]]) -> None:
    *others, last = orders
    with optimizer.accumulating():
        for order in others:
            model.loss(list(order)).backward()
    model.loss(list(last)).backward()
    optimizer.step()
    optimizer.zero_grad()


some_orders = st.lists(st.lists(st.integers(0, 7), min_size=1, unique=True), min_size=1, max_size=4)


@searched(
    "EXAMPLES", 8, 4, variant=st.sampled_from(VARIANTS), orders=st.lists(some_orders, min_size=1, max_size=4)
)
def test_whatever_arrives_in_any_order(variant: str, orders: list[list[list[int]]]) -> None:
    """Also what has a gradient in an earlier micro-batch and none in the last, and the other way round."""
    how: dict[str, Any] = {"variant": variant}
    model, other = Loose(), Loose()
    plain, released = AdamW(model.parameters(), **how), AdamW(other.parameters(), **HOST, **how)
    for each in orders:
        for m, o in ((model, plain), (other, released)):
            step_in(m, o, each)
        assert bits(list(model.parameters())) == bits(list(other.parameters()))
    assert state_bits(plain) == state_bits(released)


def test_in_any_order_of_what_a_gpu_does(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device whose streams run as they like."""
    if backend != "torch":
        pytest.skip("interpreted kernels know addresses alone, and the CPU hands memory out again at once")

    def trained(devices: list[SimulatedDevice]) -> list[bytes]:
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(n, dtype=torch.bfloat16)) for n in (4500, 10, 4100, 9000)]
        optimizer = AdamW(params, variant="paged_8bit", transfer="copy", **(HOST if devices else {}))
        grads = []

        def backward(scale: float) -> None:
            for param in params if scale != 2 else params[1:]:
                grad = (param.detach() * scale).clone()
                grads.append(grad)  # the simulated device reads it when it likes
                (param * grad).sum().backward()

        for _ in range(2):
            with optimizer.accumulating():
                for scale in (0.3, 2, 0.7):
                    backward(scale)
                    if devices:
                        devices[-1].synchronize()  # or the next would be computed from what is not there yet
            backward(1.1)
            optimizer.step()
            optimizer.zero_grad()
            if devices:
                devices[-1].synchronize()
        return bits(params)

    expected = trained([])
    devices: list[SimulatedDevice] = []
    monkeypatch.setattr(store, "device_for", lambda _: devices[-1])
    for seed in range(30):
        devices.append(SimulatedDevice(random_order(seed)))
        assert trained(devices) == expected, seed


def tower(**arguments: Any) -> tuple[nn.Sequential, AdamW]:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(100, 100) for _ in range(6)])
    return model, AdamW(model.named_parameters(), **{"variant": "8bit", **HOST, **arguments})


def micro_batches(seed: int, count: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(3, 100, generator=generator) for _ in range(count))


def accumulate(model: nn.Module, optimizer: AdamW, seed: int, count: int = 3) -> None:
    with optimizer.accumulating():
        for batch in micro_batches(seed, count):
            model(batch).square().sum().backward()


def a_step(model: nn.Module, optimizer: AdamW, seed: int) -> list[bytes]:
    accumulate(model, optimizer, seed)
    model(next(micro_batches(seed + 100, 1))).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return bits(list(model.parameters()))


def fresh_step(model: nn.Module, optimizer: AdamW, seed: int) -> list[bytes]:
    """What a step on these weights and this state comes to, without a release."""
    other = copy.deepcopy(model)
    for param in other.parameters():
        param.grad = None
    plain = AdamW(other.named_parameters(), variant="8bit")
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return a_step(other, plain, seed)


def test_few_gradients_are_alive_and_none_between_micro_batches() -> None:
    model, optimizer = tower()
    params = list(model.parameters())
    alive: list[int] = []

    def note(_: Tensor) -> None:
        alive.append(sum(p.grad.nbytes for p in params if p.grad is not None))

    for param in params:
        param.register_post_accumulate_grad_hook(note)
    for step in range(3):
        with optimizer.accumulating():
            for batch in micro_batches(step, 3):
                model(batch).sum().backward()
                assert all(p.grad is None for p in params)
        model(next(micro_batches(step, 1))).sum().backward()
        optimizer.step()
        assert all(p.grad is None for p in params)
    assert max(alive) <= 2 * BUCKET + 40_000
    assert sum(p.nbytes for p in params) > 2 * max(alive)


def test_sums_of_fp32_are_rounded_once() -> None:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(n).bfloat16()) for n in (5000, 7, 300)]
    others = [nn.Parameter(p.detach().clone()) for p in params]
    released = AdamW(params, variant="8bit", accumulate_dtype=torch.float32, **HOST)
    plain = AdamW(others, variant="8bit")
    for step in range(3):
        grads = [[torch.randn(p.shape).bfloat16() for p in params] for _ in range(5)]
        with released.accumulating():
            for micro in grads[:-1]:
                sum((p * g).sum() for p, g in zip(params, micro, strict=True)).backward()  # type: ignore
        # One has none in the last micro-batch.
        sum((p * g).sum() for p, g in list(zip(params, grads[-1], strict=True))[1:]).backward()  # type: ignore
        released.step()
        for index, param in enumerate(others):
            added = [micro[index].float() for micro in (grads[:-1] if index == 0 else grads)]
            param.grad = functools.reduce(torch.add, added).bfloat16()
        plain.step()
        assert bits(params) == bits(others), step
    assert released.memory()["sums"] == 4 * sum(-(-p.numel() // 64) * 64 for p in params)


def dropped_by_step(model: nn.Module, optimizer: AdamW) -> None:
    optimizer.step()


def dropped_by_zero_grad(model: nn.Module, optimizer: AdamW) -> None:
    optimizer.zero_grad()


def dropped_by_abandon_step(model: nn.Module, optimizer: AdamW) -> None:
    assert optimizer.abandon_step() == 0


def dropped_by_a_load(model: nn.Module, optimizer: AdamW) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


@pytest.mark.parametrize(
    "drop", [dropped_by_step, dropped_by_zero_grad, dropped_by_abandon_step, dropped_by_a_load]
)
def test_no_sum_is_stale(drop: Callable[[nn.Module, AdamW], None]) -> None:
    model, optimizer = tower()
    a_step(model, optimizer, 0)
    accumulate(model, optimizer, 1)
    drop(model, optimizer)
    for seed in (2, 3):
        expected = fresh_step(model, optimizer, seed)
        assert a_step(model, optimizer, seed) == expected


def test_all_backwards_were_said_not_to_be_the_last() -> None:
    """The step uses the sums up nevertheless, a bucket at a time."""
    model, optimizer = tower()
    a_step(model, optimizer, 0)
    other = copy.deepcopy(model)
    plain = AdamW(other.named_parameters(), variant="8bit")
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (other, plain)):
        accumulate(m, o, 1)
        o.step()
    assert bits(list(model.parameters())) == bits(list(other.parameters()))


def interrupting(model: nn.Sequential, error: type[BaseException]) -> Any:
    """In the middle of a backward, after some gradients have come to be what they are."""

    def fail(_: Tensor) -> None:
        raise error

    return model[1].weight.register_post_accumulate_grad_hook(fail)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("then", ["step", "backward", "last"])
def test_a_micro_batch_that_failed_is_said(then: str, error: type[BaseException]) -> None:
    model, optimizer = tower()
    a_step(model, optimizer, 0)
    with optimizer.accumulating():
        model(torch.ones(2, 100)).sum().backward()
        hook = interrupting(model, error)
        with pytest.raises(error):
            model(torch.ones(2, 100)).sum().backward()
        hook.remove()
    before = bits(list(model.parameters()))
    go_on: dict[str, Callable[[], Any]] = {
        "step": optimizer.step,
        "backward": lambda: accumulate(model, optimizer, 1),
        "last": lambda: model(torch.ones(2, 100)).sum().backward(),
    }
    with pytest.raises(RuntimeError, match=r"a backward has failed while gradients add up .*zero_grad\(\)"):
        go_on[then]()
    assert bits(list(model.parameters())) == before
    optimizer.zero_grad() if error is KeyboardInterrupt else optimizer.abandon_step()
    for seed in (2, 3):
        expected = fresh_step(model, optimizer, seed)
        assert a_step(model, optimizer, seed) == expected


def test_a_micro_batch_that_failed_at_its_very_end_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where what waits is added, though somebody keeps the error, and with it what autograd called."""
    model, optimizer = tower()
    a_step(model, optimizer, 0)
    with optimizer.accumulating():
        model(torch.ones(2, 100)).sum().backward()
        with monkeypatch.context() as patch:
            patch.setattr(optimizer._places.sums, "add", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError) as kept:
                model[0].bias.pow(2).sum().backward()  # waits for the other one of its bucket
    assert any(entry.name == "ended" for entry in kept.traceback)
    with pytest.raises(RuntimeError, match="a backward has failed while"):
        model(torch.ones(2, 100)).sum().backward()


def test_a_last_backward_that_failed_leaves_no_sums() -> None:
    model, optimizer = tower()
    a_step(model, optimizer, 0)
    accumulate(model, optimizer, 1)
    hook = failing(model, 1)
    with pytest.raises(ZeroDivisionError):
        model(torch.ones(2, 100)).sum().backward()
    hook.remove()
    with pytest.raises(RuntimeError, match=r"after \d of 12 parameters were stepped.*abandon_step"):
        optimizer.step()
    assert 0 < optimizer.abandon_step() < 12
    for seed in (2, 3):
        expected = fresh_step(model, optimizer, seed)
        assert a_step(model, optimizer, seed) == expected


def test_a_failure_outside_of_backward_breaks_nothing() -> None:
    """Whole micro-batches are in the sums."""
    model, optimizer = tower()
    a_step(model, optimizer, 0)
    expected = fresh_step(model, optimizer, 1)

    def fail() -> None:
        with optimizer.accumulating():
            for batch in micro_batches(1, 3):
                model(batch).square().sum().backward()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    model(next(micro_batches(101, 1))).square().sum().backward()
    optimizer.step()
    assert bits(list(model.parameters())) == expected


def test_an_outer_backward_that_fails_between_reentrant_ones_is_noticed() -> None:
    """Those within it have come to their end."""
    model, optimizer = tower()

    def run(x: Tensor) -> Tensor:
        for layer in model[:3]:
            x = layer(x)
        x = torch.utils.checkpoint.checkpoint(model[3], x, use_reentrant=True)
        found: Tensor = model[4](x)
        return found

    def loss() -> Tensor:
        return model[5](run(torch.ones(2, 100))).sum()

    with optimizer.accumulating():
        loss().backward()
        assert all(p.grad is None for p in model.parameters())
        hook = failing(model, 1)
        with pytest.raises(ZeroDivisionError):
            loss().backward()
    hook.remove()
    with pytest.raises(RuntimeError, match="a backward has failed while"):
        loss().backward()


def test_two_dtypes_complex_ones_and_any_layout() -> None:
    def params() -> list[nn.Parameter]:
        torch.manual_seed(0)
        return [
            nn.Parameter(torch.randn(90, 60)),
            nn.Parameter(torch.randn(90, 60).bfloat16()),
            nn.Parameter(torch.randn(50, 30, dtype=torch.complex64)),
            nn.Parameter(torch.randn(40, 70).t()),
            nn.Parameter(torch.randn(3, 0)),
            nn.Parameter(torch.randn(6, 1, 5)),
        ]

    found = []
    for how in ({}, HOST):
        some = params()
        optimizer = AdamW(some, variant="paged_8bit", transfer="copy", **how)
        for step in range(3):
            for micro in range(3):
                with optimizer.accumulating() if micro < 2 else torch.enable_grad():
                    sum((p * p.detach() * (step + micro + 0.3)).abs().sum() for p in some).backward()
                    some[3].sum().backward() if micro < 2 else None  # of strides 0 before they are kept
            optimizer.step()
            optimizer.zero_grad()
        found.append(bits([torch.view_as_real(p) if p.is_complex() else p for p in some]))
    assert found[0] == found[1]


def test_what_is_thawed_or_added_later() -> None:
    model = tower()[0]
    model[0].requires_grad_(False)
    other = copy.deepcopy(model)
    optimizers = [AdamW(m[:4].parameters(), variant="8bit", **h) for m, h in ((model, HOST), (other, {}))]
    for step in range(4):
        for m, o in zip((model, other), optimizers, strict=True):
            if step == 1:
                m[0].requires_grad_(True)
                o.add_param_group({"params": list(m[4:].parameters())})
            m[4:].requires_grad_(step > 0)
            a_step(m, o, step)
    assert bits(list(model.parameters())) == bits(list(other.parameters()))


def test_what_is_no_parameter_of_the_optimizer_any_more_is_left_alone() -> None:
    """Its hook is still there."""
    model = tower()[0]
    groups = [{"params": list(model[:3].parameters())}, {"params": list(model[3:].parameters())}]
    optimizer = AdamW(groups, variant="8bit", **HOST)
    gone = optimizer.param_groups.pop()["params"]
    before = bits(gone)
    for step in range(2):
        a_step(model, optimizer, step)
    assert bits(gone) == before
    assert {int(entry["step"]) for entry in optimizer.state.values()} == {2}


def test_a_sparse_gradient_is_refused_by_name() -> None:
    embed = nn.Embedding(10, 4, sparse=True)
    optimizer = AdamW(embed.named_parameters(), variant="32bit", **HOST)
    with optimizer.accumulating(), pytest.raises(RuntimeError, match=r"sparse gradients: that of .*'weight'"):
        embed(torch.tensor([1])).sum().backward()


def test_a_parameter_that_changes_meanwhile_is_refused_by_name() -> None:
    model, optimizer = tower()
    accumulate(model, optimizer, 0)
    model[5].weight.data = torch.ones(100, 50)
    with pytest.raises(RuntimeError, match=r"parameter '5\.weight' or its gradient has changed since"):
        optimizer.step()


def test_host_memory_that_is_not_there_is_said_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = tower()
    monkeypatch.setattr(host, "host_limit", lambda: host.Limit(1000, "the test"))
    with optimizer.accumulating(), pytest.raises(MemoryError, match=r"accumulate_on='host'.* 238\.5 KiB"):
        model(torch.ones(2, 100)).sum().backward()


def test_memory_counts_the_sums_and_offload_hands_staging_back() -> None:
    model, optimizer = tower(variant="paged_8bit", transfer="copy")
    assert "sums" not in AdamW(model.parameters()).memory()
    a_step(model, optimizer, 0)
    state = sum(buffer.nbytes for buffer in optimizer._store.buffers)
    found = optimizer.memory()
    sums = 6 * 4 * (157 * 64 + 2 * 64)
    assert (found["sums"], found["host"]) == (sums, sums + state)
    assert 3 * 8192 < staging(optimizer) <= 2 * 3 * PAGE
    assert found["staging"] == 0, "of GPUs"
    accumulate(model, optimizer, 1)
    expected = staging(optimizer)
    optimizer.offload()
    assert staging(optimizer) == 0 < expected
    model(torch.ones(2, 100)).sum().backward()
    optimizer.step()


def test_a_budget_holds_for_the_sums_staging_too() -> None:
    budget = 6 * (64 << 10)
    model, optimizer = tower(variant="paged_8bit", transfer="copy", memory_budget=budget)
    a_step(model, optimizer, 0)
    assert staging(optimizer) + sum(b.nbytes for b in optimizer._store.buffers if not b.paged) <= budget


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gradient_release": False}, r"accumulate_on='host' needs gradient_release=True"),
        ({"accumulate_on": "disk"}, r"Invalid accumulate_on: 'disk'; it must be one of 'gpu', 'host'"),
        ({"accumulate_on": None}, "Invalid accumulate_on: None"),
        ({"accumulate_dtype": torch.bfloat16}, r"Invalid accumulate_dtype: torch\.bfloat16; .*float32"),
        ({"accumulate_dtype": "float32"}, r"Invalid accumulate_dtype: 'float32'"),
        ({"accumulate_dtype": torch.float32, "accumulate_on": "gpu"}, "needs accumulate_on='host'"),
        (
            {"variant": "paged_8bit", "memory_budget": 3 * (64 << 10)},
            r"memory_budget of 192\.0 KiB is too small.*384\.0 KiB",
        ),
    ],
)
def test_what_cannot_be_is_refused_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdamW([torch.ones(3, requires_grad=True)], **{**HOST, **arguments})


def test_it_is_decided_for_good() -> None:
    _, optimizer = tower()
    with pytest.raises(AttributeError, match="accumulate_on is decided when an optimizer is made"):
        optimizer.accumulate_on = "gpu"
    twin = copy.deepcopy(optimizer)
    assert (twin.accumulate_on, twin.accumulate_dtype) == ("host", None)


def test_by_optim_args() -> None:
    found = parse_optim_args("gradient_release=true,accumulate_on=host,accumulate_dtype=float32")
    assert found == {**HOST, "accumulate_dtype": torch.float32}
    assert parse_optim_args({"accumulate_dtype": torch.float32}) == {"accumulate_dtype": torch.float32}
    assert parse_optim_args("accumulate_dtype=none") == {"accumulate_dtype": None}
    with pytest.raises(ValueError, match=r"accumulate_dtype=big is invalid; .* a dtype like float32"):
        parse_optim_args("accumulate_dtype=big")
