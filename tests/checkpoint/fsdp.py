"""One of two ranks: FSDP (version 1) trains, gathers the optimizer's state, and goes on from it elsewhere."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullOptimStateDictConfig, FullStateDictConfig, StateDictType
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

import adamw_triton


def made(variant: str, use_orig_params: bool) -> tuple[Any, adamw_triton.AdamW]:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    model = FSDP(layers, use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    return model, adamw_triton.AdamW(model.parameters(), lr=1e-2, variant=variant)


def trained(model: Any, optimizer: adamw_triton.AdamW, steps: range) -> list[torch.Tensor]:
    for step in steps:
        inputs = torch.randn(8, 64, generator=torch.Generator().manual_seed(step))
        model(inputs).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [param.detach().clone() for param in model.parameters()]


def local(tensor: Any) -> torch.Tensor:
    """What of a gathered tensor this rank has."""
    shards = tensor.local_shards() if hasattr(tensor, "local_shards") else None
    if shards is None:
        return torch.as_tensor(tensor)
    return torch.cat([torch.zeros(0), *(shard.tensor.flatten() for shard in shards)])


def main(rank: int, meeting: str, variant: str, use_orig_params: bool, kind: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    model, optimizer = made(variant, use_orig_params)
    trained(model, optimizer, range(3))
    twin, other = made(variant, use_orig_params)
    trained(twin, other, range(3))  # to the same weights
    other = adamw_triton.AdamW(twin.parameters(), lr=1e-2, variant=variant)
    # With the default, torch gathers all tensors of the state into one memory where there is no GPU.
    full = FullStateDictConfig(), FullOptimStateDictConfig(offload_to_cpu=False)
    for some in (model, twin):
        FSDP.set_state_dict_type(some, StateDictType[kind], *(full if kind == "FULL_STATE_DICT" else ()))
    state_dict = FSDP.optim_state_dict(model, optimizer)
    gathered = state_dict["state"]["0.weight"]
    assert gathered["exp_avg"].shape == (256, 64)
    assert not torch.equal(local(gathered["exp_avg"]), local(gathered["exp_avg_sq"]))
    other.load_state_dict(FSDP.optim_state_dict_to_load(twin, other, state_dict))
    there = FSDP.optim_state_dict(twin, other)["state"]
    for name, entry in state_dict["state"].items():
        assert float(entry["step"]) == float(there[name]["step"]) == 3
        for key in ("exp_avg", "exp_avg_sq"):
            x, y = local(entry[key]), local(there[name][key])
            # In other blocks than those of the shards, if they are gathered: encoded once more.
            assert float((x - y).norm()) <= (0 if "32" in variant else 0.03) * float(x.norm()), (name, key)
    trained(twin, other, range(3, 5))
    own = optimizer.state_dict(state_format="native")["state"]
    assert any("exp_avg_codes" in entry for entry in own.values()) == ("8" in variant)
    dist.destroy_process_group()


if __name__ == "__main__":
    rank, meeting, variant, use_orig_params, kind = sys.argv[1:]
    main(int(rank), meeting, variant, use_orig_params == "True", kind)
    sys.stderr.flush()
    os._exit(0)  # gloo's threads abort now and then while Python tears down what is left
