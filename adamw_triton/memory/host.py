"""How much host memory there really is.

psutil and ``/proc/meminfo`` see the machine; a container sees less. The limit that kills a process is
the tightest of its control groups', so these are read, v1 and v2, with all their ancestors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from adamw_triton.memory.units import format_bytes

UNLIMITED = 1 << 60
"""A control group of version 1 without a limit says some number beyond this."""


class Limit(NamedTuple):
    """Bytes that may still be taken, and who says so."""

    available: int
    source: str


def host_limit(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> Limit | None:
    """The tightest limit on further host memory; None where none can be read (not Linux)."""
    return min((*_machine(proc), *_groups(proc, cgroups)), default=None)


def require_host(count: int, what: str) -> None:
    """Refuse before the kernel kills the process.

    Raises:
        MemoryError: ``count`` bytes for ``what`` are more than there are.
    """
    limit = host_limit()
    if limit is not None and count > limit.available:
        raise MemoryError(
            f"{what} needs {format_bytes(count)} of host memory, and {format_bytes(limit.available)} can "
            f"still be taken ({limit.source}): use 8-bit state, raise that limit, or free host memory"
        )


def _machine(proc: Path) -> Iterator[Limit]:
    text = _read(proc / "meminfo")
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    if found:
        yield Limit(int(found[1]) * 1024, "the machine's available memory")


def _groups(proc: Path, mount: Path) -> Iterator[Limit]:
    """The limit of every control group that this process is in, up to the root."""
    for line in _read(proc / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = mount, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = mount / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = root / path.strip("/")
        # In a container the path is often the host's, and the mount shows our own group as its root.
        for folder in (group, *group.parents):
            yield from _group(folder, *names)
            if folder == root:
                break


def _group(folder: Path, limit_file: str, usage_file: str, reclaimable: str) -> Iterator[Limit]:
    limit, usage = _read(folder / limit_file).strip(), _read(folder / usage_file).strip()
    if not (limit.isdigit() and usage.isdigit()) or int(limit) > UNLIMITED:
        return
    found = re.search(rf"^{reclaimable} (\d+)$", _read(folder / "memory.stat"), re.MULTILINE)
    cache = int(found[1]) if found else 0
    yield Limit(max(0, int(limit) - int(usage) + cache), f"the control group {folder}")


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
