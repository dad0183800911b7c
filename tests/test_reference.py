"""The oracle itself, against a loop in plain Python and against F.cross_entropy at k = V."""

import math
import random

import pytest
import torch
import torch.nn.functional as F
from sparse_ce import reference

EPS = torch.finfo(torch.float64).eps


def _before(a: tuple[float, int], b: tuple[float, int]) -> bool:
    """(value, class) a comes before b: value descending with NaN first, then class ascending."""
    (x, i), (y, j) = a, b
    if math.isnan(x) or math.isnan(y):
        return i < j if math.isnan(x) and math.isnan(y) else math.isnan(x)
    return i < j if x == y else x > y


def _loop(
    row: list[float], y: int, k: int, w: list[float], smoothing: float
) -> tuple[float, list[float]]:
    """Loss and gradient of one row from the definition, by selection and math.exp."""
    classes = list(range(len(row)))
    support: list[int] = []
    for _ in range(k):
        first = classes[0]
        for i in classes[1:]:
            if _before((row[i], i), (row[first], first)):
                first = i
        support.append(first)
        classes.remove(first)
    lse = math.log(math.fsum(math.exp(row[i]) for i in support))
    loss = (1 - smoothing) * w[y] * (lse - row[y])
    loss += smoothing / k * math.fsum(w[i] * (lse - row[i]) for i in support)
    total = (1 - smoothing) * w[y] + smoothing / k * math.fsum(w[i] for i in support)
    gradient = [0.0] * len(row)
    for i in support:
        gradient[i] = total * math.exp(row[i] - lse) - smoothing / k * w[i]
    gradient[y] -= (1 - smoothing) * w[y]
    return loss, gradient


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weight"])
@pytest.mark.parametrize("values", ["random", "ties"])
@pytest.mark.parametrize("k", [1, 2, 5, 9])
def test_against_a_python_loop(k, values, weighted, smoothing):
    draw = random.Random(0)
    classes = 9
    w = [draw.uniform(0.1, 2) for _ in range(classes)] if weighted else [1.0] * classes
    rows = [
        [
            draw.gauss(0, 2) if values == "random" else float(draw.randint(-1, 1))
            for _ in range(classes)
        ]
        for _ in range(classes)
    ]
    logits = torch.tensor(rows, dtype=torch.float64, requires_grad=True)
    loss = reference.sparse_ce(
        logits,
        torch.arange(classes),
        k,
        weight=torch.tensor(w, dtype=torch.float64) if weighted else None,
        label_smoothing=smoothing,
        reduction="none",
    )
    loss.sum().backward()
    expected = [_loop(row, y, k, w, smoothing) for y, row in enumerate(rows)]
    # both err by a few roundings of numbers below 10 (math.fsum has none): 100 ulp of 1
    for n, (value, gradient) in enumerate(expected):
        assert abs(loss[n].item() - value) <= 100 * EPS
        assert torch.allclose(
            logits.grad[n], torch.tensor(gradient, dtype=torch.float64), rtol=0, atol=100 * EPS
        )


def test_order_of_the_classes():
    nan, inf = math.nan, math.inf
    row = [0.0, -0.0, nan, inf, 1.0, -inf, 0.0, -nan, 1.0]
    order = reference.support_indices(torch.tensor([row]), 9)[0].tolist()
    assert order == [2, 7, 3, 4, 8, 0, 1, 6, 5]
    for a, b in zip(order, order[1:], strict=False):
        assert _before((row[a], a), (row[b], b))


def test_the_worked_example():
    logits = torch.tensor([[3.0, 2, 1, 0]], requires_grad=True)
    loss = reference.sparse_ce(logits, torch.tensor([2]), 2)
    loss.backward()
    # log(e^3 + e^2) - 1 and the softmax of (3, 2), to the digits given
    assert round(loss.item(), 4) == 2.3133
    assert [round(g, 3) for g in logits.grad[0].tolist()] == [0.731, 0.269, -1.0, 0.0]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignore_index", [-100, 2])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weight"])
@pytest.mark.parametrize("k", [7, 9, None])
def test_at_k_equal_to_v_it_is_cross_entropy(k, weighted, smoothing, ignore_index, reduction):
    torch.manual_seed(0)
    logits = torch.randn(6, 7, dtype=torch.float64)
    target = torch.tensor([0, 6, 2, 3, -100 if ignore_index < 0 else 2, 5])
    options = dict(
        weight=torch.rand(7, dtype=torch.float64) if weighted else None,
        ignore_index=ignore_index,
        label_smoothing=smoothing,
        reduction=reduction,
    )
    upstream = torch.randn(6 if reduction == "none" else (), dtype=torch.float64)
    results = []
    for function in (
        lambda z: reference.sparse_ce(z, target, k, **options),
        lambda z: F.cross_entropy(z, target, **options),
    ):
        z = logits.clone().requires_grad_()
        loss = function(z)
        results.append((loss.detach(), torch.autograd.grad(loss, z, upstream)[0]))
    for ours, theirs in zip(*results, strict=True):
        # sums of at most 42 numbers below 10 in either: 100 ulp of 1
        assert torch.allclose(ours, theirs, rtol=0, atol=100 * EPS)


def test_nothing_counted_is_zero():
    logits = torch.full((3, 4), math.nan, requires_grad=True)
    loss = reference.sparse_ce(logits, torch.full((3,), -100), 2)
    assert loss.item() == 0


def _distance_loop(c: list[float], e: list[float], distance: str) -> tuple[float, list[float]]:
    """Loss and gradient of one row from the definition, in plain Python."""
    if distance == "l2":
        differences = [x - y for x, y in zip(c, e, strict=True)]
        return math.fsum(d * d for d in differences) / 2, differences
    norm_c, norm_e = math.hypot(*c), math.hypot(*e)
    if norm_c == 0 or norm_e == 0:
        return 1.0, [0.0] * len(c)
    cos = math.fsum(x * y for x, y in zip(c, e, strict=True)) / (norm_c * norm_e)
    return 1 - cos, [-(y / norm_e - cos * x / norm_c) / norm_c for x, y in zip(c, e, strict=True)]


@pytest.mark.parametrize("distance", ["cosine", "l2"])
def test_distances_against_a_python_loop(distance):
    draw = random.Random(0)
    outputs, table = ([[draw.gauss(0, 1) for _ in range(7)] for _ in range(5)] for _ in range(2))
    outputs[1], table[2] = [0.0] * 7, [0.0] * 7
    output = torch.tensor(outputs, dtype=torch.float64, requires_grad=True)
    loss = reference.continuous_output(
        output, torch.arange(5), torch.tensor(table, dtype=torch.float64), distance,
        reduction="none",
    )  # fmt: skip
    loss.sum().backward()
    for n, (c, e) in enumerate(zip(outputs, table, strict=True)):
        value, gradient = _distance_loop(c, e, distance)
        # both err by a few roundings of numbers below 10: 100 ulp of 1
        assert abs(loss[n].item() - value) <= 100 * EPS
        assert torch.allclose(
            output.grad[n], torch.tensor(gradient, dtype=torch.float64), rtol=0, atol=100 * EPS
        )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_distances_are_those_of_pytorch(reduction):
    torch.manual_seed(0)
    output, table = torch.randn(6, 7).double(), torch.randn(9, 7).double()
    target = torch.tensor([0, 8, -100, 3, 3, -100])
    counted = target != -100
    c, e = output[counted], table[target[counted]]
    cosine = reference.continuous_output(output, target, table, reduction=reduction)
    l2 = reference.continuous_output(output, target, table, "l2", reduction=reduction)
    if reduction == "none":
        assert (cosine[~counted] == 0).all() and (l2[~counted] == 0).all()
        cosine, l2 = cosine[counted], l2[counted]
    ones = torch.ones(4).double()
    # PyTorch adds 1e-12 to the squares of the norms
    expected = F.cosine_embedding_loss(c, e, ones, reduction=reduction)
    assert torch.allclose(cosine, expected, rtol=0, atol=1e-11)
    squares = F.mse_loss(c, e, reduction="none").sum(-1) / 2
    expected = {"none": squares, "sum": squares.sum(), "mean": squares.mean()}[reduction]
    assert torch.allclose(l2, expected, rtol=0, atol=100 * EPS)
