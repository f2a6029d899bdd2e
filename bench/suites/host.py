"""``python -m bench host``: what a step costs on the host.

On a GPU: seconds until ``step()`` returns, of LoRA adapters, with the GPU idle before; the kernels may still
run. On a CPU every optimizer steps on tensors of one element, so that what is timed is Python, dispatch and
bookkeeping. Ours takes its Triton path there up to the launch itself, which is left out: there is nothing to
launch on. torch's run whole, where a foreach operation over such tensors is a loop in C++.

The same of parameters as FSDP2 has them, DTensors, in a process group of one: no step of theirs communicates.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

import adamw_triton
from bench import suite, workloads
from bench.report import Cell, Table, number

COUNTS = (30, 100, 300, 1000)
SHARDS = 512
"""About the parameters of an 8B model, and its biases."""
OURS = {"cpu": "adamw_triton, without its launch", "cuda": "adamw_triton"}
FOREACH, FUSED, LOOP = "torch foreach", "torch fused", "torch, a loop over tensors"
Build = Callable[[list[torch.Tensor]], torch.optim.Optimizer]


def builders(device: str) -> dict[str, Build]:
    """Rows, ours first, as it is by default: ``variant="auto"`` looks at a GPU's memory in every step."""
    found: dict[str, Build] = {
        OURS[device]: lambda params: adamw_triton.AdamW(params),
        FOREACH: lambda params: torch.optim.AdamW(params, foreach=True),
        FUSED: lambda params: torch.optim.AdamW(params, fused=True),
    }
    if device == "cpu":  # on a GPU, a tenth of a second for a thousand tensors
        found[LOOP] = lambda params: torch.optim.AdamW(params, foreach=False)
    else:
        found |= {f"{OURS[device]} {variant}": ours(variant) for variant in ("32bit", "8bit")}
    return found


def ours(variant: str) -> Build:
    return lambda params: adamw_triton.AdamW(params, variant=variant)


def tensors(count: int, device: str) -> list[torch.Tensor]:
    """Parameters with gradients: adapters in bf16 on a GPU, single elements on a CPU."""
    if device == "cuda":
        return workloads.tensors(workloads.lora(count), torch.bfloat16, device, 0)
    return workloads.tensors([(1,)] * count, torch.float32, device, 0)


def as_shards(params: Sequence[torch.Tensor], device: str) -> list[torch.Tensor]:
    """The same parameters and gradients as DTensors."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh(device, (1,))
    found = []
    for param in params:
        shard = torch.nn.Parameter(distribute_tensor(param.detach(), mesh, [Shard(0)]))
        assert param.grad is not None
        shard.grad = distribute_tensor(param.grad, mesh, [Shard(0)])
        found.append(shard)
    return found


@contextlib.contextmanager
def alone(device: str) -> Iterator[None]:
    """In a process group of one."""
    from torch import distributed

    backend = {"cpu": "gloo", "cuda": "nccl"}[device]
    with tempfile.TemporaryDirectory() as folder:
        distributed.init_process_group(backend, init_method=f"file://{folder}/one", rank=0, world_size=1)
        try:
            yield
        finally:
            distributed.destroy_process_group()


def leave_out_the_launch() -> None:
    """CPU tensors take the Triton path, which ends where the kernel would be called."""
    os.environ["TRITON_INTERPRET"] = "1"
    from adamw_triton_kernels import launch

    launch.call = lambda *arguments: None


def seconds(
    optimizers: dict[str, torch.optim.Optimizer], rounds: int, wait: Callable[[], None]
) -> dict[str, list[float]]:
    """Each round's time of one step, the optimizers taking turns; ``wait`` is for an idle GPU."""
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for round_ in range(-3, rounds):  # the first allocate and compile
        for name, optimizer in optimizers.items():
            wait()
            start = time.perf_counter()
            optimizer.step()
            taken = time.perf_counter() - start
            if round_ >= 0:
                times[name].append(taken)
    wait()
    return times


def record(found: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """For the JSON."""
    return {
        name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
        for name, values in found.items()
    }


def tables(medians: dict[str, dict[str, float]], device: str) -> list[Table]:
    """Microseconds, and ratios to ours."""
    columns = ["optimizer", *medians]
    micro: list[list[Cell | str]] = []
    ratio: list[list[Cell | str]] = []
    for name in builders(device):
        style = "bold" if name.startswith("adamw_triton") else ""
        row = [at[name] for at in medians.values()]
        ours = [at[OURS[device]] for at in medians.values()]
        micro.append([Cell(name, style), *(Cell(number(1e6 * value), style) for value in row)])
        ratio.append([name, *(number(a / b) for a, b in zip(row, ours, strict=True))])
    about = {
        "cuda": "medians until step() returns; bf16 adapters on the GPU, which was idle",
        "cpu": "medians; one-element fp32 parameters on the CPU; torch's rows include the arithmetic on them",
    }
    return [
        Table("Host time of a step, in microseconds", columns, micro, [about[device]]),
        Table("As multiples of ours", columns, ratio),
    ]


def main(argv: Sequence[str]) -> int:
    """Measure, show and save."""
    parser = suite.parser("host", __doc__)
    parser.add_argument("--rounds", type=int, help="timed steps (default 100, quick 30)")
    options = parser.parse_args(argv)
    device = options.device
    rounds = options.rounds or (30 if options.quick else 100)
    if device == "cpu":
        leave_out_the_launch()
        torch.set_num_threads(1)  # one-element tensors: more would only wait for each other
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    medians: dict[str, dict[str, float]] = {}
    data: dict[str, Any] = {"rounds": rounds, "seconds": {}}

    def measure(what: str, key: str, make: Callable[[], list[torch.Tensor]]) -> None:
        made = {name: build(make()) for name, build in builders(device).items()}
        found = seconds(made, rounds, wait)
        medians[what] = {name: statistics.median(values) for name, values in found.items()}
        data["seconds"][key] = record(found)

    for count in COUNTS[:2] if options.quick else COUNTS:
        measure(f"{count} tensors", str(count), partial(tensors, count, device))
    with alone(device):
        params = tensors(SHARDS, device)
        measure(f"{SHARDS} DTensors", f"{SHARDS} DTensors", partial(as_shards, params, device))
    suite.finish("host", argv, options, tables(medians, device), data)
    return 0
