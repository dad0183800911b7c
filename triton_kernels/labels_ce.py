"""labels_ce on the GPU: several labels per row, a threshold on either side of them.

With P the positives of a row, M the others, m the row's maximum, L = log sum exp(z_i - m) and
p_i = exp(z_i - m - L) over all classes:

    least = min_P p                most = max_M p
    M'    = i of M with z_i - m >= L + log(least - delta), where that is a number, or all
    P'    = i of P with z_i - m <= L + log(most + delta), or all where M is empty

    negative = log(1 + sum_M' exp(z_i))       dz_i =  a exp(z_i - negative)    on M'
    positive = log(1 + sum_P' exp(-z_i))      dz_i = -a exp(-z_i - positive)   on P', 0 elsewhere
    loss     = negative + positive            a the gradient of loss

which is least - p_i <= delta and p_i - most <= delta. The bounds are limited by the extremes that
they come from: what equals these stays whatever the rounding. Source: Lv et al., Adaptive Sparse
Softmax, arXiv 2508.03175.

Saved for backward: logits and labels by reference and 16 bytes per row, both sums and the cuts, the
least of M' and the largest of P', so that backward keeps the very same classes.

Forward reads logits and labels once: the softmax of all classes as softmax.py does, beside it the
extremes of either side. These say before the second look, from the cache, what the largest exponent
on either side is: one exponential per class. Backward reads logits and labels and writes the
gradient, once each.
"""

import torch
import triton
import triton.language as tl

from .order import max_nan
from .rows import (
    begin_alike,
    classes_before,
    edges,
    is_aligned,
    kernel,
    on_device,
    parts_of_gradient,
    row_start,
    row_strides,
    store_tile,
    tile,
)
from .softmax import absorb, exp_or_zero, lane_options, sum_over_lanes


@triton.jit
def _labelled(
    row_ptr, labels_ptr, head, first, chunks, LANES: tl.constexpr, C: tl.constexpr,
    LABELS_ALIKE: tl.constexpr,
):  # fmt: skip
    """A tile of logits, which of them are positive, their classes, and which exist: where they do
    not, negatives at minus infinity.
    """
    x, at, inside = tile(row_ptr, head, first, chunks, float("-inf"), LANES, C)
    if LABELS_ALIKE:
        lane = tl.arange(0, LANES)[:, None] * C + tl.arange(0, C)[None, :]
        aligned_ptr = tl.multiple_of(labels_ptr + (head + first * C), C)
        label = tl.load(aligned_ptr + lane, mask=inside, other=0)
    else:
        label = tl.load(labels_ptr + at, mask=inside, other=0)
    return x, label != 0, at, inside


@triton.jit
def _labelled_edges(row_ptr, labels_ptr, head, chunks, V, C: tl.constexpr):
    """The same of the classes outside of the whole chunks."""
    at, inside = edges(head, chunks, V, C)
    x = tl.load(row_ptr + at, mask=inside, other=float("-inf"))
    label = tl.load(labels_ptr + at, mask=inside, other=0)
    return x, label != 0, at, inside


@triton.jit
def _extremes(x, label, AXIS: tl.constexpr):
    """The least positive, the largest negative, and the number of positives."""
    low = tl.min(tl.where(label, x, float("inf")), AXIS)
    high = tl.max(tl.where(label, float("-inf"), x), AXIS)
    return low, high, tl.sum(label.to(tl.int32), AXIS)


@triton.jit
def _bounds(row_max, log_all, low, high, positives, V, delta):
    """Of negatives from below, of positives from above, less the row's maximum."""
    lowest, highest = low - row_max, high - row_max
    rest = tl.exp(lowest - log_all) - delta
    from_below = tl.minimum(log_all + tl.log(rest), lowest)
    from_above = tl.maximum(log_all + tl.log(tl.exp(highest - log_all) + delta), highest)
    bounded = (positives < V) & (tl.abs(log_all) < float("inf"))
    from_below = tl.where((positives > 0) & (rest > 0), from_below, float("-inf"))
    return from_below, tl.where(bounded, from_above, float("inf"))


@triton.jit
def _kept(
    x, label, row_max, from_below, from_above, above_negatives, above_positives,
    AXIS: tl.constexpr,
):  # fmt: skip
    """Of the classes that are kept: the sums of exponentials of negatives and positives, the least
    negative, the largest positive.
    """
    shifted = x - row_max
    e = exp_or_zero(tl.where(label, 0.0 - x - above_positives, x - above_negatives))
    # a NaN is kept
    negative = ((shifted < from_below) | label) == 0
    positive = label & ((shifted > from_above) == 0)
    return (
        tl.sum(tl.where(negative, e, 0.0), AXIS),
        tl.sum(tl.where(positive, e, 0.0), AXIS),
        tl.min(tl.where(negative, x, float("inf")), AXIS),
        tl.max(tl.where(positive, x, float("-inf")), AXIS),
    )


@triton.jit
def _log_one_plus(total, above, row_max):
    """log(1 + sum of exponentials), from one relative to the largest exponent."""
    # beside NaN infinity is NaN too
    infinite = (above == float("inf")) & (row_max == row_max)
    return tl.where(infinite, above, above + tl.log(tl.exp(0.0 - above) + total))


@kernel
def _fwd_kernel(
    logits_ptr,  # (N, V), a row is at (row // rows_t) * stride_b + (row % rows_t) * stride_t
    labels_ptr,  # (N, V) uint8
    loss_ptr,  # (N) fp32
    negative_ptr,  # (N) fp32
    positive_ptr,  # (N) fp32
    cut_negative_ptr,  # (N) fp32
    cut_positive_ptr,  # (N) fp32
    stride_b: tl.int64,
    stride_t: tl.int64,
    rows_t,
    V,
    delta,
    LANES: tl.constexpr,
    ALIGNED: tl.constexpr,
    LABELS_ALIKE: tl.constexpr,  # the labels of a chunk begin at a multiple of their number
):
    C: tl.constexpr = 128 // logits_ptr.dtype.element_ty.primitive_bitwidth
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row_start(tl.program_id(0), rows_t, stride_b, stride_t)
    marks_ptr = labels_ptr + row * V
    head = classes_before(row_ptr, V, ALIGNED)
    chunks = (V - head) // C

    largest = tl.full([LANES], float("-inf"), tl.float32)
    total = tl.zeros([LANES], tl.float32)
    low = tl.full([LANES], float("inf"), tl.float32)
    high = tl.full([LANES], float("-inf"), tl.float32)
    positives = tl.zeros([LANES], tl.int32)
    for first in tl.range(0, chunks, LANES):
        x, label, at, inside = _labelled(
            row_ptr, marks_ptr, head, first, chunks, LANES, C, LABELS_ALIKE
        )
        x = x.to(tl.float32)
        largest, total = absorb(largest, total, x, 1)
        lower, higher, more = _extremes(x, label, 1)
        low, high = tl.minimum(low, lower), tl.maximum(high, higher)
        positives += more
    row_max = tl.reduce(largest, 0, max_nan)
    row_low, row_high, row_positives = tl.min(low, 0), tl.max(high, 0), tl.sum(positives, 0)
    if not ALIGNED:
        x_edge, label_edge, at_edge, here = _labelled_edges(row_ptr, marks_ptr, head, chunks, V, C)
        x_edge = x_edge.to(tl.float32)
        row_max = max_nan(row_max, tl.reduce(x_edge, 0, max_nan))
        lower_edge, higher_edge, more_edge = _extremes(x_edge, label_edge, 0)
        row_low, row_high = tl.minimum(row_low, lower_edge), tl.maximum(row_high, higher_edge)
        row_positives += more_edge
    row_base, row_total = sum_over_lanes(largest, total, row_max)
    if not ALIGNED:
        row_total += tl.sum(exp_or_zero(x_edge - row_base), 0)

    from_below, from_above = _bounds(
        row_max, tl.log(row_total), row_low, row_high, row_positives, V, delta
    )
    # whether a side keeps anything its extreme tells
    above_negatives = tl.where(row_high - row_max < from_below, 0.0, tl.maximum(row_high, 0.0))
    above_positives = tl.where(row_low - row_max > from_above, 0.0, tl.maximum(-row_low, 0.0))
    negative = tl.zeros([LANES], tl.float32)
    positive = tl.zeros([LANES], tl.float32)
    least = tl.full([LANES], float("inf"), tl.float32)
    most = tl.full([LANES], float("-inf"), tl.float32)
    for first in tl.range(0, chunks, LANES):
        x, label, at, inside = _labelled(
            row_ptr, marks_ptr, head, first, chunks, LANES, C, LABELS_ALIKE
        )
        n, p, lower, higher = _kept(
            x.to(tl.float32), label, row_max, from_below, from_above, above_negatives,
            above_positives, 1,
        )  # fmt: skip
        negative += n
        positive += p
        least, most = tl.minimum(least, lower), tl.maximum(most, higher)
    row_negative, row_positive = tl.sum(negative, 0), tl.sum(positive, 0)
    cut_negative, cut_positive = tl.min(least, 0), tl.max(most, 0)
    if not ALIGNED:
        n_edge, p_edge, least_edge, most_edge = _kept(
            x_edge, label_edge, row_max, from_below, from_above, above_negatives, above_positives, 0
        )
        row_negative += n_edge
        row_positive += p_edge
        cut_negative = tl.minimum(cut_negative, least_edge)
        cut_positive = tl.maximum(cut_positive, most_edge)

    row_negative = _log_one_plus(row_negative, above_negatives, row_max)
    row_positive = _log_one_plus(row_positive, above_positives, row_max)
    bounded_below, bounded_above = from_below > float("-inf"), from_above < float("inf")
    tl.store(loss_ptr + row, row_negative + row_positive)
    tl.store(negative_ptr + row, row_negative)
    tl.store(positive_ptr + row, row_positive)
    tl.store(cut_negative_ptr + row, tl.where(bounded_below, cut_negative, float("-inf")))
    tl.store(cut_positive_ptr + row, tl.where(bounded_above, cut_positive, float("inf")))


@triton.jit
def _gradient(x, label, dloss, negative, positive, cut_negative, cut_positive):
    z = x.to(tl.float32)
    e = exp_or_zero(tl.where(label, 0.0 - z - positive, z - negative))
    dropped = (label & (z > cut_positive)) | ((label == 0) & (z < cut_negative))
    # without upstream gradient exactly zero, also where the exponential is NaN
    g = tl.where(dloss == 0, 0.0, tl.where(label, 0.0 - dloss, dloss) * e)
    return tl.where(dropped, 0.0, g).to(x.dtype)


@kernel
def _bwd_kernel(
    dloss_ptr,  # (N) fp32
    logits_ptr,  # (N, V), strided as in forward
    labels_ptr,  # (N, V) uint8
    negative_ptr,  # (N) fp32
    positive_ptr,  # (N) fp32
    cut_negative_ptr,  # (N) fp32
    cut_positive_ptr,  # (N) fp32
    dlogits_ptr,  # (N, V)
    stride_b: tl.int64,
    stride_t: tl.int64,
    rows_t,
    V,
    part_size,  # chunks
    LANES: tl.constexpr,
    ALIGNED: tl.constexpr,
    ALIKE: tl.constexpr,  # chunks of logits and gradient begin at the same classes
    LABELS_ALIKE: tl.constexpr,
):
    C: tl.constexpr = 128 // dlogits_ptr.dtype.element_ty.primitive_bitwidth
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row_start(tl.program_id(0), rows_t, stride_b, stride_t)
    marks_ptr = labels_ptr + row * V
    out_ptr = dlogits_ptr + row * V
    head = classes_before(row_ptr, V, ALIGNED)
    chunks = (V - head) // C
    dloss = tl.load(dloss_ptr + row)
    negative, positive = tl.load(negative_ptr + row), tl.load(positive_ptr + row)
    low, high = tl.load(cut_negative_ptr + row), tl.load(cut_positive_ptr + row)

    first_chunk = tl.program_id(1) * part_size
    last_chunk = tl.minimum(first_chunk + part_size, chunks)
    for first in tl.range(first_chunk, last_chunk, LANES):
        x, label, at, inside = _labelled(
            row_ptr, marks_ptr, head, first, last_chunk, LANES, C, LABELS_ALIKE
        )
        g = _gradient(x, label, dloss, negative, positive, low, high)
        store_tile(out_ptr, head, first, g, at, inside, ALIKE)
    if not ALIGNED:
        if first_chunk == 0:
            x_edge, label_edge, at_edge, here = _labelled_edges(
                row_ptr, marks_ptr, head, chunks, V, C
            )
            g_edge = _gradient(x_edge, label_edge, dloss, negative, positive, low, high)
            tl.store(out_ptr + at_edge, g_edge, mask=here)


def labels_begin_alike(logits: torch.Tensor, labels: torch.Tensor) -> bool:
    """The labels of every chunk of logits begin at a multiple of their number."""
    item = logits.element_size()
    strides = zip(logits.stride()[:-1], labels.stride()[:-1], strict=True)
    gaps = [logits.data_ptr() // item - labels.data_ptr(), *(a - b for a, b in strides)]
    return all(gap % (16 // item) == 0 for gap in gaps)


def labels_ce_fwd(
    logits: torch.Tensor, labels: torch.Tensor, delta: float
) -> tuple[torch.Tensor, ...]:
    rows, num_classes = logits.shape[:-1], logits.shape[-1]
    outputs = tuple(logits.new_empty(rows, dtype=torch.float32) for _ in range(5))
    if rows.numel() > 0:
        with on_device(logits):
            _fwd_kernel[(rows.numel(),)](
                logits, labels.view(torch.uint8), *outputs, *row_strides(logits), num_classes,
                float(delta), ALIGNED=is_aligned(logits),
                LABELS_ALIKE=labels_begin_alike(logits, labels),
                **lane_options(logits.element_size(), num_classes),
            )  # fmt: skip
    return outputs


def labels_ce_bwd(
    dloss: torch.Tensor,
    logits: torch.Tensor,
    labels: torch.Tensor,
    negative: torch.Tensor,
    positive: torch.Tensor,
    cut_negative: torch.Tensor,
    cut_positive: torch.Tensor,
) -> torch.Tensor:
    rows, num_classes = negative.numel(), logits.shape[-1]
    dlogits = logits.new_empty(logits.shape)
    if rows == 0:
        return dlogits
    config = lane_options(logits.element_size(), num_classes)
    parts, part_size = parts_of_gradient(rows, dlogits, config["LANES"])
    with on_device(logits):
        _bwd_kernel[(rows, parts)](
            dloss.contiguous(), logits, labels.view(torch.uint8), negative, positive, cut_negative,
            cut_positive, dlogits, *row_strides(logits), num_classes, part_size,
            ALIGNED=is_aligned(logits, dlogits), ALIKE=begin_alike(logits, dlogits),
            LABELS_ALIKE=labels_begin_alike(logits, labels), **config,
        )  # fmt: skip
    return dlogits
