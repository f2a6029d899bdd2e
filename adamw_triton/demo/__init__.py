"""The demo: train a small transformer on real text with every variant, side by side.

Kept light, so that the command line can show its help without importing torch.
"""

STEPS = 300

# The optimizers to stand side by side: torch's own, then ours by variant.
OPTIMIZERS = ("torch", "32bit", "8bit", "paged_32bit", "paged_8bit")


class DemoError(ValueError):
    """The demo cannot run as asked; the message tells the user what to change."""
