"""The verdict of each check, for machines of every kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adamw_triton.doctor import OK, PROBLEM, SKIPPED, WARNING, Finding
from adamw_triton.doctor.checks import CHECKS, NEED_GPU, OLDEST_TORCH, OLDEST_TRITON, examine
from adamw_triton.doctor.machine import Gpu, User
from adamw_triton.memory.host import Limit
from adamw_triton.paging.link import Link

GIB = 1 << 30
T4 = Gpu("Tesla T4", (7, 5), free=14 * GIB, total=15 * GIB, integrated=False)
CPU_ONLY: dict[str, Any] = {"gpu": None, "built_for": None, "driver": None}


class Fake:
    """A good machine, but for what a test changes. A method's answer may be an exception."""

    torch_version = "2.13.0"
    built_for: str | None = "CUDA 12.8"
    triton_version: str | None = "3.9.0"
    triton_wanted: str | None = "3.9.1"
    interpreted = False
    driver: str | None = "NVIDIA 570.1"
    wsl = False
    gpu: Gpu | None = T4
    users_answer: Any = ()
    pinning_answer: Any = None
    link_answer: Any = Link(12.1e9, 12.5e9, 11e9)
    host_answer: Any = Limit(64 * GIB, "the machine's available memory")
    kernels_answer: Any = None
    paging_answer: Any = None

    def __init__(self, **changes: Any) -> None:
        for name, value in changes.items():
            assert hasattr(Fake, name), name
            setattr(self, name, value)
        self.tried: list[list[str]] = []

    def users(self) -> list[User] | None:
        found = _answer(self.users_answer)
        return None if found is None else list(found)

    def trial(self, variants: list[str]) -> str | None:
        self.tried.append(variants)
        return _answer(self.paging_answer if variants[0].startswith("paged") else self.kernels_answer)  # type: ignore[no-any-return]

    def pinning(self) -> str | None:
        return _answer(self.pinning_answer)  # type: ignore[no-any-return]

    def link(self) -> Link:
        return _answer(self.link_answer)  # type: ignore[no-any-return]

    def host(self) -> Limit | None:
        return _answer(self.host_answer)  # type: ignore[no-any-return]


def _answer(value: Any) -> Any:
    if isinstance(value, Exception):
        raise value
    return value


def found(**changes: Any) -> dict[str, Finding]:
    return dict(examine(Fake(**changes)))


def test_on_a_good_machine_all_is_well() -> None:
    findings = found()
    assert list(findings) == list(CHECKS)
    for finding in findings.values():
        assert finding.verdict == OK, finding
        assert not finding.advice
    assert findings["GPU"].text == "Tesla T4, 15.0 GiB, capability 7.5"
    assert findings["link"].text == ("to the GPU 12.1 GB/s, to the host 12.5, both at once 11.0 each way")
    assert findings["memory"].text == "14.0 GiB of 15.0 GiB free"


def test_every_variant_is_tried() -> None:
    machine = Fake()
    list(examine(machine))
    assert machine.tried == [["32bit", "8bit"], ["paged_32bit", "paged_8bit"]]


def test_without_a_gpu_what_needs_one_is_skipped_and_nothing_is_a_problem() -> None:
    findings = found(**CPU_ONLY)
    assert {name for name, finding in findings.items() if finding.verdict == SKIPPED} == NEED_GPU
    assert findings["GPU"].verdict == WARNING
    assert "none: AdamW works on CPU tensors, in plain torch" in findings["GPU"].text
    assert findings["kernels"] == Finding(OK, "Triton 3.9.0: they compile, for a GPU that is not here")
    assert PROBLEM not in {finding.verdict for finding in findings.values()}


CASES: dict[str, tuple[dict[str, Any], str, str, str, str]] = {
    "torch for CPUs beside a driver": (
        {"gpu": None, "built_for": None},
        "torch", PROBLEM, "built for CPUs only; a GPU driver", "install torch for"),
    "an old torch": (
        {"torch_version": "2.6.0+cu124"}, "torch", PROBLEM, "2.6.0+cu124 is too old", "torch>=2.7"),
    "the oldest torch": ({"torch_version": "2.7.0a0"}, "torch", OK, "2.7.0a0, built for CUDA 12.8", ""),
    "a torch after 2.9": ({"torch_version": "2.10.0"}, "torch", OK, "2.10.0, built", ""),
    "an old Triton": (
        {"triton_version": "3.2.0", "kernels_answer": "AttributeError: 'dict' has no attribute 'hash'"},
        "kernels", PROBLEM, "Triton 3.2.0 is too old: bf16 does not compile", "triton>=3.3"),
    "an old Triton, no GPU": (
        {**CPU_ONLY, "triton_version": "3.2.0"}, "kernels", WARNING, "3.2.0 is too old", "torch 2.7"),
    "the oldest Triton": (
        {"triton_version": "3.3.0", "triton_wanted": "3.3.1"}, "kernels", OK, "Triton 3.3.0: they run", ""),
    "another torch's Triton": (
        {"triton_version": "3.10.0"}, "kernels", WARNING,
        "Triton 3.10.0: they run, as plain torch does; but torch 2.13.0 was released with Triton 3.9.1",
        "pip install 'triton==3.9.1'"),
    "a torch that names no Triton": (
        {"triton_version": "3.10.0", "triton_wanted": None}, "kernels", OK, "Triton 3.10.0: they run", ""),
    "a Triton without a version": (
        {"triton_version": "of unknown version"}, "kernels", OK, "Triton of unknown version: they run", ""),
    "torch for CPUs": (CPU_ONLY, "torch", OK, "2.13.0, built for CPUs only", ""),
    "a driver that torch does not reach": (
        {"gpu": None}, "GPU", PROBLEM, "torch reaches none, though a driver is here", "CUDA_VISIBLE_DEVICES"),
    "no driver": (CPU_ONLY, "driver", WARNING, "none found", "--gpus all"),
    "a driver without a version": ({"driver": None}, "driver", OK, "not told", ""),
    "an old GPU": (
        {"gpu": T4._replace(name="Tesla P100", capability=(6, 0))},
        "GPU", WARNING, "capability 6.0", "older than what Triton is tested on"),
    "AMD's numbers mean something else": (
        {"built_for": "ROCm 6.4", "gpu": T4._replace(capability=(6, 0))}, "GPU", OK, "capability 6.0", ""),
    "no triton": ({"triton_version": None},
        "kernels", PROBLEM, "triton is not installed", "pip install triton"),
    "no triton, no GPU": (
        {**CPU_ONLY, "triton_version": None},
        "kernels", WARNING, "triton is not installed", "pip install triton"),
    "kernels that do not compile": (
        {"kernels_answer": "RuntimeError: Failed to find C compiler"}, "kernels", PROBLEM,
        "Triton 3.9.0: RuntimeError: Failed to find C compiler", "apt install gcc python3-dev"),
    "kernels that do not compile, no GPU": (
        {**CPU_ONLY, "kernels_answer": "no ptxas"}, "kernels", WARNING, "Triton 3.9.0: no ptxas", "gcc"),
    "the interpreter": ({"interpreted": True}, "kernels", WARNING, "TRITON_INTERPRET=1 is set", "unset it"),
    "paging that fails": ({"paging_answer": "it died"}, "paging", PROBLEM, "it died", "report it"),
    "one who takes memory": (
        {"gpu": T4._replace(free=5 * GIB), "users_answer": [User(42, "python", 9 * GIB)]}, "memory", WARNING,
        "5.0 GiB of 15.0 GiB free; others here: python (42) has 9.0 GiB", "end what you do not need"),
    "ones who are not told": (
        {"users_answer": [User(7, "", None)]},
        "memory", OK, "others here: a process (7) has some memory", ""),
    "nobody tells": (
        {"users_answer": None},
        "memory", OK, "who has the rest is not known (pip install nvidia-ml-py tells)", ""),
    "WSL": ({"wsl": True},
        "memory", WARNING, "WSL lends host memory to the GPU: this figure lies", "memory_budget="),
    "unified memory": (
        {"gpu": T4._replace(integrated=True)},
        "memory", WARNING, "no memory of its own: this figure lies", "budget"),
    "memory that cannot be pinned": (
        {"pinning_answer": "could not be pinned"},
        "pinned", WARNING, "could not be pinned", "raise the limit"),
    "a slow link": (
        {"link_answer": Link(3e9, 3e9, 1.5e9)},
        "link", WARNING, "; this card is planned with 11.0", "16 lanes"),
    "slow one way": ({"link_answer": Link(12e9, 3e9, 7e9)}, "link", WARNING, "to the host 3.0", "16 lanes"),
    "slow for this card": (
        {"gpu": T4._replace(name="NVIDIA H200"), "link_answer": Link(25e9, 25e9, 18e9)}, "link", WARNING,
        "; this card is planned with 47.0", "16 lanes"),
    "fast enough for an unknown card": (
        {"gpu": T4._replace(name="GPU 9000"), "link_answer": Link(25e9, 25e9, 12e9)},
        "link", OK, "12.0 each way", ""),
    "slow for any card": (
        {"gpu": T4._replace(name="GPU 9000"), "link_answer": Link(5e9, 5e9, 3e9)},
        "link", WARNING, "3.0 each", "lanes"),
    "little host memory": (
        {"host_answer": Limit(2 * GIB, "the control group /x")}, "host", WARNING,
        "2.0 GiB can still be taken (the control group /x)", "8 bytes a parameter"),
    "no host limit": ({"host_answer": None}, "host", WARNING, "is not known", "host_memory"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_verdicts(case: str) -> None:
    """One line of the report changes; the others stay as they were, unless there is no GPU."""
    changes, name, verdict, text, advice = CASES[case]
    findings = found(**changes)
    assert findings[name].verdict == verdict, findings[name]
    assert text in findings[name].text
    assert (advice in findings[name].advice) if advice else (findings[name].advice == "")
    if changes.get("gpu", T4) is not None:
        others = [finding.verdict for other, finding in findings.items() if other != name]
        assert set(others) == {OK}


PROBES = {
    "users_answer": "memory",
    "pinning_answer": "pinned",
    "link_answer": "link",
    "host_answer": "host",
    "kernels_answer": "kernels",
    "paging_answer": "paging",
}


@pytest.mark.parametrize(("probe", "name"), PROBES.items())
def test_a_check_that_fails_in_an_unknown_way_is_a_finding(probe: str, name: str) -> None:
    findings = found(**{probe: OSError("two\nlines")})
    assert findings[name] == Finding(PROBLEM, "OSError: two lines", "report it with this output")
    assert {finding.verdict for other, finding in findings.items() if other != name} == {OK}


def test_what_is_too_old_is_what_is_not_to_be_installed() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    for name, oldest in (("torch", OLDEST_TORCH), ("triton", OLDEST_TRITON)):
        assert f'"{name}>={oldest[0]}.{oldest[1]}' in project


def test_checks_are_functions_of_the_machine_alone() -> None:
    checks: dict[str, Callable[..., Finding]] = CHECKS
    for name, check in checks.items():
        assert check(Fake()) == check(Fake()), name
