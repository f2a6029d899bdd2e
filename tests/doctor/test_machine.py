"""The probes themselves, as far as a machine without a GPU can be asked; the rest under `gpu`."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from adamw_triton.doctor import OK, PROBLEM, WARNING, machine, trial
from adamw_triton.doctor.checks import examine
from adamw_triton.doctor.machine import Machine
from adamw_triton.memory.host import host_limit
from adamw_triton.paging.device import HostDevice
from adamw_triton.paging.link import REPEATS, measure

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


# Trials


@pytest.mark.slow
def test_the_trial_really_compiles_or_runs_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a fresh process, whatever this one's interpreter is set to."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert Machine().trial(["32bit", "8bit"]) is None


@pytest.mark.slow
def test_a_trial_that_fails_tells_its_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Machine().trial(["16bit"]) == "KeyError: '16bit'"


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("import sys; sys.exit(3)", "the trial ended with exit code 3"),
        ("import os; os.abort()", "the trial ended with exit code -6"),
        ("raise OSError('first\\n\\n  second \\n')", "second"),
        ("import time; time.sleep(60)", "it took longer than 1 seconds"),
    ],
)
def test_however_a_trial_ends(code: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "TRIAL_SECONDS", 1)
    run = machine.subprocess.run
    monkeypatch.setattr(
        machine.subprocess, "run", lambda command, **more: run([sys.executable, "-c", code], **more)
    )
    assert Machine().trial(["8bit"]) == told


VARIANTS = ["32bit", "8bit", "paged_32bit", "paged_8bit"]


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What the GPU is to have computed is put in here; the CPU's part is real."""
    put: list[Tensor] = []
    real = trial.trained
    monkeypatch.setattr(
        trial, "trained", lambda name, device: put[0] if device == "cuda" else real(name, "cpu")
    )
    return put


@without_gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_trial_is_content_with_the_real_kernels(
    variant: str, on_gpu: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In Triton's interpreter."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    on_gpu.append(trial.trained(variant, "cpu"))
    monkeypatch.delenv("TRITON_INTERPRET")
    trial.compare(variant)
    assert not on_gpu[0].equal(trial.trained(variant, "cpu")), "then this was plain torch"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("wrong", [1e-4, torch.nan])
def test_a_trial_sees_a_block_of_wrong_weights(variant: str, wrong: float, on_gpu: list[Tensor]) -> None:
    """A hundredth of a step is enough."""
    weights = trial.trained(variant, "cpu")
    weights[640:768] += wrong
    on_gpu.append(weights)
    with pytest.raises(ArithmeticError, match=f"^{variant}: 128 of 10000 weights differ from the CPU's$"):
        trial.compare(variant)


def test_a_trial_takes_the_steps_it_says() -> None:
    """On the CPU a copy, as on a GPU: its gradients were once made of the weights that it had updated."""
    values = torch.linspace(-1, 1, trial.ELEMENTS)
    weight = torch.nn.Parameter(values.clone())
    optimizer = torch.optim.AdamW([weight], lr=0.01)
    for step in range(1, trial.STEPS + 1):
        weight.grad = values * step + 0.1
        optimizer.step()
    assert (trial.trained("32bit", "cpu") - weight.detach()).abs().max() < 1e-6


def test_a_trial_trains() -> None:
    """What is compared is not what it began with."""
    moved = trial.trained("8bit", "cpu") - torch.linspace(-1, 1, trial.ELEMENTS)
    assert (moved.abs() > 0.001).all()


# The link


class Clock:
    """A device whose streams take a second for each copy, and two when the other one copies too."""

    def __init__(self) -> None:
        self.streams = [ClockStream(self), ClockStream(self)]
        self.inbound, self.outbound = self.streams

    def synchronize(self) -> None:
        for stream in self.streams:
            stream.copied = 0

    def seconds(self, begin: tuple[ClockStream, int], end: tuple[ClockStream, int]) -> float:
        stream = begin[0]
        assert end[0] is stream
        busy = all(stream.copied for stream in self.streams)
        return (end[1] - begin[1]) * (2.0 if busy else 1.0)


class ClockStream:
    def __init__(self, device: Clock) -> None:
        self.copied = 0

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)
        self.copied += 1

    def record(self) -> tuple[ClockStream, int]:
        return self, self.copied


def test_rates_are_bytes_by_seconds_and_both_ways_are_measured_together() -> None:
    hosts = [torch.full((1000,), 7, dtype=torch.uint8) for _ in range(2)]
    gpus = [torch.full((1000,), 9, dtype=torch.uint8) for _ in range(2)]
    clock: Any = Clock()
    assert measure(clock, hosts, gpus) == (1000, 1000, 500)
    assert gpus[0].eq(7).all()
    assert hosts[1].eq(9).all()
    assert REPEATS > 1


def test_the_cpu_has_some_rate() -> None:
    buffers = [torch.zeros(1 << 20, dtype=torch.uint8) for _ in range(4)]
    assert all(1e6 < rate < 1e13 for rate in measure(HostDevice(), buffers[:2], buffers[2:]))


# What the machine has


@without_gpu
def test_a_machine_without_a_gpu() -> None:
    here = Machine()
    assert here.gpu is None
    assert here.torch_version == torch.__version__
    assert here.triton_version is not None
    assert here.triton_version[0].isdigit()
    assert (here.built_for is None) == (torch.version.cuda is None and torch.version.hip is None)
    limit, real = here.host(), host_limit()
    assert limit is not None
    assert real is not None
    assert limit.source == real.source


@pytest.mark.parametrize(
    ("files", "tool", "expected"),
    [
        (
            {"/proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Module  570.124.06  Wed"},
            None,
            "NVIDIA 570.124.06",
        ),
        ({}, "/usr/bin/nvidia-smi", "NVIDIA"),
        ({"/sys/module/amdgpu/version": "6.10.5\n"}, None, "amdgpu 6.10.5"),
        ({}, None, None),
    ],
)
def test_drivers(
    files: dict[str, str], tool: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_read", lambda path: files.get(path, ""))
    monkeypatch.setattr(machine.shutil, "which", lambda name: tool)
    monkeypatch.setattr(machine.Path, "exists", lambda path: False)
    assert Machine().driver == expected


@pytest.mark.parametrize(
    ("version", "expected"), [("Linux 6.6 microsoft-standard-WSL2", True), ("Linux 6.8", False)]
)
def test_wsl(version: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_read", lambda path: {"/proc/version": version}[path])
    assert Machine().wsl is expected


def test_a_process_has_the_name_of_its_program() -> None:
    assert "python" in machine._process_name(machine.os.getpid()) or "pytest" in machine._process_name(
        machine.os.getpid()
    )
    assert machine._process_name(1 << 30) == ""


@pytest.mark.gpu
@pytest.mark.slow
def test_on_a_gpu_every_probe_answers() -> None:
    findings = dict(examine(Machine()))
    assert {name: finding.text for name, finding in findings.items() if finding.verdict == PROBLEM} == {}
    assert {findings[name].verdict for name in ("GPU", "kernels", "paging")} <= {OK, WARNING}
    assert "GB/s" in findings["link"].text


@pytest.mark.parametrize(
    ("line", "version"),
    [
        ('triton==3.4.0; platform_system == "Linux" and platform_machine == "x86_64"', "3.4.0"),
        ('pytorch-triton-rocm==3.3.1; platform_system == "Linux"', "3.3.1"),
        ("triton-rocm==3.6.0", "3.6.0"),
        ("triton (==3.3.0)", "3.3.0"),
        ("triton>=3.3", None),
        ("tritonclient==2.0", None),
        ("numpy==2.0", None),
    ],
)
def test_the_triton_that_torch_names(line: str, version: str | None) -> None:
    assert machine.pinned_triton(["filelock", line]) == version
    assert machine.pinned_triton([]) is None
