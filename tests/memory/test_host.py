"""Byte counts as text, and how much host memory a process may still take: read from trees of files as the
kernel shows them on machines that we do not have."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adamw_triton.memory import host as memory
from adamw_triton.memory.host import Limit, host_limit, require_host
from adamw_triton.memory.units import format_bytes, parse_bytes

KiB, MiB, GiB, TiB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

GOOD_BYTES: list[tuple[int | str, int]] = [
    (0, 0),
    (1, 1),
    (10**15, 10**15),
    ("0", 0),
    ("123456", 123456),
    ("7b", 7),
    ("7 B", 7),
    ("1kB", 1000),
    ("500MB", 500_000_000),
    ("500 mb", 500_000_000),
    ("3GB", 3_000_000_000),
    ("2TB", 2_000_000_000_000),
    ("64KiB", 64 * KiB),
    ("64kib", 64 * KiB),
    ("1.5MiB", 3 * MiB // 2),
    ("4GiB", 4 * GiB),
    ("  4 GiB\n", 4 * GiB),
    ("0.5TiB", TiB // 2),
    ("0.1B", 0),
]


@pytest.mark.parametrize(("value", "expected"), GOOD_BYTES)
def test_byte_counts_that_are_understood(value: int | str, expected: int) -> None:
    found = parse_bytes(value, "size")
    assert found == expected
    assert type(found) is int


BAD_BYTES: list[object] = [
    True,
    False,
    -1,
    1.5,
    4e9,
    math.nan,
    None,
    b"4GiB",
    [1],
    "",
    " ",
    "GiB",
    "-4GiB",
    "+4GiB",
    "4G",
    "4EiB",
    "4GiBs",
    "4 Gi B",
    "4,5GiB",
    ".5GiB",
    "4.GiB",
    "1e9",
    "0x10",
    "inf",
    "nan",
    "lots",
    "4GiB 2MiB",
    "9" * 400,
    "9" * 308 + "TiB",
]


@pytest.mark.parametrize("value", BAD_BYTES, ids=repr)
def test_other_byte_counts_are_refused_with_all_there_is_to_know(value: object) -> None:
    """The argument's name, what was got, and what is allowed."""
    message = (
        f"Invalid some_size: {value!r}; it must be a number of bytes >= 0, or text like '4GiB' or '500MB'"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        parse_bytes(value, "some_size")


@pytest.mark.parametrize("value", ["1", "24", "4090", "65535", " 16 ", "0.5"])
def test_small_numbers_without_a_unit_are_refused(value: str) -> None:
    with pytest.raises(ValueError, match=f"^Invalid some_size: {value!r} has no unit and means bytes"):
        parse_bytes(value, "some_size")


FORMATTED = [
    (0, "0 B"),
    (1, "1 B"),
    (1023, "1023 B"),
    (KiB, "1.0 KiB"),
    (10_000, "9.8 KiB"),
    (192 * KiB, "192.0 KiB"),
    (MiB, "1.0 MiB"),
    (64 * MiB, "64.0 MiB"),
    (1000 * MiB, "1000.0 MiB"),
    (3 * GiB // 2, "1.5 GiB"),
    (TiB, "1.0 TiB"),
    (5000 * TiB, "5000.0 TiB"),
    (-3 * GiB // 2, "-1.5 GiB"),
]


@pytest.mark.parametrize(("count", "expected"), FORMATTED)
def test_byte_counts_as_text(count: int, expected: str) -> None:
    assert format_bytes(count) == expected


@given(st.integers(0, 10**16))
def test_what_is_written_can_be_read_again(count: int) -> None:
    """Up to the one decimal that is written."""
    assert parse_bytes(format_bytes(count), "count") == pytest.approx(count, rel=0.05)


# How much may be taken

MEMINFO = """MemTotal:       65536000 kB
MemFree:         1000000 kB
MemAvailable:   50000000 kB
Buffers:          100000 kB
SwapTotal:       9000000 kB
"""
MACHINE = 50_000_000 * 1024
V1_UNLIMITED = 9223372036854771712  # what the kernel shows: 2**63 in whole pages

V1_SYSTEMD = "12:pids:/a/b\n4:memory:/a/b\n1:name=systemd:/other\n"
V1_SHARED = "4:cpu,cpuacct:/\n3:hugetlb,memory:/a/b\n"


def v1(folder: str, limit: int, usage: int, stat: str = "cache 77\n") -> dict[str, object]:
    return {
        f"cgroup/memory{folder}/memory.limit_in_bytes": limit,
        f"cgroup/memory{folder}/memory.usage_in_bytes": usage,
        f"cgroup/memory{folder}/memory.stat": stat,
    }


def v2(folder: str, limit: int | str, usage: int, stat: str = "anon 77\n") -> dict[str, object]:
    return {
        f"cgroup{folder}/memory.max": limit,
        f"cgroup{folder}/memory.current": usage,
        f"cgroup{folder}/memory.stat": stat,
    }


def machine(groups: str | None = None, meminfo: str = MEMINFO) -> dict[str, object]:
    files: dict[str, object] = {"proc/meminfo": meminfo}
    return files if groups is None else files | {"proc/self/cgroup": groups}


LIMITS: dict[str, tuple[dict[str, object], int | None, str]] = {
    "a machine without control groups": (machine(), MACHINE, "the machine's available memory"),
    "nothing can be read": ({}, None, ""),
    "a kernel before MemAvailable": ({"proc/meminfo": "MemTotal: 65536000 kB\n"}, None, ""),
    "v2: the own group": (
        machine("0::/a/b\n") | v2("/a/b", 8 * GiB, 3 * GiB) | v2("/a", "max", 4 * GiB),
        5 * GiB,
        "the control group {mount}/a/b",
    ),
    "v2: an ancestor is tighter": (
        machine("0::/a/b\n") | v2("/a/b", 8 * GiB, 3 * GiB) | v2("/a", 9 * GiB, 6 * GiB),
        3 * GiB,
        "the control group {mount}/a",
    ),
    "v2: the farthest ancestor is tightest": (
        machine("0::/a/b/c\n") | v2("/a/b/c", 8 * GiB, 0) | v2("/a/b", 7 * GiB, 0) | v2("/a", 6 * GiB, 0),
        6 * GiB,
        "the control group {mount}/a",
    ),
    "v2: the ancestor has a limit, the own group none": (
        machine("0::/a/b\n") | v2("/a/b", "max", 3 * GiB) | v2("/a", 9 * GiB, 6 * GiB),
        3 * GiB,
        "the control group {mount}/a",
    ),
    "v2: no group has a limit": (
        machine("0::/a/b\n") | v2("/a/b", "max", 3 * GiB) | v2("/a", "max", 6 * GiB),
        MACHINE,
        "the machine's available memory",
    ),
    "v2: the machine is tighter than the group": (
        machine("0::/a\n") | v2("/a", 100 * GiB, GiB),
        MACHINE,
        "the machine's available memory",
    ),
    "v2: another group's limit is none of ours": (
        machine("0::/a\n") | v2("/a", 8 * GiB, 3 * GiB) | v2("/a/b", GiB, 0) | v2("/c", GiB, 0),
        5 * GiB,
        "the control group {mount}/a",
    ),
    "v2: in the root group": (machine("0::/\n"), MACHINE, "the machine's available memory"),
    "v2: a container that sees its own group as the root": (
        machine("0::/\n") | v2("", 8 * GiB, 3 * GiB),
        5 * GiB,
        "the control group {mount}",
    ),
    "v2: a container whose path is the host's": (
        machine("0::/system.slice/docker-123.scope\n") | v2("", 8 * GiB, 3 * GiB),
        5 * GiB,
        "the control group {mount}",
    ),
    "v2: inactive files can be reclaimed": (
        machine("0::/a\n")
        | v2("/a", 8 * GiB, 7 * GiB, f"file 9\nno_inactive_file 5\ninactive_file {2 * GiB}\nactive_file 3\n"),
        3 * GiB,
        "the control group {mount}/a",
    ),
    "v2: more is used than allowed": (
        machine("0::/a\n") | v2("/a", 8 * GiB, 8 * GiB + 4096),
        0,
        "the control group {mount}/a",
    ),
    "v2: without the machine's own file": (
        {"proc/self/cgroup": "0::/a\n"} | v2("/a", 8 * GiB, 3 * GiB),
        5 * GiB,
        "the control group {mount}/a",
    ),
    "v2: the usage cannot be read": (
        machine("0::/a\n") | {"cgroup/a/memory.max": 8 * GiB},
        MACHINE,
        "the machine's available memory",
    ),
    "v1: the own group": (
        machine(V1_SYSTEMD) | v1("/a/b", 8 * GiB, 3 * GiB) | v1("/a", V1_UNLIMITED, 4 * GiB),
        5 * GiB,
        "the control group {mount}/memory/a/b",
    ),
    "v1: an ancestor is tighter": (
        machine(V1_SYSTEMD) | v1("/a/b", V1_UNLIMITED, 3 * GiB) | v1("/a", 9 * GiB, 6 * GiB),
        3 * GiB,
        "the control group {mount}/memory/a",
    ),
    "v1: no limit": (
        machine(V1_SYSTEMD, "") | v1("/a/b", V1_UNLIMITED, 3 * GiB) | v1("", V1_UNLIMITED, 4 * GiB),
        None,
        "",
    ),
    "v1: memory beside another controller": (
        machine(V1_SHARED) | v1("/a/b", 8 * GiB, 3 * GiB),
        5 * GiB,
        "the control group {mount}/memory/a/b",
    ),
    "v1: other controllers' groups are no memory groups": (
        machine("4:cpu:/a\n5:memory:/\n") | v1("/a", GiB, 0),
        MACHINE,
        "the machine's available memory",
    ),
    "v1: a container whose path is the host's": (
        machine("4:memory:/docker/123\n") | v1("", 8 * GiB, 3 * GiB),
        5 * GiB,
        "the control group {mount}/memory",
    ),
    "v1: inactive files of the group and all below it can be reclaimed": (
        machine(V1_SYSTEMD)
        | v1("/a/b", 8 * GiB, 7 * GiB, f"inactive_file 5\ntotal_inactive_file {2 * GiB}\nhierarchical 3\n"),
        3 * GiB,
        "the control group {mount}/memory/a/b",
    ),
    "v1 and v2 at once: memory is v1's": (
        machine(V1_SYSTEMD + "0::/a/b\n") | v1("/a/b", 8 * GiB, 3 * GiB),
        5 * GiB,
        "the control group {mount}/memory/a/b",
    ),
    "a path with colons": (
        machine("0::/a:b:c\n") | v2("/a:b:c", 8 * GiB, 3 * GiB),
        5 * GiB,
        "the control group {mount}/a:b:c",
    ),
    "above the mount nobody looks": (
        machine("0::/a\n")
        | {"memory.max": 5, "memory.current": 0}
        | {"cgroup/a/memory.max": "max", "cgroup/a/memory.current": 9},
        MACHINE,
        "the machine's available memory",
    ),
}


def plant(root: Path, files: Mapping[str, object]) -> tuple[Path, Path]:
    """Write files; the folders that stand for /proc and /sys/fs/cgroup."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text if isinstance(text, str) and text.endswith("\n") else f"{text}\n")
    return root / "proc", root / "cgroup"


@pytest.mark.parametrize("situation", LIMITS)
def test_the_tightest_limit_is_found(situation: str, tmp_path: Path) -> None:
    files, available, source = LIMITS[situation]
    proc, mount = plant(tmp_path, files)
    expected = None if available is None else Limit(available, source.format(mount=mount))
    assert host_limit(proc, mount) == expected


def test_a_file_that_may_not_be_read_is_no_limit(tmp_path: Path) -> None:
    """A folder in its place fails for root, too."""
    proc, mount = plant(tmp_path, machine("0::/a\n") | {"cgroup/a/memory.current": 5})
    (mount / "a" / "memory.max").mkdir()
    assert host_limit(proc, mount) == Limit(MACHINE, "the machine's available memory")


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="not Linux")
def test_this_machine_has_a_limit_within_its_memory() -> None:
    limit = host_limit()
    total = re.search(r"MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert limit is not None
    assert total is not None
    assert 0 < limit.available < int(total[1]) * 1024


def test_more_than_there_is_is_refused_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "host_limit", lambda: Limit(3 * GiB, "the control group /jail"))
    require_host(3 * GiB, "paged optimizer state")
    message = (
        "paged optimizer state needs 4.5 GiB of host memory, and 3.0 GiB can still be taken (the control "
        "group /jail): use 8-bit state, raise that limit, or free host memory"
    )
    with pytest.raises(MemoryError, match=f"^{re.escape(message)}$"):
        require_host(9 * GiB // 2, "paged optimizer state")
    with pytest.raises(MemoryError, match="of host memory"):
        require_host(3 * GiB + 1, "paged optimizer state")


def test_without_a_limit_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "host_limit", lambda: None)
    require_host(1 << 70, "anything")
