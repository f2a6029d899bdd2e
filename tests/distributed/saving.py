"""What a rank does: save, and go on from what others saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

import adamw_triton
from tests.distributed.training import WAYS, Blocks, Case, train, weights, whole

SAVED = 3
"""Steps before a save."""
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def made(case: Case, way: str) -> tuple[nn.Module, adamw_triton.AdamW]:
    model = WAYS[way](Blocks(**case.sizes or {}).to(case.dtype))
    return model, case.optimizer(model.named_parameters(), lr=1e-3, **case.arguments)


def gathered(model: nn.Module, optimizer: adamw_triton.AdamW) -> dict[str, Any]:
    """Weights, and state as ``state_dict`` gives it, in whole."""
    state = optimizer.state_dict()["state"]
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    found = {
        f"{name}.{key}": whole(value).clone() if isinstance(value, Tensor) else value
        for name, entry in zip(names, state.values(), strict=True)
        for key, value in entry.items()
    }
    return found | weights(model)


def save(cases: list[Case], way: str, folder: str, later: bool) -> list[dict[str, Any]]:
    """``later``: by ``async_save``, and in torch's flattened form."""
    found = []
    options = FLAT if later else None
    for number, case in enumerate(cases):
        model, optimizer = made(case, way)
        train(model, optimizer, range(SAVED))
        model_state, state = get_state_dict(model, optimizer, options=options)
        content = {"model": model_state, "optimizer": state}
        found.append(gathered(model, optimizer))
        if later:
            apart = dist.new_group(backend="gloo")  # or it would meet the collectives of training
            where = Path(folder, str(number))
            writing: Any = dcp.async_save(content, checkpoint_id=where, process_group=apart)
            train(model, optimizer, range(SAVED, SAVED + 1))
            writing.result()
        else:
            dcp.save(content, checkpoint_id=Path(folder, str(number)))
    return found if dist.get_rank() == 0 else []


def load(cases: list[Case], way: str, folder: str, flat: bool = False) -> list[dict[str, Any]]:
    """And take one step more."""
    options = FLAT if flat else None
    found = []
    for number, case in enumerate(cases):
        model, optimizer = made(case, way)
        with torch.no_grad():
            for param in model.parameters():
                param.zero_()
        model_state, state = get_state_dict(model, optimizer, options=options)
        content = {"model": model_state, "optimizer": state}
        dcp.load(content, checkpoint_id=Path(folder, str(number)))
        set_state_dict(
            model,
            optimizer,
            model_state_dict=content["model"],
            optim_state_dict=content["optimizer"],
            options=options,
        )
        found.append(gathered(model, optimizer))
        train(model, optimizer, range(SAVED, SAVED + 1))
        assert {float(entry["step"]) for entry in optimizer.state.values()} == {SAVED + 1}
    return found if dist.get_rank() == 0 else []


def move(pairs: list[tuple[Case, str, Case, str]], folder: str) -> list[Any]:
    """Of one optimizer to another: what was saved, and what was loaded."""
    found = []
    for number, (one, way, other, way_of_other) in enumerate(pairs):
        where = str(Path(folder, str(number)))
        found.append((save([one], way, where, False), load([other], way_of_other, where)))
    return found if dist.get_rank() == 0 else []


def gather(cases: list[Case], way: str) -> list[Any]:
    """The whole state dict, on rank 0, and what it was of."""
    found = []
    for case in cases:
        model, optimizer = made(case, way)
        train(model, optimizer, range(SAVED))
        found.append((get_optimizer_state_dict(model, optimizer, options=WHOLE), gathered(model, optimizer)))
    return found if dist.get_rank() == 0 else []


def masters(case: Case, way: str, whole_too: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Exact weights, in whole, after they have been loaded once more: as they are, or from whole ones."""
    model, optimizer = made(case, way)
    train(model, optimizer, range(SAVED))
    given = optimizer.master_state_dict(model) if whole_too is None else whole_too
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    optimizer.load_master_state_dict(model, given)
    train(model, optimizer, range(SAVED, SAVED + 1))
    found = {name: whole(value) for name, value in optimizer.master_state_dict(model).items()}
    name, one = next(model.named_parameters())
    assert torch.equal(whole(optimizer.master_weight(one)), found[name])
    return found


def scatter(cases: list[Case], way: str, states: list[Any], by_torch: bool) -> list[dict[str, Any]]:
    """The way back, by torch, or as it is: every rank takes its part."""
    found = []
    for case, state in zip(cases, states, strict=True):
        model, optimizer = made(case, way)
        if by_torch:
            set_optimizer_state_dict(model, optimizer, state, options=WHOLE)
        else:
            names = [name for name, _ in model.named_parameters()]
            numbered = {number: state["state"][name] for number, name in enumerate(names)}
            own = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": numbered, "param_groups": own})
        found.append(gathered(model, optimizer))
    return found if dist.get_rank() == 0 else []
