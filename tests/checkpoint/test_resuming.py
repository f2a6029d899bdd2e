"""Every way out of an optimizer and back, to the same bits: complex parameters, memory orders that change."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from torch.nn import Parameter

from adamw_triton import AdamW
from adamw_triton.checkpoint import files
from tests.optimizer.problems import bits, copies, parameters, saved, state_bits, train

# --- What torch.save takes --------------------------------------------------------------------------------

MIXED: dict[str, tuple[torch.dtype, ...]] = {
    "complex behind real": (torch.float32, torch.complex64),
    "complex before real": (torch.complex64, torch.float32),
    "complex alone": (torch.complex64,),
    "in turn": (torch.complex64, torch.bfloat16, torch.complex64, torch.float32, torch.complex64),
}


@pytest.mark.parametrize("shapes", [((3,), (70, 70)), ((0,), (5,)), ((), (0, 3))], ids=str)
@pytest.mark.parametrize("kind", MIXED)
@pytest.mark.parametrize("variant", ["32bit", "8bit", "paged_32bit", "paged_8bit", "amsgrad"])
def test_complex_and_real_parameters_side_by_side(
    variant: str, kind: str, shapes: tuple[tuple[int, ...], ...]
) -> None:
    """Every way out and back, to the same bits. Empty ones begin where their neighbours do."""
    params = [Parameter(torch.randn(shape).to(dtype)) for shape in shapes for dtype in MIXED[kind]]
    options = {"variant": "32bit", "amsgrad": True} if variant == "amsgrad" else {"variant": variant}
    optimizer = AdamW(params, **options)
    train(optimizer, 2)
    portable = io.BytesIO()
    torch.save(optimizer.state_dict(state_format="portable"), portable)
    portable.seek(0)
    whole = io.BytesIO()
    torch.save(optimizer, whole)
    whole.seek(0)
    resumed = AdamW(copies(params), **options)
    resumed.load_state_dict(saved(optimizer))
    others = [resumed, torch.load(whole, weights_only=False), copy.deepcopy(optimizer)]
    torchs = torch.optim.AdamW(copies(params), amsgrad=variant == "amsgrad")
    torchs.load_state_dict(torch.load(portable, weights_only=True))
    assert all(entry["exp_avg"].dtype is p.dtype for p, entry in torchs.state.items())
    expected = bits(train(optimizer, 2, first=3))
    for other in others:
        assert bits(train(other, 2, first=3)) == expected
        assert state_bits(other) == state_bits(optimizer)


def test_a_pickled_optimizer_holds_little_but_its_state() -> None:
    params = [Parameter(torch.zeros(3)) for _ in range(3)] + [Parameter(torch.zeros(200, 300))]
    optimizer = AdamW(params, variant="8bit")
    train(optimizer, 1)
    for param in params:
        param.grad = None
    file = io.BytesIO()
    torch.save(optimizer, file)
    assert file.tell() < 200 * 300 * (4 + 2.1) + 8000


# --- A memory order that changes --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "way", ["state_dict", "file", "deepcopy", "pickle", "safetensors", "into a used one"]
)
@pytest.mark.parametrize("variant", ["32bit", "8bit", "paged_8bit"])
def test_resuming_after_the_memory_order_changed_gives_the_same_bits(
    variant: str, way: str, tmp_path: Path
) -> None:
    """In each direction, at once and again."""
    params = parameters(((64, 32, 3, 3), (70, 70), (5, 4, 2, 2)))
    optimizer = AdamW(params, variant=variant)
    train(optimizer, 1)
    for step, memory_format in ((2, torch.channels_last), (3, torch.contiguous_format)):
        for param in params:
            param.grad = None
            if param.ndim == 4:
                param.data = param.data.clone(memory_format=memory_format)
            else:
                param.data = param.data.T.contiguous().T if step == 2 else param.data.contiguous()
        train(optimizer, 1, first=step)
        twin = AdamW(copies(params), variant=variant)
        if way == "state_dict":
            twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        elif way == "file":
            twin.load_state_dict(saved(optimizer))
        elif way == "into a used one":
            train(twin, 2)
            for param, other in zip(params, twin.param_groups[0]["params"], strict=True):
                other.data.copy_(param.data)
            twin.load_state_dict(saved(optimizer))
        elif way == "safetensors":
            files.save(optimizer.state_dict(), tmp_path / "a.safetensors")
            twin.load_state_dict(files.load(tmp_path / "a.safetensors"))
        elif way == "pickle":
            torch.save(optimizer, tmp_path / "a.pt")
            twin = torch.load(tmp_path / "a.pt", weights_only=False)
        else:
            twin = copy.deepcopy(optimizer)
        going_on = copy.deepcopy(optimizer)
        assert bits(train(twin, 2, first=step + 1)) == bits(train(going_on, 2, first=step + 1))
        assert state_bits(twin) == state_bits(going_on)
