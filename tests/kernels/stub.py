"""Kernels launched on a GPU that is not here: Triton compiles for it, and a stub stands for its driver.

In a process of its own, without the interpreter: ``python tests/kernels/stub.py CHECK TARGET ...``, where a
check is a function of this file; it prints JSON. ``report`` does that for a test.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

ROOT = Path(__file__).parents[2]


class OutOfLuckError(Exception):
    """What fails on purpose."""


class StubDriver:
    """A driver of one device that notes what kernels are launched with.

    ``failing``: the number of the call that fails, of those that compile, make a launcher or load.
    """

    def __init__(self, target: Any, failing: int = 0) -> None:
        from triton.compiler import CompiledKernel

        self.target = target
        self.failing = failing
        self.calls = 0
        self.launches: list[tuple[Any, tuple[int, ...], tuple[Any, ...]]] = []
        tells_threads = "n_max_threads" in CompiledKernel._init_handles.__code__.co_names
        loaded = (1, 2, 32, 0, 1024)[: 5 if tells_threads else 4]
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 1 << 16},
            load_binary=self.fallible(lambda *arguments: loaded),
            unload_module=lambda module: None,
        )
        self.launcher_cls = self.fallible(self._launcher)

    def fallible(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            self.calls += 1
            if self.calls == self.failing:
                raise OutOfLuckError
            return function(*arguments, **keywords)

        return call

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def _launcher(self, source: Any, metadata: Any) -> Any:
        def launch(x: int, y: int, z: int, *rest: Any) -> None:
            # Before a kernel's arguments: stream, function, metadata of two kinds, two hooks.
            self.launches.append((source, (x, y, z), rest[6:]))

        return launch


def install(target: str, failing: int = 0) -> StubDriver:
    """Have the launcher believe in a device: "sm_90", "gfx942"."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    nvidia = target.startswith("sm_")
    gpu = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)
    stub = StubDriver(gpu, failing)
    driver.set_active(stub)
    torch.cuda.device = lambda device: contextlib.nullcontext()  # type: ignore[assignment,misc]
    triton.compile = stub.fallible(triton.compile)
    return stub


def launched(target: str, name: str) -> dict[str, Any]:
    """Two steps of one tensor, the second with state of more than 2 GiB: what of them reached the driver."""
    from adamw_triton.state.formats import Blockwise8, Float32
    from adamw_triton_kernels import Hyper, Layout, hyper_table, launch, update_for

    stub = install(target)
    calls, call = [], launch.call
    launch.call = lambda *arguments: calls.append(arguments) or call(*arguments)
    param, grad = torch.ones(5000).bfloat16(), torch.ones(5000)
    state_format = {"adamw_32bit": Float32(), "adamw_8bit": Blockwise8()}[name]
    update = update_for(name, torch.device("cuda"))
    for step, numel in ((1, 5120), (2, (1 << 31) + 4096)):
        arrays = {  # memory that is never touched
            array.name: torch.empty(numel // array.per, dtype=array.dtype) for array in state_format.arrays
        }
        layout = Layout((5000,), (numel - 5120,), (0,), (0,))
        hyper = Hyper.at(step, lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
        update([param], [grad], arrays, layout, hyper_table([hyper]))
    spec, _key, _device, programs, arguments = calls[-1]
    source, grid, passed = stub.launches[-1]
    given = (*arguments, *spec.constexprs.values())
    return {
        "launches": len(stub.launches),
        "compiled, loaded": stub.calls,
        "programs": programs,
        "grid": grid == (programs, 1, 1),
        "the kernel's order": [*spec.signature] == spec.fn.arg_names,
        "all are given, in order": len(passed) == len(spec.signature)
        and all(a is b for a, b in zip(passed, given, strict=True)),
        "types as built": dict(source.signature) == spec.signature,
        "promises as built": source.attrs == spec.attrs,
        "constants as built": {at[0]: value for at, value in source.constants.items()}
        == {spec.fn.arg_names.index(key): value for key, value in spec.constexprs.items()},
        "nothing is allocated at a launch": not getattr(
            launch._compiled[_key, _device].metadata, "global_scratch_size", 0
        ),
    }


def failing(target: str) -> dict[str, Any]:
    """First steps of an optimizer whose two kernels fail to compile or to load, each call in its turn:
    launches of the failed step, and of the next."""
    from adamw_triton import AdamW
    from adamw_triton.step import batch
    from adamw_triton_kernels import launch, update_for

    batch.update_for = lambda name, device: update_for(name, torch.device("cuda"))
    found = []
    while True:
        stub = install(target, failing=len(found) + 1)
        launch._compiled.clear()
        params = [torch.nn.Parameter(torch.ones(n)) for n in (5000, 10)]
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer = AdamW(params, variant="8bit")
        try:
            optimizer.step()
        except OutOfLuckError:
            before = len(stub.launches)
            optimizer.step()
            found.append((before, len(stub.launches) - before))
        else:
            return {"found": found}


def compiled(target: str, *names: str) -> dict[str, Any]:
    """Every dtype of parameters through the launcher; which of them reached the driver."""
    from adamw_triton.state.formats import Blockwise8, Float32
    from adamw_triton_kernels import Hyper, Layout, hyper_table, update_for

    stub = install(target)
    hyper = hyper_table([Hyper.at(1, lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)])
    for state_format in (Float32(), Blockwise8()):
        update = update_for(state_format.update, torch.device("cuda"))
        for name in names:
            param = torch.ones(5000, dtype=getattr(torch, name))
            arrays = {
                array.name: torch.empty(5120 // array.per, dtype=array.dtype) for array in state_format.arrays
            }
            update([param], [param.clone()], arrays, Layout((5000,), (0,), (0,), (0,)), hyper)
    import triton

    return {"triton": triton.__version__, "launches": len(stub.launches)}


def can_link(target: str) -> dict[str, Any]:
    """Whether this Triton has all that it takes for a target: before 3.4, AMD's linker is ROCm's."""
    from triton.backends.amd.compiler import HIPBackend

    try:
        if not target.startswith("sm_") and hasattr(HIPBackend, "path_to_rocm_lld"):
            HIPBackend.path_to_rocm_lld()
    except Exception:
        return {"found": False}
    return {"found": True}


def report(check: Callable[..., dict[str, Any]], *arguments: str, before: str = "") -> dict[str, Any]:
    """What a check of this file finds in a process of its own; ``before``: a folder whose packages go before
    those that are installed."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    path = [before, str(ROOT), str(ROOT / "kernels"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    command = [sys.executable, __file__, check.__name__, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
