"""plif on the GPU: one increasing piecewise-linear function f of all logits, alone, before the
dense softmax and on the sparse support.

With v_i, o_i slope and offset of the cell i(x) of x, m the maximum of f(z) over a row, y the
target, V classes, e the label smoothing, w the class weights, and a, b the gradients of loss and
lse:

    f(x) = v_i x + o_i                    L = log sum exp(f(z_i) - m)           lse = m + L
    loss = (1 - e) w_y (L - (f(z_y) - m)) + (e / V) sum w_i (L - (f(z_i) - m))

    g_i  = exp(f(z_i) - m - L) (a A + b) - a (e / V) w_i - [i = y] a (1 - e) w_y
    dz_i = v_i g_i                        A = (1 - e) w_y + (e / V) sum w_i

The gradient of the slopes is made of two sums per cell, of g and of g times the share of the cell
left of z: integers of 64 bits in fixed point, so that atomic additions give the same bits in any
order. Source: Ganea et al., Learnable monotonic pointwise non-linearities, arXiv 1902.08077.

Saved for backward: the logits by reference, 8 bytes per row, and the tables, 8 bytes per cell,
which stay in the second cache. Forward reads a row once, as softmax.py does; label smoothing takes
a second look, from the cache. Backward reads the logits and writes the gradient, once each, and
sends two atomic additions per logit where the slopes learn. A share is computed in float64: of one
cell in 100,000, float32 resolves a hundredth.

On the support f keeps the order, so that the k largest are those that topk_ce lists. With S these k
classes, and sums over S in place of those over V, the formulas are those of topk_ce.py; g is placed
into zeros, v_i g_i. Saved are the values, 4 (k + 1) bytes per row, beside what topk_ce saves. Both
kernels move some 20 k bytes per row, next to the V * itemsize that its list, or the zeros, cost.
"""

import torch
import triton
import triton.language as tl

from .list import list_gradient, list_loss, list_sums
from .order import max_nan
from .rows import (
    begin_alike,
    cdiv,
    classes_before,
    edges,
    is_aligned,
    kernel,
    next_power_of_2,
    on_device,
    parts_of_gradient,
    row_start,
    row_strides,
    store_tile,
    tile,
    warps,
)
from .softmax import absorb, lane_options, sum_over_lanes
from .topk_ce import topk_ce_fwd

# Elements of a program of the function alone.
BLOCK = 1024


@triton.jit
def _cell(x, bound, rate, K):
    place = (x + bound) * rate
    place = tl.where(place > 0, place, 0.0)  # a NaN too
    return tl.minimum(place, K - 1.0).to(tl.int32)


@triton.jit
def _apply(x, slopes_ptr, offsets_ptr, bound, rate, K):
    cell = _cell(x, bound, rate, K)
    return tl.load(slopes_ptr + cell) * x + tl.load(offsets_ptr + cell)


@triton.jit
def _add_to_cells(cells_ptr, cell, total, moment, inside):
    """Of tiles (LANES, C) column by column, so that each lane sends its own numbers: those of a
    tile the compiler would first deal out anew, through shared memory.
    """
    LANES: tl.constexpr = cell.shape[0]
    if len(cell.shape) == 1:
        # + 0: of what was split the interpreter of Triton 3.6 adds other numbers, unless an
        # operation has laid them side by side
        tl.atomic_add(cells_ptr + cell * 2, total + 0, mask=inside, sem="relaxed")
        tl.atomic_add(cells_ptr + cell * 2 + 1, moment + 0, mask=inside, sem="relaxed")
    elif cell.shape[1] == 1:
        _add_to_cells(
            cells_ptr, tl.reshape(cell, [LANES]), tl.reshape(total, [LANES]),
            tl.reshape(moment, [LANES]), tl.reshape(inside, [LANES]),
        )  # fmt: skip
    else:
        HALVES: tl.constexpr = [LANES, cell.shape[1] // 2, 2]
        cells = tl.split(tl.reshape(cell, HALVES))
        totals = tl.split(tl.reshape(total, HALVES))
        moments = tl.split(tl.reshape(moment, HALVES))
        masks = tl.split(tl.reshape(tl.broadcast_to(inside, cell.shape).to(tl.int8), HALVES))
        for half in tl.static_range(2):
            _add_to_cells(cells_ptr, cells[half], totals[half], moments[half], masks[half] != 0)


@triton.jit
def _add(g, x, cell, inside, cells_ptr, scale, bound, K):
    """Adds gradients of f(x) to the sums of their cells; returns what lies left of the bounds, and
    right of them.
    """
    wide = x.to(tl.float64)
    scaled = g.to(tl.float64) * scale
    wide_bound = tl.zeros([], tl.float64) + bound
    share = (wide + wide_bound) * (K / (2 * wide_bound)) - cell
    share = tl.where(share > 0, tl.where(share < 1, share, 1.0), 0.0)
    _add_to_cells(cells_ptr, cell, scaled.to(tl.int64), (scaled * share).to(tl.int64), inside)
    counts = inside & (g != 0)  # where x is -inf g may be 0
    right = counts & (x > bound)
    left = counts & ((x >= -bound) == 0)
    g64 = g.to(tl.float64)
    return (
        tl.where(left, g64 * (wide + wide_bound), 0.0),
        tl.where(right, g64 * (wide - wide_bound), 0.0),
    )


@triton.jit(do_not_specialize=["elements", "K"])
def _fwd_kernel(
    x_ptr,  # (elements)
    slopes_ptr,  # (K) fp32
    offsets_ptr,  # (K) fp32
    y_ptr,  # (elements)
    elements,
    K,
    bound,
    rate,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    y = _apply(x, slopes_ptr, offsets_ptr, bound, rate, K)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["elements", "K"])
def _bwd_kernel(
    dy_ptr,  # (elements)
    x_ptr,  # (elements)
    slopes_ptr,  # (K) fp32
    scale_ptr,  # () fp64
    dx_ptr,  # (elements)
    cells_ptr,  # (K, 2) int64
    outside_ptr,  # (programs, 2) fp64
    elements,
    K,
    bound,
    rate,
    LEARNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    at = program * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
    cell = _cell(x, bound, rate, K)
    dx = g * tl.load(slopes_ptr + cell)
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if LEARNS:
        left, right = _add(g, x, cell, inside, cells_ptr, tl.load(scale_ptr), bound, K)
        tl.store(outside_ptr + program * 2, tl.sum(left, 0))
        tl.store(outside_ptr + program * 2 + 1, tl.sum(right, 0))


@triton.jit
def _values(x, inside, slopes_ptr, offsets_ptr, bound, rate, K):
    """f(z_i) of classes, minus infinity where there is none."""
    f = _apply(x.to(tl.float32), slopes_ptr, offsets_ptr, bound, rate, K)
    return tl.where(inside, f, float("-inf"))


@triton.jit
def _distances(
    x, at, inside, row_max, weight_ptr, slopes_ptr, offsets_ptr, bound, rate, K,
    HAS_WEIGHT: tl.constexpr,
):  # fmt: skip
    """w_i (m - f(z_i)) of classes."""
    distance = row_max - _apply(x.to(tl.float32), slopes_ptr, offsets_ptr, bound, rate, K)
    if HAS_WEIGHT:
        distance *= tl.load(weight_ptr + at, mask=inside, other=0.0)
    return tl.where(inside, distance, 0.0)


@kernel
def _ce_fwd_kernel(
    logits_ptr,  # (N, V), a row is at (row // rows_t) * stride_b + (row % rows_t) * stride_t
    target_ptr,  # (N) int64
    class_weight_ptr,  # (V) fp32
    weights_ptr,  # () fp32: their sum
    slopes_ptr,  # (K) fp32
    offsets_ptr,  # (K) fp32
    loss_ptr,  # (N) fp32
    lse_ptr,  # (N) fp32
    row_max_ptr,  # (N) fp32
    log_sum_ptr,  # (N) fp32
    stride_b: tl.int64,
    stride_t: tl.int64,
    rows_t,
    V,
    K,
    bound,
    rate,
    label_smoothing,
    LANES: tl.constexpr,
    ALIGNED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
):
    C: tl.constexpr = 128 // logits_ptr.dtype.element_ty.primitive_bitwidth
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row_start(tl.program_id(0), rows_t, stride_b, stride_t)
    head = classes_before(row_ptr, V, ALIGNED)
    chunks = (V - head) // C
    largest = tl.full([LANES], float("-inf"), tl.float32)
    total = tl.zeros([LANES], tl.float32)
    for first in tl.range(0, chunks, LANES):
        x, _, here = tile(row_ptr, head, first, chunks, 0.0, LANES, C)
        f = _values(x, here, slopes_ptr, offsets_ptr, bound, rate, K)
        largest, total = absorb(largest, total, f, 1)
    row_max = tl.reduce(largest, 0, max_nan)
    _, row_total = sum_over_lanes(largest, total, row_max)
    at_edge, at_edges = edges(head, chunks, V, C)
    if not ALIGNED:
        x_edge = tl.load(row_ptr + at_edge, mask=at_edges, other=0.0)
        f_edge = _values(x_edge, at_edges, slopes_ptr, offsets_ptr, bound, rate, K)
        row_max, row_total = absorb(row_max, row_total, f_edge, 0)

    log_sum = tl.log(row_total)
    log_sum = tl.where(row_max == float("-inf"), float("nan"), log_sum)
    target = tl.load(target_ptr + row)
    hit = (target >= 0) & (target < V)
    x_y = tl.load(row_ptr + target, mask=hit, other=0.0).to(tl.float32)
    # the maximum leaves both terms before they meet
    loss = log_sum - (_apply(x_y, slopes_ptr, offsets_ptr, bound, rate, K) - row_max)
    if HAS_WEIGHT:
        loss *= tl.load(class_weight_ptr + target, mask=hit, other=0.0)
    if HAS_SMOOTHING:
        spread = tl.zeros([LANES], tl.float32)
        for first in tl.range(0, chunks, LANES):
            x, at, here = tile(row_ptr, head, first, chunks, 0.0, LANES, C)
            distance = _distances(
                x, at, here, row_max, class_weight_ptr, slopes_ptr, offsets_ptr, bound,
                rate, K, HAS_WEIGHT,
            )  # fmt: skip
            spread += tl.sum(distance, 1)
        row_spread = tl.sum(spread, 0)
        if not ALIGNED:
            x_edge = tl.load(row_ptr + at_edge, mask=at_edges, other=0.0)
            distance_edge = _distances(
                x_edge, at_edge, at_edges, row_max, class_weight_ptr, slopes_ptr, offsets_ptr,
                bound, rate, K, HAS_WEIGHT,
            )  # fmt: skip
            row_spread += tl.sum(distance_edge, 0)
        nll = tl.load(weights_ptr) * log_sum + row_spread
        loss = (1 - label_smoothing) * loss + label_smoothing / V * nll
    tl.store(loss_ptr + row, tl.where(hit, loss, float("nan")))
    tl.store(lse_ptr + row, row_max + log_sum)
    tl.store(row_max_ptr + row, row_max)
    tl.store(log_sum_ptr + row, log_sum)


@triton.jit
def _gradient(
    x, at, inside, row_max, log_sum, factor, share, at_target, target, weight_ptr, slopes_ptr,
    offsets_ptr, cells_ptr, scale, bound, rate, K, AXIS: tl.constexpr, LEARNS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
):  # fmt: skip
    """The gradient of logits; along AXIS, where the slopes learn, what lies outside."""
    z = x.to(tl.float32)
    cell = _cell(z, bound, rate, K)
    slope = tl.load(slopes_ptr + cell)
    f = slope * z + tl.load(offsets_ptr + cell)
    # without upstream gradient exactly zero, also where p is NaN
    g = tl.where(factor == 0, 0.0, tl.exp((f - row_max) - log_sum) * factor)
    if HAS_SMOOTHING:
        if HAS_WEIGHT:
            g -= share * tl.load(weight_ptr + at, mask=inside, other=0.0)
        else:
            g -= share
    g = tl.where(at == target, g - at_target, g)
    dx = (g * slope).to(x.dtype)
    if LEARNS:
        left, right = _add(g, z, cell, inside & (g != 0), cells_ptr, scale, bound, K)
        return dx, tl.sum(left, AXIS), tl.sum(right, AXIS)
    else:
        return dx, 0.0, 0.0


@kernel
def _ce_bwd_kernel(
    dloss_ptr,  # (N) fp32
    dlse_ptr,  # (N) fp32
    logits_ptr,  # (N, V), strided as in forward
    target_ptr,  # (N) int64
    row_max_ptr,  # (N) fp32
    log_sum_ptr,  # (N) fp32
    class_weight_ptr,  # (V) fp32
    weights_ptr,  # () fp32: their sum
    slopes_ptr,  # (K) fp32
    offsets_ptr,  # (K) fp32
    scale_ptr,  # () fp64
    dlogits_ptr,  # (N, V)
    cells_ptr,  # (K, 2) int64
    outside_ptr,  # (N, parts, 2) fp64
    stride_b: tl.int64,
    stride_t: tl.int64,
    rows_t,
    V,
    K,
    part_size,  # chunks
    bound,
    rate,
    label_smoothing,
    LANES: tl.constexpr,
    ALIGNED: tl.constexpr,
    ALIKE: tl.constexpr,
    LEARNS: tl.constexpr,
    HAS_DLOSS: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
):
    C: tl.constexpr = 128 // dlogits_ptr.dtype.element_ty.primitive_bitwidth
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row_start(tl.program_id(0), rows_t, stride_b, stride_t)
    out_ptr = dlogits_ptr + row * V
    head = classes_before(row_ptr, V, ALIGNED)
    chunks = (V - head) // C
    row_max = tl.load(row_max_ptr + row)
    log_sum = tl.load(log_sum_ptr + row)
    target = tl.load(target_ptr + row)
    # of a row with one class the loss is 0
    hit = (target >= 0) & (target < V) & (V > 1)
    factor = tl.full([], 0.0, tl.float32)
    at_target = tl.full([], 0.0, tl.float32)
    share = tl.full([], 0.0, tl.float32)
    if HAS_DLOSS:
        dloss = tl.where(hit, tl.load(dloss_ptr + row), 0.0)
        at_target = dloss
        if HAS_WEIGHT:
            at_target *= tl.load(class_weight_ptr + target, mask=hit, other=0.0)
        if HAS_SMOOTHING:
            at_target *= 1 - label_smoothing
            share = dloss * (label_smoothing / V)
            factor += share * tl.load(weights_ptr)
        factor += at_target
    if HAS_DLSE:
        factor += tl.load(dlse_ptr + row)
    target = tl.where(hit, target, -1).to(tl.int32)
    scale = tl.zeros([], tl.float64)
    if LEARNS:
        scale = tl.load(scale_ptr)

    left = tl.zeros([LANES], tl.float64)
    right = tl.zeros([LANES], tl.float64)
    first_chunk = tl.program_id(1) * part_size
    last_chunk = tl.minimum(first_chunk + part_size, chunks)
    for first in tl.range(first_chunk, last_chunk, LANES):
        x, at, inside = tile(row_ptr, head, first, last_chunk, 0.0, LANES, C)
        g, more_left, more_right = _gradient(
            x, at, inside, row_max, log_sum, factor, share, at_target, target,
            class_weight_ptr, slopes_ptr, offsets_ptr, cells_ptr, scale, bound, rate, K, 1, LEARNS,
            HAS_WEIGHT, HAS_DLOSS and HAS_SMOOTHING,
        )  # fmt: skip
        left += more_left
        right += more_right
        store_tile(out_ptr, head, first, g, at, inside, ALIKE)
    part_left, part_right = tl.sum(left, 0), tl.sum(right, 0)
    if not ALIGNED:
        if first_chunk == 0:
            at_edge, at_edges = edges(head, chunks, V, C)
            x_edge = tl.load(row_ptr + at_edge, mask=at_edges, other=0.0)
            g_edge, left_edge, right_edge = _gradient(
                x_edge, at_edge, at_edges, row_max, log_sum, factor, share, at_target, target,
                class_weight_ptr, slopes_ptr, offsets_ptr, cells_ptr, scale, bound, rate, K, 0,
                LEARNS, HAS_WEIGHT, HAS_DLOSS and HAS_SMOOTHING,
            )  # fmt: skip
            part_left += left_edge
            part_right += right_edge
            tl.store(out_ptr + at_edge, g_edge, mask=at_edges)
    if LEARNS:
        part = row * tl.num_programs(1) + tl.program_id(1)
        tl.store(outside_ptr + part * 2, part_left)
        tl.store(outside_ptr + part * 2 + 1, part_right)


@kernel
def _topk_fwd_kernel(
    logits_ptr,  # (N, V), a row is at (row // rows_t) * stride_b + (row % rows_t) * stride_t
    target_ptr,  # (N) int64
    class_weight_ptr,  # (V) fp32
    slopes_ptr,  # (K) fp32
    offsets_ptr,  # (K) fp32
    loss_ptr,  # (N) fp32
    lse_ptr,  # (N) fp32
    indices_ptr,  # (N, k) int32, given
    probs_ptr,  # (N, k) fp32
    values_ptr,  # (N, k + 1) fp32
    stride_b: tl.int64,
    stride_t: tl.int64,
    rows_t,
    V,
    K,
    k,
    bound,
    rate,
    label_smoothing,
    K2: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row_start(tl.program_id(0), rows_t, stride_b, stride_t)
    rank = tl.arange(0, K2)
    kept = rank < k
    index = tl.load(indices_ptr + row * k + rank, mask=kept, other=0)
    x = tl.load(row_ptr + index, mask=kept, other=0.0).to(tl.float32)
    target = tl.load(target_ptr + row)
    x_y = tl.load(row_ptr + tl.minimum(tl.maximum(target, 0), V - 1)).to(tl.float32)
    values_ptr += row * (k + 1)
    tl.store(values_ptr + rank, x, mask=kept)
    tl.store(values_ptr + k, x_y)
    f = _apply(x, slopes_ptr, offsets_ptr, bound, rate, K)
    f_y = _apply(x_y, slopes_ptr, offsets_ptr, bound, rate, K)
    row_max, shifted, log_sum = list_sums(f, kept)
    list_loss(
        row_max, shifted, log_sum, index, kept, target, (target >= 0) & (target < V), f_y, row,
        class_weight_ptr, loss_ptr, lse_ptr, k, label_smoothing, HAS_WEIGHT, HAS_SMOOTHING,
    )  # fmt: skip
    tl.store(probs_ptr + row * k + rank, tl.exp(shifted - log_sum), mask=kept)


@kernel
def _topk_bwd_kernel(
    dloss_ptr,  # (N) fp32
    dlse_ptr,  # (N) fp32
    dprobs_ptr,  # (N, k) fp32
    target_ptr,  # (N) int64
    indices_ptr,  # (N, k) int32
    probs_ptr,  # (N, k) fp32
    values_ptr,  # (N, k + 1) fp32
    class_weight_ptr,  # (V) fp32
    slopes_ptr,  # (K) fp32
    scale_ptr,  # () fp64
    dlogits_ptr,  # (N, V), zeros
    cells_ptr,  # (K, 2) int64
    outside_ptr,  # (N, 2) fp64
    V,
    K,
    k,
    bound,
    rate,
    label_smoothing,
    K2: tl.constexpr,
    LEARNS: tl.constexpr,
    HAS_DLOSS: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    HAS_DPROBS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    hit = (target >= 0) & (target < V)
    rank = tl.arange(0, K2)
    kept = rank < k
    index = tl.load(indices_ptr + row * k + rank, mask=kept, other=-1)
    p = tl.load(probs_ptr + row * k + rank, mask=kept, other=0.0)
    g, at_target, outside = list_gradient(
        p, index, kept, target, hit, row, dloss_ptr, dlse_ptr, dprobs_ptr, class_weight_ptr, k,
        label_smoothing, HAS_DLOSS, HAS_DLSE, HAS_DPROBS, HAS_WEIGHT, HAS_SMOOTHING,
    )  # fmt: skip
    # what follows the list is the target's
    g = tl.where(kept, g, at_target)
    inside = rank < k + outside.to(tl.int32)
    x = tl.load(values_ptr + row * (k + 1) + rank, mask=inside, other=0.0)
    cell = _cell(x, bound, rate, K)
    dx = g * tl.load(slopes_ptr + cell)
    at = row * V + tl.where(kept, index, target)
    tl.store(dlogits_ptr + at, dx.to(dlogits_ptr.dtype.element_ty), mask=inside)
    if LEARNS:
        # NaN, where p is, is no integer
        g = tl.where(inside & (g == g), g, 0.0)
        left, right = _add(g, x, cell, g != 0, cells_ptr, tl.load(scale_ptr), bound, K)
        tl.store(outside_ptr + row * 2, tl.sum(left, 0))
        tl.store(outside_ptr + row * 2 + 1, tl.sum(right, 0))


def list_options(k: int) -> dict[str, int]:
    """The configuration of both kernels on the support: the k listed and the target."""
    size = max(32, next_power_of_2(k + 1))
    return {"K2": size, **warps(size // 128 or 1)}


def _rate(slopes: torch.Tensor, bound: float) -> float:
    return slopes.shape[0] / (2 * bound)


def _sums(
    slopes: torch.Tensor, scale: torch.Tensor | None, parts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Zeros for cells, and for what lies outside, by parts of the data."""
    cells = slopes.new_zeros((0 if scale is None else slopes.shape[0], 2), dtype=torch.int64)
    return cells, slopes.new_zeros((0 if scale is None else parts, 2), dtype=torch.float64)


def plif_fwd(
    x: torch.Tensor, slopes: torch.Tensor, offsets: torch.Tensor, bound: float
) -> torch.Tensor:
    y = torch.empty_like(x)
    if x.numel() > 0:
        with on_device(x):
            _fwd_kernel[(cdiv(x.numel(), BLOCK),)](
                x, slopes, offsets, y, x.numel(), slopes.shape[0], float(bound),
                _rate(slopes, bound), BLOCK=BLOCK, **warps(4),
            )  # fmt: skip
    return y


def plif_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    slopes: torch.Tensor,
    bound: float,
    scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dx = torch.empty_like(x)
    programs = cdiv(x.numel(), BLOCK)
    cells, outside = _sums(slopes, scale, programs)
    if x.numel() > 0:
        with on_device(x):
            _bwd_kernel[(programs,)](
                dy, x, slopes, scale, dx, cells, outside, x.numel(), slopes.shape[0], float(bound),
                _rate(slopes, bound), LEARNS=scale is not None, BLOCK=BLOCK, **warps(4),
            )  # fmt: skip
    return dx, cells, outside.sum(0)


def _weights(
    weight: torch.Tensor | None, num_classes: int, like: torch.Tensor, label_smoothing: float
) -> torch.Tensor | None:
    """() fp32: the sum of the class weights, where labels are smoothed."""
    if label_smoothing == 0:
        return None
    return like.new_full((), num_classes) if weight is None else weight.sum()


def plif_ce_fwd(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    slopes: torch.Tensor,
    offsets: torch.Tensor,
    bound: float,
    label_smoothing: float,
) -> tuple[torch.Tensor, ...]:
    rows, num_classes = logits.shape[:-1], logits.shape[-1]
    statistics = tuple(slopes.new_empty(rows) for _ in range(4))
    if target.numel() > 0:
        with on_device(logits):
            _ce_fwd_kernel[(target.numel(),)](
                logits, target, weight, _weights(weight, num_classes, slopes, label_smoothing),
                slopes, offsets, *statistics, *row_strides(logits), num_classes, slopes.shape[0],
                float(bound), _rate(slopes, bound), label_smoothing, ALIGNED=is_aligned(logits),
                HAS_WEIGHT=weight is not None, HAS_SMOOTHING=label_smoothing != 0,
                **lane_options(logits.element_size(), num_classes),
            )  # fmt: skip
    return statistics


def plif_ce_bwd(
    dloss: torch.Tensor | None,
    dlse: torch.Tensor | None,
    logits: torch.Tensor,
    target: torch.Tensor,
    row_max: torch.Tensor,
    log_sum: torch.Tensor,
    weight: torch.Tensor | None,
    slopes: torch.Tensor,
    offsets: torch.Tensor,
    bound: float,
    label_smoothing: float,
    scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, num_classes = target.numel(), logits.shape[-1]
    dlogits = logits.new_empty(logits.shape)
    dloss, dlse = (None if g is None else g.contiguous() for g in (dloss, dlse))
    config = lane_options(logits.element_size(), num_classes)
    parts, part_size = parts_of_gradient(rows, dlogits, config["LANES"])
    cells, outside = _sums(slopes, scale, rows * parts)
    if rows > 0:
        with on_device(logits):
            _ce_bwd_kernel[(rows, parts)](
                dloss, dlse, logits, target, row_max, log_sum, weight,
                _weights(weight, num_classes, slopes, label_smoothing), slopes, offsets, scale,
                dlogits, cells, outside, *row_strides(logits), num_classes, slopes.shape[0],
                part_size, float(bound), _rate(slopes, bound), label_smoothing,
                ALIGNED=is_aligned(logits, dlogits), ALIKE=begin_alike(logits, dlogits),
                LEARNS=scale is not None, HAS_DLOSS=dloss is not None, HAS_DLSE=dlse is not None,
                HAS_WEIGHT=weight is not None, HAS_SMOOTHING=label_smoothing != 0, **config,
            )  # fmt: skip
    return dlogits, cells, outside.sum(0)


def plif_topk_ce_fwd(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    slopes: torch.Tensor,
    offsets: torch.Tensor,
    bound: float,
    k: int,
    label_smoothing: float,
) -> tuple[torch.Tensor, ...]:
    # of the list of the logits the indices stay; the rest is written anew
    outputs = topk_ce_fwd(logits, target, None, k, 0.0)
    values = slopes.new_empty((*target.shape, k + 1))
    if target.numel() > 0:
        with on_device(logits):
            _topk_fwd_kernel[(target.numel(),)](
                logits, target, weight, slopes, offsets, *outputs, values, *row_strides(logits),
                logits.shape[-1], slopes.shape[0], k, float(bound), _rate(slopes, bound),
                label_smoothing, HAS_WEIGHT=weight is not None, HAS_SMOOTHING=label_smoothing != 0,
                **list_options(k),
            )  # fmt: skip
    return *outputs, values


def plif_topk_ce_bwd(
    dloss: torch.Tensor | None,
    dlse: torch.Tensor | None,
    dprobs: torch.Tensor | None,
    target: torch.Tensor,
    indices: torch.Tensor,
    probs: torch.Tensor,
    values: torch.Tensor,
    weight: torch.Tensor | None,
    slopes: torch.Tensor,
    bound: float,
    label_smoothing: float,
    num_classes: int,
    dtype: torch.dtype,
    scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    k, rows = indices.shape[-1], target.numel()
    dlogits = probs.new_zeros((*target.shape, num_classes), dtype=dtype)
    dloss, dlse, dprobs = (None if g is None else g.contiguous() for g in (dloss, dlse, dprobs))
    cells, outside = _sums(slopes, scale, rows)
    if rows > 0:
        with on_device(probs):
            _topk_bwd_kernel[(rows,)](
                dloss, dlse, dprobs, target, indices, probs, values, weight, slopes, scale,
                dlogits, cells, outside, num_classes, slopes.shape[0], k, float(bound),
                _rate(slopes, bound), label_smoothing, LEARNS=scale is not None,
                HAS_DLOSS=dloss is not None, HAS_DLSE=dlse is not None,
                HAS_DPROBS=dprobs is not None, HAS_WEIGHT=weight is not None,
                HAS_SMOOTHING=label_smoothing != 0, **list_options(k),
            )  # fmt: skip
    return dlogits, cells, outside.sum(0)
