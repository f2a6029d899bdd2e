"""A kernel that writes one element too far: ``bench sanitize`` must notice, or it has looked at nothing."""

import torch
import triton
import triton.language as tl


@triton.jit
def _kernel(target, SIZE: tl.constexpr):
    tl.store(target + 1 + tl.arange(0, SIZE), 1.0)


if __name__ == "__main__":
    _kernel[(1,)](torch.zeros(128, device="cuda"), 128)
    torch.cuda.synchronize()
