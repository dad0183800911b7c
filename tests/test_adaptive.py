"""Adaptive sparse softmax: the choice of the classes, the loss on them, the schedule of
accumulation. Several labels per row have test_labels.py.

The kept classes of a row are its n largest, ties together: for that n the truth of a row is that of
the top-k loss.
"""

import itertools

import cases
import pytest
import subjects
import torch
import torch.nn.functional as F
from closeness import Truth
from sparse_ce import AdaptiveAccumulation, adaptive_sparse_ce, ops, reference
from torch.autograd import gradcheck, gradgradcheck

# The example of the authors' README.
LOGITS = [[1.2, 1.5, 1.0, -0.35], [2.5, 3.5, 0.4, 0.3], [2.5, 3.5, 0.4, 0.3]]


def threshold(subject, logits, target, delta, weight=None, smoothing=0.0):
    moved = [None if t is None else t.to(subject.device) for t in (logits, target, weight)]
    return ops.threshold_ce_fwd(*moved, logits.shape[-1], delta, smoothing, subject.backend)


def confident(rows, classes, dtype):
    """Targets that lead by more and more, until nothing else is left."""
    logits = cases.logits("random", rows, classes, dtype)
    target = torch.arange(rows) * 7 % classes
    lead = torch.linspace(-2, 25, rows).to(dtype)
    return logits.scatter_add(-1, target.unsqueeze(-1), lead.unsqueeze(-1)), target


@pytest.mark.interpreter
@pytest.mark.parametrize("smoothing, weighted", [(0.0, False), (0.1, True)])
@pytest.mark.parametrize("delta", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("classes", [203, 1003])
def test_kept_classes_and_their_loss(subject, dtype, classes, delta, smoothing, weighted):
    rows = 4 if subjects.INTERPRETING else 9
    logits, target = confident(rows, classes, dtype)
    weight = torch.rand(classes) + 0.5 if weighted else None
    if weight is not None and dtype == torch.float64:
        weight = weight.double()
    outputs = threshold(subject, logits, target, delta, weight, smoothing)
    loss, lse, row_max, log_sum, cut, cut_index, kept = (o.cpu() for o in outputs)
    expected = reference.adaptive_kept(logits, target, delta)
    torch.manual_seed(1)
    above = [torch.randn(rows, dtype=loss.dtype) for _ in range(2)]
    on_device = [t.to(subject.device) for t in (*above, logits, target)]
    dlogits = ops.threshold_ce_bwd(
        *on_device, *outputs[2:], None if weight is None else weight.to(subject.device), smoothing,
        subject.backend,
    ).cpu()  # fmt: skip
    for n in range(rows):
        z, y, k = logits[n : n + 1], target[n : n + 1], int(kept[n])
        found = ~(z[0].double() < float(cut[n]))
        assert int(found.sum()) == k and bool(found[y]) and int(cut_index[n]) == classes - 1
        # a probability is right to some units of the distance to its maximum, here below 32 of them
        p = torch.softmax(z[0].double(), -1)
        margin = ((p[y] - p) - delta).abs()
        unsure = margin <= 64 * torch.finfo(loss.dtype).eps * p[y]
        assert (found == expected[n])[~unsure].all()
        truth = Truth(z, y, k, weight, smoothing)
        truth.assert_loss(loss[n : n + 1])
        truth.assert_lse(lse[n : n + 1])
        a = above[0][n : n + 1] * (0 if k == 1 else 1)  # exactly no gradient of a loss that is 0
        truth.assert_gradient(dlogits[n : n + 1], a, above[1][n : n + 1])
    assert 1 in kept and kept.max() == classes or delta == 0


@pytest.mark.interpreter
@pytest.mark.parametrize("filler", ["ties", "constant", "one_nan", "both_inf", "all_minus_inf"])
def test_edges(subject, filler):
    logits = cases.logits(filler, 3, 203, torch.float32)
    target = logits.nan_to_num(-torch.inf).argmax(-1)
    outputs = [o.cpu() for o in threshold(subject, logits, target, 0.1)]
    dense = [o.cpu() for o in threshold(subject, logits, target, 1.0)]
    expected = F.cross_entropy(logits, target, reduction="none")
    for n in range(3):
        if not expected[n].isfinite() or filler == "constant":
            # p_y is no number, or 1 / V: all are kept
            assert outputs[6][n] == 203 and outputs[4][n] == -torch.inf
            assert torch.equal(outputs[0][n].nan_to_num(7), dense[0][n].nan_to_num(7))
        elif filler == "ties":
            kept = reference.adaptive_kept(logits[n : n + 1], target[n : n + 1], 0.1)
            assert outputs[6][n] == kept.sum()


@pytest.mark.interpreter
def test_what_equals_the_target_stays_whatever_the_rounding(subject):
    """At delta = 0 the bound is the target itself, by way of a logarithm and an exponential."""
    rows = 16 if subjects.INTERPRETING else 500
    torch.manual_seed(0)
    logits = 3 * torch.randn(rows, 40)
    logits[:, 1] = logits[:, 0]
    target = torch.zeros(rows, dtype=torch.int64)
    outputs = threshold(subject, logits, target, 0.0)
    assert torch.equal(outputs[6].cpu().long(), (logits >= logits[:, :1]).sum(-1))
    dloss, moved = torch.ones(rows).to(subject.device), logits.to(subject.device)
    dlogits = ops.threshold_ce_bwd(
        dloss, None, moved, target.to(subject.device), *outputs[2:], None, 0.0, subject.backend
    )
    # the probabilities of what is kept add up to 1, which the target takes away
    assert dlogits.sum(-1).abs().max() < 40 * torch.finfo(torch.float32).eps


@pytest.mark.interpreter
def test_no_hit_keeps_all(subject):
    logits = cases.logits("peaked", 3, 203, torch.float32)
    outputs = threshold(subject, logits, torch.tensor([-100, 203, 2**32]), 0.1)
    assert (outputs[6] == 203).all() and outputs[0].isnan().all()


def test_example_of_the_authors(subject):
    logits = torch.tensor(LOGITS, device=subject.device)
    target = torch.tensor([1, 2, -100], device=subject.device)
    loss, support = adaptive_sparse_ce(
        logits, target, 0.1, reduction="none", return_support=True, backend=subject.backend
    )
    # the kept logits that their README prints: {1.5}, all, and a row that is ignored
    assert support.kept[:2].tolist() == [1, 4]
    assert support.learnt.tolist() == [True, False, False]
    assert support.counted.tolist() == [True, True, False]
    assert loss[0] == 0 and loss[2] == 0
    assert torch.allclose(loss[1], F.cross_entropy(logits[1:2], target[1:2]), rtol=1e-6)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_delta_of_one_is_cross_entropy(subject, reduction, weighted, smoothing):
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 37, device=subject.device).requires_grad_()
    target = torch.randint(0, 37, (2, 5), device=subject.device)
    target[0, 3] = -100
    weight = torch.rand(37, device=subject.device) if weighted else None
    options = {"weight": weight, "label_smoothing": smoothing, "reduction": reduction}
    ours = adaptive_sparse_ce(logits, target, 1.0, backend=subject.backend, **options)
    theirs = F.cross_entropy(logits.movedim(-1, 1), target, **options)
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    above = torch.rand_like(ours)
    gradients = [
        torch.autograd.grad(f, logits, above, retain_graph=True)[0] for f in (ours, theirs)
    ]
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.float64
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_first_and_second_derivative(subject, smoothing):
    logits, target = confident(5, 7, torch.float64)

    def function(z):
        loss, support = adaptive_sparse_ce(
            z, target.to(subject.device), 0.1, label_smoothing=smoothing, reduction="none",
            return_support=True, backend=subject.backend,
        )  # fmt: skip
        return loss, support.lse

    leaf = logits.to(subject.device).requires_grad_()
    assert gradcheck(function, leaf) and gradgradcheck(function, leaf)


def test_compiled_equals_eager(subject):
    def function(z, y):
        loss, support = adaptive_sparse_ce(z, y, 0.1, return_support=True, backend=subject.backend)
        return loss + support.lse.mean(), support.learnt

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    logits, target = confident(9, 37, torch.float32)
    leaf = logits.to(subject.device).requires_grad_()
    for ours, theirs in zip(
        *(f(leaf, target.to(subject.device)) for f in (compiled, function)), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_saved_is_of_the_size_of_the_rows(subject):
    logits, target = confident(9, 1003, torch.bfloat16)
    leaf = logits.to(subject.device).requires_grad_()
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.nbytes if t.data_ptr() != leaf.data_ptr() else 0) or t, lambda t: t
    ):
        adaptive_sparse_ce(leaf, target.to(subject.device), backend=subject.backend)
    assert sum(sizes) <= 64 * 9


def published(rows, learnt, previous, scale, most):
    """The rule of the authors' README, for rows of which none is ignored and one is not learnt."""
    new = max(max(1, round(scale * rows / (rows - learnt + 1e-8))), previous)
    return min(previous + 1 if new - previous > 1 else new, most)


@pytest.mark.parametrize("scale, most", [*itertools.product([0.5, 1.0, 3.0], [1, 2, 5])])
def test_accumulation_follows_the_published_rule(scale, most):
    accumulation, previous = AdaptiveAccumulation(scale=scale, max_steps=most), 1
    for learnt in (0, 3, 7, 1, 9, 9, 9, 9, 0, 5):
        rows = torch.arange(10) < learnt
        previous = published(10, learnt, previous, scale, most)
        for step in range(previous):
            # what later micro-batches of the update have learnt changes nothing
            assert accumulation.steps(rows if step == 0 else ~rows) == previous
            assert accumulation.is_complete() == (step == previous - 1)


def test_accumulation_repairs():
    accumulation = AdaptiveAccumulation(max_steps=3)
    ignored = torch.tensor([True, True, False, False])
    assert accumulation.steps(torch.zeros(4).bool(), ~ignored) == 1 and accumulation.is_complete()
    # of two rows that count one is learnt: 2; counted as the published code does 4 / (4 - 3)
    assert accumulation.steps(torch.tensor([True, True, True, False]), ~ignored) == 2
    assert not accumulation.is_complete() and accumulation.is_complete()
    assert accumulation.steps(torch.ones(4).bool()) == 3  # all learnt
    assert [accumulation.is_complete() for _ in range(3)] == [False, False, True]
    assert accumulation.steps(torch.zeros(4).bool(), torch.zeros(4).bool()) == 3  # nothing counts
    other = AdaptiveAccumulation(max_steps=2)
    other.load_state_dict(accumulation.state_dict())
    assert other.steps(torch.zeros(4).bool()) == 2


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"delta": 1.5}, ValueError, "delta: expected 0 <= delta <= 1, got 1.5"),
        ({"delta": "0.1"}, TypeError, "delta: expected a float, got str"),
        ({"target": torch.zeros(3, 4), "label_smoothing": 0.1}, ValueError, "label_smoothing: exp"),
        ({"target": torch.zeros(3, 4), "return_support": True}, ValueError, "return_support: exp"),
        ({"target": torch.zeros(3, 4), "weight": torch.ones(4)}, ValueError, "weight: expected"),
        ({"target": torch.zeros(3, 4), "backend": "gpu"}, ValueError, "backend: expected one of"),
        ({"target": torch.full((3, 4), 0.3)}, ValueError, "target: expected 0 and 1 alone"),
        ({"target": torch.zeros(3, 4).requires_grad_()}, ValueError, "target: expected a tensor"),
        ({"target": torch.tensor([0, 1, 4])}, IndexError, "target: expected classes in"),
        ({"reduction": "max"}, ValueError, "reduction: expected one of"),
    ],
)
def test_errors(changes, error, message):
    arguments = {"logits": torch.randn(3, 4), "target": torch.tensor([0, 1, 2]), "delta": 0.1}
    with pytest.raises(error, match=message):
        adaptive_sparse_ce(**{**arguments, **changes})


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"scale": 0.0}, ValueError, "scale: expected 0 < scale, finite, got 0.0"),
        ({"scale": float("inf")}, ValueError, "scale: expected 0 < scale, finite, got inf"),
        ({"scale": "1"}, TypeError, "scale: expected a float, got str"),
        ({"max_steps": 0}, ValueError, "max_steps: expected max_steps >= 1, got 0"),
        ({"max_steps": 1.5}, TypeError, "max_steps: expected an int, got float"),
    ],
)
def test_errors_of_accumulation(arguments, error, message):
    with pytest.raises(error, match=message):
        AdaptiveAccumulation(**arguments)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (([True],), TypeError, "learnt: expected a torch.Tensor, got list"),
        ((torch.zeros(3),), TypeError, "learnt: expected a bool tensor, got torch.float32"),
        ((torch.ones(3).bool(), torch.ones(3)), TypeError, "counted: expected a bool tensor, got"),
        ((torch.ones(3).bool(), torch.ones(2).bool()), ValueError, r"learnt, \(3,\), got \(2,\)"),
    ],
)  # fmt: skip
def test_errors_of_steps(arguments, error, message):
    with pytest.raises(error, match=message):
        AdaptiveAccumulation().steps(*arguments)


def test_a_row_of_nan_is_not_learnt(subject):
    """Of one class alone the target is all that is kept."""
    logits = torch.tensor([[torch.nan], [torch.inf], [1.0]], device=subject.device)
    target = torch.zeros(3, dtype=torch.int64, device=subject.device)
    loss, support = adaptive_sparse_ce(
        logits, target, reduction="none", return_support=True, backend=subject.backend
    )
    assert loss.isnan().tolist() == [True, True, False]
    assert support.learnt.tolist() == [False, False, True]


def test_a_factor_beyond_all_integers():
    accumulation = AdaptiveAccumulation(scale=1e308, max_steps=3)
    learnt = torch.tensor([True, True, False])
    assert accumulation.steps(learnt) == 2
    assert repr(accumulation) == "AdaptiveAccumulation(scale=1e+308, max_steps=3)"
