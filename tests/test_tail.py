"""normalizer="full" and tail_samples: what is outside of the list, and the loss of all classes
whose gradient is sparse.

The operator's contract is in integers: with the p of its own row_max and log_sum the draws follow
exactly, so that a draw is checked against float64 up to the error of p. Of the loss the truth is
the dense loss of reference.py; of a sampled gradient its mean over a grid of uniforms is.
"""

import cases
import pytest
import subjects
import torch
import torch.nn.functional as F
from closeness import Truth, assert_within, probability_units, with_rounding
from sparse_ce import (
    MonotonicPLIF,
    SparseCrossEntropyLoss,
    SparseLinearCrossEntropy,
    fused_linear_sparse_ce,
    fused_sparse_ce,
    ops,
    reference,
)
from sparse_ce import tail as composition
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint


def listed(logits: Tensor, k: int) -> Tensor:
    """(N, k) int32 in the order of topk_ce: the truth of cases is quicker than a kernel's."""
    target = torch.zeros(logits.shape[:-1], dtype=torch.int64)
    return Truth(logits, target.flatten(), k).indices.view(*target.shape, k).int()


def tail(subject, logits, target, indices, uniform, samples):
    moved = [None if t is None else t.to(subject.device) for t in (target, indices, uniform)]
    found = ops.tail_fwd(logits.to(subject.device), *moved, samples, subject.backend)
    return [t.cpu() for t in found]


def statistics(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_normaliser(logits, row_max, log_sum):
    z = logits.double()
    finite = z.amax(-1).isfinite()
    assert torch.equal(row_max.double()[finite], z.amax(-1)[finite])
    truth = Truth(logits, torch.zeros(z.shape[0], dtype=torch.int64), z.shape[-1])
    truth.assert_lse(torch.where(finite, log_sum + row_max, torch.nan))


def assert_draws(logits, target, indices, uniform, mass, draws, log_sum):
    """Of the tail alone, ascending; each where a cumulative sum in float64 has it, up to the errors
    of p (closeness.py), and to what each class loses by rounding down.
    """
    z, samples = logits.double(), draws.shape[-1]
    for n in range(z.shape[0]):
        if not log_sum[n].isfinite():
            assert (draws[n] == -1).all() and mass[n].isnan()
            continue
        p = torch.softmax(z[n], -1)
        p[indices[n].long()] = 0
        if 0 <= target[n] < z.shape[-1]:
            p[target[n]] = 0
        unit = torch.finfo(mass.dtype).eps
        error = 2 * torch.special.entr(p) + probability_units(p.numel()) * p
        error = unit * error + 2.0**-52
        assert (mass[n].double() - p.sum()).abs() <= error.sum() + unit * p.sum()
        if (draws[n] == -1).all():
            assert p.sum() <= (samples + p.numel()) * 2.0**-52 and mass[n] == 0
            continue
        found = draws[n].long()
        assert (found >= 0).all() and (found.diff() >= 0).all() and (p[found] > 0).all()
        place = (uniform[n].double() + torch.arange(samples)) * p.sum() / samples
        after = p.cumsum(-1)[found]
        slack = error.sum() + samples * 2.0**-52
        assert (after - p[found] <= place + slack).all() and (place <= after + slack).all()


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "classes, k, samples",
    [
        (2, 1, 1),
        (5, 2, 3),
        (37, 5, 8),
        (203, 20, 64),
        (1003, 20, 64),
        (1003, 300, 7),
        (5001, 20, 64),
        (8192, 100, 129),
    ],
    ids=str,
)
def test_draws(subject, dtype, classes, k, samples):
    rows = 3 if subjects.INTERPRETING else 9
    logits = cases.logits("random", rows, classes, dtype)
    target, indices = cases.targets(logits, k), listed(logits, k)
    uniform = torch.rand(rows, dtype=statistics(dtype))
    uniform[0] = 0
    row_max, log_sum, mass, draws = tail(subject, logits, target, indices, uniform, samples)
    assert draws.dtype == torch.int32 and draws.shape == (rows, samples)
    assert_normaliser(logits, row_max, log_sum)
    assert_draws(logits, target, indices, uniform, mass, draws, log_sum)


@pytest.mark.interpreter
@pytest.mark.parametrize("filler", sorted(cases.FILLERS))
def test_edges(subject, filler):
    rows = 3 if subjects.INTERPRETING else 9
    dtype = torch.bfloat16 if "stride" in filler else torch.float32
    logits = cases.logits(filler, rows, 203, dtype)
    target, indices = cases.targets(logits, 20), listed(logits, 20)
    uniform = torch.rand(rows)
    row_max, log_sum, mass, draws = tail(subject, logits, target, indices, uniform, 16)
    if filler != "wide":  # whose distances from the maximum overflow
        assert_normaliser(logits, row_max, log_sum)
    assert_draws(logits, target, indices, uniform, mass, draws, log_sum)


@pytest.mark.interpreter
@pytest.mark.parametrize("layout", sorted(cases.LAYOUTS))
def test_layouts(subject, layout):
    logits = cases.LAYOUTS[layout](cases.logits("random", 6, 203, torch.bfloat16).view(2, 3, 203))
    flat = logits.flatten(0, -2)
    target, indices = torch.arange(flat.shape[0]) * 31, listed(flat, 20)
    uniform = torch.linspace(0, 0.9, flat.shape[0])
    shape = logits.shape[:-1]
    found = tail(
        subject, logits, target.view(shape), indices.view(*shape, 20), uniform.view(shape), 16
    )
    row_max, log_sum, mass, draws = (t.flatten(0, len(shape) - 1) for t in found)
    assert_normaliser(flat, row_max, log_sum)
    assert_draws(flat, target, indices, uniform, mass, draws, log_sum)


@pytest.mark.interpreter
def test_without_draws(subject):
    logits = cases.logits("random", 3, 203, torch.float32)
    target, indices = cases.targets(logits, 20), listed(logits, 20)
    row_max, log_sum, mass, draws = tail(subject, logits, target, indices, None, 0)
    assert_normaliser(logits, row_max, log_sum)
    assert (mass == 0).all() and draws.shape == (3, 0)
    nothing = tail(subject, logits[:0], target[:0], indices[:0], torch.rand(0), 5)
    assert [t.shape for t in nothing] == [(0,), (0,), (0,), (0, 5)]


# The loss.


def loss_of(subject, logits, target, weight, uniform, k, samples, smoothing):
    """loss, lse, classes and probs, on the CPU."""
    moved = [None if t is None else t.to(subject.device) for t in (logits, target, weight, uniform)]
    found = composition.tail_ce_fwd(*moved, k, samples, smoothing, subject.backend)
    return [t.cpu() for t in found]


def gradient_of(subject, above, target, classes, probs, weight, k, smoothing, logits):
    moved = [None if t is None else t.to(subject.device) for t in (*above, target, classes, probs)]
    weight = None if weight is None else weight.to(subject.device)
    rest = (weight, k, smoothing, logits.shape[-1], logits.dtype, subject.backend)
    return composition.tail_ce_bwd(*moved, *rest).cpu()


def dense_gradient(logits, target, weight, k, smoothing, a, b):
    """(N, V) of sum(a loss + b lse), in float64, and how closely: the probability errs as in a
    softmax of all classes, what smoothing and target add by three roundings.
    """
    z = logits.double().requires_grad_()
    hit = (target >= 0) & (target < z.shape[-1])
    loss = reference.sparse_ce(
        z, target.where(hit, -100), k, weight=weight, label_smoothing=smoothing,
        normalizer="full", reduction="none",
    )  # fmt: skip
    a = a.double().where(hit, 0)
    (expected,) = torch.autograd.grad((a * loss + b.double() * z.logsumexp(-1)).sum(), z)
    w = torch.ones(z.shape[-1]) if weight is None else weight
    index = reference.support_indices(logits, k)
    y = target.where(hit, 0)
    at_target = a * (1 - smoothing) * w[y]
    spread = a.unsqueeze(-1) * smoothing / k * w[index]
    p = z.detach().softmax(-1)
    unit = torch.finfo(statistics(logits.dtype)).eps * (2 if logits.dtype == torch.float64 else 1)
    total = at_target.abs() + spread.abs().sum(-1) + b.double().abs()
    tolerance = 2 * torch.special.entr(p) + (probability_units(z.shape[-1]) + 8) * p
    tolerance = tolerance * total.unsqueeze(-1)
    tolerance.scatter_add_(-1, index, 3 * spread.abs().double())
    tolerance.scatter_add_(-1, y.unsqueeze(-1), 3 * at_target.abs().double().unsqueeze(-1))
    tolerance = unit * tolerance + torch.finfo(statistics(logits.dtype)).tiny
    return expected, tolerance, total


@pytest.mark.interpreter
@pytest.mark.parametrize("smoothing, weighted", [(0.0, False), (0.1, True)])
@pytest.mark.parametrize(
    "classes, k, samples", [(37, 5, 0), (203, 20, 0), (203, 20, 16), (37, 5, 40)], ids=str
)
def test_loss_and_gradient(subject, dtype, classes, k, samples, smoothing, weighted):
    """Of support and target the gradient of the dense loss, of the draws T / samples in place of p,
    and zeros. A list may be longer than a row.
    """
    rows = 3 if subjects.INTERPRETING else 9
    logits = cases.logits("random", rows, classes, dtype)
    target = cases.targets(logits, k)
    weight = torch.rand(classes, dtype=statistics(dtype)) + 0.5 if weighted else None
    uniform = torch.rand(rows, dtype=statistics(dtype)) if samples else None
    loss, lse, listed, probs = loss_of(
        subject, logits, target, weight, uniform, k, samples, smoothing
    )
    truth = Truth(logits, target, classes, weight)
    truth.assert_lse(lse)
    hit = (target >= 0) & (target < classes)
    of_all = reference.sparse_ce(
        logits, target.where(hit, -100), k, weight=weight, label_smoothing=smoothing,
        normalizer="full", reduction="none",
    )  # fmt: skip
    # smoothing adds the terms of k classes, each as large as a loss
    within = truth.loss_tolerance + truth.unit * (8 * of_all.abs() + 32 * smoothing)
    assert_within("loss", loss, of_all.masked_fill(~hit, torch.nan), within)

    above = [torch.randn(rows, dtype=loss.dtype) for _ in range(2)]
    dlogits = gradient_of(
        subject, (*above, None), target, listed, probs, weight, k, smoothing, logits
    )
    dense, tolerance, total = dense_gradient(logits, target, weight, k, smoothing, *above)
    kept = torch.zeros_like(dense, dtype=torch.bool)
    kept.scatter_(-1, listed[:, :k].long(), True)
    kept[hit, target[hit]] = True
    expected, tolerance = dense.where(kept, 0), tolerance.where(kept, 0)
    if samples:
        times = torch.zeros_like(dense).scatter_add_(
            -1, listed[:, k + 1 :].long(), torch.ones(rows, samples).double()
        )
        assert not (kept & (times > 0)).any() and (times.sum(-1) == samples).all()
        signed = above[0].double().where(hit, 0)
        w = torch.ones(classes) if weight is None else weight
        factor = (1 - smoothing) * w[target.where(hit, 0)] + smoothing * w[
            listed[:, :k].long()
        ].mean(-1)
        mass = logits.double().softmax(-1).masked_fill(kept, 0).sum(-1)
        share = (signed * factor + above[1].double()) * mass / samples
        expected = (expected + share.unsqueeze(-1) * times).detach()
        units = 2 * truth.probs.log().abs().amax() + probability_units(classes) + 16
        # what each class loses by rounding down
        error = truth.unit * units * mass + classes * 2.0**-52
        tolerance = tolerance + (total * error / samples).unsqueeze(-1) * times
    assert_within("dlogits", dlogits, expected, with_rounding(expected, tolerance, dtype))
    assert ((dlogits != 0).sum(-1) <= k + 1 + samples).all()


@pytest.mark.interpreter
def test_mean_over_draws_is_the_dense_gradient(subject):
    """Over a grid of S uniforms class i is drawn S samples p_i / T times, up to one."""
    steps, samples, k = (16 if subjects.INTERPRETING else 256), 8, 5
    row = cases.logits("random", 1, 61, torch.float32)
    for y in (int(row.argmax()), int(row.argmin())):
        logits, target = row.expand(steps, -1).contiguous(), torch.full((steps,), y)
        uniform = (torch.arange(steps) + 0.5) / steps
        _, _, listed, probs = loss_of(subject, logits, target, None, uniform, k, samples, 0.0)
        above = (torch.ones(steps), None, None)
        dlogits = gradient_of(subject, above, target, listed, probs, None, k, 0.0, logits)
        p = row.double().softmax(-1)[0]
        mass = 1 - p[listed[0, :k].long()].sum() - (p[y] if y not in listed[0, :k] else 0)
        dense = p - F.one_hot(torch.tensor(y), 61)
        tolerance = mass / (samples * steps) + 64 * torch.finfo(torch.float32).eps
        assert_within("mean", dlogits.double().mean(0), dense, tolerance)
        # each by itself adds up to nothing, as the dense one
        assert dlogits.double().sum(-1).abs().max() < 64 * torch.finfo(torch.float32).eps


@pytest.mark.interpreter
def test_a_class_that_is_drawn_many_times(subject):
    """Nearly all of the tail is one class; in the list the others are as likely as it."""
    logits = torch.full((2, 37), -30.0)
    logits[:, [3, 5, 20]] = 1.0
    target = torch.tensor([5, 30])
    above, uniform = (torch.ones(2), None, None), torch.tensor([0.2, 0.9])
    loss, _, listed, probs = loss_of(subject, logits, target, None, uniform, 2, 7, 0.0)
    assert listed[:, :2].tolist() == [[3, 5]] * 2 and (listed[:, 3:] == 20).all()
    dlogits = gradient_of(subject, above, target, listed, probs, None, 2, 0.0, logits)
    third = 1 / 3
    for n, at_target in ((0, third - 1), (1, -1.0)):
        found = {i: float(dlogits[n, i]) for i in dlogits[n].nonzero().flatten().tolist()}
        expected = {3: third, 5: third, 20: third, int(target[n]): at_target}
        assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.interpreter
@pytest.mark.parametrize("filler", ["one_nan", "plus_inf", "all_minus_inf", "99_percent_minus_inf"])
def test_gradient_at_the_edges(subject, filler):
    """No gradient where none is asked for, NaN or not; else NaN where the dense one is."""
    logits = cases.logits(filler, 4, 203, torch.float32)
    target = logits.nan_to_num(-torch.inf, -torch.inf).argmax(-1)
    loss, _, listed, probs = loss_of(
        subject, logits, target, None, torch.full((4,), 0.5), 20, 8, 0.0
    )
    assert ((listed >= 0) & (listed < 203)).all()
    dloss = torch.tensor([1.0, 0.0, 1.0, 0.0])
    dlogits = gradient_of(
        subject, (dloss, None, None), target, listed, probs, None, 20, 0.0, logits
    )
    assert (dlogits[1::2] == 0).all()
    dense = F.cross_entropy(logits, target, reduction="none")
    assert torch.equal(loss.isnan(), dense.isnan())
    assert torch.equal(dlogits[::2].isnan().any(-1), dense[::2].isnan())


# The functions.


def full(subject, logits, target, k=20, **options):
    options = {"normalizer": "full", "backend": subject.backend, **options}
    return fused_sparse_ce(logits, target, k, **options)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weight"])
@pytest.mark.parametrize("samples", [0, 16])
def test_loss_is_that_of_cross_entropy(subject, reduction, weighted, samples):
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 203, device=subject.device).requires_grad_()
    target = torch.randint(0, 203, (2, 5), device=subject.device)
    target[0, 3] = -100
    weight = torch.rand(203, device=subject.device) if weighted else None
    options = {"weight": weight, "reduction": reduction}
    ours = full(subject, logits, target, tail_samples=samples, **options)
    theirs = F.cross_entropy(logits.movedim(-1, 1), target, **options)
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    above = torch.rand_like(ours)
    (gradient,) = torch.autograd.grad(ours, logits, above)
    assert (gradient[0, 3] == 0).all()
    assert ((gradient != 0).sum(-1) <= 21 + samples).all()


@pytest.mark.float64
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_derivative_of_every_output(subject, smoothing):
    """Where only the target is outside of the list nothing is dropped."""
    torch.manual_seed(0)
    logits = (torch.randperm(28).double() / 10).view(4, 7)
    target = logits.argmin(-1).to(subject.device)
    leaf = logits.to(subject.device).requires_grad_()

    def outputs(z):
        loss, support = full(
            subject, z, target, k=6, label_smoothing=smoothing, tail_samples=3, reduction="none",
            return_support=True,
        )  # fmt: skip
        return loss, support.lse, support.probs, support.tail_mass()

    assert gradcheck(outputs, leaf)
    loss = outputs(leaf)[0].sum()
    (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="expected a first derivative only"):
        first.sum().backward()


def test_support_and_evaluation(subject):
    torch.manual_seed(0)
    logits = torch.randn(4, 203, device=subject.device)
    target = torch.randint(0, 203, (4,), device=subject.device)
    with torch.no_grad():
        loss, support = full(subject, logits, target, tail_samples=64, return_support=True)
    p = logits.double().softmax(-1)
    assert support.indices.shape == support.probs.shape == (4, 20)
    assert torch.allclose(support.probs.double(), p.gather(-1, support.indices.long()), rtol=1e-5)
    assert torch.allclose(support.tail_mass().double(), 1 - support.probs.double().sum(-1))
    assert torch.allclose(support.lse.double(), logits.double().logsumexp(-1))
    plain = fused_sparse_ce(logits, target, 20, return_support=True, backend=subject.backend)[1]
    assert (plain.tail_mass().abs() < 1e-6).all()
    # all classes: there is no tail
    dense = full(subject, logits, target, k=None, tail_samples=64)
    assert torch.allclose(dense, loss, rtol=1e-6)


def test_draws_follow_the_generator(subject):
    torch.manual_seed(0)
    logits = torch.randn(4, 203, device=subject.device).requires_grad_()
    target = torch.randint(0, 203, (4,), device=subject.device)

    def gradient(seed):
        torch.manual_seed(seed)
        return torch.autograd.grad(full(subject, logits, target, tail_samples=8), logits)[0]

    assert torch.equal(gradient(1), gradient(1)) and not torch.equal(gradient(1), gradient(2))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_draw_as_the_plain_function_does(subject, reentrant):
    """The same in both passes, and anew in each step."""
    torch.manual_seed(0)
    logits = torch.randn(4, 203, device=subject.device).requires_grad_()
    target = torch.randint(0, 203, (4,), device=subject.device)

    def loss(z):
        return full(subject, z, target, tail_samples=8)

    def steps(function):
        torch.manual_seed(1)
        found = []
        for _ in range(2):
            logits.grad = None
            function(logits).backward()
            found.append(logits.grad)
        return found

    expected = steps(loss)
    found = steps(lambda z: checkpoint(loss, z, use_reentrant=reentrant))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not torch.equal(*found)


@pytest.mark.parametrize("backward", ["sparse", "dense"])
@pytest.mark.parametrize("samples", [0, 16])
def test_linear_form(subject, samples, backward):
    """As of the logits: in float64, where the products of chunks differ in nothing that decides."""
    torch.manual_seed(0)
    dtype = torch.float64 if torch.float64 in subject.dtypes else torch.float32
    shapes = ((2, 9, 16), (203, 16), (203,))
    leaves = [torch.randn(s, device=subject.device, dtype=dtype).requires_grad_() for s in shapes]
    hidden, weight, bias = leaves
    target = torch.randint(0, 203, (2, 9), device=subject.device)
    options = {"label_smoothing": 0.1, "normalizer": "full", "tail_samples": samples}
    options["backend"] = subject.backend
    torch.manual_seed(1)
    logits = F.linear(hidden, weight, bias)
    loss = fused_sparse_ce(logits, target, 20, **options)
    torch.manual_seed(1)
    ours = fused_linear_sparse_ce(
        hidden, weight, target, 20, bias=bias, backward=backward,
        chunk_bytes=4 * 203 * dtype.itemsize, **options,
    )  # fmt: skip
    close = (
        {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-6}
    )
    assert torch.allclose(ours, loss, **close)
    for a, b in zip(*(torch.autograd.grad(x, leaves) for x in (ours, loss)), strict=True):
        assert torch.allclose(a, b, **close)


def test_row_sparse_gradient(subject):
    torch.manual_seed(0)
    hidden = torch.randn(9, 16, device=subject.device)
    weight = torch.randn(1003, 16, device=subject.device).requires_grad_()
    target = torch.randint(0, 1003, (9,), device=subject.device)
    found = []
    for kind in ("dense", "row_sparse"):
        torch.manual_seed(1)
        loss = fused_linear_sparse_ce(
            hidden, weight, target, 5, normalizer="full", tail_samples=4, weight_grad=kind,
            backward="sparse", backend=subject.backend,
        )  # fmt: skip
        found.append(torch.autograd.grad(loss, weight)[0])
    assert found[1].is_sparse and found[1]._nnz() <= 90
    assert torch.equal(found[1].to_dense(), found[0])


def test_saved_is_of_the_size_of_the_lists(subject):
    logits = cases.logits("random", 9, 1003, torch.bfloat16).to(subject.device).requires_grad_()
    target, sizes = torch.arange(9, device=subject.device), {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.update({t.data_ptr(): t.nbytes}) or t, lambda t: t
    ):
        full(subject, logits, target, tail_samples=16)
    assert sum(sizes.values()) <= 9 * (37 * 8 + 64)


def test_compiled_equals_eager(subject):
    def function(z, y):
        loss, support = full(subject, z, y, tail_samples=8, return_support=True)
        return loss + support.lse.mean()

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    logits = cases.logits("random", 9, 203, torch.float32).to(subject.device).requires_grad_()
    target = torch.arange(9, device=subject.device)
    found = []
    for f in (compiled, function):
        torch.manual_seed(1)
        loss = f(logits, target)
        found.append((loss, torch.autograd.grad(loss, logits)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("samples", [0, 3])
def test_opcheck(subject, samples):
    pytest.importorskip("expecttest", reason="torch.library.opcheck imports expecttest")
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 11, device=subject.device).requires_grad_()
    target = torch.randint(0, 11, (2, 3), device=subject.device)
    uniform = torch.rand(2, 3, device=subject.device) if samples else None
    indices = logits.detach().sort(-1, descending=True).indices[..., :4].int().contiguous()
    arguments = (logits.detach(), target, indices, uniform, samples, subject.backend)
    torch.library.opcheck(ops.tail_fwd.overload, arguments)
    arguments = (logits, target, None, uniform, 4, samples, 0.1, subject.backend)
    torch.library.opcheck(composition.tail_ce_fwd.overload, arguments)


def test_modules_hold_the_options():
    criterion = SparseCrossEntropyLoss(5, normalizer="full", tail_samples=3)
    assert repr(criterion) == "SparseCrossEntropyLoss(k=5, normalizer='full', tail_samples=3)"
    logits, target = torch.randn(4, 37).requires_grad_(), torch.arange(4)
    assert torch.allclose(criterion(logits, target), F.cross_entropy(logits, target))
    criterion.normalizer, criterion.tail_samples = "topk", 0
    assert torch.equal(criterion(logits, target), fused_sparse_ce(logits, target, 5))
    head = SparseLinearCrossEntropy(8, 37, 5, normalizer="full")
    hidden = torch.randn(4, 8)
    assert torch.allclose(head(hidden, target), F.cross_entropy(head(hidden), target))


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"normalizer": "all"}, ValueError, "normalizer: expected one of topk, full, got 'all'"),
        ({"tail_samples": 3}, ValueError, "tail_samples: expected 0 with normalizer='topk'"),
        ({"normalizer": "full", "tail_samples": -1}, ValueError, "tail_samples: expected 0 <="),
        ({"normalizer": "full", "tail_samples": 1.5}, TypeError, "tail_samples: expected an int"),
        (
            {"normalizer": "full", "link": MonotonicPLIF(8)},
            ValueError,
            "link: expected None with normalizer='full', got a MonotonicPLIF",
        ),
    ],
)
def test_errors(options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        fused_sparse_ce(torch.randn(3, 37), torch.arange(3), 5, **options)
