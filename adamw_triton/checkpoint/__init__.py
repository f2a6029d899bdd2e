"""State in and out of the optimizer.

``dialects`` is the table of what AdamW optimizers call their state and how they code it, ``entries`` reads
one parameter's by it; ``loading`` checks a whole state_dict; ``arrivals`` makes of it what the flat buffers
hold, and puts it there; ``saving`` makes one; ``files`` reads and writes them, and ``conversion`` makes one
file of another. ``masters`` are the exact weights, in fp32.
"""

from adamw_triton.checkpoint.arrivals import Arrival, prepare
from adamw_triton.checkpoint.entries import has_state, others_of
from adamw_triton.checkpoint.loading import Reader, check_form, unbox
from adamw_triton.checkpoint.masters import Masters
from adamw_triton.checkpoint.saving import Writer, cut

__all__ = [
    "Arrival",
    "Masters",
    "Reader",
    "Writer",
    "check_form",
    "cut",
    "has_state",
    "others_of",
    "prepare",
    "unbox",
]
