"""The probes: each asks the real machine one thing. Tests put another machine in this one's place."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from adamw_triton.memory.host import Limit, host_limit
from adamw_triton.memory.pinned import host_bytes
from adamw_triton.paging.device import device_for
from adamw_triton.paging.link import Link, measure

TRIAL_SECONDS = 300
"""A first compilation takes a few seconds a kernel; ten times that on a busy machine."""
TRIAL_BYTES = 256 << 20


class Gpu(NamedTuple):
    """The GPU that torch uses by default."""

    name: str
    capability: tuple[int, int]
    """Of NVIDIA's; of AMD's the version of its architecture."""
    free: int
    total: int
    integrated: bool
    """It has no memory of its own."""


class User(NamedTuple):
    """A process on the GPU."""

    pid: int
    name: str
    nbytes: int | None
    """None where the driver does not tell, as in containers."""


class Machine:
    """This one."""

    torch_version = torch.__version__

    @property
    def built_for(self) -> str | None:
        """What torch was built for; None for CPUs only."""
        if torch.version.hip:
            return f"ROCm {torch.version.hip}"
        return f"CUDA {torch.version.cuda}" if torch.version.cuda else None

    @property
    def triton_version(self) -> str | None:
        found = importlib.util.find_spec("triton")
        return None if found is None else _version("triton", "triton-rocm", "pytorch-triton")

    @property
    def triton_wanted(self) -> str | None:
        """The release that this torch names as its own; None if it names none, as builds for CPUs do."""
        return pinned_triton(importlib.metadata.requires("torch") or ())

    @property
    def interpreted(self) -> bool:
        return os.environ.get("TRITON_INTERPRET") == "1"

    @functools.cached_property
    def driver(self) -> str | None:
        """Its version, or that it is there; None if it is not."""
        text = _read("/proc/driver/nvidia/version")
        found = re.search(r"\b\d{3}\.\d[\d.]*", text)
        if found:
            return f"NVIDIA {found[0]}"
        if shutil.which("nvidia-smi"):  # WSL has no such file
            return "NVIDIA"
        version = _read("/sys/module/amdgpu/version").strip()
        return f"amdgpu {version}".strip() if version or Path("/dev/kfd").exists() else None

    @functools.cached_property
    def wsl(self) -> bool:
        return "microsoft" in _read("/proc/version").lower()

    @functools.cached_property
    def gpu(self) -> Gpu | None:
        if not torch.cuda.is_available():
            return None
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        free, total = torch.cuda.mem_get_info()
        return Gpu(
            name=properties.name,
            capability=(properties.major, properties.minor),
            free=free,
            total=total,
            integrated=bool(getattr(properties, "is_integrated", False)),
        )

    def users(self) -> list[User] | None:
        """The other processes on the GPU; None where nobody tells (no nvidia-ml-py, AMD, a MIG slice)."""
        try:
            import pynvml
        except ModuleNotFoundError:
            return None
        try:
            pynvml.nvmlInit()
            uuid = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", None)
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            running = [
                *pynvml.nvmlDeviceGetComputeRunningProcesses(handle),
                *pynvml.nvmlDeviceGetGraphicsRunningProcesses(handle),
            ]
        except pynvml.NVMLError:
            return None
        found = {process.pid: process.usedGpuMemory for process in running if process.pid != os.getpid()}
        return [User(pid, _process_name(pid), nbytes) for pid, nbytes in found.items()]

    def trial(self, variants: Sequence[str]) -> str | None:
        """Why steps of ``variants`` do not work; None if they do. See ``trial``.

        In a process of its own, whose crash is a finding too, and which compiles anew.
        """
        environment = {**os.environ, "TRITON_ALWAYS_COMPILE": "1"}
        environment.pop("TRITON_INTERPRET", None)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        command = [sys.executable, "-m", "adamw_triton.doctor.trial", *variants]
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=TRIAL_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            return f"it took longer than {TRIAL_SECONDS} seconds"
        if done.returncode == 0:
            return None
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        return lines[-1] if lines else f"the trial ended with exit code {done.returncode}"

    def pinning(self) -> str | None:
        """What was logged when host memory was pinned: the fallbacks say so. None if all went well."""
        messages: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
        logger = logging.getLogger("adamw_triton")
        logger.addHandler(handler)
        try:
            pinned = host_bytes(self._trial_bytes(), torch.device("cuda"))
        finally:
            logger.removeHandler(handler)
        if messages:
            return messages[0]
        return None if pinned.is_pinned() else "the memory is not pinned, and nothing says why"

    def link(self) -> Link:
        device = torch.device("cuda")
        size = self._trial_bytes()
        hosts = [host_bytes(size, device) for _ in range(2)]
        gpus = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        return measure(device_for(device), hosts, gpus)

    def host(self) -> Limit | None:
        return host_limit()

    def _trial_bytes(self) -> int:
        """Less than there is: what little a crowded machine has is not taken away."""
        limit = self.host()
        free = [torch.cuda.mem_get_info()[0], *([] if limit is None else [limit.available])]
        return max(1 << 20, min(TRIAL_BYTES, min(free) // 8))


def pinned_triton(requirements: Iterable[str]) -> str | None:
    """In lines like ``triton==3.4.0; platform_system == "Linux"``."""
    for line in requirements:
        found = re.match(r"(?:pytorch-)?triton(?:-\w+)?\s*\(?==\s*([\w.+]+)", line)
        if found:
            return found[1]
    return None


def _version(*names: str) -> str:
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "of unknown version"


def _process_name(pid: int) -> str:
    """Empty for a process of another container."""
    return Path(_read(f"/proc/{pid}/cmdline").split("\0")[0]).name


def _read(path: Any) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError):
        return ""
