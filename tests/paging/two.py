"""A process that trains with paged state beside another one; see test_two_processes."""

from __future__ import annotations

import hashlib
import sys

import torch
from torch.nn import Parameter

from adamw_triton import AdamW
from adamw_triton.state import placement

PAGE_BYTES = {"cpu": 20_000, "cuda": 4 << 20}
NUMEL = {"cpu": 50_000, "cuda": 20_000_001}
STEPS = {"cpu": 5, "cuda": 30}


def trained(device: str, variant: str, seed: int) -> str:
    """A digest of weights and state. After the first step it says so and waits for a line."""
    placement.PAGE_BYTES = PAGE_BYTES[device]
    generator = torch.Generator(device).manual_seed(seed)
    param = Parameter(torch.randn(NUMEL[device], generator=generator, device=device).bfloat16())
    optimizer = AdamW([param], lr=1e-2, variant=variant)
    for step in range(STEPS[device]):
        param.grad = torch.randn(param.shape, generator=generator, device=device).bfloat16()
        optimizer.step()
        if step == 0 and __name__ == "__main__":
            print("ready", flush=True)
            sys.stdin.readline()
    optimizer.state_dict()  # waits for the last pages
    digest = hashlib.sha256()
    for tensor in (param.detach(), *optimizer.state[param].values()):
        digest.update(tensor.cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


if __name__ == "__main__":
    print(trained(sys.argv[1], sys.argv[2], int(sys.argv[3])), flush=True)
