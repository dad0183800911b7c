"""tail on the GPU: what lies outside of a list of k classes and the target, and draws from it.

With m the row's maximum, L = log sum exp(z_i - m) over all classes, T the tail:

    q_i = floor(2^52 min(p_i, 1)) on T, 0 elsewhere,    p_i = exp(z_i - m - L)
    Q = sum q_i,    stride = floor(Q / samples),    C_i = sum of q up to and with class i
    draw j is the first class with C_i > floor(u stride) + j stride

Systematic sampling: one uniform number u decides all draws of a row, and of `samples` draws class i
gets samples p_i / sum_T p, rounded down or up. The sums are of integers: the same in any order.

A program has a row. It reads it once from memory, as softmax.py does, and again for the q, from the
cache where that holds the rows at work: the sums up to and with each segment of SEGMENT classes go
to a scratch, 8 bytes for each. Then every draw has a lane, which finds its segment by bisection and
writes it where the draw goes, and after that a warp, for a third look at few classes: in the
segment it is the number of those whose C_i does not exceed it. A lane has two neighbours of them,
so that the sums cross no warps.
"""

import torch
import triton
import triton.language as tl

from .rows import classes_before, is_aligned, kernel, on_device, row_start, row_strides, tile
from .softmax import exp_or_zero, lane_options, softmax_of

_UNIT = tl.constexpr(2.0**52)


@triton.jit
def _quotas(x, row_max, log_sum):
    """The q of some classes, of the tail or not: of -inf, which stands for what does not exist, 0.
    Beside NaN they mean nothing, and nobody asks for them.

    A shift in place of a conversion to 64 bits, of which a multiprocessor of a gaming card makes
    two per cycle.
    """
    p = exp_or_zero((x.to(tl.float32) - row_max) - log_sum)
    bits = p.to(tl.uint32, bitcast=True)
    # the mantissa from bit 62 on, from which that of 1, whose exponent is 127, goes to bit 52
    mantissa = ((bits << 7) & 0x3FFFFFFF) | 0x40000000
    # a shift by 64 or more means nothing; by 63 it leaves 0
    by = tl.minimum(137 - (bits >> 23), 63)
    return ((mantissa.to(tl.uint64) << 32) >> by.to(tl.uint64)).to(tl.int64)


@triton.jit
def _quotas_of_tail(row_ptr, at, wanted, V, row_max, log_sum, cut, cut_index, target):
    """Of classes that need not exist: 0 of those, and of what is not of the tail."""
    x = tl.load(row_ptr + at, mask=wanted & (at >= 0) & (at < V), other=float("-inf"))
    x = x.to(tl.float32)
    tail = (at != target) & ((x < cut) | ((x == cut) & (at > cut_index)))
    return _quotas(tl.where(tail, x, float("-inf")), row_max, log_sum)


@triton.jit
def _quota_of_edge(row_ptr, first, count, row_max, log_sum, C: tl.constexpr):
    """Of fewer classes than a chunk has, from `first` on."""
    lane = tl.arange(0, C)
    x = tl.load(row_ptr + first + lane, mask=lane < count, other=float("-inf"))
    return tl.sum(_quotas(x, row_max, log_sum), 0)


@triton.jit
def _add_up(sums_ptr, count, LANES: tl.constexpr):
    """Numbers become the sums up to and with each of them. Returns that of all.

    A lane goes through its share of neighbours twice; in between, once, the lanes meet.
    """
    each = tl.cdiv(count, LANES)
    first = tl.arange(0, LANES) * each
    own = tl.zeros([LANES], tl.int64)
    for step in tl.range(0, each):
        own += tl.load(sums_ptr + first + step, mask=first + step < count, other=0)
    up_to = tl.cumsum(own, 0) - own
    for step in tl.range(0, each):
        inside = first + step < count
        up_to += tl.load(sums_ptr + first + step, mask=inside, other=0)
        tl.store(sums_ptr + first + step, up_to, mask=inside)
    tl.debug_barrier()
    return tl.load(sums_ptr + count - 1)


@triton.jit
def _segment_of(place, sums_ptr, last, wanted):
    """The first segment whose sum exceeds the place, as that of the last one does."""
    step = 1
    while 2 * step <= last:
        step *= 2
    segment = (place * 0).to(tl.int32)
    while step > 0:
        at = segment + step - 1
        inside = wanted & (at < last)
        passed = inside & (tl.load(sums_ptr + at, mask=inside, other=0) <= place)
        segment += tl.where(passed, step, 0)
        step >>= 1
    return segment


@kernel
def _fwd_kernel(
    logits_ptr,  # (N, V), a row is at (row // rows_t) * stride_b + (row % rows_t) * stride_t
    target_ptr,  # (N) int64
    indices_ptr,  # (N, k) int32
    uniform_ptr,  # (N) fp32
    row_max_ptr,  # (N) fp32
    log_sum_ptr,  # (N) fp32
    mass_ptr,  # (N) fp32
    draws_ptr,  # (N, samples) int32
    quotas_ptr,  # (N, segments) int64: of the classes before the first whole chunk, then by SEGMENT
    stride_b: tl.int64,
    stride_t: tl.int64,
    rows_t,
    V,
    k,
    samples,
    segments,
    LANES: tl.constexpr,
    SEGMENT: tl.constexpr,
    DRAWS: tl.constexpr,  # side by side in the third look
    ALIGNED: tl.constexpr,
    HAS_UNIFORM: tl.constexpr,
):
    DTYPE: tl.constexpr = logits_ptr.dtype.element_ty
    C: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row_start(tl.program_id(0), rows_t, stride_b, stride_t)
    head = classes_before(row_ptr, V, ALIGNED)
    chunks = (V - head) // C
    row_max, total = softmax_of(row_ptr, head, chunks, V, LANES, C, ALIGNED)
    log_sum = tl.where(row_max == float("-inf"), float("nan"), tl.log(total))
    tl.store(row_max_ptr + row, row_max)
    tl.store(log_sum_ptr + row, log_sum)
    if not HAS_UNIFORM:
        tl.store(mass_ptr + row, 0.0)
    else:
        quotas_ptr += row * segments
        EACH: tl.constexpr = SEGMENT // C
        AT_ONCE: tl.constexpr = LANES // EACH
        lane = tl.arange(0, LANES)
        steps = tl.cdiv(chunks, LANES)
        for step in tl.range(0, steps):
            # the last first: it is in the cache still, which the rows at work may exceed
            first = (steps - 1 - step) * LANES
            x, _, _ = tile(row_ptr, head, first, chunks, float("-inf"), LANES, C)
            q = tl.sum(tl.reshape(tl.sum(_quotas(x, row_max, log_sum), 1), [AT_ONCE, EACH]), 1)
            # its lanes have the sum of a segment, and the first of them writes it
            q = tl.reshape(tl.broadcast_to(q[:, None], [AT_ONCE, EACH]), [LANES])
            place = 1 + first // EACH + lane // EACH
            tl.store(quotas_ptr + place, q, mask=(lane % EACH == 0) & (place < segments))
        # what the loop has not seen
        last = tl.where(head < V, 1 + (V - 1 - head) // SEGMENT, 0)
        tl.debug_barrier()
        if last > tl.cdiv(chunks * C, SEGMENT):
            tl.store(quotas_ptr + last, tl.full([], 0, tl.int64))
        of_head = tl.full([], 0, tl.int64)
        if not ALIGNED:
            of_head += _quota_of_edge(row_ptr, 0, head, row_max, log_sum, C)
        tl.store(quotas_ptr, of_head)
        tl.debug_barrier()
        if not ALIGNED:
            end = head + chunks * C
            of_end = _quota_of_edge(row_ptr, end, V - end, row_max, log_sum, C)
            tl.atomic_add(quotas_ptr + last, of_end, sem="relaxed")
        # the list and the target are in these sums too: to take them out again costs less than
        # to compare every class
        for first in tl.range(0, k, LANES):
            rank = first + lane
            index = tl.load(indices_ptr + row * k + rank, mask=rank < k, other=0)
            z = tl.load(row_ptr + index, mask=rank < k, other=float("-inf"))
            there = tl.where(index < head, 0, 1 + (index - head) // SEGMENT)
            q = 0 - _quotas(z, row_max, log_sum)
            tl.atomic_add(quotas_ptr + there, q, mask=rank < k, sem="relaxed")
        cut_index = tl.load(indices_ptr + row * k + k - 1)
        cut = tl.load(row_ptr + cut_index).to(tl.float32)
        target = tl.load(target_ptr + row)
        hit = (target >= 0) & (target < V)
        target = tl.where(hit, target, -1).to(tl.int32)
        of_target = _quotas_of_tail(row_ptr, target, hit, V, row_max, log_sum, cut, cut_index, -1)
        there = tl.where(target < head, 0, 1 + (target - head) // SEGMENT)
        tl.atomic_add(quotas_ptr + there, 0 - of_target, sem="relaxed")
        tl.debug_barrier()
        quota = _add_up(quotas_ptr, last + 1, LANES)

        finite = tl.abs(log_sum) < float("inf")
        stride = tl.where(finite, quota, 0) // samples
        mass = tl.where(stride > 0, quota, 0).to(tl.float32) / _UNIT
        tl.store(mass_ptr + row, tl.where(finite, mass, float("nan")))
        start = (tl.load(uniform_ptr + row).to(tl.float64) * stride.to(tl.float64)).to(tl.int64)
        count = tl.where(stride > 0, samples, 0)
        draws_ptr += row * samples
        for first in tl.range(0, samples, LANES):
            draw = first + lane
            wanted = draw < count
            segment = _segment_of(start + draw * stride, quotas_ptr, last, wanted)
            tl.store(draws_ptr + draw, tl.where(wanted, segment, -1), mask=draw < samples)
        tl.debug_barrier()
        for first in tl.range(0, samples, DRAWS):
            draw = first + tl.arange(0, DRAWS)
            wanted = draw < count
            segment = tl.load(draws_ptr + draw, mask=wanted, other=0)
            before = tl.load(quotas_ptr + segment - 1, mask=wanted & (segment > 0), other=0)
            place = (start + draw * stride - before)[:, None]
            # of the classes before the first whole chunk, those before the row are none
            begin = head + (segment - 1) * SEGMENT
            at = begin[:, None] + 2 * tl.arange(0, SEGMENT // 2)[None, :]
            x = _quotas_of_tail(
                row_ptr, at, wanted[:, None], V, row_max, log_sum, cut, cut_index, target
            )
            y = _quotas_of_tail(
                row_ptr, at + 1, wanted[:, None], V, row_max, log_sum, cut, cut_index, target
            )
            up_to = tl.cumsum(x + y, 1)
            passed = (up_to - y <= place).to(tl.int32) + (up_to <= place).to(tl.int32)
            found = begin + tl.sum(passed, 1)
            # a warp may write to where another reads its segment
            tl.debug_barrier()
            tl.store(draws_ptr + draw, found, mask=wanted)


def options(itemsize: int, num_classes: int) -> dict[str, int]:
    lanes = lane_options(itemsize, num_classes)
    # two classes for each lane of a warp, which has two draws at a time or four
    return {**lanes, "SEGMENT": 64, "DRAWS": min(16, 4 * lanes["num_warps"])}


def tail_fwd(
    logits: torch.Tensor,
    target: torch.Tensor,
    indices: torch.Tensor,
    uniform: torch.Tensor | None,
    samples: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, num_classes = logits.shape[:-1], logits.shape[-1]
    row_max, log_sum, mass = (logits.new_empty(rows, dtype=torch.float32) for _ in range(3))
    draws = logits.new_empty((*rows, samples), dtype=torch.int32)
    config = options(logits.element_size(), num_classes)
    # one for the classes before the first whole chunk, one for the last, which may have fewer
    segments = 2 + num_classes // config["SEGMENT"] if uniform is not None else 0
    quotas = logits.new_empty((target.numel(), segments), dtype=torch.int64)
    if target.numel() > 0:
        with on_device(logits):
            _fwd_kernel[(target.numel(),)](
                logits, target, indices, uniform, row_max, log_sum, mass, draws, quotas,
                *row_strides(logits), num_classes, indices.shape[-1], samples, segments,
                ALIGNED=is_aligned(logits), HAS_UNIFORM=uniform is not None,
                **config,
            )  # fmt: skip
    return row_max, log_sum, mass, draws
