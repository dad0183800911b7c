"""The contract of schema.py in tensor operations: any device, any dtype, any k. Right first; rows
in chunks to bound memory.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .schema import fixed_point, statistics_dtype

# Elements of the (rows, V) temporaries that exist at a time, eight bytes each: on a processor so
# many as its cache may hold, which takes a third of the time of large ones.
_CHUNK_ELEMENTS = 1 << 24
_CHUNK_ELEMENTS_OF_CPU = 1 << 20

# Classes that follow each other, of which topk looks at the largest first: the first that makes
# twice as many groups as it looks for.
_GROUPS = (32, 8)

# In units of which tail_fwd adds up probabilities: integers, exact in float64 too.
_TAIL_SCALE = 2.0**52


def _chunks(of: Tensor, num_classes: int) -> Iterator[slice]:
    """Of the rows of a tensor, each with temporaries of so many elements."""
    rows = of.shape[0]
    elements = _CHUNK_ELEMENTS_OF_CPU if of.device.type == "cpu" else _CHUNK_ELEMENTS
    step = max(1, elements // num_classes)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _ordered_keys(z: Tensor) -> Tensor:
    """(N, V) float of at most 32 bits -> distinct int64 whose descending order is (value desc,
    index asc).
    """
    bits = z.float().view(torch.int32).long()
    magnitude = (bits & 0x7FFFFFFF).clamp_(max=0x7F800001)  # every NaN is the one above +inf
    nan = magnitude == 0x7F800001
    value = torch.where((bits < 0) & ~nan, -magnitude, magnitude)  # -0 equals +0
    position = torch.arange(z.shape[-1] - 1, -1, -1, device=z.device)
    return (value << 32) + position


def _topk_indices(z: Tensor, k: int) -> Tensor:
    """(N, V) -> (N, k) int64: the k first classes in the order (value desc, index asc), NaN
    largest.

    They lie in the k first groups of classes that follow each other, in the order of their maxima:
    each of these has a class that precedes all of any other group.
    """
    rows, classes = z.shape
    size = next((size for size in _GROUPS if classes // size >= 2 * k), None)
    if size is None:
        return _first(z, k)
    grouped = classes // size * size
    maxima = z[:, :grouped].view(rows, classes // size, size).amax(-1)
    begins = _first(maxima, k).sort(-1).values * size  # in the order of the index
    index = (begins.unsqueeze(-1) + torch.arange(size, device=z.device)).flatten(-2)
    rest = torch.arange(grouped, classes, device=z.device).expand(rows, -1)
    index = torch.cat([index, rest], -1)
    return index.gather(-1, _first(z.gather(-1, index), k))


def _first(z: Tensor, k: int) -> Tensor:
    """The same of a look at all."""
    if z.dtype == torch.float64:
        # no room to pack an index beside 64 bits of value; adding 0 turns -0 into +0
        return torch.sort(z + 0.0, dim=-1, descending=True, stable=True).indices[..., :k]
    keys = torch.topk(_ordered_keys(z), k, dim=-1, sorted=True).values
    return z.shape[-1] - 1 - (keys & 0xFFFFFFFF)


def _target_terms(
    z: Tensor, target: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hit (N) bool, target clamped into range (N), its logit (N), its weight (N)."""
    num_classes = z.shape[-1]
    hit = (target >= 0) & (target < num_classes)
    y = target.clamp(0, num_classes - 1)
    z_y = z.gather(-1, y.unsqueeze(-1)).squeeze(-1).to(statistics_dtype(z.dtype))
    return hit, y, z_y, torch.ones_like(z_y) if weight is None else weight[y]


def _list_softmax(
    values: Tensor,
    value_y: Tensor,
    index: Tensor,
    y: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, lse (N) and probs (N, k) of sorted values (N, k) and the target's (N)."""
    row_max = values[:, 0]
    shifted = values - row_max.unsqueeze(-1)
    log_sum = shifted.exp().sum(-1).log()
    # the row maximum leaves both terms before they meet: m + log l - z_y would cancel at large
    # offsets
    loss = log_sum - (value_y - row_max)
    if weight is not None:
        loss = weight[y] * loss
    if label_smoothing:
        nll = log_sum.unsqueeze(-1) - shifted
        spread = (nll if weight is None else nll * weight[index]).sum(-1)
        loss = (1 - label_smoothing) * loss + label_smoothing / index.shape[-1] * spread
    return loss, row_max + log_sum, (shifted - log_sum.unsqueeze(-1)).exp()


def topk_ce_fwd(
    logits: Tensor, target: Tensor, weight: Tensor | None, k: int, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, num_classes = logits.shape[:-1], logits.shape[-1]
    dtype = statistics_dtype(logits.dtype)
    flat, flat_target = logits.flatten(0, -2), target.flatten()
    loss, lse = (logits.new_empty(flat.shape[0], dtype=dtype) for _ in range(2))
    indices = logits.new_empty((flat.shape[0], k), dtype=torch.int32)
    probs = logits.new_empty((flat.shape[0], k), dtype=dtype)
    for part in _chunks(flat, num_classes):
        z = flat[part]
        index = _topk_indices(z, k)
        values = z.gather(-1, index).to(dtype)
        hit, y, z_y, _ = _target_terms(z, flat_target[part], weight)
        row_loss, lse[part], probs[part] = _list_softmax(
            values, z_y, index, y, weight, label_smoothing
        )
        loss[part] = row_loss.masked_fill(~hit, torch.nan)
        indices[part] = index.int()
    return loss.view(rows), lse.view(rows), indices.view(*rows, k), probs.view(*rows, k)


def _list_gradient(
    dloss: Tensor | None,
    dlse: Tensor | None,
    dprobs: Tensor | None,
    target: Tensor,
    indices: Tensor,
    probs: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
    num_classes: int,
) -> tuple[Tensor, Tensor]:
    """On the support (N, k), and at the target (N): 0 where it is in the support, and joined."""
    index = indices.long()
    hit = (target >= 0) & (target < num_classes)
    y = target.clamp(0, num_classes - 1)
    share = probs.new_zeros(target.shape) if dlse is None else dlse
    at_target = torch.zeros_like(share)
    spread = None
    if dloss is not None:
        a = torch.where(hit, dloss, 0)
        at_target = a * (1 - label_smoothing) * (1 if weight is None else weight[y])
        share = share + at_target
        if label_smoothing:
            w = torch.ones_like(probs) if weight is None else weight[index]
            spread = (a * (label_smoothing / probs.shape[-1])).unsqueeze(-1) * w
            share = share + spread.sum(-1)
    factor = share.unsqueeze(-1)
    if dprobs is not None:
        factor = factor + dprobs - torch.where(dprobs == 0, 0, dprobs * probs).sum(-1, keepdim=True)
    # a row without upstream gradient stays 0 where p is NaN
    g = torch.where(factor == 0, 0, probs * factor)
    if spread is not None:
        g = g - spread
    is_target = (index == y.unsqueeze(-1)) & hit.unsqueeze(-1)
    g = torch.where(is_target, g - at_target.unsqueeze(-1), g)
    return g, torch.where(hit & ~is_target.any(-1), -at_target, 0)


def _placed(
    g: Tensor,
    at_target: Tensor,
    target: Tensor,
    indices: Tensor,
    num_classes: int,
    dtype: torch.dtype,
) -> Tensor:
    """(N, V), zero elsewhere."""
    index = indices.long()
    # where the target is outside the support its own place gets the value, elsewhere the first
    # place is written again
    inside = (index == target.unsqueeze(-1)).any(-1)
    outside = (target >= 0) & (target < num_classes) & ~inside
    place = torch.where(outside, target, index[..., 0])
    value = torch.where(outside, at_target, g[..., 0])
    dlogits = g.new_zeros((*target.shape, num_classes), dtype=dtype)
    flat, rows = dlogits.view(-1, num_classes), torch.arange(target.numel(), device=target.device)
    # not by scatter_: on the CPU it goes through all of a 16-bit tensor
    flat[rows.unsqueeze(-1), index.flatten(0, -2)] = g.flatten(0, -2).to(dtype)
    flat[rows, place.flatten()] = value.flatten().to(dtype)
    return dlogits


def topk_ce_bwd(
    dloss: Tensor | None,
    dlse: Tensor | None,
    dprobs: Tensor | None,
    target: Tensor,
    indices: Tensor,
    probs: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
    num_classes: int,
    dtype: torch.dtype,
) -> Tensor:
    g, at_target = _list_gradient(
        dloss, dlse, dprobs, target, indices, probs, weight, label_smoothing, num_classes
    )
    return _placed(g, at_target, target, indices, num_classes, dtype)


def _kept(z: Tensor, cut: Tensor, cut_index: Tensor) -> Tensor:
    """(N, V) bool: above the cut, or at it and not after its index. A NaN is neither below nor at a
    cut.
    """
    classes = torch.arange(z.shape[-1], device=z.device)
    below = (z < cut.unsqueeze(-1)) | (cut.isnan().unsqueeze(-1) & ~z.isnan())
    at_cut = (z == cut.unsqueeze(-1)) | (cut.isnan().unsqueeze(-1) & z.isnan())
    return ~below & ~(at_cut & (classes > cut_index.unsqueeze(-1)))


def _bound(log_sum: Tensor, hit: Tensor, y: Tensor, delta: float) -> Tensor:
    """(N): kept is what is not below it, of z - row_max: log(p_y - delta) on all classes, or -inf.
    y is z_y - row_max. Whatever the rounding the bound is not above the target: what equals it
    stays.

    Source: Lv et al., Adaptive Sparse Softmax, arXiv 2508.03175.
    """
    rest = (y - log_sum).exp() - delta
    return torch.where(hit & (rest > 0), torch.minimum(log_sum + rest.log(), y), -torch.inf)


def _upper_bound(log_sum: Tensor, hit: Tensor, y: Tensor, delta: float) -> Tensor:
    """The same from above: log(p_y + delta), or inf."""
    bound = torch.maximum(log_sum + ((y - log_sum).exp() + delta).log(), y)
    return torch.where(hit & log_sum.isfinite(), bound, torch.inf)


def threshold_ce_fwd(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    k: int,
    delta: float,
    label_smoothing: float,
) -> tuple[Tensor, ...]:
    rows, num_classes = logits.shape[:-1], logits.shape[-1]
    dtype = statistics_dtype(logits.dtype)
    flat, flat_target = logits.flatten(0, -2), target.flatten()
    loss, lse, row_max, log_sum = (logits.new_empty(flat.shape[0], dtype=dtype) for _ in range(4))
    cut = logits.new_full((flat.shape[0],), -torch.inf, dtype=dtype)
    cut_index = logits.new_full((flat.shape[0],), num_classes - 1, dtype=torch.int32)
    kept = logits.new_full((flat.shape[0],), k, dtype=torch.int32)
    for part in _chunks(flat, num_classes):
        z = flat[part]
        if k < num_classes:
            last = _topk_indices(z, k)[:, -1]
            cut_index[part] = last.int()
            cut[part] = z.gather(-1, last.unsqueeze(-1)).squeeze(-1).to(dtype)
        hit, y, z_y, w_y = _target_terms(z, flat_target[part], weight)
        z = z.to(dtype)
        row_max[part] = z.amax(-1)
        shifted = z - row_max[part].unsqueeze(-1)
        keep = None
        if k < num_classes:
            keep = _kept(z, cut[part], cut_index[part])
        if delta < 1:
            log_all = shifted.exp().sum(-1).log()
            bound = _bound(log_all, hit, z_y - row_max[part], delta).unsqueeze(-1)
            classes = torch.arange(num_classes, device=z.device)
            keep = ~(shifted < bound) | (hit.unsqueeze(-1) & (classes == y.unsqueeze(-1)))
            # the least of those that are kept describes them: equal logits are kept together
            cut[part] = z.masked_fill(~keep | (bound == -torch.inf), torch.inf).amin(-1)
            cut[part] = torch.where(bound.squeeze(-1) == -torch.inf, -torch.inf, cut[part])
            kept[part] = keep.sum(-1, dtype=torch.int32)
        if keep is not None:
            shifted = shifted.masked_fill_(~keep, -torch.inf)
        log_sum[part] = shifted.exp().sum(-1).log()
        row_loss = w_y * (log_sum[part] - (z_y - row_max[part]))
        if label_smoothing:
            nll = log_sum[part].unsqueeze(-1) - shifted
            if keep is not None:
                nll = nll.masked_fill_(~keep, 0)
            spread = (nll if weight is None else nll * weight).sum(-1)
            spread = spread / kept[part]
            row_loss = (1 - label_smoothing) * row_loss + label_smoothing * spread
        loss[part] = row_loss.masked_fill(~hit, torch.nan)
        lse[part] = row_max[part] + log_sum[part]
    outputs = (loss, lse, row_max, log_sum, cut, cut_index, kept)
    return tuple(output.view(rows) for output in outputs)


def threshold_ce_bwd(
    dloss: Tensor | None,
    dlse: Tensor | None,
    logits: Tensor,
    target: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    cut: Tensor,
    cut_index: Tensor,
    kept: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
) -> Tensor:
    num_classes = logits.shape[-1]
    flat, flat_target = logits.flatten(0, -2), target.flatten()
    a = torch.zeros_like(row_max).flatten() if dloss is None else dloss.flatten()
    b = torch.zeros_like(row_max).flatten() if dlse is None else dlse.flatten()
    row_max, log_sum, cut = (t.flatten() for t in (row_max, log_sum, cut))
    cut_index, kept = cut_index.flatten(), kept.flatten()
    dlogits = logits.new_empty(flat.shape)
    # where to ask costs no wait
    all_kept = flat.device.type == "cpu" and bool((kept == num_classes).all())
    plain = all_kept and not label_smoothing
    for part in _chunks(flat, num_classes):
        z = flat[part].to(row_max.dtype)
        keep = None if plain else _kept(z, cut[part], cut_index[part])
        hit, y, z_y, w_y = _target_terms(z, flat_target[part], weight)
        # the loss of a row that keeps nothing but its target is 0
        alone = (kept[part] == 1) & (log_sum[part] == 0)  # or NaN, at +inf
        alone &= (z_y == row_max[part]) & (y <= cut_index[part])
        row_a = torch.where(hit & ~alone, a[part], 0)
        at_target = row_a * (1 - label_smoothing) * w_y
        share = b[part] + at_target
        spread = None
        if keep is not None and label_smoothing:
            w = keep.to(z.dtype) if weight is None else keep * weight
            spread = (row_a * label_smoothing / kept[part]).unsqueeze(-1) * w
            share = share + spread.sum(-1)
        p = ((z - row_max[part].unsqueeze(-1)) - log_sum[part].unsqueeze(-1)).exp_()
        g = (p * share.unsqueeze(-1)).masked_fill_((share == 0).unsqueeze(-1), 0)
        if keep is not None:
            g.masked_fill_(~keep, 0)
            if spread is not None:
                g -= spread.masked_fill_(~keep, 0)
        g.scatter_add_(-1, y.unsqueeze(-1), -at_target.unsqueeze(-1))
        dlogits[part] = g.to(dlogits.dtype)
    return dlogits.view(logits.shape)


def tail_fwd(
    logits: Tensor, target: Tensor, indices: Tensor, uniform: Tensor | None, samples: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, num_classes = logits.shape[:-1], logits.shape[-1]
    dtype = statistics_dtype(logits.dtype)
    flat, y = logits.flatten(0, -2), target.flatten()
    last = indices[..., -1].flatten().long()
    row_max, log_sum = (logits.new_empty(flat.shape[0], dtype=dtype) for _ in range(2))
    mass = logits.new_zeros(flat.shape[0], dtype=dtype)
    draws = logits.new_full((flat.shape[0], samples), -1, dtype=torch.int32)
    classes, ranks = (torch.arange(n, device=logits.device) for n in (num_classes, samples))
    for part in _chunks(flat, num_classes):
        z = flat[part].to(dtype)
        row_max[part] = z.amax(-1)
        shifted = z - row_max[part].unsqueeze(-1)
        log_sum[part] = shifted.exp().sum(-1).log()
        if uniform is None:
            continue
        p = (shifted - log_sum[part].unsqueeze(-1)).exp_().clamp_(max=1).nan_to_num(0)
        cut = z.gather(-1, last[part].unsqueeze(-1)).squeeze(-1)
        out = _kept(z, cut, last[part]) | (classes == y[part].unsqueeze(-1))
        sums = (p.double() * _TAIL_SCALE).long().masked_fill_(out, 0).cumsum(-1)
        stride = sums[:, -1] // samples
        first = (uniform.flatten()[part].double() * stride).long()
        places = first.unsqueeze(-1) + stride.unsqueeze(-1) * ranks
        found = torch.searchsorted(sums, places, right=True)
        drawn = (stride > 0) & log_sum[part].isfinite()
        draws[part] = found.masked_fill(~drawn.unsqueeze(-1), -1).int()
        share = torch.where(drawn, sums[:, -1].double() / _TAIL_SCALE, 0).to(dtype)
        mass[part] = share.masked_fill(~log_sum[part].isfinite(), torch.nan)
    shaped = (t.view(rows) for t in (row_max, log_sum, mass))
    return *shaped, draws.view(*rows, samples)  # type: ignore[return-value]


def _log_one_plus(x: Tensor, kept: Tensor) -> Tensor:
    """(N): log(1 + sum of exp(x) over those that are kept)."""
    one = x.new_zeros((x.shape[0], 1))
    return torch.cat([one, x.masked_fill(~kept, -torch.inf)], -1).logsumexp(-1)


def labels_ce_fwd(logits: Tensor, labels: Tensor, delta: float) -> tuple[Tensor, ...]:
    rows, num_classes = logits.shape[:-1], logits.shape[-1]
    flat, flat_labels = logits.flatten(0, -2), labels.flatten(0, -2)
    dtype = statistics_dtype(logits.dtype)
    outputs = tuple(logits.new_empty(flat.shape[0], dtype=dtype) for _ in range(5))
    for part in _chunks(flat, num_classes):
        z, is_positive = flat[part].to(dtype), flat_labels[part]
        row_max = z.amax(-1)
        shifted = z - row_max.unsqueeze(-1)
        log_all = shifted.exp().sum(-1).log()
        low = shifted.masked_fill(~is_positive, torch.inf).amin(-1)
        high = shifted.masked_fill(is_positive, -torch.inf).amax(-1)
        from_below = _bound(log_all, is_positive.any(-1), low, delta)
        from_above = _upper_bound(log_all, ~is_positive.all(-1), high, delta)
        negatives = ~is_positive & ~(shifted < from_below.unsqueeze(-1))
        positives = is_positive & ~(shifted > from_above.unsqueeze(-1))
        negative, positive = _log_one_plus(z, negatives), _log_one_plus(-z, positives)
        # the extremes of those that are kept describe them: equal logits are kept together
        least = z.masked_fill(~negatives, torch.inf).amin(-1)
        most = z.masked_fill(~positives, -torch.inf).amax(-1)
        cut_negative = torch.where(from_below == -torch.inf, -torch.inf, least)
        cut_positive = torch.where(from_above == torch.inf, torch.inf, most)
        found = (negative + positive, negative, positive, cut_negative, cut_positive)
        for output, values in zip(outputs, found, strict=True):
            output[part] = values
    return tuple(output.view(rows) for output in outputs)


def labels_ce_bwd(
    dloss: Tensor,
    logits: Tensor,
    labels: Tensor,
    negative: Tensor,
    positive: Tensor,
    cut_negative: Tensor,
    cut_positive: Tensor,
) -> Tensor:
    flat, flat_labels = logits.flatten(0, -2), labels.flatten(0, -2)
    per_row = (dloss, negative, positive, cut_negative, cut_positive)
    dlogits = logits.new_empty(flat.shape)
    for part in _chunks(flat, logits.shape[-1]):
        z, is_positive = flat[part].to(negative.dtype), flat_labels[part]
        a, log_n, log_p, low, high = (t.flatten()[part].unsqueeze(-1) for t in per_row)
        g = torch.where(is_positive, -a * (-z - log_p).exp(), a * (z - log_n).exp())
        dropped = torch.where(is_positive, z > high, z < low)
        dlogits[part] = g.masked_fill_(dropped | (a == 0), 0).to(dlogits.dtype)
    return dlogits.view(logits.shape)


def _cells(x: Tensor, num_cells: int, bound: float) -> Tensor:
    place = (x + bound) * (num_cells / (2 * bound))
    return torch.where(place > 0, place, 0).clamp_(max=num_cells - 1).long()


def plif_tables(w: Tensor, bound: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The softplus in float64, rounded to the dtype of w: that of the start, which is rounded too,
    is then 1 and not next to it.

    At the knot between two cells the lines meet: offset_i - offset_{i-1} is (slope_{i-1} - slope_i)
    times the knot. Summed in fixed point: on a GPU a sum of floats has no order to rely on.
    """
    slopes = torch.nn.functional.softplus(w.double()).to(w.dtype).to(dtype)
    # a slope is never 0: f would not increase, and not know what becomes of an infinity
    slopes += torch.finfo(dtype).tiny
    num_cells, wide = w.shape[0], slopes.double()
    knots = torch.arange(2 - num_cells, num_cells, 2, device=w.device, dtype=torch.float64)
    steps = (wide[:-1] - wide[1:]) * knots.mul_(bound / num_cells)
    largest = steps.abs().amax() if num_cells > 1 else wide.new_zeros(())
    scale = fixed_point(largest * num_cells)
    sums = torch.nn.functional.pad((steps * scale).long().cumsum(0), (1, 0))
    # the cell right of 0, or around it
    return slopes, ((sums - sums[num_cells // 2]).double() / scale).to(dtype)


def plif_scale(
    dloss: Tensor | None,
    dlse: Tensor | None,
    dprobs: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    num_classes: int,
) -> Tensor:
    # in float64, where products of float32 are not rounded
    above = torch.zeros_like(lse, dtype=torch.float64) if dlse is None else dlse.double().abs()
    if dprobs is not None:
        above = above + 2 * dprobs.abs().amax(-1).double()
    if dloss is not None:
        hit = (target >= 0) & (target < num_classes)
        # a loss moves its weights to the target, or away from it: twice their sum
        at_most = 1.0 if weight is None else weight.abs().amax().double()
        above = above + torch.where(hit, 2 * at_most * dloss.abs().double(), 0)
    # the gradient of a row whose log-sum-exp is not finite is NaN
    finite = torch.where(lse.isfinite() | (above == 0), above, torch.nan)
    # a maximum has no order of additions
    largest = finite.amax() if finite.numel() else finite.sum()
    return fixed_point(largest * finite.numel())


def plif_dslopes(
    cells: Tensor, outside: Tensor, scale: Tensor, bound: float, dtype: torch.dtype
) -> Tensor:
    before = cells[:, 0].cumsum(0)
    total, middle = before[-1], cells.shape[0] // 2
    sums = cells[:, 1] - before
    sums[middle:] += total
    gradient = sums.double()
    if cells.shape[0] % 2:
        gradient[middle] -= total.double() / 2  # the cell around 0
    gradient *= (2 * bound / cells.shape[0]) / scale
    gradient[0] += outside[0]
    gradient[-1] += outside[1]
    return gradient.to(dtype)


def plif_fwd(x: Tensor, slopes: Tensor, offsets: Tensor, bound: float) -> Tensor:
    z = x.to(slopes.dtype)
    cell = _cells(z, slopes.shape[0], bound)
    return (slopes[cell] * z + offsets[cell]).to(x.dtype)


def plif_bwd(
    dy: Tensor, x: Tensor, slopes: Tensor, bound: float, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    num_cells = slopes.shape[0]
    cell = _cells(x.to(slopes.dtype), num_cells, bound)
    dx = (dy.to(slopes.dtype) * slopes[cell]).to(x.dtype)
    sums = x.new_zeros((num_cells if scale is not None else 0, 2), dtype=torch.int64)
    outside = x.new_zeros(2, dtype=torch.float64)
    if scale is not None:
        g, z = dy.double().flatten(), x.double().flatten()
        cell = cell.flatten()
        share = ((z + bound) * (num_cells / (2 * bound)) - cell).clamp(0, 1).nan_to_num(0)
        mass = g * scale
        sums.index_add_(0, cell, torch.stack([mass, mass * share], -1).long())
        beyond = torch.where(g == 0, 0, g * (z - z.clamp(-bound, bound)))
        outside[0] = torch.where(z > 0, 0, beyond).sum()
        outside[1] = torch.where(z > 0, beyond, 0).sum()
    return dx, sums, outside


def plif_ce_fwd(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    slopes: Tensor,
    offsets: Tensor,
    bound: float,
    label_smoothing: float,
) -> tuple[Tensor, ...]:
    rows, num_classes = logits.shape[:-1], logits.shape[-1]
    flat, flat_target = logits.flatten(0, -2), target.flatten()
    outputs = tuple(slopes.new_empty(flat.shape[0]) for _ in range(4))
    for part in _chunks(flat, num_classes):
        f = plif_fwd(flat[part].to(slopes.dtype), slopes, offsets, bound)
        found = threshold_ce_fwd(f, flat_target[part], weight, num_classes, 1.0, label_smoothing)
        for output, values in zip(outputs, found, strict=False):
            output[part] = values
    return tuple(output.view(rows) for output in outputs)


def plif_ce_bwd(
    dloss: Tensor | None,
    dlse: Tensor | None,
    logits: Tensor,
    target: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    weight: Tensor | None,
    slopes: Tensor,
    offsets: Tensor,
    bound: float,
    label_smoothing: float,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    num_classes = logits.shape[-1]
    flat, flat_target = logits.flatten(0, -2), target.flatten()
    a, b = (None if d is None else d.flatten() for d in (dloss, dlse))
    row_max, log_sum = row_max.flatten(), log_sum.flatten()
    cut = torch.full_like(row_max, -torch.inf)
    cut_index = torch.full_like(flat_target, num_classes - 1, dtype=torch.int32)
    dlogits = logits.new_empty(flat.shape)
    sums = logits.new_zeros((slopes.shape[0] if scale is not None else 0, 2), dtype=torch.int64)
    outside = logits.new_zeros(2, dtype=torch.float64)
    for part in _chunks(flat, num_classes):
        z = flat[part].to(slopes.dtype)
        df = threshold_ce_bwd(
            None if a is None else a[part],
            None if b is None else b[part],
            plif_fwd(z, slopes, offsets, bound),
            flat_target[part],
            row_max[part],
            log_sum[part],
            cut[part],
            cut_index[part],
            cut_index[part] + 1,
            weight,
            label_smoothing,
        )
        dz, more, beyond = plif_bwd(df, z, slopes, bound, scale)
        dlogits[part] = dz.to(dlogits.dtype)
        sums += more
        outside += beyond
    return dlogits.view(logits.shape), sums, outside


def plif_topk_ce_fwd(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    slopes: Tensor,
    offsets: Tensor,
    bound: float,
    k: int,
    label_smoothing: float,
) -> tuple[Tensor, ...]:
    rows, num_classes = logits.shape[:-1], logits.shape[-1]
    y = target.clamp(0, num_classes - 1).flatten()
    outputs = (
        *(slopes.new_empty(y.numel()) for _ in range(2)),
        logits.new_empty((y.numel(), k), dtype=torch.int32),
        *(slopes.new_empty((y.numel(), m)) for m in (k, k + 1)),
    )
    # f(z) of the support is sorted as z is: it lists itself, and what follows it is the target's
    for part in _chunks(y.flatten(), num_classes):
        z = logits.flatten(0, -2)[part]
        index = _topk_indices(z, k)
        values = z.gather(-1, torch.cat([index, y[part].unsqueeze(-1)], -1)).to(slopes.dtype)
        f = plif_fwd(values, slopes, offsets, bound)
        found = _list_softmax(f[:, :-1], f[:, -1], index, y[part], weight, label_smoothing)
        for output, tensor in zip(outputs, (*found[:2], index, found[2], values), strict=True):
            output[part] = tensor
    loss, lse, *lists = outputs
    hit = (target >= 0) & (target < num_classes)
    loss = loss.view(rows).masked_fill(~hit, torch.nan)
    return loss, lse.view(rows), *(t.view(*rows, t.shape[-1]) for t in lists)


def plif_topk_ce_bwd(
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
    scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    df, at_target = _list_gradient(
        dloss, dlse, dprobs, target, indices, probs, weight, label_smoothing, num_classes
    )
    dz, cells, outside = plif_bwd(
        torch.cat([df, at_target.unsqueeze(-1)], -1), values, slopes, bound, scale
    )
    return _placed(dz[..., :-1], dz[..., -1], target, indices, num_classes, dtype), cells, outside


def sparse_linear_buffer(like: Tensor, rows: int, num_classes: int) -> Tensor:
    return like.new_empty((rows, num_classes))


def sparse_linear_dhidden(
    coefficients: Tensor, classes: Tensor, weight: Tensor, dtype: torch.dtype
) -> Tensor:
    rows, m = coefficients.shape
    dhidden = weight.new_empty((rows, weight.shape[1]), dtype=dtype)
    for part in _chunks(classes, m * weight.shape[1]):
        g = coefficients[part].unsqueeze(-1)
        terms = weight[classes[part].long()].to(g.dtype) * g
        dhidden[part] = terms.masked_fill_(g == 0, 0).sum(1).to(dtype)
    return dhidden


def sparse_linear_dweight(
    coefficients: Tensor, classes: Tensor, hidden: Tensor, num_classes: int, dtype: torch.dtype
) -> Tensor:
    sums = hidden.new_zeros((num_classes, hidden.shape[1]), dtype=coefficients.dtype)
    m = coefficients.shape[-1]
    for part in _chunks(coefficients, m * hidden.shape[1]):
        g, index = coefficients[part].unsqueeze(-1), classes[part].flatten().long()
        terms = (g * hidden[part].to(g.dtype).unsqueeze(1)).masked_fill_(g == 0, 0).flatten(0, 1)
        # two ways to add up what is deterministic, each on one kind of device
        if sums.device.type == "cpu":
            sums.index_add_(0, index, terms)
        else:
            sums.index_put_((index,), terms, accumulate=True)
    return sums.to(dtype)


def reduce_fwd(
    loss: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, mean: bool
) -> tuple[Tensor, Tensor]:
    counted = target != ignore_index
    total = torch.where(counted, loss, 0).sum()
    if not mean:
        return total, torch.ones_like(total)
    count = counted.sum(dtype=loss.dtype)
    if weight is None:
        divisor = count.clamp(min=1)
    else:
        y = target.clamp(0, weight.shape[0] - 1)
        divisor = torch.where(count > 0, torch.where(counted, weight[y], 0).sum(), 1)
    return total / divisor, divisor


def reduce_bwd(dreduced: Tensor, target: Tensor, divisor: Tensor, ignore_index: int) -> Tensor:
    return torch.where(target != ignore_index, dreduced / divisor, 0)


def _vectors(target: Tensor, embedding: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """hit (N) bool, the vectors of the targets (N, D)."""
    vectors = embedding.shape[0]
    hit = (target >= 0) & (target < vectors)
    return hit, embedding[target.clamp(0, vectors - 1)].to(dtype)


def cosine_fwd(
    output: Tensor, target: Tensor, embedding: Tensor, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = statistics_dtype(output.dtype)
    c = output.to(dtype)
    hit, e = _vectors(target, embedding, dtype)
    if normalize:
        cc, ee, ce = (c * c).sum(-1), (e * e).sum(-1), (c * e).sum(-1)
        smallest = torch.finfo(dtype).tiny
        directed = ~((cc < smallest) | (ee < smallest))
        # |c| / |c|^2 and not 1 / |c|: a sum of squares that overflows gives NaN, not 0
        by_target = -(cc.sqrt() / cc) * (ee.sqrt() / ee)
        similarity = -ce * by_target
        by_output = similarity / cc
        by_output, by_target, similarity = (
            torch.where(directed, t, 0) for t in (by_output, by_target, similarity)
        )
        loss = 1 - similarity
    else:
        loss = (c - e).square().sum(-1) / 2
        by_output, by_target = torch.ones_like(loss), -torch.ones_like(loss)
    return (
        loss.masked_fill_(~hit, torch.nan),
        by_output.masked_fill_(~hit, 0),
        by_target.masked_fill_(~hit, 0),
    )


def cosine_bwd(
    dloss: Tensor,
    output: Tensor,
    target: Tensor,
    embedding: Tensor,
    by_output: Tensor,
    by_target: Tensor,
) -> Tensor:
    hit, e = _vectors(target, embedding, dloss.dtype)
    gradient = by_output.unsqueeze(-1) * output.to(dloss.dtype) + by_target.unsqueeze(-1) * e
    # what is not counted stays 0 where the output is NaN
    counted = hit & (dloss != 0) & (by_target != 0)
    doutput = torch.where(counted.unsqueeze(-1), dloss.unsqueeze(-1) * gradient, 0)
    return doutput.to(output.dtype).contiguous()
