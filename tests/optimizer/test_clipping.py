"""``max_grad_norm`` and ``nonfinite``: as ``clip_grad_norm_`` before the step, and never halfway."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from adamw_triton import AdamW
from adamw_triton.arguments import OF_THE_OPTIMIZER
from adamw_triton.step import clipping
from adamw_triton_kernels import launch, norms_for
from tests.amount import asked
from tests.optimizer.problems import DTYPES, bits, copies, parameters, set_grads, state_bits, train
from tests.optimizer.simulated_graph import SimulatedGraph

CASES = asked("CASES", 30)
VARIANTS = ("32bit", "8bit", "paged_32bit", "paged_8bit")
SHAPES = ((1,), (31,), (0,), (70, 70), (5000,))


@pytest.fixture
def interpreted(backend: str) -> None:
    if backend != "triton":
        pytest.skip("only kernels")


@pytest.fixture(params=["known", "unknown"])
def knowledge(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the host knows by the time of the update that the step is skipped: on a GPU, rarely."""
    if request.param == "unknown":
        monkeypatch.setattr(clipping, "_arrival", lambda outcome: clipping.never)


def true_norm(params: Sequence[Tensor]) -> float:
    norms = [torch.linalg.vector_norm(p.grad.double()) for p in params if p.grad is not None]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0


def change(optimizer: AdamW) -> list[Tensor]:
    """That a step makes to the weights."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.detach().double() for p in params]
    optimizer.step()
    return [p.detach().double() - old for p, old in zip(params, before, strict=True)]


def random_grads(params: Sequence[Parameter], numbers: random.Random) -> None:
    """Of all magnitudes, some missing."""
    generator = torch.Generator().manual_seed(numbers.randrange(1 << 30))
    magnitude = numbers.choice([0.0, 1e-30, 1e-3, 1.0, 1.0, 1e30])
    for param in params:
        most = 1e3 if param.dtype is torch.float16 else math.inf
        grad = torch.randn(param.shape, generator=generator).double() * min(magnitude, most)
        param.grad = None if numbers.random() < 0.2 else grad.to(param.dtype)


@pytest.mark.parametrize("seed", range(CASES))
def test_as_clipped_before(seed: int) -> None:
    """The norm, and what 32-bit steps make of it, whatever the dtypes, groups and magnitudes."""
    numbers = random.Random(seed)
    shapes = [*SHAPES, (70_001,)] if seed % 10 == 0 else SHAPES
    one = numbers.choice([None, *DTYPES])
    params = [Parameter(torch.randn(shape).to(one or numbers.choice(DTYPES))) for shape in shapes]
    others = copies(params)
    most = 10 ** numbers.uniform(-3, 3)
    arguments: dict[str, Any] = {"variant": numbers.choice(["32bit", "paged_32bit"]), "lr": 0.1}
    ours = AdamW(
        [{"params": params[:2]}, {"params": params[2:], "lr": 0.01}],
        max_grad_norm=most,
        nonfinite=numbers.choice(["propagate", "skip", "raise"]),
        **arguments,
    )
    plain = AdamW([{"params": others[:2]}, {"params": others[2:], "lr": 0.01}], **arguments)
    for _ in range(3):
        random_grads(params, numbers)
        norm = true_norm(params)
        kept = [None if p.grad is None else p.grad.clone() for p in params]
        for p, q in zip(params, others, strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        # Half precision would round what is clipped; a loss scale is divided by in fp32.
        if one is torch.float32 and norm < 1e18:
            torch.nn.utils.clip_grad_norm_(others, most)
            plain.grad_scale = None  # type: ignore[attr-defined]
        else:
            plain.grad_scale = 1 / max(min(1.0, most / (norm + 1e-6)), 1e-38)  # type: ignore[attr-defined]
        ulps = [torch.finfo(p.dtype).eps * p.detach().double().abs() for p in params]
        dtypes = [p.dtype for p in params]
        for a, b, ulp, dtype in zip(change(ours), change(plain), ulps, dtypes, strict=True):
            largest = b.abs().amax() if b.numel() else 0.0
            assert ((a - b).abs() <= 1e-6 * largest + 2 * (ulp + torch.finfo(dtype).eps * b.abs())).all()
        if any(grad is not None for grad in kept):
            assert abs(float(ours.grad_norm) - norm) <= 1e-6 * norm  # type: ignore[arg-type]
        for p, grad in zip(params, kept, strict=True):
            assert grad is None or torch.equal(p.grad, grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("variant", ["32bit", "8bit"])
def test_paged_has_the_bits_of_resident(variant: str) -> None:
    results = []
    for kind in (variant, f"paged_{variant}"):
        optimizer = AdamW(parameters(dtype=torch.bfloat16), variant=kind, lr=0.1, max_grad_norm=1.0)
        results.append((bits(train(optimizer, 3)), state_bits(optimizer)))
    assert results[0] == results[1]


def test_loss_scale() -> None:
    """The norm is that of unscaled gradients, whether the scale is a number or a tensor."""
    norms = []
    for scale in (None, 1024.0, torch.tensor(1024.0), torch.tensor([1024.0])):
        params = parameters()
        optimizer = AdamW(params, max_grad_norm=1.0, variant="32bit", lr=0.1)
        set_grads(params, 1, 1.0 if scale is None else 1024.0)
        if scale is not None:
            optimizer.grad_scale = scale  # type: ignore[attr-defined]
        optimizer.step()
        norms.append((float(optimizer.grad_norm), bits(params)))  # type: ignore[arg-type]
    assert norms[1:] == norms[:1] * 3


@pytest.mark.usefixtures("knowledge")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_step_never_was(variant: str, bad: float) -> None:
    """First, middle, last, in a tail, in a tensor of one: all bits stay, and so do those of what follows."""
    places = [(0, 0), (1, 0), (1, 30), (3, 4899), (3, 4896), (4, 2500)]
    trained = []
    for sees_bad in (False, True):
        params = parameters(SHAPES, torch.bfloat16)
        optimizer = AdamW(
            params, variant=variant, lr=0.1, nonfinite="skip", max_grad_norm=2.0, master_weights=True
        )
        for step in range(1, 1 + len(places)):
            if sees_bad:
                before = bits(params), state_bits(optimizer)
                set_grads(params, 100 + step)
                index, element = places[step - 1]
                params[index].grad.view(-1)[element] = bad  # type: ignore[union-attr]
                optimizer.step()
                assert bits(params) == before[0]
                assert optimizer.skipped_steps == step
                assert not before[1] or state_bits(optimizer) == before[1]
            set_grads(params, step)
            optimizer.step()
        trained.append((bits(params), state_bits(optimizer)))
    assert trained[0] == trained[1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_skipping_changes_no_bits_of_good_steps(variant: str) -> None:
    results = []
    for nonfinite in ("propagate", "skip", "raise"):
        optimizer = AdamW(parameters(), variant=variant, max_grad_norm=1.0, nonfinite=nonfinite)
        results.append((bits(train(optimizer, 3)), state_bits(optimizer), optimizer.skipped_steps))
    assert results[0] == results[1] == results[2]


def test_known_in_time_nothing_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the flag arrives after some pages, the others stay where they are."""
    asked = []

    def arrival(outcome: Tensor) -> Callable[[], bool]:
        return lambda: bool(asked.append(0)) or len(asked) > 2

    from adamw_triton.paging import device

    params = parameters()
    optimizer = AdamW(params, variant="paged_32bit", nonfinite="skip", transfer="copy")
    train(optimizer, 1)
    copied = []
    copy = device.HostStream.copy
    monkeypatch.setattr(device.HostStream, "copy", lambda self, a, b: (copied.append(a), copy(self, a, b))[1])
    monkeypatch.setattr(clipping, "_arrival", arrival)
    asked += [0, 0]
    set_grads(params, 2)
    params[0].grad[0] = math.nan  # type: ignore[index]
    before = bits(params), state_bits(optimizer)
    optimizer.step()
    assert not copied
    assert (bits(params), state_bits(optimizer)) == before


def test_raised_before_anything_is_written() -> None:
    params = parameters()
    optimizer = AdamW([(f"layer.{i}", p) for i, p in enumerate(params)], variant="8bit", nonfinite="raise")
    train(optimizer, 1)
    before = bits(params), state_bits(optimizer)
    for count, index in enumerate((1, 3, 4, 2)):
        params[index].grad.view(-1)[: count + 1] = math.nan  # type: ignore[union-attr]
        with pytest.raises(RuntimeError, match=r"of the gradient of parameter 'layer.1'"):
            optimizer.step()
    said = r"1 of 5000 elements of the gradient of parameter 'layer.1'; 3 of 3 .*; 1 of 1 .* and 1 more"
    with pytest.raises(RuntimeError, match=said):
        optimizer.step()
    assert (bits(params), state_bits(optimizer)) == before
    train(optimizer, 1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_propagated_as_clip_grad_norm_does(bad: float) -> None:
    params = parameters()
    others = copies(params)
    ours, plain = AdamW(params, variant="32bit", max_grad_norm=1.0), AdamW(others, variant="32bit")
    for each in (params, others):
        set_grads(each, 1)
        each[1].grad[7] = bad  # type: ignore[index]
    torch.nn.utils.clip_grad_norm_(others, 1.0)
    ours.step()
    plain.step()
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p.isnan(), q.isnan())


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
def test_captured(nonfinite: str) -> None:
    """Replays see norms on both sides of the limit, and bad ones."""
    arguments: dict[str, Any] = {"variant": "8bit", "lr": 0.1, "max_grad_norm": 70.0, "nonfinite": nonfinite}
    params = parameters()
    others = copies(params)
    ours, plain = AdamW(params, capturable=True, **arguments), AdamW(others, **arguments)
    for optimizer in (ours, plain):
        train(optimizer, 1)
    grads = [torch.zeros_like(p) for p in params]
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad
    graph = SimulatedGraph()
    norms = []
    for step, scale in enumerate((0.1, 10.0, 0.2, math.nan, 3.0), 2):
        if nonfinite == "propagate" and math.isnan(scale):
            continue
        set_grads(others, step, scale)
        for grad, q in zip(grads, others, strict=True):
            grad.copy_(q.grad)  # type: ignore[arg-type]
        if step == 2:
            with graph.capture():
                ours.step()
        else:
            graph.replay()
        plain.step()
        norms.append(float(ours.grad_norm))  # type: ignore[arg-type]
        assert norms[-1] == float(plain.grad_norm) or math.isnan(scale)  # type: ignore[arg-type]
        assert bits(params) == bits(others)
    assert min(norms) < 70 < max(norms)
    assert ours.skipped_steps == plain.skipped_steps == (nonfinite == "skip")


class _Unread(TorchDispatchMode):
    """Refuses to tell the host what is in a tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        assert name not in ("aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero"), name
        return func(*args, **(kwargs or {}))


@contextmanager
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the kernels that are launched."""
    seen: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(launch, "call", lambda spec, *rest: seen.append(spec.fn.__name__))
        yield seen


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("variant", ["32bit", "8bit", "paged_8bit"])
def test_a_launch_pair_more_and_no_wait(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clipping, "_arrival", lambda outcome: clipping.never)
    counts = []
    for clips in ({}, {"max_grad_norm": 1.0}):
        params = parameters(dtype=torch.bfloat16)
        optimizer = AdamW(params, variant=variant, nonfinite="skip" if clips else "propagate", **clips)
        train(optimizer, 2)
        set_grads(params, 3)
        with launches(monkeypatch) as seen:
            if clips:
                with _Unread():
                    optimizer.step()
            else:
                optimizer.step()
        counts.append(sorted(seen))
    assert counts[1] == sorted([*counts[0], "_norms", "_verdict"])


def test_over_several_devices() -> None:
    """One norm of all, one decision, the same bits on each."""
    params = parameters(SHAPES)
    set_grads(params, 1)
    devices = [torch.device("cpu"), torch.device("cpu", 0)]  # two, as far as anybody can tell
    members = {device: [p.grad for p in params[i::2]] for i, device in enumerate(devices)}
    judging = clipping.Clipping(1.0, None, "skip")
    for bad in (False, True):
        if bad:
            members[devices[1]][0].fill_(math.inf)  # type: ignore[union-attr]
        found = {}
        for device, grads in members.items():
            norms = norms_for(device).Norms([grad.numel() for grad in grads], device)  # type: ignore[union-attr]
            found[device] = norms, norms.of(grads)
        judged = judging.judge(found, None, list)
        first, second = (judged.outcomes[device] for device in devices)
        assert torch.equal(first, second)
        assert float(first[1]) == pytest.approx(true_norm(params), rel=1e-6)
        assert (float(first[0]) == -1) == bad
        assert judging.skipped == int(bad)


@pytest.mark.parametrize("most", [0, -1.0, math.nan, True, "1", 10**400])
def test_what_is_no_norm(most: Any) -> None:
    with pytest.raises(ValueError, match="max_grad_norm"):
        AdamW(parameters(), max_grad_norm=most)


def test_unknown_nonfinite() -> None:
    with pytest.raises(ValueError, match=r"nonfinite: 'ignore'.*'propagate', 'skip', 'raise'"):
        AdamW(parameters(), nonfinite="ignore")
    with pytest.raises(ValueError, match=r"nonfinite: array.*'propagate', 'skip', 'raise'"):
        AdamW(parameters(), nonfinite=numpy.array(["skip", "raise"]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"max_grad_norm.*whole optimizer"):
        AdamW([{"params": parameters(), "max_grad_norm": 1.0}])
    with pytest.raises(ValueError, match=r"nonfinite='raise'.*capturable=True use nonfinite='skip'"):
        AdamW(parameters(), nonfinite="raise", capturable=True, variant="8bit")


def test_numbers_of_numpy_are_numbers() -> None:
    AdamW(parameters(), max_grad_norm=numpy.float32(1), adaptive_clip=numpy.int64(2))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [*OF_THE_OPTIMIZER, "capturable"])
def test_what_was_decided_cannot_be_set(name: str) -> None:
    """It would do nothing, or something only after the next load."""
    optimizer = AdamW(parameters())
    value = getattr(optimizer, name)
    for each in (optimizer, copy.deepcopy(optimizer)):
        with pytest.raises(
            AttributeError, match=rf"{name} is decided when an optimizer is made: .*state_dict"
        ):
            setattr(each, name, value)


@pytest.mark.parametrize("how", [{"max_grad_norm": 1.0}, {"adaptive_clip": 1.05}, {"nonfinite": "skip"}])
def test_norms_of_shards_are_refused(how: dict[str, Any]) -> None:
    params = parameters()
    params[1]._fsdp_flattened = True  # type: ignore[attr-defined]
    before = bits(params)
    optimizer = AdamW(params, **how)
    set_grads(params, 0)
    with pytest.raises(ValueError, match=r"parameter 1 of group 0 is this rank's shard .*FSDP"):
        optimizer.step()
    assert bits(params) == before
