"""What one of several ranks has of a model, for plans: its shard, and what is gathered for a moment."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from adamw_triton.choices import SHARDINGS, check_word

# The command line shows its help without torch.
if TYPE_CHECKING:
    from torch import Tensor

    from adamw_triton.selection.selector import Trained

_LAYER = re.compile(r"(.*?\.\d+)\.")


class Share(NamedTuple):
    """How a rank trains beside others."""

    ranks: int = 1
    sharding: str = "full"

    @property
    def cuts(self) -> int:
        """Parts of each parameter."""
        return self.ranks if self.sharding == "full" else 1

    def check(self, gradient_release: bool) -> None:
        """
        Raises:
            ValueError: nobody can train so.
        """
        check_word("sharding", self.sharding, SHARDINGS)
        if self.ranks > 1 and gradient_release:
            raise ValueError(f"gradient_release=True is for one process, and ranks={self.ranks}")

    def of(self, nbytes: int) -> int:
        """Bytes of a tensor that are on one rank, at most."""
        return -(-nbytes // self.cuts)

    def trained(self, whole: Trained, tensor: Tensor) -> Trained:
        """A parameter's part, cut between its rows."""
        if self.cuts == 1:
            return whole
        here = -(-whole.numel // self.cuts)
        row = tensor.shape[1:].numel() if tensor.dim() > 1 else 1
        return whole._replace(numel=here, elsewhere=whole.numel - here, uncut=row)

    def spent(self, named: Iterable[tuple[str, Tensor]]) -> tuple[tuple[str, int], ...]:
        """Bytes beside what stays on each rank, and what for. FSDP2 has whole what is in no layer, gathers a
        layer while it still has another, and has the gradients of one before they are shared out; DDP copies
        gradients into buckets."""
        found: dict[str, int] = defaultdict(int)
        trained = 0
        for name, tensor in named:
            layer = _LAYER.match(name)
            found[layer[1] if layer else ""] += tensor.nbytes
            trained += tensor.nbytes * tensor.requires_grad
        if self.ranks == 1:
            return ()
        if self.sharding == "none":
            return (("buckets of gradients", trained),)
        rest = found.pop("", 0)
        largest = max(found.values(), default=0)
        return (("gathered layers", rest + 2 * largest + max(rest, largest)),)

    def notes(self) -> tuple[str, ...]:
        """For people."""
        if self.ranks == 1:
            return ()
        how = "parameters, gradients and state in shards" if self.cuts > 1 else "replicas"
        return (f"This is one of {self.ranks} ranks ({how}), and all share the host's memory evenly.",)
