"""SparseCrossEntropyLoss and KSchedule: faces and helpers around the function."""

import doctest

import cases
import pytest
import torch
from sparse_ce import (
    KSchedule,
    SparseCrossEntropyLoss,
    SparseLinearCrossEntropy,
    fused_sparse_ce,
    schedule,
)

TARGET = torch.tensor([3, -1, 0])


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(ignore_index=-1, reduction="none"),
        dict(label_smoothing=0.1, reduction="sum", backend="eager"),
        dict(return_support=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weight"])
def test_module_equals_the_function(weighted, options):
    logits = cases.logits("random", 3, 37, torch.float32)
    target = TARGET.where(TARGET >= 0, options.get("ignore_index", -100))
    weight = torch.rand(37) if weighted else None
    ours = SparseCrossEntropyLoss(5, weight=weight, **options)(logits, target)
    theirs = fused_sparse_ce(logits, target, 5, weight=weight, **options)
    if options.get("return_support"):
        (ours, support), (theirs, expected) = ours, theirs
        assert torch.equal(support.indices, expected.indices)
    assert torch.equal(ours, theirs)


def test_weight_is_a_buffer():
    weight = torch.rand(37)
    module = SparseCrossEntropyLoss(5, weight=weight)
    assert list(module.state_dict()) == ["weight"] and not list(module.parameters())
    assert module.to("meta").weight.device.type == "meta"
    other = SparseCrossEntropyLoss(5, weight=torch.zeros(37))
    other.load_state_dict({"weight": weight})
    assert torch.equal(other.weight, weight)
    assert not SparseCrossEntropyLoss(5).state_dict()


def test_k_may_change_between_steps():
    module = SparseCrossEntropyLoss(1)
    logits, target = cases.logits("random", 3, 37, torch.float32), torch.tensor([3, 0, 36])
    for k in (1, 5, None):
        module.k = k
        assert torch.equal(module(logits, target), fused_sparse_ce(logits, target, k))


def test_repr_shows_the_options():
    module = SparseCrossEntropyLoss(5, reduction="sum", ignore_index=-1)
    assert repr(module) == "SparseCrossEntropyLoss(k=5, ignore_index=-1, reduction='sum')"


def test_options_may_change_between_steps():
    module = SparseCrossEntropyLoss(5)
    logits, target = cases.logits("random", 3, 37, torch.float32), torch.tensor([3, 0, 36])
    options = dict(label_smoothing=0.1, reduction="none", ignore_index=3, return_support=True)
    for name, value in options.items():
        setattr(module, name, value)
    loss, support = module(logits, target)
    wanted, _ = fused_sparse_ce(logits, target, 5, **options)
    assert torch.equal(loss, wanted) and support.indices.shape == (3, 5)
    module.reduction = "avg"
    with pytest.raises(ValueError, match="^reduction: expected one of mean, sum, none, got 'avg'"):
        module(logits, target)
    head = SparseLinearCrossEntropy(4, 37, 5)
    head.weight_grad = "row_sparse"
    head(torch.randn(3, 4), target).backward()
    assert head.weight.grad.is_sparse and "weight_grad='row_sparse'" in repr(head)


def test_the_example_of_the_schedule():
    result = doctest.testmod(schedule)
    # from Python 3.13 on what is skipped counts as attempted
    assert result.attempted - getattr(result, "skipped", 0) == 5 and result.failed == 0


@pytest.mark.parametrize(
    "classes, k, warmup, anneal",
    [(2000, 20, 100, 200), (50257, 1, 0, 1000), (10, 10, 5, 5), (10, 99, 2, 3)],
)
def test_schedule_is_dense_then_geometric_then_k(classes, k, warmup, anneal):
    steps = [KSchedule(classes, k, warmup, anneal)(step) for step in range(warmup + anneal + 10)]
    k = min(k, classes)
    assert steps[: warmup + 1] == [classes] * (warmup + 1)
    assert steps[warmup + anneal :] == [k] * 10
    assert all(a >= b for a, b in zip(steps, steps[1:], strict=False))
    factor = (k / classes) ** (1 / anneal)
    # rounded to an integer: half of one either side
    assert all(abs(steps[warmup + i] - classes * factor**i) <= 0.5 + 1e-6 for i in range(anneal))


def test_schedule_without_warmup_and_annealing_is_constant():
    assert [KSchedule(10, 3, 0, 0)(step) for step in range(3)] == [3, 3, 3]


def test_schedule_ends_dense():
    schedule = KSchedule(100, 5, warmup_steps=2, anneal_steps=2, dense_from=7)
    assert [schedule(step) for step in range(10)] == [100, 100, 100, 22, 5, 5, 5, 100, 100, 100]
    # also where it begins before k is reached
    assert [KSchedule(100, 5, 2, 2, dense_from=3)(step) for step in range(6)] == [100] * 6


def test_schedule_repr_makes_an_equal_one():
    original = KSchedule(2000, 20, 100, 200, 350)
    copy = eval(repr(original), {"KSchedule": KSchedule})
    assert [copy(step) for step in range(0, 400, 7)] == [
        original(step) for step in range(0, 400, 7)
    ]
