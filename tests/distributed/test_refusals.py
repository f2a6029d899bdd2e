"""What cannot be done with shards is said by name; what is done with them between steps changes no bits."""

from __future__ import annotations

import io
import logging
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import adamw_triton
from tests.distributed.ranks import together
from tests.distributed.saving import gathered, made
from tests.distributed.training import Case, train

pytestmark = pytest.mark.slow


def said(call: Any, *arguments: Any) -> str:
    try:
        call(*arguments)
    except (RuntimeError, TypeError, ValueError) as error:
        return str(error)
    return "nothing"


def refusals() -> dict[str, str]:
    from torch.distributed.tensor import DTensor, Partial

    model, optimizer = made(Case({"variant": "8bit"}), "shards")
    train(model, optimizer, range(2))
    param: Any = next(model.parameters())
    sums = nn.Parameter(DTensor.from_local(torch.ones(4, 4), param.device_mesh, [Partial()]))
    _, whole = made(Case({"variant": "8bit"}), "whole")
    found = {
        "state into whole": said(whole.load_state_dict, optimizer.state_dict()),
        "partial": said(adamw_triton.AdamW, [sums]),
    }
    param.grad = torch.zeros(param.shape)
    found["gradient"] = said(optimizer.step)
    model, optimizer = made(Case({"variant": "8bit", "nonfinite": "raise"}), "shards")
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
        param.grad.to_local().fill_(float("nan") if dist.get_rank() == 1 else 0.0)
    return found | {"nonfinite": said(optimizer.step)}


def test_what_cannot_be() -> None:
    found, of_other = together(2, refusals)
    assert "exp_avg is a DTensor, not a plain tensor: gather it first" in found["state into whole"]
    assert "parameter 0 of group 0 is a DTensor of partial sums" in found["partial"]
    assert "has shape (128,), the parameter (64,)" in found["gradient"]
    assert "stepped: all that are on this rank are finite, so another rank has some" in found["nonfinite"]
    assert "stepped: 64 of 64 elements of the gradient of parameter" in of_other["nonfinite"]


def told() -> list[list[str]]:
    """What is logged where odd rows keep 32 bits: asked for 8, and not."""
    found = []
    for bits in (None, 32):
        model, _ = made(Case({"variant": "8bit"}, sizes={"hidden_size": 96}), "shards")
        group = {"params": list(model.parameters()), "state_bits": bits}
        optimizer = adamw_triton.AdamW([group], variant="8bit")
        with Told() as records:
            train(model, optimizer, range(2))
        found.append(records)
    return found


class Told(logging.Handler):
    """Messages of ours."""

    def __enter__(self) -> list[str]:
        self.messages: list[str] = []
        logging.getLogger("adamw_triton").addHandler(self)
        return self.messages

    def __exit__(self, *_: object) -> None:
        logging.getLogger("adamw_triton").removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def test_shards_that_keep_32_bits_are_told_of_once_where_8_were_asked_for() -> None:
    asked, not_asked = together(2, told)[0]
    assert len(asked) == 1
    assert "their rows are no whole blocks of 128" in asked[0]
    assert not not_asked


def between_steps(variant: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What two runs come to, of which one is left alone."""
    found = []
    for disturbed in (False, True):
        model, optimizer = made(Case({"variant": variant}), "shards")
        for step in range(4):
            train(model, optimizer, range(step, step + 1))
            if disturbed and step == 0:
                optimizer.offload()
            elif disturbed and step == 1:
                file = io.BytesIO()
                torch.save(optimizer.state_dict(), file)
                file.seek(0)
                optimizer.load_state_dict(torch.load(file, weights_only=True))
            elif disturbed:
                pickle.dump(optimizer, io.BytesIO())
        found.append(gathered(model, optimizer))
    return found[0], found[1]


@pytest.mark.parametrize("variant", ["paged_8bit"])
def test_between_steps(variant: str) -> None:
    for alone, disturbed in together(2, between_steps, variant):
        assert alone.keys() == disturbed.keys()
        for key, value in alone.items():
            assert torch.equal(value, disturbed[key]), key
