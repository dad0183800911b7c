"""Adaptive sparse softmax of several labels per row: stem labels_ce on every backend, and the
public function on top of it. SPEC 3.

What is kept is compared with float64 probabilities, but where they are too close to the bound; the
rest with the truth of what was kept.
"""

import itertools

import pytest
import subjects
import torch
from allocations import sizes_of_allocations
from closeness import LabelsTruth
from sparse_ce import adaptive_sparse_ce, backends, ops, reference
from test_adaptive import LOGITS
from torch.autograd import gradcheck, gradgradcheck

pytestmark = pytest.mark.usefixtures("poisoned_memory")

LABELS = [[1, 1, 0, 0], [0, 1, 1, 0], [1, 1, 0, 1]]  # of the example of the authors


def problem(rows, classes, dtype):
    """No positives, then all; one that leads and is learnt, two that lead, one that is far behind;
    and rows of many labels that lead by more and more.
    """
    torch.manual_seed(0)
    logits, labels = 2 * torch.randn(rows, classes), torch.rand(rows, classes) < 0.2
    labels[0], labels[1] = False, True
    labels[2:5] = False
    for row, lead in ((2, [30.0]), (3, [9.0, 9.0]), (4, [-9.0])):
        places = torch.randperm(classes)[: len(lead)]
        labels[row, places] = True
        logits[row, places] = torch.tensor(lead[: len(places)])
    logits[5:] += labels[5:] * torch.linspace(0, 8, max(rows - 5, 1))[: rows - 5, None]
    return logits.to(dtype), labels


def forward(subject, logits, labels, delta):
    found = ops.labels_ce_fwd(
        logits.to(subject.device), labels.to(subject.device), delta, subject.backend
    )
    return [output.cpu() for output in found]


def backward(subject, dloss, logits, labels, outputs):
    moved = [t.to(subject.device) for t in (dloss, logits, labels, *outputs[1:])]
    return ops.labels_ce_bwd(*moved, subject.backend).cpu()


def kept_by(logits, labels, outputs):
    """Negatives and positives that the cuts keep."""
    cut_negative, cut_positive = (cut.to(logits.dtype).unsqueeze(-1) for cut in outputs[3:])
    return ~labels & ~(logits < cut_negative), labels & ~(logits > cut_positive)


def assert_choice(logits, labels, delta, outputs):
    """Of rows of finite numbers; the cuts are logits."""
    negatives, positives = kept_by(logits, labels, outputs)
    # a probability is right to some units of the distance to its maximum, here below 32 of them
    p = torch.softmax(logits.double(), -1)
    least = p.masked_fill(~labels, torch.inf).amin(-1, keepdim=True)
    most = p.masked_fill(labels, -torch.inf).amax(-1, keepdim=True)
    margin = torch.where(labels, p - most, least - p) - delta
    unsure = margin.abs() <= 64 * torch.finfo(outputs[0].dtype).eps * torch.maximum(p, least)
    unsure &= margin.isfinite()
    expected = reference.adaptive_multilabel_kept(logits, labels, delta)
    assert torch.equal((negatives | positives)[~unsure], expected[~unsure])
    z, (cut_negative, cut_positive) = logits.to(outputs[0].dtype), outputs[3:]
    lowest = z.masked_fill(~negatives, torch.inf).amin(-1)
    highest = z.masked_fill(~positives, -torch.inf).amax(-1)
    assert ((cut_negative == lowest) | (cut_negative == -torch.inf)).all()
    assert ((cut_positive == highest) | (cut_positive == torch.inf)).all()


def check(subject, logits, labels, delta, finite=True):
    outputs = forward(subject, logits, labels, delta)
    rows, statistic = labels.shape[:-1], (torch.float64 if logits.dtype == torch.float64 else None)
    shapes = [(statistic or torch.float32, rows, True)] * 5
    assert [(o.dtype, o.shape, o.is_contiguous()) for o in outputs] == shapes
    flat, flat_labels = logits.flatten(0, -2), labels.flatten(0, -2)
    flat_outputs = [output.flatten() for output in outputs]
    if finite:
        assert_choice(flat, flat_labels, delta, flat_outputs)
    truth = LabelsTruth(flat, *kept_by(flat, flat_labels, flat_outputs))
    truth.assert_forward(*flat_outputs[:3])
    torch.manual_seed(1)
    dloss = torch.randn(rows, dtype=outputs[0].dtype)
    dloss.flatten()[-1] = 0
    dlogits = backward(subject, dloss, logits, labels, outputs)
    assert dlogits.shape == logits.shape and dlogits.is_contiguous()
    truth.assert_gradient(dlogits.flatten(0, -2), dloss.flatten())
    return outputs


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "classes, delta",
    [(1, 0.1), (2, 0.5), (33, 0.0), (203, 0.3), (1003, 0.1), (1003, 0.01), (1024, 1.0)],
)
def test_values(subject, dtype, classes, delta):
    logits, labels = problem(6 if subjects.INTERPRETING else 12, classes, dtype)
    outputs = check(subject, logits, labels, delta)
    if classes > 200 and delta < 0.5:
        # the row of one label that leads has learnt: both sides keep nothing
        assert [float(output[2]) for output in outputs] == [0, 0, 0, torch.inf, -torch.inf]
    if delta == 1:
        negatives, positives = kept_by(logits, labels, outputs)
        assert (negatives | positives).all()


@pytest.mark.interpreter
def test_rows_longer_than_all_blocks(subject, dtype):
    logits, labels = problem(7, 17003, dtype)
    check(subject, logits[2:4], labels[2:4], 0.01)
    if not subjects.INTERPRETING:
        check(subject, logits[4:], labels[4:], 1e-4)


@pytest.mark.interpreter
@pytest.mark.parametrize("layout", ["slice", "odd", "transposed", "expanded", "odd labels"])
def test_layouts(subject, dtype, layout):
    """Rows that begin anywhere, and labels that do not begin as their logits do."""
    logits, labels = problem(6, 203, dtype)
    if layout == "slice":
        logits = torch.nn.functional.pad(logits, (3, 6))[:, 3:-6]
    if layout == "odd":
        logits, labels = logits[:, :201].contiguous()[1:], labels[:, :201].contiguous()[1:]
    if layout == "transposed":
        logits = logits.view(2, 3, 203).transpose(0, 1)
        labels = labels.view(2, 3, 203).transpose(0, 1).contiguous()
    if layout == "expanded":
        logits = logits[5:].expand(6, 203)
    if layout == "odd labels":
        memory = torch.empty(labels.numel() + 3, dtype=torch.bool)
        labels = memory[3:].view(labels.shape).copy_(labels)
    check(subject, logits, labels, 0.1)


@pytest.mark.interpreter
def test_what_equals_the_other_side_stays_whatever_the_rounding(subject):
    """At delta = 0 the bounds are the extremes, by way of logarithms and exponentials."""
    rows = 16 if subjects.INTERPRETING else 500
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(rows, 40), torch.rand(rows, 40) < 0.3
    low = logits.masked_fill(~labels, torch.inf).amin(-1, keepdim=True)
    high = logits.masked_fill(labels, -torch.inf).amax(-1, keepdim=True)
    # a negative at the least positive, a positive at the largest negative
    logits = torch.cat([low, high, logits], -1)
    labels = torch.cat([torch.tensor([[False, True]]).expand(rows, 2), labels], -1)
    negatives, positives = kept_by(logits, labels, forward(subject, logits, labels, 0.0))
    assert (negatives >= (~labels & (logits >= low))).all()
    assert (positives >= (labels & (logits <= high))).all()
    assert negatives[:, 0].all() and positives[:, 1].all()
    check(subject, logits, labels, 0.0)


@pytest.mark.interpreter
def test_equal_logits_are_kept_together(subject, dtype):
    torch.manual_seed(0)
    logits = torch.randint(-3, 4, (4, 203)).to(dtype)
    labels = torch.rand(4, 203) < 0.1
    for delta in (0.0, 0.001, 0.01):
        check(subject, logits, labels, delta)


@pytest.mark.interpreter
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_large_logits(subject, offset):
    """Each sum has a maximum of its own: nothing overflows."""
    logits, labels = problem(6, 203, torch.float32)
    outputs = check(subject, logits + offset, labels, 0.1)
    assert all(output.isfinite().all() for output in outputs[:3])


@pytest.mark.interpreter
@pytest.mark.parametrize("which", ["negative", "positive", "both"])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_infinities_and_nan(subject, value, which):
    """Where p is no number all are kept; NaN makes the loss NaN."""
    logits, labels = problem(6, 203, torch.float32)
    logits, labels = logits[3:], labels[3:]
    for row, at in itertools.product(range(3), (0, 1)):
        if which in (("negative", "positive")[at], "both"):
            logits[row, labels[row].int().argmax() if at else labels[row].int().argmin()] = value
    outputs = check(subject, logits, labels, 0.1, finite=value == -torch.inf)
    if value != -torch.inf:
        assert (outputs[3] == -torch.inf).all() and (outputs[4] == torch.inf).all()
    if value != value:
        assert outputs[0].isnan().all()


@pytest.mark.interpreter
def test_masked_negatives(subject):
    """Negatives at minus infinity are there, and have p = 0: a positive beyond delta is learnt."""
    logits, labels = torch.full((2, 203), -torch.inf), torch.zeros(2, 203, dtype=torch.bool)
    logits[:, 5], labels[0, 5] = 1.0, True
    loss, *_, cut_negative, cut_positive = check(subject, logits, labels, 0.1)
    assert loss[0] == 0 and cut_negative[0] == torch.inf and cut_positive[0] == -torch.inf
    assert loss[1] > 1
    # nothing but minus infinity: there is no p
    outputs = check(subject, torch.full((2, 203), -torch.inf), labels, 0.1, finite=False)
    assert [float(output[0]) for output in outputs[1:]] == [0, torch.inf, -torch.inf, torch.inf]


@pytest.mark.interpreter
def test_no_rows(subject):
    logits, labels = torch.zeros(0, 5), torch.zeros(0, 5, dtype=torch.bool)
    outputs = forward(subject, logits, labels, 0.1)
    assert [output.shape for output in outputs] == [(0,)] * 5
    assert backward(subject, torch.zeros(0), logits, labels, outputs).shape == (0, 5)


@pytest.mark.interpreter
def test_rows_without_gradient_are_zero(subject):
    logits, labels = problem(6, 203, torch.float32)
    logits[3, 7] = torch.nan
    outputs = forward(subject, logits, labels, 0.1)
    dlogits = backward(subject, torch.zeros(()).expand(6), logits, labels, outputs)
    assert torch.equal(dlogits, torch.zeros_like(logits))


@pytest.mark.interpreter
def test_the_same_bits_again(subject, dtype):
    """In every run, and whatever other rows there are."""
    logits, labels = problem(6, 1003, dtype)
    outputs = forward(subject, logits, labels, 0.01)
    dloss = torch.rand(6, dtype=outputs[0].dtype)
    dlogits = backward(subject, dloss, logits, labels, outputs)
    again = forward(subject, logits, labels, 0.01)
    assert all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))
    assert torch.equal(dlogits, backward(subject, dloss, logits, labels, again))
    row = forward(subject, logits[4:5].clone(), labels[4:5].clone(), 0.01)
    # a row that begins elsewhere in a chunk is added up in another order
    if logits[4:5].data_ptr() % 16 == 0 and subject.backend != "eager":
        assert all(torch.equal(a[4:5], b) for a, b in zip(outputs, row, strict=True))


@pytest.mark.interpreter
def test_backward_of_another_backend(subject):
    """What forward returns is all that any backward needs."""
    logits, labels = problem(6, 203, torch.float32)
    eager = subjects.Subject("eager", subject.device)
    dloss = torch.ones(6)
    for first, second in ((subject, eager), (eager, subject)):
        outputs = forward(first, logits, labels, 0.1)
        truth = LabelsTruth(logits, *kept_by(logits, labels, outputs))
        truth.assert_gradient(backward(second, dloss, logits, labels, outputs), dloss)


@pytest.mark.interpreter
def test_the_named_backend_runs(subject, monkeypatch):
    assert subject.defines("labels_ce")
    called = []
    original = backends.implementation

    def spy(backend, op):
        called.append((backend, op))
        return original(backend, op)

    monkeypatch.setattr(backends, "implementation", spy)
    logits = torch.tensor(LOGITS, device=subject.device).requires_grad_()
    target = torch.tensor(LABELS, device=subject.device)
    adaptive_sparse_ce(logits, target, 0.1, backend=subject.backend).backward()
    assert called == [(subject.backend, f"labels_ce_{d}") for d in ("fwd", "bwd")]


@pytest.mark.interpreter
def test_example_of_the_authors(subject):
    logits = torch.tensor(LOGITS, device=subject.device)
    target = torch.tensor(LABELS, device=subject.device)
    loss = adaptive_sparse_ce(logits, target, 0.1, backend=subject.backend)
    assert round(loss.item(), 4) == 2.0778


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.int64, torch.float32])
@pytest.mark.parametrize("shape", [(9,), (6, 9), (2, 3, 9), (2, 1, 3, 9)])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_the_function(subject, kind, shape, reduction):
    torch.manual_seed(0)
    leaf = (3 * torch.randn(shape)).to(subject.device).requires_grad_()
    target = (torch.rand(shape) < 0.3).to(kind)
    loss = adaptive_sparse_ce(
        leaf, target.to(subject.device), 0.1, reduction=reduction, backend=subject.backend
    )
    z = leaf.detach().cpu().requires_grad_()
    truth = reference.adaptive_multilabel(z.reshape(-1, 9), target.reshape(-1, 9) != 0, 0.1)
    truth = {"none": truth.view(shape[:-1]), "mean": truth.mean(), "sum": truth.sum()}[reduction]
    # two logarithms of sums of ten terms, and six of them added up
    tolerance = 16 * torch.finfo(torch.float32).eps
    assert loss.shape == truth.shape
    assert torch.allclose(loss.detach().cpu().double(), truth, rtol=tolerance, atol=tolerance)
    (ours,) = torch.autograd.grad(loss.sum(), leaf)
    (theirs,) = torch.autograd.grad(truth.sum(), z)
    assert torch.allclose(ours.cpu(), theirs, rtol=tolerance, atol=tolerance)


def test_no_rows_of_the_function(subject):
    logits = torch.zeros(0, 3, device=subject.device)
    assert adaptive_sparse_ce(logits, logits, backend=subject.backend).item() == 0


def test_no_overflow_of_the_function(subject):
    logits = torch.tensor([[200.0, -200.0, 0.0]], device=subject.device, requires_grad=True)
    target = torch.tensor([[0, 1, 0]], device=subject.device)
    loss = adaptive_sparse_ce(logits, target, 0.1, backend=subject.backend)
    loss.backward()
    assert loss.item() == 400.0 and logits.grad.tolist() == [[1.0, -1.0, 0.0]]


@pytest.mark.float64
@pytest.mark.parametrize("delta", [0.0, 0.1, 1.0])
def test_first_and_second_derivative(subject, delta):
    torch.manual_seed(0)
    # a tenth apart: no step of finite differences changes what is kept
    leaf = (torch.randperm(28).double() / 10).view(4, 7).to(subject.device).requires_grad_()
    labels = torch.rand(4, 7) < 0.4
    labels[0], labels[1] = False, True

    def function(z):
        return adaptive_sparse_ce(
            z, labels.to(subject.device), delta, reduction="none", backend=subject.backend
        )

    assert gradcheck(function, leaf) and gradgradcheck(function, leaf)


def test_only_the_loss_has_a_gradient(subject):
    logits, labels = problem(6, 33, torch.float32)
    leaf = logits.to(subject.device).requires_grad_()
    outputs = ops.labels_ce_fwd(leaf, labels.to(subject.device), 0.1, subject.backend)
    assert [output.requires_grad for output in outputs] == [True, False, False, False, False]


def test_opcheck(subject):
    pytest.importorskip("expecttest", reason="torch.library.opcheck imports expecttest")
    logits, labels = problem(6, 33, torch.float32)
    for z, y in (
        (logits, labels),
        (logits.view(2, 3, 33).transpose(0, 1), labels.view(3, 2, 33)),
        (logits[:1].expand(6, 33), labels),
    ):
        leaf = z.to(subject.device).detach().requires_grad_()
        y = y.to(subject.device)
        torch.library.opcheck(ops.labels_ce_fwd.overload, (leaf, y, 0.1, subject.backend))
        outputs = [o.detach() for o in ops.labels_ce_fwd(leaf, y, 0.1, subject.backend)]
        dloss = torch.rand_like(outputs[0]).requires_grad_()
        torch.library.opcheck(
            ops.labels_ce_bwd.overload, (dloss, leaf, y, *outputs[1:], subject.backend)
        )


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_compiled_equals_eager(subject, reduction):
    def function(z, y):
        return adaptive_sparse_ce(z, y, 0.1, reduction=reduction, backend=subject.backend)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    logits, labels = problem(8, 37, torch.float32)
    results = []
    for f, target in itertools.product((function, compiled), (labels, labels.long())):
        leaf = logits.to(subject.device).requires_grad_()
        loss = f(leaf, target.to(subject.device))
        loss.sum().backward()
        results.append((loss, leaf.grad))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(gradient, results[0][1])


def test_saved_is_of_the_size_of_the_rows(subject):
    logits, labels = problem(9, 1003, torch.bfloat16)
    leaf, labels = logits.to(subject.device).requires_grad_(), labels.to(subject.device)
    given = {leaf.data_ptr(), labels.data_ptr()}
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.nbytes if t.data_ptr() not in given else 0) or t, lambda t: t
    ):
        adaptive_sparse_ce(leaf, labels, backend=subject.backend)
    assert sum(sizes) <= 64 * 9


@pytest.mark.skipif(
    backends.unavailable("cpu") is not None, reason=str(backends.unavailable("cpu"))
)
def test_memory_is_the_gradient():
    logits, labels = problem(64, 5003, torch.float32)
    leaf = logits.requires_grad_()
    loss = adaptive_sparse_ce(leaf, labels, backend="cpu")
    forward_sizes, _ = sizes_of_allocations(lambda: adaptive_sparse_ce(leaf, labels, backend="cpu"))
    assert max(forward_sizes) <= 64 * 64
    backward_sizes, _ = sizes_of_allocations(lambda: loss.backward())
    assert [size for size in backward_sizes if size > 64 * 64] == [leaf.nbytes]
