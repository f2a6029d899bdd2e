"""``FullyShardedDataParallel`` with ``use_orig_params=True``: parameters are vectors, any part of the whole
or none of it. How large the whole is cannot be seen from them: formats go by what is here."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adamw_triton import AdamW
from tests.distributed.ranks import together
from tests.optimizer.problems import bits

CASES: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "32bit": ({"variant": "32bit"}, torch.float32),
    "paged 32bit": ({"variant": "paged_32bit"}, torch.float32),
    "auto": ({}, torch.bfloat16),
    "exact fp16": ({"variant": "32bit", "master_weights": True}, torch.float16),
    "8bit": ({"variant": "8bit"}, torch.float32),
    "paged 8bit": ({"variant": "paged_8bit", "block_size": 256}, torch.float32),
    "8bit exact": ({"variant": "paged_8bit", "master_weights": True}, torch.bfloat16),
}
LR = 1e-3


def model(dtype: torch.dtype) -> nn.Sequential:
    """On two ranks the second weight is cut after 144 elements, within a block and below the 4,096 of 8-bit
    state, and neither rank has anything of every parameter."""
    torch.manual_seed(0)
    layers = (nn.Linear(70, 90, bias=False), nn.Tanh(), nn.Linear(90, 70), nn.Tanh(), nn.Linear(70, 3))
    return nn.Sequential(*layers).to(dtype)


def sharded(of: nn.Module) -> Any:
    from torch.distributed.fsdp import (
        FullOptimStateDictConfig,
        FullStateDictConfig,
        FullyShardedDataParallel,
        StateDictType,
    )

    found = FullyShardedDataParallel(of, use_orig_params=True, device_id=torch.device("cpu"))
    # With the default, torch gathers all tensors of the state into one memory where there is no GPU.
    configs = FullStateDictConfig(), FullOptimStateDictConfig(offload_to_cpu=False)
    FullyShardedDataParallel.set_state_dict_type(found, StateDictType.FULL_STATE_DICT, *configs)
    return found


def train(trained: nn.Module, optimizer: AdamW, steps: range) -> None:
    """On the same batch on all ranks; one process averages two gradients as they do, which rounds in fp16."""
    dtype = next(trained.parameters()).dtype
    for step in steps:
        inputs = torch.randn(8, 70, generator=torch.Generator().manual_seed(step)).to(dtype)
        trained(inputs).float().square().mean().backward()
        if isinstance(trained, nn.Sequential):
            for param in trained.parameters():
                assert param.grad is not None
                param.grad = param.grad / 2 + param.grad / 2
        optimizer.step()
        optimizer.zero_grad()


def weights(trained: Any) -> list[Tensor]:
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    if not isinstance(trained, FSDP):
        return [param.detach().clone() for param in trained.parameters()]
    with FSDP.summon_full_params(trained):
        return [param.detach().clone() for param in trained.parameters()]


def distance(some: list[Tensor], others: list[Tensor]) -> float:
    pairs = zip(some, others, strict=True)
    return float(sum((a.double() - b.double()).square().sum() for a, b in pairs)) ** 0.5


def case(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, float]:
    """How far weights are from those of one process: after training, after resuming with other processes, and
    in one process that resumes alone. "format": how far 8 bits alone take these from 32."""
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    whole, exact = model(dtype), model(dtype)
    alone = AdamW(whole.parameters(), lr=LR, **arguments)
    train(whole, alone, range(5))
    ours = sharded(model(dtype))
    optimizer = AdamW(ours.parameters(), lr=LR, **arguments)
    train(ours, optimizer, range(5))
    found = {"trained": distance(weights(ours), weights(whole))}

    state_dict = copy.deepcopy(FSDP.optim_state_dict(ours, optimizer))
    twin = sharded(model(dtype))
    twin.load_state_dict(copy.deepcopy(ours.state_dict()))
    other = AdamW(twin.parameters(), lr=LR, **arguments)
    other.load_state_dict(FSDP.optim_state_dict_to_load(twin, other, state_dict))
    single = model(dtype)
    single.load_state_dict(copy.deepcopy(ours.state_dict()))
    plain = AdamW(single.parameters(), lr=LR, **arguments)
    numbers = {name: number for number, (name, _) in enumerate(single.named_parameters())}
    state = {numbers[name]: entry for name, entry in copy.deepcopy(state_dict["state"]).items()}
    plain.load_state_dict({**plain.state_dict(), "state": state})
    train(whole, alone, range(5, 8))
    for name, (of, by) in {"resumed": (twin, other), "in one process": (single, plain)}.items():
        train(of, by, range(5, 8))
        found[name] = distance(weights(of), weights(whole))
    reference = AdamW(exact.parameters(), lr=LR, **arguments | {"variant": "32bit", "block_size": 128})
    train(exact, reference, range(8))
    return {**found, "format": distance(weights(exact), weights(whole))}


def nothing_here() -> int:
    """A parameter of one element; how many are here."""
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    torch.manual_seed(0)
    tiny = sharded(nn.Linear(1, 1, bias=False))
    optimizer = AdamW(tiny.parameters(), lr=LR, variant="8bit")
    for _ in range(2):
        tiny(torch.ones(1, 1)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    (entry,) = FSDP.optim_state_dict(tiny, optimizer)["state"].values()
    assert float(entry["step"]) == 2
    (param,) = tiny.parameters()
    return int(param.numel())


def rank() -> Any:
    for refused in ({"max_grad_norm": 1.0}, {"adaptive_clip": 1.05}, {"nonfinite": "skip"}):
        ours = sharded(model(torch.float32))
        with pytest.raises(ValueError, match=r"what FSDP \(version 1\) has flattened"):
            train(ours, AdamW(ours.parameters(), lr=LR, **refused), range(1))  # type: ignore[arg-type]
        assert bits(weights(ours)) == bits(weights(model(torch.float32)))
    return {name: case(*given) for name, given in CASES.items()}, nothing_here()


@pytest.mark.slow
def test_parts_of_any_length_are_right_and_resumed() -> None:
    found = together(2, rank)
    assert sorted(here for _, here in found) == [0, 1]
    for cases, _ in found:
        for name, far in cases.items():
            error = far.pop("format")
            # 8 bits are in other blocks than those of the whole.
            assert max(far.values()) <= (1.5 * error if "8bit" in name else 0.0), (name, error, far)


def test_a_gathered_remainder_has_whole_numbers() -> None:
    optimizer = AdamW(
        [nn.Parameter(torch.ones(3, dtype=torch.bfloat16))], master_weights=True, variant="32bit"
    )
    moments = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}
    entry = {**moments, "remainder_fp32": torch.tensor([-32768.0, 0.5, 3.0])}
    with pytest.raises(ValueError, match="remainder_fp32 has values that are no 16-bit integers"):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: entry}})
    entry["remainder_fp32"][1] = 7
    optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: entry}})
    (kept,) = (each["remainder"] for each in optimizer.state_dict()["state"].values())
    assert kept.view(torch.int16).flatten().tolist() == [-32768, 7, 3]
