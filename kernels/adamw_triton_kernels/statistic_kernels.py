"""What an update leaves of itself for statistics, in Triton: on a tile, of a chunk, and of a tensor's chunks.
What the columns are, and plain torch: ``statistics.py``.

A thread adds up what it has of its tiles, and a program stores a row; one program a tensor adds these to the
tensor's own. No atomics: the same bits every time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from adamw_triton_kernels.statistics import COLUMN, SUMS, WIDTH
from adamw_triton_kernels.statistics import SAMPLED as _SAMPLED

SAMPLED = tl.constexpr(_SAMPLED)
COLUMNS = tl.constexpr(WIDTH)
ADDED = tl.constexpr(len(SUMS))
NAN = tl.constexpr(COLUMN["nan"])
TOP = tl.constexpr(COLUMN["top"])
HIGHEST = tl.constexpr(COLUMN["exp_avg_sq_max"])
FACTOR = tl.constexpr(COLUMN["factor"])  # the last


@triton.jit
def quarters(x):
    """Every fourth element, four times: neighbours are in one thread, and none moves."""
    even, odd = tl.split(tl.reshape(x, [x.numel // 4, 2, 2]))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def _squares_of_four(seen, x):
    a, b, c, d = quarters(x)
    return tl.fma(d, d, tl.fma(c, c, tl.fma(b, b, tl.fma(a, a, seen))))


@triton.jit
def squares(seen, x, NEAR: tl.constexpr):
    """``NEAR``: neighbours that are added to one sum, 4 or 16."""
    if NEAR == 4:
        return _squares_of_four(seen, x)
    else:
        a, b, c, d = quarters(x)
        seen = _squares_of_four(_squares_of_four(seen, a), b)
        return _squares_of_four(_squares_of_four(seen, c), d)


@triton.jit
def _added_four(seen, x):
    a, b, c, d = quarters(x)
    return seen + a + b + c + d


@triton.jit
def added(seen, x, NEAR: tl.constexpr):
    if NEAR == 4:
        return _added_four(seen, x)
    else:
        a, b, c, d = quarters(x)
        return _added_four(_added_four(_added_four(_added_four(seen, a), b), c), d)


@triton.jit
def looked_at(x):
    """One element in ``SAMPLED``."""
    a, _, _, _ = quarters(x)
    a, _, _, _ = quarters(a)
    return a


@triton.jit
def nothing(SIZE: tl.constexpr, NEAR: tl.constexpr, PEAKS: tl.constexpr):
    """What is seen of no tile of so many elements, of so many of whose peaks the largest is kept. ``NEAR``:
    neighbours that a thread adds up as it goes, so that fewer registers hold the sums."""
    none = tl.zeros([SIZE // NEAR], tl.float32)
    count = tl.zeros([SIZE // NEAR], tl.int32)
    return none, none, none, none, none, count, tl.zeros([PEAKS], tl.float32)


@triton.jit
def see(seen, g, before, after, change, m, v, peaks, mask, NEAR: tl.constexpr, MASKED: tl.constexpr):
    """And one tile more. ``before`` and ``after``: the weight, as exactly as it is kept."""
    gradient, weight, changes, exp_avg, exp_avg_sq, lost, highest = seen
    is_lost = (before == after) & (change != 0)
    if MASKED:
        g, before, change = tl.where(mask, g, 0), tl.where(mask, before, 0), tl.where(mask, change, 0)
        m, v, is_lost = tl.where(mask, m, 0), tl.where(mask, v, 0), is_lost & mask
    return (
        squares(gradient, g, NEAR),
        squares(weight, before, NEAR),
        squares(changes, change, NEAR),
        squares(exp_avg, m, NEAR),
        added(exp_avg_sq, v, NEAR),
        added(lost, is_lost.to(tl.int32), NEAR),
        tl.maximum(highest, peaks),
    )


@triton.jit
def no_codes(SIZE: tl.constexpr):
    count = tl.zeros([SIZE // SAMPLED], tl.int32)
    return count, count, count, count


@triton.jit
def see_codes(seen, q, new_q, root_v, new_root_v, r, mask, MASKED: tl.constexpr):
    """``r``: as it is stored; of ``new_q``, what is more or NaN is stored as 255."""
    top, bottom, stalled, zero = seen
    q, new_q, r = looked_at(q), tl.minimum(looked_at(new_q), 255.0), looked_at(r)
    is_top, is_bottom, is_zero = new_q == 255, new_q == 1, r == 0
    stays = (q == new_q) & (looked_at(root_v) != looked_at(new_root_v))
    if MASKED:
        mask = looked_at(mask)
        is_top, is_bottom, is_zero, stays = is_top & mask, is_bottom & mask, is_zero & mask, stays & mask
    return (
        top + is_top.to(tl.int32),
        bottom + is_bottom.to(tl.int32),
        stalled + stays.to(tl.int32),
        zero + is_zero.to(tl.int32),
    )


@triton.jit
def leave(left, whole, tail, step_size, factor):
    """Of a chunk: its row, but for the columns of gradients and of codes."""
    row = left + COLUMNS * tl.program_id(0)
    for column in tl.static_range(1, 5):
        tl.store(row + column, tl.sum(whole[column], 0) + tl.sum(tail[column], 0))
    lost = tl.sum(whole[5], 0) + tl.sum(tail[5], 0)
    tl.store(row + 5, tl.where(step_size == 0, 0, lost).to(tl.float32))
    tl.store(row + HIGHEST, tl.maximum(tl.max(whole[6], 0), tl.max(tail[6], 0)))
    tl.store(row + FACTOR, factor)


@triton.jit
def leave_codes(left, whole, tail):
    row = left + COLUMNS * tl.program_id(0) + TOP
    for column in tl.static_range(4):
        tl.store(row + column, (tl.sum(whole[column], 0) + tl.sum(tail[column], 0)).to(tl.float32))


@triton.jit
def leave_no_codes(left):
    row = left + COLUMNS * tl.program_id(0) + TOP
    for column in tl.static_range(4):
        tl.store(row + column, 0.0)


@triton.jit
def leave_gradients(left, whole, tail, grad, count, scale, factor, SIZE: tl.constexpr):
    """The squares of a chunk's ``count`` gradients, before the factor, and how many are not finite. They are
    looked at again if their squares add up to something that is not, or if the step is skipped and nobody has
    looked at them."""
    row = left + COLUMNS * tl.program_id(0)
    seen = (tl.sum(whole[0], 0) + tl.sum(tail[0], 0)) / (factor * factor)
    again = (factor < 0) | (seen - seen != 0)
    gradient = tl.zeros([SIZE], tl.float32)
    nan = tl.zeros([SIZE], tl.int32)
    inf = tl.zeros([SIZE], tl.int32)
    for start in range(0, tl.where(again, count, 0), SIZE):
        at = start + tl.arange(0, SIZE)
        given = tl.load(grad + at, at < count, 0).to(tl.float32)
        nan += (given != given).to(tl.int32)
        inf += (tl.abs(given) == float("inf")).to(tl.int32)
        g = given * scale
        gradient = tl.fma(g, g, gradient)
    tl.store(row, tl.where(again, tl.sum(gradient, 0), seen))
    tl.store(row + NAN, tl.sum(nan, 0).to(tl.float32))
    tl.store(row + NAN + 1, tl.sum(inf, 0).to(tl.float32))


@triton.jit
def totals(left, ranges, rows, sums, ROWS: tl.constexpr):
    tensor = tl.program_id(0)
    column = tl.arange(0, COLUMNS)
    there = (column <= FACTOR)[None, :]
    end = tl.load(ranges + 2 * tensor + 1)
    own = sums + COLUMNS * tl.load(rows + tensor) + column
    found = tl.zeros([ROWS, COLUMNS], tl.float32)
    highest = tl.zeros([ROWS, COLUMNS], tl.float32)
    for begin in range(tl.load(ranges + 2 * tensor), end, ROWS):
        row = begin + tl.arange(0, ROWS)[:, None]
        x = tl.load(left + COLUMNS * row.to(tl.int64) + column[None, :], (row < end) & there, 0)
        found += x
        highest = tl.where(x == x, tl.maximum(highest, x), highest)
    before = tl.load(own)
    factor = tl.load(left + COLUMNS * (end - 1).to(tl.int64) + FACTOR)
    new = tl.where(column < ADDED, before + tl.sum(found, 0), tl.maximum(before, tl.max(highest, 0)))
    tl.store(own, tl.where(column == FACTOR, factor, new))
