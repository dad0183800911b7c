"""Support: what return_support=True says about the classes that each row kept. SPEC 1."""

import cases
import pytest
import torch
from closeness import assert_within
from sparse_ce import fused_sparse_ce, reference

pytestmark = pytest.mark.interpreter
K = 5


@pytest.fixture
def problem():
    """(2, 3, 37) logits with ties; (2, 3) targets: first, last and outside of the support."""
    logits = cases.logits("random", 6, 37, torch.float32).mul(2).round()
    order = logits.double().sort(dim=-1, descending=True, stable=True).indices
    target = torch.stack([order[row, place] for row, place in enumerate([0, 1, K - 1, K, 36, 0])])
    return logits.unflatten(0, (2, 3)), target.view(2, 3)


def support_of(subject, logits, target, k=K):
    _, support = fused_sparse_ce(
        logits.to(subject.device),
        target.to(subject.device),
        k,
        return_support=True,
        backend=subject.backend,
    )
    return support


def test_shapes_and_the_order_of_the_classes(subject, problem):
    support = support_of(subject, *problem)
    assert support.indices.shape == support.probs.shape == (2, 3, K) and support.lse.shape == (2, 3)
    assert support.num_classes == 37
    expected = reference.support_indices(problem[0].flatten(0, 1), K).view(2, 3, K)
    assert support.indices.dtype == torch.int32 and torch.equal(
        support.indices.cpu().long(), expected
    )


def test_hit_and_accuracy(subject, problem):
    support = support_of(subject, *problem)
    target = problem[1].to(subject.device)
    assert support.hit(target).tolist() == [[True, True, True], [False, False, True]]
    assert support.accuracy(target).tolist() == [[True, False, False], [False, False, True]]


@pytest.mark.parametrize("k", [1, K, 37])
def test_entropy(subject, problem, k):
    support = support_of(subject, *problem, k)
    kept = problem[0].double().sort(dim=-1, descending=True).values[..., :k]
    expected = torch.distributions.Categorical(logits=kept).entropy()
    # the sum of (|log p| + 1) dp, with dp at most 40 units of p: 40 (entropy + 1), below 40 x 5
    assert_within("entropy", support.entropy(), expected, torch.tensor(40 * 2.0**-23 * 5).double())


def test_entropy_of_a_distribution_with_zeros(subject):
    """p log p is 0 at p = 0, and its gradient finite."""
    logits = torch.tensor([[0.0, -torch.inf, -1000, 0]]).to(subject.device).requires_grad_()
    _, support = fused_sparse_ce(
        logits,
        torch.tensor([0], device=subject.device),
        4,
        return_support=True,
        backend=subject.backend,
    )
    entropy = support.entropy()
    entropy.sum().backward()
    assert abs(entropy.item() - 0.6931472) <= 1e-6
    assert logits.grad.isfinite().all()


def test_to_sparse_csr(subject, problem):
    support = support_of(subject, *problem)
    with torch.sparse.check_sparse_tensor_invariants():
        csr = support.to_sparse_csr()
    assert csr.layout == torch.sparse_csr and csr.shape == (6, 37)
    assert torch.equal(csr.crow_indices().cpu(), torch.arange(0, 6 * K + 1, K))
    dense = torch.zeros(6, 37).scatter(
        -1, support.indices.cpu().long().view(6, K), support.probs.cpu().view(6, K)
    )
    assert torch.equal(csr.to_dense().cpu(), dense)


def test_to_sparse_csr_of_no_rows(subject):
    support = support_of(subject, torch.empty(0, 37), torch.empty(0, dtype=torch.int64))
    assert support.to_sparse_csr().shape == (0, 37)


def test_gradients_compose_outside(subject, problem):
    """A z-loss and an entropy bonus, against autograd through a gather in float64."""
    logits, target = problem
    z = logits.clone().to(subject.device).requires_grad_()
    loss, support = fused_sparse_ce(
        z,
        target.to(subject.device),
        K,
        return_support=True,
        reduction="sum",
        backend=subject.backend,
    )
    (loss + 0.1 * support.lse.square().sum() - 0.2 * support.entropy().sum()).backward()
    exact = logits.double().requires_grad_()
    index = reference.support_indices(logits.flatten(0, 1), K).view(2, 3, K)
    kept = exact.gather(-1, index)
    lse, p = kept.logsumexp(-1), kept.softmax(-1)
    expected = (lse - exact.gather(-1, target.unsqueeze(-1)).squeeze(-1)).sum()
    expected = expected + 0.1 * lse.square().sum() + 0.2 * (p * p.log()).sum()
    expected.backward()
    # closeness.py: at most 40 units of the terms, 1 + 0.2 lse + 0.2 |log p + 1| < 5
    assert_within("gradient", z.grad, exact.grad, torch.tensor(40 * 5 * 2.0**-23).double())
