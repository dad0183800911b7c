"""The k classes that a row lists, whoever found them: their softmax, its loss, and the gradient of
their logits. What topk_ce and plif share; the formulas stand in topk_ce.py.

A list is one row's, (SIZE), with numbers of the row that are (), or those of a tile of rows,
(ROWS, SIZE), with numbers that are (ROWS, 1).
"""

import triton
import triton.language as tl

from .order import key_value, packed_index, packed_key


@triton.jit
def ranks(x):
    """0, 1, ... for each item of a list."""
    if len(x.shape) == 1:
        rank = tl.arange(0, x.shape[0])
    else:
        rank = tl.arange(0, x.shape[1])[None, :]
    return rank


@triton.jit
def _sum(x):
    if len(x.shape) == 1:
        total = tl.sum(x, axis=0)
    else:
        total = tl.sum(x, axis=1, keep_dims=True)
    return total


@triton.jit
def list_sums(value, kept):
    """Of the sorted logits of a list, of which rank 0 is the largest: the maximum, the distances
    from it, and the logarithm of their sum of exponentials.
    """
    row_max = _sum(tl.where(ranks(value) == 0, value, 0.0))
    shifted = tl.where(kept, value - row_max, float("-inf"))
    return row_max, shifted, tl.log(_sum(tl.exp(shifted)))


@triton.jit
def list_loss(
    row_max,
    shifted,  # of rank 0, 1, ...
    log_sum,
    index,
    kept,  # rank < k
    target,
    hit,
    z_y,  # fp32, where the target is a hit
    row,  # int64
    weight_ptr,
    loss_ptr,
    lse_ptr,
    k,
    label_smoothing,
    HAS_WEIGHT: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
):
    """Loss and log-sum-exp of a list."""
    loss = log_sum - (z_y - row_max)
    if HAS_WEIGHT:
        loss *= tl.load(weight_ptr + target, mask=hit, other=0.0)
    if HAS_SMOOTHING:
        nll = log_sum - shifted
        if HAS_WEIGHT:
            nll *= tl.load(weight_ptr + index, mask=kept, other=0.0)
        spread = _sum(tl.where(kept, nll, 0.0))
        loss = (1 - label_smoothing) * loss + label_smoothing / k * spread
    tl.store(loss_ptr + row, tl.where(hit, loss, float("nan")))
    tl.store(lse_ptr + row, row_max + log_sum)


@triton.jit
def list_outputs(
    packed,  # at least k, descending
    row,  # int64
    row_ptr,
    target_ptr,
    weight_ptr,
    loss_ptr,
    lse_ptr,
    indices_ptr,
    probs_ptr,
    V,
    k,
    label_smoothing,
    HAS_WEIGHT: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
):
    """Everything that forward returns, from the sorted classes of a list."""
    rank = ranks(packed)
    kept = rank < k
    index = packed_index(packed)
    value = key_value(packed_key(packed), row_ptr.dtype.element_ty)
    row_max, shifted, log_sum = list_sums(value, kept)
    target = tl.load(target_ptr + row)
    hit = (target >= 0) & (target < V)
    z_y = tl.load(row_ptr + target, mask=hit, other=0.0).to(tl.float32)
    list_loss(
        row_max, shifted, log_sum, index, kept, target, hit, z_y, row, weight_ptr, loss_ptr,
        lse_ptr, k, label_smoothing, HAS_WEIGHT, HAS_SMOOTHING,
    )  # fmt: skip
    out = row * k + rank
    tl.store(indices_ptr + out, index, mask=kept)
    tl.store(probs_ptr + out, tl.exp(shifted - log_sum), mask=kept)


@triton.jit
def list_gradient(
    p,  # 0 where not kept
    index,  # -1 where not kept
    kept,  # rank < k
    target,
    hit,
    row,  # int64
    dloss_ptr,
    dlse_ptr,
    dprobs_ptr,
    weight_ptr,
    k,
    label_smoothing,
    HAS_DLOSS: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    HAS_DPROBS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
):
    """The gradient of the logits of a list, that of the target, and whether it is outside of the
    list: inside, it is joined to its own.
    """
    factor = tl.zeros_like(p)
    at_target = tl.zeros_like(target).to(tl.float32)
    spread = tl.zeros_like(p)
    if HAS_DLOSS:
        dloss = tl.where(hit, tl.load(dloss_ptr + row), 0.0)
        at_target = dloss
        if HAS_WEIGHT:
            at_target *= tl.load(weight_ptr + target, mask=hit, other=0.0)
        if HAS_SMOOTHING:
            at_target *= 1 - label_smoothing
            spread += dloss * (label_smoothing / k)
            if HAS_WEIGHT:
                spread *= tl.load(weight_ptr + index, mask=kept, other=0.0)
            spread = tl.where(kept, spread, 0.0)
            factor += _sum(spread)
        factor += at_target
    if HAS_DLSE:
        factor += tl.load(dlse_ptr + row)
    if HAS_DPROBS:
        q = tl.load(dprobs_ptr + row * k + ranks(index), mask=kept, other=0.0)
        factor += q - _sum(tl.where(q == 0, 0.0, q * p))
    # without upstream gradient exactly zero, also where p is NaN
    g = tl.where(factor == 0, 0.0, p * factor) - spread
    is_target = hit & (index == target)
    g = tl.where(is_target, g - at_target, g)
    outside = hit & (_sum(is_target.to(tl.int32)) == 0)
    return g, 0.0 - at_target, outside
