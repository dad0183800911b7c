"""tail on the GPU: what lies outside of a list of k classes and the target, and draws from it.

With m the row's maximum, L = log sum exp(z_i - m) over all classes, T the tail:

    q_i = floor(2^52 min(p_i, 1)) on T, 0 elsewhere,    p_i = exp(z_i - m - L)
    Q = sum q_i,    stride = floor(Q / samples),    C_i = sum of q up to and with class i
    draw j is the first class with C_i > floor(u stride) + j stride

Systematic sampling: one uniform number u decides all draws of a row, and of `samples` draws class i
gets samples p_i / sum_T p, rounded down or up. The sums are of integers: the same in any order.

A program has a row. It reads it once from memory, as softmax.py does, and again for the q, from the
cache where that holds the rows at work: the sums up to and with each segment of SEGMENT classes go
to a scratch, 8 bytes for each. Draws are then looked for side by side: each by bisection
among the segments, and in its own, a third look at few classes, as the number of those whose C_i
does not exceed it.
"""

import torch
import triton
import triton.language as tl

from .rows import classes_before, is_aligned, kernel, on_device, row_start, row_strides, tile
from .softmax import lane_options, softmax_of

_UNIT = tl.constexpr(2.0**52)


@triton.jit
def _quotas(x, row_max, log_sum):
    """The q of some classes, of the tail or not: of -inf, which stands for what does not exist, 0.
    Beside NaN they mean nothing, and nobody asks for them.
    """
    return (tl.exp((x.to(tl.float32) - row_max) - log_sum) * _UNIT).to(tl.int64)


@triton.jit
def _is_tail(x, at, cut, cut_index, target):
    x = x.to(tl.float32)
    return (at != target) & ((x < cut) | ((x == cut) & (at > cut_index)))


@triton.jit
def _quota_of_edge(row_ptr, first, count, row_max, log_sum, C: tl.constexpr):
    """Of fewer classes than a chunk has, from `first` on."""
    lane = tl.arange(0, C)
    x = tl.load(row_ptr + first + lane, mask=lane < count, other=float("-inf"))
    return tl.sum(_quotas(x, row_max, log_sum), 0)


@triton.jit
def _add_up(sums_ptr, count, SIZE: tl.constexpr):
    """Numbers become the sums up to and with each of them. Returns that of all."""
    total = tl.full([], 0, tl.int64)
    for first in tl.range(0, count, SIZE):
        at = first + tl.arange(0, SIZE)
        x = tl.load(sums_ptr + at, mask=at < count, other=0)
        tl.store(sums_ptr + at, total + tl.cumsum(x, 0), mask=at < count)
        total += tl.sum(x, 0)
    return total


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
    DRAWS: tl.constexpr,  # side by side
    ALIGNED: tl.constexpr,
    HAS_UNIFORM: tl.constexpr,
):
    DTYPE: tl.constexpr = logits_ptr.dtype.element_ty
    C: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    AT_ONCE: tl.constexpr = LANES * C // SEGMENT
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
        target = tl.load(target_ptr + row)
        hit = (target >= 0) & (target < V)
        target = tl.where(hit, target, -1).to(tl.int32)
        quotas_ptr += row * segments
        draws_ptr += row * samples

        steps = tl.cdiv(chunks, LANES)
        for step in tl.range(0, steps):
            # the last first: it is in the cache still, which the rows at work may exceed
            first = (steps - 1 - step) * LANES
            x, _, _ = tile(row_ptr, head, first, chunks, float("-inf"), LANES, C)
            q = tl.sum(tl.reshape(_quotas(x, row_max, log_sum), [AT_ONCE, SEGMENT]), 1)
            place = 1 + first * C // SEGMENT + tl.arange(0, AT_ONCE)
            tl.store(quotas_ptr + place, q, mask=place < segments)
        # what the loop has not seen
        last = tl.where(head < V, 1 + (V - 1 - head) // SEGMENT, 0)
        of_head = tl.full([], 0, tl.int64)
        of_end = of_head
        if not ALIGNED:
            end = head + chunks * C
            of_head += _quota_of_edge(row_ptr, 0, head, row_max, log_sum, C)
            of_end += _quota_of_edge(row_ptr, end, V - end, row_max, log_sum, C)
        tl.debug_barrier()
        if last > tl.cdiv(chunks * C, SEGMENT):
            tl.store(quotas_ptr + last, tl.full([], 0, tl.int64))
        tl.store(quotas_ptr, of_head)
        tl.debug_barrier()
        tl.atomic_add(quotas_ptr + last, of_end, sem="relaxed")
        # the list and the target are in these sums too: to take them out again costs less than
        # to compare every class
        cut_index = tl.load(indices_ptr + row * k + k - 1)
        cut = tl.load(row_ptr + cut_index).to(tl.float32)
        for first in tl.range(0, k, LANES):
            rank = first + tl.arange(0, LANES)
            index = tl.load(indices_ptr + row * k + rank, mask=rank < k, other=0)
            z = tl.load(row_ptr + index, mask=rank < k, other=float("-inf"))
            there = tl.where(index < head, 0, 1 + (index - head) // SEGMENT)
            tl.atomic_add(quotas_ptr + there, 0 - _quotas(z, row_max, log_sum), sem="relaxed")
        z_y = tl.load(row_ptr + target, mask=hit, other=float("-inf"))
        of_target = tl.where(
            _is_tail(z_y, target, cut, cut_index, -1), _quotas(z_y, row_max, log_sum), 0
        )
        there = tl.where(target < head, 0, 1 + (target - head) // SEGMENT)
        tl.atomic_add(quotas_ptr + there, 0 - of_target, sem="relaxed")
        tl.debug_barrier()
        quota = _add_up(quotas_ptr, last + 1, LANES * C // 2)
        tl.debug_barrier()

        finite = tl.abs(log_sum) < float("inf")
        stride = tl.where(finite, quota, 0) // samples
        mass = tl.where(stride > 0, quota, 0).to(tl.float32) / _UNIT
        tl.store(mass_ptr + row, tl.where(finite, mass, float("nan")))
        start = (tl.load(uniform_ptr + row).to(tl.float64) * stride.to(tl.float64)).to(tl.int64)
        count = tl.where(stride > 0, samples, 0)
        for first in tl.range(0, samples, DRAWS):
            draw = first + tl.arange(0, DRAWS)
            wanted = draw < count
            place = start + draw * stride
            # the first segment whose sum exceeds it
            low, high = draw * 0, draw * 0 + last
            while tl.max(high - low, 0) > 0:
                middle = (low + high) // 2
                reached = tl.load(quotas_ptr + middle, mask=wanted, other=0) > place
                high = tl.where(reached, middle, high)
                low = tl.where(reached | (low == high), low, middle + 1)
            before = tl.load(quotas_ptr + low - 1, mask=wanted & (low > 0), other=0)
            begin = tl.where(low > 0, head + (low - 1) * SEGMENT, 0)
            stop = tl.where(low > 0, tl.minimum(begin + SEGMENT, V), head)
            at = begin[:, None] + tl.arange(0, SEGMENT)[None, :]
            inside = (at < stop[:, None]) & wanted[:, None]
            z = tl.load(row_ptr + at, mask=inside, other=float("-inf"))
            tail = _is_tail(z, at, cut, cut_index, target)
            q = tl.where(tail, _quotas(z, row_max, log_sum), 0)
            reached = before[:, None] + tl.cumsum(q, 1) > place[:, None]
            found = begin + tl.sum((reached == 0).to(tl.int32), 1)
            tl.store(draws_ptr + draw, tl.where(wanted, found, -1), mask=draw < samples)


def options(itemsize: int, num_classes: int) -> dict[str, int]:
    lanes = lane_options(itemsize, num_classes)
    # half of what a step reads, or less
    segment = min(128, lanes["LANES"] * 16 // itemsize // 2)
    return {**lanes, "SEGMENT": segment, "DRAWS": lanes["num_warps"]}


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
