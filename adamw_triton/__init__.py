"""AdamW with 32-bit or blockwise 8-bit state, in Triton kernels."""

import importlib
from typing import TYPE_CHECKING, Any

from adamw_triton._version import __version__

if TYPE_CHECKING:
    from adamw_triton.grouping import param_groups
    from adamw_triton.optimizer import AdamW
    from adamw_triton.selection.planning import plan
    from adamw_triton.selection.plans import Plan

__all__ = ["AdamW", "Plan", "__version__", "param_groups", "plan"]

# Imported when asked for: the command line shows its help without torch.
_HOMES = {
    "AdamW": "optimizer",
    "Plan": "selection.plans",
    "param_groups": "grouping",
    "plan": "selection.planning",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(f"adamw_triton.{_HOMES[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
