"""vocab_parallel_sparse_ce and its linear form: the classes of three ranks, or of as many as there
are GPUs, against the truth of all classes. SPEC 6.
"""

import contextlib
import itertools
import math
import subprocess
import sys
from functools import partial
from typing import NamedTuple

import pytest
import ranks
import subjects
import torch
import torch.distributed as dist
from allocations import sizes_of_allocations
from closeness import Truth, assert_within, probability_units, with_rounding
from sparse_ce import (
    functional,
    fused_linear_sparse_ce,
    linear,
    parallel,
    reference,
    vocab_parallel_linear_sparse_ce,
    vocab_parallel_sparse_ce,
)
from test_linear import CappedTruth, LinearTruth, gradients, layer, of_layer, statistics
from test_tail import dense_gradient
from torch.utils.checkpoint import checkpoint

# fewer classes than are kept, more than that, many
SIZES = {1: (67,), 2: (5, 62), 3: (5, 21, 41)}
CLASSES, IGNORED, CAP = 67, -100, 3.0
# one class, fewer than a shard has, more than the first has, more than any has, all
KS = (1, 4, 20, 50, CLASSES, None)
ROWS = (3, 5)


class Case(NamedTuple):
    backend: str
    dtype: torch.dtype
    k: int | None
    linear: bool = False
    backward: str = "auto"
    samples: int | None = None  # with the softmax of all classes
    softcap: float | None = None

    @property
    def listed(self):
        return self.k is not None

    @property
    def test(self):
        if not self.linear:
            return "test_logits" if self.samples is None else "test_all_classes"
        if self.softcap is not None and not self.samples:
            return "test_linear_softcap"
        return "test_linear" if self.samples is None else "test_linear_all_classes"


def table(device):
    rows = [s for s in subjects.SUBJECTS if s.device == device]
    ks = (4, 50, None) if subjects.INTERPRETING else KS
    dtypes = {s: s.dtypes[:2] if subjects.INTERPRETING else s.dtypes for s in rows}
    ways = [(k, False, "auto", None) for k in ks]
    ways += [(4, False, "auto", samples) for samples in (0, 6)]
    ways += [(4, True, "sparse", None), (4, True, "dense", None), (None, True, "auto", None)]
    ways += [(4, True, way, 6, cap) for way in ("sparse", "dense") for cap in (None, CAP)]
    ways += [(4, True, way, samples, CAP) for way in ("sparse", "dense") for samples in (None, 0)]
    ways += [(k, True, "auto", None, CAP) for k in (50, None)]
    return [Case(s.backend, dtype, *way) for s in rows for dtype in dtypes[s] for way in ways]


def logits_and_target(dtype):
    """Rows of ties, and the rows that go wrong where shards are put together."""
    torch.manual_seed(0)
    z = (torch.randn(*ROWS, CLASSES) * 4).round() / 2
    y = torch.randint(CLASSES, ROWS)
    z[0, 0], y[0, 0] = torch.nan, IGNORED
    z[0, 1, :5], y[0, 1] = -torch.inf, 30  # a shard without a class
    z[0, 2, :5], y[0, 2] = -torch.inf, 2  # where the target is
    z[0, 3, 10] = torch.nan
    z[0, 4] = -torch.inf
    z[1, 0, 66] = torch.inf
    z[1, 1] = 1.5  # nothing but ties: the support is that of the first shards
    z[1, 2, 30:], y[1, 2] = 9.0, 4
    z[1, 3] += 512
    z[1, 4, 1:], y[1, 4] = -torch.inf, 0  # a loss of 0
    y[2] = torch.tensor([0, 4, 5, 25, 66])  # either end of each shard
    return z.to(dtype), y


def upstream(shape, dtype, k):
    torch.manual_seed(1)
    wide = statistics(dtype)
    return [torch.randn(*shape, *more, dtype=wide) for more in ((), (), (k,) if k else (1,))]


def capped(logits, softcap):
    """In the dtype of the logits."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def own_classes(whole, rank, sizes, dim):
    return whole.split(sizes, dim)[rank].detach().clone().requires_grad_(whole.requires_grad)


def on_a_rank(rank, device, sizes, cases):
    return [of_case(case, rank, device, sizes) for case in cases]


def of_case(case, rank, device, sizes):
    """The outputs of a rank and its gradients, each as the truth of all classes wants it."""
    a, b, q = (t.to(device) for t in upstream(ROWS, case.dtype, case.k))
    options = {"shard_sizes": sizes, "reduction": "none", "backend": case.backend}
    if case.samples is not None:
        options |= {"normalizer": "full", "tail_samples": case.samples}
    if case.linear:
        hidden, weight, bias, target = layer(case.dtype, ROWS, True, device, CLASSES)
        weight, bias = (own_classes(t, rank, sizes, 0) for t in (weight, bias))
        target[1, 2] = IGNORED
        torch.manual_seed(2)
        loss = vocab_parallel_linear_sparse_ce(
            hidden, weight, target, case.k, bias=bias, backward=case.backward,
            chunk_bytes=4 * len(weight) * case.dtype.itemsize, softcap=case.softcap, **options,
        )  # fmt: skip
        outputs = {"loss": loss.detach(), **gradients(loss, a, hidden, weight, bias)}
        if case.samples is not None:
            logits = torch.nn.functional.linear(hidden, weight, bias).detach()
            logits = capped(logits, case.softcap).requires_grad_()
            # an ignored row has no draw there on the CPU
            rows = (target != IGNORED) if device == "cpu" else target > -math.inf
            torch.manual_seed(2)
            of_logits = vocab_parallel_sparse_ce(logits[rows], target[rows], case.k, **options)
            (outputs["dlogits"],) = torch.autograd.grad(of_logits, logits, a[rows])
            outputs["logits"] = logits.detach()
        return outputs
    whole, target = (t.to(device) for t in logits_and_target(case.dtype))
    logits = own_classes(whole, rank, sizes, -1).requires_grad_()
    before = logits.detach().clone()
    found = vocab_parallel_sparse_ce(
        logits, target.int(), case.k, return_support=case.listed, **options
    )
    assert torch.equal(logits.nan_to_num(7), before.nan_to_num(7))
    loss, support = found if case.listed else (found, None)
    counted = target != IGNORED
    total = (a * loss)[counted & (a != 0)].sum()
    outputs = {"loss": loss.detach()}
    if support is not None:
        total = total + ((b * support.lse) + (q * support.probs).sum(-1))[counted].sum()
        outputs |= {name: getattr(support, name).detach() for name in ("lse", "indices", "probs")}
    (outputs["dlogits"],) = torch.autograd.grad(total, logits)
    return outputs


# A set of processes a worker would be one too many: in the interpreter they take a minute.
ONE_WORKER = pytest.mark.xdist_group("ranks")


@pytest.fixture(scope="module")
def found():
    """of(device, case): what each rank returned. Of one set of processes for all cases; a single
    rank, where there is one GPU, is this process.
    """
    kept = {}
    with contextlib.ExitStack() as stack:

        def of(device, case):
            count = min(3, ranks.available(device))
            if count == 0:
                pytest.skip("torch was built without gloo, or without nccl")
            sizes = SIZES[count]
            if count == 1:
                if not dist.is_initialized():
                    stack.enter_context(ranks.alone(device))
                # as `ranks.run` gives it: the truth is on the CPU
                outputs = of_case(case, 0, device, sizes)
                return [{name: value.cpu() for name, value in outputs.items()}]
            if device not in kept:
                cases = table(device)
                by_rank = ranks.run(count, device, on_a_rank, device, sizes, cases)
                kept[device] = dict(zip(cases, zip(*by_rank, strict=True), strict=True))
            return kept[device][case]

        yield of


def ids(case):
    way = f"linear-{case.backward}" if case.linear else "logits"
    way += "" if case.samples is None else f"-{case.samples} draws"
    way += "" if case.softcap is None else "-capped"
    return f"{case.backend}-{str(case.dtype).removeprefix('torch.')}-{case.k}-{way}"


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        name = metafunc.function.__name__
        pairs = [(d, c) for d in subjects.DEVICES for c in table(d) if c.test == name]
        metafunc.parametrize(
            "device, case", pairs, ids=[f"{ids(c)}-{d}" for d, c in pairs], scope="module"
        )


@pytest.mark.interpreter
@ONE_WORKER
def test_logits(device, case, found):
    by_rank = found(device, case)
    z, y = logits_and_target(case.dtype)
    truth = Truth(z, y, case.k or CLASSES)
    counted = (y != IGNORED).flatten()
    a, b, q = upstream(ROWS, case.dtype, case.k)
    a, b, q = (t.where((y != IGNORED).view(*ROWS, *(1,) * (t.dim() - 2)), 0) for t in (a, b, q))
    for of_rank in by_rank:
        assert (of_rank["loss"].flatten()[~counted] == 0).all()
        truth.assert_loss(of_rank["loss"].where(y != IGNORED, torch.nan))
        if case.listed:
            rest = (of_rank[name] for name in ("lse", "indices", "probs"))
            truth.assert_forward(of_rank["loss"].where(y != IGNORED, torch.nan), *rest)
        # every rank has them to the last bit
        for name in of_rank.keys() - {"dlogits"}:
            assert torch.equal(of_rank[name].nan_to_num(7), by_rank[0][name].nan_to_num(7))
    dlogits = torch.cat([of_rank["dlogits"] for of_rank in by_rank], -1)
    truth.assert_gradient(dlogits, a, *((b, q) if case.listed else ()))


@pytest.mark.interpreter
@ONE_WORKER
def test_linear(device, case, found):
    by_rank = found(device, case)
    hidden, weight, bias, target = layer(case.dtype, ROWS, True, "cpu", CLASSES)
    target[1, 2] = IGNORED
    a, _, _ = upstream(ROWS, case.dtype, case.k)
    k = case.k or CLASSES
    truth = LinearTruth(hidden, weight, bias, target, k, a.where(target != IGNORED, 0))
    for of_rank in by_rank:
        truth.loss.assert_loss(of_rank["loss"].where(target != IGNORED, torch.nan))
        assert torch.equal(of_rank["dhidden"], by_rank[0]["dhidden"])
    whole = {name: torch.cat([r[name] for r in by_rank]) for name in ("dweight", "dbias")}
    dense = case.backward != "sparse"
    truth.assert_gradients(dense, 4, len(by_rank), dhidden=by_rank[0]["dhidden"], **whole)


def own_lists(z, y, k, sizes):
    """(N, V): the classes whose gradient is kept, the k largest of each shard and the target."""
    kept, start = torch.zeros(z.shape, dtype=torch.bool), 0
    for part in z.split(sizes, -1):
        kept.scatter_(-1, reference.support_indices(part, k) + start, True)
        start += part.shape[-1]
    hit = y >= 0
    kept[hit.nonzero().flatten(), y[hit]] = True
    return kept


@pytest.mark.interpreter
@ONE_WORKER
def test_all_classes(device, case, found):
    """normalizer="full": the loss is that of the dense softmax, and so is the gradient of what a
    shard lists; its draws have what it does not list, in equal shares.
    """
    by_rank = found(device, case)
    sizes = SIZES[len(by_rank)]
    z, y = (t.flatten(0, 1) for t in logits_and_target(case.dtype))
    truth, counted = Truth(z, y, CLASSES), y != IGNORED
    lists = Truth(z, y, case.k)
    a, b, q = (t.flatten(0, 1) for t in upstream(ROWS, case.dtype, case.k))
    # of p as in closeness.py, with the log-sum of a shard and that of all
    p = z.double().softmax(-1)
    units = probability_units(CLASSES)
    units += units - 2 - 2 * math.log(CLASSES)
    of_p = 2 * torch.special.entr(p) + units * p
    for of_rank in by_rank:
        loss, lse = of_rank["loss"].flatten(), of_rank["lse"].flatten()
        # the log-sum of a shard, and that of all
        within = 2 * (truth.loss_tolerance + truth.unit * truth.loss.abs())
        assert_within("loss", loss[counted], truth.loss[counted], within[counted])
        truth.assert_lse(lse)
        assert torch.equal(of_rank["indices"].flatten(0, 1).long(), lists.indices)
        index, within = lists.indices, truth.unit * of_p + truth.smallest
        assert_within("probs", of_rank["probs"], p.gather(-1, index), within.gather(-1, index))
    dlogits = torch.cat([of_rank["dlogits"] for of_rank in by_rank], -1).flatten(0, 1).double()

    q = q.double().where(counted.unsqueeze(-1), 0)
    b = b.double().where(counted, 0)
    numbers = truth.lse.isfinite()
    p = p.where(numbers.unsqueeze(-1), 0)
    of_p = of_p.where(numbers.unsqueeze(-1), 0)
    q = torch.zeros_like(p).scatter_add(-1, lists.indices, q)
    # p (a + b - s + q) with s = sum p q, and -a at the target: errors of p, of s, of four roundings
    # of each term; those of s are of its terms, and of their sum
    s = (q * p).sum(-1)
    of_s = (q.abs() * of_p).sum(-1) + (math.log2(case.k) / 2 + 1) * (q.abs() * p).sum(-1)
    size = (a.abs() + b.abs() + s.abs()).unsqueeze(-1) + q.abs()
    tolerance = size * (of_p + 4 * p) + p * of_s.unsqueeze(-1)
    tolerance.scatter_add_(-1, y.where(y >= 0, 0).unsqueeze(-1), 4 * a.abs().double().unsqueeze(-1))
    tolerance = truth.unit * tolerance + truth.smallest
    b = b - s
    # less the maximum, which changes no gradient: float64 too loses digits beside 512
    shifted = z.double() - z.double().amax(-1, keepdim=True)
    expected = dense_gradient(shifted, y, None, case.k, 0.0, a, b)[0] + q * p
    kept = own_lists(z, y, case.k, sizes)
    expected, tolerance = expected.where(kept, 0), tolerance.where(kept, 0)
    rows = numbers & counted
    tolerance = with_rounding(expected, tolerance, case.dtype)
    outside = ~kept & (dlogits != 0)
    assert_within("dlogits", dlogits.where(~outside, 0)[rows], expected[rows], tolerance[rows])
    assert (dlogits[~counted] == 0).all() and not dlogits[~numbers & counted].isfinite().all()
    if not case.samples:
        assert not outside[rows].any()
        return
    factor = (a.double().where(y >= 0, 0) + b)[rows]
    parts = (t[rows].split(sizes, -1) for t in (dlogits, p, outside, kept))
    for g, of_shard, drawn, listed in zip(*parts, strict=True):
        mass = of_shard.masked_fill(listed, 0).sum(-1)
        share = factor * mass / case.samples
        # of a sum of p the relative error is that of the largest, and each is rounded down besides
        units = probability_units(CLASSES) + 2 * (
            math.log(CLASSES) - mass.log().nan_to_num(0, 0, 0)
        )
        error = truth.unit * units * share.abs() + factor.abs() * CLASSES * 2.0**-52 / case.samples
        times = (g / share.unsqueeze(-1)).where(drawn, 0).round()
        expected, tolerance = (times * t.unsqueeze(-1) for t in (share, error))
        tolerance = with_rounding(expected, tolerance, case.dtype)
        assert_within("draws", g.where(drawn, 0), expected.nan_to_num(0), tolerance.nan_to_num(0))
        # what is smaller than any normal number of the dtype may be 0
        seen = share.abs() > torch.finfo(case.dtype).tiny
        assert (times.sum(-1)[seen] == case.samples).all() and seen.any()


@pytest.mark.interpreter
@ONE_WORKER
def test_linear_all_classes(device, case, found):
    """The draws of an output layer are those of its logits, of the same generator: its gradients
    are the products with the gradient of the logits, whose truth is above, and the slopes of a cap.
    """
    by_rank = found(device, case)
    sizes = SIZES[len(by_rank)]
    hidden, weight, _, target = layer(case.dtype, ROWS, True, "cpu", CLASSES)
    target[1, 2] = IGNORED
    z, of_z = (torch.cat([r[name] for r in by_rank], -1) for name in ("logits", "dlogits"))
    truth = Truth(z, target, CLASSES)
    for of_rank in by_rank:
        within = 2 * (truth.loss_tolerance + truth.unit * truth.loss.abs())
        counted = (target != IGNORED).flatten()
        loss = of_rank["loss"].flatten()
        assert_within("loss", loss[counted], truth.loss[counted], within[counted])
        assert torch.equal(of_rank["dhidden"], by_rank[0]["dhidden"])
    z, of_z, h, w = (t.detach().double().flatten(0, -2) for t in (z, of_z, hidden, weight))
    g = of_z if case.softcap is None else of_z * (1 - (z / case.softcap).square())
    # dlogits and the sums of chunks and of shards are rounded, where the product is dense, and
    # float32 sums of at most 15 products; slopes below 1 have three roundings, their product one
    eps = torch.finfo(case.dtype).eps * (2 + 4 + len(sizes))
    eps += 3 * torch.finfo(statistics(case.dtype)).eps if case.softcap is not None else 0
    expected, size = of_layer(g, h, w), of_layer(of_z.abs(), h.abs(), w.abs())
    for name, of_all in expected.items():
        whole = [of_rank[name] for of_rank in by_rank]
        actual = whole[0] if name == "dhidden" else torch.cat(whole)
        shape = actual.shape
        assert_within(name, actual, of_all.reshape(shape), eps * size[name].reshape(shape))


@pytest.mark.interpreter
@ONE_WORKER
def test_linear_softcap(device, case, found):
    """The list is that of what is not capped, and the gradient goes through the cap."""
    by_rank = found(device, case)
    sizes = SIZES[len(by_rank)]
    hidden, weight, bias, target = layer(case.dtype, ROWS, True, "cpu", CLASSES)
    counted = torch.ones(ROWS, dtype=torch.bool)
    counted[1, 2] = False
    a, _, _ = upstream(ROWS, case.dtype, case.k)
    way, kept = {"k": case.k}, None
    if case.samples is not None:
        way |= {"normalizer": "full"}
        z = torch.cat([of_rank["logits"] for of_rank in by_rank], -1).double()
        kept = own_lists(z.flatten(0, 1), target.flatten(), case.k, sizes)
    truth = CappedTruth(
        hidden, weight, bias, target, way, case.softcap, a.where(counted, 0), kept=kept
    )
    truth.loss[~counted.flatten()] = 0
    for of_rank in by_rank:
        assert torch.equal(of_rank["loss"], by_rank[0]["loss"])
        assert torch.equal(of_rank["dhidden"], by_rank[0]["dhidden"])
    loss, dhidden = by_rank[0]["loss"], by_rank[0]["dhidden"]
    whole = {name: torch.cat([r[name] for r in by_rank]) for name in ("dweight", "dbias")}
    gradients = {"dhidden": dhidden, **whole}
    truth.assert_near(loss, gradients, case.backward != "sparse", 4, case.dtype, len(by_rank))


# What has one outcome for all backends, on the processor: a set of processes each.

SHARDS = (20, 47)


def on_ranks(count, function):
    if ranks.available("cpu") < count or subjects.EMULATING or subjects.INTERPRETING:
        pytest.skip("torch was built without gloo, or this run is of one backend alone")
    return ranks.run(count, "cpu", function)


def float_problem(rank, rows=(6,), shards=SHARDS):
    """Logits of both shards, those of this rank, the target."""
    torch.manual_seed(0)
    whole = torch.randn(*rows, sum(shards))
    target = torch.randint(sum(shards), rows)
    return whole, own_classes(whole, rank, shards, -1).requires_grad_(), target


WAYS = (
    {"k": 5},
    {"k": None},
    {"k": 5, "normalizer": "full"},
    {"k": 5, "normalizer": "full", "tail_samples": 8},
)


def _reductions(rank):
    whole, logits, target = float_problem(rank)
    target[1] = IGNORED
    for way in WAYS:
        call = partial(vocab_parallel_sparse_ce, logits, target=target, shard_sizes=SHARDS, **way)

        def gradient(loss, above=None):
            return torch.autograd.grad(loss, logits, above, retain_graph=True)[0]

        by_row = {}
        for reduction in ("none", "sum", "mean"):
            torch.manual_seed(1)
            loss = call(reduction=reduction)
            assert loss.dtype == torch.float32 and loss.requires_grad
            by_row[reduction] = loss
            above = torch.ones_like(loss)
            assert torch.equal(gradient(loss, above), gradient(loss, above))
        rows = by_row["none"].detach()
        torch.testing.assert_close(by_row["sum"].detach(), rows.sum())
        torch.testing.assert_close(by_row["mean"].detach(), rows.sum() / 5)
        of_rows = gradient(by_row["none"], torch.ones(6))
        torch.testing.assert_close(gradient(by_row["sum"]), of_rows)
        torch.testing.assert_close(gradient(by_row["mean"]), of_rows / 5)

        nothing = call(target=torch.full_like(target, IGNORED))
        assert nothing == 0 and (gradient(nothing) == 0).all()
        none = logits[:0], target[:0]
        empty = vocab_parallel_sparse_ce(*none, shard_sizes=SHARDS, reduction="sum", **way)
        assert empty == 0 and (gradient(empty) == 0).all()
        with torch.no_grad():
            torch.manual_seed(1)
            assert torch.equal(call(), by_row["mean"]) and not call().requires_grad

        with pytest.raises(RuntimeError, match="expected a first derivative only"):
            again = torch.autograd.grad(call(), logits, create_graph=True)[0]
            torch.autograd.grad(again.square().sum(), logits)
        hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(SHARDS[rank], 8)
        logits_of = torch.nn.functional.linear(hidden, weight)
        options = {"shard_sizes": SHARDS, "return_support": True, **way}
        torch.manual_seed(1)
        of_layer, layer_support = vocab_parallel_linear_sparse_ce(hidden, weight, target, **options)
        torch.manual_seed(1)
        of_logits, support = vocab_parallel_sparse_ce(logits_of, target, **options)
        assert torch.equal(of_layer, of_logits)
        assert torch.equal(layer_support.indices, support.indices)
        of_layer, of_logits = (
            torch.autograd.grad(s.entropy().sum(), hidden)[0] for s in (layer_support, support)
        )
        dist.all_reduce(of_logits)
        torch.testing.assert_close(of_layer, of_logits)
        for inputs in ((hidden, weight), (hidden.detach(), weight.requires_grad_())):
            loss = vocab_parallel_linear_sparse_ce(*inputs, target, shard_sizes=SHARDS, **way)
            leaf = next(t for t in inputs if t.requires_grad)
            again = torch.autograd.grad(loss, leaf, create_graph=True)[0]
            with pytest.raises(RuntimeError, match="expected a first derivative only"):
                torch.autograd.grad(again.square().sum(), leaf)


def test_reductions_and_what_autograd_asks():
    on_ranks(2, _reductions)


def _capped_supports(rank):
    """Loss, lse and probs, and their gradients, of explicitly capped logits in float64."""
    rows = 12
    hidden, weight, bias, _ = layer(torch.float64, (rows,), True, "cpu", CLASSES)
    with torch.no_grad():
        weight *= 2  # logits of up to four caps
    logits = torch.nn.functional.linear(hidden, weight, bias).detach()
    # of each shard, in the list and outside of it
    order = logits.argsort(-1, descending=True)
    target = torch.stack([row[n % 5 * 16 + n // 5] for n, row in enumerate(order)])
    assert 0 < (target < SHARDS[0]).sum() < rows
    target[3] = IGNORED
    counted = target != IGNORED
    a, b, q = (torch.randn(rows, *more, dtype=torch.float64) for more in ((), (), (CLASSES,)))
    for way, backward in itertools.product(WAYS[:3], ("sparse", "dense")):
        k = way["k"] or CLASSES
        options = {**way, "softcap": CAP, "reduction": "none", "return_support": True}
        own_weight, own_bias = (own_classes(t, rank, SHARDS, 0) for t in (weight, bias))
        loss, support = vocab_parallel_linear_sparse_ce(
            hidden, own_weight, target, bias=own_bias, shard_sizes=SHARDS, backward=backward,
            chunk_bytes=5 * len(own_weight) * 8, **options,
        )  # fmt: skip
        x = logits.clone().requires_grad_()
        z = CAP * torch.tanh(x / CAP)
        indices = reference.support_indices(logits, k)
        kept = z.gather(-1, indices)
        lse = (z if "normalizer" in way else kept).logsumexp(-1)
        at_target = z.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        expected = torch.where(counted, lse - at_target, 0), lse, (kept - lse.unsqueeze(-1)).exp()
        assert torch.equal(support.indices.long(), indices)
        found = loss, support.lse, support.probs
        torch.testing.assert_close(found, expected)
        above = a, b, q[:, :k]
        (dz,) = torch.autograd.grad(expected, z, above, retain_graph=True)
        if "normalizer" in way:
            dz = dz.where(own_lists(logits, target, k, SHARDS), 0)
        (dx,) = torch.autograd.grad(z, x, dz)
        inputs = hidden, own_weight, own_bias
        gradients = torch.autograd.grad(found, inputs, above, retain_graph=True)
        of_all = of_layer(dx, hidden.detach(), weight.detach())
        torch.testing.assert_close(gradients[0], of_all["dhidden"])
        torch.testing.assert_close(gradients[1], of_all["dweight"].split(SHARDS)[rank])
        torch.testing.assert_close(gradients[2], of_all["dbias"].split(SHARDS)[rank])
        if k == CLASSES:
            continue
        whole, of_whole = fused_linear_sparse_ce(hidden, weight, target, bias=bias, **options)
        assert torch.equal(of_whole.indices, support.indices)
        torch.testing.assert_close(found, (whole, of_whole.lse, of_whole.probs))
        # of the bias alone nothing but the loss itself says that there is a second one
        for leaf, layer_of in ((hidden, inputs[:2]), (own_bias, (hidden.data, own_weight.data))):
            loss = vocab_parallel_linear_sparse_ce(
                *layer_of, target, bias=own_bias, shard_sizes=SHARDS, softcap=CAP, **way
            )
            (again,) = torch.autograd.grad(loss, leaf, create_graph=True)
            with pytest.raises(RuntimeError, match="expected a first derivative only"):
                torch.autograd.grad(again.square().sum(), leaf)


def test_the_support_of_capped_logits():
    on_ranks(2, _capped_supports)


def _ties_of_the_cap(rank):
    """Where rounding makes ties of what is capped, the kept classes are those of the logits."""
    for dtype, shards, k in (
        (torch.float32, SHARDS, 5),
        (torch.bfloat16, SHARDS, 5),
        # beyond what the list regime of one shard has
        (torch.float32, (1500, 700), 1100),
    ):
        # the larger logits are in the last shard, the targets in both
        logits = torch.linspace(-10, 50, sum(shards)).expand(4, -1).to(dtype)
        target = torch.tensor([0, shards[0], sum(shards) - 1, sum(shards) - k - 1])
        hidden = torch.eye(4, dtype=dtype).requires_grad_()
        weight = logits.t().contiguous()
        indices = reference.support_indices(logits.double(), k)
        tied = capped(logits.float(), 2.0) == 2.0
        assert (tied.sum(-1) > k).all() and not indices.equal(
            reference.support_indices(capped(logits.float(), 2.0).double(), k)
        )
        own = own_classes(weight, rank, shards, 0)
        options = {"softcap": 2.0, "reduction": "none"}
        loss, support = vocab_parallel_linear_sparse_ce(
            hidden, own, target, k, shard_sizes=shards, return_support=True, **options
        )
        assert torch.equal(support.indices.long(), indices)
        whole, of_whole = fused_linear_sparse_ce(
            hidden, weight, target, k, return_support=True, **options
        )
        assert torch.equal(support.indices, of_whole.indices)
        torch.testing.assert_close(loss, whole)
        z = capped(logits.double(), 2.0)
        at_target = z.gather(-1, target.unsqueeze(-1))
        exact = z.gather(-1, indices).logsumexp(-1) - at_target.squeeze(-1)
        torch.testing.assert_close(loss.double(), exact)
        # all that is kept is flat, and the targets outside have slopes, which err by 3 units
        (found,) = torch.autograd.grad(loss.sum(), hidden)
        slopes, rows = 1 - (at_target / 2).square(), weight.double()[target]
        expected, size = -slopes * rows, weight.abs().max().double()
        within = 3 * torch.finfo(torch.float32).eps * size + torch.finfo(dtype).eps * expected.abs()
        assert_within("dhidden", found, expected, within)


def test_ties_of_the_cap():
    on_ranks(2, _ties_of_the_cap)


def _capped_rows_without_numbers(rank):
    # as on a GPU, where ignored tokens go through the product
    linear.rows_that_count = lambda *_: None
    hidden, weight, bias, target = layer(torch.float32, (8,), True, "cpu", CLASSES)
    with torch.no_grad():
        bias[3] = bias[30] = -torch.inf  # no more than -c when it is capped
    clean = hidden.detach().clone().requires_grad_()
    hidden.data[2], target[2] = torch.nan, IGNORED
    hidden.data[5, 0] = torch.nan
    own_weight, own_bias = (own_classes(t, rank, SHARDS, 0) for t in (weight, bias))
    counted = torch.ones(8, dtype=torch.bool)
    counted[5] = False
    for way, backward in itertools.product(WAYS, ("sparse", "dense")):
        options = {**way, "softcap": CAP, "reduction": "none", "backward": backward}
        results = []
        for h in (hidden, clean):
            torch.manual_seed(1)
            loss = vocab_parallel_linear_sparse_ce(
                h, own_weight, target, bias=own_bias, shard_sizes=SHARDS, **options
            )
            above = counted.float() / 8  # nothing of the row that is NaN
            found = torch.autograd.grad(loss, (h, own_weight, own_bias), above, retain_graph=True)
            results.append((loss.where(counted, 0), *found))
            assert loss[2] == 0 and (found[0][2] == 0).all()
        torch.testing.assert_close(*results, rtol=0, atol=0)
        assert results[0][2].abs().sum() > 0
        whole = fused_linear_sparse_ce(hidden, weight, target, bias=bias, **options)
        torch.testing.assert_close(results[0][0], whole.where(counted, 0))
        loss = vocab_parallel_linear_sparse_ce(
            hidden, own_weight, target, bias=own_bias, shard_sizes=SHARDS, **options
        )
        assert loss.isnan().tolist() == (~counted).tolist() == whole.isnan().tolist()
        (found,) = torch.autograd.grad(loss.sum(), hidden)
        assert found[5].isnan().any() and found[counted].isfinite().all()


def test_capped_rows_without_numbers():
    on_ranks(2, _capped_rows_without_numbers)


def _expectation(rank):
    """Of 64 equal rows with uniforms on a grid, a class of the tail is drawn as often as its share
    of the shard's tail says, but for one row in 64.
    """
    rows, samples = 64, 4
    whole, _, target = float_problem(rank, (1,))
    whole, target = whole.double().expand(rows, -1), target.expand(rows)
    logits = own_classes(whole, rank, SHARDS, -1).requires_grad_()
    grid = (torch.arange(rows, dtype=torch.float64) + 0.5) / rows
    functional.uniform_of = lambda *_: grid
    loss = vocab_parallel_sparse_ce(
        logits, target, 3, shard_sizes=SHARDS, normalizer="full", tail_samples=samples,
        reduction="sum",
    )  # fmt: skip
    (found,) = torch.autograd.grad(loss, logits)
    leaf = whole[:1].clone().requires_grad_()
    (dense,) = torch.autograd.grad(torch.nn.functional.cross_entropy(leaf, target[:1]), leaf)
    dense = dense.split(SHARDS, -1)[rank][0]
    # of what each draw stands for
    kept = own_lists(whole[:1], target[:1], 3, SHARDS).split(SHARDS, -1)[rank][0]
    share = dense.masked_fill(kept, 0).sum() / samples
    within = torch.where(kept, 1e-12, share / rows + 1e-12)
    assert_within("mean", found.mean(0), dense, within)
    assert ((found != 0).sum(-1) <= 3 + 1 + samples).all()


def test_the_expectation_of_the_gradient_is_that_of_the_dense_loss():
    on_ranks(2, _expectation)


def _compiled(rank):
    capped_layer = partial(vocab_parallel_linear_sparse_ce, softcap=CAP)
    _, logits, target = float_problem(rank)
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(SHARDS[rank], 8)
    weight.requires_grad_()
    target[2], target[3] = 10**6, IGNORED  # out of range: looked for in eager mode alone
    for way in WAYS[:3]:
        options = {"shard_sizes": SHARDS, "reduction": "none", **way}
        of_logits = torch.compile(
            lambda z, y, o=options: vocab_parallel_sparse_ce(z, y, **o), fullgraph=True
        )
        of_hidden, of_capped = (
            torch.compile(
                lambda h, w, y, o=options, c=cap: vocab_parallel_linear_sparse_ce(
                    h, w, y, softcap=c, **o
                ),
                fullgraph=True,
            )
            for cap in (None, CAP)
        )
        with pytest.raises(IndexError, match="target: expected classes in .0, 67"):
            vocab_parallel_sparse_ce(logits, target, **options)
        rest, above = target != 10**6, torch.ones(6)
        for compiled, plain, inputs in (
            (of_logits, vocab_parallel_sparse_ce, [logits]),
            (of_hidden, vocab_parallel_linear_sparse_ce, [hidden, weight]),
            (of_capped, capped_layer, [hidden, weight]),
        ):
            loss = compiled(*inputs, target)
            found = torch.autograd.grad(loss, inputs, above)
            assert loss[2].isnan() and (found[0][2] == 0).all()
            first = inputs[0][rest]
            expected = plain(first, *inputs[1:], target[rest], **options)
            if plain is capped_layer:  # on some processors a compiler's tangents round otherwise
                torch.testing.assert_close(loss[rest], expected)
            else:
                assert torch.equal(loss[rest], expected)
            of_rest = torch.autograd.grad(expected, [first, *inputs[1:]], above[rest])
            torch.testing.assert_close(found[0][rest], of_rest[0])
            torch.testing.assert_close(found[1:], of_rest[1:])


def test_compile_fullgraph():
    on_ranks(2, _compiled)


def _layers(rank):
    """Frozen parts, autocast, memory, a group of some ranks."""
    pair = dist.new_group([0, 2])
    if rank == 1:
        with pytest.raises(ValueError, match="^group: expected one that this rank is in"):
            vocab_parallel_sparse_ce(torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64), 2, pair)
        return
    rank //= 2
    rows, features, shards, chunk = 256, 16, (3000, 2000), 16 * 3000 * 4
    torch.manual_seed(0)
    hidden, weight = torch.randn(rows, features), torch.randn(sum(shards), features)
    target = torch.randint(5000, (rows,))
    own = own_classes(weight, rank, shards, 0)
    for way, softcap in itertools.product(WAYS, (None, CAP)):
        call = partial(
            vocab_parallel_linear_sparse_ce, target=target, group=pair, shard_sizes=shards,
            backward="auto" if way["k"] is None else "sparse", chunk_bytes=chunk, softcap=softcap,
            **way,
        )  # fmt: skip
        frozen_head, frozen_trunk = hidden.clone().requires_grad_(), own.clone().requires_grad_()
        both = hidden.clone().requires_grad_(), own.clone().requires_grad_()

        def step(call=call, h=frozen_head, w=frozen_trunk, both=both):
            torch.manual_seed(1)
            call(h, own).backward()
            torch.manual_seed(1)
            call(hidden, w).backward()
            torch.manual_seed(1)
            call(*both).backward()

        allocations, _ = sizes_of_allocations(step)
        torch.testing.assert_close(frozen_head.grad, both[0].grad)
        torch.testing.assert_close(frozen_trunk.grad, both[1].grad)
        lists = 4 * rows * (2 * way["k"] + 2) * 2 if way["k"] else 0
        assert max(allocations) <= max(chunk, own.nbytes, lists, 4 * rows * 32) < 4 * rows * 2000
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logits = torch.nn.functional.linear(hidden, own)
            torch.manual_seed(1)
            loss = call(hidden, own)
        if way == {"k": 5} and softcap is not None:  # a list is capped in float32
            continue
        logits = capped(logits, softcap)
        torch.manual_seed(1)
        options = {"shard_sizes": shards, **way}
        with torch.no_grad():
            assert torch.equal(
                loss, vocab_parallel_sparse_ce(logits, target, group=pair, **options)
            )


def test_layers_in_a_group_of_some_ranks():
    on_ranks(3, _layers)


def _layouts(rank):
    """What lies elsewhere in memory is what lies in order; and options that one way alone has."""
    whole, logits, target = float_problem(rank, (4, 6))
    ids = torch.stack([target, target + 1], -1)
    assert not ids[..., 0].is_contiguous()
    columns = logits.detach().transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_()
    hidden, weight = torch.randn(6, 4, 16).transpose(0, 1), torch.randn(16, SHARDS[rank]).t()
    for way in WAYS:
        options = {"shard_sizes": SHARDS, "ignore_index": int(target[0, 0]), **way}
        results = []
        for z, y, h, w in (
            (logits, target, hidden.contiguous(), weight.contiguous()),
            (columns, ids[..., 0], hidden, weight),
        ):
            torch.manual_seed(1)
            loss = vocab_parallel_sparse_ce(z, y, **options)
            h, w = h.requires_grad_(), w.requires_grad_()
            of_layer = vocab_parallel_linear_sparse_ce(h, w, y, **options)
            found = torch.autograd.grad(loss + of_layer, (z, h, w))
            results.append((loss, of_layer, *found))
        for plain, strided in zip(*results, strict=True):
            torch.testing.assert_close(plain, strided)
        # rows of two dimensions, one of them strided, are read where they are
        rows = torch.randn(8, 9, 3000)[:, :-1]
        y = torch.zeros(8, 8, dtype=torch.int64)
        allocations, _ = sizes_of_allocations(partial(vocab_parallel_sparse_ce, rows, y, **way))
        assert max(allocations) < rows.numel()

        torch.manual_seed(1)
        vocab_parallel_sparse_ce(logits, target, **options)
        after = torch.random.get_rng_state()
        torch.manual_seed(1)
        with torch.no_grad():
            vocab_parallel_sparse_ce(logits, target, **options)
        assert torch.equal(torch.random.get_rng_state(), after)
        torch.manual_seed(1)
        call = partial(vocab_parallel_sparse_ce, **options)
        checkpoint(call, logits, target, use_reentrant=True).backward()
        torch.testing.assert_close(logits.grad, results[0][2])
        logits.grad = None

        # a shard of which nothing is possible: padded classes
        bias = torch.full((SHARDS[rank],), -torch.inf if rank else 0.0)
        h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        y = target % SHARDS[0]
        of_layer = vocab_parallel_linear_sparse_ce(h, w, y, bias=bias, shard_sizes=SHARDS, **way)
        dhidden, dweight = torch.autograd.grad(of_layer, (h, w))
        assert of_layer.isfinite() and dhidden.isfinite().all() and dweight.isfinite().all()
        assert (dweight == 0).all() == bool(rank)

    call = partial(vocab_parallel_sparse_ce, logits, target, shard_sizes=SHARDS)
    _, support = call(k=5, return_support=True)
    assert support.to_sparse_csr().shape == (24, sum(SHARDS))
    with pytest.raises(RuntimeError, match="expected a call outside of torch.func"):
        torch.func.grad(lambda z: vocab_parallel_sparse_ce(z, target, 5, shard_sizes=SHARDS))(
            logits.detach()
        )
    with pytest.raises(ValueError, match="^k: expected k < 20, the classes of the smallest shard"):
        call(k=30, normalizer="full")
    with pytest.raises(IndexError, match="^target: expected classes in"):
        vocab_parallel_linear_sparse_ce(hidden, weight, target + 67, 5, shard_sizes=SHARDS)

    # beyond what the list regime of one shard has
    shards = (1500, 700)
    whole, logits, target = float_problem(rank, (3,), shards)
    loss, support = vocab_parallel_sparse_ce(
        logits, target, 1100, shard_sizes=shards, return_support=True
    )
    truth = Truth(whole, target, 1100)
    truth.assert_loss(vocab_parallel_sparse_ce(
        logits, target, 1100, shard_sizes=shards, reduction="none"
    ))  # fmt: skip
    assert torch.equal(support.indices.long(), truth.indices)


def test_layouts_and_options():
    on_ranks(2, _layouts)


def _schedule(rank):
    """One graph for the k of a schedule, beyond what the smallest shard has and below."""
    whole, logits, target = float_problem(rank)
    step = torch.compile(
        lambda z, y, k: vocab_parallel_sparse_ce(z, y, k, shard_sizes=SHARDS), fullgraph=True
    )
    for k in (60, 50, 30, 28, 9, 5):
        loss = step(logits, target, k)
        torch.testing.assert_close(loss.double(), reference.sparse_ce(whole, target, k))
        (found,) = torch.autograd.grad(loss, logits)
        eager = vocab_parallel_sparse_ce(logits, target, k, shard_sizes=SHARDS)
        torch.testing.assert_close(found, torch.autograd.grad(eager, logits)[0])


def test_a_compiled_step_whose_k_shrinks():
    on_ranks(2, _schedule)


def _mistakes(rank):
    target = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"^shard_sizes: expected \[5, 6\].*, got \[(5, 5|6, 6)\]"):
        vocab_parallel_sparse_ce(torch.zeros(3, 5 + rank), target, 2)
    with pytest.raises(ValueError, match=r"^shard_sizes: expected \[5, 6\].*, got \[(5, 5|6, 6)\]"):
        vocab_parallel_sparse_ce(torch.zeros(3, 5 + rank), target, None)
    with pytest.raises(ValueError, match="^shard_sizes: expected"):  # before a target of the other
        vocab_parallel_sparse_ce(torch.zeros(3, 5 + rank), target + 10, 2)
    logits, weight = torch.zeros(3, 5), torch.zeros(5, 2)
    for name, call in (
        ("target", lambda: vocab_parallel_sparse_ce(logits, target + rank, 2)),
        ("target.shape", lambda: vocab_parallel_sparse_ce(logits[rank:], target[rank:], 2)),
        ("k", lambda: vocab_parallel_sparse_ce(logits, target, 2 + rank)),
        ("k", lambda: vocab_parallel_sparse_ce(logits, target, rank or None)),
        ("reduction", lambda: vocab_parallel_sparse_ce(
            logits, target, 2, reduction=("sum", "mean")[rank]
        )),
        ("dtype", lambda: vocab_parallel_sparse_ce(logits.half() if rank else logits, target, 2)),
        ("hidden.requires_grad", lambda: vocab_parallel_linear_sparse_ce(
            torch.zeros(3, 2, requires_grad=rank == 1), weight, target, 2
        )),
        ("softcap", lambda: vocab_parallel_linear_sparse_ce(
            torch.zeros(3, 2), weight, target, 2, softcap=(None, 2.0)[rank]
        )),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{name}: expected the same on every rank, got "):
            call()
    for wrong, kind, message in (
        ((5, 6, 7), ValueError, "expected one for each of 2 ranks, got 3"),
        ((4, 4), ValueError, "expected 5, what this rank has, at shard_sizes"),
        ((5, 0), ValueError, "expected at least 1 class of each rank, got 0"),
        ((5, 5.0), TypeError, "expected ints, got float"),
        (5, TypeError, "expected a sequence of ints or None, got int"),
    ):
        with pytest.raises(kind, match=f"^shard_sizes: {message}"):
            vocab_parallel_sparse_ce(torch.zeros(3, 5), target, 2, shard_sizes=wrong)
    with pytest.raises(TypeError, match="^group: expected a ProcessGroup or None, got str"):
        vocab_parallel_sparse_ce(torch.zeros(3, 5), target, 2, "all")
    for wrong, kind in ((0.0, ValueError), (math.inf, ValueError), ("2", TypeError)):
        with pytest.raises(kind, match="^softcap: expected"):
            vocab_parallel_linear_sparse_ce(torch.zeros(3, 2), weight, target, 2, softcap=wrong)
    with pytest.raises(ValueError, match="^k: expected k < 5, the classes of the smallest shard"):
        vocab_parallel_sparse_ce(torch.zeros(3, 5), target, 5, normalizer="full")
    with pytest.raises(IndexError, match=r"^target: expected classes in \[0, 10\)"):
        vocab_parallel_sparse_ce(torch.zeros(3, 5), target + 10, 2)


def test_mistakes():
    on_ranks(2, _mistakes)


@pytest.mark.parametrize(
    "arguments", [(torch.zeros(2, 4),), (torch.zeros(2, 3), torch.zeros(4, 3))]
)
def test_without_a_process_group(arguments, monkeypatch):
    # where there is one GPU, this process has a group as long as the cases above need it
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    call = vocab_parallel_sparse_ce if len(arguments) == 1 else vocab_parallel_linear_sparse_ce
    with pytest.raises(RuntimeError, match="^group: expected torch.distributed to be initialised"):
        call(*arguments, torch.zeros(2, dtype=torch.int64), 2)


def test_without_numpy(tmp_path):
    """Without which torch has no all_gather_object."""
    program = f"""
import sys
sys.modules["numpy"] = None
import torch
from sparse_ce import vocab_parallel_sparse_ce
torch.distributed.init_process_group("gloo", "file://{tmp_path}/ranks", rank=0, world_size=1)
print(vocab_parallel_sparse_ce(torch.zeros(2, 4), torch.tensor([0, 3]), 2).item())
torch.distributed.destroy_process_group()
"""
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(math.log(2))


@pytest.mark.parametrize("samples", [None, 0, 6], ids=str)
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("softcap", [None, CAP], ids=["", "capped"])
def test_opcheck(subject, samples, sparse, softcap):
    pytest.importorskip("expecttest", reason="torch.library.opcheck imports expecttest")
    hidden, weight, bias, target = layer(torch.float32, (5,), True, subject.device, CLASSES)
    logits = torch.nn.functional.linear(hidden, weight, bias).detach().requires_grad_()
    target[:2] = torch.tensor([-3, CLASSES])  # of other shards
    uniform = torch.rand(5).to(subject.device) if samples else None
    lists = (4, samples, torch.float32, 2, softcap, sparse, subject.backend)
    for op, inputs in (
        (parallel.listed_fwd, (logits, target, uniform, 4, samples, subject.backend)),
        (parallel.listed_linear_fwd, (hidden, weight, bias, target, uniform, *lists)),
    ):
        torch.library.opcheck(op.overload, inputs)
    values, classes, *_ = parallel.listed_fwd(logits, target, uniform, 4, samples, subject.backend)
    above = torch.randn_like(values).detach()
    rest = (4, CLASSES, torch.float32, subject.backend)
    torch.library.opcheck(parallel.listed_bwd.overload, (above, classes, *rest))
    rest = (4, torch.float32, 2, sparse, [True] * 3, subject.backend)
    leaves = hidden.detach(), weight.detach()
    torch.library.opcheck(parallel.listed_linear_bwd.overload, (above, classes, *leaves, *rest))
