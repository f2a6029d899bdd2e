"""Machine instructions as basic blocks, and the shortest way through the blocks that matter.

Shared by every instruction set: what an instruction does to control flow is decided where its text is
parsed; here there is only the graph.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise


@dataclass(frozen=True)
class Instruction:
    """One machine instruction and where control may go after it."""

    opcode: str
    text: str
    guarded: bool = False  # executes for some lanes only
    jump: str | None = None  # label it may jump to
    falls: bool = True  # may continue with the next instruction
    ends: bool = False  # may end the program
    padding: bool = False  # no work: a NOP or a scheduling hint

    @property
    def leaves(self) -> bool:
        """Whether a basic block ends with this instruction."""
        return self.jump is not None or self.ends or not self.falls


@dataclass
class Block:
    """Instructions that execute together, and the blocks that may follow."""

    index: int
    instructions: list[Instruction] = field(default_factory=list)
    successors: list[int] = field(default_factory=list)
    ends: bool = False

    @property
    def size(self) -> int:
        """Instructions that do work."""
        return sum(not instruction.padding for instruction in self.instructions)


class Graph:
    """The control-flow graph of one kernel; block 0 is its entry."""

    def __init__(self, listing: Iterable[str | Instruction]) -> None:
        """Cut a listing, in which a ``str`` is a label, into blocks and connect them."""
        self.blocks = [Block(0)]
        labels: dict[str, int] = {}
        for item in listing:
            current = self.blocks[-1]
            after_jump = bool(current.instructions) and current.instructions[-1].leaves
            if after_jump or (isinstance(item, str) and current.instructions):
                current = Block(len(self.blocks))
                self.blocks.append(current)
            if isinstance(item, str):
                labels[item] = current.index
            else:
                current.instructions.append(item)
        for block in self.blocks:
            self._connect(block, labels)

    def _connect(self, block: Block, labels: dict[str, int]) -> None:
        last = block.instructions[-1] if block.instructions else Instruction("", "")
        block.ends = last.ends
        if last.falls and block.index + 1 < len(self.blocks):
            block.successors.append(block.index + 1)
        if last.jump is not None:
            if last.jump not in labels:
                raise ValueError(f"jump to an unknown label: {last.text}")
            block.successors.append(labels[last.jump])

    def reachable(self) -> list[Block]:
        """The blocks that control can get to from the entry, in address order."""
        return [self.blocks[index] for index in sorted({0, *self._distances(0)[0]})]

    def route(self, anchors: Sequence[Block]) -> list[Block]:
        """The fewest instructions through `anchors` in order: once round their loop if there is one.

        Without a loop that contains them all: once round the loop of the first, and without that
        (straight-line code) from the entry to an end of the program.
        """
        stops = [anchors[0], *(b for a, b in pairwise(anchors) if a is not b)]
        for loop in (stops, stops[:1]):
            cycle = self._walk([*loop, loop[0]])
            if cycle is not None:
                return cycle[:-1]
        path = self._walk(stops if stops[0].index == 0 else [self.blocks[0], *stops])
        tail = [] if stops[-1].ends else self._way_out(stops[-1])
        if path is None or tail is None:
            raise ValueError("no path from the entry through the main loads and stores to an end")
        return [*path, *tail]

    def _walk(self, stops: Sequence[Block]) -> list[Block] | None:
        """The shortest walk that visits `stops` in order, first and last included."""
        walk = [stops[0]]
        for start, stop in pairwise(stops):
            distance, previous = self._distances(start.index)
            if stop.index not in distance:
                return None
            walk += self._trace(previous, start.index, stop.index)
        return walk

    def _way_out(self, start: Block) -> list[Block] | None:
        """The shortest walk from behind `start` to a block that may end the program."""
        distance, previous = self._distances(start.index)
        ends = [index for index in distance if self.blocks[index].ends]
        if not ends:
            return None
        return self._trace(previous, start.index, min(ends, key=distance.__getitem__))

    def _distances(self, start: int) -> tuple[dict[int, int], dict[int, int]]:
        """Instructions from behind block `start` to the end of each other block (Dijkstra), and predecessors.

        `start` itself is among them only if a cycle leads back to it.
        """
        distance: dict[int, int] = {}
        previous: dict[int, int] = {}
        queue = [(self.blocks[index].size, index, start) for index in self.blocks[start].successors]
        heapq.heapify(queue)
        while queue:
            cost, index, source = heapq.heappop(queue)
            if index in distance:
                continue
            distance[index], previous[index] = cost, source
            for successor in self.blocks[index].successors:
                heapq.heappush(queue, (cost + self.blocks[successor].size, successor, index))
        return distance, previous

    def _trace(self, previous: dict[int, int], start: int, stop: int) -> list[Block]:
        walk = [self.blocks[stop]]
        while previous[walk[-1].index] != start:
            walk.append(self.blocks[previous[walk[-1].index]])
        return walk[::-1]
