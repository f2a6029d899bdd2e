"""A kernel compiled for a target, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass

from bench.machine_code.account import Account


@dataclass(frozen=True)
class Case:
    """One kernel for one target. Names only, so that it travels between processes."""

    kernel: str
    params: str
    grads: str
    target: str

    @property
    def label(self) -> str:
        """The kernel and its types, for a table."""
        return f"{self.kernel} {self.params}/{self.grads}"


@dataclass(frozen=True)
class Row:
    """What became of one case: an account, or the reason why there is none."""

    case: Case
    judged: bool  # ours; a peer stands beside for comparison
    account: Account | None = None
    failure: str | None = None
    misses: tuple[str, ...] = ()
    to_move: float = 0.0  # bytes that the step has to load and store for an element

    @property
    def missed(self) -> bool:
        """Whether a goal is missed: a peer has none."""
        return self.judged and bool(self.failure or self.misses)

    @property
    def verdict(self) -> str:
        """One phrase for a table."""
        return self.failure or "; ".join(self.misses) or ("ok" if self.judged else "peer")
