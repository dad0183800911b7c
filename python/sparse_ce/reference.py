"""The oracle: float64, dense, written straight from the definition, gradient by autograd. For
tests; nothing shipped uses it.
"""

import torch
from torch import Tensor


def support_indices(logits: Tensor, k: int) -> Tensor:
    """(N, k) int64: classes by (value descending, index ascending). NaN is the largest value, -0
    equals +0.
    """
    rows = []
    for row in logits.detach().double().tolist():
        key = [(0, 0.0, i) if z != z else (1, -z, i) for i, z in enumerate(row)]
        rows.append([i for _, _, i in sorted(key)[:k]])
    return torch.tensor(rows, dtype=torch.int64, device=logits.device).reshape(len(rows), k)


def sparse_ce(
    logits: Tensor,
    target: Tensor,
    k: int | None = None,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    normalizer: str = "topk",
    reduction: str = "mean",
) -> Tensor:
    """Loss of (N, V) logits and (N,) targets in float64; differentiable. Source: Sun et al., arXiv
    2112.12433, eq. 5. With the normalizer "full" the gradient is the whole one of that loss.
    """
    z = logits.double()
    rows, num_classes = z.shape
    k = num_classes if k is None else min(k, num_classes)
    index = support_indices(logits, k)
    losses, weights = [], []
    for n in range(rows):
        y = int(target[n])
        if y == ignore_index:
            continue
        w = torch.ones(num_classes, dtype=torch.float64) if weight is None else weight.double()
        kept = z[n, index[n]]
        summed = kept if normalizer == "topk" else z[n]
        row_max = kept[0].detach()
        log_sum = (summed - row_max).exp().sum().log()
        nll = w[y] * (log_sum - (z[n, y] - row_max))
        if label_smoothing:
            spread = (w[index[n]] * (log_sum - (kept - row_max))).sum() / k
            nll = (1 - label_smoothing) * nll + label_smoothing * spread
        losses.append((n, nll))
        weights.append(w[y])
    none = torch.zeros(rows, dtype=torch.float64)
    if losses:
        place = torch.tensor([n for n, _ in losses])
        none = none.index_put((place,), torch.stack([loss for _, loss in losses]))
    else:
        none = none + 0.0 * z.detach().nan_to_num(0, 0, 0).sum()
    if reduction == "none":
        return none
    if reduction == "sum":
        return none.sum()
    return none.sum() / (torch.stack(weights).sum() if weights else 1.0)


def adaptive_kept(logits: Tensor, target: Tensor, delta: float) -> Tensor:
    """(N, V) bool: the target and every class with p_y - p_i <= delta. Source: Lv et al., arXiv
    2508.03175.
    """
    p = torch.softmax(logits.detach().double(), -1)
    kept = torch.zeros_like(p, dtype=torch.bool)
    for n, y in enumerate(target.tolist()):
        for i in range(p.shape[1]):
            kept[n, i] = i == y or not p[n, y] - p[n, i] > delta
    return kept


def adaptive_multilabel_kept(logits: Tensor, target: Tensor, delta: float) -> Tensor:
    """(N, V) bool: negatives with min_pos p - p_i <= delta and positives with p_i - max_neg p <=
    delta, all where the other side is empty. Source: Lv et al., arXiv 2508.03175.
    """
    p = torch.softmax(logits.detach().double(), -1).tolist()
    kept = torch.zeros(logits.shape, dtype=torch.bool)
    for n, row in enumerate(p):
        label = target[n].tolist()
        least = min((row[i] for i in range(len(row)) if label[i]), default=None)
        most = max((row[i] for i in range(len(row)) if not label[i]), default=None)
        for i in range(len(row)):
            if label[i]:
                kept[n, i] = most is None or not row[i] - most > delta
            else:
                kept[n, i] = least is None or not least - row[i] > delta
    return kept


def adaptive_multilabel(logits: Tensor, target: Tensor, delta: float) -> Tensor:
    """(N,) losses of (N, V) logits with several labels per row, in float64; differentiable."""
    z = logits.double()
    kept = adaptive_multilabel_kept(logits, target, delta)
    losses = []
    for n in range(z.shape[0]):
        over = z.new_ones(())
        under = z.new_ones(())
        for i in range(z.shape[1]):
            if kept[n, i] and target[n, i]:
                under = under + (-z[n, i]).exp()
            elif kept[n, i]:
                over = over + z[n, i].exp()
        losses.append(over.log() + under.log())
    return torch.stack(losses)


def plif(x: Tensor, w: Tensor, bound: float) -> Tensor:
    """The integral from 0 to x of the slopes softplus(w) of equal cells on [-bound, bound], the end
    ones without end; on a knot the derivative is that of the cell to its right. (n) and (K) ->
    (n) in float64; differentiable by both. Source: Ganea et al., arXiv 1902.08077.
    """
    x, slopes = x.double(), torch.nn.functional.softplus(w.double())
    cells = len(w)
    knots = [(2 * i - cells) * bound / cells for i in range(cells + 1)]
    left, right = (torch.tensor(t, dtype=torch.float64) for t in (knots[:-1], knots[1:]))
    zero = torch.zeros(1, dtype=torch.float64)
    # of the way from 0 to each left knot, how much lies in each cell
    way = left.unsqueeze(1).clamp(left, right) - zero.clamp(left, right)
    heights = way @ slopes
    cell = (x.detach().unsqueeze(-1) >= left[1:]).sum(-1)
    return heights[cell] + slopes[cell] * (x - left[cell])


def continuous_output(
    output: Tensor,
    target: Tensor,
    embedding: Tensor,
    distance: str = "cosine",
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Loss of (N, D) outputs, (N,) targets and a (V, D) table in float64; differentiable. Source:
    Li et al., arXiv 1902.11269.
    """
    losses = []
    for n in range(output.shape[0]):
        y = int(target[n])
        if y == ignore_index:
            losses.append(torch.zeros((), dtype=torch.float64))
            continue
        c, e = output[n].double(), embedding[y].double()
        if distance == "l2":
            losses.append(((c - e) ** 2).sum() / 2)
        elif not c.any() or not e.any():
            losses.append(1 + 0 * c.sum())
        else:
            losses.append(1 - (c * e).sum() / ((c * c).sum().sqrt() * (e * e).sum().sqrt()))
    loss = torch.stack(losses)
    if reduction == "none":
        return loss
    counted = sum(int(y) != ignore_index for y in target)
    return loss.sum() / (max(counted, 1) if reduction == "mean" else 1)
