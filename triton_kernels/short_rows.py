"""topk_ce on the GPU where rows are short and several share a program. The formulas: topk_ce.py.

Such rows are bound by instructions, not by memory. Where classes are few, all are sorted.
"""

import triton
import triton.language as tl

from .list import list_gradient, list_outputs
from .order import pack, value_key
from .rows import kernel, row_start, row_strides, store_zeros, warps

# Of a tile whose order it does not know, the compiler takes the last axis for the lanes; that of
# Triton 3.6 the first.
ROWS_LAST = tl.constexpr(not triton.__version__.startswith("3.6."))
# Up to which k several short rows share a program.
FEW_K = 32


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
    # after the last row comes the last again: it is written twice, alike
    first = tl.program_id(0) * ROWS
    rows = first + tl.minimum(tl.arange(0, ROWS), N - 1 - first)
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
    # after the last row comes the last again: it is written twice, alike
    first = tl.program_id(0) * ROWS
    row = (first + tl.minimum(tl.arange(0, ROWS), N - 1 - first)[:, None]).to(tl.int64)
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
    size = max(16, triton.next_power_of_2(num_classes))
    top = min(size, max(16, triton.next_power_of_2(k)))
    # of longer lists a tile would leave registers, and take Triton minutes
    rows, number = (8, 1) if k <= FEW_K else (1, max(1, size // 256))
    return {"SORT": size, "TOP": top, "ROWS": rows, **warps(number)}


def short_bwd_options(itemsize: int, num_classes: int, k: int) -> dict[str, int] | None:
    """The configuration of _short_bwd_kernel, where it is for such rows."""
    if num_classes * itemsize > 2048 or k > FEW_K:
        return None
    return {"K2": max(16, triton.next_power_of_2(k)), "ROWS": 8, "BLOCK": 128, **warps(1)}


def launch_few(tensors, k, label_smoothing, options):  # type: ignore[no-untyped-def]
    logits, target = tensors[:2]
    rows, num_classes = target.numel(), logits.shape[-1]
    few, (stride_b, stride_t, rows_t) = few_options(num_classes, k), row_strides(logits)
    _few_kernel[(triton.cdiv(rows, few["ROWS"]),)](
        *tensors, stride_b, stride_t, 1, rows_t, rows, num_classes, k, label_smoothing,
        **few, **options,
    )  # fmt: skip


def launch_short_bwd(tensors, k, label_smoothing, options):  # type: ignore[no-untyped-def]
    dlogits = tensors[-1]
    num_classes = dlogits.shape[-1]
    rows = dlogits.numel() // num_classes
    short = short_bwd_options(dlogits.element_size(), num_classes, k)
    _short_bwd_kernel[(triton.cdiv(rows, short["ROWS"]),)](
        *tensors, rows, num_classes, k, label_smoothing, **short, **options
    )
