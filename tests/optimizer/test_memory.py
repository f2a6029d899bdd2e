"""A step on the CPU needs little memory beyond parameters, gradients and state."""

from __future__ import annotations

import json

import pytest

from tests.measuring import printed

MEASURE = """
import json, resource, sys, torch
from adamw_triton import AdamW

variant, numel = sys.argv[1], int(sys.argv[2])
p = torch.nn.Parameter(torch.zeros(numel))
p.grad = torch.ones(numel)
small = torch.nn.Parameter(torch.zeros(300_000))
small.grad = torch.ones(300_000)
AdamW([small], variant=variant).step()  # what torch itself loads at a first step
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
optimizer = AdamW([p], variant=variant)
optimizer.step()
state = sum(t.numel() * t.itemsize for t in optimizer.state[p].values())
print(json.dumps({"extra": peak() - before, "state": state}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["32bit", "8bit"])
def test_temporaries_are_bounded_whatever_the_size(variant: str, backend: str) -> None:
    if backend != "torch":
        pytest.skip("the interpreter is not the CPU path")
    numel = 30_000_000
    measured = json.loads(printed(MEASURE, variant, numel))
    # One fp32 temporary of the tensor's size would be 120 MB.
    assert measured["extra"] - measured["state"] < 40e6
