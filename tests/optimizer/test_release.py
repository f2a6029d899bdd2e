"""Parameters that are stepped while backward runs: the bits of an ordinary step, and few gradients alive."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import random
import signal
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adamw_triton import AdamW
from adamw_triton.paging.pager import Pager, Work
from adamw_triton.places import store
from adamw_triton.state import placement
from adamw_triton.state.buffers import Page
from tests.amount import asked
from tests.optimizer.problems import bits, state_bits
from tests.paging.simulated import SimulatedDevice, random_order

CASES = asked("CASES", 10)
VARIANTS = ("32bit", "8bit", "paged_32bit", "paged_8bit")
BUCKET = 40_000


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "BUCKET_BYTES", BUCKET)


class Block(nn.Module):
    def __init__(self, width: int, how: str, unused: bool) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 90), nn.Linear(90, width)
        self.spare = nn.Linear(width, width) if unused else None
        self.how = how

    def inside(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.nn.functional.gelu(self.up(self.norm(x))))
        return x + y

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "plain":
            return self.inside(x)
        found: Tensor = checkpoint(self.inside, x, use_reentrant=self.how == "reentrant")
        return found


class Model(nn.Module):
    """Tied, frozen, unused and checkpointed parts, of mixed dtypes, as chance has it."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        width = chance.choice((48, 64))
        self.embed = nn.Embedding(80, width)
        hows = ("plain", "plain", "reentrant", "checkpoint")
        self.blocks = nn.ModuleList(
            Block(width, chance.choice(hows), chance.random() < 0.3) for _ in range(chance.randint(1, 5))
        )
        self.head = nn.Linear(width, 80, bias=False)
        if chance.random() < 0.5:
            self.head.weight = self.embed.weight
        for module in list(self.blocks):
            if chance.random() < 0.2:
                module.requires_grad_(False)
        self.to(chance.choice((torch.float32, torch.bfloat16)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(x)
        return y.float().logsumexp(-1).mean()


def batches(seed: int, count: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(80, (2, 6), generator=generator) for _ in range(count))


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    named = list(model.named_parameters())
    return [{"params": [p for _, p in named[::2]]}, {"params": [p for _, p in named[1::2]], "lr": 3e-3}]


def train(
    model: nn.Module, optimizer: AdamW, steps: int, micro: int, seed: int = 0, first: int = 0
) -> list[Tensor]:
    """The norms of the gradients."""
    norms = []
    for step in range(first, first + steps):
        *others, last = batches(seed + step, micro)
        with optimizer.accumulating():
            for batch in others:
                model(batch).backward()
        model(last).backward()
        optimizer.step()
        norms.append(optimizer.grad_norm)
        optimizer.zero_grad()
    return norms


def pair(seed: int, **settings: Any) -> tuple[Model, AdamW, Model, AdamW]:
    """A model and its optimizer, without and with release."""
    torch.manual_seed(seed)
    model = Model(random.Random(seed))
    other = copy.deepcopy(model)
    plain = AdamW(groups_of(model), **settings)
    return model, plain, other, AdamW(groups_of(other), gradient_release=True, **settings)


@pytest.mark.parametrize("seed", range(CASES))
def test_the_bits_of_an_ordinary_step(seed: int) -> None:
    chance = random.Random(seed)
    settings: dict[str, Any] = {"variant": VARIANTS[seed % 4], "weight_decay": 0.1}
    settings |= chance.choice(({}, {"master_weights": True}, {"stochastic_rounding": True}))
    settings |= chance.choice(
        ({}, {"adaptive_clip": 1.05}, {"max_grad_norm": math.inf}, {"nonfinite": "skip"})
    )
    model, plain, other, released = pair(seed, **settings)
    micro = chance.choice((1, 1, 2, 8))
    before, after = (train(m, o, 4, micro) for m, o in ((model, plain), (other, released)))
    assert bits(list(model.parameters())) == bits(list(other.parameters()))
    assert state_bits(plain) == state_bits(released)
    if before[0] is not None:
        assert list(map(float, after)) == pytest.approx(list(map(float, before)), rel=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_in_another_way(variant: str) -> None:
    """Saved with release, loaded without, and the other way round."""
    model, plain, other, released = pair(3, variant=variant)
    for m, o in ((model, plain), (other, released)):
        train(m, o, 2, 1)
    into = AdamW(groups_of(model), variant=variant, gradient_release=True)
    into.load_state_dict(released.state_dict())
    del plain
    back = AdamW(groups_of(other), variant=variant)
    back.load_state_dict(into.state_dict())
    del released
    for m, o in ((model, into), (other, back)):
        train(m, o, 2, 1, first=2)
    assert bits(list(model.parameters())) == bits(list(other.parameters()))


def test_few_gradients_are_alive() -> None:
    model = nn.Sequential(*[nn.Linear(100, 100) for _ in range(12)])
    optimizer = AdamW(model.parameters(), variant="8bit", gradient_release=True)
    alive = []

    def note(_: Tensor) -> None:
        alive.append(sum(p.grad.nbytes for p in model.parameters() if p.grad is not None))

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(note)
    for step in range(4):
        alive.clear()
        model(torch.ones(2, 100)).sum().backward()
        assert max(alive) <= 2 * BUCKET + 40_000
        if step:  # the first is where the order is learnt
            assert not any(p.grad is not None for p in model.parameters())
        optimizer.step()
        assert not any(p.grad is not None for p in model.parameters())


def failing(model: nn.Module, at: int) -> Any:
    """Have the backward of a layer fail."""

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    return list(model.children())[at].register_full_backward_pre_hook(fail)


def tower() -> tuple[nn.Sequential, AdamW]:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(100, 100) for _ in range(6)])
    return model, AdamW(model.named_parameters(), variant="8bit", gradient_release=True)


@pytest.mark.parametrize("then", ["step", "backward"])
def test_a_backward_that_failed_is_said_and_can_be_gone_on_from(then: str) -> None:
    model, optimizer = tower()
    x = torch.ones(2, 100)
    model(x).sum().backward()
    optimizer.step()
    hook = failing(model, 2)
    with pytest.raises(ZeroDivisionError):
        model(x).sum().backward()
    hook.remove()
    before = bits(list(model.parameters()))
    said = r"a backward has failed after (\d) of 12 parameters were stepped.*abandon_step"
    with pytest.raises(RuntimeError, match=said):
        optimizer.step() if then == "step" else model(x).sum().backward()
    assert bits(list(model.parameters())) == before
    assert optimizer.abandon_step() > 0
    assert all(p.grad is None for p in model.parameters())
    for _ in range(2):
        model(x).sum().backward()
        optimizer.step()
    steps = sorted({int(entry["step"]) for entry in optimizer.state.values()})
    assert steps == [3, 4]


def test_after_a_backward_that_failed_a_load_begins_anew() -> None:
    model, optimizer = tower()
    x = torch.ones(2, 100)
    model(x).sum().backward()
    optimizer.step()
    weights = copy.deepcopy(model.state_dict())
    saved = copy.deepcopy(optimizer.state_dict())
    model(x).sum().backward()
    optimizer.step()
    expected = bits(list(model.parameters()))
    hook = failing(model, 2)
    with pytest.raises(ZeroDivisionError):
        model(x).sum().backward()
    hook.remove()
    model.load_state_dict(weights)
    optimizer.load_state_dict(saved)
    optimizer.zero_grad()
    model(x).sum().backward()
    optimizer.step()
    assert bits(list(model.parameters())) == expected


def test_a_backward_that_failed_before_anything_was_stepped_is_none() -> None:
    model, optimizer = tower()
    hook = failing(model, 5)
    with pytest.raises(ZeroDivisionError):
        model(torch.ones(2, 100)).sum().backward()
    hook.remove()
    optimizer.zero_grad()
    model(torch.ones(2, 100)).sum().backward()
    optimizer.step()
    assert {int(entry["step"]) for entry in optimizer.state.values()} == {1}


def test_a_backward_that_failed_before_anything_was_stepped_may_be_tried_again() -> None:
    """As after running out of memory: also where what has arrived waits for a bucket that is known."""
    model, optimizer = tower()
    x = torch.ones(2, 100)
    for _ in range(2):
        model(x).sum().backward()
        optimizer.step()
    hook = model[5].weight.register_hook(lambda _: 1 / 0)  # when that of the bias has come
    with pytest.raises(ZeroDivisionError):
        model(x).sum().backward()
    hook.remove()
    for _ in range(2):
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
    assert {int(entry["step"]) for entry in optimizer.state.values()} == {4}


@pytest.mark.parametrize("to_none", [True, False])
def test_what_was_dropped_while_it_waited_is_not_stepped(to_none: bool) -> None:
    """And has its place in the next backward."""
    model, optimizer = tower()
    for step in range(4):
        if step > 1:
            model[0].weight.pow(2).sum().backward()
            model[5].bias.sum().backward()
            optimizer.zero_grad(set_to_none=to_none)
        model(torch.ones(2, 100)).sum().backward()
        optimizer.step()
        assert all(p.grad is None for p in model.parameters())
    assert {int(entry["step"]) for entry in optimizer.state.values()} <= {4, 6}


def test_a_backward_that_failed_may_be_tried_again_on_what_it_left() -> None:
    """Nobody has dropped the gradients that wait: the next ones are added to them, and none is stepped before
    it is final."""
    model, optimizer = tower()
    x = torch.ones(2, 100)
    for _ in range(2):
        model(x).sum().backward()
        optimizer.step()
    final = []
    optimizer._release._step = lambda params: final.append(len(params))  # type: ignore[union-attr, method-assign]
    hook = model[5].weight.register_hook(lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(x).sum().backward()
    hook.remove()
    assert final == []
    model[5].weight.pow(2).sum().backward()
    assert final == []


def test_gradients_that_are_put_back_are_refused(tmp_path: Path) -> None:
    """By DDP, of one process too."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'x'}", rank=0, world_size=1)
    try:
        model, optimizer = tower()
        wrapped = nn.parallel.DistributedDataParallel(model)
        wrapped(torch.ones(2, 100)).sum().backward()
        with pytest.raises(RuntimeError, match=r"parameter '\d\.(weight|bias)' has a gradient again.*DDP"):
            optimizer.step()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("small_pages")
def test_a_training_step_that_is_compiled_whole() -> None:
    found = []
    for compiled in (False, True):
        model = tower()[0]
        how: dict[str, Any] = {"variant": "paged_8bit", "transfer": "copy", "gradient_release": True}
        optimizer = AdamW(model.parameters(), **how)

        def step(x: Tensor, model: nn.Module = model, optimizer: AdamW = optimizer) -> None:
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        run = torch.compile(step, backend="eager") if compiled else step
        for _ in range(3):
            run(torch.ones(2, 100))
        found.append(bits(list(model.parameters())))
    assert found[0] == found[1]


def test_a_second_backward_is_refused_by_name() -> None:
    model, optimizer = tower()
    for step in range(2):
        model(torch.ones(2, 100)).sum().backward()
        if step == 0:
            optimizer.step()
    with pytest.raises(RuntimeError, match=r"parameter '5\.(weight|bias)' has got a second .*accumulating"):
        model(torch.ones(2, 100)).sum().backward()


def test_a_closure_that_calls_backward_is_a_step() -> None:
    models = [nn.Linear(100, 100) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, release in zip(models, (False, True), strict=True):
        optimizer = AdamW(model.parameters(), variant="32bit", gradient_release=release)

        def closure(model: nn.Module = model) -> Tensor:
            model.zero_grad()
            loss: Tensor = model(torch.ones(2, 100)).square().sum()
            loss.backward()
            return loss

        assert float(optimizer.step(closure)) > float(optimizer.step(closure))
    assert bits(list(models[0].parameters())) == bits(list(models[1].parameters()))


def test_what_is_thawed_or_added_later() -> None:
    model = tower()[0]
    model[0].requires_grad_(False)
    optimizer = AdamW(model[:4].parameters(), variant="8bit", gradient_release=True)
    for step in range(4):
        if step == 1:
            model[0].requires_grad_(True)
            optimizer.add_param_group({"params": list(model[4:].parameters())})
        model(torch.ones(2, 100)).sum().backward()
        optimizer.step()
        assert all(p.grad is None for group in optimizer.param_groups for p in group["params"])
    assert [int(optimizer.state[p]["step"]) for p in model.parameters()][::2] == [3, 4, 4, 4, 3, 3]


def test_learning_rates_of_zero_count_as_steps() -> None:
    """A warm-up's first step, in which one bucket has gradients and another only zeros."""
    model, plain, other, released = pair(1, variant="8bit", lr=0.0)
    for m, o in ((model, plain), (other, released)):
        for group in o.param_groups:
            group["lr"] = 0.0
        train(m, o, 1, 1)
    assert state_bits(plain) == state_bits(released)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_hears_of_its_own_parameters(how: Callable[[AdamW], AdamW]) -> None:
    model, optimizer = tower()
    model(torch.ones(2, 100)).sum().backward()
    optimizer.step()
    twin = how(optimizer)
    params = twin.param_groups[0]["params"]
    sum((p * p).sum() for p in params).backward()  # type: ignore[union-attr]
    assert sum(p.grad is None for p in params) >= 10
    twin.step()
    assert {int(entry["step"]) for entry in twin.state.values()} == {2}
    assert {int(entry["step"]) for entry in optimizer.state.values()} == {1}


def test_an_optimizer_that_is_gone_steps_nothing() -> None:
    model, optimizer = tower()
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    model(torch.ones(2, 100)).sum().backward()
    assert all(p.grad is not None and not p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_grad_norm": 1.0}, r"max_grad_norm=1\.0 needs the norm of all gradients.*adaptive_clip=1\.05"),
        ({"capturable": True, "variant": "8bit"}, "exclude each other"),
        ({"gradient_release": 1}, "Invalid gradient_release: 1; it must be True or False"),
    ],
)
def test_what_cannot_be_is_refused_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdamW([torch.ones(3, requires_grad=True)], **{"gradient_release": True, **settings})


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = tower()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="for one process, and there are 2: gradients would be averaged"):
        model(torch.ones(2, 100)).sum().backward()


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_a_bucket_that_is_not_finite(nonfinite: str) -> None:
    """Skipped or refused by itself."""
    model = nn.ModuleList(nn.Linear(200, 200) for _ in range(3))
    optimizer = AdamW(model.parameters(), variant="8bit", gradient_release=True, nonfinite=nonfinite)
    before = bits(list(model.parameters()))
    loss = sum(
        layer(torch.full((1, 200), x)).sum() for layer, x in zip(model, (1.0, math.nan, 1.0), strict=True)
    )
    if nonfinite == "raise":
        with pytest.raises(RuntimeError, match="none of this bucket has been stepped"):
            loss.backward()  # type: ignore[union-attr]
        return
    loss.backward()  # type: ignore[union-attr]
    optimizer.step()
    changed = [old != new for old, new in zip(before, bits(list(model.parameters())), strict=True)]
    assert changed[2:4] == [False, False] or changed[2:4] == [False, True]
    assert changed[0]
    assert changed[4]
    assert optimizer.skipped_steps == 1


class Loose(nn.Module):
    """Layers whose gradients come in any order that is asked for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(70, n) for n in (10, 60, 130, 3, 90, 200, 64, 1))

    def loss(self, order: list[int]) -> Tensor:
        total = torch.zeros(())
        for at in order:
            total = total + self.layers[at](torch.full((1, 70), 0.1 * at + total.detach())).square().mean()
        return total


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "PAGE_BYTES", 9000)


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("variant", VARIANTS)
def test_any_order_of_arrival_gives_the_same_bits(variant: str) -> None:
    """Also where pages have been fetched for another bucket than came."""
    choose = random.Random(0)
    model, other = Loose(), Loose()
    how: dict[str, Any] = (
        {"variant": variant, "transfer": "copy"} if "paged" in variant else {"variant": variant}
    )
    plain = AdamW(model.parameters(), **how)
    released = AdamW(other.parameters(), gradient_release=True, **how)
    for step in range(8):
        order = list(range(8)) if step < 3 else choose.sample(range(8), choose.randint(1, 8))
        for m, o in ((model, plain), (other, released)):
            m.loss(order).backward()
            o.step()
            o.zero_grad()
        assert bits(list(model.parameters())) == bits(list(other.parameters())), step
    assert state_bits(plain) == state_bits(released)


@pytest.mark.usefixtures("small_pages")
def test_the_next_buckets_pages_come_in_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the order is known: not those of the first, before which the state may be somebody else's."""
    fetched: list[Page] = []
    begun: list[Page] = []
    fetch, walk = Pager.fetch, Pager.walk

    def fetching(self: Pager, pages: list[Page]) -> None:
        fetched.extend(pages[:1])
        fetch(self, pages)

    def walking(self: Pager, work: Work, *given: Any) -> None:
        begun.append(work[0][0])
        walk(self, work, *given)

    model = Loose()
    how: dict[str, Any] = {"variant": "paged_8bit", "transfer": "copy"}
    optimizer = AdamW(model.parameters(), gradient_release=True, **how)
    monkeypatch.setattr(Pager, "fetch", fetching)
    monkeypatch.setattr(Pager, "walk", walking)
    for step in range(3):
        fetched.clear()
        begun.clear()
        model.loss(list(range(8))).backward()
        optimizer.step()
        assert len(begun) > 2
        assert fetched == (begun[1:] if step else [])


@pytest.mark.usefixtures("small_pages")
def test_pages_go_by_the_copy_engines_unless_somebody_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that read the host's memory themselves would hold up the backward whose stream they are in. On
    an H100 "auto" had come to that, from times of buckets that were backward's."""
    ways: list[str] = []
    for name in ("_copying", "_in_place"):
        real = getattr(Pager, name)

        def told(pager: Pager, *given: Any, real: Any = real, name: str = name) -> None:
            ways.append(name)
            real(pager, *given)

        monkeypatch.setattr(Pager, name, told)
    found = {}
    for transfer in ("auto", "zero_copy"):
        model = tower()[0]
        optimizer = AdamW(model.parameters(), variant="paged_8bit", gradient_release=True, transfer=transfer)
        ways.clear()
        for _ in range(6):
            model(torch.ones(2, 100)).square().mean().backward()
            optimizer.step()
        found[transfer] = set(ways)
    assert found == {"auto": {"_copying"}, "zero_copy": {"_in_place"}}


class Breaks(torch.autograd.Function):
    """Its backward fails."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(context: Any, grad: Tensor) -> Tensor:
        raise ArithmeticError("in the middle of backward")


@pytest.mark.usefixtures("small_pages")
def test_behind_a_failed_backward_nothing_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or an update would be written over the weights that the user then loads."""
    monkeypatch.setattr(placement, "BUCKET_BYTES", 4000)
    device = SimulatedDevice(random_order(0))
    monkeypatch.setattr(store, "device_for", lambda _: device)
    layers = [nn.Linear(60, 60) for _ in range(4)]
    params = [param for layer in layers for param in layer.parameters()]
    optimizer = AdamW(params, variant="paged_32bit", gradient_release=True)
    for fails in (False, True):
        x = torch.ones(2, 60)
        for index, layer in enumerate(layers):
            x = layer(Breaks.apply(x) if fails and index == 2 else x)
        if not fails:
            x.square().mean().backward()
            optimizer.step()
            continue
        with pytest.raises(ArithmeticError, match="in the middle"):
            x.square().mean().backward()
        gc.collect()
        assert optimizer._release is not None
        assert optimizer._release._ahead
        assert not device.beside.queue
        assert not any(pager._under_way for pager in optimizer._store._pagers.values())


def test_an_interrupt_in_a_step_leaves_it_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has been stepped has no gradients any more, and the next step is one more."""
    monkeypatch.setattr(placement, "BUCKET_BYTES", 1 << 30)
    model, expected = (nn.Sequential(*[nn.Linear(100, 100) for _ in range(3)]) for _ in range(2))
    expected.load_state_dict(model.state_dict())
    optimizer, plain = AdamW(model.parameters(), gradient_release=True), AdamW(expected.parameters())
    real = type(optimizer._store).run

    def interrupted(*given: Any) -> None:
        real(*given)
        signal.raise_signal(signal.SIGINT)

    for step in range(3):
        for each in (model, expected):
            each(torch.ones(2, 100)).square().mean().backward()
        plain.step()
        plain.zero_grad()
        with monkeypatch.context() as patch:
            if step == 0:  # later ones leave nothing to step()
                patch.setattr(type(optimizer._store), "run", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    optimizer.step()
                continue
            optimizer.step()
    assert bits(list(model.parameters())) == bits(list(expected.parameters()))


def test_a_load_drops_what_a_failed_backward_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "BUCKET_BYTES", 1 << 30)
    model, optimizer = tower()
    model(torch.ones(2, 100)).sum().backward()
    optimizer.step()
    saved = optimizer.state_dict()
    failing(model, 2)
    with pytest.raises(ZeroDivisionError):
        model(torch.ones(2, 100)).sum().backward()
    assert any(param.grad is not None for param in model.parameters())
    optimizer.load_state_dict(saved)
    assert all(param.grad is None for param in model.parameters())


def test_a_second_backward_behind_a_refused_step_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "BUCKET_BYTES", 4000)
    layers = nn.Sequential(*[nn.Linear(60, 60) for _ in range(3)])
    late = nn.Parameter(torch.ones(3))
    optimizer = AdamW([*layers.parameters(), late], gradient_release=True, nonfinite="raise")
    for _ in range(2):
        layers(torch.ones(2, 60)).square().mean().backward()
        optimizer.step()
    layers(torch.ones(2, 60)).square().mean().backward()
    late.grad = torch.full((3,), torch.nan)
    with pytest.raises(RuntimeError, match="not finite"):
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"last step\(\) failed with \d+ parameters stepped"):
        layers(torch.ones(2, 60)).square().mean().backward()
    assert optimizer.abandon_step() > 0
    layers(torch.ones(2, 60)).square().mean().backward()
    optimizer.step()
