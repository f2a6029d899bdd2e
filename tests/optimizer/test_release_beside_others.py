"""Gradient release beside what others do: a scaler, a second optimizer, accelerate, a save after an error."""

from __future__ import annotations

import gc
import logging
import pickle

import pytest
import torch
from torch import Tensor, nn

from adamw_triton import AdamW
from tests.optimizer.problems import bits
from tests.optimizer.test_release import failing, small_buckets, tower

__all__ = ["small_buckets"]

X = torch.ones(2, 100)


def changed(model: nn.Module, before: object) -> bool:
    return bits(list(model.parameters())) != before


def test_a_gradient_scaler_is_refused_and_leaves_nothing_behind() -> None:
    model, optimizer = tower()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(X).sum()).backward()
    with pytest.raises(RuntimeError, match=r"a gradient scaler came with its scale .* too large by it"):
        scaler.step(optimizer)
    optimizer.step()  # without it
    model(X).sum().backward()
    optimizer.step()


def test_the_newest_optimizer_of_a_parameter_steps_it(caplog: pytest.LogCaptureFixture) -> None:
    """In a notebook the one before is often still there."""
    model, before = tower()
    model(X).sum().backward()
    before.step()
    with caplog.at_level(logging.WARNING, "adamw_triton"):
        optimizer = AdamW(model.parameters(), lr=0.0, weight_decay=0.0, variant="8bit", gradient_release=True)
    assert len(caplog.records) == 1
    assert "parameter '0.weight' belongs to an optimizer made before" in caplog.text
    weights = bits(list(model.parameters()))
    for _ in range(2):
        model(X).sum().backward()
        assert all(param.grad is None for param in model[3:].parameters())
        optimizer.step()
    assert not changed(model, weights)
    before.step()  # has nothing to do, and takes nothing back
    assert not changed(model, weights)
    model(X).sum().backward()
    assert all(param.grad is None for param in model[3:].parameters())
    optimizer.step()
    assert not changed(model, weights)
    assert len(caplog.records) == 1
    assert {int(entry["step"]) for entry in before.state.values()} == {1}


def test_an_optimizer_that_is_gone_leaves_its_parameters(caplog: pytest.LogCaptureFixture) -> None:
    model, before = tower()
    del before
    gc.collect()
    optimizer = AdamW(model.parameters(), variant="8bit", gradient_release=True)
    model(X).sum().backward()
    optimizer.step()
    assert not caplog.records


@pytest.mark.parametrize("accumulate_on", ["gpu", "host"])
@pytest.mark.parametrize("call", ["step", "abandon_step", "load"])
def test_a_block_accumulates_to_its_end_whatever_is_called_in_it(call: str, accumulate_on: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(100, 100) for _ in range(6)])
    optimizer = AdamW(model.parameters(), variant="8bit", gradient_release=True, accumulate_on=accumulate_on)
    saved = optimizer.state_dict()
    with optimizer.accumulating():
        model(X).sum().backward()
        optimizer.load_state_dict(saved) if call == "load" else getattr(optimizer, call)()
        weights = bits(list(model.parameters()))
        for _ in range(2):
            model(X).sum().backward()
        assert not changed(model, weights)
    model(X).sum().backward()
    assert changed(model, weights)


def test_a_block_that_an_interrupt_left_open_ends_with_its_frame() -> None:
    model, optimizer = tower()
    block = optimizer.accumulating()
    block.__enter__()
    model(X).sum().backward()
    optimizer.step()
    del block
    gc.collect()
    model(X).sum().backward()
    assert all(param.grad is None for param in model[3:].parameters())


def test_gradients_that_accelerate_kept_are_told_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As an interrupted Trainer leaves it: nothing is released any more, to the same bits."""
    pytest.importorskip("accelerate")
    from accelerate.state import GradientState

    from adamw_triton.step import release

    release._say_kept.cache_clear()
    model, optimizer = tower()
    GradientState()._set_sync_gradients(False)
    try:
        for _ in range(2):
            model(X).sum().backward()
            assert all(param.grad is not None for param in model.parameters())
            optimizer.step()
    finally:
        GradientState._reset_state()
    said = [record for record in caplog.records if "sync_gradients is False" in record.getMessage()]
    assert len(said) == 1


@pytest.mark.parametrize("accumulate_on", ["gpu", "host"])
def test_state_of_two_steps_is_not_saved(accumulate_on: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(100, 100) for _ in range(6)])
    optimizer = AdamW(model.parameters(), variant="8bit", gradient_release=True, accumulate_on=accumulate_on)
    model(X).sum().backward()
    optimizer.step()
    hook = failing(model, 2)
    with pytest.raises(ZeroDivisionError):
        model(X).sum().backward()
    hook.remove()
    for save in (optimizer.state_dict, lambda: pickle.dumps(optimizer)):
        with pytest.raises(RuntimeError, match="parameters were stepped, which are a step ahead"):
            save()
    optimizer.abandon_step()
    assert {int(entry["step"]) for entry in optimizer.state_dict()["state"].values()} == {1, 2}


def test_a_graph_that_saved_a_weight_does_not_go_on_with_the_next_one(backend: str) -> None:
    """Kernels write where autograd does not look."""
    weight = nn.Parameter(torch.ones(8, 8))
    optimizer = AdamW([weight], variant="32bit")
    loss = (weight.detach() @ (x := torch.ones(8, 8, requires_grad=True))).sum()
    weight.grad = torch.ones(8, 8)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert isinstance(x, Tensor)
