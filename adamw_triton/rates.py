"""Bandwidths, for estimates: of a GPU's memory, and of its link to the host."""

from __future__ import annotations

from typing import NamedTuple

import torch

from adamw_triton.cards import find_card


class Rates(NamedTuple):
    bandwidth: float
    """Bytes a second of the device's own memory."""
    link: float
    """Bytes a second from and to the host, each way while both run."""
    source: str


CPU = Rates(10e9, 10e9, "a guess for a CPU")
UNKNOWN = Rates(500e9, 18e9, "a guess: the card is in no table")


def known(device: torch.device) -> Rates:
    """By the card's name, without measuring."""
    return named(torch.cuda.get_device_name(device)) if device.type == "cuda" else CPU


def named(card: str) -> Rates:
    """From the table of cards."""
    try:
        found = find_card(card)
    except ValueError:
        return UNKNOWN
    return Rates(found.bandwidth, found.link, f"known of the {found.name}")
