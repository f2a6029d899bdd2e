"""What every user of torch.optim expects of an optimizer."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch.nn import Parameter

from adamw_triton import AdamW
from adamw_triton.state.formats import SMALLEST_8BIT
from tests import gradients
from tests.amount import searched
from tests.optimizer.problems import DTYPES, bits, parameters, set_grads, state_bits, train

VARIANTS = ("32bit", "8bit")


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_step_moves_each_weight_by_about_lr(variant: str) -> None:
    """The first update of Adam is lr times the gradient's sign."""
    p = Parameter(torch.zeros(5000))
    p.grad = torch.linspace(-1, 1, 5000)
    AdamW([p], lr=0.1, weight_decay=0.0, variant=variant).step()
    torch.testing.assert_close(p.detach(), -0.1 * p.grad.sign(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_maximize_goes_the_other_way(variant: str) -> None:
    down, up = (
        train(AdamW(parameters(), variant=variant, weight_decay=0.0, maximize=up), 3) for up in (False, True)
    )
    for start, a, b in zip(parameters(), down, up, strict=True):
        torch.testing.assert_close(a - start, start - b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("pair", [(p, g) for p in DTYPES for g in DTYPES], ids=str)
def test_every_pair_of_dtypes_in_one_group(variant: str, pair: tuple[torch.dtype, torch.dtype]) -> None:
    """Each parameter goes as it would alone."""
    values, grads = torch.randn(5000), torch.randn(5000)

    def made(dtype: torch.dtype, grad_dtype: torch.dtype) -> Parameter:
        p = Parameter(values.to(dtype, copy=True))
        gradients.allow(p, grad_dtype)
        p.grad = grads.to(grad_dtype)
        return p

    alone, among = made(*pair), made(*pair)
    AdamW([alone], variant=variant).step()
    others = [made(p, g) for p in DTYPES for g in DTYPES]
    optimizer = AdamW([*others[:4], among, *others[4:]], variant=variant)
    optimizer.step()
    assert bits([alone]) == bits([among])
    for name, value in optimizer.state[among].items():
        if not name.endswith(("codes", "scales")):
            assert value.dtype is torch.float32, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_without_gradients_do_not_move(variant: str) -> None:
    params = parameters()
    optimizer = AdamW(params, variant=variant)
    train(optimizer, 2)
    before, state = bits(params), state_bits(optimizer)
    set_grads(params, 3)
    params[0].grad = params[3].grad = None
    optimizer.step()
    after, state_after = bits(params), state_bits(optimizer)
    unmoved = [a == b for a, b in zip(before, after, strict=True)]
    assert unmoved == [i in (0, 3) for i in range(len(params))]
    assert [a == b for a, b in zip(state, state_after, strict=True)] == unmoved
    assert float(optimizer.state[params[0]]["step"]) == 2
    assert float(optimizer.state[params[1]]["step"]) == 3


@searched(
    "EXAMPLES",
    20,
    8,
    sets=st.lists(st.sets(st.integers(0, 4)), min_size=1, max_size=6),
    variant=st.sampled_from(VARIANTS),
)
def test_any_sequence_of_missing_gradients_goes_as_each_parameter_alone(
    sets: list[set[int]], variant: str
) -> None:
    together = parameters()
    alone = parameters()
    optimizer = AdamW(together, variant=variant)
    singles = [AdamW([p], variant=variant) for p in alone]
    for step, present in enumerate(sets):
        for params in (together, alone):
            set_grads(params, step)
            for i, p in enumerate(params):
                if i not in present:
                    p.grad = None
        optimizer.step()
        for single in singles:
            single.step()
    assert bits(together) == bits(alone)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_group_added_after_steps(variant: str) -> None:
    params, alone = parameters(), parameters()
    optimizer = AdamW(params[:3], lr=1e-2, variant=variant)
    train(optimizer, 2)
    optimizer.add_param_group({"params": params[3:], "lr": 0.5, "weight_decay": 0.0})
    train(optimizer, 2, first=3)
    first = AdamW(alone[:3], lr=1e-2, variant=variant)
    set_grads(alone, 1)
    for step in range(1, 5):
        set_grads(alone, step)
        if step <= 2:  # train() above numbered the gradients of three tensors
            set_grads(alone[:3], step)
        first.step()
    assert bits(params[:3]) == bits(alone[:3])
    assert float(optimizer.state[params[3]]["step"]) == 2
    assert (params[3].detach() - parameters()[3]).abs().max() > 0.1


def test_state_bits_of_a_group_overrides_the_variant() -> None:
    params = parameters(((5000,), (5000,), (5000,)))
    groups = [{"params": [p], "state_bits": n} for p, n in zip(params, (8, 32, None), strict=True)]
    for variant, bits_of in (("32bit", (8, 32, 32)), ("8bit", (8, 32, 8)), ("auto", (8, 32, 32))):
        optimizer = AdamW(copy.deepcopy(groups), variant=variant)
        train(optimizer, 1)
        found = [8 if "exp_avg_codes" in entry else 32 for entry in optimizer.state.values()]
        assert tuple(found) == bits_of


def test_small_tensors_keep_32bit_state() -> None:
    params = parameters(((SMALLEST_8BIT - 1,), (SMALLEST_8BIT,)))
    optimizer = AdamW(params, variant="8bit")
    train(optimizer, 1)
    assert "exp_avg" in optimizer.state[params[0]]
    assert "exp_avg_codes" in optimizer.state[params[1]]


@pytest.mark.parametrize("block", [128, 256])
def test_8bit_state_is_2_bytes_a_parameter(block: int) -> None:
    p = Parameter(torch.randn(1 << 16))
    optimizer = AdamW([p], variant="8bit", block_size=block)
    train(optimizer, 1)
    tensors = [value for key, value in optimizer.state[p].items() if key != "step"]
    assert sum(t.numel() * t.itemsize for t in tensors) == (2 + 4 / block) * p.numel()


def test_state_appears_at_the_first_step() -> None:
    params = parameters()
    optimizer = AdamW(params)
    assert not optimizer.state
    optimizer.step()  # no gradients
    assert not optimizer.state
    train(optimizer, 1)
    assert list(optimizer.state) == params


def test_changing_state_bits_between_steps_keeps_the_moments() -> None:
    p = Parameter(torch.randn(5000))
    optimizer = AdamW([p])
    train(optimizer, 3)
    exact = optimizer.state[p]["exp_avg"].clone()
    p.grad = torch.zeros_like(p)
    optimizer.param_groups[0]["state_bits"] = 8
    optimizer.step()
    assert "exp_avg_codes" in optimizer.state[p]
    assert float(optimizer.state[p]["step"]) == 4
    optimizer.param_groups[0]["state_bits"] = None
    optimizer.step()
    expected = 0.9**2 * exact
    assert (optimizer.state[p]["exp_avg"] - expected).norm() < 0.02 * expected.norm()


# --- Hyperparameters ---------------------------------------------------------------------------------


def test_lr_and_betas_as_tensors() -> None:
    plain = train(AdamW(parameters(), lr=0.25, betas=(0.5, 0.75)), 3)
    lr, betas = torch.tensor(0.25), (torch.tensor(0.5), torch.tensor([0.75]))
    assert bits(plain) == bits(train(AdamW(parameters(), lr=lr, betas=betas), 3))
    changing = AdamW(parameters(), lr=lr)
    lr.fill_(0.0)  # in place, as torch's compiled schedulers do
    assert bits(train(changing, 2)) == bits(parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_lr_schedulers_that_change_lr_and_betas(variant: str) -> None:
    optimizer = AdamW(parameters(), lr=0.1, variant=variant)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=6)
    theirs = torch.optim.AdamW(parameters(), lr=0.1)
    their_scheduler = torch.optim.lr_scheduler.OneCycleLR(theirs, max_lr=0.1, total_steps=6)
    for step in range(1, 5):
        train(optimizer, 1, first=step)
        train(theirs, 1, first=step)
        scheduler.step()
        their_scheduler.step()
        assert optimizer.param_groups[0]["betas"] == theirs.param_groups[0]["betas"] != (0.9, 0.999)
    pairs = zip(optimizer.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 if variant == "32bit" else 0.05)


@pytest.mark.parametrize("kind", ["LambdaLR", "CosineAnnealingLR", "ReduceLROnPlateau", "CyclicLR"])
def test_other_schedulers_accept_it(kind: str) -> None:
    optimizer = AdamW(parameters(), lr=0.1)
    schedulers = torch.optim.lr_scheduler
    scheduler: Any = {
        "LambdaLR": lambda: schedulers.LambdaLR(optimizer, lambda step: 0.5**step),
        "CosineAnnealingLR": lambda: schedulers.CosineAnnealingLR(optimizer, 10),
        "ReduceLROnPlateau": lambda: schedulers.ReduceLROnPlateau(optimizer, patience=0),
        "CyclicLR": lambda: schedulers.CyclicLR(optimizer, 0.01, 0.1),
    }[kind]()
    for step in range(1, 4):
        train(optimizer, 1, first=step)
        scheduler.step(*([1.0] if kind == "ReduceLROnPlateau" else []))
    assert optimizer.param_groups[0]["lr"] != 0.1


# --- The life of an optimizer ------------------------------------------------------------------------


def test_closures_and_hooks() -> None:
    p = Parameter(torch.ones(3))
    optimizer = AdamW([p], lr=0.1)
    order = []
    optimizer.register_step_pre_hook(lambda *_: order.append("before"))
    optimizer.register_step_post_hook(lambda *_: order.append("after"))

    def closure() -> torch.Tensor:
        order.append("closure")
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert order == ["before", "closure", "after"]
    assert p.max() < 1


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_go_on_alike_and_apart(variant: str, way: str) -> None:
    optimizer = AdamW(parameters(), variant=variant, block_size=256)
    train(optimizer, 2)
    if way == "torch.save":
        file = io.BytesIO()
        torch.save(optimizer, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = copy.deepcopy(optimizer) if way == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    assert state_bits(twin) == state_bits(optimizer)
    original = bits(train(optimizer, 2, first=3))
    assert bits(train(twin, 2, first=3)) == original
    assert (twin.variant, twin.block_size) == (variant, 256)
    train(twin, 1, first=9)
    assert bits(optimizer.param_groups[0]["params"]) == original


@pytest.mark.parametrize("variant", [*VARIANTS, "paged_8bit"])
def test_a_default_device_does_not_matter(variant: str) -> None:
    """Notebooks set one. Host tables on it would be wrong, and on this one lost."""
    params = parameters()
    plain = train(AdamW(params, variant=variant, memory_budget="192KiB" if "paged" in variant else None), 3)
    others = parameters()
    with torch.device("meta"):
        optimizer = AdamW(others, variant=variant, memory_budget="192KiB" if "paged" in variant else None)
    for step in range(1, 4):
        set_grads(others, step)
        with torch.device("meta"):
            optimizer.step()
            state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    assert bits(others) == bits(plain)


def test_repr_names_the_choices() -> None:
    text = repr(AdamW(parameters(), lr=0.5))
    assert "AdamW" in text
    assert "lr: 0.5" in text
    assert "weight_decay: 0.01" in text


@pytest.mark.parametrize("variant", VARIANTS)
def test_complex_parameters_are_pairs_of_real_ones(variant: str) -> None:
    real = Parameter(torch.randn(50, 60, 2))
    imaginary = Parameter(torch.view_as_complex(real.detach().clone()))
    ours, theirs = (AdamW([p], variant=variant) for p in (imaginary, real))
    for step in range(1, 4):
        set_grads([real], step)
        assert real.grad is not None
        imaginary.grad = torch.view_as_complex(real.grad.clone())
        if step == 2:
            imaginary.grad = imaginary.grad.conj().resolve_conj().conj()  # lazily conjugated
        ours.step()
        theirs.step()
    assert bits([torch.view_as_real(imaginary.detach())]) == bits([real])


def test_complex_state_has_torchs_shape() -> None:
    p = Parameter(torch.randn(3, dtype=torch.complex64))
    optimizer = AdamW([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    theirs = torch.optim.AdamW([p])
    theirs.step()
    for key, value in theirs.state[p].items():
        assert (optimizer.state[p][key].shape, optimizer.state[p][key].dtype) == (value.shape, value.dtype)


@pytest.mark.parametrize("variant", VARIANTS)
def test_empty_and_scalar_parameters(variant: str) -> None:
    params = [Parameter(torch.randn(shape)) for shape in ((0,), (), (3, 0, 2), (5000,))]
    start = bits(params)
    optimizer = AdamW(params, variant=variant)
    train(optimizer, 2)
    assert [a == b for a, b in zip(start, bits(params), strict=True)] == [True, False, True, False]
    twin = AdamW([Parameter(p.detach().clone()) for p in params], variant=variant)
    twin.load_state_dict(optimizer.state_dict())
    assert bits(train(twin, 1)) == bits(train(optimizer, 1))


# --- Scalers -----------------------------------------------------------------------------------------


class Scaled:
    """What torch.amp.GradScaler sets on optimizers that ask for it."""

    def __init__(self, scale: float, found_inf: float) -> None:
        self.grad_scale, self.found_inf = torch.tensor(scale), torch.tensor(found_inf)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_scalers_numbers_are_honoured(variant: str) -> None:
    plain, scaled = AdamW(parameters(), variant=variant), AdamW(parameters(), variant=variant)
    train(plain, 3)
    params = scaled.param_groups[0]["params"]
    for step in (1, 2, 3):
        set_grads(params, step, scale=1024.0)
        vars(scaled).update(vars(Scaled(1024.0, 0.0)))
        scaled.step()
        before = bits(params), state_bits(scaled)
        vars(scaled).update(vars(Scaled(1024.0, 1.0)))
        scaled.step()  # an overflow: no step
        assert (bits(params), state_bits(scaled)) == before
    assert bits(params) == bits(plain.param_groups[0]["params"])


def test_torchs_grad_scaler() -> None:
    p, q = (Parameter(torch.full((5,), 2.0)) for _ in range(2))
    for param, cls in ((p, AdamW), (q, torch.optim.AdamW)):
        optimizer = cls([param], lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        for factor in (1.0, float("inf"), 1.0):
            optimizer.zero_grad()
            scaler.scale((param * param).sum() * factor).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 2.0**15
    torch.testing.assert_close(p, q)


@pytest.mark.parametrize("variant", VARIANTS)
def test_frozen_parameters_get_no_state(variant: str) -> None:
    params = parameters()
    params[0].requires_grad_(False)
    optimizer = AdamW(params, variant=variant)
    for p in params[1:]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert params[0] not in optimizer.state
