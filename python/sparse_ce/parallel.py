"""Classes sharded over the ranks of a process group: vocabulary-parallel.

Every rank holds the logits of some of the classes, of all rows. It lists its own k largest, and the
ranks exchange the lists, k + 1 logits and k classes a row: the k largest of all classes are among
them, and so is all that the loss needs. What is then a small problem, a row of as many logits as
were listed, goes through the loss of ``fused_sparse_ce`` on every rank alike; of its gradient each
rank keeps that of its own list, and places it. Backward exchanges nothing.

    forward   list k of V / R classes  ->  gather (N, 2k + 1) of R ranks  ->  topk_ce of R k + 1
    backward  topk_ce of R k + 1  ->  the rank's own k + 1  ->  (N, V / R), or sums of rows

In the merged row the shards stand in the order of their classes, each sorted by (value desc, index
asc): of equal logits the lowest class comes first, as in a row that nobody has cut, and the listed
classes are the same, bit for bit. Where no shard lists the target, its logit has the last place of
the merged row, where it is never among the k largest: k of its own shard come before it.

The softmax of all classes needs no lists: the ranks exchange the maximum and the log-sum of each
shard, and the loss of the target in its own. With those of all classes threshold_ce makes the
gradient of a shard of the dense softmax. With normalizer="full" (tail.py) it is that of the list of
the shard, and of draws from what is not listed there; so each keeps k classes of its own.

A cap of the logits (linear.py) is monotone: lists are exchanged and merged as they are, and what is
kept of the merged row is capped. The softmax of all classes is that of capped logits.
"""

import pickle
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch import distributed as dist

from . import backends, checks, functional, linear, ops, schema, tail
from .support import Support


def _wait(tensor: Tensor) -> Tensor:
    waited: Tensor = torch.ops._c10d_functional.wait_tensor(tensor)
    return waited


class _Shards(NamedTuple):
    """Who holds which classes."""

    sizes: tuple[int, ...]  # classes of each rank
    rank: int
    group: str  # the name by which the operators of torch know the group

    @property
    def size(self) -> int:
        return self.sizes[self.rank]

    @property
    def start(self) -> int:
        return sum(self.sizes[: self.rank])

    @property
    def num_classes(self) -> int:
        return sum(self.sizes)

    def has(self, target: Tensor) -> Tensor:
        """bool: it is a class."""
        return (target >= 0) & (target < self.num_classes)

    def here(self, target: Tensor) -> Tensor:
        """bool: it is a class of this rank."""
        return (target >= self.start) & (target < self.start + self.size)

    def gathered(self, mine: Tensor) -> Tensor:
        """(R, ...): what every rank has."""
        gather: Any = torch.ops._c10d_functional.all_gather_into_tensor
        ranks = len(self.sizes)
        found: Tensor = _wait(gather(mine.contiguous(), ranks, self.group))
        return found.view(ranks, *mine.shape)

    def gathered_objects(self, mine: Any, device: torch.device) -> list[Any]:
        """all_gather_object of torch.distributed, which needs numpy."""
        data = torch.frombuffer(bytearray(pickle.dumps(mine)), dtype=torch.uint8).to(device)
        lengths = self.gathered(torch.tensor([len(data)], device=device)).flatten().tolist()
        padded = torch.nn.functional.pad(data, (0, max(lengths) - len(data)))
        of_ranks = zip(self.gathered(padded).tolist(), lengths, strict=True)
        return [pickle.loads(bytes(numbers[:length])) for numbers, length in of_ranks]


class _Plan(NamedTuple):
    """What is to be done, found out once. Where the classes lie in several places a list alone
    finds the k largest, whatever k.
    """

    shards: _Shards
    k: int
    samples: int | None  # draws of a shard, where the softmax is that of all classes
    listed: bool  # otherwise the dense softmax
    softcap: float | None
    return_support: bool
    backend: str

    @property
    def own_k(self) -> int:
        return min(self.k, self.shards.size)

    @property
    def softcap_of_all(self) -> float | None:
        """What caps all logits of the shard: a list alone is capped when it is merged."""
        return None if self.listed and self.samples is None else self.softcap


def _shards(
    group: dist.ProcessGroup | None, shard_sizes: Sequence[int] | None, classes: int
) -> _Shards:
    checks.process_group(group)
    group = dist.group.WORLD if group is None else group
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    sizes = (classes,) * ranks if shard_sizes is None else shard_sizes
    checks.shard_sizes(sizes, rank, ranks, classes)
    return _Shards(tuple(sizes), rank, group.group_name)  # type: ignore[union-attr]


def _plan(
    of: Tensor,  # logits, or hidden
    is_hidden: bool,
    dtype: torch.dtype,  # of the logits
    classes: int,
    target: Tensor,
    k: int | None,
    group: dist.ProcessGroup | None,
    shard_sizes: Sequence[int] | None,
    ignore_index: int,
    normalizer: str,
    tail_samples: int,
    softcap: float | None,
    reduction: str,
    return_support: bool,
    backend: str,
) -> _Plan:
    checks.no_transform()
    checks.k(k)
    checks.ignore_index(ignore_index)
    checks.normalizer(normalizer)
    checks.tail_samples(tail_samples, normalizer)
    checks.softcap(softcap)
    checks.reduction(reduction)
    checks.return_support(return_support)
    checks.backend(backend)
    shards = _shards(group, shard_sizes, classes)
    if checks.may_wait(target):
        # before what one rank may find wrong alone: the others would wait for it
        flat = target.reshape(-1).long()
        given = {
            "target.shape": tuple(target.shape),
            "target": int((flat * torch.arange(1, len(flat) + 1, device=flat.device)).sum()),
            "k": k,
            "ignore_index": ignore_index,
            "normalizer": normalizer,
            "tail_samples": tail_samples,
            "softcap": softcap,
            "reduction": reduction,
            "return_support": return_support,
            "dtype": dtype,
            "hidden.requires_grad": is_hidden and of.requires_grad,
        }
        checks.ranks(shards.gathered_objects((classes, given), flat.device), shards.sizes)
    k = shards.num_classes if k is None else min(k, shards.num_classes)
    fewer = functional.is_fewer(k, shards.num_classes)
    samples = functional.samples_of(normalizer, tail_samples) if fewer else None
    if samples is not None:
        checks.k_of_shards(k, shards.sizes)
    checks.target_range(target, shards.num_classes, ignore_index)
    listed = fewer or return_support
    large = listed and functional.is_large(k + 1 + (samples or 0))
    name = backends.resolve(backend, of.device.type, dtype, large)
    cap = None if softcap is None else float(softcap)
    return _Plan(shards, k, samples, listed, cap, return_support, name)


# The list of a shard. `classes` (N, k + 1 + samples) int32 are its k largest; the target where the
# shard has it outside of them, otherwise the first once more; and the draws. `values` are their
# logits, capped where a cap is given. Where `samples` is given, row_max, log_sum (N) are of all
# classes of the shard, and `share` (N) is what each draw stands for, of the shard's softmax;
# otherwise they are empty.


def _listed(
    logits: Tensor,
    target: Tensor,
    uniform: Tensor | None,
    k: int,
    samples: int | None,
    backend: str,
) -> tuple[Tensor, ...]:
    topk: Any = backends.implementation(backend, "topk_ce_fwd")
    indices = topk(logits, target, None, k, 0.0)[2]
    draws, of_all = indices[..., :0], None
    if samples is not None:
        draw: Any = backends.implementation(backend, "tail_fwd")
        row_max, log_sum, mass, draws = draw(logits, target, indices, uniform, samples)
        of_all = row_max, log_sum, torch.where((draws >= 0).any(-1), mass / max(samples, 1), 0)
    _, classes = tail.list_of(indices, target, draws, logits.shape[-1])
    values = logits.gather(-1, classes.long()).to(schema.statistics_dtype(logits.dtype))
    return values, classes, *(of_all or (values.new_empty(0) for _ in range(3)))


def _linear_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    uniform: Tensor | None,
    k: int,
    samples: int | None,
    dtype: torch.dtype,
    chunk_rows: int,
    softcap: float | None,
    sparse: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    def of_chunk(logits: Tensor, part: slice) -> tuple[Tensor, ...]:
        drawn = None if uniform is None else uniform[part]
        return _listed(logits, target[part], drawn, k, samples, backend)

    return linear.of_chunks(hidden, weight, bias, dtype, chunk_rows, backend, of_chunk, softcap)


def _linear_backward(
    dvalues: Tensor,
    classes: Tensor,
    hidden: Tensor,
    weight: Tensor,
    k: int,
    dtype: torch.dtype,
    chunk_rows: int,
    sparse: bool,
    needed: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if sparse:
        return linear.by_rows(dvalues.contiguous(), classes, hidden, weight, needed, backend)

    def chunks(hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
        for part in linear.parts(hidden.shape[0], chunk_rows):
            listed = dvalues[part], classes[part]
            yield part, tail.placed(*listed, k, weight.shape[0], dtype, backend)

    return linear.by_products(hidden, weight, linear.idle_rows(dvalues), dtype, needed, chunks)


listed_fwd = ops.Operator("listed_fwd", _listed)
listed_bwd = ops.Operator("listed_bwd", tail.placed)
listed_linear_fwd = ops.Operator("listed_linear_fwd", _linear_forward)
listed_linear_bwd = ops.Operator("listed_linear_bwd", _linear_backward)


def _empty_list(
    like: Tensor, k: int, samples: int | None, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    rows, statistics = like.shape[:-1], schema.statistics_dtype(dtype)
    listed = (*rows, k + 1 + (samples or 0))
    of_all = (like.new_empty((0,) if samples is None else rows, dtype=statistics) for _ in range(3))
    return (
        like.new_empty(listed, dtype=statistics),
        like.new_empty(listed, dtype=torch.int32),
        *of_all,
    )


@torch.library.register_fake("sparse_ce::listed_fwd")
def _(logits, target, uniform, k, samples, backend):  # type: ignore[no-untyped-def]
    return _empty_list(logits, k, samples, logits.dtype)


@torch.library.register_fake("sparse_ce::listed_bwd")
def _(dvalues, classes, k, num_classes, dtype, backend):  # type: ignore[no-untyped-def]
    return dvalues.new_empty((*dvalues.shape[:-1], num_classes), dtype=dtype)


@torch.library.register_fake("sparse_ce::listed_linear_fwd")
def _(hidden, weight, bias, target, uniform, k, samples, dtype, *rest):  # type: ignore[no-untyped-def]
    return _empty_list(hidden, k, samples, dtype)


@torch.library.register_fake("sparse_ce::listed_linear_bwd")
def _(dvalues, classes, hidden, weight, *rest):  # type: ignore[no-untyped-def]
    return linear.empty_gradients(hidden, weight, rest[-2])


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, _, _, ctx.k, _, ctx.backend = inputs
    ctx.num_classes, ctx.dtype = logits.shape[-1], logits.dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


def _autograd(ctx: Any, dvalues: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dvalues is None:
        return (None,) * 6
    options = (ctx.k, ctx.num_classes, ctx.dtype, ctx.backend)
    return listed_bwd(dvalues, *ctx.saved_tensors, *options), *(None,) * 5


def _linear_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, _, _, _, k, _, dtype, chunk_rows, ctx.softcap, sparse, ctx.backend = inputs
    ctx.options = k, dtype, chunk_rows, sparse
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    capped = None if ctx.softcap is None else output[0]
    ctx.save_for_backward(output[1], hidden, weight, capped)


def _linear_autograd(ctx: Any, dvalues: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dvalues is None:
        return (None,) * 12
    *saved, capped = ctx.saved_tensors
    if capped is not None:
        dvalues = ops.upstream_times(dvalues, linear.slopes_of(capped, ctx.softcap))
    needed = list(ctx.needs_input_grad[:3])
    found = listed_linear_bwd(dvalues, *saved, *ctx.options, needed, ctx.backend)
    return (*linear.given(found, needed), *(None,) * 9)


# the gradient of a rank's gradient would need those of the others
_no_second_derivative = ops.first_derivative_only("vocab_parallel_sparse_ce")


def _without_derivative(
    of: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> list[Tensor | None]:
    return ops.without_derivative("vocab_parallel_sparse_ce", "", of, gradients)


listed_fwd.differentiable(_autograd, _context)
listed_linear_fwd.differentiable(_linear_autograd, _linear_context)
for _op in (listed_bwd, listed_linear_bwd):
    _op.differentiable(_no_second_derivative)


def _merged(
    values: Tensor, classes: Tensor, target: Tensor, k: int, shards: _Shards
) -> tuple[Tensor, Tensor, Tensor]:
    """A row of what all shards listed, without draws: its logits (N, C + 1), with the gradient of
    the own ones; their classes (N, C + 1) int32; the place of the target (N), -1 where it is out of
    range.
    """
    lists = [min(k, size) for size in shards.sizes]
    # not the most of the lists, whose lengths a compiler does not know
    most, own = min(k, max(shards.sizes)), lists[shards.rank]
    y = target.unsqueeze(-1)
    mine = values[:, :own]
    at_target = torch.where(shards.here(y), values[:, own : own + 1], -torch.inf)
    # as integers, beside which the classes travel in the same message
    bits = torch.int64 if values.dtype == torch.float64 else torch.int32
    message = torch.cat(
        [
            _padded(mine.detach().view(bits), most),
            _padded((classes[:, :own] + shards.start).to(bits), most),
            at_target.detach().view(bits),
        ],
        -1,
    )
    messages = shards.gathered(message)
    # narrow: of a slice whose end may lie beyond, k unknown, the compiler asks which is less
    of_ranks = [messages[rank].narrow(-1, 0, size) for rank, size in enumerate(lists)]
    columns = [numbers.view(values.dtype) for numbers in of_ranks]
    names = [messages[rank].narrow(-1, most, size).int() for rank, size in enumerate(lists)]
    columns[shards.rank] = mine
    listed = torch.cat(names, -1)
    found = listed == y
    inside, has = found.any(-1, keepdim=True), shards.has(y)
    place = torch.where(inside, found.int().argmax(-1, keepdim=True), listed.shape[-1])
    # one rank has it, the others -inf
    of_others = messages[..., -1].view(values.dtype).amax(0).unsqueeze(-1)
    value = torch.where(shards.here(y), at_target, of_others)
    columns.append(torch.where(has & ~inside, value, -torch.inf))
    row, names_of_row = torch.cat(columns, -1), torch.cat([listed, y.int()], -1)
    return row, names_of_row, torch.where(has, place, -1).squeeze(-1)


def _padded(of_rank: Tensor, most: int) -> Tensor:
    return torch.nn.functional.pad(of_rank, (0, most - of_rank.shape[-1]))


def _joined(
    row_max: Tensor, log_sum: Tensor, loss: Tensor, target: Tensor, shards: _Shards
) -> tuple[Tensor, Tensor, Tensor]:
    """Of all classes, what the arguments are of this shard; the loss is of those targets that are
    here.
    """
    # of a row whose classes are all masked here the sum is not a number, but nothing
    empty = row_max == -torch.inf
    log_sum = log_sum.masked_fill(empty, 0)
    loss = loss.masked_fill(empty, 0).masked_fill(~shards.here(target), -torch.inf)
    message = torch.stack([row_max, log_sum, loss])
    maxima, log_sums, losses = shards.gathered(message).unbind(1)
    row_max = maxima.amax(0)
    sums = log_sums + (maxima - row_max)
    log_sum = sums.logsumexp(0)
    # the loss in the target's own shard, and what the others add: both at least 0
    losses = torch.where(losses == -torch.inf, losses, losses + (log_sum - sums).clamp(min=0))
    loss = losses.amax(0)
    return row_max, log_sum, loss.masked_fill(~shards.has(target), torch.nan)


class _Sloped(torch.autograd.Function):
    """A number of each row whose derivatives by `values` are known. One of the values is kept, to
    say that the slopes depend on them.
    """

    @staticmethod
    def forward(ctx: Any, number: Tensor, values: Tensor, one: Tensor, slopes: Tensor) -> Tensor:
        ctx.save_for_backward(one, slopes)
        return number.view_as(number)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        one, slopes = ctx.saved_tensors
        found = ops.upstream_times(upstream.unsqueeze(-1), slopes)
        return None, *_without_derivative((one,), (found,)), None, None


class _Capped(torch.autograd.Function):
    """loss, lse and probs of topk_ce of a merged row, whose k largest are `places`, capped. The
    list operators refuse its second derivative.
    """

    @staticmethod
    def forward(
        ctx: Any, row: Tensor, target: Tensor, places: Tensor, softcap: float
    ) -> tuple[Tensor, ...]:
        *looked, slopes = linear.look_below(row, target, places, softcap)
        loss, lse, _, probs = tail.listed(tuple(looked), target, None, 0, 0.0, row.shape[-1])
        probs = probs[:, : places.shape[-1]].contiguous()
        ctx.width = row.shape[-1]
        ctx.save_for_backward(target, places, probs, slopes)
        return loss, lse, probs

    @staticmethod
    def backward(
        ctx: Any, dloss: Tensor, dlse: Tensor, dprobs: Tensor
    ) -> tuple[Tensor | None, ...]:
        target, places, probs, slopes = ctx.saved_tensors
        g, of_pairs = linear.pairs_below(
            slopes, dloss, dlse, dprobs, target, places, probs, None, 0.0, ctx.width,
            places.shape[-1],
        )  # fmt: skip
        drow = g.new_zeros((g.shape[0], ctx.width)).scatter_add(-1, of_pairs.long(), g)
        return drow, None, None, None


def _of_lists(found: tuple[Tensor, ...], target: Tensor, plan: _Plan) -> tuple[Tensor, ...]:
    """loss, lse, indices, probs, as topk_ce_fwd of all classes; with `samples`, that is with the
    softmax of all classes, the loss alone where nobody asks for the support.
    """
    values, classes = (t.flatten(0, -2) for t in found[:2])
    row_max, log_sum, share = (t.flatten() for t in found[2:])
    shards, k, samples = plan.shards, plan.k, plan.samples
    if samples is None:
        row, names, place = _merged(values, classes, target, k, shards)
        if plan.softcap is None:
            loss, lse, places, probs = ops.topk_ce_fwd(row, place, None, k, 0.0, plan.backend)
        else:
            places = ops.topk_ce_fwd(row.detach(), place, None, k, 0.0, plan.backend)[2]
            capped: Any = _Capped.apply
            loss, lse, probs = capped(row, place, places, plan.softcap)
        return loss, lse, names.gather(-1, places.long()), probs
    # the target is where it stands first; the draws are none
    z, names = values.detach()[:, : k + 1], classes[:, : k + 1]
    once = torch.nn.functional.pad(names[:, -1:] != names[:, :1], (k, 0), value=True)
    at_target = once & (names == (target - shards.start).unsqueeze(-1))
    z_y = torch.where(at_target, z, -torch.inf).amax(-1)
    loss = log_sum - (z_y - row_max)
    highest, total, loss = _joined(row_max, log_sum, loss, target, shards)
    p = torch.where(once, ((z - highest.unsqueeze(-1)) - total.unsqueeze(-1)).exp(), 0)
    of_draw = share * ((row_max - highest) + (log_sum - total)).exp()
    of_draw = torch.where(share == 0, 0, of_draw).unsqueeze(-1).expand(-1, samples)
    slopes = torch.cat([p, of_draw], -1)
    of_loss = slopes - torch.nn.functional.pad(at_target.to(p.dtype), (0, samples))
    of_loss = torch.where(shards.has(target).unsqueeze(-1), of_loss, 0)
    sloped: Any = _Sloped.apply
    one = values[:1, :1].clone()
    loss = sloped(loss, values, one, of_loss)
    if not plan.return_support:
        return (loss,)
    log_sum = sloped(total, values, one, slopes)
    row, names, place = _merged(values, classes, target, k, shards)
    places = ops.topk_ce_fwd(row.detach(), place, None, k, 0.0, plan.backend)[2].long()
    exponent = (row.gather(-1, places) - highest.unsqueeze(-1)) - log_sum.unsqueeze(-1)
    # a row without numbers has no gradient either
    number = total.isfinite().unsqueeze(-1)
    probs = torch.where(number, torch.where(number, exponent, 0).exp(), torch.nan)
    return loss, highest + log_sum, names.gather(-1, places), probs


class _Dense(torch.autograd.Function):
    """The loss of the dense softmax, of logits or of hidden, weight and bias."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: _Plan,
        options: tuple[Any, ...],  # dtype, chunk_rows and softcap of linear.py
        target: Tensor,
        *inputs: Tensor,
    ) -> Tensor:
        fwd = linear.threshold_linear_ce_fwd if options else ops.threshold_ce_fwd
        shards, delta = plan.shards, () if options else (1.0,)
        loss, _, row_max, log_sum, *cut = fwd(
            *inputs, target - shards.start, None, shards.size, *delta, 0.0, *options, plan.backend
        )
        row_max, log_sum, loss = _joined(row_max, log_sum, loss, target, shards)
        ctx.plan, ctx.options = plan, options
        ctx.save_for_backward(target, *inputs, row_max, log_sum, *cut)
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        target, *rest = ctx.saved_tensors
        inputs, statistics = rest[:-5], rest[-5:]
        bwd = linear.threshold_linear_ce_bwd if ctx.options else ops.threshold_ce_bwd
        # a target of another shard is no hit here: its share of the softmax comes as that of lse
        shards = ctx.plan.shards
        dlse = torch.where(shards.has(target) & ~shards.here(target), dloss, 0)
        needed = list(ctx.needs_input_grad[3:])
        found = bwd(
            dloss, dlse, *inputs, target - shards.start, *statistics, None, 0.0, *ctx.options,
            *((needed,) if ctx.options else ()), ctx.plan.backend,
        )  # fmt: skip
        found = linear.given(found, needed) if ctx.options else [found]
        return (*(None,) * 3, *_without_derivative(inputs[:2], found))


class _Shared(torch.autograd.Function):
    """Hidden states that all ranks have: the gradient is the sum of those of the shards, in float32
    where they are of 16 bits.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: str) -> Tensor:
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, dhidden: Tensor) -> tuple[Tensor | None, ...]:
        own = dhidden.to(schema.statistics_dtype(dhidden.dtype)).contiguous()
        total = _wait(torch.ops._c10d_functional.all_reduce(own, "sum", ctx.group))
        return *_without_derivative((dhidden,), (total.to(dhidden.dtype),)), None


@overload
def vocab_parallel_sparse_ce(
    logits: Tensor,
    target: Tensor,
    k: int | None,
    group: dist.ProcessGroup | None = ...,
    *,
    shard_sizes: Sequence[int] | None = ...,
    ignore_index: int = ...,
    normalizer: str = ...,
    tail_samples: int = ...,
    reduction: str = ...,
    return_support: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...
@overload
def vocab_parallel_sparse_ce(
    logits: Tensor,
    target: Tensor,
    k: int | None,
    group: dist.ProcessGroup | None = ...,
    *,
    shard_sizes: Sequence[int] | None = ...,
    ignore_index: int = ...,
    normalizer: str = ...,
    tail_samples: int = ...,
    reduction: str = ...,
    return_support: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, Support]: ...
def vocab_parallel_sparse_ce(
    logits: Tensor,
    target: Tensor,
    k: int | None,
    group: dist.ProcessGroup | None = None,
    *,
    shard_sizes: Sequence[int] | None = None,
    ignore_index: int = -100,
    normalizer: str = "topk",
    tail_samples: int = 0,
    reduction: str = "mean",
    return_support: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Support]:
    """``fused_sparse_ce`` of logits whose classes are sharded over the ranks of a process group.

    Every rank of the group calls it, with its own classes of the same rows, and gets the same loss;
    the classes that are kept are those of the logits in one piece, bit for bit. Every rank calls
    backward too, with the same upstream gradient, and gets the gradient of its own logits. A rank
    sends 2 k + 1 numbers per row in forward, 3 of the softmax of all classes (the others too where
    that has a Support), and none in backward.

    Args:
        logits: (..., V_rank): the logits of this rank's classes, those of rank 0 first.
        target: (...) int64 or int32, in [0, V) with V the classes of all ranks, the same on every
            rank.
        k: how many of all V classes to keep; None or ``k >= V``: the dense softmax. Any other k is
            listed.
        group: the ranks, in the order of their classes; None: all.
        shard_sizes: how many classes each rank has; None: as many as this one.
        normalizer, tail_samples: as of ``fused_sparse_ce``, but that with "full" every rank keeps
            the k largest of its own classes, draws ``tail_samples`` of its others, and has to have
            more than k: the loss is the same, of the gradient there is more. The Support is of the
            k largest of all.
        ignore_index, reduction, return_support, backend: as of ``fused_sparse_ce``.

    All but the logits has to be the same on every rank. On the CPU, and with
    ``SPARSE_CE_DEBUG=1`` on a GPU, what differs is an error on all of them; elsewhere, and in a
    compiled graph, it is not looked for.

    Returns:
        As ``fused_sparse_ce``. There is no second derivative: asking for one is an error.

    Raises:
        As ``fused_sparse_ce``, and RuntimeError where torch.distributed is not initialised.
    """
    checks.logits(logits)
    checks.target(target, logits)
    plan = _plan(
        logits, False, logits.dtype, logits.shape[-1], target, k, group, shard_sizes, ignore_index,
        normalizer, tail_samples, None, reduction, return_support, backend,
    )  # fmt: skip
    rows = functional.as_rows(logits)
    row_target = functional.as_row_target(target, rows)
    if plan.listed:
        uniform = functional.uniform_of(rows, rows.dtype, plan.samples, tail_samples)
        local = row_target - plan.shards.start
        found = listed_fwd(rows, local, uniform, plan.own_k, plan.samples, plan.backend)
        row_target = row_target.flatten()
    else:
        found = _dense(plan, (), row_target, rows)
    return _finished(plan, found, target, row_target, None, ignore_index, reduction)


@overload
def vocab_parallel_linear_sparse_ce(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    k: int | None,
    group: dist.ProcessGroup | None = ...,
    *,
    bias: Tensor | None = ...,
    shard_sizes: Sequence[int] | None = ...,
    ignore_index: int = ...,
    normalizer: str = ...,
    tail_samples: int = ...,
    softcap: float | None = ...,
    reduction: str = ...,
    return_support: Literal[False] = ...,
    backward: str = ...,
    chunk_bytes: int | None = ...,
    backend: str = ...,
) -> Tensor: ...
@overload
def vocab_parallel_linear_sparse_ce(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    k: int | None,
    group: dist.ProcessGroup | None = ...,
    *,
    bias: Tensor | None = ...,
    shard_sizes: Sequence[int] | None = ...,
    ignore_index: int = ...,
    normalizer: str = ...,
    tail_samples: int = ...,
    softcap: float | None = ...,
    reduction: str = ...,
    return_support: Literal[True],
    backward: str = ...,
    chunk_bytes: int | None = ...,
    backend: str = ...,
) -> tuple[Tensor, Support]: ...
def vocab_parallel_linear_sparse_ce(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    k: int | None,
    group: dist.ProcessGroup | None = None,
    *,
    bias: Tensor | None = None,
    shard_sizes: Sequence[int] | None = None,
    ignore_index: int = -100,
    normalizer: str = "topk",
    tail_samples: int = 0,
    softcap: float | None = None,
    reduction: str = "mean",
    return_support: bool = False,
    backward: str = "auto",
    chunk_bytes: int | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Support]:
    """``fused_linear_sparse_ce`` with an output layer whose classes are sharded over the ranks of a
    process group.

    Every rank of the group calls it, with its own rows of the weight and the same hidden states,
    and gets the same loss. The ranks exchange as ``vocab_parallel_sparse_ce``, and in backward the
    gradient of hidden: it is the sum over the ranks, and all of them get it.

    Args:
        hidden: (..., D), the same on every rank.
        weight: (V_rank, D): the rows of this rank's classes, those of rank 0 first.
        target, k, group, shard_sizes, normalizer, tail_samples: as of ``vocab_parallel_sparse_ce``.
        bias: (V_rank,) or None.
        softcap: as of ``fused_linear_sparse_ce``: a list is of the largest logits themselves,
            capped in float32, here with k beyond 1024 too. With k=None without ``return_support``,
            and with "full", all are capped, in their dtype.
        ignore_index, reduction, return_support, backward, chunk_bytes, backend: as of
            ``fused_linear_sparse_ce``.

    Returns:
        As ``fused_linear_sparse_ce``.

    Raises:
        As ``fused_linear_sparse_ce``, and RuntimeError where torch.distributed is not initialised.
    """
    checks.linear(hidden, weight, bias)
    checks.target(target, hidden, "hidden")
    checks.backward(backward)
    checks.chunk_bytes(chunk_bytes)
    size, dtype = weight.shape[0], linear.product_dtype(hidden)
    plan = _plan(
        hidden, True, dtype, size, target, k, group, shard_sizes, ignore_index, normalizer,
        tail_samples, softcap, reduction, return_support, backend,
    )  # fmt: skip
    rows = hidden.reshape(-1, hidden.shape[-1]).contiguous()
    row_target = target.reshape(-1).to(torch.int64).contiguous()
    kept = None if return_support else linear.rows_that_count(row_target, ignore_index)
    if kept is not None:
        rows, row_target = rows[kept], row_target[kept]
    shared: Any = _Shared.apply
    rows = shared(rows, plan.shards.group)
    chunk_rows = linear.rows_of_buffer(rows, size, dtype, chunk_bytes)
    options = (dtype, chunk_rows, plan.softcap_of_all)
    layer = (rows, weight.contiguous(), bias)
    if plan.listed:
        local = row_target - plan.shards.start
        sparse = backward == "sparse"
        if backward == "auto":
            # a rank has its share of the k, but draws of its own
            pairs = plan.k if plan.samples is None else plan.k + plan.samples
            classes = plan.shards.num_classes if plan.samples is None else size
            sparse = linear.is_sparse(pairs, classes, hidden.device.type, dtype)
        uniform = functional.uniform_of(rows, dtype, plan.samples, tail_samples)
        found = listed_linear_fwd(
            *layer, local, uniform, plan.own_k, plan.samples, *options, sparse, plan.backend
        )
    else:
        found = _dense(plan, options, row_target, *layer)
    return _finished(plan, found, target, row_target, kept, ignore_index, reduction)


def _dense(plan: _Plan, options: tuple[Any, ...], target: Tensor, *inputs: Tensor | None) -> Any:
    apply: Any = _Dense.apply
    return apply(plan, options, target, *inputs)


def _finished(
    plan: _Plan,
    found: Any,
    target: Tensor,
    counted: Tensor,
    kept: Tensor | None,
    ignore_index: int,
    reduction: str,
) -> Tensor | tuple[Tensor, Support]:
    """The loss of each row of `counted`, or of those in `kept`, reduced; of the lists that were
    `found`, or as it is.
    """
    loss, *support = _of_lists(found, counted, plan) if plan.listed else (found,)
    reduced = functional.reduce(
        loss, counted, None, ignore_index, reduction, plan.backend, target.shape, kept
    )
    if not plan.return_support:
        return reduced
    lse, indices, probs = support
    num_classes = plan.shards.num_classes
    return reduced, functional.support_of(target, indices, probs, lse, plan.k, num_classes)
