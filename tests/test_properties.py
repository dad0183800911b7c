"""What SPEC 1 says must hold, on examples that hypothesis searches for and shrinks."""

import math

import pytest
import torch
import torch.nn.functional as F
from closeness import Truth
from sparse_ce import fused_sparse_ce, reference

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import strategies as st  # noqa: E402


@st.composite
def problems(draw, distinct=False):
    """(logits, targets, k): rows of multiples of 1/8 up to 32, so ties are common, shifts exact."""
    classes = draw(st.integers(1, 12))
    number = st.integers(-256, 256).map(lambda i: i / 8)
    row = st.lists(number, min_size=classes, max_size=classes, unique=distinct)
    rows = draw(st.lists(row, min_size=1, max_size=3))
    target = draw(st.lists(st.integers(0, classes - 1), min_size=len(rows), max_size=len(rows)))
    return torch.tensor(rows), torch.tensor(target), draw(st.integers(1, classes))


def holds(**strategies):
    """A test that runs per subject, on examples that are the same in every run."""

    def decorate(test):
        settings = hypothesis.settings(
            max_examples=100, deadline=None, derandomize=True, database=None
        )
        return settings(hypothesis.given(**strategies)(test))

    return decorate


def losses(subject, logits, target, k):
    """(N) float64 on the CPU."""
    loss = fused_sparse_ce(
        logits.to(subject.device),
        target.to(subject.device),
        k,
        reduction="none",
        backend=subject.backend,
    )
    return loss.detach().cpu().double()


def gradient(subject, logits, target, k):
    """(N, V) on the CPU, of the sum of the losses."""
    z = logits.clone().to(subject.device).requires_grad_()
    loss = fused_sparse_ce(
        z, target.to(subject.device), k, reduction="sum", backend=subject.backend
    )
    return torch.autograd.grad(loss, z)[0].cpu()


def slack(logits, target, k):
    """(N): how far each of two losses of such logits may be from the truth."""
    return 2 * Truth(logits, target, k).loss_tolerance


@holds(problem=problems())
def test_loss_is_not_negative(subject, problem):
    assert (losses(subject, *problem) >= 0).all()


@holds(problem=problems())
def test_loss_is_at_least_log_k_when_the_target_is_outside(subject, problem):
    logits, target, k = problem
    outside = (reference.support_indices(logits, k) != target.unsqueeze(-1)).all(-1)
    least = torch.where(outside, math.log(k), 0.0)
    assert (losses(subject, *problem) >= least - slack(*problem)).all()


@holds(problem=problems(), seed=st.integers(0, 2**32 - 1))
def test_convex(subject, problem, seed):
    logits, target, k = problem
    other = (
        torch.randint(-256, 257, logits.shape, generator=torch.Generator().manual_seed(seed)) / 8
    )
    mean = (losses(subject, logits, target, k) + losses(subject, other, target, k)) / 2
    middle = ((logits + other) / 2, target, k)
    assert (
        losses(subject, *middle) <= mean + slack(logits, target, k) + slack(other, target, k)
    ).all()


@holds(problem=problems())
def test_continuous_where_the_target_crosses_the_last_place(subject, problem):
    logits, target, k = problem
    hypothesis.assume(k < logits.shape[-1])
    place = target.unsqueeze(-1)
    others = logits.scatter(-1, place, -math.inf)
    last = others.sort(-1, descending=True).values[:, k - 1 : k]
    step = 2.0**-10
    inside, outside = (logits.scatter(-1, place, last + h) for h in (step, -step))
    difference = (losses(subject, inside, target, k) - losses(subject, outside, target, k)).abs()
    # the derivative by the target's logit is between -1 and 0
    assert (difference <= 2 * step + slack(outside, target, k)).all()


@holds(problem=problems())
def test_k_of_one_is_the_perceptron_loss(subject, problem):
    logits, target, _ = problem
    expected = logits.amax(-1) - logits.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    assert torch.equal(losses(subject, logits, target, 1), expected.double())


@holds(problem=problems(), more=st.sampled_from([0, 1, 1000, None]))
def test_k_of_v_and_more_is_cross_entropy(subject, problem, more):
    logits, target, _ = problem
    classes = logits.shape[-1]
    loss = losses(subject, logits, target, None if more is None else classes + more)
    expected = F.cross_entropy(logits.double(), target, reduction="none")
    assert ((loss - expected).abs() <= slack(logits, target, classes)).all()


@holds(problem=problems(), shift=st.sampled_from([2.0**24, -(2.0**24), 1024.0, -0.125]))
def test_a_constant_changes_nothing(subject, problem, shift):
    logits, target, k = problem
    if abs(shift) == 2**24:
        logits = logits.mul(8).round() * 2  # numbers that float32 has at this size
    shifted = logits + shift
    assert torch.equal(shifted.double(), logits.double() + shift)
    truth = Truth(logits, target, k)
    truth.assert_loss(losses(subject, shifted, target, k))
    truth.assert_gradient(gradient(subject, shifted, target, k), torch.ones(target.shape))


@holds(problem=problems(distinct=True), seed=st.integers(0, 2**32 - 1))
def test_permuting_the_classes_permutes_the_gradient(subject, problem, seed):
    logits, target, k = problem
    order = torch.randperm(logits.shape[-1], generator=torch.Generator().manual_seed(seed))
    place = order.argsort()
    permuted = gradient(subject, logits[:, order], place[target], k)
    Truth(logits, target, k).assert_gradient(permuted[:, place], torch.ones(target.shape))


@holds(problem=problems())
def test_loss_grows_with_k(subject, problem):
    logits, target, k = problem
    if k < logits.shape[-1]:
        more = losses(subject, logits, target, k + 1)
        assert (losses(subject, logits, target, k) <= more + slack(logits, target, k + 1)).all()


@holds(problem=problems())
def test_gradient_sums_to_zero_on_at_most_k_plus_one_places(subject, problem):
    logits, target, k = problem
    z = logits.clone().to(subject.device).requires_grad_()
    loss, support = fused_sparse_ce(
        z,
        target.to(subject.device),
        k,
        reduction="sum",
        return_support=True,
        backend=subject.backend,
    )
    rows = torch.autograd.grad(loss, z)[0].cpu()
    reported = torch.zeros_like(rows).scatter(-1, support.indices.cpu().long(), 1)
    reported = reported.scatter(-1, target.unsqueeze(-1), 1)
    assert ((rows != 0) <= reported.bool()).all()
    assert ((rows != 0).sum(-1) <= k + 1).all()
    # closeness.py over a row: 4 log 12 of the exponents, 17.3 of the probabilities, 4 at the target
    assert (rows.double().sum(-1).abs() <= 32 * torch.finfo(torch.float32).eps).all()
