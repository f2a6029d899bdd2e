"""What is chosen in seventy situations. The expectations were worked out from the rules with a calculator
that knows nothing of this package, for weights that are rounded to nearest:

- for state remain the card's memory, less what other processes take, 500 MiB for the driver, weights,
  gradients, activations, and 2% of the memory
- 32-bit state takes 8 bytes a trained parameter, 8-bit state 2 + 4/128
- 8-bit state that does not fit is paged: 192 MiB of staging, what room remains is filled, the rest must fit
  the host's memory; with prefer="exact" so is 32-bit state before 8 bits are thought of
- full: all parameters are trained; loraN: N*(in + out) of each linear layer of a block, in the weights'
  dtype; qloraN: these, and the linear layers of the base take 4.5 bits a parameter
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import adamw_triton
from adamw_triton.selection.selector import PREFERENCES

GiB = 1 << 30

# What the driver says is the total, in GiB.
CARDS = {
    "T4": 14.56,
    "RTX 3060": 11.75,
    "RTX 3090": 23.69,
    "RTX 4060": 7.72,
    "RTX 4090": 23.52,
    "L4": 22.03,
    "A10G": 21.99,
    "A100 40GB": 39.5,
    "A100 80GB": 79.25,
    "L40S": 44.4,
    "H100 SXM": 79.11,
    "H200": 139.0,
    "MI300X": 191.0,
    "B200": 178.35,
    "V100 16GB": 15.75,
}

# Hidden size, layers, size of feed-forward, of keys and values, vocabulary, whether embedding is head.
MODELS = {
    "0.5B": (896, 24, 4864, 128, 151936, True),
    "1B": (2048, 16, 8192, 512, 128256, True),
    "3B": (3072, 28, 8192, 1024, 128256, True),
    "7B": (4096, 32, 11008, 4096, 32000, False),
    "8B": (4096, 32, 14336, 1024, 128256, False),
    "13B": (5120, 40, 13824, 5120, 32000, False),
    "70B": (8192, 80, 28672, 1024, 128256, False),
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

# Card, model, dtype, what is trained, GiB of host memory, of other processes, and of activations, preference;
# what is chosen, and by how many GiB 32-bit state on the GPU falls short.
SITUATIONS = [
    ("T4", "0.5B", "bf16", "full", 12, 0, 1, "speed", "32bit", None),
    ("T4", "0.5B", "fp32", "full", 12, 0, 1, "speed", "32bit", None),
    ("T4", "1B", "bf16", "full", 12, 0, 1, "speed", "8bit", 1.03),
    ("T4", "1B", "bf16", "full", 12, 0, 4, "speed", "8bit", 4.03),
    ("T4", "1B", "fp32", "full", 12, 0, 1, "speed", "8bit", 5.63),
    ("T4", "3B", "bf16", "full", 12, 0, 0.5, "speed", "8bit, partly paged", 22.62),
    ("T4", "3B", "bf16", "full", 25, 0, 1, "speed", "8bit, partly paged", 23.12),
    ("T4", "3B", "bf16", "full", 4, 0, 1, "speed", None, 23.12),
    ("T4", "3B", "bf16", "full", 25, 0, 2.5, "speed", None, 24.62),
    ("T4", "3B", "fp32", "full", 25, 0, 1, "speed", None, 35.09),
    ("T4", "3B", "bf16", "lora16", 12, 0, 2, "speed", "32bit", None),
    ("T4", "7B", "bf16", "full", 50, 0, 1, "speed", None, 62.53),
    ("T4", "7B", "bf16", "lora16", 12, 0, 1, "speed", "8bit", 0.22),
    ("T4", "7B", "bf16", "qlora16", 12, 0, 2, "speed", "32bit", None),
    ("T4", "7B", "bf16", "qlora64", 12, 0, 4, "speed", "32bit", None),
    ("T4", "7B", "bf16", "qlora256", 12, 0, 4, "speed", "8bit", 1.25),
    ("T4", "8B", "bf16", "qlora16", 12, 0, 5, "speed", "32bit", None),
    ("T4", "8B", "bf16", "qlora64", 12, 0, 6, "speed", "32bit", None),
    ("T4", "13B", "bf16", "qlora16", 12, 0, 3, "speed", "32bit", None),
    ("T4", "13B", "bf16", "qlora64", 12, 0, 4, "speed", "8bit", 0.28),
    ("RTX 4060", "0.5B", "bf16", "full", 16, 0, 1, "speed", "32bit", None),
    ("RTX 4060", "0.5B", "bf16", "full", 16, 0, 1.5, "speed", "32bit", None),
    ("RTX 4060", "1B", "bf16", "full", 16, 0, 1, "speed", "8bit, partly paged", 7.73),
    ("RTX 4060", "1B", "bf16", "full", 16, 0, 2, "speed", "8bit, partly paged", 8.73),
    ("RTX 4060", "1B", "bf16", "full", 1, 0, 1, "speed", "8bit, partly paged", 7.73),
    ("RTX 3060", "1B", "bf16", "full", 16, 0, 1, "speed", "8bit", 3.78),
    ("RTX 3060", "1B", "bf16", "full", 16, 4, 1, "speed", "8bit, partly paged", 7.7),
    ("RTX 3060", "3B", "bf16", "lora32", 16, 0, 3, "speed", "32bit", None),
    ("RTX 3060", "7B", "bf16", "qlora64", 16, 0, 3, "speed", "32bit", None),
    ("RTX 3090", "1B", "fp32", "full", 32, 0, 2, "speed", "32bit", None),
    ("RTX 3090", "3B", "bf16", "full", 32, 0, 2, "speed", "8bit", 15.18),
    ("RTX 3090", "3B", "bf16", "full", 32, 0, 4, "speed", "8bit", 17.18),
    ("RTX 3090", "3B", "bf16", "full", 32, 8, 2, "speed", "8bit, partly paged", 23.02),
    ("RTX 3090", "3B", "bf16", "full", 32, 0, 2, "exact", "32bit, partly paged", 15.18),
    ("RTX 3090", "3B", "bf16", "full", 16, 0, 2, "exact", "32bit, partly paged", 15.18),
    ("RTX 4090", "7B", "bf16", "full", 64, 0, 1, "speed", None, 53.75),
    ("RTX 4090", "7B", "bf16", "lora16", 64, 0, 4, "speed", "32bit", None),
    ("RTX 4090", "7B", "bf16", "lora256", 64, 0, 4, "speed", "8bit", 1.14),
    ("RTX 4090", "8B", "bf16", "lora64", 64, 0, 4, "speed", "32bit", None),
    ("RTX 4090", "8B", "bf16", "lora256", 64, 0, 4, "speed", "8bit, partly paged", 3.9),
    ("RTX 4090", "13B", "bf16", "qlora64", 64, 0, 6, "speed", "32bit", None),
    ("L4", "3B", "bf16", "full", 48, 0, 1, "speed", "8bit", 15.8),
    ("L4", "3B", "bf16", "full", 48, 0, 1, "exact", "32bit, partly paged", 15.8),
    ("A10G", "3B", "bf16", "full", 64, 0, 4, "speed", "8bit, partly paged", 18.84),
    ("A100 40GB", "3B", "bf16", "full", 85, 0, 4, "speed", "8bit", 1.68),
    ("A100 40GB", "3B", "bf16", "full", 85, 0, 4, "exact", "32bit, partly paged", 1.68),
    ("A100 40GB", "7B", "bf16", "full", 85, 0, 4, "speed", "8bit, partly paged", 41.09),
    ("A100 40GB", "7B", "bf16", "full", 85, 0, 4, "exact", "32bit, partly paged", 41.09),
    ("A100 40GB", "7B", "bf16", "full", 8, 0, 4, "speed", "8bit, partly paged", 41.09),
    ("A100 40GB", "7B", "bf16", "full", 85, 10, 4, "speed", None, 50.89),
    ("A100 80GB", "7B", "bf16", "full", 100, 0, 8, "speed", "8bit", 6.13),
    ("A100 80GB", "7B", "bf16", "full", 100, 0, 8, "exact", "32bit, partly paged", 6.13),
    ("A100 80GB", "7B", "fp32", "full", 100, 0, 8, "speed", "8bit", 31.23),
    ("A100 80GB", "13B", "bf16", "full", 128, 0, 8, "speed", "8bit, partly paged", 76.29),
    ("A100 80GB", "13B", "bf16", "full", 128, 0, 16, "speed", "8bit, partly paged", 84.29),
    ("A100 80GB", "13B", "bf16", "full", 10, 0, 25, "speed", None, 93.29),
    ("A100 80GB", "70B", "bf16", "lora16", 128, 0, 8, "speed", None, 64.55),
    ("A100 80GB", "70B", "bf16", "qlora64", 128, 0, 16, "speed", "32bit", None),
    ("L40S", "7B", "bf16", "full", 128, 0, 6, "speed", "8bit, partly paged", 38.28),
    ("L40S", "13B", "bf16", "lora128", 128, 0, 12, "speed", "32bit", None),
    ("H100 SXM", "8B", "bf16", "full", 256, 0, 16, "speed", "8bit", 28.71),
    ("H100 SXM", "8B", "bf16", "full", 256, 0, 16, "exact", "32bit, partly paged", 28.71),
    ("H200", "13B", "bf16", "full", 256, 0, 20, "speed", "8bit", 29.73),
    ("H200", "70B", "bf16", "lora64", 256, 0, 0, "speed", "8bit, partly paged", 4.94),
    ("MI300X", "13B", "bf16", "full", 256, 0, 20, "speed", "32bit", None),
    ("MI300X", "70B", "bf16", "lora256", 256, 0, 10, "speed", "32bit", None),
    ("B200", "13B", "fp32", "full", 256, 0, 20, "speed", "8bit", 39.66),
    ("B200", "70B", "bf16", "lora64", 256, 0, 20, "speed", "32bit", None),
    ("V100 16GB", "1B", "bf16", "full", 30, 0, 2, "speed", "8bit", 0.86),
    ("V100 16GB", "1B", "bf16", "full", 30, 6, 2, "speed", "8bit", 6.74),
]


def weight(shape: tuple[int, ...], dtype: torch.dtype, *, trained: bool) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=trained)


def tensors(model: str, dtype: torch.dtype, mode: str) -> Iterator[Tensor]:
    """The parameters, on no device."""
    hidden, layers, feed_forward, key_value, vocabulary, tied = MODELS[model]
    linear = [(hidden, hidden), (key_value, hidden), (key_value, hidden), (hidden, hidden)]
    linear += [(feed_forward, hidden), (feed_forward, hidden), (hidden, feed_forward)]
    full = mode == "full"
    rank = 0 if full else int(mode.removeprefix("q").removeprefix("lora"))
    for _ in range(1 if tied else 2):
        yield weight((vocabulary, hidden), dtype, trained=full)
    for _ in range(layers):
        for out, into in linear:
            if mode.startswith("qlora"):
                yield weight((out * into * 9 // 16,), torch.uint8, trained=False)
            else:
                yield weight((out, into), dtype, trained=full)
            if not full:
                yield weight((rank, into), dtype, trained=True)
                yield weight((out, rank), dtype, trained=True)
        yield from (weight((hidden,), dtype, trained=full) for _ in range(2))
    yield weight((hidden,), dtype, trained=full)


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda s: "-".join(map(str, s[:8])).replace(" ", "_"))
def test_what_is_chosen(
    situation: tuple[str, str, str, str, float, float, float, str, str | None, float | None],
) -> None:
    card, model, dtype, mode, host, others, activations, prefer, expected, short = situation
    plan = adamw_triton.plan(
        tensors(model, DTYPES[dtype], mode),
        gpu_memory=int((CARDS[card] - others) * GiB),
        host_memory=int(host * GiB),
        activations=int(activations * GiB),
        prefer=prefer,
        master_weights=False,
        stochastic_rounding=False,
    )
    assert (None if plan.chosen is None else plan.chosen.name) == expected
    first = plan.candidates[0]
    assert first.name == "32bit"
    if short is None:
        assert first.obstacle == ""
    else:
        figure = float(first.obstacle.split()[1])
        unit = {"MiB": 1 / 1024, "GiB": 1}[first.obstacle.split()[2]]
        assert figure * unit == pytest.approx(short, abs=0.1)
        assert first.obstacle.startswith("needs ")
        assert "more GPU memory" in first.obstacle
    assert [c.name for c in plan.candidates] == [way.name for way in PREFERENCES[prefer]]


def test_there_are_enough_situations_and_every_outcome_is_among_them() -> None:
    assert len(set(SITUATIONS)) == len(SITUATIONS) >= 60
    outcomes = {situation[8] for situation in SITUATIONS}
    assert outcomes == {"32bit", "8bit", "8bit, partly paged", "32bit, partly paged", None}
    assert {situation[0] for situation in SITUATIONS} == set(CARDS)
    assert {situation[1] for situation in SITUATIONS} == set(MODELS)
