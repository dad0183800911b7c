"""sparse_linear on the GPU: gradients of a linear layer from the m non-zeros per row of dlogits.

    dhidden_n = sum_j g_nj weight[class_nj]
    dweight_c = sum over the pairs (n, j) of class c, in their order, of g_nj hidden_n

Both are sums of weighted rows, in float32, and read what they sum once: m rows of the weight per
token, m rows of hidden per token. dweight writes V * D * itemsize bytes besides, zeros included, so
nothing is cleared before. A pair whose coefficient is 0 is not loaded.

A program has columns of one sum, and adds the rows one after another: each thread keeps the sums of
its own columns, and none needs another's. Triton sums a tile of rows across the warps, through
shared memory, at every step: on an H200 (bfloat16, N = 8192, m = 21, D = 4096, V = 128256) dweight
took 4.8 ms so, and dhidden 1.12, where the CUDA kernels of this shape take 0.94 and 0.39. And in
such groups a pair of coefficient 0 moves the others, and with them the last bits of the sum; one by
one it changes nothing.

dweight first sorts the pairs by class, stably, so that every sum has one order: two runs agree in
all bits, where atomics would not. Most classes have three pairs or fewer, and wait for where they
start, then for pairs, then for rows: a program is up to 4096 columns wide, so that a class waits
once. Frequent classes would keep it long, so whole pieces of PIECE sorted pairs that belong to one
class are summed before, each by a program of its own, and the program of the class adds their sums
in order. Nothing here waits for the GPU.
"""

import math

import torch
import triton
import triton.language as tl

from .rows import cdiv, next_power_of_2, on_device, warps

# Sorted pairs of a class that are summed apart: at most that many, twice, are left to its program.
PIECE = 256
# Accesses of a thread to a row, 16 bytes each, and rows that are loaded before the first is added:
# of sums fewer than FEW a program has a quarter, so that there are programs for the whole GPU.
MANY, ALONE, FEW = (4, 4), (1, 8), 1024


@triton.jit
def _columns(width, BLOCK_D: tl.constexpr):
    """(BLOCK_D): the columns of this program, and which exist."""
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    return column, column < width


@triton.jit
def _add_rows(
    total,  # (BLOCK_D) fp32
    coefficients_ptr,  # (count) fp32
    rows_ptr,  # (count) int32
    count,
    source_ptr,  # (., width)
    width,
    column,
    UNROLL: tl.constexpr,
):
    """The sum of total and, one after another, `count` weighted rows."""
    for first in tl.range(0, count, UNROLL):
        coefficients, rows = (), ()
        for i in tl.static_range(UNROLL):
            exists = first + i < count
            coefficient = tl.load(coefficients_ptr + first + i, mask=exists, other=0.0)
            row = tl.load(rows_ptr + first + i, mask=exists, other=0).to(tl.int64)
            # a number to compare with, not a second mask: that costs an operation per access
            extent = tl.where(coefficient != 0, width, 0)
            coefficients += (coefficient,)
            rows += (tl.load(source_ptr + row * width + column, mask=column < extent),)
        # The compiler would load a row, wait, add it, and load the next into the same registers. No
        # load moves below the barrier, and no addition above a coefficient that is read below it.
        tl.debug_barrier()
        coefficient = tl.load(coefficients_ptr + first)
        for i in tl.static_range(UNROLL):
            if i > 0:
                coefficient = coefficients[i]
            if coefficient != 0:
                total += coefficient * rows[i].to(tl.float32)
    return total


@triton.jit(do_not_specialize=["m", "width_units"])
def _dhidden_kernel(
    coefficients_ptr,  # (N, m) fp32
    classes_ptr,  # (N, m) int32
    weight_ptr,  # (V, width)
    dhidden_ptr,  # (N, width)
    m,
    width_units,
    UNIT: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    width = width_units * UNIT
    column, inside = _columns(width, BLOCK_D)
    total = _add_rows(
        tl.zeros([BLOCK_D], tl.float32), coefficients_ptr + row * m, classes_ptr + row * m, m,
        weight_ptr, width, column, UNROLL,
    )  # fmt: skip
    out = dhidden_ptr + row * width + column
    tl.store(out, total.to(dhidden_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["width_units"])
def _piece_kernel(
    coefficients_ptr,  # (pairs) fp32, sorted by class as what follows
    tokens_ptr,  # (pairs) int32
    classes_ptr,  # (pairs) int32
    hidden_ptr,  # (N, width)
    sums_ptr,  # (pairs // PIECE, width) fp32: of the pieces of one class
    width_units,
    PIECE: tl.constexpr,
    UNIT: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    piece = tl.program_id(0).to(tl.int64)
    begin = piece * PIECE
    if tl.load(classes_ptr + begin) == tl.load(classes_ptr + begin + PIECE - 1):
        width = width_units * UNIT
        column, inside = _columns(width, BLOCK_D)
        total = _add_rows(
            tl.zeros([BLOCK_D], tl.float32), coefficients_ptr + begin, tokens_ptr + begin, PIECE,
            hidden_ptr, width, column, UNROLL,
        )  # fmt: skip
        tl.store(sums_ptr + piece * width + column, total, mask=inside)


@triton.jit(do_not_specialize=["width_units"])
def _dweight_kernel(
    coefficients_ptr,  # (pairs) fp32, sorted by class
    tokens_ptr,  # (pairs) int32
    starts_ptr,  # (V + 1) int64: of the pairs of each class
    hidden_ptr,  # (N, width)
    sums_ptr,  # (pairs // PIECE, width) fp32
    dweight_ptr,  # (V, width)
    width_units,
    PIECE: tl.constexpr,
    UNIT: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    width = width_units * UNIT
    column, inside = _columns(width, BLOCK_D)
    begin = tl.load(starts_ptr + index)
    end = tl.load(starts_ptr + index + 1)
    first = tl.cdiv(begin, PIECE)
    last = end // PIECE
    # without a whole piece all pairs come before it
    before = tl.where(first < last, first * PIECE, end)
    total = _add_rows(
        tl.zeros([BLOCK_D], tl.float32), coefficients_ptr + begin, tokens_ptr + begin,
        (before - begin).to(tl.int32), hidden_ptr, width, column, UNROLL,
    )  # fmt: skip
    if first < last:
        for piece in tl.range(first, last, UNROLL // 2):
            sums = ()
            for i in tl.static_range(UNROLL // 2):
                extent = tl.where(piece + i < last, width, 0)
                sum_ptr = sums_ptr + (piece + i) * width
                sums += (tl.load(sum_ptr + column, mask=column < extent, other=0.0),)
            for i in tl.static_range(UNROLL // 2):
                total += sums[i]
        after = last * PIECE
        total = _add_rows(
            total, coefficients_ptr + after, tokens_ptr + after, (end - after).to(tl.int32),
            hidden_ptr, width, column, UNROLL,
        )  # fmt: skip
    out = dweight_ptr + index * width + column
    tl.store(out, total.to(dweight_ptr.dtype.element_ty), mask=inside)


def options(width: int, itemsize: int, sums: int) -> dict[str, int]:
    """The configuration for that many sums of rows of that width."""
    unit = math.gcd(16 // itemsize, width)
    accesses, unroll = MANY if sums >= FEW else ALONE
    block = min(128 * unit * accesses, max(16, next_power_of_2(width)))
    threads = block // (unit * accesses)
    return {"UNIT": unit, "UNROLL": unroll, "BLOCK_D": block, **warps(max(1, threads // 32))}


def sparse_linear_dhidden(
    coefficients: torch.Tensor, classes: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    (rows, m), width = coefficients.shape, weight.shape[1]
    dhidden = weight.new_empty((rows, width), dtype=dtype)
    if dhidden.numel() > 0:
        config = options(width, weight.element_size(), rows)
        grid = (rows, cdiv(width, config["BLOCK_D"]))
        with on_device(weight):
            _dhidden_kernel[grid](
                coefficients, classes, weight, dhidden, m, width // config["UNIT"], **config
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
    pieces = pairs // PIECE
    sums = hidden.new_empty((pieces, width), dtype=torch.float32)
    with on_device(hidden):
        if pieces > 0:
            config = options(width, hidden.element_size(), pieces)
            _piece_kernel[(pieces, cdiv(width, config["BLOCK_D"]))](
                sorted_coefficients, tokens, by_class, hidden, sums, width // config["UNIT"],
                PIECE, **config,
            )  # fmt: skip
        config = options(width, hidden.element_size(), num_classes)
        _dweight_kernel[(num_classes, cdiv(width, config["BLOCK_D"]))](
            sorted_coefficients, tokens, starts, hidden, sums, dweight, width // config["UNIT"],
            PIECE, **config,
        )  # fmt: skip
    return dweight
