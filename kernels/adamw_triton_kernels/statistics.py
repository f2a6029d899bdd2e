"""What an update leaves of itself for statistics: sums over the elements of each tensor. In Triton:
``statistic_kernels.py``.

Of each tensor a row of ``WIDTH`` fp32 numbers. They are added up, but for the last two, of which the largest
counts; so whatever a tensor is cut into, chunks, pages or shards, its row is made of theirs.
"""

from __future__ import annotations

SUMS = (
    "gradient",  # g*g, of what the update takes: unscaled, clipped
    "weight",  # p*p, before
    "change",  # the square of m/(sqrt(v)+eps) + decay*p: times the step size, what is taken from p
    "exp_avg",  # m*m, after
    "exp_avg_sq",  # v, after
    "lost",  # p is what it was, though the change times the step size is not 0
    "nan",  # of gradients
    "inf",
    # Of 8-bit state, of the elements whose index in the state divides by SAMPLED:
    "top",  # v's codes that are 255
    "bottom",  # 1
    "stalled",  # the same, though v has changed
    "zero",  # m's codes that are 0
)
LARGEST = ("exp_avg_sq_max", "factor")
COLUMN = {name: column for column, name in enumerate((*SUMS, *LARGEST))}
WIDTH = 16
"""Columns of a row; what is beyond the names is unused."""
SAMPLED = 4
"""One code in so many is looked at: of all, it would be more work than all the rest."""
