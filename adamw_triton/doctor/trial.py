"""`python -m adamw_triton.doctor.trial VARIANT...`: do these variants really work here?

On a GPU each takes steps there, which compiles its kernels, runs them, and for the paged ones pins and
copies memory; the results must be those of plain torch on the CPU. Without a GPU the kernels are
compiled for one that is not here. Whatever is wrong ends the process with an exception; its last line is
what `doctor` shows.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import cast

import torch

from adamw_triton.arguments import VARIANTS
from adamw_triton.choices import VariantName
from adamw_triton.optimizer import AdamW
from adamw_triton_kernels.ahead import compile_ahead

STEPS = 2
ELEMENTS = 10_000
TOLERANCE = 1e-5
"""Of weights near 1 after steps of 0.01: the two only round differently."""
RARE = 1e-3
"""Share of weights whose 8-bit code may have been rounded the other way, and the second step with it."""


def main(variants: Sequence[VariantName]) -> None:
    for variant in variants:
        if torch.cuda.is_available():
            compare(variant)
        else:
            compile_ahead(f"adamw_{VARIANTS[variant].bits}bit")


def compare(variant: VariantName) -> None:
    """Raise ArithmeticError unless GPU and CPU take the same steps."""
    on_gpu, on_cpu = (trained(variant, device) for device in ("cuda", "cpu"))
    wrong = ~((on_gpu - on_cpu).abs() < TOLERANCE)  # NaN is wrong too
    if wrong.float().mean() > RARE:
        raise ArithmeticError(f"{variant}: {int(wrong.sum())} of {ELEMENTS} weights differ from the CPU's")


def trained(variant: VariantName, device: str) -> torch.Tensor:
    values = torch.linspace(-1, 1, ELEMENTS)
    weight = torch.nn.Parameter(values.to(device, copy=True))  # else on the CPU it is `values` itself
    optimizer = AdamW([weight], lr=0.01, variant=variant)
    for step in range(1, STEPS + 1):
        weight.grad = (values * step + 0.1).to(device)
        optimizer.step()
    return weight.detach().cpu()


if __name__ == "__main__":
    main(cast(Sequence[VariantName], sys.argv[1:]))
