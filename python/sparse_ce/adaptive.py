"""Adaptive sparse softmax: classes that a target already beats by a margin drop out.

Compositions of the operators of schema.py, threshold_ce of single labels and labels_ce of several
per row. Source: Lv et al., Adaptive Sparse Softmax, arXiv 2508.03175.
"""

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from . import backends, checks, functional, ops, schema


class AdaptiveSupport(NamedTuple):
    """What the loss knows about the classes that it kept. N stands for the leading shape of logits.

    ``lse`` (N), the log-sum-exp of the logits of the kept classes, differentiable: float32, or
    float64 for float64 logits. ``kept`` (N) int32: how many classes are. ``learnt`` (N) bool: the
    loss of this row is 0, and so is its gradient; no ignored row is. ``counted`` (N) bool: the row
    is not ignored.
    """

    lse: Tensor
    kept: Tensor
    learnt: Tensor
    counted: Tensor


@overload
def adaptive_sparse_ce(
    logits: Tensor,
    target: Tensor,
    delta: float = ...,
    *,
    weight: Tensor | None = ...,
    ignore_index: int = ...,
    label_smoothing: float = ...,
    reduction: str = ...,
    return_support: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...
@overload
def adaptive_sparse_ce(
    logits: Tensor,
    target: Tensor,
    delta: float = ...,
    *,
    weight: Tensor | None = ...,
    ignore_index: int = ...,
    label_smoothing: float = ...,
    reduction: str = ...,
    return_support: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, AdaptiveSupport]: ...
def adaptive_sparse_ce(
    logits: Tensor,
    target: Tensor,
    delta: float = 0.1,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    return_support: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, AdaptiveSupport]:
    """Cross-entropy of the softmax over the classes that the target does not beat by ``delta``.

    With p the softmax over all classes, a row keeps its target y and every class with
    ``p_y - p_i <= delta``; ``loss = logsumexp(z_i for i kept) - z_y``. No gradient flows through
    the choice. While ``p_y <= delta`` nothing drops out; where all rivals have, the row is learnt:
    loss 0, gradient exactly 0. ``delta = 1`` is ``F.cross_entropy``. The loss jumps where a class
    drops out, and is not convex.

    Several labels per row, where ``target`` has the shape of ``logits``: with the classes split
    into positives and negatives, ``log(1 + sum of exp(z) over the kept negatives) + log(1 + sum of
    exp(-z) over the kept positives)``. A negative is kept where ``min p of the positives - p_i <=
    delta``, a positive where ``p_i - max p of the negatives <= delta``; a row without positives, or
    without negatives, keeps all. To predict: classes with a logit above 0.

    Args:
        logits: (..., V) float32, bfloat16, float16 or float64, classes last, any strides. Never
            written to.
        target: (...) int64 or int32 class indices; or (..., V) of 0 and 1, of any dtype.
        delta: the margin of probability, in [0, 1].
        weight, ignore_index, label_smoothing, reduction, backend: as in ``fused_sparse_ce``;
            smoothing spreads over the kept classes. With several labels per row only reduction and
            backend: the others must be left as they are.
        return_support: also return the ``AdaptiveSupport``. Not with several labels per row.

    Returns:
        The loss, a scalar or (...) for "none", float32 (float64 for float64 logits); with
        ``return_support`` the pair (loss, AdaptiveSupport).

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as ``fused_sparse_ce``.
    """
    checks.logits(logits)
    checks.delta(delta)
    checks.reduction(reduction)
    checks.return_support(return_support)
    checks.backend(backend)
    if isinstance(target, Tensor) and target.shape == logits.shape and logits.dim() > 0:
        checks.labels(target, logits, weight, ignore_index, label_smoothing, return_support)
        return _of_several_labels(logits, target, float(delta), reduction, backend)
    checks.target(target, logits)
    checks.weight(weight, logits)
    checks.ignore_index(ignore_index)
    checks.label_smoothing(label_smoothing)
    num_classes = logits.shape[-1]
    rows = functional.as_rows(logits)
    row_target = functional.as_row_target(target, rows)
    if weight is not None:
        weight = weight.to(schema.statistics_dtype(logits.dtype)).contiguous()
    name = backends.resolve(backend, logits.device.type, logits.dtype, False)
    inputs = (
        rows, row_target, weight, num_classes, float(delta), float(label_smoothing), name,
    )  # fmt: skip
    reduced: Tensor
    reduced, loss, lse, *_, kept = functional.reduced_by(
        ops.threshold_ce_fwd, inputs, target, ignore_index, reduction
    )
    if not return_support:
        return reduced
    counted = target != ignore_index
    kept = kept.view(target.shape)
    # of a row that is NaN the target may be all that there is
    learnt = (kept == 1) & counted & (loss == 0).view(target.shape)
    return reduced, AdaptiveSupport(lse.view(target.shape), kept, learnt, counted)


def _of_several_labels(
    logits: Tensor, target: Tensor, delta: float, reduction: str, backend: str
) -> Tensor:
    rows = functional.as_rows(logits)
    labels = (target if target.dtype == torch.bool else target != 0).reshape(rows.shape)
    name = backends.resolve(backend, logits.device.type, logits.dtype, False)
    loss: Tensor = ops.labels_ce_fwd(rows, labels.contiguous(), delta, name)[0]
    if reduction == "none":
        return loss.view(logits.shape[:-1])
    return loss.sum() / max(1, loss.numel()) if reduction == "mean" else loss.sum()
