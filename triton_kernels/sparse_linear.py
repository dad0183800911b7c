"""sparse_linear on the GPU: gradients of a linear layer from the m non-zeros per row of dlogits.

    dhidden_n = sum_j g_nj weight[class_nj]
    dweight_c = sum over the pairs (n, j) of class c, in their order, of g_nj hidden_n

Both are sums of weighted rows, in float32, and read what they sum once: m rows of the weight per
token, m rows of hidden per token. dweight writes V * D * itemsize bytes besides, zeros included, so
nothing is cleared before. A pair whose coefficient is 0 is not loaded.

dweight first sorts the pairs by class, stably, so that every sum has one order: two runs agree in
all bits, where atomics would not. A program adds up one class. Frequent classes would keep it long,
so whole pieces of PIECE sorted pairs that belong to one class are summed before, each by a program
of its own, and the program of the class adds their sums in order. Nothing here waits for the GPU.
"""

import torch
import triton
import triton.language as tl

from .rows import on_device, warps

# Sorted pairs of a class that are summed apart: at most that many, twice, are left to its program.
PIECE = 256


@triton.jit
def _weighted_rows(
    coefficients_ptr,  # (pairs) fp32
    rows_ptr,  # (pairs) int32
    source_ptr,  # (., width)
    column,  # (BLOCK_D)
    begin,
    end,
    width,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(BLOCK_D) fp32: the sum over pairs begin to end."""
    total = tl.zeros([BLOCK_D], tl.float32)
    for first in tl.range(begin, end, BLOCK_M):
        pair = first + tl.arange(0, BLOCK_M)
        valid = pair < end
        g = tl.load(coefficients_ptr + pair, mask=valid, other=0.0)
        row = tl.load(rows_ptr + pair, mask=valid, other=0).to(tl.int64)
        inside = (g != 0)[:, None] & (column < width)[None, :]
        x = tl.load(source_ptr + row[:, None] * width + column[None, :], mask=inside, other=0.0)
        total += tl.sum(x.to(tl.float32) * g[:, None], axis=0)
    return total


@triton.jit(do_not_specialize=["m"])
def _dhidden_kernel(
    coefficients_ptr,  # (N, m) fp32
    classes_ptr,  # (N, m) int32
    weight_ptr,  # (V, width)
    dhidden_ptr,  # (N, width)
    m,
    width,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = _weighted_rows(
        coefficients_ptr, classes_ptr, weight_ptr, column, row * m, row * m + m, width,
        BLOCK_M, BLOCK_D,
    )  # fmt: skip
    out = dhidden_ptr + row * width + column
    tl.store(out, total.to(dhidden_ptr.dtype.element_ty), mask=column < width)


@triton.jit
def _piece_kernel(
    coefficients_ptr,  # (pairs) fp32, sorted by class as what follows
    tokens_ptr,  # (pairs) int32
    classes_ptr,  # (pairs) int32
    hidden_ptr,  # (N, width)
    sums_ptr,  # (pairs // PIECE, width) fp32: of the pieces of one class
    width,
    PIECE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    piece = tl.program_id(0).to(tl.int64)
    begin = piece * PIECE
    if tl.load(classes_ptr + begin) == tl.load(classes_ptr + begin + PIECE - 1):
        column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        total = _weighted_rows(
            coefficients_ptr, tokens_ptr, hidden_ptr, column, begin, begin + PIECE, width,
            BLOCK_M, BLOCK_D,
        )  # fmt: skip
        tl.store(sums_ptr + piece * width + column, total, mask=column < width)


@triton.jit
def _dweight_kernel(
    coefficients_ptr,  # (pairs) fp32, sorted by class
    tokens_ptr,  # (pairs) int32
    starts_ptr,  # (V + 1) int64: of the pairs of each class
    hidden_ptr,  # (N, width)
    sums_ptr,  # (pairs // PIECE, width) fp32
    dweight_ptr,  # (V, width)
    width,
    PIECE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    begin = tl.load(starts_ptr + index)
    end = tl.load(starts_ptr + index + 1)
    first = tl.cdiv(begin, PIECE)
    last = end // PIECE
    # without a whole piece all pairs come before it
    before = tl.where(first < last, first * PIECE, end)
    after = tl.where(first < last, last * PIECE, end)
    total = _weighted_rows(
        coefficients_ptr, tokens_ptr, hidden_ptr, column, begin, before, width, BLOCK_M, BLOCK_D
    )
    for piece in tl.range(first, last):
        total += tl.load(sums_ptr + piece * width + column, mask=column < width, other=0.0)
    total += _weighted_rows(
        coefficients_ptr, tokens_ptr, hidden_ptr, column, after, end, width, BLOCK_M, BLOCK_D
    )
    out = dweight_ptr + index * width + column
    tl.store(out, total.to(dweight_ptr.dtype.element_ty), mask=column < width)


def options(width: int, rows: int) -> dict[str, int]:
    """The configuration for rows of that width, `rows` of them loaded at a time."""
    block = min(1024, max(16, triton.next_power_of_2(width)))
    return {"BLOCK_M": rows, "BLOCK_D": block, **warps(max(1, min(8, block // 128)))}


def sparse_linear_dhidden(
    coefficients: torch.Tensor, classes: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    (rows, m), width = coefficients.shape, weight.shape[1]
    dhidden = weight.new_empty((rows, width), dtype=dtype)
    if dhidden.numel() > 0:
        config = options(width, 8)
        with on_device(weight):
            _dhidden_kernel[(rows, triton.cdiv(width, config["BLOCK_D"]))](
                coefficients, classes, weight, dhidden, m, width, **config
            )
    return dhidden


def sparse_linear_dweight(
    coefficients: torch.Tensor,
    classes: torch.Tensor,
    hidden: torch.Tensor,
    num_classes: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    width, pairs = hidden.shape[1], classes.numel()
    dweight = hidden.new_empty((num_classes, width), dtype=dtype)
    if dweight.numel() == 0:
        return dweight
    by_class, order = torch.sort(classes.flatten(), stable=True)
    bounds = torch.arange(num_classes + 1, dtype=torch.int32, device=classes.device)
    starts = torch.searchsorted(by_class, bounds)
    # here and not in the kernels, where a division of 64-bit numbers is a call
    tokens = (order // classes.shape[1]).to(torch.int32)
    sorted_coefficients = coefficients.flatten()[order]
    pieces, config = pairs // PIECE, options(width, 4)
    blocks = triton.cdiv(width, config["BLOCK_D"])
    sums = hidden.new_empty((pieces, width), dtype=torch.float32)
    with on_device(hidden):
        if pieces > 0:
            _piece_kernel[(pieces, blocks)](
                sorted_coefficients, tokens, by_class, hidden, sums, width, PIECE, **config
            )
        _dweight_kernel[(num_classes, blocks)](
            sorted_coefficients, tokens, starts, hidden, sums, dweight, width, PIECE, **config
        )
    return dweight
