"""Real text that every machine already has: the sources of Python's own standard library."""

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from adamw_triton.demo import DemoError

# Installed packages differ between machines; tests and their data are not code worth imitating.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


def load_corpus(max_bytes: int = 16 << 20, root: Path | None = None) -> Tensor:
    """Python sources below `root` (default: the standard library) as uint8 [at most max_bytes].

    Files are joined in the order of their sorted paths, so one Python version always gives the
    same bytes.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    text = bytearray()
    for path in _source_files(root):
        if len(text) >= max_bytes:
            break
        text += path.read_bytes()
    if not text:
        raise DemoError(f"no Python sources found in {root}: this Python has no standard library to read")
    return torch.frombuffer(text[:max_bytes], dtype=torch.uint8)


def _source_files(root: Path) -> list[Path]:
    return sorted(
        path for path in root.rglob("*.py") if _SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts)
    )


def split(corpus: Tensor, validation_fraction: float = 0.1) -> tuple[Tensor, Tensor]:
    """`corpus` cut in two: (train, validation), the validation text being the end of it."""
    cut = len(corpus) - int(len(corpus) * validation_fraction)
    return corpus[:cut], corpus[cut:]


class Batches(Iterator[tuple[Tensor, Tensor]]):
    """Endless random windows of `data`: (inputs, targets), both int64 [batch, context].

    targets[:, i] is the byte that follows inputs[:, i]. The same seed gives the same batches
    on every device: the positions are drawn on the CPU.
    """

    def __init__(
        self, data: Tensor, batch: int, context: int, seed: int, device: torch.device | str = "cpu"
    ) -> None:
        if len(data) <= context:
            raise ValueError(f"a context of {context} bytes needs more text than {len(data)} bytes")
        self.data = data
        self.batch = batch
        self.device = device
        self._window = torch.arange(context + 1)
        self._generator = torch.Generator().manual_seed(seed)

    def __next__(self) -> tuple[Tensor, Tensor]:
        last_start = len(self.data) - len(self._window)
        starts = torch.randint(last_start + 1, (self.batch, 1), generator=self._generator)
        windows = self.data[starts + self._window].to(self.device, torch.int64)
        return windows[:, :-1], windows[:, 1:]
