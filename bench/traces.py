"""Gradient traces: sequences of gradients that every state format is fed alike.

``MAIN`` is recorded while a small byte transformer trains, the ``ADVERSARIAL`` ones are drawn so as
to hurt block-wise formats. A trace is a pure function of a seed and a number of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

RUN = 1024
"""Consecutive elements that the subsample keeps together: whole blocks of every format (32 to 256)."""
MIN_QUANTIZED = 4096
"""Tensors with fewer elements keep 32-bit state in most formats (adamw_triton, bitsandbytes, torchao)."""
ROWS, COLUMNS = 64, 1024
"""Shape of an adversarial trace's one tensor."""
LARGE_EVERY = 128
"""Distance of the large elements of ``zero denominator``: at least one in each block of 128 or 256."""

Gradients = Iterator[list[Tensor]]


def twice(reference_largest: float) -> float:
    """The usual limit: twice the largest update of exact AdamW."""
    return 2.0 * reference_largest


@dataclass(frozen=True)
class Trace:
    """Gradients of some tensors, step by step, and the largest update that a sound format makes of them."""

    name: str
    about: str
    gradients: Callable[[int, int], Gradients]
    """(seed, steps) -> each step's gradients, fp32 and 1-D, the same sizes at every step."""
    limit: Callable[[float], float] = twice
    """Largest |update| of exact AdamW -> largest allowed |update|, both in learning rates."""
    watched: Tensor | None = None
    """Where the largest update is looked for (a mask over all elements); None: everywhere."""


# --- Main: a byte transformer that trains on real text -----------------------------------------------


def subsample(gradient: Tensor) -> Tensor:
    """Up to every 8th run of 1,024 consecutive elements, but at least 4,096 elements; small ones whole."""
    flat = gradient.detach().reshape(-1)
    if flat.numel() < MIN_QUANTIZED:
        return flat.clone()
    runs = flat[: flat.numel() // RUN * RUN].view(-1, RUN)
    stride = min(8, flat.numel() // MIN_QUANTIZED)
    return runs[::stride].reshape(-1)


def byte_transformer(seed: int, steps: int) -> Gradients:
    """The demo's model trained by torch's fp32 AdamW on batches of 8 x 128 bytes; every tensor subsampled.

    lr 1e-3, betas (0.9, 0.999), eps 1e-8, no weight decay: the run that every format follows.
    """
    from adamw_triton.demo.corpus import Batches, load_corpus
    from adamw_triton.demo.model import ByteTransformer

    torch.manual_seed(seed)
    model = ByteTransformer()
    batches = Batches(load_corpus(), batch=8, context=128, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(steps):
        inputs, targets = next(batches)
        loss = nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        yield [subsample(parameter.grad) for parameter in model.parameters()]
        optimizer.step()


MAIN = Trace("byte transformer", "real gradients of a small language model", byte_transformer)


# --- Adversarial: noise times an amplitude, both drawn from the seed ---------------------------------

Random = np.random.Generator
Noise = Callable[[Random], np.ndarray]
Amplitude = Callable[[Random, int], Callable[[int], np.ndarray]]
"""(random numbers, steps) -> (step, from 0 -> factor of every element)."""


def _normal(random: Random) -> np.ndarray:
    return random.standard_normal((ROWS, COLUMNS))


def _heavy(random: Random) -> np.ndarray:
    return random.standard_t(1.5, (ROWS, COLUMNS))  # no variance exists below 2 degrees of freedom


def _ones(random: Random) -> np.ndarray:
    return np.ones((ROWS, COLUMNS))


def _spread(random: Random, scale: float = 1e-3) -> np.ndarray:
    """Elements of one block differ in scale in any real model: here by a factor of 2 (log-normal)."""
    return scale * 2.0 ** random.standard_normal((ROWS, COLUMNS))


def _steady(scale: float) -> Amplitude:
    def amplitude(random: Random, steps: int) -> Callable[[int], np.ndarray]:
        size = _spread(random, scale)
        return lambda step: size

    return amplitude


def _sparse(share: float, shape: tuple[int, int]) -> Amplitude:
    """Only a share of the cells of ``shape`` (rows, or single elements) has a gradient at a step."""

    def amplitude(random: Random, steps: int) -> Callable[[int], np.ndarray]:
        size = _spread(random)
        return lambda step: size * (random.random(shape) < share)

    return amplitude


def _drop(random: Random, steps: int) -> Callable[[int], np.ndarray]:
    size = _spread(random)
    return lambda step: size if step < steps // 2 else size / 100


def _dead_half(random: Random, steps: int) -> Callable[[int], np.ndarray]:
    size = _spread(random)
    alive = size * (random.random(size.shape) < 0.5)
    return lambda step: size if step < steps // 2 else alive


def _mixed(random: Random, steps: int) -> Callable[[int], np.ndarray]:
    size = 10.0 ** random.uniform(-8, 0, (ROWS, COLUMNS))
    return lambda step: size


def _large_elements() -> np.ndarray:
    return np.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS) % LARGE_EVERY == 0


def _zero_denominator(random: Random, steps: int) -> Callable[[int], np.ndarray]:
    """One element a block keeps its gradient of 1; the others have 3e-4 on the first step only.

    Their v is 9e-8 of the block's largest, their m 3e-4 of it: a code that rounds such a v to zero and
    keeps such an m divides by eps on the second step.
    """
    large = _large_elements()
    return lambda step: np.where(large, 1.0, 3e-4 if step == 0 else 0.0)


def _drawn(noise: Noise, amplitude: Amplitude) -> Callable[[int, int], Gradients]:
    def gradients(seed: int, steps: int) -> Gradients:
        random = np.random.default_rng(seed)
        factor = amplitude(random, steps)
        for step in range(steps):
            values = noise(random) * factor(step)
            yield [torch.from_numpy(values.astype(np.float32)).flatten()]

    return gradients


ADVERSARIAL = (
    Trace("normal", "independent normal gradients", _drawn(_normal, _steady(1e-3))),
    Trace("sparse rows", "96% of the rows have none at a step", _drawn(_normal, _sparse(0.04, (ROWS, 1)))),
    Trace("sparse 1%", "1% of the elements have one", _drawn(_normal, _sparse(0.01, (ROWS, COLUMNS)))),
    Trace("heavy tails", "Student's t, 1.5 degrees of freedom", _drawn(_heavy, _steady(1e-3))),
    Trace("100x drop", "all gradients fall to 1% at mid-run", _drawn(_normal, _drop)),
    Trace("dead half", "half of the elements stop at mid-run", _drawn(_normal, _dead_half)),
    Trace("tiny 1e-12", "gradients near 1e-12", _drawn(_normal, _steady(1e-12))),
    Trace("small 1e-7", "gradients near 1e-7", _drawn(_normal, _steady(1e-7))),
    Trace("large 1e5", "gradients near 1e5", _drawn(_normal, _steady(1e5))),
    Trace(
        "mixed scales",
        "scales from 1e-8 to 1 within a block",
        _drawn(_normal, _mixed),
        # 8 bits a value cannot span 16 decades of v: coarse codes there, yet no runaway updates.
        limit=lambda reference_largest: 7.0 * reference_largest,
    ),
    Trace(
        "zero denominator",
        "v too small beside its block's largest, on all but the largest elements",
        _drawn(_ones, _zero_denominator),
        limit=lambda reference_largest: 1.0,
        watched=torch.from_numpy(~_large_elements()).flatten(),
    ),
)
