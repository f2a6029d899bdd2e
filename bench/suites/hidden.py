"""``python -m bench hidden``: projected, not measured: what paged state adds to a step, by its tokens.

The pager's own schedule on streams that are clocks (``bench.simulated``): Llama-3.1-8B with exact weights and
8-bit state, all of it paged, on links of PCIe 3, 4 and 5. With gradient release pages come and go while
backward runs; else they do when it is over. Compute is taken to run at half of the card's peak, backward with
checkpoints at three times a forward; the host's own time is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adamw_triton.paging.pager import Pager
from adamw_triton.selection.cards import find_card
from adamw_triton.selection.overlap import UTILIZATION
from adamw_triton.state import placement
from adamw_triton.state.buffers import Page, StateBuffer, make_slots
from adamw_triton.state.formats import format_for
from bench import suite
from bench.report import RESULTS, Cell, Table, number
from bench.simulated import TimedDevice
from bench.suites.limit import LLAMA_8B

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOKENS = (2048, 4096, 8192, 16384, 32768, 65536)
STEPS = 4
"""The last one counts: pages of one step still go out while the next has begun."""
GOALS = {2048: 0.5, 8192: 0.1, 32768: 0.02}
"""Of PCIe 4."""


@dataclass(frozen=True)
class Machine:
    """A card by its name, and its link."""

    card: str
    link: str

    @property
    def flops(self) -> float:
        return UTILIZATION * find_card(self.card).flops


MACHINES = (
    Machine("RTX 2080 Ti", "PCIe 3"),
    Machine("RTX 4090", "PCIe 4"),
    Machine("RTX 5090", "PCIe 5"),
)


def shapes(config: Mapping[str, Any]) -> list[int]:
    """Elements of its tensors, in the order in which their gradients come."""
    width, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    kv = width // heads * config["num_key_value_heads"]
    layer = [3 * [width * inner], 2 * [width * width], 2 * [width * kv], 2 * [width]]
    layers = [numel for group in layer for numel in group] * config["num_hidden_layers"]
    ends = [config["vocab_size"] * width]
    return [*ends, width, *layers, *ends]


@dataclass(frozen=True)
class Bucket:
    """What is stepped together: its pages, and its part of the model."""

    pages: list[Page]
    elements: int


def buckets(sizes: Sequence[int]) -> list[Bucket]:
    """As release learns them: up to so many bytes of gradients; their pages as a batch cuts them."""
    params = [torch.empty(numel, dtype=torch.bfloat16, device="meta") for numel in sizes]
    state_format = format_for(1 << 20, 8, dtype=torch.bfloat16, weights="exact")
    meta = torch.device("meta")  # where no page takes memory, and none has to be paged
    slots = make_slots(state_format, [(param, "") for param in params], meta)
    size = placement.page_elements(state_format, placement.PAGE_BYTES)
    found, first, held = [], 0, 0
    for index, slot in enumerate(slots):
        held += 2 * slot.numel
        if held >= placement.BUCKET_BYTES or index == len(slots) - 1:
            begin, end = slots[first].start, slot.start + slot.numel
            elements = sum(each.numel for each in slots[first : index + 1])
            found.append(Bucket(list(_pages(slot.buffer, begin, end, size)), elements))
            first, held = index + 1, 0
    return found


def _pages(buffer: StateBuffer, begin: int, end: int, size: int) -> Iterator[Page]:
    align = buffer.format.alignment
    end = -(-end // align) * align
    for start in range(begin // size * size, end, size):
        yield Page(buffer, max(begin, start), min(end, start + size))


def seconds(machine: Machine, parts: Sequence[Bucket], tokens: int, released: bool) -> tuple[float, float]:
    """Of forward and backward alone, and of a step with the optimizer."""
    card = find_card(machine.card)
    device = TimedDevice(card.link)
    pager = Pager(device, "copy", beside=released)
    elements = sum(part.elements for part in parts)
    forward = 2 * elements * tokens / machine.flops
    buffer = parts[0].pages[0].buffer
    ring = placement.ring_for([(buffer.format, buffer.numel)], placement.PAGE_BYTES)

    def update(page: Page) -> Callable[[Mapping[str, Tensor]], None]:
        moved = sum(2 * array.nbytes for array in page.arrays().values()) + 6 * (page.stop - page.start)
        stream = device.beside if released else device.compute
        return lambda _: stream.take(moved / card.bandwidth)

    def step(part: Sequence[Page]) -> None:
        work = [(page, update(page)) for page in part]
        pager.prepare(work, ring)
        pager.walk(work)

    began = 0.0
    for _ in range(STEPS):
        began = device.compute.now
        device.compute.take(forward)
        for part, following in pairwise([*parts, None]):
            device.compute.take(3 * forward * part.elements / elements)
            if released:
                step(part.pages)
                pager.fetch(following.pages if following else parts[0].pages)
        if released:
            pager.join()
        else:
            step([page for part in parts for page in part.pages])
    return 4 * forward, device.compute.now - began


def project(parts: Sequence[Bucket]) -> dict[str, Any]:
    """By link, way and tokens, what is added as a share."""
    found: dict[str, Any] = {}
    for machine in MACHINES:
        ways: dict[str, dict[int, float]] = {}
        for name, released in (("released", True), ("behind backward", False)):
            of = partial(seconds, machine, parts, released=released)
            ways[name] = {tokens: of(tokens)[1] / of(tokens)[0] - 1 for tokens in TOKENS}
        alone = {tokens: seconds(machine, parts, tokens, True)[0] for tokens in TOKENS}
        found[machine.link] = {"card": machine.card, "alone": alone, **ways}
    return found


def table(found: dict[str, Any]) -> Table:
    rows: list[list[Cell | str]] = []
    for link, of in found.items():
        alone = [f"{number(of['alone'][tokens])} s" for tokens in TOKENS]
        rows.append([f"{link}, {of['card']}: forward and backward", *alone])
        for way in ("behind backward", "released"):
            rows.append([f"{link}, {way}", *(_judged(link, way, t, of[way][t]) for t in TOKENS)])
    columns = ["", *(f"{tokens:,}" for tokens in TOKENS)]
    notes = [
        "projected, not measured: half of the tensor cores' peak, links as in the plan's table of cards",
        "judged: released, PCIe 4: " + ", ".join(f"{goal:.0%} at {t:,}" for t, goal in GOALS.items()),
    ]
    return Table("What paged state adds to a step of Llama-3.1-8B, by its tokens", columns, rows, notes)


def _judged(link: str, way: str, tokens: int, added: float) -> Cell | str:
    text = f"{added:.1%}"
    if link != "PCIe 4" or way != "released" or tokens not in GOALS:
        return text
    return Cell(text, "good" if added <= GOALS[tokens] else "bad")


def figure(found: dict[str, Any]) -> Figure:
    """Shares against tokens, on logarithmic axes."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(7.5, 4.4), layout="constrained")
    axes = drawing.subplots()
    for colour, (link, of) in zip(("#D55E00", "#0072B2", "#009E73"), found.items(), strict=True):
        for way, style in (("behind backward", "--"), ("released", "-")):
            added = [100 * max(1e-4, of[way][tokens]) for tokens in TOKENS]
            axes.plot(TOKENS, added, marker="o", ls=style, color=colour, label=f"{link}, {way}")
    axes.set(xscale="log", yscale="log", xlabel="tokens a step", ylabel="per cent of forward and backward")
    axes.legend(frameon=False, fontsize=8)
    suite.axes_style(axes)
    drawing.suptitle("Projected: what paged state adds, Llama-3.1-8B", x=0.01, ha="left", weight="bold")
    return drawing


def main(argv: Sequence[str]) -> int:
    """Project, show and save; 0 if the goals are met."""
    options = suite.parser("hidden", __doc__).parse_args(argv)
    options.out = options.out or RESULTS / "aot"
    found = project(buckets(shapes(LLAMA_8B)))
    shown = table(found)
    suite.finish("hidden", argv, options, [shown], {"links": found}, lambda: figure(found))
    missed = [cell for row in shown.rows for cell in row if isinstance(cell, Cell) and cell.style == "bad"]
    return int(bool(missed))
