"""Where rows of logits lie, in chunks of 16 bytes: what kernels and launchers of every stem share.

Logits are (N, V) or (B, T, V) with unit stride in V; of V * itemsize bytes that begin anywhere, the
whole chunks are read 16 bytes at a time, and the classes before the first and after the last apart.
"""

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl


def kernel(function: Callable[..., None]) -> Any:
    """A kernel that is compiled once for its dtypes and constexprs. By itself Triton compiles again
    where a number is 1 or a multiple of 16, and where an address is one: for a slice of the rows.
    """
    parameters = inspect.signature(function).parameters.values()
    values = [p.name for p in parameters if p.annotation is not tl.constexpr]
    return triton.jit(function, do_not_specialize=values)


@triton.jit
def row_start(row, rows_t, stride_b, stride_t):
    # int64 strides: N * V passes 2^31
    return (row // rows_t) * stride_b + (row % rows_t) * stride_t


@triton.jit
def classes_before(ptr, V, ALIGNED: tl.constexpr):
    """How many of V classes from ptr on lie before the first whole chunk."""
    ITEM: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth // 8
    head = 0
    if not ALIGNED:
        head = tl.minimum(((-ptr.to(tl.int64)) & 15).to(tl.int32) // ITEM, V)
    return head


@triton.jit
def edges(head, chunks, V, C: tl.constexpr):
    """(2 C) classes before the first and after the last of the whole chunks, and which exist."""
    edge = tl.arange(0, 2 * C)
    at = tl.where(edge < C, edge, head + chunks * C + edge - C)
    return at, tl.where(edge < C, edge < head, at < V)


@triton.jit
def tile(row_ptr, head, first, chunks, other, LANES: tl.constexpr, C: tl.constexpr):
    """LANES chunks from the chunk `first` on: logits, their classes, and which exist."""
    inside = (first + tl.arange(0, LANES) < chunks)[:, None]
    lane = tl.arange(0, LANES)[:, None] * C + tl.arange(0, C)[None, :]
    # an alignment counts in bytes, and holds only for a sum that this very function makes
    x = tl.load(tl.multiple_of(row_ptr + (head + first * C), 16) + lane, mask=inside, other=other)
    return x, lane + (head + first * C), inside


@triton.jit
def store_tile(out_ptr, head, first, g, at, inside, ALIKE: tl.constexpr):
    """The gradient of a tile: 16 bytes at a time, where its chunks begin at the same classes."""
    if ALIKE:
        LANES: tl.constexpr = g.shape[0]
        C: tl.constexpr = g.shape[1]
        lane = tl.arange(0, LANES)[:, None] * C + tl.arange(0, C)[None, :]
        tl.store(tl.multiple_of(out_ptr + (head + first * C), 16) + lane, g, mask=inside)
    else:
        tl.store(out_ptr + at, g, mask=inside)


@triton.jit
def store_zeros(chunk_ptr, first, last, C: tl.constexpr, BLOCK: tl.constexpr):
    """Into the chunks from first to last of a row that begins at a multiple of 16 bytes."""
    offset = tl.arange(0, BLOCK)[:, None] * C + tl.arange(0, C)[None, :]
    zero = tl.zeros([BLOCK, C], chunk_ptr.dtype.element_ty)
    whole = first + (last - first) // BLOCK * BLOCK
    for chunk in tl.range(first, whole, BLOCK):
        tl.store(chunk_ptr + chunk * C + offset, zero)
    left = (whole + tl.arange(0, BLOCK) < last)[:, None]
    tl.store(chunk_ptr + whole * C + offset, zero, mask=left)


# Triton's own serve kernels as well: to look at their arguments takes them microseconds.


def cdiv(number: int, by: int) -> int:
    return -(-number // by)


def next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


def row_strides(logits: torch.Tensor) -> tuple[int, int, int]:
    """stride_b, stride_t, rows_t of (N, V) or (B, T, V) logits."""
    if logits.dim() == 2:
        return 0, logits.stride(0), logits.shape[0]
    return logits.stride(0), logits.stride(1), logits.shape[1]


def is_aligned(*tensors: torch.Tensor) -> bool:
    """Every row of each begins at a multiple of 16 bytes and ends at one."""
    extents = [n for t in tensors for n in (*t.stride()[:-1], t.shape[-1])]
    whole = all(n * tensors[0].element_size() % 16 == 0 for n in extents)
    return whole and all(t.data_ptr() % 16 == 0 for t in tensors)


def begin_alike(logits: torch.Tensor, dlogits: torch.Tensor) -> bool:
    """Every row of logits lies as far from a multiple of 16 bytes as that of its gradient."""
    offset = logits.data_ptr() - dlogits.data_ptr()
    strides = zip(logits.stride()[:-1], dlogits.stride()[:-1], strict=True)
    gaps = [offset, *((a - b) * logits.element_size() for a, b in strides)]
    return all(gap % 16 == 0 for gap in gaps)


def parts_of_gradient(rows: int, dlogits: torch.Tensor, lanes: int) -> tuple[int, int]:
    """Programs that share a row of a gradient, one unless a GPU would idle, and chunks of each:
    whole tiles, which none but the last leaves a part of.
    """
    chunks = max(1, dlogits.shape[-1] * dlogits.element_size() // 16)
    parts = max(1, min(1024 // max(1, rows), chunks // (4 * lanes)))
    size = cdiv(chunks, parts * lanes) * lanes
    return cdiv(chunks, size), size


def warps(number: int) -> dict[str, int]:
    """Options of a launch. From Triton 3.10 on it must be asked to fuse a * b + c; keys of logits
    overflow on purpose, which with TRITON_DEBUG=1 would be an error.
    """
    return {"num_warps": number, "enable_fp_fusion": True, "sanitize_overflow": False}


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device_of(tensor) if tensor.is_cuda else contextlib.nullcontext()
