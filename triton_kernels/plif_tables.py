"""plif on the GPU, what is made of K or of N numbers: slopes and offsets, the scale of the fixed
point, and the gradient of the slopes.

Contract and formulas stand in sparse_ce/schema.py and sparse_ce/ops.py. Sums over the cells are of
integers in fixed point, and maxima of the bits of floats without a sign, among which NaN is the
largest: neither has an order, so that the bits are those of the tensor operations, in every run.
The logarithm and the exponential of the softplus are not: they are some units of float64 off.

A program has a part of the cells, and reads what all parts have found in the launch before. One
part begins at the middle, where the offset is 0.

    tables   3 launches: slopes, and the largest step of the offsets; sums of steps; offsets
    scale    1 launch, beyond ALONE rows 2
    dslopes  2 launches: sums of gradients; the gradients of the slopes
"""

import torch
import triton
import triton.language as tl

from .rows import cdiv, kernel, on_device, warps

# Cells of a program at a time, and the most programs.
BLOCK = 512
PARTS = 1024
# Rows of a program at a time, how many it has alone, and the most programs.
ROWS = 4096
ALONE = 4 * ROWS
SCALE_PARTS = 128


@triton.jit
def _magnitude(x):
    """The bits of |x| in float64, of NaN too: an instruction for |x| may keep its sign."""
    return x.to(tl.float64).to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF


@triton.jit
def _fixed_point(largest, count):
    """That of schema.py for a sum of `count` numbers, of which `largest` is the _magnitude."""
    total = largest.to(tl.float64, bitcast=True) * count.to(tl.float64)
    bits = tl.maximum(total.to(tl.int64, bitcast=True), 123 << 52)  # 2^-900
    exponent = (bits + 0xFFFFFFFFFFFFF) >> 52
    return ((2 * 1023 + 60 - exponent) << 52).to(tl.float64, bitcast=True) + 0 * total


@triton.jit
def _cells(turn, K, before, share, BLOCK: tl.constexpr):
    """The cells of a turn of this program, and which exist."""
    cell = K // 2 + ((tl.program_id(0) - before) * share + turn) * BLOCK + tl.arange(0, BLOCK)
    return cell, (cell >= 0) & (cell < K)


@triton.jit
def _of_parts(ptr, PARTS: tl.constexpr):
    part = tl.arange(0, PARTS)
    return tl.load(ptr + part, mask=part < tl.num_programs(0), other=0)


@triton.jit
def _slope(w_ptr, cell, inside, tiny, dtype: tl.constexpr):
    w = tl.load(w_ptr + cell, mask=inside, other=0.0)
    if w.dtype == tl.float64:
        x = w
    else:
        x = w.to(tl.float32).to(tl.float64)
    e = tl.exp(x)
    u = 1 + e
    # log(1 + e), where log(u) alone would lose what 1 + e is rounded by
    softplus = tl.where(u == 1, e, tl.log(u) * (e / (u - 1)))
    softplus = tl.where(x > 20, x, softplus)
    # that of the start, which is rounded too, is then 1 and not next to it; none is 0
    if w.dtype != tl.float64:
        softplus = softplus.to(tl.float32).to(w.dtype).to(tl.float32).to(tl.float64)
    return (softplus + tiny).to(dtype)


@triton.jit
def _step(slope, following, cell, K, unit):
    """The offset of the cell after this one, less its own."""
    at_knot = (2 * cell + 2 - K).to(tl.float64) * unit
    return (slope.to(tl.float64) - following.to(tl.float64)) * at_knot


@triton.jit
def _fixed_steps(slopes_ptr, cell, inside, K, unit, scale):
    follows = inside & (cell + 1 < K)
    slope = tl.load(slopes_ptr + cell, mask=follows, other=0.0)
    following = tl.load(slopes_ptr + cell + 1, mask=follows, other=0.0)
    step = _step(slope, following, cell, K, unit)
    return (step * scale).to(tl.int64)


@kernel
def _slopes_kernel(
    w_ptr,  # (K)
    slopes_ptr,  # (K)
    maxima_ptr,  # (programs) int64
    K,
    before,
    share,
    unit: tl.float64,
    tiny: tl.float64,
    BLOCK: tl.constexpr,
):
    largest = tl.zeros([BLOCK], tl.int64)
    dtype: tl.constexpr = slopes_ptr.dtype.element_ty
    for turn in range(share):
        cell, inside = _cells(turn, K, before, share, BLOCK)
        follows = inside & (cell + 1 < K)
        slope = _slope(w_ptr, cell, inside, tiny, dtype)
        # once more, of the next cell: cheaper than a launch
        step = _step(slope, _slope(w_ptr, cell + 1, follows, tiny, dtype), cell, K, unit)
        largest = tl.maximum(largest, tl.where(follows, _magnitude(step), 0))
        tl.store(slopes_ptr + cell, slope, mask=inside)
    tl.store(maxima_ptr + tl.program_id(0), tl.max(largest, 0))


@kernel
def _steps_kernel(
    slopes_ptr,  # (K)
    maxima_ptr,  # (programs) int64
    parts_ptr,  # (programs) int64
    K,
    before,
    share,
    unit: tl.float64,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    scale = _fixed_point(tl.max(_of_parts(maxima_ptr, PARTS), 0), K)
    sums = tl.zeros([BLOCK], tl.int64)
    for turn in range(share):
        cell, inside = _cells(turn, K, before, share, BLOCK)
        sums += _fixed_steps(slopes_ptr, cell, inside, K, unit, scale)
    tl.store(parts_ptr + tl.program_id(0), tl.sum(sums, 0))


@kernel
def _offsets_kernel(
    slopes_ptr,  # (K)
    maxima_ptr,  # (programs) int64
    parts_ptr,  # (programs) int64
    offsets_ptr,  # (K)
    K,
    before,
    share,
    unit: tl.float64,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    scale = _fixed_point(tl.max(_of_parts(maxima_ptr, PARTS), 0), K)
    part, sums = tl.arange(0, PARTS), _of_parts(parts_ptr, PARTS)
    # from the middle to here, or back
    passed = tl.sum(tl.where(part < tl.program_id(0), sums, 0), 0)
    passed -= tl.sum(tl.where(part < before, sums, 0), 0)
    for turn in range(share):
        cell, inside = _cells(turn, K, before, share, BLOCK)
        step = _fixed_steps(slopes_ptr, cell, inside, K, unit, scale)
        offset = passed + tl.cumsum(step, 0) - step
        offset = (offset.to(tl.float64) / scale).to(offsets_ptr.dtype.element_ty)
        tl.store(offsets_ptr + cell, offset, mask=inside)
        passed += tl.sum(step, 0)


@kernel
def _masses_kernel(
    cells_ptr,  # (K, 2) int64
    parts_ptr,  # (programs) int64
    K,
    before,
    share,
    BLOCK: tl.constexpr,
):
    sums = tl.zeros([BLOCK], tl.int64)
    for turn in range(share):
        cell, inside = _cells(turn, K, before, share, BLOCK)
        sums += tl.load(cells_ptr + 2 * cell, mask=inside, other=0)
    tl.store(parts_ptr + tl.program_id(0), tl.sum(sums, 0))


@kernel
def _dslopes_kernel(
    cells_ptr,  # (K, 2) int64
    outside_ptr,  # (2) fp64
    scale_ptr,  # () fp64
    parts_ptr,  # (programs) int64
    dslopes_ptr,  # (K)
    K,
    before,
    share,
    width: tl.float64,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    part, sums = tl.arange(0, PARTS), _of_parts(parts_ptr, PARTS)
    total = tl.sum(sums, 0)
    passed = tl.sum(tl.where(part < tl.program_id(0), sums, 0), 0)
    by = width / tl.load(scale_ptr)
    for turn in range(share):
        cell, inside = _cells(turn, K, before, share, BLOCK)
        mass = tl.load(cells_ptr + 2 * cell, mask=inside, other=0)
        moment = tl.load(cells_ptr + 2 * cell + 1, mask=inside, other=0)
        right = tl.where(cell < K // 2, 0, total)
        gradient = (moment - (passed + tl.cumsum(mass, 0)) + right).to(tl.float64)
        # the cell around 0
        half = tl.where((cell == K // 2) & (K % 2 != 0), total, 0).to(tl.float64) / 2
        gradient = (gradient - half) * by
        gradient += tl.where(cell == 0, tl.load(outside_ptr), 0.0)
        gradient += tl.where(cell == K - 1, tl.load(outside_ptr + 1), 0.0)
        tl.store(dslopes_ptr + cell, gradient.to(dslopes_ptr.dtype.element_ty), mask=inside)
        passed += tl.sum(mass, 0)


@kernel
def _scale_kernel(
    dloss_ptr,  # (N)
    dlse_ptr,  # (N)
    dprobs_ptr,  # (N, k)
    target_ptr,  # (N) int64
    at_most_ptr,  # (): the largest |weight|
    lse_ptr,  # (N), lse_stride apart
    maxima_ptr,  # (programs) int64
    scale_ptr,  # () fp64
    lse_stride: tl.int64,
    rows,
    V,
    k,
    steps,
    ALONE: tl.constexpr,
    HAS_DLOSS: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    HAS_DPROBS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    at_most = tl.full([], 1.0, tl.float64)
    if HAS_WEIGHT:
        at_most *= tl.load(at_most_ptr)
    largest = tl.zeros([ROWS], tl.int64)
    for step in range(steps):
        # int64: rows reach 2^31
        row = (step * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * ROWS
        row += tl.arange(0, ROWS)
        exists = row < rows
        above = tl.zeros([ROWS], tl.float64)
        if HAS_DLSE:
            above += tl.abs(tl.load(dlse_ptr + row, mask=exists, other=0.0).to(tl.float64))
        if HAS_DPROBS:
            most = tl.zeros([ROWS], tl.int32)
            for first in range(0, k, BLOCK_K):
                rank = first + tl.arange(0, BLOCK_K)
                here = exists[:, None] & (rank < k)[None, :]
                at = row[:, None] * k + rank[None, :]
                q = tl.load(dprobs_ptr + at, mask=here, other=0.0)
                most = tl.maximum(most, tl.max(q.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1))
            above += 2 * most.to(tl.float32, bitcast=True).to(tl.float64)
        if HAS_DLOSS:
            target = tl.load(target_ptr + row, mask=exists, other=-1)
            dloss = tl.abs(tl.load(dloss_ptr + row, mask=exists, other=0.0).to(tl.float64))
            # a loss moves its weights to the target, or away from it: twice their sum
            above += tl.where((target >= 0) & (target < V), 2 * at_most * dloss, 0.0)
        lse = tl.load(lse_ptr + row * lse_stride, mask=exists, other=0.0)
        # the gradient of a row whose log-sum-exp is not finite is NaN
        above = tl.where((lse - lse == 0) | (above == 0), above, float("nan"))
        largest = tl.maximum(largest, _magnitude(above))
    program_largest = tl.max(largest, 0)
    if ALONE:
        tl.store(scale_ptr, _fixed_point(program_largest, rows))
    else:
        tl.store(maxima_ptr + tl.program_id(0), program_largest)


@kernel
def _join_kernel(
    maxima_ptr,  # (programs) int64
    scale_ptr,  # () fp64
    rows,
    programs,
    PARTS: tl.constexpr,
):
    part = tl.arange(0, PARTS)
    maxima = tl.load(maxima_ptr + part, mask=part < programs, other=0)
    tl.store(scale_ptr, _fixed_point(tl.max(maxima, 0), rows))


def options(name: str, has_dprobs: bool = False) -> dict[str, int]:
    """Of a kernel of this file; of the scale's also with gradients of the probabilities."""
    config = {
        "slopes": {"BLOCK": BLOCK, **warps(4)},
        "masses": {"BLOCK": BLOCK, **warps(4)},
        "scale": {"ROWS": ROWS, "BLOCK_K": 1, **warps(16)},
        "join": {"PARTS": SCALE_PARTS, **warps(4)},
    }.get(name, {"BLOCK": BLOCK, "PARTS": PARTS, **warps(4)})
    if has_dprobs and name == "scale":
        config = {"ROWS": 128, "BLOCK_K": 16, **warps(8)}
    # a * b + c with two roundings, as in tensor operations
    return config | {"enable_fp_fusion": False}


def _parts(cells: int) -> tuple[int, int, int]:
    """How many there are, how many of them before the middle, and the turns of each."""
    share = cdiv(cells, BLOCK * (PARTS - 2))
    before = cdiv(cells // 2, share * BLOCK)
    return before + cdiv(cells - cells // 2, share * BLOCK), before, share


def plif_tables(
    w: torch.Tensor, bound: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    cells = w.shape[0]
    slopes, offsets = (torch.empty(cells, dtype=dtype, device=w.device) for _ in range(2))
    parts, before, share = _parts(cells)
    maxima, sums = torch.empty((2, parts), dtype=torch.int64, device=w.device)
    rest = (cells, before, share, float(bound) / cells)
    with on_device(w):
        _slopes_kernel[(parts,)](
            w.contiguous(), slopes, maxima, *rest, torch.finfo(dtype).tiny, **options("slopes")
        )
        _steps_kernel[(parts,)](slopes, maxima, sums, *rest, **options("steps"))
        _offsets_kernel[(parts,)](slopes, maxima, sums, offsets, *rest, **options("offsets"))
    return slopes, offsets


def plif_scale(
    dloss: torch.Tensor | None,
    dlse: torch.Tensor | None,
    dprobs: torch.Tensor | None,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    lse: torch.Tensor,
    num_classes: int,
) -> torch.Tensor:
    scale = torch.empty((), dtype=torch.float64, device=lse.device)
    dloss, dlse, dprobs = (None if g is None else g.contiguous() for g in (dloss, dlse, dprobs))
    lse, rows = lse.reshape(-1), target.numel()
    at_most = None if weight is None else torch.linalg.vector_norm(weight, torch.inf)
    config = options("scale", dprobs is not None)
    alone = rows * (1 if dprobs is None else dprobs.shape[-1]) <= ALONE
    programs = 1 if alone else min(SCALE_PARTS, cdiv(rows, config["ROWS"]))
    maxima = None if alone else torch.empty(programs, dtype=torch.int64, device=lse.device)
    with on_device(lse):
        _scale_kernel[(programs,)](
            dloss, dlse, dprobs, target, at_most, lse, maxima, scale, lse.stride(0), rows,
            num_classes, 0 if dprobs is None else dprobs.shape[-1],
            cdiv(rows, programs * config["ROWS"]), ALONE=alone, HAS_DLOSS=dloss is not None,
            HAS_DLSE=dlse is not None, HAS_DPROBS=dprobs is not None,
            HAS_WEIGHT=weight is not None, **config,
        )  # fmt: skip
        if not alone:
            _join_kernel[(1,)](maxima, scale, rows, programs, **options("join"))
    return scale


def plif_dslopes(
    cells: torch.Tensor,
    outside: torch.Tensor,
    scale: torch.Tensor,
    bound: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    num_cells = cells.shape[0]
    dslopes = torch.empty(num_cells, dtype=dtype, device=cells.device)
    parts, before, share = _parts(num_cells)
    sums = torch.empty(parts, dtype=torch.int64, device=cells.device)
    rest = (num_cells, before, share)
    with on_device(cells):
        _masses_kernel[(parts,)](cells, sums, *rest, **options("masses"))
        _dslopes_kernel[(parts,)](
            cells, outside, scale, sums, dslopes, *rest, 2 * float(bound) / num_cells,
            **options("dslopes"),
        )  # fmt: skip
    return dslopes
