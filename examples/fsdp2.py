"""FSDP2 with paged 8-bit state: train, save, and go on with another number of processes.

    torchrun --nproc_per_node 4 examples/fsdp2.py --steps 100 --save checkpoint-100
    torchrun --nproc_per_node 2 examples/fsdp2.py --steps 200 --resume checkpoint-100 --save checkpoint-200

On GPUs, or without any on the CPU. A small transformer learns Python's own standard library.
"""

import argparse
import os

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import adamw_triton
from adamw_triton.demo.corpus import Batches, load_corpus
from adamw_triton.demo.model import ByteTransformer

ROWS = 16
"""Sequences a step of all ranks together: so the loss has the same curve on any number of them."""


def checkpoint_of(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict[str, object]:
    weights, state = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": state, "step": step}


def resume(folder: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """The step that training goes on with."""
    found = checkpoint_of(model, optimizer, 0)
    dcp.load(found, checkpoint_id=folder)  # each rank reads what its shards need
    set_state_dict(model, optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"])
    return found["step"]


def main(steps: int, resume_from: str | None, save_to: str | None) -> None:
    on_gpu = torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if on_gpu else "cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group()  # NCCL for what is on GPUs, gloo for what is on the host
    rank, world = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)
    model = ByteTransformer().to(device, torch.bfloat16)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = adamw_triton.AdamW(  # after fully_shard: shards are what it steps
        model.parameters(), lr=1e-3, variant="paged_8bit", master_weights=True, max_grad_norm=1.0
    )
    corpus = load_corpus(max_bytes=1 << 20)
    for step in range(resume(resume_from, model, optimizer) if resume_from else 0, steps):
        inputs, targets = next(Batches(corpus, ROWS, context=64, seed=step, device=device))
        logits = model(inputs[rank::world])
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), targets[rank::world].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / world
        dist.all_reduce(mean)
        if rank == 0:
            print(f"step {step}: loss {mean.item():.4f}, gradients' norm {optimizer.grad_norm.item():.3f}")
    if save_to:
        dcp.save(checkpoint_of(model, optimizer, steps), checkpoint_id=save_to)
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="train a sharded transformer")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--resume", help="folder of a checkpoint to go on from")
    parser.add_argument("--save", help="folder for the checkpoint at the end")
    arguments = parser.parse_args()
    main(arguments.steps, arguments.resume, arguments.save)
