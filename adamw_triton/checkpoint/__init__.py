"""State in and out of the optimizer.

``dialects`` is the table of what AdamW optimizers call their state and how they code it, ``entries`` reads
one parameter's by it; ``loading`` checks a whole state_dict and places it into the flat buffers; ``saving``
makes one; ``files`` reads and writes them, and ``conversion`` makes one file of another.
"""

from adamw_triton.checkpoint.loading import Reader, place, unbox
from adamw_triton.checkpoint.saving import STATE_FORMATS, Writer

__all__ = ["STATE_FORMATS", "Reader", "Writer", "place", "unbox"]
