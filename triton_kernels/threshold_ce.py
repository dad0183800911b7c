"""threshold_ce on the GPU: the softmax over all classes, or over the many that a cut keeps.

With S the classes that are kept, n of them, m the row's maximum, y the target, e the label
smoothing, w the class weights, and a, b the gradients of loss and lse:

    L    = log sum_S exp(z_i - m)            lse = m + L
    loss = (1 - e) w_y (L - (z_y - m)) + (e / n) sum_S w_i (L - (z_i - m))

    dz_i = exp(z_i - m - L) (a A + b) - a (e / n) w_i   on S, 0 elsewhere
    dz_y -= a (1 - e) w_y                               A = (1 - e) w_y + (e / n) sum_S w_i

m leaves both terms before they meet. S is all classes; or the k largest; or, with L_all that of all
classes and p_y = exp(z_y - m - L_all) > delta, y and those with p_y - p_i <= delta, which is
z_i - m >= L_all + log(p_y - delta). Sources: Sun et al., Sparse-softmax, arXiv 2112.12433, eq. 4
and 5; Lv et al., Adaptive Sparse Softmax, arXiv 2508.03175.

Saved for backward: the logits by reference and 24 bytes per row, m, L, the cut and n, since m + L
rounded to one number would cost precision at large offsets. The cut is the least logit of S, so
that backward keeps the very same classes without repeating a rounded comparison.

Forward reads the row once, as softmax.py does. A cut, or label smoothing, takes a second look, from
the cache where that holds the rows at work. The k-th largest is found by a few looks, each of which
counts the keys that reach a probe, and the place among the classes equal to it by a few more:
slower than listing classes, but k is beyond where lists end. Backward reads the logits and writes
the gradient, once each.
"""

import torch
import triton
import triton.language as tl

from .order import infinity_key, key_value, value_key
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
from .softmax import exp_or_zero, lane_options, softmax_of

# What a look keeps.
ALL = tl.constexpr(0)
LARGEST = tl.constexpr(1)  # from the cut on
NEAR = tl.constexpr(2)  # at most a bound below the maximum


@triton.jit
def _is_kept(key, at, cut_key, cut_index):
    return (key > cut_key) | ((key == cut_key) & (at <= cut_index))


@triton.jit
def _around(
    x, at, inside, cut_key, probe, count, above, below, AXIS: tl.constexpr, TIES: tl.constexpr,
):  # fmt: skip
    key = value_key(x)
    if TIES:
        number, exists = -at, inside & (key == cut_key)
    else:
        number, exists = key, tl.broadcast_to(inside, x.shape)
    reaches = exists & (number >= probe)
    count += tl.sum(reaches.to(tl.int32), AXIS)
    above = tl.minimum(above, tl.min(tl.where(reaches, number, 0x7FFFFFFF), AXIS))
    others = exists & (number < probe)
    below = tl.maximum(below, tl.max(tl.where(others, number, -0x7FFFFFFF), AXIS))
    return count, above, below


@triton.jit
def _look_around(
    row_ptr, head, chunks, V, cut_key, probe, LANES: tl.constexpr, C: tl.constexpr,
    ALIGNED: tl.constexpr, TIES: tl.constexpr,
):  # fmt: skip
    """Of some numbers of a row, its keys, or with TIES the indices, negative, of the classes whose
    key is `cut_key`: how many reach `probe`, the least of these, and the largest of the others.
    """
    count = tl.zeros([LANES], tl.int32)
    above = tl.full([LANES], 0x7FFFFFFF, tl.int32)
    below = -above
    for first in tl.range(0, chunks, LANES):
        x, at, inside = tile(row_ptr, head, first, chunks, float("-inf"), LANES, C)
        count, above, below = _around(x, at, inside, cut_key, probe, count, above, below, 1, TIES)
    count, above, below = tl.sum(count, 0), tl.min(above, 0), tl.max(below, 0)
    if not ALIGNED:
        at_edge, here = edges(head, chunks, V, C)
        x_edge = tl.load(row_ptr + at_edge, mask=here, other=float("-inf"))
        count, above, below = _around(
            x_edge, at_edge, here, cut_key, probe, count, above, below, 0, TIES
        )
    return count, above, below


@triton.jit
def _largest(
    row_ptr, head, chunks, V, cut_key, low, high, reach, k, LANES: tl.constexpr, C: tl.constexpr,
    ALIGNED: tl.constexpr, TIES: tl.constexpr,
):  # fmt: skip
    """The k-th largest of such numbers, how many exceed it, and how many reach it: `reach` of them
    reach `low`, at least k, and none exceeds `high`.

    A line between the counts at both ends says about where it lies. Either end is then a number of
    the row. Where that has not halved their distance the next look is nearer to the middle.
    """
    exceed = tl.zeros([], tl.int32)
    slow = exceed
    while low < high:
        distance = (high - low).to(tl.uint32, bitcast=True)
        share = ((k - exceed).to(tl.float32) - 0.5) / (reach - exceed).to(tl.float32)
        share = tl.where(slow > 0, (share + 0.5) / 2, share)
        down = tl.minimum((share * distance.to(tl.float32)).to(tl.uint32), distance - 1)
        count, above, below = _look_around(
            row_ptr, head, chunks, V, cut_key, high - down.to(tl.int32, bitcast=True),
            LANES, C, ALIGNED, TIES,
        )  # fmt: skip
        enough = count >= k
        low = tl.where(enough, above, low)
        reach = tl.where(enough, count, reach)
        high = tl.where(enough, high, below)
        exceed = tl.where(enough, exceed, count)
        left = (high - low).to(tl.uint32, bitcast=True)
        slow = ((slow == 0) & (left > distance >> 1)).to(tl.int32)
    return low, exceed, reach


@triton.jit
def _kth(row_ptr, head, chunks, V, k, LANES: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr):
    """Key and index of the k-th class in the order (value desc, index asc)."""
    HIGH: tl.constexpr = infinity_key(row_ptr.dtype.element_ty) + 1
    highest = tl.full([], HIGH, tl.int32)
    key, exceed, reach = _largest(
        row_ptr, head, chunks, V, 0, -highest, highest, tl.full([], V, tl.int32), k,
        LANES, C, ALIGNED, False,
    )  # fmt: skip
    missing, ties = k - exceed, reach - exceed
    # of ties that are all kept nobody asks which is the last
    last = tl.where(ties == missing, 1 - V, 0)
    index, _, _ = _largest(
        row_ptr, head, chunks, V, key, tl.full([], 1 - V, tl.int32), last, ties, missing,
        LANES, C, ALIGNED, True,
    )  # fmt: skip
    return key, -index


@triton.jit
def _terms(
    x, at, inside, row_max, cut_key, cut_index, bound, target, weight_ptr,
    KEEP: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
):  # fmt: skip
    """Of each class: exponential, 1 if it is kept, its logit, weight, weighted distance from m."""
    shifted = x.to(tl.float32) - row_max
    kept = inside
    if KEEP == LARGEST:
        kept = kept & _is_kept(value_key(x), at, cut_key, cut_index)
    if KEEP == NEAR:
        kept = kept & ((shifted >= bound) | (at == target))
    w = kept.to(tl.float32)
    if HAS_WEIGHT and HAS_SMOOTHING:
        w = tl.load(weight_ptr + at, mask=kept, other=0.0)
    spread = w
    if HAS_SMOOTHING:
        spread = tl.where(kept, 0.0 - w * shifted, 0.0)
    z = tl.where(kept, x.to(tl.float32), float("inf"))
    return tl.where(kept, tl.exp(shifted), 0.0), kept.to(tl.int32), z, w, spread


@triton.jit
def _look(
    row_ptr, head, chunks, V, row_max, cut_key, cut_index, bound, target, weight_ptr,
    LANES: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr, KEEP: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
):  # fmt: skip
    """Of the classes that are kept: sum of exponentials, how many, the least logit, the sum of the
    weights, and of the weighted distances from the maximum.
    """
    total = tl.zeros([LANES], tl.float32)
    count = tl.zeros([LANES], tl.int32)
    least = tl.full([LANES], float("inf"), tl.float32)
    weights = tl.zeros([LANES], tl.float32)
    spread = tl.zeros([LANES], tl.float32)
    for first in tl.range(0, chunks, LANES):
        x, at, inside = tile(row_ptr, head, first, chunks, float("-inf"), LANES, C)
        e, one, z, w, s = _terms(
            x, at, tl.broadcast_to(inside, x.shape), row_max, cut_key, cut_index, bound,
            target, weight_ptr, KEEP, HAS_WEIGHT, HAS_SMOOTHING,
        )  # fmt: skip
        total += tl.sum(e, 1)
        count += tl.sum(one, 1)
        least = tl.minimum(least, tl.min(z, 1))
        weights += tl.sum(w, 1)
        spread += tl.sum(s, 1)
    sums = tl.sum(total, 0), tl.sum(count, 0), tl.min(least, 0)
    sums = sums + (tl.sum(weights, 0), tl.sum(spread, 0))
    if ALIGNED:
        return sums
    at_edge, here = edges(head, chunks, V, C)
    x_edge = tl.load(row_ptr + at_edge, mask=here, other=float("-inf"))
    e, one, z, w, s = _terms(
        x_edge, at_edge, here, row_max, cut_key, cut_index, bound, target, weight_ptr,
        KEEP, HAS_WEIGHT, HAS_SMOOTHING,
    )  # fmt: skip
    return (
        sums[0] + tl.sum(e, 0),
        sums[1] + tl.sum(one, 0),
        tl.minimum(sums[2], tl.min(z, 0)),
        sums[3] + tl.sum(w, 0),
        sums[4] + tl.sum(s, 0),
    )


@kernel
def _fwd_kernel(
    logits_ptr,  # (N, V), a row is at (row // rows_t) * stride_b + (row % rows_t) * stride_t
    target_ptr,  # (N) int64
    weight_ptr,  # (V) fp32
    loss_ptr,  # (N) fp32
    lse_ptr,  # (N) fp32
    row_max_ptr,  # (N) fp32
    log_sum_ptr,  # (N) fp32
    cut_ptr,  # (N) fp32
    cut_index_ptr,  # (N) int32
    kept_ptr,  # (N) int32
    stride_b: tl.int64,
    stride_t: tl.int64,
    rows_t,
    V,
    k,
    delta,
    label_smoothing,
    LANES: tl.constexpr,
    ALIGNED: tl.constexpr,
    KEEP: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
):
    DTYPE: tl.constexpr = logits_ptr.dtype.element_ty
    C: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row_start(tl.program_id(0), rows_t, stride_b, stride_t)
    head = classes_before(row_ptr, V, ALIGNED)
    chunks = (V - head) // C
    target = tl.load(target_ptr + row)
    hit = (target >= 0) & (target < V)
    z_y = tl.load(row_ptr + target, mask=hit, other=0.0).to(tl.float32)

    row_max, total = softmax_of(row_ptr, head, chunks, V, LANES, C, ALIGNED)
    shifted_y = z_y - row_max
    y = tl.where(hit, target, -1).to(tl.int32)
    cut = tl.full([], float("-inf"), tl.float32)
    cut_index, cut_key, kept = V - 1, 0, V + 0
    bound = cut
    weights, spread = cut, cut
    if KEEP == LARGEST:
        cut_key, cut_index = _kth(row_ptr, head, chunks, V, k, LANES, C, ALIGNED)
        cut = key_value(cut_key, DTYPE)
    if KEEP == NEAR:
        log_all = tl.log(total)
        rest = tl.exp(shifted_y - log_all) - delta
        near = hit & (rest > 0)
        # whatever the rounding, what equals the target stays
        bound = tl.where(near, tl.minimum(log_all + tl.log(rest), shifted_y), bound)
        if not HAS_SMOOTHING:
            # what keeps all classes has been seen already
            chunks = tl.where(near, chunks, 0)
            head = tl.where(near, head, 0)
    if KEEP != ALL or HAS_SMOOTHING:
        seen = V
        if KEEP == NEAR and not HAS_SMOOTHING:
            seen = tl.where(near, V, 0)
        some, kept, least, weights, spread = _look(
            row_ptr, head, chunks, seen, row_max, cut_key, cut_index, bound, y, weight_ptr,
            LANES, C, ALIGNED, KEEP, HAS_WEIGHT, HAS_SMOOTHING,
        )  # fmt: skip
        if KEEP == ALL:
            # known; not summed up, they spare that loop the threads' meeting
            kept = V + 0
            if not HAS_WEIGHT:
                weights = kept.to(tl.float32)
        if KEEP == LARGEST:
            total = some
        if KEEP == NEAR:
            total = tl.where(near, some, total)
            kept = tl.where(near, kept, V)
            cut = tl.where(near, least, cut)

    log_sum = tl.log(total)
    log_sum = tl.where(row_max == float("-inf"), float("nan"), log_sum)
    loss = log_sum - shifted_y
    if HAS_WEIGHT:
        loss *= tl.load(weight_ptr + target, mask=hit, other=0.0)
    if HAS_SMOOTHING:
        nll = weights * log_sum + spread
        loss = (1 - label_smoothing) * loss + label_smoothing / kept * nll
    tl.store(loss_ptr + row, tl.where(hit, loss, float("nan")))
    tl.store(lse_ptr + row, row_max + log_sum)
    tl.store(row_max_ptr + row, row_max)
    tl.store(log_sum_ptr + row, log_sum)
    tl.store(cut_ptr + row, cut)
    tl.store(cut_index_ptr + row, cut_index)
    tl.store(kept_ptr + row, kept)


@triton.jit
def _gradient(
    x, at, inside, row_max, log_sum, cut_key, cut_index, factor, share, at_target, target,
    weight_ptr, DENSE: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
):  # fmt: skip
    p = exp_or_zero((x.to(tl.float32) - row_max) - log_sum)
    # without upstream gradient exactly zero, also where p is NaN
    g = tl.where(factor == 0, 0.0, p * factor)
    if HAS_SMOOTHING:
        if HAS_WEIGHT:
            g -= share * tl.load(weight_ptr + at, mask=inside, other=0.0)
        else:
            g -= share
    if not DENSE:
        g = tl.where(_is_kept(value_key(x), at, cut_key, cut_index), g, 0.0)
    return tl.where(at == target, g - at_target, g).to(x.dtype)


@triton.jit
def _sweep(
    row_ptr, out_ptr, head, chunks, first_chunk, last_chunk, V, row_max, log_sum, cut_key,
    cut_index, factor, share, at_target, target, weight_ptr, LANES: tl.constexpr, C: tl.constexpr,
    ALIGNED: tl.constexpr, ALIKE: tl.constexpr, DENSE: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
):  # fmt: skip
    """The gradient of the chunks from first to last, and in the first part of the edges."""
    for first in tl.range(first_chunk, last_chunk, LANES):
        x, at, inside = tile(row_ptr, head, first, last_chunk, 0.0, LANES, C)
        g = _gradient(
            x, at, inside, row_max, log_sum, cut_key, cut_index, factor, share, at_target,
            target, weight_ptr, DENSE, HAS_WEIGHT, HAS_SMOOTHING,
        )  # fmt: skip
        store_tile(out_ptr, head, first, g, at, inside, ALIKE)
    if not ALIGNED:
        if first_chunk == 0:
            at_edge, here = edges(head, chunks, V, C)
            x_edge = tl.load(row_ptr + at_edge, mask=here, other=0.0)
            g_edge = _gradient(
                x_edge, at_edge, here, row_max, log_sum, cut_key, cut_index, factor, share,
                at_target, target, weight_ptr, DENSE, HAS_WEIGHT, HAS_SMOOTHING,
            )  # fmt: skip
            tl.store(out_ptr + at_edge, g_edge, mask=here)


@kernel
def _bwd_kernel(
    dloss_ptr,  # (N) fp32
    dlse_ptr,  # (N) fp32
    logits_ptr,  # (N, V), strided as in forward
    target_ptr,  # (N) int64
    row_max_ptr,  # (N) fp32
    log_sum_ptr,  # (N) fp32
    cut_ptr,  # (N) fp32
    cut_index_ptr,  # (N) int32
    kept_ptr,  # (N) int32
    weight_ptr,  # (V) fp32
    dlogits_ptr,  # (N, V)
    stride_b: tl.int64,
    stride_t: tl.int64,
    rows_t,
    V,
    part_size,  # chunks
    label_smoothing,
    LANES: tl.constexpr,
    ALIGNED: tl.constexpr,
    ALIKE: tl.constexpr,  # chunks of logits and gradient begin at the same classes
    HAS_DLOSS: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
):
    DTYPE: tl.constexpr = dlogits_ptr.dtype.element_ty
    C: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row_start(tl.program_id(0), rows_t, stride_b, stride_t)
    head = classes_before(row_ptr, V, ALIGNED)
    chunks = (V - head) // C
    row_max = tl.load(row_max_ptr + row)
    log_sum = tl.load(log_sum_ptr + row)
    # the cut is a number of the dtype of the logits, so that its key is that of a class
    cut_key = value_key(tl.load(cut_ptr + row).to(DTYPE))
    cut_index = tl.load(cut_index_ptr + row)
    kept = tl.load(kept_ptr + row)
    target = tl.load(target_ptr + row)
    hit = (target >= 0) & (target < V)
    factor = tl.full([], 0.0, tl.float32)
    at_target = tl.full([], 0.0, tl.float32)
    share = tl.full([], 0.0, tl.float32)
    if HAS_DLOSS:
        # of a row that keeps its target alone the loss is 0, or NaN where that is at +inf
        z_y = tl.load(row_ptr + target, mask=hit, other=0.0).to(tl.float32)
        alone = (kept == 1) & (log_sum == 0) & (target <= cut_index) & (z_y == row_max)
        dloss = tl.where(hit & (alone == 0), tl.load(dloss_ptr + row), 0.0)
        at_target = dloss
        if HAS_WEIGHT:
            at_target *= tl.load(weight_ptr + target, mask=hit, other=0.0)
        if HAS_SMOOTHING:
            at_target *= 1 - label_smoothing
            share = dloss * (label_smoothing / kept)
            weights = kept.to(tl.float32)
            if HAS_WEIGHT:
                _, _, _, weights, _ = _look(
                    row_ptr, head, chunks, V, row_max, cut_key, cut_index, log_sum, target,
                    weight_ptr, LANES, C, ALIGNED, LARGEST, True, True,
                )  # fmt: skip
            factor += share * weights
        factor += at_target
    if HAS_DLSE:
        factor += tl.load(dlse_ptr + row)
    target = tl.where(hit, target, -1).to(tl.int32)

    out_ptr = dlogits_ptr + row * V
    first_chunk = tl.program_id(1) * part_size
    last_chunk = tl.minimum(first_chunk + part_size, chunks)
    if kept == V:
        _sweep(
            row_ptr, out_ptr, head, chunks, first_chunk, last_chunk, V, row_max, log_sum, cut_key,
            cut_index, factor, share, at_target, target, weight_ptr, LANES, C, ALIGNED, ALIKE,
            True, HAS_WEIGHT, HAS_DLOSS and HAS_SMOOTHING,
        )  # fmt: skip
    else:
        _sweep(
            row_ptr, out_ptr, head, chunks, first_chunk, last_chunk, V, row_max, log_sum, cut_key,
            cut_index, factor, share, at_target, target, weight_ptr, LANES, C, ALIGNED, ALIKE,
            False, HAS_WEIGHT, HAS_DLOSS and HAS_SMOOTHING,
        )  # fmt: skip


def keep_of(k: int, num_classes: int, delta: float) -> int:
    """What forward keeps."""
    keep = LARGEST if k < num_classes else NEAR if delta < 1 else ALL
    return int(keep.value)


def threshold_ce_fwd(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    k: int,
    delta: float,
    label_smoothing: float,
) -> tuple[torch.Tensor, ...]:
    rows, num_classes = logits.shape[:-1], logits.shape[-1]
    statistics = [logits.new_empty(rows, dtype=torch.float32) for _ in range(5)]
    counts = [logits.new_empty(rows, dtype=torch.int32) for _ in range(2)]
    if target.numel() > 0:
        with on_device(logits):
            _fwd_kernel[(target.numel(),)](
                logits, target, weight, *statistics, *counts, *row_strides(logits), num_classes, k,
                float(delta), label_smoothing, ALIGNED=is_aligned(logits),
                KEEP=keep_of(k, num_classes, delta), HAS_WEIGHT=weight is not None,
                HAS_SMOOTHING=label_smoothing != 0,
                **lane_options(logits.element_size(), num_classes),
            )  # fmt: skip
    return *statistics, *counts


def threshold_ce_bwd(
    dloss: torch.Tensor | None,
    dlse: torch.Tensor | None,
    logits: torch.Tensor,
    target: torch.Tensor,
    row_max: torch.Tensor,
    log_sum: torch.Tensor,
    cut: torch.Tensor,
    cut_index: torch.Tensor,
    kept: torch.Tensor,
    weight: torch.Tensor | None,
    label_smoothing: float,
) -> torch.Tensor:
    rows, num_classes = target.numel(), logits.shape[-1]
    dlogits = logits.new_empty(logits.shape)
    if rows == 0:
        return dlogits
    dloss, dlse = (None if g is None else g.contiguous() for g in (dloss, dlse))
    config = lane_options(logits.element_size(), num_classes)
    parts, part_size = parts_of_gradient(rows, dlogits, config["LANES"])
    with on_device(logits):
        _bwd_kernel[(rows, parts)](
            dloss, dlse, logits, target, row_max, log_sum, cut, cut_index, kept, weight, dlogits,
            *row_strides(logits), num_classes, part_size, label_smoothing,
            ALIGNED=is_aligned(logits, dlogits), ALIKE=begin_alike(logits, dlogits),
            HAS_DLOSS=dloss is not None, HAS_DLSE=dlse is not None,
            HAS_WEIGHT=weight is not None, HAS_SMOOTHING=label_smoothing != 0, **config,
        )  # fmt: skip
    return dlogits
