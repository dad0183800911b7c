"""topk_ce on the GPU where rows are short and several share a program. The formulas: topk_ce.py.

Such rows are bound by instructions, not by memory: what finds a bound, sorts a list and ends a row
takes a warp as long for 1000 classes as for 100,000. Here a warp has ROWS rows, LANES = 32 / ROWS
of its lanes for each, and an instruction of those steps works for all of them.

Forward is that of topk_ce.py otherwise. The chunks of a row are dealt to its lanes, and each lane
keeps maxima of its own in registers, of EACH * C places. A bound comes from COARSE maxima of these;
a bit of a word says which place reaches it, so that only the few that do take instructions. Their
places are listed, their classes looked at again, and those that reach the bound are listed and
sorted, TOP at a time. Lists of the rows are interleaved: a lane finds its own beside those of its
neighbours. A row whose ties fill a list is left to _exact_kernel.

Where classes are few, all are sorted.

Of an axis whose order in memory it cannot know, the compiler takes the last for the lanes: so tiles
are (what a lane holds, LANES, ROWS), and no step moves anything from lane to lane but sums and the
sort. Triton 3.6 takes the first, and gets its tiles turned round.
"""

import torch
import triton
import triton.language as tl

from .list import list_gradient, list_outputs
from .order import key_value, lowest, max_nan, octave, pack, thresholds, value_key
from .rows import (
    cdiv,
    classes_before,
    is_aligned,
    kernel,
    next_power_of_2,
    row_start,
    row_strides,
    store_zeros,
    warps,
)

# Above every key.
SETTLED = tl.constexpr(0x7FFFFFFF)
ROWS_LAST = tl.constexpr(not triton.__version__.startswith("3.6."))
# Up to which k several short rows share a program.
FEW_K, SHORT_K = 32, 128
# Of logits that a warp has at work. They are looked at again, from the nearest caches.
BYTES = 16384
# Chunks of a tile that a lane keeps maxima of: 32 registers.
EACH = tl.constexpr(8)


@triton.jit
def _rows(N, ROWS: tl.constexpr):
    """The first row of a program, and all of them (ROWS). After the last row comes the last again:
    it is written twice, alike.
    """
    first = tl.program_id(0) * ROWS
    return first, first + tl.minimum(tl.arange(0, ROWS), N - 1 - first)


@triton.jit
def _turned(x):
    """A tile of three axes, as the compiler wants it in memory accesses."""
    if ROWS_LAST:
        y = x
    else:
        y = tl.permute(x, [2, 1, 0])
    return y


@triton.jit
def _load(ptr, mask, other):
    return _turned(tl.load(_turned(ptr), mask=_turned(mask), other=other))


@triton.jit
def _store(ptr, x, mask):
    tl.store(_turned(ptr), _turned(x), mask=_turned(mask))


@triton.jit
def _joined(x):
    """(A, B, LANES, ROWS) -> (A * B, LANES, ROWS)"""
    return tl.reshape(x, [x.shape[0] * x.shape[1], x.shape[2], x.shape[3]])


@triton.jit
def _places(count):
    """Of (M, LANES, ROWS) numbers, the sum of those before, and (ROWS) sums of all."""
    within = tl.cumsum(count, axis=0)
    of_lane = tl.sum(count, axis=0)
    before = tl.cumsum(of_lane, axis=0) - of_lane
    return before[None, :, :] + within - count, tl.sum(of_lane, axis=0)


@triton.jit
def _ones(word):
    """How many bits of a uint32 are set. LLVM knows this by heart."""
    x = word - ((word >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    return ((((x + (x >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _maxima(
    logits_ptr,
    start,  # (ROWS) int64, of the whole chunks
    chunks,  # (ROWS)
    whole,  # tiles of which all rows have all chunks
    tiles,
    LANES: tl.constexpr,
):
    """(EACH, C, LANES, ROWS): the largest of each place. The streaming pass."""
    DTYPE: tl.constexpr = logits_ptr.dtype.element_ty
    C: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    ROWS: tl.constexpr = start.shape[0]
    TILE: tl.constexpr = EACH * LANES
    lane = tl.arange(0, LANES)[:, None]
    at = start[None, :] + lane * C
    left = chunks[None, :] - lane - whole * TILE
    each = tl.arange(0, EACH) * LANES
    if ROWS_LAST:
        at = at[None, :, :, None]
        offset = each[:, None, None, None] * C + tl.arange(0, C)[None, None, None, :]
        best = tl.full([EACH, LANES, ROWS, C], float("-inf"), tl.float32).to(DTYPE)
    else:
        at = tl.trans(at)[:, :, None, None]
        offset = each[None, None, :, None] * C + tl.arange(0, C)[None, None, None, :]
        best = tl.full([ROWS, LANES, EACH, C], float("-inf"), tl.float32).to(DTYPE)
    for _ in tl.range(0, whole):
        # an alignment counts in bytes, and holds only for a sum that this very function makes
        x = tl.load(tl.multiple_of(logits_ptr + at, [16, 16, 16, 16]) + offset)
        best = max_nan(best, x).to(DTYPE)
        at += TILE * C
    for _ in tl.range(whole, tiles):
        inside = _turned(each[:, None, None] < left[None, :, :])[:, :, :, None]
        x = tl.load(
            tl.multiple_of(logits_ptr + at, [16, 16, 16, 16]) + offset,
            mask=inside, other=float("-inf"),
        )  # fmt: skip
        best = max_nan(best, x).to(DTYPE)
        at += TILE * C
        left -= TILE
    if ROWS_LAST:
        best = tl.permute(best, [0, 3, 1, 2])
    else:
        best = tl.permute(best, [2, 3, 1, 0])
    return best


@triton.jit
def _list_places(best, limit, places_ptr, SIZE: tl.constexpr):
    """List the places of (EACH, C, LANES, ROWS) whose maxima reach the limit; (ROWS) how many."""
    C: tl.constexpr = best.shape[1]
    LANES: tl.constexpr = best.shape[2]
    ROWS: tl.constexpr = best.shape[3]
    WORDS: tl.constexpr = best.shape[0] * C // 32
    # of a limit that is NaN, all
    reaches = (tl.reshape(best, [WORDS, 32, LANES, ROWS]).to(tl.float32) < limit) == 0
    bit = tl.full([32], 1, tl.uint32) << tl.arange(0, 32).to(tl.uint32)
    word = tl.sum(tl.where(reaches, bit[None, :, None, None], 0), axis=1)
    at, width = _places(_ones(word))
    first = tl.arange(0, WORDS)[:, None, None] * (32 * LANES) + tl.arange(0, LANES)[:, None] * C
    while tl.max(tl.reshape((word != 0).to(tl.int32), [WORDS * 32]), axis=0) > 0:
        # the number of the lowest bit is the exponent of a float
        low = (word & (0 - word)).to(tl.float32)
        bits = (low.to(tl.int32, bitcast=True) >> 23) - 127
        place = first + bits + (bits & -C) * (LANES - 1)
        _store(places_ptr + at * ROWS, place.to(tl.int16), (word != 0) & (at < SIZE))
        at += 1
        word = word & (word - 1)
    return width


@triton.jit
def _append(found_ptr, length, index, keep, SIZE: tl.constexpr):
    """Add the kept of (M, LANES, ROWS) to the lists, as far as these go; (ROWS) their lengths."""
    at, more = _places(keep.to(tl.int32))
    at += length
    _store(found_ptr + at * length.shape[0], index.to(tl.int16), keep & (at < SIZE))
    return length + more


@triton.jit
def _listed(row_ptr, found_ptr, place, length, PACKED: tl.constexpr):
    """(ROWS, TOP) classes of the lists, from those places on: those of a lane side by side."""
    there = place < length
    index = _load(found_ptr + place * length.shape[0], there, 0).to(tl.int32)
    x = _load(row_ptr + index, there, float("-inf"))
    packed = tl.where(there, pack(value_key(x), index, PACKED), lowest(PACKED))
    packed = tl.permute(packed, [2, 1, 0])
    return tl.reshape(packed, [packed.shape[0], packed.shape[1] * packed.shape[2]])


@triton.jit
def _sorted(row_ptr, found_ptr, length, SIZE: tl.constexpr, TOP: tl.constexpr, LANES: tl.constexpr):
    """(ROWS, TOP): the first of each list."""
    PACKED: tl.constexpr = tl.int64 if row_ptr.dtype.element_ty == tl.float32 else tl.int32
    place = (tl.arange(0, TOP // LANES) * LANES)[:, None, None] + tl.arange(0, LANES)[:, None]
    # along a row the items of a lane come first: most of a sort is within lanes
    best = tl.sort(_listed(row_ptr, found_ptr, place, length, PACKED), descending=True)
    for first in tl.range(TOP, tl.minimum(tl.max(length, axis=0), SIZE), TOP):
        more = tl.sort(_listed(row_ptr, found_ptr, place + first, length, PACKED))
        # the larger of the first and the last, the second and the last but one, ...
        best = tl.bitonic_merge(tl.maximum(best, more), descending=True)
    return best


@kernel
def _short_fwd_kernel(
    logits_ptr, target_ptr, weight_ptr, loss_ptr, lse_ptr, indices_ptr, probs_ptr,
    found_ptr,  # (programs, SIZE, ROWS) int16 scratch
    places_ptr,  # (programs, SIZE, ROWS) int16 scratch
    pending_ptr,  # (N) int32: bound from which _exact_kernel goes on, or SETTLED
    stride_b: tl.int64,
    stride_t: tl.int64,
    rows_t,
    N,
    V,
    k,
    label_smoothing,
    SIZE: tl.constexpr,
    TOP: tl.constexpr,
    ROWS: tl.constexpr,
    COARSE: tl.constexpr,
    TILES: tl.constexpr,
    SLOTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = logits_ptr.dtype.element_ty
    C: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    LANES: tl.constexpr = 32 // ROWS
    TILE: tl.constexpr = EACH * LANES
    _, rows = _rows(N, ROWS)
    start = row_start(rows, rows_t, stride_b, stride_t)
    head = tl.zeros_like(rows)
    whole = V // (C * TILE)
    if not ALIGNED:
        head = classes_before(logits_ptr + start, V, ALIGNED)
        whole = tl.maximum(V - C + 1, 0) // (C * TILE)
    chunks = (V - head) // C
    best = _maxima(logits_ptr, start + head, chunks, whole, tl.cdiv(V // C, TILE), LANES)
    coarse = tl.reshape(best, [EACH * C // COARSE, COARSE * LANES, ROWS])
    coarse = value_key(tl.reduce(coarse.to(tl.float32), 0, max_nan).to(DTYPE))
    least = thresholds(coarse, k, k + k // 8, octave(DTYPE))
    limit = key_value(least, DTYPE)

    scratch = tl.program_id(0).to(tl.int64) * (SIZE * ROWS) + tl.arange(0, ROWS)
    width = _list_places(best, limit, places_ptr + scratch, SIZE)
    tl.debug_barrier()
    found_ptr += scratch
    length = tl.zeros_like(rows)
    # some places at a time, of each its class of every tile
    slot = (tl.arange(0, SLOTS) * LANES)[:, None, None] + tl.arange(0, LANES)[:, None] + length
    tile = (tl.arange(0, TILES) * (TILE * C))[None, :, None, None]
    listed = tl.minimum(width, SIZE)
    for _ in tl.range(0, tl.max(listed, axis=0), SLOTS * LANES):
        place = _load(places_ptr + (scratch + slot * ROWS), slot < listed, 0).to(tl.int32)
        left = tl.where(slot < listed, chunks * C - place, 0)
        inside = _joined(tile < left[:, None, :, :])
        at_ptr = _joined(logits_ptr + (start + head + place)[:, None, :, :] + tile)
        x = _load(at_ptr, inside, float("-inf"))
        keep = inside & ((x.to(tl.float32) < limit) == 0)
        index = _joined((head + place)[:, None, :, :] + tile)
        length = _append(found_ptr, length, index, keep, SIZE)
        slot += SLOTS * LANES
    if not ALIGNED:
        each = tl.arange(0, (2 * C + LANES - 1) // LANES) * LANES
        edge = each[:, None, None] + tl.arange(0, LANES)[:, None]
        at = tl.where(edge < C, edge, head + chunks * C + edge - C)
        inside = tl.where(edge < C, edge < head, at < V)
        x = _load(logits_ptr + start + at, inside, float("-inf"))
        keep = inside & ((x.to(tl.float32) < limit) == 0)
        length = _append(found_ptr, length, at, keep, SIZE)
    tl.debug_barrier()
    overflows = tl.maximum(width, length) > SIZE
    tl.store(pending_ptr + rows, tl.where(overflows, least, SETTLED))
    length = tl.where(overflows, 0, length)
    packed = _sorted(logits_ptr + start, found_ptr, length, SIZE, TOP, LANES)
    # what is left to _exact_kernel is written here as well: of classes that exist
    zero = tl.zeros([ROWS, TOP], tl.int32)
    packed = tl.where(overflows[:, None], pack(zero, zero, packed.dtype), packed)
    list_outputs(
        packed, rows[:, None].to(tl.int64), logits_ptr + start[:, None], target_ptr, weight_ptr,
        loss_ptr, lse_ptr, indices_ptr, probs_ptr, V, k, label_smoothing, HAS_WEIGHT, HAS_SMOOTHING,
    )  # fmt: skip


@kernel
def _few_kernel(
    logits_ptr, target_ptr, weight_ptr, loss_ptr, lse_ptr, indices_ptr, probs_ptr,
    stride_b: tl.int64,
    stride_t: tl.int64,
    stride_v,  # 1
    rows_t,
    N,
    V,
    k,
    label_smoothing,
    SORT: tl.constexpr,
    TOP: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
):  # fmt: skip
    """Rows of few classes, several of them: all are sorted.

    The stride of 1 is a number that the compiler does not know, or else it would put the lanes of a
    warp along the classes of a row. Now they are along the rows first, so that most of a sort is
    within lanes, where two instructions put two items in order, and a quarter of it by shuffles.
    """
    _, rows = _rows(N, ROWS)
    start = row_start(rows, rows_t, stride_b, stride_t)
    place = tl.arange(0, SORT)
    if ROWS_LAST:
        index = place[:, None]
        at = start[None, :] + index * stride_v
    else:
        index = place[None, :]
        at = start[:, None] + index * stride_v
    x = tl.load(logits_ptr + at, mask=index < V, other=float("-inf"))
    packed = pack(value_key(x), index, tl.int64 if x.dtype == tl.float32 else tl.int32)
    if ROWS_LAST:
        packed = tl.trans(packed)
    # no class follows those that are not there
    packed = tl.topk(packed, TOP)
    list_outputs(
        packed, rows[:, None].to(tl.int64), logits_ptr + start[:, None], target_ptr, weight_ptr,
        loss_ptr, lse_ptr, indices_ptr, probs_ptr, V, k, label_smoothing, HAS_WEIGHT, HAS_SMOOTHING,
    )  # fmt: skip


@kernel
def _short_bwd_kernel(
    dloss_ptr,  # (N) fp32
    dlse_ptr,  # (N) fp32
    dprobs_ptr,  # (N, k) fp32
    target_ptr,  # (N) int64
    indices_ptr,  # (N, k) int32
    probs_ptr,  # (N, k) fp32
    weight_ptr,  # (V) fp32
    dlogits_ptr,  # (N, V)
    N,
    V,
    k,
    label_smoothing,
    K2: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_DLOSS: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    HAS_DPROBS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
):
    """Several rows, so many that they begin at a multiple of 16 bytes."""
    DTYPE: tl.constexpr = dlogits_ptr.dtype.element_ty
    C: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    first, rows = _rows(N, ROWS)
    row = rows[:, None].to(tl.int64)
    rank = tl.arange(0, K2)[None, :]
    kept = rank < k
    # on their way while the zeros are written
    target = tl.load(target_ptr + row)
    index = tl.load(indices_ptr + row * k + rank, mask=kept, other=-1)
    p = tl.load(probs_ptr + row * k + rank, mask=kept, other=0.0)

    classes = tl.minimum(ROWS, N - first) * V
    chunks = classes // C
    chunk_ptr = tl.multiple_of(dlogits_ptr + first.to(tl.int64) * V, 16)
    store_zeros(chunk_ptr, 0, chunks, C, BLOCK)
    at = chunks * C + tl.arange(0, C)
    tl.store(chunk_ptr + at, tl.zeros([C], DTYPE), mask=at < classes)

    hit = (target >= 0) & (target < V)
    g, at_target, outside = list_gradient(
        p, index, kept, target, hit, row, dloss_ptr, dlse_ptr, dprobs_ptr, weight_ptr, k,
        label_smoothing, HAS_DLOSS, HAS_DLSE, HAS_DPROBS, HAS_WEIGHT, HAS_SMOOTHING,
    )  # fmt: skip
    tl.debug_barrier()
    tl.store(dlogits_ptr + row * V + index, g.to(DTYPE), mask=kept)
    tl.store(dlogits_ptr + row * V + target, at_target.to(DTYPE), mask=outside)


def few_options(num_classes: int, k: int) -> dict[str, int]:
    """The configuration of _few_kernel."""
    size = max(16, next_power_of_2(num_classes))
    top = min(size, max(16, next_power_of_2(k)))
    # of longer lists a tile would leave registers, and take Triton minutes
    rows, number = (8, 1) if k <= FEW_K else (1, max(1, size // 256))
    return {"SORT": size, "TOP": top, "ROWS": rows, **warps(number)}


def short_fwd_options(itemsize: int, num_classes: int, k: int) -> dict[str, int] | None:
    """The configuration of _short_fwd_kernel, where it is for such rows."""
    if num_classes * itemsize > BYTES or k > SHORT_K:
        return None
    # of long lists a tile of eight rows would leave registers
    rows = min(8 if k <= 64 else 4, 1 << (BYTES // (num_classes * itemsize)).bit_length() - 1)
    chunks, lanes = num_classes * itemsize // 16, 32 // rows
    tiles = next_power_of_2(cdiv(chunks, EACH.value * lanes))
    # of 2.5 k maxima some 1.5 k classes reach the bound
    coarse = max(64, next_power_of_2(5 * k // 2))
    top = max(32, next_power_of_2(k))
    return {
        "SIZE": 2 * top,
        "TOP": top,
        "ROWS": rows,
        "COARSE": min(coarse // lanes, EACH.value * 16 // itemsize),
        "TILES": tiles,
        "SLOTS": 8 // tiles,
        **warps(1),
    }


def short_bwd_options(itemsize: int, num_classes: int, k: int) -> dict[str, int] | None:
    """The configuration of _short_bwd_kernel, where it is for such rows."""
    if num_classes * itemsize > 2048 or k > FEW_K:
        return None
    return {"K2": max(16, next_power_of_2(k)), "ROWS": 8, "BLOCK": 128, **warps(1)}


def launch_few(tensors, k, label_smoothing, options):  # type: ignore[no-untyped-def]
    logits, target = tensors[:2]
    rows, num_classes = target.numel(), logits.shape[-1]
    few, (stride_b, stride_t, rows_t) = few_options(num_classes, k), row_strides(logits)
    _few_kernel[(cdiv(rows, few["ROWS"]),)](
        *tensors, stride_b, stride_t, 1, rows_t, rows, num_classes, k, label_smoothing,
        **few, **options,
    )  # fmt: skip


def launch_short_fwd(tensors, k, label_smoothing, options, short):  # type: ignore[no-untyped-def]
    """(N) the bounds of the rows that are left to _exact_kernel, SETTLED for all others."""
    logits, rows, num_classes = tensors[0], tensors[1].numel(), tensors[0].shape[-1]
    programs = cdiv(rows, short["ROWS"])
    found, places = logits.new_empty((2, programs, short["SIZE"], short["ROWS"]), dtype=torch.int16)
    pending = logits.new_empty(rows, dtype=torch.int32)
    _short_fwd_kernel[(programs,)](
        *tensors, found, places, pending, *row_strides(logits), rows, num_classes, k,
        label_smoothing, ALIGNED=is_aligned(logits), **short, **options,
    )  # fmt: skip
    return pending


def launch_short_bwd(tensors, k, label_smoothing, options, short):  # type: ignore[no-untyped-def]
    dlogits = tensors[-1]
    num_classes = dlogits.shape[-1]
    rows = dlogits.numel() // num_classes
    _short_bwd_kernel[(cdiv(rows, short["ROWS"]),)](
        *tensors, rows, num_classes, k, label_smoothing, **short, **options
    )
