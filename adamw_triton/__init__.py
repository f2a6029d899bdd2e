"""AdamW with 32-bit or blockwise 8-bit state, in Triton kernels."""

from adamw_triton._version import __version__
from adamw_triton.optimizer import AdamW
from adamw_triton.planning import plan
from adamw_triton.plans import Plan

__all__ = ["AdamW", "Plan", "__version__", "plan"]
