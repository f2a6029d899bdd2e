"""``python -m docs.draw``: the pictures of README.md and docs/, from what the code here computes. They are
text, so that a test can compare."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape

from torch import Tensor

from adamw_triton.cli import main as command_line
from adamw_triton.paging.pager import Pager
from adamw_triton.selection.cards import find_card
from adamw_triton.state import placement
from adamw_triton.state.buffers import Page
from bench.simulated import Clock, TimedDevice
from bench.suites import hidden
from bench.suites.limit import LLAMA_8B

Span = tuple[float, float]
"""Seconds, from and to."""
PICTURES = Path(__file__).resolve().parent / "pictures"
GIB = 1 << 30
PARAMETERS = 8_030_261_248
"""Of Llama-3.1-8B."""
CARD = 24
"""GiB of a 3090, a 4090: a line in the picture."""
COLOURS = {"weights": "#4c6a92", "gradients": "#d99a3c", "activations": "#9aa5b1", "state": "#b5532a"}
PEERS = {"torch fused, bf16 state": 4.0, "bitsandbytes 8-bit": 2.03125, "bitsandbytes paged 8-bit": 0.0}
"""Bytes of state a parameter on the GPU. torch's has the dtype of the weights."""
FLASH = "flashoptim 8-bit, released"
"""The gradients that are there at one time are counted as ours."""
OURS = {"32bit": 8.0, "8bit": 2.03125}
INK, FAINT, PAPER = "#222", "#ccc", "#fdfdfb"


def planned(*arguments: str) -> dict[str, dict[str, int]]:
    """What ``adamw-triton plan`` counts of Llama-3.1-8B, one checkpointed sequence of 2,048 tokens: what is
    spent beside state; by variant what state takes on the GPU."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(LLAMA_8B))
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            command_line(["plan", folder, "--gpu", "4090", "--host-memory", "64GiB", "--json", *arguments])
    plan = json.loads(out.getvalue())["plan"]
    return {
        "spent": plan["devices"][0]["spent"],
        "state": {
            each["variant"]: each["gpu_bytes"]
            for each in plan["candidates"]
            if each["weights"] == "exact" and not each["name"].endswith("partly paged")
        },
    }


def bars() -> dict[str, dict[str, float]]:
    """GiB on the GPU, by optimizer and by what takes them."""
    spent, released = planned()["spent"], planned("--release")
    plain = {name: spent[name] / GIB for name in ("weights", "gradients", "activations")}
    few = {
        "weights": released["spent"]["weights"] / GIB,
        "gradients": released["spent"]["gradients at one time"] / GIB,
        "activations": released["spent"]["activations"] / GIB,
    }
    found = {name: plain | {"state": PARAMETERS * each / GIB} for name, each in (PEERS | OURS).items()}
    ring = placement.STAGES * placement.PAGE_BYTES / GIB
    found["paged_8bit"] = plain | {"state": ring}
    found[FLASH] = few | {"state": PARAMETERS * 2.125 / GIB}
    found["paged_8bit, gradient_release, exact weights"] = few | {
        "state": released["state"]["paged_8bit"] / GIB
    }
    return found


def memory() -> str:
    """Llama-3.1-8B, all weights trained."""
    rows, left, scale, high = bars(), 300, 5.0, 30
    most = max(sum(parts.values()) for parts in rows.values())
    svg = Svg(int(left + scale * most + 70), 96 + high * len(rows))
    svg.text(16, 26, "GPU memory to train all of Llama-3.1-8B in bf16, GiB", size=16, weight="bold")
    for at, (name, colour) in enumerate(COLOURS.items()):
        svg.box(16 + 110 * at, 40, 12, 12, colour)
        svg.text(33 + 110 * at, 51, name)
    limit, bottom = left + scale * CARD, 66 + high * len(rows)
    svg.line(limit, 60, limit, bottom, INK, dashed=True)
    svg.text(limit, bottom + 16, "24 GB", anchor="middle")
    for index, (name, parts) in enumerate(rows.items()):
        top, x = 66 + high * index, float(left)
        ours = name not in PEERS and name != FLASH
        label = f"adamw_triton {name}" if ours else name
        if label.endswith("exact weights"):
            label = "paged_8bit, released, exact weights"
        svg.text(left - 10, top + 15, label, anchor="end", weight="bold" if ours else "normal")
        for part, colour in COLOURS.items():
            svg.box(x, top, scale * parts[part], high - 9, colour)
            x += scale * parts[part]
        svg.box(x + 4, top + 2, 32, 17, PAPER)
        svg.text(x + 6, top + 15, f"{sum(parts.values()):.1f}")
    return svg.done()


@dataclass
class Recorder(Clock):
    """A clock that remembers when it was busy."""

    spans: list[Span] = field(default_factory=list)

    def take(self, seconds: float) -> None:
        self.spans.append((self.now, self.now + seconds))
        super().take(seconds)


def recording(link: float) -> TimedDevice:
    device = TimedDevice(link)
    device.compute, device.beside = Recorder(), Recorder()
    device.inbound, device.outbound = Recorder(link), Recorder(link)
    return device


LAYERS, TOKENS = 1, 2048


def walked(released: bool) -> dict[str, list[Span]]:
    """When each stream is busy in the second of two steps of a model of one layer: 8-bit state and exact
    weights, all paged, on a 4090."""
    machine = hidden.MACHINES[1]
    card = find_card(machine.card)
    parts = hidden.buckets(hidden.shapes(LLAMA_8B | {"num_hidden_layers": LAYERS, "vocab_size": 16_384}))
    device = recording(card.link)
    pager = Pager(device, "copy", beside=released)
    buffer = parts[0].pages[0].buffer
    ring = placement.ring_for([(buffer.format, buffer.numel)], placement.PAGE_BYTES)
    updates = device.beside if released else device.compute

    def update(page: Page) -> Callable[[Mapping[str, Tensor]], None]:
        moved = sum(2 * array.nbytes for array in page.arrays().values()) + 6 * (page.stop - page.start)
        return lambda _: updates.take(moved / card.bandwidth)

    def step(pages: Sequence[Page]) -> None:
        work = [(page, update(page)) for page in pages]
        pager.prepare(work, ring)
        pager.walk(work)

    forward = 2 * sum(part.elements for part in parts) * TOKENS / machine.flops
    begin, models = 0.0, []
    for _ in range(2):
        begin = device.compute.now
        models = [(begin, begin + forward)]
        device.compute.now += forward
        for index, part in enumerate(parts):
            took = 3 * forward * part.elements / sum(each.elements for each in parts)
            models.append((device.compute.now, device.compute.now + took))
            device.compute.now += took
            if released:
                step(part.pages)
                pager.fetch(parts[(index + 1) % len(parts)].pages)
        if released:
            pager.join()
        else:
            step([page for part in parts for page in part.pages])
    arrays = len(parts[0].pages[0].arrays())
    spans = {
        "inbound": _pages(device.inbound, arrays),
        "updates": updates.spans,
        "outbound": _pages(device.outbound, arrays),
    }
    return {
        "forward": [(a - begin, b - begin) for a, b in models[:1]],
        "backward": [(a - begin, b - begin) for a, b in models[1:]],
        **{name: _since(begin, found) for name, found in spans.items()},
    }


def _pages(copies: Recorder, arrays: int) -> list[Span]:
    """Of the copies of each page's arrays, the first's begin and the last's end."""
    return [
        (first[0], last[1])
        for first, last in zip(copies.spans[::arrays], copies.spans[arrays - 1 :: arrays], strict=True)
    ]


def _since(begin: float, spans: Sequence[Span]) -> list[Span]:
    return [(max(a, begin) - begin, b - begin) for a, b in spans if b > begin]


STREAMS = {"pages in": ("inbound",), "GPU": ("forward", "backward", "updates"), "pages out": ("outbound",)}
TINTS = {
    "inbound": "#4c6a92", "forward": "#9aa5b1", "backward": "#c9ced4", "updates": "#b5532a",
    "outbound": "#d99a3c",
}  # fmt: skip


def paging() -> str:
    """A step by itself, and beside backward."""
    both = {"after backward": walked(False), "gradient_release: beside backward": walked(True)}
    end = max(b for found in both.values() for spans in found.values() for _, b in spans)
    left, wide = 90, 660
    svg = Svg(left + wide + 20, 330)
    svg.text(
        16, 26, "One step, its state paged: a model with one layer of Llama-3.1-8B", size=16, weight="bold"
    )
    for index, (title, found) in enumerate(both.items()):
        top = 58 + 128 * index
        svg.text(left, top - 6, title, weight="bold")
        streams = dict(STREAMS)
        if index:
            streams = {"pages in": ("inbound",), "GPU": ("forward", "backward"), "beside": ("updates",)}
            streams["pages out"] = ("outbound",)
        for row, (name, kinds) in enumerate(streams.items()):
            y = top + 24 * row
            svg.text(left - 10, y + 14, name, anchor="end")
            svg.line(left, y + 19, left + wide, y + 19, FAINT)
            for kind in kinds:
                for a, b in found[kind]:
                    width = max(1.0, wide * (b - a) / end - 0.6)
                    svg.box(left + wide * a / end, y, width, 18, TINTS[kind])
    for at, (kind, colour) in enumerate(TINTS.items()):
        svg.box(left + 120 * at, 298, 12, 12, colour)
        label = {"inbound": "page in", "outbound": "page out", "updates": "update"}.get(kind, kind)
        svg.text(left + 17 + 120 * at, 309, label)
    svg.text(left + wide, 26, f"{1e3 * end:.0f} ms", anchor="end")
    return svg.done()


class Svg:
    """Boxes, lines and words on a paper of their own colour: readable on any page."""

    def __init__(self, width: int, height: int) -> None:
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" font-family="sans-serif" font-size="13" fill="{INK}">',
            f'<rect width="{width}" height="{height}" rx="6" fill="{PAPER}"/>',
        ]

    def box(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        size = f'width="{width:.1f}" height="{height:.1f}"'
        self._parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" {size} fill="{colour}"/>')

    def line(self, x: float, y: float, to_x: float, to_y: float, colour: str, dashed: bool = False) -> None:
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        ends = f'x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}"'
        self._parts.append(f'<line {ends} stroke="{colour}"{dash}/>')

    def text(
        self, x: float, y: float, words: str, anchor: str = "start", size: int = 13, weight: str = "normal"
    ) -> None:
        how = f'text-anchor="{anchor}" font-size="{size}" font-weight="{weight}"'
        self._parts.append(f'<text x="{x:.1f}" y="{y:.1f}" {how}>{escape(words)}</text>')

    def done(self) -> str:
        return "\n".join([*self._parts, "</svg>"]) + "\n"


DRAWN: dict[str, Callable[[], str]] = {"memory": memory, "paging": paging}


def pictures() -> Iterator[tuple[Path, str]]:
    for name, draw in DRAWN.items():
        yield PICTURES / f"{name}.svg", draw()


if __name__ == "__main__":
    for path, text in pictures():
        path.write_text(text)
        print(f"wrote {path}")
