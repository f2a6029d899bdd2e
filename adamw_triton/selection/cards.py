"""What is known of GPUs that are not here: memory, and how fast it and the host link are.

``memory`` is what torch reports as the card's total, which is less than what is printed on the box; the
source of each is an out-of-memory message in a public issue, named beside it, unless it says "estimated".

``bandwidth`` is achieved, not peak: measured by the source named, else estimated at 88 to 92% of the peak.
``link`` is the rate each way while both directions run. It was measured only for the A100 (nvbandwidth#11:
24 GB/s one way, 12 the other, so pages of equal size go at 16.2 each way) and, by us, for the H100 (47.8
each way, ``bench/results/cuda-nvidia-h100-80gb-hbm3/paged.md``); of the others it is estimated from the
generation and width of the link. ``flops`` are by the makers' data sheets. `adamw-triton doctor` measures a
card that is here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import NamedTuple

from adamw_triton.memory.units import format_bytes, parse_bytes

SMALLEST = 64 << 20
"""Bytes; no GPU has less."""
GIB = 1 << 30
GB = 10**9

PCIE3, PCIE4, PCIE5 = 11 * GB, 18 * GB, 47 * GB
"""Bytes a second each way, both ways at once, over 16 lanes; estimated."""
PCIE4_X8 = PCIE4 // 2
PCIE4_A100 = int(16.2 * GB)
NVLINK_C2C = 170 * GB


class Card(NamedTuple):
    """A GPU as its driver shows it; bytes, and bytes a second."""

    name: str
    memory: int
    bandwidth: int
    link: int
    flops: float
    """Operations a second of 16-bit matrix products with fp32 sums, dense: the peak."""
    source: str
    """Of ``memory``; then of ``bandwidth``."""


def _card(
    name: str, gib: float, gb_per_s: int, link: int, tflops: int, memory_from: str, bandwidth_from: str
) -> Card:
    return Card(name, int(gib * GIB), gb_per_s * GB, link, tflops * 1e12, f"{memory_from}; {bandwidth_from}")


GUESS = "estimated"
CARDS = (
    _card("T4", 14.56, 250, PCIE3, 65, "CatVTON#133", GUESS),
    _card("P100", 15.9, 640, PCIE3, 19, GUESS, GUESS),
    _card("V100-16GB", 15.75, 790, PCIE3, 125, GUESS, GUESS),
    _card("V100-32GB", 31.74, 790, PCIE3, 125, "ChatGLM-Finetuning#73", GUESS),
    _card("RTX 2080 Ti", 10.75, 550, PCIE3, 54, GUESS, GUESS),
    _card("RTX 3060", 11.75, 325, PCIE4, 26, "dreambooth-gui#78", GUESS),
    _card("RTX 3080", 9.7, 690, PCIE4, 60, GUESS, GUESS),
    _card("RTX 3090", 23.69, 860, PCIE4, 71, "stanford_alpaca#76, DSP#10", GUESS),
    _card("RTX 4060", 7.72, 245, PCIE4_X8, 30, "TSGS#6", GUESS),
    _card("RTX 4060 Ti 16GB", 15.6, 260, PCIE4_X8, 44, GUESS, GUESS),
    _card("RTX 4070", 11.6, 455, PCIE4, 58, GUESS, GUESS),
    _card("RTX 4080", 15.6, 650, PCIE4, 97, GUESS, GUESS),
    _card("RTX 4090", 23.52, 922, PCIE4, 165, "SoulX-FlashTalk#5", "tinygrad#6, clpeak#106"),
    _card("RTX 5090", 31.36, 1610, PCIE5, 209, "TrajectoryCrafter#20", GUESS),
    _card("RTX A6000", 47.4, 690, PCIE4, 155, GUESS, GUESS),
    _card("RTX 6000 Ada", 44.43, 865, PCIE4, 364, "MTVCrafter#21", GUESS),
    _card("A10", 21.99, 540, PCIE4, 125, "CogVLM#236", GUESS),
    _card("A10G", 21.99, 540, PCIE4, 70, GUESS, GUESS),
    _card("L4", 22.03, 265, PCIE4, 121, "evo2#190", GUESS),
    _card("L40S", 44.4, 805, PCIE4, 362, "Eagle#68 (L40)", "RRZE gpu-benches (L40)"),
    _card("A100-40GB", 39.5, 1370, PCIE4_A100, 312, "CoSeR#10", GUESS),
    _card("A100-80GB", 79.25, 1760, PCIE4_A100, 312, "Vad-R1#11", "RRZE gpu-benches"),
    _card("H100 SXM", 79.11, 3000, PCIE5, 989, "vllm#27508", "cuda-samples#392"),
    _card("GH200 480GB", 94.5, 3650, NVLINK_C2C, 989, GUESS, "RRZE gpu-benches"),
    _card("H200", 139.0, 4300, PCIE5, 989, GUESS, GUESS),
    _card("B200", 178.35, 6600, PCIE5, 2250, "ao#4002", GUESS),
    _card("MI300X", 191.0, 4030, PCIE5, 1307, GUESS, "RRZE gpu-benches"),
)

# Makers, brands and connectors, which some spell out and others leave away.
_NOISE = re.compile(r"nvidia|amd|geforce|tesla|instinct|quadro|[rg]tx|sxm\d?|pcie|hbm\d?e?|gpu|generation")
_SIZE = re.compile(r"(\d{1,4})gi?b?")


def find_card(name: str) -> Card:
    """The card that ``name`` means: ``"T4"``, ``"rtx3090"``, or a driver's ``"NVIDIA A100-SXM4-80GB"``.

    Raises:
        ValueError: none is known by this name, or several; it tells the nearest.
    """
    model, size = _key(name)
    known: dict[str, list[Card]] = {}
    for card in CARDS:
        known.setdefault(_key(card.name)[0], []).append(card)
    found = [card for card in known.get(model, ()) if _fits(card, size)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{name!r} is several GPUs: say {_either(found)}")
    nearest = difflib.get_close_matches(model, known, n=3, cutoff=0.5)
    near = [card for key in nearest for card in known[key]]
    hint = f"did you mean {_either(near)}?" if near else f"known are {', '.join(card.name for card in CARDS)}"
    raise ValueError(f"unknown GPU {name!r}: {hint}")


def parse_gpu(value: int | str, name: str) -> Card | int:
    """The card that is meant, or bytes of memory; ``name`` is the argument's. A number without a unit is that
    of a card, as in ``"4090"``, before it is bytes.

    Raises:
        ValueError: it is neither, or less memory than any GPU has.
    """
    if isinstance(value, str):
        try:
            return find_card(value)
        except ValueError as error:
            if value.lstrip()[:1] not in tuple("+-.0123456789"):
                raise ValueError(f"Invalid {name}: {error}; or give its memory, like '24GiB'") from None
    size = parse_bytes(value, name)
    if size < SMALLEST:
        raise ValueError(f"Invalid {name}: {value!r} means {format_bytes(size)}, and no GPU has so little")
    return size


def _key(name: str) -> tuple[str, int | None]:
    """What tells models apart, and the gigabytes if the name says them."""
    words = [_NOISE.sub("", word) for word in re.split(r"[^a-z0-9]+", name.lower())]
    sizes = [int(found[1]) for word in words if (found := _SIZE.fullmatch(word))]
    return "".join(word for word in words if not _SIZE.fullmatch(word)), sizes[0] if sizes else None


def _fits(card: Card, gigabytes: int | None) -> bool:
    """Whether the card may be sold with so much memory: drivers keep up to a tenth for themselves."""
    if gigabytes is None or gigabytes == _key(card.name)[1]:
        return True
    return card.memory <= gigabytes * GIB <= 1.1 * card.memory


def _either(cards: Sequence[Card]) -> str:
    *others, last = [repr(card.name) for card in cards]
    return f"{', '.join(others)} or {last}" if others else last
