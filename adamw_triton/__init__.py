"""AdamW with 32-bit or blockwise 8-bit state, in Triton kernels."""

from adamw_triton._version import __version__
from adamw_triton.optimizer import AdamW

__all__ = ["AdamW", "__version__"]
