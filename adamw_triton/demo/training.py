"""Train the demo's model with one optimizer, and measure what that took."""

import math
import statistics
import time
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

import adamw_triton
from adamw_triton.choices import VariantName
from adamw_triton.demo.corpus import Batches

BATCH = 16
CONTEXT = 64
VALIDATION_BATCHES = 64
LEARNING_RATE = 3e-3
SMOOTHING = 20


def make_optimizer(name: str, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that `name`, one of OPTIMIZERS, stands for."""
    if name == "torch":
        return torch.optim.AdamW(parameters, lr=LEARNING_RATE)
    return adamw_triton.AdamW(parameters, lr=LEARNING_RATE, variant=cast(VariantName, name))


@dataclass(frozen=True)
class Task:
    """What every optimizer is given alike; `train` and `validation` are uint8 text."""

    model: nn.Module
    train: Tensor
    validation: Tensor
    steps: int
    seed: int
    device: torch.device

    def batches(self, text: Tensor) -> Batches:
        """Batches of `text`, the same ones at every call."""
        return Batches(text, BATCH, CONTEXT, self.seed, self.device)


@dataclass(frozen=True)
class Result:
    """One optimizer's run. Losses are in nats per byte: ln 256 = 5.5 is guessing."""

    name: str
    losses: list[float]
    validation_loss: float
    state_bytes_per_parameter: float
    seconds_per_step: float

    @property
    def train_loss(self) -> float:
        """Where the curve of `running_mean` ends."""
        return running_mean(self.losses)[-1]


def running_mean(losses: list[float]) -> list[float]:
    """Every step's mean over the last SMOOTHING losses, or over as many as there are yet."""
    return [statistics.fmean(losses[max(0, end - SMOOTHING) : end]) for end in range(1, len(losses) + 1)]


def train(task: Task, name: str, on_step: Callable[[float], None]) -> Result:
    """Train a copy of the task's model with the optimizer `name`; `on_step` hears every loss."""
    model = deepcopy(task.model).to(task.device)
    optimizer = make_optimizer(name, model.parameters())
    scheduler = warmup_then_cosine(optimizer, task.steps)
    losses, seconds = [], []
    for inputs, targets in islice(task.batches(task.train), task.steps):
        started = time.perf_counter()
        loss = next_byte_loss(model, inputs, targets)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())  # waits for the device, so the clock sees the whole step
        seconds.append(time.perf_counter() - started)
        on_step(losses[-1])
    return Result(
        name=name,
        losses=losses,
        validation_loss=validate(task, model),
        state_bytes_per_parameter=state_bytes(optimizer) / count_parameters(model),
        seconds_per_step=statistics.median(seconds),
    )


def warmup_then_cosine(optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
    """Learning rate: up over the first twentieth of `steps`, then along a cosine to zero."""
    warmup = math.ceil(steps / 20)

    def factor(step: int) -> float:
        return min((step + 1) / warmup, (1 + math.cos(math.pi * step / steps)) / 2)

    return LambdaLR(optimizer, factor)


def next_byte_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy, a scalar in nats per byte."""
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


@torch.no_grad()
def validate(task: Task, model: nn.Module) -> float:
    """Mean loss over the same batches of validation text for every model."""
    batches = islice(task.batches(task.validation), VALIDATION_BATCHES)
    return statistics.fmean(next_byte_loss(model, *batch).item() for batch in batches)


def count_parameters(model: nn.Module) -> int:
    """Elements in all parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes behind the optimizer's state tensors, step counters aside.

    Storages are what is counted, each once: several parameters' state may be views of one
    long buffer, padding included.
    """
    tensors = [
        value
        for state in optimizer.state.values()
        for key, value in state.items()
        if key != "step" and isinstance(value, Tensor)
    ]
    storages = (tensor.untyped_storage() for tensor in tensors)
    sizes = {(storage.device, storage.data_ptr()): storage.nbytes() for storage in storages}
    return sum(sizes.values())
