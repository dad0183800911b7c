"""The softmax over all classes of a row, in one look at it: what threshold_ce, labels_ce and plif
share.

Each lane goes through its chunks with a maximum, and a sum of exponentials relative to it, of its
own: one exponential per class, and one more per step, which moves the sum to the new maximum. Lanes
meet once, at the end: no barrier in the loop.
"""

import triton
import triton.language as tl

from .order import max_nan
from .rows import edges, next_power_of_2, tile, warps

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp_or_zero(x):
    """exp, three instructions less: what is below 2^-126 is 0. Of 16 bytes of bfloat16 the loop of
    softmax_of has 56 instructions so, where it had 82 (sm_90).
    """
    return tl.exp2(x * _LOG2_E)


@triton.jit
def sum_beside_maximum(largest, total, new_largest):
    """A sum of exponentials relative to `largest`, relative to `new_largest`."""
    # where all so far are -inf there is nothing to be relative to, and the sum is 0
    base = tl.where(new_largest == float("-inf"), 0.0, new_largest)
    return base, total * exp_or_zero(largest - base)


@triton.jit
def sum_over_lanes(largest, total, row_max):
    """The sums of all lanes as one, relative to `row_max`: the same number in each of them.

    Without the maximum the product of a lane becomes one instruction with the first addition of
    another's, which had its own rounded: lanes of a warp would differ in the last bit.
    """
    base, total = sum_beside_maximum(largest, total, row_max)
    return base, tl.sum(max_nan(total, 0.0), 0)


@triton.jit
def absorb(largest, total, x, AXIS: tl.constexpr):
    """Maxima, and sums of exponentials relative to them, with more logits along AXIS."""
    above = max_nan(largest, tl.reduce(x, AXIS, max_nan))
    base, total = sum_beside_maximum(largest, total, above)
    if AXIS == 1:
        base = base[:, None]
    return above, total + tl.sum(exp_or_zero(x - base), AXIS)


@triton.jit
def softmax_of(
    row_ptr, head, chunks, V, LANES: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr
):
    """Maximum, and sum of exponentials relative to it, of all classes. A step is two chunks."""
    DTYPE: tl.constexpr = row_ptr.dtype.element_ty
    lane = tl.arange(0, LANES)[:, None] * C + tl.arange(0, C)[None, :]
    largest = tl.full([LANES], float("-inf"), tl.float32)
    total = tl.zeros([LANES], tl.float32)
    whole = chunks // (2 * LANES) * (2 * LANES)
    for first in tl.range(0, whole, 2 * LANES):
        x = tl.load(tl.multiple_of(row_ptr + (head + first * C), 16) + lane)
        y = tl.load(tl.multiple_of(row_ptr + (head + first * C + LANES * C), 16) + lane)
        # of 16-bit logits two maxima an instruction
        both = max_nan(x, y).to(DTYPE)
        above = max_nan(largest, tl.reduce(both.to(tl.float32), 1, max_nan))
        base, total = sum_beside_maximum(largest, total, above)
        x, y = x.to(tl.float32) - base[:, None], y.to(tl.float32) - base[:, None]
        total += tl.sum(exp_or_zero(x) + exp_or_zero(y), 1)
        largest = above
    for first in tl.range(whole, chunks, LANES):
        x, _, _ = tile(row_ptr, head, first, chunks, float("-inf"), LANES, C)
        largest, total = absorb(largest, total, x.to(tl.float32), 1)
    row_max = tl.reduce(largest, 0, max_nan)
    if ALIGNED:
        return row_max, sum_over_lanes(largest, total, row_max)[1]
    at, inside = edges(head, chunks, V, C)
    x = tl.load(row_ptr + at, mask=inside, other=float("-inf")).to(tl.float32)
    row_max = max_nan(row_max, tl.reduce(x, 0, max_nan))
    base, total = sum_over_lanes(largest, total, row_max)
    return row_max, total + tl.sum(exp_or_zero(x - base), 0)


def lane_options(itemsize: int, num_classes: int) -> dict[str, int]:
    """Lanes and warps: two chunks for each lane at least, eight warps at most. No GPU has chosen
    them.
    """
    lanes = min(256, max(32, next_power_of_2(num_classes * itemsize // 32)))
    return {"LANES": lanes, **warps(lanes // 32)}
