"""A learnable increasing function of all logits.

Before the sparse softmax it costs O(N k): f keeps the order of the logits, so the k largest of a
row are those of its logits, and only k + 1 numbers per row pass through f. Saved are 12 k bytes per
row, not the logits.

f is held as one line per cell, f(x) = slope x + offset, not as a height above a knot: with slopes
of 1 the offsets are 0, and f(x) is x to the last bit.
"""

from typing import Any

import torch
from torch import Tensor, nn

from . import backends, checks, ops, schema

_SLOPE_ONE = 0.541324854612918108  # log(e - 1): its softplus is 1


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

    def get_extra_state(self) -> Tensor:
        """With ``w`` in the ``state_dict``: the same ``w`` on another bound is another function."""
        # where it has its number, whatever the device of new tensors
        return torch.tensor(self.bound, dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        if not state.is_meta:
            checks.saved_bound(float(state), self.bound)

    def tables(self, dtype: torch.dtype, backend: str = "auto") -> tuple[Tensor, Tensor]:
        """Slopes and offsets, (K,) each, in the dtype of the statistics of ``dtype``."""
        name = backends.resolve(backend, self.w.device.type, dtype, False)
        slopes, offsets = ops.plif_tables(self.w, self.bound, schema.statistics_dtype(dtype), name)
        return slopes, offsets

    def forward(self, x: Tensor, backend: str = "auto") -> Tensor:
        """f of every element of ``x``: any shape, float32, bfloat16, float16 or float64, on the
        device of ``w``. Computed in float32 (float64 for float64), returned in the dtype of ``x``.
        """
        checks.plif_input(x, self.w)
        checks.backend(backend)
        name = backends.resolve(backend, x.device.type, x.dtype, False)
        y: Tensor = ops.plif_fwd(x.contiguous(), *self.tables(x.dtype, name), self.bound, name)
        return y

    def extra_repr(self) -> str:
        return f"num_cells={self.num_cells}, bound={self.bound}, init_std={self.init_std}"


# On the support one operator from w to the loss: a node of autograd, and an operator each for the
# tables, the fixed point and the slopes, would cost as much as all that f does there.


def _topk_forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    w: Tensor,
    bound: float,
    k: int,
    label_smoothing: float,
    backend: str,
) -> tuple[Tensor, ...]:
    tables: Any = backends.implementation(backend, "plif_tables")
    softmax: Any = backends.implementation(backend, "plif_topk_ce_fwd")
    slopes, offsets = tables(w, bound, schema.statistics_dtype(logits.dtype))
    outputs = softmax(logits, target, weight, slopes, offsets, bound, k, label_smoothing)
    return *outputs, slopes


def _topk_backward(
    dloss: Tensor | None,
    dlse: Tensor | None,
    dprobs: Tensor | None,
    target: Tensor,
    indices: Tensor,
    probs: Tensor,
    values: Tensor,
    weight: Tensor | None,
    w: Tensor,
    slopes: Tensor,
    bound: float,
    label_smoothing: float,
    num_classes: int,
    dtype: torch.dtype,
    needed: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    fixed_point: Any = backends.implementation(backend, "plif_scale")
    gradient: Any = backends.implementation(backend, "plif_topk_ce_bwd")
    dslopes: Any = backends.implementation(backend, "plif_dslopes")
    above, scale = (dloss, dlse, dprobs), None
    if needed:
        # a probability is NaN where the log-sum-exp is not finite
        scale = fixed_point(*above, target, weight, probs[..., 0], num_classes)
    dlogits, *sums = gradient(
        *above, target, indices, probs, values, weight, slopes, bound, label_smoothing,
        num_classes, dtype, scale,
    )  # fmt: skip
    if scale is None:
        return dlogits, w.new_empty(0)
    return dlogits, ops.softplus_gradient(dslopes(*sums, scale, bound, slopes.dtype), w)


topk_plif_ce_fwd = ops.Operator("topk_plif_ce_fwd", _topk_forward)
topk_plif_ce_bwd = ops.Operator("topk_plif_ce_bwd", _topk_backward)


@torch.library.register_fake("sparse_ce::topk_plif_ce_fwd")
def _(logits, target, weight, w, bound, k, *rest):  # type: ignore[no-untyped-def]
    rows, dtype = logits.shape[:-1], schema.statistics_dtype(logits.dtype)
    shapes = (rows, rows, (*rows, k), (*rows, k + 1), w.shape)
    loss, lse, *lists = (logits.new_empty(shape, dtype=dtype) for shape in shapes)
    return loss, lse, logits.new_empty((*rows, k), dtype=torch.int32), *lists


@torch.library.register_fake("sparse_ce::topk_plif_ce_bwd")
def _(dloss, dlse, dprobs, target, indices, probs, values, weight, w, *rest):  # type: ignore[no-untyped-def]
    _, _, _, num_classes, dtype, needed, _ = rest
    dlogits = probs.new_empty((*target.shape, num_classes), dtype=dtype)
    return dlogits, w.new_empty(w.shape if needed else 0)


def _topk_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, weight, w, ctx.bound, _, ctx.label_smoothing, ctx.backend = inputs
    _, _, indices, probs, values, slopes = output
    ctx.num_classes, ctx.dtype = logits.shape[-1], logits.dtype
    ctx.mark_non_differentiable(values, slopes)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(target, indices, probs, values, weight, w, slopes)


def _topk_autograd(
    ctx: Any, dloss: Tensor | None, dlse: Tensor | None, _: None, dprobs: Tensor | None, *__: None
) -> tuple[Tensor | None, ...]:
    if dloss is None and dlse is None and dprobs is None:
        return (None,) * 8
    needed = ctx.needs_input_grad[3]
    dlogits, dw = topk_plif_ce_bwd(
        dloss, dlse, dprobs, *ctx.saved_tensors, ctx.bound, ctx.label_smoothing, ctx.num_classes,
        ctx.dtype, needed, ctx.backend,
    )  # fmt: skip
    return (dlogits, None, None, dw if needed else None, *(None,) * 4)


topk_plif_ce_fwd.differentiable(_topk_autograd, _topk_context)
topk_plif_ce_bwd.differentiable(ops.first_derivative_only("MonotonicPLIF"))
