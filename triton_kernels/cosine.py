"""cosine on the GPU: the distance of an output from the vector of its target, gathered on the way.

With c an output and e the vector that its target names, both (D):

    loss = 1 - (c . e) / (|c| |e|)        or |c - e|^2 / 2
    dc   = dloss (beta c + alpha e)       alpha = -1 / (|c| |e|), beta = cos / |c|^2, or -1 and 1

Saved are beta and alpha, 8 bytes per row, and the output by reference. Forward and backward read
2 D numbers per row each; backward writes D. A program has BLOCK_N rows, one per warp, and walks
along them in steps of BLOCK_D: no sum crosses a warp. Pre-trained vectors have odd widths, 300
above all, so widths and strides are passed as multiples of UNIT: of 300 floats the compiler then
knows that they come in units of 16 bytes, of 300 16-bit numbers in units of 8 bytes.
"""

import math

import torch
import triton
import triton.language as tl

from .rows import cdiv, on_device, row_start, row_strides, warps

BLOCK_N = 4
_SMALLEST = tl.constexpr(torch.finfo(torch.float32).tiny)
# No number makes another kernel; an address does, by being a multiple of 16 bytes or not.
_NUMBERS = ["rows", "rows_t", "units_b", "units_t", "units_e", "vectors", "width_units"]


@triton.jit
def _rows(
    output_ptr, target_ptr, embedding_ptr, rows, rows_t, units_b, units_t, units_e, vectors,
    UNIT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of BLOCK_N rows: number, which exist, where output and vector begin, which have a vector."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = row < rows
    target = tl.load(target_ptr + row, mask=exists, other=-1)
    hit = (target >= 0) & (target < vectors)
    # int64: V * D passes 2^31
    place = tl.where(hit, target, 0) * units_e * UNIT
    return (
        row,
        exists,
        output_ptr + row_start(row, rows_t, units_b, units_t) * UNIT,
        embedding_ptr + place,
        hit,
    )


@triton.jit(do_not_specialize=_NUMBERS)
def _fwd_kernel(
    output_ptr,  # (N, D) or (B, T, D)
    target_ptr,  # (N) int64
    embedding_ptr,  # (V, D)
    loss_ptr,  # (N) fp32
    by_output_ptr,  # (N) fp32
    by_target_ptr,  # (N) fp32
    rows,
    rows_t,
    units_b,
    units_t,
    units_e,
    vectors,
    width_units,
    NORMALIZE: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row, exists, c_ptr, e_ptr, hit = _rows(
        output_ptr, target_ptr, embedding_ptr, rows, rows_t, units_b, units_t, units_e, vectors,
        UNIT, BLOCK_N,
    )  # fmt: skip
    width = width_units * UNIT
    cc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    ee = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    ce = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for first in range(0, width, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)
        inside = hit[:, None] & (column < width)[None, :]
        c = tl.load(c_ptr[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
        e = tl.load(e_ptr[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if NORMALIZE:
            cc += c * c
            ee += e * e
            ce += c * e
        else:
            ce += (c - e) * (c - e)
    product = tl.sum(ce, axis=1)
    if NORMALIZE:
        square_c = tl.sum(cc, axis=1)
        square_e = tl.sum(ee, axis=1)
        directed = hit & ~((square_c < _SMALLEST) | (square_e < _SMALLEST))
        # |c| / |c|^2 and not 1 / |c|: a sum of squares that overflows gives NaN, not 0
        by_target = -tl.div_rn(tl.sqrt_rn(square_c), square_c)
        by_target *= tl.div_rn(tl.sqrt_rn(square_e), square_e)
        by_target = tl.where(directed, by_target, 0.0)
        similarity = tl.where(directed, -product * by_target, 0.0)
        by_output = tl.where(directed, tl.div_rn(similarity, square_c), 0.0)
        loss = 1.0 - similarity
    else:
        loss = 0.5 * product
        by_output = tl.where(hit, 1.0, 0.0)
        by_target = tl.where(hit, -1.0, 0.0)
    tl.store(loss_ptr + row, tl.where(hit, loss, float("nan")), mask=exists)
    tl.store(by_output_ptr + row, by_output, mask=exists)
    tl.store(by_target_ptr + row, by_target, mask=exists)


@triton.jit(do_not_specialize=_NUMBERS)
def _bwd_kernel(
    dloss_ptr,  # (N) fp32
    output_ptr,  # (N, D) or (B, T, D)
    target_ptr,  # (N) int64
    embedding_ptr,  # (V, D)
    by_output_ptr,  # (N) fp32
    by_target_ptr,  # (N) fp32
    doutput_ptr,  # (N, D)
    rows,
    rows_t,
    units_b,
    units_t,
    units_e,
    vectors,
    width_units,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row, exists, c_ptr, e_ptr, hit = _rows(
        output_ptr, target_ptr, embedding_ptr, rows, rows_t, units_b, units_t, units_e, vectors,
        UNIT, BLOCK_N,
    )  # fmt: skip
    width = width_units * UNIT
    dloss = tl.load(dloss_ptr + row, mask=exists, other=0.0)
    by_output = tl.load(by_output_ptr + row, mask=exists, other=0.0)
    by_target = tl.load(by_target_ptr + row, mask=exists, other=0.0)
    # what is not counted stays 0 where the output is NaN
    counted = hit & (dloss != 0) & (by_target != 0)
    out_ptr = doutput_ptr + row * width_units * UNIT
    for first in range(0, width, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)
        within = (column < width)[None, :]
        inside = counted[:, None] & within
        c = tl.load(c_ptr[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
        e = tl.load(e_ptr[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
        gradient = dloss[:, None] * (by_output[:, None] * c + by_target[:, None] * e)
        gradient = tl.where(inside, gradient, 0.0).to(doutput_ptr.dtype.element_ty)
        tl.store(out_ptr[:, None] + column[None, :], gradient, mask=exists[:, None] & within)


def unit(*numbers: int) -> int:
    """The largest power of two, up to 16 bytes of the smallest dtype, that divides all of them."""
    return math.gcd(8, *numbers)


def options(unit: int, itemsize: int) -> dict[str, int]:
    # a step of a warp: 32 accesses, of 16 bytes where the unit allows
    block = max(128, 32 * min(unit, 16 // itemsize))
    return {"UNIT": unit, "BLOCK_N": BLOCK_N, "BLOCK_D": block, **warps(BLOCK_N)}


def _arguments(
    output: torch.Tensor, target: torch.Tensor, embedding: torch.Tensor
) -> tuple[tuple[int, ...], dict[str, int]]:
    """The numbers that both kernels take, and their options."""
    stride_b, stride_t, rows_t = row_strides(output)
    width, stride_e = output.shape[-1], embedding.stride(0)
    u = unit(stride_b, stride_t, stride_e, width)
    units = (stride_b // u, stride_t // u, stride_e // u, embedding.shape[0], width // u)
    return (target.numel(), max(1, rows_t), *units), options(u, output.element_size())


def cosine_fwd(
    output: torch.Tensor, target: torch.Tensor, embedding: torch.Tensor, normalize: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    loss, by_output, by_target = (
        torch.empty(target.shape, dtype=torch.float32, device=output.device) for _ in range(3)
    )
    if target.numel() > 0:
        numbers, config = _arguments(output, target, embedding)
        with on_device(output):
            _fwd_kernel[(cdiv(target.numel(), BLOCK_N),)](
                output, target, embedding, loss, by_output, by_target, *numbers,
                NORMALIZE=normalize, **config,
            )  # fmt: skip
    return loss, by_output, by_target


def cosine_bwd(
    dloss: torch.Tensor,
    output: torch.Tensor,
    target: torch.Tensor,
    embedding: torch.Tensor,
    by_output: torch.Tensor,
    by_target: torch.Tensor,
) -> torch.Tensor:
    doutput = torch.empty(output.shape, dtype=output.dtype, device=output.device)
    if target.numel() > 0:
        numbers, config = _arguments(output, target, embedding)
        with on_device(output):
            _bwd_kernel[(cdiv(target.numel(), BLOCK_N),)](
                dloss.contiguous(), output, target, embedding, by_output, by_target, doutput,
                *numbers, **config,
            )  # fmt: skip
    return doutput
