"""A learnable increasing function of all logits, and its composition with the sparse softmax.

f keeps the order of the logits, so the k largest of a row are those of its logits, and only k + 1
numbers per row pass through f. `plif_topk_ce` lists them with topk_ce, takes the softmax of their
f, and in backward places k + 1 numbers per row with topk_ce again. Saved are 12 k bytes per row,
not the logits.

f is held as one line per cell, f(x) = slope x + offset, not as a height above a knot: with slopes
of 1 the offsets are 0, and f(x) is x to the last bit.
"""

from typing import Any

import torch
from torch import Tensor, nn

from . import backends, checks, ops, schema

_SLOPE_ONE = 0.541324854612918108  # log(e - 1): its softplus is 1


def offsets_of(slopes: Tensor, bound: float) -> Tensor:
    """(K) slopes of the cells of [-bound, bound] -> (K) offsets: f is continuous, and f(0) = 0.

    At the knot between two cells the lines meet: offset_i - offset_{i-1} is (slope_{i-1} - slope_i)
    times the knot. Summed in fixed point: on a GPU a sum of floats has no order to rely on.
    """
    num_cells, wide = slopes.shape[0], slopes.detach().double()
    knots = torch.arange(2 - num_cells, num_cells, 2, device=slopes.device, dtype=torch.float64)
    steps = (wide[:-1] - wide[1:]) * knots.mul_(bound / num_cells)
    largest = steps.abs().amax() if num_cells > 1 else wide.new_zeros(())
    scale = ops.fixed_point(largest * num_cells)
    sums = torch.nn.functional.pad((steps * scale).long().cumsum(0), (1, 0))
    # the cell right of 0, or around it
    return ((sums - sums[num_cells // 2]).double() / scale).to(slopes.dtype)


class MonotonicPLIF(nn.Module):
    """A learnable, strictly increasing, piecewise-linear function with f(0) = 0, applied to every
    element: ``plif(x)``, or between logits and softmax ``fused_sparse_ce(logits, target, k,
    link=plif)``.

    ``num_cells`` cells of equal width on [-bound, bound] have the slopes ``softplus(w)``; beyond,
    the end cells go on. It starts as the identity, to the last bit. Source: Ganea et al., Learnable
    monotonic pointwise non-linearities, arXiv 1902.08077.

    The gradient of ``w`` is summed in fixed point: the same bits in every run, on any number of
    threads. A NaN in ``x``, or in a row that counts, makes NaN of it. There is no second
    derivative.

    Args:
        num_cells: K, at most 2^24.
        bound: T, in units of the logits.
        init_std: standard deviation of the start of ``w`` around slope 1; the source's is 1.

    Attributes:
        w: (K,) float32, learnable.
    """

    def __init__(
        self, num_cells: int = 100_000, bound: float = 20.0, init_std: float = 0.0
    ) -> None:
        super().__init__()
        checks.plif(num_cells, bound, init_std)
        self.num_cells, self.bound, self.init_std = num_cells, float(bound), float(init_std)
        self.w = nn.Parameter(torch.empty(num_cells))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.w, _SLOPE_ONE, self.init_std)

    def tables(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Slopes and offsets, (K,) each, in the dtype of the statistics of ``dtype``.

        The softplus is taken in float64 and rounded to the dtype of ``w``: that of its start, which
        is rounded too, is then 1 and not next to it.
        """
        slopes = nn.functional.softplus(self.w.double()).to(self.w.dtype)
        slopes = slopes.to(schema.statistics_dtype(dtype))
        # a slope is never 0: f would not increase, and not know what becomes of an infinity
        slopes = slopes + torch.finfo(slopes.dtype).tiny
        return slopes, offsets_of(slopes, self.bound)

    def forward(self, x: Tensor, backend: str = "auto") -> Tensor:
        """f of every element of ``x``: any shape, float32, bfloat16, float16 or float64, on the
        device of ``w``. Computed in float32 (float64 for float64), returned in the dtype of ``x``.
        """
        checks.plif_input(x, self.w)
        checks.backend(backend)
        name = backends.resolve(backend, x.device.type, x.dtype, False)
        y: Tensor = ops.plif_fwd(x.contiguous(), *self.tables(x.dtype), self.bound, name)
        return y

    def extra_repr(self) -> str:
        return f"num_cells={self.num_cells}, bound={self.bound}, init_std={self.init_std}"


def _topk_forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    slopes: Tensor,
    offsets: Tensor,
    bound: float,
    k: int,
    label_smoothing: float,
    backend: str,
) -> tuple[Tensor, ...]:
    """Loss, lse, indices, probs (N, k), and the logits of the support and of the target (N, k + 1),
    in the dtype of the statistics.
    """
    listing: Any = backends.implementation(backend, "topk_ce_fwd")
    apply: Any = backends.implementation(backend, "plif_fwd")
    indices = listing(logits, target, None, k, 0.0)[2]
    num_classes = logits.shape[-1]
    hit = (target >= 0) & (target < num_classes)
    y = target.clamp(0, num_classes - 1)
    places = torch.cat([indices, y.unsqueeze(-1).int()], -1).long()
    values = logits.gather(-1, places).to(slopes.dtype)
    f = apply(values, slopes, offsets, bound)
    row_max = f[..., 0]
    shifted = f - row_max.unsqueeze(-1)
    shifted, shifted_y = shifted[..., :-1], shifted[..., -1]
    log_sum = shifted.exp().sum(-1).log()
    # the maximum has left both terms before they meet
    loss = log_sum - shifted_y
    if weight is not None:
        loss = loss * weight[y]
    if label_smoothing:
        nll = log_sum.unsqueeze(-1) - shifted
        spread = (nll if weight is None else nll * weight[indices.long()]).sum(-1)
        loss = (1 - label_smoothing) * loss + label_smoothing / k * spread
    probs = (shifted - log_sum.unsqueeze(-1)).exp()
    return loss.masked_fill(~hit, torch.nan), row_max + log_sum, indices, probs, values


def _topk_backward(
    dloss: Tensor | None,
    dlse: Tensor | None,
    dprobs: Tensor | None,
    target: Tensor,
    indices: Tensor,
    probs: Tensor,
    values: Tensor,
    weight: Tensor | None,
    slopes: Tensor,
    bound: float,
    label_smoothing: float,
    num_classes: int,
    dtype: torch.dtype,
    needed: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    bend: Any = backends.implementation(backend, "plif_bwd")
    place: Any = backends.implementation(backend, "topk_ce_bwd")
    pairs, _ = ops.coefficients(
        dloss, dlse, dprobs, target, indices, probs, weight, label_smoothing, num_classes
    )
    # where the target is in the support, its pair joins the one there
    y = target.clamp(0, num_classes - 1)
    is_target = indices == y.unsqueeze(-1)
    inside = is_target.any(-1)
    kept = torch.where(is_target, pairs[..., :-1] + pairs[..., -1:], pairs[..., :-1])
    at_target = pairs[..., -1].masked_fill(inside, 0)
    df = torch.cat([kept, at_target.unsqueeze(-1)], -1)
    scale = (
        ops.fixed_point(df.abs().amax().double() * df.numel()) if needed and df.numel() else None
    )
    dz, cells, outside = bend(df, values, slopes, bound, scale)
    # p times an upstream gradient of 1 is what the operator places: p may be any number
    dz, dz_y = dz[..., :-1].contiguous(), dz[..., -1]
    ones = torch.ones_like(dz_y)
    dlogits = place(None, ones, None, target, indices, dz, None, 0.0, num_classes, dtype)
    # outside of the support the target has a place of its own, else the first one is written again
    at, value = torch.where(inside, indices[..., 0], y), torch.where(inside, dz[..., 0], dz_y)
    rows = torch.arange(target.numel(), device=target.device)
    # not by scatter_: on the CPU it goes through all of a 16-bit tensor
    dlogits.view(-1, num_classes)[rows, at.flatten()] = value.flatten().to(dtype)
    if scale is None:
        return dlogits, slopes.new_zeros(slopes.shape[0] if needed else 0)
    return dlogits, ops.slope_gradient(cells, outside, scale, bound, slopes.dtype)


torch.library.impl("sparse_ce::plif_topk_ce_fwd", "CompositeExplicitAutograd")(_topk_forward)
torch.library.impl("sparse_ce::plif_topk_ce_bwd", "CompositeExplicitAutograd")(_topk_backward)
plif_topk_ce_fwd = torch.ops.sparse_ce.plif_topk_ce_fwd.default
plif_topk_ce_bwd = torch.ops.sparse_ce.plif_topk_ce_bwd.default


@torch.library.register_fake("sparse_ce::plif_topk_ce_fwd")
def _(logits, target, weight, slopes, offsets, bound, k, *rest):  # type: ignore[no-untyped-def]
    rows = logits.shape[:-1]
    loss, lse = (slopes.new_empty(rows) for _ in range(2))
    indices = logits.new_empty((*rows, k), dtype=torch.int32)
    return loss, lse, indices, slopes.new_empty((*rows, k)), slopes.new_empty((*rows, k + 1))


@torch.library.register_fake("sparse_ce::plif_topk_ce_bwd")
def _(dloss, dlse, dprobs, target, indices, probs, values, weight, slopes, *rest):  # type: ignore[no-untyped-def]
    _, _, num_classes, dtype, needed, _ = rest
    dlogits = probs.new_empty((*target.shape, num_classes), dtype=dtype)
    return dlogits, slopes.new_empty(slopes.shape[0] if needed else 0)


def _topk_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, weight, slopes, _, ctx.bound, _, ctx.label_smoothing, ctx.backend = inputs
    _, _, indices, probs, values = output
    ctx.num_classes, ctx.dtype = logits.shape[-1], logits.dtype
    ctx.mark_non_differentiable(values)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(target, indices, probs, values, weight, slopes)


def _topk_autograd(
    ctx: Any, dloss: Tensor | None, dlse: Tensor | None, _: None, dprobs: Tensor | None, __: None
) -> tuple[Tensor | None, ...]:
    if dloss is None and dlse is None and dprobs is None:
        return (None,) * 9
    needed = ctx.needs_input_grad[3]
    dlogits, dslopes = plif_topk_ce_bwd(
        dloss, dlse, dprobs, *ctx.saved_tensors, ctx.bound, ctx.label_smoothing, ctx.num_classes,
        ctx.dtype, needed, ctx.backend,
    )  # fmt: skip
    return (dlogits, None, None, dslopes if needed else None, *(None,) * 5)


torch.library.register_autograd(
    "sparse_ce::plif_topk_ce_fwd", _topk_autograd, setup_context=_topk_context
)
torch.library.register_autograd("sparse_ce::plif_topk_ce_bwd", ops.no_second_derivative)
