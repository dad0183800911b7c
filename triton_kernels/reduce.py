"""reduce on the GPU: the losses of the rows to one, and what each row gets of its gradient.

Forward reads 12 bytes per row, and the weight of its target; backward reads 8 and writes 4. Up to
ALONE rows are one program and one launch. Beyond, up to PROGRAMS programs take blocks in turn, and
one more launch adds what they found: all in one order, so that the bits are the same in every run.
A lane adds at most 2^31 / (PROGRAMS * BLOCK) = 512 numbers in float32; all else are trees.
"""

import torch
import triton
import triton.language as tl

from .rows import cdiv, kernel, on_device, warps

BLOCK = 4096
ALONE = 4 * BLOCK
PROGRAMS = 1024
_BWD_BLOCK = 1024


@triton.jit
def _finish(total, share, count, reduced_ptr, divisor_ptr, MEAN: tl.constexpr):
    divisor = 1.0
    if MEAN:
        divisor = tl.where(count > 0, share, 1.0)
    tl.store(reduced_ptr, tl.div_rn(total, divisor) if MEAN else total)
    tl.store(divisor_ptr, divisor)


@kernel
def _fwd_kernel(
    loss_ptr,  # (N) fp32
    target_ptr,  # (N) int64
    weight_ptr,  # (V) fp32
    sums_ptr,  # (3, programs) fp32: losses, shares of the divisor, rows that count
    reduced_ptr,  # () fp32
    divisor_ptr,  # () fp32
    rows,
    num_classes,
    ignore_index,
    steps,
    MEAN: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    ALONE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    losses = tl.zeros([BLOCK], tl.float32)
    shares = tl.zeros([BLOCK], tl.float32)
    counts = tl.zeros([BLOCK], tl.float32)
    for step in range(steps):
        # int64: rows reach 2^31
        row = (step * programs + program).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        exists = row < rows
        target = tl.load(target_ptr + row, mask=exists, other=0)
        counted = exists & (target != ignore_index)
        losses += tl.load(loss_ptr + row, mask=counted, other=0.0)
        if MEAN:
            counts += counted.to(tl.float32)
        if MEAN and HAS_WEIGHT:
            y = tl.minimum(tl.maximum(target, 0), num_classes - 1)
            shares += tl.load(weight_ptr + y, mask=counted, other=0.0)
    total = tl.sum(losses, axis=0)
    count = tl.sum(counts, axis=0)
    share = tl.sum(shares, axis=0) if HAS_WEIGHT else count
    if ALONE:
        _finish(total, share, count, reduced_ptr, divisor_ptr, MEAN)
    else:
        tl.store(sums_ptr + program, total)
        tl.store(sums_ptr + programs + program, share)
        tl.store(sums_ptr + 2 * programs + program, count)


@kernel
def _join_kernel(
    sums_ptr,  # (3, programs) fp32
    reduced_ptr,  # () fp32
    divisor_ptr,  # () fp32
    programs,
    MEAN: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    program = tl.arange(0, PROGRAMS)
    exists = program < programs
    total = tl.sum(tl.load(sums_ptr + program, mask=exists, other=0.0), axis=0)
    share = tl.sum(tl.load(sums_ptr + programs + program, mask=exists, other=0.0), axis=0)
    count = tl.sum(tl.load(sums_ptr + 2 * programs + program, mask=exists, other=0.0), axis=0)
    _finish(total, share, count, reduced_ptr, divisor_ptr, MEAN)


@kernel
def _bwd_kernel(
    dreduced_ptr,  # () fp32
    target_ptr,  # (N) int64
    divisor_ptr,  # () fp32
    dloss_ptr,  # (N) fp32
    rows,
    ignore_index,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = row < rows
    target = tl.load(target_ptr + row, mask=exists, other=0)
    share = tl.div_rn(tl.load(dreduced_ptr), tl.load(divisor_ptr))
    tl.store(dloss_ptr + row, tl.where(target != ignore_index, share, 0.0), mask=exists)


def options(name: str) -> dict[str, int]:
    return {
        "fwd": {"BLOCK": BLOCK, **warps(16)},
        "join": {"PROGRAMS": PROGRAMS, **warps(4)},
        "bwd": {"BLOCK": _BWD_BLOCK, **warps(4)},
    }[name]


def reduce_fwd(
    loss: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    ignore_index: int,
    mean: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = target.numel()
    reduced, divisor = (torch.empty((), dtype=loss.dtype, device=loss.device) for _ in range(2))
    alone = rows <= ALONE
    programs = 1 if alone else min(PROGRAMS, cdiv(rows, BLOCK))
    sums = None if alone else torch.empty((3, programs), dtype=loss.dtype, device=loss.device)
    steps = cdiv(rows, programs * BLOCK)
    num_classes = 1 if weight is None else weight.shape[0]
    with on_device(loss):
        _fwd_kernel[(programs,)](
            loss.contiguous(), target, weight, sums, reduced, divisor, rows, num_classes,
            ignore_index, steps, MEAN=mean, HAS_WEIGHT=weight is not None, ALONE=alone,
            **options("fwd"),
        )  # fmt: skip
        if not alone:
            _join_kernel[(1,)](sums, reduced, divisor, programs, MEAN=mean, **options("join"))
    return reduced, divisor


def reduce_bwd(
    dreduced: torch.Tensor, target: torch.Tensor, divisor: torch.Tensor, ignore_index: int
) -> torch.Tensor:
    rows = target.numel()
    dloss = torch.empty(target.shape, dtype=dreduced.dtype, device=target.device)
    if rows > 0:
        with on_device(target):
            _bwd_kernel[(cdiv(rows, _BWD_BLOCK),)](
                dreduced, target, divisor, dloss, rows, ignore_index, **options("bwd")
            )
    return dloss
