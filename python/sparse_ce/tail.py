"""The dense loss with a sparse gradient: `normalizer="full"`.

The softmax is that of all classes. Of its gradient are kept the k largest and the target, in the
support Omega or beside it; the rest, the tail, has the probability T. With a = dloss, b = dlse,
q = dprobs, e = label smoothing, w the class weights, sums over Omega:

    A         = (1 - e) w_y + (e / k) sum w_i
    dlogits_i = p_i (a A + b - sum_j p_j q_j + [i in Omega] q_i) - [i in Omega] a (e / k) w_i
    dlogits_y -= a (1 - e) w_y

of Omega and y, and nothing of the tail: then it is short of what T has. `samples` classes drawn
from the tail in proportion to p stand for it, each with T / samples for p_i; the expectation is the
gradient of the dense loss, exactly. A list of k + 1 + samples classes says all that backward needs:
Omega, y (or the first of Omega once more, where y is there or is no hit) and the draws.
"""

from typing import Any

import torch
from torch import Tensor

from . import backends, ops, schema


def beside_target(logits: Tensor, classes: Tensor, target: Tensor) -> Tensor:
    """(N, m + 1) logits of these m classes, and of the target."""
    y = target.clamp(0, logits.shape[-1] - 1).unsqueeze(-1)
    return logits.gather(-1, torch.cat([classes.long(), y], -1))


def look(
    logits: Tensor,
    target: Tensor,
    uniform: Tensor | None,
    k: int,
    samples: int,
    backend: str,
) -> tuple[Tensor, ...]:
    """All that is taken from the logits: the support, row_max, log_sum, the tail's probability,
    draws, and the logits of support and target.
    """
    topk: Any = backends.implementation(backend, "topk_ce_fwd")
    tail: Any = backends.implementation(backend, "tail_fwd")
    indices = topk(logits, target, None, k, 0.0)[2]
    z = beside_target(logits, indices, target)
    return indices, *tail(logits, target, indices, uniform, samples), z


def list_of(
    indices: Tensor, target: Tensor, draws: Tensor, num_classes: int
) -> tuple[Tensor, Tensor]:
    """Whether the target is a class beside the k largest (N, 1), and the list: the k largest, the
    target or, where it is not beside them, the first once more, and the draws, in whose place the
    latter stands too where there are none.
    """
    y = target.unsqueeze(-1)
    beside = (y >= 0) & (y < num_classes) & ~(indices == y).any(-1, keepdim=True)
    own = torch.where(beside, y.int(), indices[..., :1])
    return beside, torch.cat([indices, own, torch.where(draws >= 0, draws, own)], -1)


def listed(
    looked: tuple[Tensor, ...],
    target: Tensor,
    weight: Tensor | None,
    samples: int,
    label_smoothing: float,
    num_classes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss, lse, and the list: classes and probabilities."""
    indices, row_max, log_sum, mass, draws, z = looked
    hit = (target >= 0) & (target < num_classes)
    y = target.clamp(0, num_classes - 1)
    # the maximum leaves both terms before they meet
    nll = log_sum.unsqueeze(-1) - (z.to(log_sum.dtype) - row_max.unsqueeze(-1))
    loss = nll[..., -1] if weight is None else nll[..., -1] * weight[y]
    if label_smoothing:
        spread = nll[..., :-1] if weight is None else nll[..., :-1] * weight[indices.long()]
        loss = (1 - label_smoothing) * loss + label_smoothing * spread.mean(-1)
    p = (-nll).exp()
    beside, classes = list_of(indices, target, draws, num_classes)
    share = torch.where(draws >= 0, (mass / max(samples, 1)).unsqueeze(-1), 0)
    return (
        loss.masked_fill(~hit, torch.nan),
        row_max + log_sum,
        classes,
        torch.cat([p[..., :-1], torch.where(beside, p[..., -1:], 0), share], -1),
    )


def _forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    uniform: Tensor | None,
    k: int,
    samples: int,
    label_smoothing: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    looked = look(logits, target, uniform, k, samples, backend)
    return listed(looked, target, weight, samples, label_smoothing, logits.shape[-1])


def joined(pairs: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs of ops.coefficients without the last, the target's, which joins those of its
    class.
    """
    g, at_target, y = pairs[..., :-1], pairs[..., -1:], classes[..., -1:]
    classes = classes[..., :-1].contiguous()
    return torch.where(classes == y, g + at_target, g), classes


def with_target(g: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs of a list of the k largest alone, as those of a list of this file without draws."""
    support, y = classes[..., :-1], classes[..., -1:]
    beside = ~(support == y).any(-1, keepdim=True)
    own = torch.where(beside, y, support[..., :1])
    nothing = torch.zeros_like(g[..., :1])
    return (
        torch.cat([g[..., :-1], nothing, g[..., -1:]], -1),
        torch.cat([support, own, y], -1),
    )


def placed(
    g: Tensor, classes: Tensor, k: int, num_classes: int, dtype: torch.dtype, backend: str
) -> Tensor:
    """(N, V), zero elsewhere, of a list: numbers and classes.

    What writes k numbers of a row writes these: a class that is listed twice has its sum in either
    place.
    """
    support, own, drawn = g[..., :k], g[..., k : k + 1], g[..., k + 1 :]
    own_class, draws = classes[..., k : k + 1], classes[..., k + 1 :].contiguous()
    own = torch.where(own_class == classes[..., :1], support[..., :1], own)
    times = torch.searchsorted(draws, draws, right=True) - torch.searchsorted(draws, draws)
    drawn = torch.where(draws == own_class, own, drawn * times)
    g = torch.cat([support, own, drawn], -1)
    nowhere = torch.full_like(classes[..., 0], -1, dtype=torch.int64)
    place: Any = backends.implementation(backend, "topk_ce_bwd")
    ones = torch.ones_like(g[..., 0])
    dlogits: Tensor = place(None, ones, None, nowhere, classes, g, None, 0.0, num_classes, dtype)
    return dlogits


def _backward(
    dloss: Tensor | None,
    dlse: Tensor | None,
    dprobs: Tensor | None,
    target: Tensor,
    classes: Tensor,
    probs: Tensor,
    weight: Tensor | None,
    k: int,
    label_smoothing: float,
    num_classes: int,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    pairs = ops.coefficients(
        dloss, dlse, dprobs, target, classes, probs, weight, label_smoothing, num_classes, k
    )
    return placed(*joined(*pairs), k, num_classes, dtype, backend)


tail_ce_fwd = ops.Operator("tail_ce_fwd", _forward)
tail_ce_bwd = ops.Operator("tail_ce_bwd", _backward)


@torch.library.register_fake("sparse_ce::tail_ce_fwd")
def _(logits, target, weight, uniform, k, samples, label_smoothing, backend):  # type: ignore[no-untyped-def]
    rows, dtype = logits.shape[:-1], schema.statistics_dtype(logits.dtype)
    loss, lse = (logits.new_empty(rows, dtype=dtype) for _ in range(2))
    listed = (*rows, k + 1 + samples)
    return loss, lse, logits.new_empty(listed, dtype=torch.int32), loss.new_empty(listed)


@torch.library.register_fake("sparse_ce::tail_ce_bwd")
def _(dloss, dlse, dprobs, target, classes, probs, weight, k, smoothing, num_classes, dtype, _):  # type: ignore[no-untyped-def]
    return probs.new_empty((*probs.shape[:-1], num_classes), dtype=dtype)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, weight, _, *ctx.options = inputs
    ctx.num_classes, ctx.dtype = logits.shape[-1], logits.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(target, *output[2:], weight)


def _autograd(
    ctx: Any, dloss: Tensor | None, dlse: Tensor | None, _: None, dprobs: Tensor | None
) -> tuple[Tensor | None, ...]:
    if dloss is None and dlse is None and dprobs is None:
        return (None,) * 8
    k, _, label_smoothing, backend = ctx.options
    dlogits = tail_ce_bwd(
        dloss, dlse, dprobs, *ctx.saved_tensors, k, label_smoothing, ctx.num_classes, ctx.dtype,
        backend,
    )  # fmt: skip
    return (dlogits, *(None,) * 7)


tail_ce_fwd.differentiable(_autograd, _context)
tail_ce_bwd.differentiable(
    ops.first_derivative_only(
        "fused_sparse_ce", " with normalizer='full' and k < V; k=None has second derivatives"
    ),
)
