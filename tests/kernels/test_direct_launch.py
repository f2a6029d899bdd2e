"""The compiled kernel, called directly: what Triton's launcher is given, on a device that is not there.

A subprocess without the interpreter compiles for sm_90; a stub stands for the CUDA driver.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]


class StubDriver:
    """A driver of one sm_90 device that notes what kernels are launched with."""

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", 90, 32)
        self.launches: list[tuple[Any, tuple[int, ...], tuple[Any, ...]]] = []
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 1 << 17},
            load_binary=lambda name, binary, shared, device: (1, 2, 32, 0, 1024),
            unload_module=lambda module: None,
        )

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def launch(x: int, y: int, z: int, *rest: Any) -> None:
            # Before a kernel's arguments: stream, function, metadata of two kinds, two hooks.
            self.launches.append((source, (x, y, z), rest[6:]))

        return launch


def report(name: str) -> dict[str, Any]:
    """Two steps of one tensor through the launcher, and what of it reached the driver."""
    import contextlib

    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from adamw_triton.state.buffers import make_slots
    from adamw_triton.state.formats import Blockwise8, Float32
    from adamw_triton_kernels import Hyper, Layout, hyper_table, launch, update_for

    stub = StubDriver()
    driver.set_active(stub)
    torch.cuda.device = lambda device: contextlib.nullcontext()  # type: ignore[assignment,misc]
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(warp_size=32)  # type: ignore[assignment]
    warmups, warmup = [], JITFunction.warmup
    JITFunction.warmup = lambda self, *args, **kw: warmups.append(self) or warmup(self, *args, **kw)
    calls, call = [], launch.call
    launch.call = lambda *arguments: calls.append(arguments) or call(*arguments)

    param, grad = torch.ones(5000).bfloat16(), torch.ones(5000)
    state_format = {"adamw_32bit": Float32(), "adamw_8bit": Blockwise8()}[name]
    buffer = make_slots(state_format, [(param, "p")], param.device)[0].buffer
    layout = Layout((5000,), (0,), (0,), (0,))
    update = update_for(name, torch.device("cuda"))
    for step in (1, 2):
        hyper = Hyper.at(step, lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
        update([param], [grad], buffer.arrays, layout, hyper_table([hyper]))
    spec, _key, _device, programs, arguments = calls[-1]
    source, grid, passed = stub.launches[-1]
    given = (*arguments, *spec.constexprs.values())
    return {
        "launches": len(stub.launches),
        "compilations": len(warmups),
        "grid": grid == (programs, 1, 1),
        "programs": programs,
        "the kernel's order": [*spec.signature] == spec.fn.arg_names,
        "all are given, in order": len(passed) == len(spec.signature)
        and all(a is b for a, b in zip(passed, given, strict=True)),
        "types as built": dict(source.signature) == spec.signature,
        "alignment as built": {at: kinds for at, kinds in source.attrs.items() if kinds} == spec.attrs,
        "constants as built": {at[0]: value for at, value in source.constants.items()}
        == {spec.fn.arg_names.index(key): value for key, value in spec.constexprs.items()},
    }


@pytest.mark.parametrize("name", ["adamw_32bit", "adamw_8bit"])
def test_the_launcher_is_given_what_the_kernel_takes(name: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    path = [str(ROOT), str(ROOT / "kernels"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    done = subprocess.run(
        [sys.executable, __file__, name], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("launches") == 2
    assert found.pop("compilations") == 1
    assert found.pop("programs") == {"adamw_32bit": 5, "adamw_8bit": 3}[name]
    assert all(found.values()), found


if __name__ == "__main__":
    print(json.dumps(report(sys.argv[1])))
