"""topk_ce on the GPU: the k largest logits of a row, their softmax, its loss and its gradient.

With S the k first classes in the order (value desc, index asc), m the row's maximum, y the target,
e the label smoothing, w the class weights, and a, b, q the gradients of loss, lse and probs:

    L    = log sum_S exp(z_i - m)            lse = m + L            p_i = exp(z_i - m - L) on S
    loss = (1 - e) w_y (L - (z_y - m)) + (e / k) sum_S w_i (L - (z_i - m))

    A    = (1 - e) w_y + (e / k) sum_S w_i
    dz_i = p_i (a A + b - sum_S p_j q_j + q_i) - a (e / k) w_i   on S, 0 elsewhere
    dz_y -= a (1 - e) w_y

m leaves both terms before they meet, so an offset of the row costs no precision. Source: Sun et
al., Sparse-softmax, arXiv 2112.12433, eq. 4 and 5.

Saved for backward: indices and probs, 8 k bytes per row. Everything else of the gradient follows
from them, so backward never looks at the logits.

Forward reads V * itemsize bytes per row and, of them, about 2 k / NSEG a second time; it writes 8 k
+ 8. Scratch, up to 12 SORT + 12 bytes per row, stays in the caches. Backward reads 8 k bytes and
writes V * itemsize.

How forward finds S. The row is cut into chunks of 16 bytes; chunk q belongs to segment q mod NSEG.
One streaming pass keeps the maximum of each place of each segment in registers: one packed maximum
per 4 bytes, no index, no key, no shuffle. The k-th largest of these maxima, found by bisection on
their keys, is a bound that at least k classes reach, and only the few pieces of segments whose
maximum reaches it can hold one. They are listed and read again, and the classes that reach the
bound are listed with their index as one integer each, whose order is that of the classes. Sorting
this list of k plus a few gives S; the order in which atomics filled it does not matter. Lists have
an end and ties have none: a row that does not fit is left to _exact_kernel, which goes through it
in the order of the index with a list that is sorted and cut to k when it is full. Its bound then
excludes all further ties, so that a constant row costs one more reading and not V / k sorts.

Short rows share a program: short_rows.py.

Why values alone in the streaming pass: a maximum of packed (key, chunk), which resolves ties at
once, takes 20 instructions per 16 bytes, 64-bit keys for float32 included; this takes 5 to 7. Why
atomics: where almost nothing is kept, a prefix sum costs as much as where all is, 100 instructions
per warp and several barriers; an atomic with no lane active costs a branch.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .list import list_gradient, list_outputs
from .order import lowest, max_nan, pack, threshold, value_key
from .rows import (
    cdiv,
    classes_before,
    edges,
    is_aligned,
    kernel,
    next_power_of_2,
    on_device,
    row_start,
    row_strides,
    store_zeros,
    warps,
)
from .short_rows import (
    FEW_K,
    SETTLED,
    launch_few,
    launch_short_bwd,
    launch_short_fwd,
    short_bwd_options,
    short_fwd_options,
)

# Below every packed class of 64 bits.
LOWEST = tl.constexpr(lowest(tl.int64))
# Flags that a program of _exact_kernel looks at together.
WATCH = tl.constexpr(256)
# Chunks of a row that a program of _bwd_kernel writes, at least. More where the list would be
# a good part of what is moved; a shorter row has one warp.
PART = 512


@triton.jit
def _piece_keys(
    chunk_ptr,  # 16-byte aligned
    chunks,
    C: tl.constexpr,
    NSEG: tl.constexpr,
    PIECE: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """(NSEG * C / PIECE) int32: key of the largest of each piece. The streaming pass."""
    DTYPE: tl.constexpr = chunk_ptr.dtype.element_ty
    segment = tl.arange(0, NSEG)
    offset = segment[:, None] * C + tl.arange(0, C)[None, :]
    # by way of float32: the interpreter of Triton 3.6 has no bfloat16 constants
    best = tl.full([NSEG, C], float("-inf"), tl.float32).to(DTYPE)
    whole = chunks // NSEG
    # the scalar advances: a tensor of pointers takes two registers for every load, and Triton 3.6
    # then unpacks 16-bit maxima as well
    tile_ptr = chunk_ptr
    left = (segment < chunks)[:, None]
    x = tl.load(tile_ptr + offset, mask=left, other=float("-inf"))
    # a tile is asked for before the one before it is used: loads are on their way at any time
    steps = tl.maximum(whole - 1, 0) // UNROLL * UNROLL
    for _ in tl.range(0, steps, UNROLL):
        for step in tl.static_range(1, UNROLL + 1):
            y = tl.load(tl.multiple_of(tile_ptr + step * (NSEG * C), 16) + offset)
            best = max_nan(best, x).to(DTYPE)
            x = y
        tile_ptr += UNROLL * NSEG * C
    for tile in tl.range(steps + 1, tl.cdiv(chunks, NSEG)):
        left = (tile * NSEG + segment < chunks)[:, None]
        tile_ptr = tl.multiple_of(tile_ptr + NSEG * C, 16)
        y = tl.load(tile_ptr + offset, mask=left, other=float("-inf"))
        best = max_nan(best, x).to(DTYPE)
        x = y
    best = max_nan(best, x).to(DTYPE)
    if PIECE < C:
        best = tl.reshape(best, [NSEG * C // PIECE, PIECE])
    # a reduction takes float32; the compiler turns the casts into packed 16-bit instructions
    return value_key(tl.reduce(best.to(tl.float32), 1, max_nan).to(DTYPE))


@triton.jit
def _append(list_ptr, count_ptr, value, keep, SIZE: tl.constexpr):
    """Add the kept values to the list, in any order, as far as its SIZE goes; the count goes on."""
    counts = count_ptr + tl.zeros_like(keep.to(tl.int32))
    place = tl.atomic_add(counts, 1, mask=keep, sem="relaxed", scope="cta")
    tl.store(list_ptr + place, value, mask=keep & (place < SIZE))


@triton.jit
def _select(
    logits_ptr,
    start,  # int64: of the V classes looked at
    first_index,  # of the first of them
    found_ptr,  # (SORT) int32 or int64: gets the classes that reach the bound
    pieces_ptr,  # (SORT) int32 scratch
    count_ptr,  # (2) int32 scratch: lengths of pieces and found
    V,
    k,
    SORT: tl.constexpr,
    NSEG: tl.constexpr,
    PIECE: tl.constexpr,
    NCUT: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """A bound that at least k classes reach, and how many do: all listed, unless over SORT."""
    DTYPE: tl.constexpr = logits_ptr.dtype.element_ty
    C: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    NP: tl.constexpr = NSEG * C // PIECE
    row_ptr = logits_ptr + start
    head = classes_before(row_ptr, V, ALIGNED)
    # an alignment counts in bytes, and holds only for a sum that this very function makes
    chunk_ptr = tl.multiple_of(logits_ptr + (start + head), 16)
    chunks = (V - head) // C

    tl.store(count_ptr, 0)
    tl.store(count_ptr + 1, 0)
    best = _piece_keys(chunk_ptr, chunks, C, NSEG, PIECE, UNROLL)
    coarse = tl.max(tl.reshape(best, [NP // NCUT, NCUT]), axis=0)
    least = threshold(coarse, tl.min(coarse, axis=0), tl.max(coarse, axis=0), k, k + k // 8)
    tl.debug_barrier()
    _append(pieces_ptr, count_ptr, tl.arange(0, NP), best >= least, SORT)
    tl.debug_barrier()

    width = tl.load(count_ptr, volatile=True)
    tiles = tl.cdiv(chunks, NSEG)
    # candidates are numbered tile by tile; the division by the number of pieces is a product with a
    # 32-bit inverse, exact below 2^32 / SORT, and 1 has none
    divisor = tl.maximum(width, 2)
    inverse = (0xFFFFFFFF // divisor.to(tl.uint32, bitcast=True)) + 1
    listed = (width <= SORT) & (tiles <= (1 << 31) // (SORT * SORT))
    count = tl.where(listed, divisor * tiles, 0)
    lane = tl.arange(0, PIECE)
    for first in tl.range(0, count, BLOCK // PIECE):
        number = first + tl.arange(0, BLOCK // PIECE)
        tile = tl.umulhi(number.to(tl.uint32, bitcast=True), inverse).to(tl.int32, bitcast=True)
        slot = number - tile * divisor
        valid = (number < count) & (slot < width)
        piece = tl.load(pieces_ptr + slot, mask=valid, other=0) + tile * NP
        valid = valid & (piece < chunks * (C // PIECE))
        at = piece[:, None] * PIECE + lane[None, :]
        key = value_key(tl.load(chunk_ptr + at, mask=valid[:, None], other=float("-inf")))
        keep = valid[:, None] & (key >= least)
        packed = pack(key, at + (head + first_index), found_ptr.dtype.element_ty)
        _append(found_ptr, count_ptr + 1, packed, keep, SORT)
    if not ALIGNED:
        at_edge, inside = edges(head, chunks, V, C)
        key_edge = value_key(tl.load(row_ptr + at_edge, mask=inside, other=float("-inf")))
        packed_edge = pack(key_edge, at_edge + first_index, found_ptr.dtype.element_ty)
        _append(found_ptr, count_ptr + 1, packed_edge, inside & (key_edge >= least), SORT)
    tl.debug_barrier()
    length = tl.where(listed, tl.load(count_ptr + 1, volatile=True), SORT + 1)
    return least, length


@kernel
def _fwd_kernel(
    logits_ptr,  # (N, V), a row is at (row // rows_t) * stride_b + (row % rows_t) * stride_t
    target_ptr,  # (N) int64
    weight_ptr,  # (V) fp32
    loss_ptr,  # (N) fp32
    lse_ptr,  # (N) fp32
    indices_ptr,  # (N, k) int32
    probs_ptr,  # (N, k) fp32
    best_ptr,  # (N, parts, k) int64: the result of each part, where rows are split
    found_ptr,  # (N, parts, SORT) int32 or int64 scratch
    pieces_ptr,  # (N, parts, SORT + 2) int32 scratch
    pending_ptr,  # (N, parts) int32: bound from which _exact_kernel goes on, or SETTLED
    stride_b: tl.int64,
    stride_t: tl.int64,
    rows_t,
    part_size,
    V,
    k,
    label_smoothing,
    SORT: tl.constexpr,
    NSEG: tl.constexpr,
    PIECE: tl.constexpr,
    NCUT: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = row_start(tl.program_id(0), rows_t, stride_b, stride_t)
    first = tl.program_id(1) * part_size
    job = row * tl.num_programs(1) + tl.program_id(1)
    found_ptr += job * SORT
    pieces_ptr += job * (SORT + 2)
    least, length = _select(
        logits_ptr, start + first, first, found_ptr, pieces_ptr, pieces_ptr + SORT,
        tl.minimum(V - first, part_size), k, SORT, NSEG, PIECE, NCUT, UNROLL, BLOCK, ALIGNED,
    )  # fmt: skip
    tl.store(pending_ptr + job, tl.where(length > SORT, least, SETTLED))
    if length <= SORT:
        rank = tl.arange(0, SORT)
        none = lowest(found_ptr.dtype.element_ty)
        packed = tl.load(found_ptr + rank, mask=rank < length, other=none)
        packed = tl.sort(packed, descending=True)
        if SPLIT:
            tl.store(best_ptr + job * k + rank, packed, mask=rank < k)
        else:
            list_outputs(
                packed, row, logits_ptr + start, target_ptr, weight_ptr, loss_ptr, lse_ptr,
                indices_ptr, probs_ptr, V, k, label_smoothing, HAS_WEIGHT, HAS_SMOOTHING,
            )  # fmt: skip


@triton.jit
def _best_from(
    row_ptr, least, first, size, list_ptr, k, SORT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """(SORT) the best k of `size` classes from `first` on, of which k at least reach `least`."""
    LIST: tl.constexpr = 2 * BLOCK
    place = tl.arange(0, LIST)
    rank = tl.arange(0, SORT)
    floor = least.to(tl.int64) << 32
    length = 0
    for block in tl.range(0, size + BLOCK, BLOCK):
        index = first + block + tl.arange(0, BLOCK)
        inside = index < first + size
        key = value_key(tl.load(row_ptr + index, mask=inside, other=float("-inf")))
        packed = tl.where(inside, pack(key, index, tl.int64), LOWEST)
        more = tl.sum((packed >= floor).to(tl.int32), axis=0)
        if (length + more > LIST) | (block >= size):
            tl.debug_barrier()
            full = tl.load(list_ptr + place, mask=place < length, other=LOWEST)
            full = tl.sort(full, descending=True)
            tl.debug_barrier()
            tl.store(list_ptr + place, full, mask=place < k)
            floor = tl.max(tl.where(place == k - 1, full, LOWEST), axis=0) + 1
            length = k
        if more > 0:
            keep = (packed >= floor).to(tl.int32)
            added = length + tl.cumsum(keep, axis=0) - 1
            tl.store(list_ptr + added, packed, mask=keep > 0)
            length += tl.sum(keep, axis=0)
    tl.debug_barrier()
    best = tl.load(list_ptr + rank, mask=rank < k, other=LOWEST)
    tl.debug_barrier()
    return best


@kernel
def _exact_kernel(
    logits_ptr, target_ptr, weight_ptr, loss_ptr, lse_ptr, indices_ptr, probs_ptr, best_ptr,
    list_ptr,  # (programs, 2 * BLOCK) int64 scratch
    pending_ptr,  # (N, parts) int32
    stride_b: tl.int64,
    stride_t: tl.int64,
    rows_t,
    N,
    parts,
    part_size,
    V,
    k,
    label_smoothing,
    SORT: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
):  # fmt: skip
    """The rows whose ties overflow the lists of _fwd_kernel, from the bound found there, by index.

    Once k classes are listed, only better ones enter: hardly any after the first ties.
    """
    rank = tl.arange(0, SORT)
    program = tl.program_id(0).to(tl.int64)
    list_ptr += program * 2 * BLOCK
    jobs, stride = N * parts - tl.program_id(0), tl.num_programs(0)
    # hardly any is pending: a look at the flags of many at a time
    watched = tl.arange(0, WATCH) * stride
    for start in tl.range(0, jobs, stride * WATCH):
        flags = tl.load(
            pending_ptr + program + start + watched, mask=start + watched < jobs, other=SETTLED
        )
        if tl.min(flags, axis=0) != SETTLED:
            for step in tl.range(start, tl.minimum(start + stride * WATCH, jobs), stride):
                job = program + step
                least = tl.load(pending_ptr + job)
                if least != SETTLED:
                    row = job // parts
                    first = (job % parts) * part_size
                    row_ptr = logits_ptr + row_start(row, rows_t, stride_b, stride_t)
                    size = tl.minimum(V - first, part_size)
                    best = _best_from(row_ptr, least, first, size, list_ptr, k, SORT, BLOCK)
                    if SPLIT:
                        tl.store(best_ptr + job * k + rank, best, mask=rank < k)
                    else:
                        list_outputs(
                            best, row, row_ptr, target_ptr, weight_ptr, loss_ptr, lse_ptr,
                            indices_ptr, probs_ptr, V, k, label_smoothing, HAS_WEIGHT,
                            HAS_SMOOTHING,
                        )  # fmt: skip


@kernel
def _merge_kernel(
    logits_ptr, target_ptr, weight_ptr, loss_ptr, lse_ptr, indices_ptr, probs_ptr,
    best_ptr,  # (N, parts, k) int64
    stride_b: tl.int64,
    stride_t: tl.int64,
    rows_t,
    parts,
    V,
    k,
    label_smoothing,
    SORT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
):  # fmt: skip
    """Split rows, from the best of each part."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row_start(tl.program_id(0), rows_t, stride_b, stride_t)
    place = tl.arange(0, SORT)
    packed = tl.load(best_ptr + row * parts * k + place, mask=place < parts * k, other=LOWEST)
    packed = tl.sort(packed, descending=True)
    list_outputs(
        packed, row, row_ptr, target_ptr, weight_ptr, loss_ptr, lse_ptr, indices_ptr, probs_ptr,
        V, k, label_smoothing, HAS_WEIGHT, HAS_SMOOTHING,
    )  # fmt: skip


@kernel
def _bwd_kernel(
    dloss_ptr,  # (N) fp32
    dlse_ptr,  # (N) fp32
    dprobs_ptr,  # (N, k) fp32
    target_ptr,  # (N) int64
    indices_ptr,  # (N, k) int32
    probs_ptr,  # (N, k) fp32
    weight_ptr,  # (V) fp32
    dlogits_ptr,  # (N, V)
    parts,
    part_size,  # chunks
    V,
    k,
    label_smoothing,
    K2: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    HAS_DLOSS: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    HAS_DPROBS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
):
    DTYPE: tl.constexpr = dlogits_ptr.dtype.element_ty
    C: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    # programs follow each other as their parts of the rows lie in memory, which it takes faster
    # than as many rows at a time
    part = tl.program_id(0) % parts
    row = (tl.program_id(0) // parts).to(tl.int64)
    # on their way while the zeros are written
    target = tl.load(target_ptr + row)
    rank = tl.arange(0, K2)
    kept = rank < k
    index = tl.load(indices_ptr + row * k + rank, mask=kept, other=-1)
    p = tl.load(probs_ptr + row * k + rank, mask=kept, other=0.0)

    start = row * V
    row_ptr = dlogits_ptr + start
    head = classes_before(row_ptr, V, ALIGNED)
    chunk_ptr = tl.multiple_of(dlogits_ptr + (start + head), 16)
    chunks = (V - head) // C
    first = tl.minimum(part * part_size, chunks)
    last = tl.minimum(first + part_size, chunks)
    store_zeros(chunk_ptr, first, last, C, BLOCK)
    # the classes of this part: the first and the last take the ends of the row that fill no chunk
    low = tl.where(part == 0, 0, head + first * C)
    high = tl.where(part == parts - 1, V, head + last * C)
    if not ALIGNED:
        at_edge, inside = edges(head, chunks, V, C)
        inside = inside & (at_edge >= low) & (at_edge < high)
        tl.store(row_ptr + at_edge, tl.zeros([2 * C], DTYPE), mask=inside)

    hit = (target >= 0) & (target < V)
    g, at_target, outside = list_gradient(
        p, index, kept, target, hit, row, dloss_ptr, dlse_ptr, dprobs_ptr, weight_ptr, k,
        label_smoothing, HAS_DLOSS, HAS_DLSE, HAS_DPROBS, HAS_WEIGHT, HAS_SMOOTHING,
    )  # fmt: skip
    tl.debug_barrier()
    tl.store(row_ptr + index, g.to(DTYPE), mask=kept & (index >= low) & (index < high))
    here = (target >= low) & (target < high)
    tl.store(row_ptr + target, at_target.to(DTYPE), mask=outside & here)


@dataclass(frozen=True)
class Selection:
    """How _fwd_kernel runs: its constexprs and warps."""

    SORT: int  # length of the list that is sorted, and of the list of pieces
    NSEG: int  # segments, 16 bytes wide
    PIECE: int  # classes of a segment that are read again together
    NCUT: int  # maxima among which the bound is sought, at least k
    UNROLL: int  # tiles of NSEG chunks per step of the streaming loop
    BLOCK: int  # classes read again per step
    num_warps: int

    def options(self) -> dict[str, int]:
        return {**vars(self), **warps(self.num_warps)}


def list_size(k: int) -> int:
    """Room for ties at the bound; the power of two is all that kernels know of k when compiled."""
    return max(32, next_power_of_2(k + k // 4 + 16))


def fwd_selection(itemsize: int, num_classes: int, k: int) -> Selection | None:
    """The configuration of _fwd_kernel, or None for a row so short that it is sorted whole."""
    size = list_size(k)
    if num_classes <= max(256 // itemsize if k <= FEW_K else 128, size):
        return None
    for row in TUNING:
        if row.itemsize == itemsize and num_classes <= row.max_v and k <= row.max_k:
            break
    return Selection(size, row.nseg, row.piece, row.ncut, row.unroll, 128 * row.warps, row.warps)


def list_dtype(itemsize: int, num_classes: int, size: int, split: bool) -> torch.dtype:
    """Of the list of _fwd_kernel: of 32 bits where they hold a class. Long ones of these spill."""
    few = itemsize == 2 and num_classes < 1 << 16 and size <= 256 and not split
    return torch.int32 if few else torch.int64


def merge_options(candidates: int) -> dict[str, int]:
    """The configuration of _merge_kernel for that many candidates."""
    size = max(16, next_power_of_2(candidates))
    return {"SORT": size, **warps(max(1, size // 256))}


def exact_options(k: int) -> dict[str, int]:
    """The configuration of _exact_kernel."""
    size = list_size(k)
    return {"SORT": size, "BLOCK": max(512, size), **warps(8)}


def bwd_options(itemsize: int, num_classes: int, k: int) -> dict[str, int]:
    """The configuration of _bwd_kernel."""
    short = num_classes * itemsize // 16 < PART
    return {
        "K2": max(16, next_power_of_2(k)),
        "BLOCK": 128 if short else 1024,
        "ALIGNED": num_classes * itemsize % 16 == 0,
        **warps(1 if short else 8),
    }


def _parts(rows: int, num_classes: int, k: int) -> tuple[int, int]:
    """How many programs share a row, and the classes of each: one, unless a GPU would idle."""
    parts = min(num_classes // 16384, 2048 // k, 256 // rows)
    if parts < 2:
        return 1, num_classes
    size = cdiv(num_classes, parts * 16) * 16
    return cdiv(num_classes, size), size


def topk_ce_fwd(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    k: int,
    label_smoothing: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    leading, num_classes = logits.shape[:-1], logits.shape[-1]
    loss, lse = (logits.new_empty(leading, dtype=torch.float32) for _ in range(2))
    indices = logits.new_empty((*leading, k), dtype=torch.int32)
    probs = logits.new_empty((*leading, k), dtype=torch.float32)
    if target.numel() == 0:
        return loss, lse, indices, probs
    tensors = (logits, target, weight, loss, lse, indices, probs)
    options = {"HAS_WEIGHT": weight is not None, "HAS_SMOOTHING": label_smoothing != 0}
    with on_device(logits):
        if fwd_selection(logits.element_size(), num_classes, k) is None:
            launch_few(tensors, k, label_smoothing, options)
        elif short := short_fwd_options(logits.element_size(), num_classes, k):
            pending = launch_short_fwd(tensors, k, label_smoothing, options, short)
            _launch_exact(tensors, None, pending, num_classes, k, label_smoothing, options)
        else:
            _launch_selection(tensors, k, label_smoothing, options)
    return loss, lse, indices, probs


def _launch_exact(tensors, best, pending, part_size, k, label_smoothing, options):  # type: ignore[no-untyped-def]
    """All rows whose bound is pending; where rows are split, to the best of each part."""
    logits, rows, num_classes = tensors[0], tensors[1].numel(), tensors[0].shape[-1]
    exact = exact_options(k)
    # of 2 lists each: more of them would outweigh all else that forward allocates
    programs = min(pending.numel(), 256)
    lists = logits.new_empty((programs, 2 * exact["BLOCK"]), dtype=torch.int64)
    _exact_kernel[(programs,)](
        *tensors, best, lists, pending, *row_strides(logits), rows, pending.numel() // rows,
        part_size, num_classes, k, label_smoothing, **exact, SPLIT=best is not None, **options,
    )  # fmt: skip


def _launch_selection(tensors, k, label_smoothing, options):  # type: ignore[no-untyped-def]
    logits, rows, num_classes = tensors[0], tensors[1].numel(), tensors[0].shape[-1]
    parts, part_size = _parts(rows, num_classes, k)
    selection = fwd_selection(logits.element_size(), part_size, k)
    best = logits.new_empty((rows, parts, k), dtype=torch.int64) if parts > 1 else None
    packed = list_dtype(logits.element_size(), num_classes, selection.SORT, parts > 1)
    found = logits.new_empty((rows, parts, selection.SORT), dtype=packed)
    pieces = logits.new_empty((rows, parts, selection.SORT + 2), dtype=torch.int32)
    pending = logits.new_empty((rows, parts), dtype=torch.int32)
    strides, sizes = row_strides(logits), (num_classes, k, label_smoothing)
    _fwd_kernel[(rows, parts)](
        *tensors, best, found, pieces, pending, *strides, part_size, *sizes,
        **selection.options(), ALIGNED=is_aligned(logits), SPLIT=parts > 1, **options,
    )  # fmt: skip
    _launch_exact(tensors, best, pending, part_size, k, label_smoothing, options)
    if parts > 1:
        _merge_kernel[(rows,)](
            *tensors, best, *strides, parts, *sizes, **merge_options(parts * k), **options
        )


def topk_ce_bwd(
    dloss: torch.Tensor | None,
    dlse: torch.Tensor | None,
    dprobs: torch.Tensor | None,
    target: torch.Tensor,
    indices: torch.Tensor,
    probs: torch.Tensor,
    weight: torch.Tensor | None,
    label_smoothing: float,
    num_classes: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    k, rows = indices.shape[-1], target.numel()
    dlogits = probs.new_empty((*target.shape, num_classes), dtype=dtype)
    if rows == 0:
        return dlogits
    dloss, dlse, dprobs = (None if g is None else g.contiguous() for g in (dloss, dlse, dprobs))
    itemsize = dlogits.element_size()
    above = (dloss, dlse, dprobs, target, indices, probs, weight, dlogits)
    options = {
        "HAS_DLOSS": dloss is not None,
        "HAS_DLSE": dlse is not None,
        "HAS_DPROBS": dprobs is not None,
        "HAS_WEIGHT": weight is not None,
        "HAS_SMOOTHING": label_smoothing != 0,
    }
    with on_device(probs):
        if short := short_bwd_options(itemsize, num_classes, k):
            launch_short_bwd(above, k, label_smoothing, options, short)
        else:
            chunks = num_classes * itemsize // 16
            parts = max(1, chunks // max(PART, 4 * k))
            _bwd_kernel[(rows * parts,)](
                *above, parts, cdiv(chunks, parts), num_classes, k, label_smoothing,
                **bwd_options(itemsize, num_classes, k), **options,
            )  # fmt: skip
    return dlogits


class Tuning(NamedTuple):
    itemsize: int
    max_v: int
    max_k: int
    nseg: int
    piece: int
    ncut: int
    unroll: int
    warps: int


# Of the rows for 16 bits an H200 chose those with k <= 32 up to 65536 and beyond, and the one with
# k <= 128 up to 65536. The others follow from counts on compiled code, which
# tests/test_triton_aot.py repeats and tests/triton_resources.json records: registers, instructions
# per 16 bytes of the streaming loop, warp-instructions per row. No such case spills; with
# other options, such as rows that programs share, some do, 4 to 64 bytes. Short rows are not here,
# up to k = 128: short_rows.py.
#   nseg    the H200 likes 2 to 4 chunks per thread: at most 16 registers of maxima and twice 16 of
#           loads. The second look reads 2 k / nseg of the row again, so nseg grows with k.
#   warps   all but the streaming costs 1000 to 2500 instructions per warp: as few as nseg leaves.
#   piece   small ones read less again, and list more; 1 or 2 where k is not small against V.
#   ncut    4 k or more: about k + k / 8 classes then reach the bound.
_ANY = 1 << 31
TUNING = (
    Tuning(2, 4096, 1024, 512, 1, 4096, 1, 4),
    Tuning(2, 16384, 32, 512, 4, 256, 1, 2),
    Tuning(2, 16384, 128, 512, 2, 512, 1, 2),
    Tuning(2, 16384, 1024, 2048, 2, 4096, 1, 8),
    Tuning(2, 65536, 32, 512, 4, 256, 2, 4),
    Tuning(2, 65536, 128, 512, 2, 512, 1, 4),
    Tuning(2, 65536, 1024, 2048, 2, 4096, 1, 8),
    Tuning(2, _ANY, 32, 1024, 4, 256, 2, 8),
    Tuning(2, _ANY, 128, 2048, 4, 512, 1, 8),
    Tuning(2, _ANY, 1024, 2048, 2, 4096, 1, 8),
    Tuning(4, 4096, 1024, 1024, 1, 4096, 1, 8),
    Tuning(4, 16384, 32, 512, 4, 256, 1, 2),
    Tuning(4, 16384, 128, 512, 2, 512, 1, 2),
    Tuning(4, 16384, 1024, 2048, 1, 4096, 1, 8),
    Tuning(4, 65536, 32, 1024, 4, 256, 1, 4),
    Tuning(4, 65536, 1024, 2048, 1, 4096, 1, 8),
    Tuning(4, _ANY, 32, 1024, 4, 256, 2, 8),
    Tuning(4, _ANY, 128, 1024, 2, 512, 1, 4),
    Tuning(4, _ANY, 1024, 2048, 1, 4096, 1, 8),
)
