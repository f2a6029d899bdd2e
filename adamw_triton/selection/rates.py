"""Bandwidths, for estimates: of a GPU's memory, and of its link to the host."""

from __future__ import annotations

from typing import NamedTuple

import torch

from adamw_triton.memory.pinned import host_bytes
from adamw_triton.paging import link
from adamw_triton.paging.device import device_for
from adamw_triton.selection.cards import find_card

MEASURED_BYTES = 256 << 20
"""Of each of four buffers: more than any cache holds."""
FEWEST_BYTES = 32 << 20
"""Of fewer, launching a copy takes longer than the copy: 4 MiB gave an H100 a twentieth of its bandwidth."""


class Rates(NamedTuple):
    bandwidth: float
    """Bytes a second of the device's own memory."""
    link: float
    """Bytes a second from and to the host, each way while both run."""
    source: str


CPU = Rates(10e9, 10e9, "a guess for a CPU")
UNKNOWN = Rates(500e9, 18e9, "a guess: the card is in no table")


def known(device: torch.device) -> Rates:
    """By the card's name, without measuring; as measured if that has been done."""
    if device.type != "cuda":
        return CPU
    return _found.get(device) or named(torch.cuda.get_device_name(device))


def named(card: str) -> Rates:
    """From the table of cards."""
    try:
        found = find_card(card)
    except ValueError:
        return UNKNOWN
    return Rates(found.bandwidth, found.link, f"known of the {found.name}")


def measured(device: torch.device) -> Rates:
    """Of a GPU that is here. Takes a fraction of a second, once a process, and an eighth of what is free at
    most; where that is too little, what is known of the card."""
    if device not in _found:
        size = min(MEASURED_BYTES, torch.cuda.mem_get_info(device)[0] // 16)
        if size < FEWEST_BYTES:
            return known(device)
        _found[device] = measure(device, size)
    return _found[device]


def measure(device: torch.device, size: int) -> Rates:
    """With buffers of ``size`` bytes, two on the host and two on the device."""
    hosts = [host_bytes(size, device) for _ in range(2)]
    gpus = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
    streams = device_for(device)
    both = link.measure(streams, hosts, gpus).both
    return Rates(link.copy_rate(streams, gpus), both, "measured")


_found: dict[torch.device, Rates] = {}
