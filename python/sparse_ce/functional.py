"""The public functions: check, resolve the backend, run the operator, reduce. No mathematics of
their own.
"""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from . import backends, checks, ops, schema, tail
from .plif import MonotonicPLIF, topk_plif_ce_fwd
from .support import Support


def as_rows(logits: Tensor) -> Tensor:
    """(..., V) -> (N, V) or (B, T, V) with unit stride in V: a view wherever the strides allow
    one.
    """
    if logits.dim() == 1:
        logits = logits.unsqueeze(0)
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        # without rows any strides count as contiguous
        logits = logits.clone(memory_format=torch.contiguous_format)
    return logits.flatten(0, -2) if logits.dim() > 3 else logits


def as_row_target(target: Tensor, rows: Tensor) -> Tensor:
    """(...) of int32 or int64 -> one int64 for each of the rows, contiguous; a call that has
    nothing to do costs a microsecond.
    """
    if target.dtype != torch.int64:
        target = target.to(torch.int64)
    if target.dim() != rows.dim() - 1:
        target = target.reshape(rows.shape[:-1])
    return target if target.is_contiguous() else target.contiguous()


# Branches, not comparisons: under torch.compile k may be symbolic, and a branch turns the answer
# into a guard.
def is_large(k: int) -> bool:
    return True if k > backends.MAX_LIST_K else False


def is_fewer(k: int, num_classes: int) -> bool:
    return True if k < num_classes else False


def samples_of(normalizer: str, tail_samples: int) -> int | None:
    """How many draws stand for the tail; None: there is none, the softmax is that of the list."""
    if normalizer == "topk":
        return None
    return tail_samples if torch.is_grad_enabled() else 0


def uniform_of(
    rows: Tensor, dtype: torch.dtype, samples: int | None, tail_samples: int
) -> Tensor | None:
    """A number for each row, from torch's generator of its device: nothing waits for it. `samples`
    is that of `samples_of`.

    Where no gradient is recorded the generator goes on as well. A reentrant checkpoint passes
    through here so at first; its second pass begins at the same state and ends where the first did.
    """
    if samples is None or not tail_samples:
        return None
    uniform = torch.rand(rows.shape[:-1], device=rows.device, dtype=schema.statistics_dtype(dtype))
    return uniform if torch.is_grad_enabled() else None


def support_of(
    target: Tensor, indices: Tensor, probs: Tensor, lse: Tensor, k: int, num_classes: int
) -> Support:
    """Of rows, whose lists may be longer than k."""
    shape = (*target.shape, k)
    indices, probs = (t[..., :k].reshape(shape) for t in (indices, probs))
    return Support(indices, probs, lse.view(target.shape), num_classes)


@overload
def fused_sparse_ce(
    logits: Tensor,
    target: Tensor,
    k: int | None,
    *,
    weight: Tensor | None = ...,
    ignore_index: int = ...,
    label_smoothing: float = ...,
    normalizer: str = ...,
    tail_samples: int = ...,
    link: MonotonicPLIF | None = ...,
    reduction: str = ...,
    return_support: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...
@overload
def fused_sparse_ce(
    logits: Tensor,
    target: Tensor,
    k: int | None,
    *,
    weight: Tensor | None = ...,
    ignore_index: int = ...,
    label_smoothing: float = ...,
    normalizer: str = ...,
    tail_samples: int = ...,
    link: MonotonicPLIF | None = ...,
    reduction: str = ...,
    return_support: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, Support]: ...
def fused_sparse_ce(
    logits: Tensor,
    target: Tensor,
    k: int | None,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    normalizer: str = "topk",
    tail_samples: int = 0,
    link: MonotonicPLIF | None = None,
    reduction: str = "mean",
    return_support: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Support]:
    """Cross-entropy of the softmax over the k largest logits of each row; its gradient has at most
    k + 1 non-zeros per row.

    ``loss = logsumexp(z_i for i in S) - z_target`` with S the k classes of the largest (logit, then
    smallest index); the target need not be in S. Source: Sun et al., Sparse-softmax, arXiv
    2112.12433, eq. 5. ``k >= V`` equals ``F.cross_entropy``; ``k = 1`` is the multiclass perceptron
    loss.

    Args:
        logits: (..., V) float32, bfloat16, float16 or float64, classes last, any strides. Never
            written to. Logits in the (N, C, d1, ...) layout of ``F.cross_entropy`` are an error,
            unless C equals the last dimension: pass ``logits.movedim(1, -1)``.
        target: (...) int64 or int32 class indices.
        k: how many classes to keep; None or ``k >= V``: all of them, the dense softmax.
        weight: (V,) weight of each class, as in ``F.cross_entropy``; "mean" divides by the weights
            of the targets.
        ignore_index: rows with this target have loss 0 and gradient 0, even where their logits are
            NaN.
        label_smoothing: share of the target's probability that is spread uniformly over S, in [0,
            1].
        normalizer: "topk", the softmax over S, or "full", the softmax over all classes: the loss is
            that of ``F.cross_entropy`` (label smoothing still goes to S), its gradient is kept at S
            and at the target. What is outside, the tail, pushes nothing then: a bias of its
            probability, ``Support.tail_mass()``. Without second derivatives.
        tail_samples: with "full", how many classes stand for the tail: drawn in proportion to their
            probability, by systematic sampling, where a gradient is recorded. It takes one number
            per row from torch's generator, where none is recorded too. The expectation of the
            gradient is that of the dense loss, exactly, with at most k + 1 + tail_samples non-zeros
            per row.
        link: a ``MonotonicPLIF`` f: the loss of f(logits), which are never stored. It keeps the
            order, so that S stays the same and k + 1 logits of a row go through it; the Support's
            probabilities and log-sum-exp are those of f(logits). Without second derivatives; lists
            k beyond 1024, as ``return_support`` does.
        reduction: "mean" over the rows that are not ignored (0 when all are), "sum" or "none".
        return_support: also return the ``Support``: kept classes, probabilities, log-sum-exp.
        backend: "auto", "triton", "cuda", "cpu" or "eager". A named backend runs or raises.

    Returns:
        The loss, a scalar or (...) for "none", float32 (float64 for float64 logits); with
        ``return_support`` the pair (loss, Support).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range.
        IndexError: on the CPU, a target outside [0, V). On a GPU and in a compiled graph the loss
            of that row is NaN and its gradient 0; ``SPARSE_CE_DEBUG=1`` looks and raises on a
            GPU too, outside of compiled graphs.
        RuntimeError: the named backend cannot run here; the message says why.
    """
    checks.logits(logits)
    checks.target(target, logits)
    checks.k(k)
    checks.weight(weight, logits)
    checks.ignore_index(ignore_index)
    checks.label_smoothing(label_smoothing)
    checks.normalizer(normalizer)
    checks.tail_samples(tail_samples, normalizer)
    if link is not None:
        checks.link(link, MonotonicPLIF, logits)
        checks.no_link(normalizer)
    checks.reduction(reduction)
    checks.return_support(return_support)
    checks.backend(backend)
    num_classes = logits.shape[-1]
    k = num_classes if k is None else min(k, num_classes)

    rows = as_rows(logits)
    row_target = as_row_target(target, rows)
    if weight is not None:
        weight = weight.to(schema.statistics_dtype(logits.dtype)).contiguous()
    fewer = is_fewer(k, num_classes)
    samples = samples_of(normalizer, tail_samples) if fewer else None
    large_k = is_large(k if samples is None else k + 1 + samples)
    listed = return_support or samples is not None or (fewer and (not large_k or link is not None))
    name = backends.resolve(backend, logits.device.type, logits.dtype, listed and large_k)
    op: Any = ops.threshold_ce_fwd
    more: tuple[Any, ...] = (k, 1.0)
    if listed:
        op, more = ops.topk_ce_fwd, (k,)
        if link is not None:
            op, more = topk_plif_ce_fwd, (link.w, link.bound, k)
        if samples is not None:
            uniform = uniform_of(rows, logits.dtype, samples, tail_samples)
            op, more = tail.tail_ce_fwd, (uniform, k, samples)
    elif link is not None:
        op, more = ops.plif_ce_fwd, (*link.tables(logits.dtype, name), link.bound)
    reduced: Tensor
    inputs = (rows, row_target, weight, *more, float(label_smoothing), name)
    reduced, _, *outputs = reduced_by(op, inputs, target, ignore_index, reduction)
    if not return_support:
        return reduced
    lse, indices, probs = outputs[:3]
    return reduced, support_of(target, indices, probs, lse, k, num_classes)


def reduced_by(
    op: ops.Operator, inputs: tuple[Any, ...], target: Tensor, ignore_index: int, reduction: str
) -> tuple[Any, ...]:
    """The losses of a call of `op`, reduced, and all that it returns; `target` is as the caller
    gave it.
    """
    logits, row_target, weight, *_, name = inputs
    if reduction != "none":
        found: tuple[Any, ...] = op.reduced(inputs, ignore_index, reduction == "mean")
        checks.target_range(target, logits.shape[-1], ignore_index, found[0])
        return found
    checks.target_range(target, logits.shape[-1], ignore_index)
    outputs = op(*inputs)
    shape = target.shape
    return reduce(outputs[0], row_target, weight, ignore_index, reduction, name, shape), *outputs


def reduce(
    loss: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    backend: str,
    shape: torch.Size,
    kept: Tensor | None = None,
) -> Tensor:
    """Of the losses of rows; with "none" in `shape`, of which they are those at `kept`, or all."""
    if reduction == "none":
        loss = loss.masked_fill(target == ignore_index, 0.0)
        if kept is not None:
            loss = loss.new_zeros(shape.numel()).index_copy(0, kept, loss)
        return loss.view(shape)
    reduced: Tensor = ops.reduce_fwd(
        loss, target, weight, ignore_index, reduction == "mean", backend
    )[0]
    return reduced


def sparse_softmax(
    logits: Tensor, k: int | None, dim: int = -1, *, backend: str = "auto"
) -> Tensor:
    """Softmax over the k largest entries along ``dim``, exact zeros elsewhere; differentiable.

    The k kept entries are those of the largest (value, then smallest index). Source: Sun et al.,
    Sparse-softmax, arXiv 2112.12433, eq. 4. It is computed as what it is, the gradient of the top-k
    log-sum-exp.

    Args:
        logits: float32, bfloat16, float16 or float64, any shape and strides.
        k: how many entries to keep; None or ``k >= logits.shape[dim]`` is ``torch.softmax``.
        dim: the dimension that sums to one.
        backend: "auto", "triton", "cuda", "cpu" or "eager".

    Returns:
        A tensor of the shape and dtype of ``logits``.
    """
    checks.numbers("logits", logits)
    checks.k(k)
    checks.dim(dim, logits)
    checks.backend(backend)
    moved = logits.movedim(dim, -1)
    num_classes = moved.shape[-1]
    k = num_classes if k is None else min(k, num_classes)
    listed = k < num_classes
    name = backends.resolve(backend, logits.device.type, logits.dtype, listed and is_large(k))
    if not listed:
        # by its dtype: autocast would choose another
        return torch.softmax(logits, dim, dtype=logits.dtype)
    rows = as_rows(moved)
    no_target = rows.new_full(rows.shape[:-1], -1, dtype=torch.int64)
    _, lse, indices, probs = ops.topk_ce_fwd(rows, no_target, None, k, 0.0, name)
    dense: Tensor = ops.topk_ce_bwd(
        None,
        torch.ones_like(lse),
        None,
        no_target,
        indices,
        probs,
        None,
        0.0,
        num_classes,
        logits.dtype,
        name,
    )
    return dense.view(moved.shape).movedim(-1, dim)
