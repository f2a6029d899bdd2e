"""`adamw-triton bug-report`: what a report of a fault needs, and what of it this machine can tell."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from collections.abc import Iterator

from adamw_triton._version import __version__
from adamw_triton.commands.doctor import show

SUMMARY = "print what a report of a fault should contain, with versions and the doctor's findings filled in"
PACKAGES = (
    "torch", "triton", "triton-rocm", "pytorch-triton-rocm", "transformers", "accelerate", "peft", "trl",
    "lightning", "deepspeed", "bitsandbytes", "torchao", "safetensors", "numpy",
)  # fmt: skip
VARIABLES = (
    "ADAMW_TRITON_COMPILED", "CUDA_LAUNCH_BLOCKING", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES",
    "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TORCH_COMPILE_DISABLE", "TRITON_ALWAYS_COMPILE",
    "TRITON_INTERPRET",
)  # fmt: skip
"""That change what happens; none holds a path or a name."""

QUESTIONS = """\
### What happened

What you did, what came of it, what you expected. The whole traceback, if there is one.

### How to see it

The shortest script that shows it, and what it prints for `print(optimizer)`, `print(optimizer.plan)` and
`optimizer.memory()`.

### Where
"""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The sub-command `bug-report`."""
    parser = commands.add_parser("bug-report", help=SUMMARY, description=SUMMARY)
    parser.set_defaults(run=bug_report)


def bug_report(_: argparse.Namespace) -> int:
    """Print it, in Markdown; the exit code."""
    from adamw_triton.doctor.checks import examine
    from adamw_triton.doctor.machine import Machine

    print(QUESTIONS)
    for line in here():
        print(f"- {line}")
    print("\n```")
    show(examine(Machine()))
    print("```\n\nRead it before you send it: other programs on the GPU are named.")
    return 0


def here() -> Iterator[str]:
    """What is installed, and set."""
    yield f"adamw_triton {__version__}, Python {platform.python_version()}, {platform.platform()}"
    versions = {package: _version(package) for package in PACKAGES}
    yield ", ".join(f"{package} {version}" for package, version in versions.items() if version)
    found = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    yield ", ".join(found) or "none of the variables that matter is set"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
