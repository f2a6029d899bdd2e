"""What release 0 reads of a state_dict, written down once and never changed: a later release whose files this
cannot read has broken its users' way back. It shares no code with the package.

An entry of 8-bit state holds, for elements in the memory order of ``exp_avg_codes``, blocks of 128 or 256 and
bf16 scales S and R of each:

    sqrt(v) = S * (q/255)**2    q: exp_avg_sq_codes, uint8     S: exp_avg_sq_scales
    m = R * (r/127) * sqrt(v)   r: exp_avg_codes, int8         R: exp_avg_scales
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

KEYS_8BIT = {"step", "exp_avg_codes", "exp_avg_scales", "exp_avg_sq_codes", "exp_avg_sq_scales"}
KEYS_32BIT = {"step", "exp_avg", "exp_avg_sq"}


def read(state_dict: dict[str, Any]) -> list[tuple[float, Tensor, Tensor]]:
    """Step, m and v of each parameter."""
    assert {"state", "param_groups"} <= set(state_dict)
    assert state_dict.get("adamw_triton_version", 1) == 1
    found = []
    for entry in state_dict["state"].values():
        if set(entry) == KEYS_8BIT:
            found.append((float(entry["step"]), *decode(entry)))
        else:
            assert KEYS_32BIT <= set(entry) <= KEYS_32BIT | {"max_exp_avg_sq"}, set(entry)
            assert entry["exp_avg"].dtype is entry["exp_avg_sq"].dtype is torch.float32
            found.append((float(entry["step"]), entry["exp_avg"], entry["exp_avg_sq"]))
    return found


def decode(entry: dict[str, Any]) -> tuple[Tensor, Tensor]:
    r, q = entry["exp_avg_codes"], entry["exp_avg_sq_codes"]
    assert (r.dtype, q.dtype) == (torch.int8, torch.uint8)
    assert entry["exp_avg_scales"].dtype is entry["exp_avg_sq_scales"].dtype is torch.bfloat16
    n, blocks = r.numel(), entry["exp_avg_scales"].numel()
    block = next(size for size in (128, 256) if -(-n // size) == blocks)
    flat_r, flat_q = (codes.as_strided((n,), (1,)).double() for codes in (r, q))
    scale_r, scale_q = (
        entry[key].double().repeat_interleave(block)[:n] for key in ("exp_avg_scales", "exp_avg_sq_scales")
    )
    root_v = scale_q * (flat_q / 255) ** 2
    m = scale_r * (flat_r / 127) * root_v
    return tuple(x.float().as_strided(r.shape, r.stride()) for x in (m, root_v**2))  # type: ignore[return-value]
