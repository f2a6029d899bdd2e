"""The checks: a table of names and functions. Each asks the machine and judges what it hears."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Protocol

from adamw_triton.doctor import OK, PROBLEM, SKIPPED, WARNING, Finding
from adamw_triton.doctor.machine import Gpu, User
from adamw_triton.memory.host import Limit
from adamw_triton.memory.units import format_bytes
from adamw_triton.paging.link import Link
from adamw_triton.selection.cards import find_card

OLDEST_TORCH = (2, 7)
"""What pyproject.toml asks for."""
OLDEST_TRITON = (3, 3)
"""Before it, bf16 did not compile for GPUs older than Ampere: the T4, the V100."""
OLDEST_CAPABILITY = (7, 0)
"""The oldest NVIDIA GPUs that torch.compile lets Triton have: Volta. Whether kernels run is tried."""
CROWDED = 0.1
"""Share of the GPU's memory that others may have before it is worth a word."""
SLOW_LINK = 6e9
"""Bytes a second: half of 16 lanes of PCIe 3, the slowest link of any GPU since 2018."""
SLOWER_THAN_USUAL = 0.6
LITTLE_HOST = 8 << 30
"""Bytes: the 8-bit state of a model of 4e9 parameters, which fits a GPU of 12 GB no more."""


class Probes(Protocol):
    """``machine.Machine``, or a test's."""

    @property
    def torch_version(self) -> str: ...
    @property
    def built_for(self) -> str | None: ...
    @property
    def triton_version(self) -> str | None: ...
    @property
    def triton_wanted(self) -> str | None: ...
    @property
    def interpreted(self) -> bool: ...
    @property
    def driver(self) -> str | None: ...
    @property
    def wsl(self) -> bool: ...
    @property
    def gpu(self) -> Gpu | None: ...
    def users(self) -> list[User] | None: ...
    def trial(self, variants: list[str]) -> str | None: ...
    def pinning(self) -> str | None: ...
    def link(self) -> Link: ...
    def host(self) -> Limit | None: ...


Check = Callable[[Probes], Finding]


def torch_build(machine: Probes) -> Finding:
    if _older(machine.torch_version, OLDEST_TORCH):
        advice = f"pip install 'torch>={_dotted(OLDEST_TORCH)}'"
        return Finding(PROBLEM, f"{machine.torch_version} is too old", advice)
    if machine.built_for is not None:
        return Finding(OK, f"{machine.torch_version}, built for {machine.built_for}")
    text = f"{machine.torch_version}, built for CPUs only"
    if machine.driver is None:
        return Finding(OK, text)
    return Finding(
        PROBLEM,
        f"{text}; a GPU driver ({machine.driver}) is here",
        "install torch for the GPU: pytorch.org/get-started tells the command",
    )


def driver(machine: Probes) -> Finding:
    if machine.driver is None and machine.gpu is None:
        return Finding(
            WARNING, "none found", "in a container: start it with --gpus all, or --device /dev/kfd for AMD"
        )
    return Finding(OK, machine.driver or "not told")


def gpu(machine: Probes) -> Finding:
    found = machine.gpu
    if found is None:
        if machine.driver is not None and machine.built_for is not None:
            return Finding(
                PROBLEM,
                "torch reaches none, though a driver is here",
                "look at nvidia-smi, CUDA_VISIBLE_DEVICES, and whether the driver is too old for this torch",
            )
        return Finding(WARNING, "none: AdamW works on CPU tensors, in plain torch")
    text = f"{found.name}, {format_bytes(found.total)}, capability {_dotted(found.capability)}"
    is_nvidia = machine.built_for is None or machine.built_for.startswith("CUDA")
    if is_nvidia and found.capability < OLDEST_CAPABILITY:
        return Finding(WARNING, text, "older than what Triton is tested on; the line on kernels tells")
    return Finding(OK, text)


def kernels(machine: Probes) -> Finding:
    if machine.triton_version is None:
        advice = "pip install triton (Linux only)"
        return Finding(_when_needed(machine), "triton is not installed: steps on a GPU are slow", advice)
    if _older(machine.triton_version, OLDEST_TRITON):
        return Finding(
            _when_needed(machine),
            f"Triton {machine.triton_version} is too old: bf16 does not compile for GPUs before Ampere",
            f"pip install 'triton>={_dotted(OLDEST_TRITON)}', which torch {_dotted(OLDEST_TORCH)} brings",
        )
    where = "they run, as plain torch does" if machine.gpu else "they compile, for a GPU that is not here"
    refusal = machine.trial(["32bit", "8bit"])
    if refusal is not None:
        return Finding(
            _when_needed(machine),
            f"Triton {machine.triton_version}: {refusal}",
            "Triton needs a C compiler and Python's headers (apt install gcc python3-dev), a folder to "
            "write to (TRITON_CACHE_DIR) and the torch it was released with",
        )
    if machine.interpreted:
        return Finding(
            WARNING,
            f"Triton {machine.triton_version}: {where}; but TRITON_INTERPRET=1 is set",
            "unset it: it is for debugging kernels on a CPU",
        )
    wanted = machine.triton_wanted
    if wanted is not None and _release(machine.triton_version) not in (None, _release(wanted)):
        return Finding(
            WARNING,
            f"Triton {machine.triton_version}: {where}; but torch {machine.torch_version} was released with "
            f"Triton {wanted}, and torch.compile is tested with no other",
            f"pip install 'triton=={wanted}', or the torch of the Triton that is here",
        )
    return Finding(OK, f"Triton {machine.triton_version}: {where}")


def paging(machine: Probes) -> Finding:
    refusal = machine.trial(["paged_32bit", "paged_8bit"])
    if refusal is None:
        return Finding(OK, "paged steps run, as plain torch does")
    return Finding(
        PROBLEM, refusal, "see the lines on kernels and pinned memory; else report it with this output"
    )


def free_memory(machine: Probes) -> Finding:
    assert machine.gpu is not None
    free, total = machine.gpu.free, machine.gpu.total
    text = f"{format_bytes(free)} of {format_bytes(total)} free"
    users = machine.users()
    if users is None:
        text += "; who has the rest is not known (pip install nvidia-ml-py tells)"
    elif users:
        shown = (f"{user.name or 'a process'} ({user.pid}) {_size(user)}" for user in users)
        text += f"; others here: {', '.join(shown)}"
    if machine.wsl or machine.gpu.integrated:
        what = "WSL lends host memory to the GPU" if machine.wsl else "the GPU has no memory of its own"
        return Finding(
            WARNING, f"{text}; but {what}: this figure lies", "say what may be used: memory_budget="
        )
    if free < (1 - CROWDED) * total:
        return Finding(WARNING, text, "end what you do not need; variant='auto' plans with what is free")
    return Finding(OK, text)


def pinned_memory(machine: Probes) -> Finding:
    message = machine.pinning()
    if message is None:
        return Finding(OK, "host memory is pinned in exactly the size asked for")
    return Finding(WARNING, message, "raise the limit, or expect paged state to be slow")


def link(machine: Probes) -> Finding:
    assert machine.gpu is not None
    found = machine.link()
    text = (
        f"to the GPU {found.to_gpu / 1e9:.1f} GB/s, to the host {found.to_host / 1e9:.1f}, "
        f"both at once {found.both / 1e9:.1f} each way"
    )
    try:
        usual = find_card(machine.gpu.name).link
    except ValueError:
        usual = 0
    if found.both < max(SLOWER_THAN_USUAL * usual, SLOW_LINK / 2) or min(found[:2]) < SLOW_LINK:
        expected = f"; this card is planned with {usual / 1e9:.1f}" if usual else ""
        return Finding(
            WARNING,
            text + expected,
            "is the card in a slot of 16 lanes, is the memory pinned, is another program copying? 8-bit "
            "state moves a quarter of the bytes",
        )
    return Finding(OK, text)


def host_memory(machine: Probes) -> Finding:
    found = machine.host()
    if found is None:
        return Finding(WARNING, "how much can be taken is not known", "give plan() a host_memory")
    text = f"{format_bytes(found.available)} can still be taken ({found.source})"
    if found.available < LITTLE_HOST:
        return Finding(WARNING, text, "paged state needs 8 bytes a parameter in 32 bits, 2.03 in 8 bits")
    return Finding(OK, text)


CHECKS: dict[str, Check] = {
    "torch": torch_build,
    "driver": driver,
    "GPU": gpu,
    "kernels": kernels,
    "memory": free_memory,
    "pinned": pinned_memory,
    "link": link,
    "paging": paging,
    "host": host_memory,
}
NEED_GPU = {"memory", "pinned", "link", "paging"}


def examine(machine: Probes) -> Iterable[tuple[str, Finding]]:
    """One finding after the other: some take seconds."""
    for name, check in CHECKS.items():
        yield name, _examine(name, check, machine)


def _examine(name: str, check: Check, machine: Probes) -> Finding:
    """A check that fails in a way that nobody thought of is a finding, not a traceback."""
    try:
        if name in NEED_GPU and machine.gpu is None:
            return Finding(SKIPPED, "needs a GPU")
        return check(machine)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return Finding(_when_needed(machine), reason, "report it with this output")


def _older(version: str, oldest: tuple[int, int]) -> bool:
    """Whether it is before that release; an unknown one is not."""
    found = _release(version)
    return found is not None and found < oldest


def _release(version: str) -> tuple[int, ...] | None:
    """Major and minor; None where the text tells none."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return None if found is None else tuple(map(int, found.groups()))


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _when_needed(machine: Probes) -> str:
    """What cannot work is a problem only to those who have a GPU."""
    try:
        return WARNING if machine.gpu is None else PROBLEM
    except Exception:
        return PROBLEM


def _size(user: User) -> str:
    return "has some memory" if user.nbytes is None else f"has {format_bytes(user.nbytes)}"
