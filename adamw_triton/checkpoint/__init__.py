"""State in and out of the optimizer.

``dialects`` is the table of what AdamW optimizers call and how they code their state; ``loading`` checks a
whole state_dict and places it into the flat buffers; ``saving`` makes one; ``files`` reads and writes them.
"""

from adamw_triton.checkpoint.loading import Reader, place, unbox
from adamw_triton.checkpoint.saving import STATE_FORMATS, Writer

__all__ = ["STATE_FORMATS", "Reader", "Writer", "place", "unbox"]
