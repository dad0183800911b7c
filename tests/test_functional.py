"""fused_sparse_ce and sparse_softmax as a user calls them. SPEC 1 and 7."""

import contextlib
import itertools
from functools import partial

import cases
import pytest
import subjects
import torch
import torch.nn.functional as F
from allocations import saved, sizes_of_allocations
from closeness import Truth, assert_within
from sparse_ce import (
    MonotonicPLIF,
    adaptive_sparse_ce,
    backends,
    continuous_output_loss,
    fused_linear_sparse_ce,
    fused_sparse_ce,
    reference,
    sparse_softmax,
)

REGIMES = {
    "list": dict(k=20),
    "list of all": dict(k=203, return_support=True),
    "threshold": dict(k=1025),
    "dense": dict(k=None),
}


def losses(*arguments, **options):
    """fused_sparse_ce without its Support."""
    result = fused_sparse_ce(*arguments, **options)
    return result[0] if options.get("return_support") else result


def assert_as_in_float64(result, truth_of, logits, reduction):
    """Value and gradient of a reduced loss, for 7 rows, k <= 37 and weights between 1 and 2.

    In the units of closeness.py: a loss errs by 2 + log 37 + log2(37) / 2 = 8.2 per unit of weight,
    a gradient by 2 log 37 + 6 = 13.2 more, and at the target by 4. Weights, and their ratio under
    "mean", make it twice that; "sum" adds up the losses. Relative to the loss: 4, log2(37) / 2 for
    label smoothing, 3 for the sum over the rows, 1 for the division.
    """
    upstream = torch.linspace(0.5, 1, result.numel(), dtype=torch.float64).view(result.shape)
    (gradient,) = torch.autograd.grad(result, logits, upstream.to(result))
    assert gradient.dtype == logits.dtype
    z = logits.detach().cpu().double().requires_grad_()
    expected = truth_of(z)
    (expected_gradient,) = torch.autograd.grad(expected, z, upstream)
    unit = torch.finfo(result.dtype).eps * (2 if result.dtype == torch.float64 else 1)
    rows = 7 if reduction == "sum" else 1
    assert_within("loss", result, expected, unit * (rows * 2 * 8.2 + 11 * expected.detach().abs()))
    half_ulp = torch.finfo(logits.dtype).eps / 2 * expected_gradient.abs()
    assert_within("gradient", gradient, expected_gradient, unit * 2 * (8.2 + 13.2 + 4) + half_ulp)


@pytest.mark.interpreter
@pytest.mark.parametrize("listed", [False, True], ids=["threshold", "list"])
@pytest.mark.parametrize("k", [37, 40, None])
def test_cross_entropy_at_k_equal_to_v(subject, dtype, k, listed):
    """Value and gradient over weight x smoothing x ignore_index x reduction."""
    logits = cases.logits("random", 7, 37, dtype).to(subject.device).requires_grad_()
    target = torch.tensor([0, 36, 2, 5, -100, 7, 2])
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    some_weight = 1 + torch.rand(37, dtype=statistics)
    options = itertools.product(
        (None, some_weight), (0.0, 0.1, 1.0), (-100, 2), ("mean", "sum", "none")
    )
    # the interpreter has time for every eleventh combination: each value of each option comes up
    for weight, smoothing, ignore_index, reduction in list(options)[
        :: 11 if subjects.INTERPRETING else 1
    ]:
        y = target if ignore_index == -100 else target.where(target >= 0, 2)
        same = dict(ignore_index=ignore_index, label_smoothing=smoothing, reduction=reduction)
        ours = losses(
            logits,
            y.to(subject.device),
            k,
            weight=None if weight is None else weight.to(subject.device),
            return_support=listed,
            backend=subject.backend,
            **same,
        )
        assert ours.dtype == statistics

        def in_float64(z, y=y, weight=weight, same=same):
            return F.cross_entropy(z, y, None if weight is None else weight.double(), **same)

        assert_as_in_float64(ours, in_float64, logits, reduction)


@pytest.mark.parametrize(
    "weighted, smoothing", [(False, 0.0), (True, 0.1)], ids=["plain", "weight and smoothing"]
)
def test_large_k(subject, dtype, weighted, smoothing):
    """1024 < k < V, by a cut per row or, for the support, by a list; both against the oracle."""
    for filler in ("random", "ties"):
        logits = cases.logits(filler, 3, 2003, dtype).to(subject.device)
        target = torch.tensor([0, 1999, 5])
        weight = torch.rand(2003) if weighted else None
        there = dict(
            weight=None if weight is None else weight.to(subject.device),
            label_smoothing=smoothing,
            reduction="none",
            backend=subject.backend,
        )
        truth = Truth(logits.cpu(), target, 1500, weight, smoothing)
        z = logits.clone().requires_grad_()
        loss = fused_sparse_ce(z, target.to(subject.device), 1500, **there)
        loss.sum().backward()
        truth.assert_loss(loss)
        truth.assert_gradient(z.grad, torch.ones(3))
        if subject.lists(1500):
            loss, support = fused_sparse_ce(
                logits, target.to(subject.device), 1500, return_support=True, **there
            )
            truth.assert_forward(loss, support.lse, support.indices, support.probs)


@pytest.mark.interpreter
def test_the_worked_example(subject, dtype):
    logits = torch.tensor([[3.0, 2, 1, 0]], dtype=dtype, device=subject.device, requires_grad=True)
    loss = fused_sparse_ce(
        logits, torch.tensor([2], device=subject.device), 2, backend=subject.backend
    )
    loss.backward()
    # the digits given, and half an ulp of the gradient's dtype below 1
    assert abs(loss.item() - 2.3133) <= 5e-5
    half_ulp = torch.finfo(dtype).eps / 4
    expected = torch.tensor([[0.731, 0.269, -1, 0]]).double()
    assert_within("gradient", logits.grad, expected, torch.tensor(5e-4 + half_ulp).double())


@pytest.mark.interpreter
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignore_index", [-100, 2])
@pytest.mark.parametrize(
    "weighted, smoothing", [(False, 0.0), (True, 0.1)], ids=["plain", "weight and smoothing"]
)
def test_reductions_against_the_oracle(
    subject, dtype, reduction, ignore_index, weighted, smoothing
):
    logits = cases.logits("random", 7, 37, dtype).to(subject.device).requires_grad_()
    target = torch.tensor([0, 36, 2, 5, ignore_index, 7, 2])
    weight = (
        1 + torch.rand(37, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        if weighted
        else None
    )
    same = dict(ignore_index=ignore_index, label_smoothing=smoothing, reduction=reduction)
    loss = fused_sparse_ce(
        logits,
        target.to(subject.device),
        5,
        weight=None if weight is None else weight.to(subject.device),
        backend=subject.backend,
        **same,
    )
    assert_as_in_float64(
        loss, lambda z: reference.sparse_ce(z, target, 5, weight=weight, **same), logits, reduction
    )


@pytest.mark.interpreter
@pytest.mark.parametrize("k", [20, None])
@pytest.mark.parametrize("layout", cases.PUBLIC_LAYOUTS)
def test_layouts(subject, layout, k):
    """SPEC 1, any strides. The logits' memory, with what is around them, stays as it was."""
    dtype = torch.bfloat16
    logits = cases.logits("random", 4, 203, dtype).unflatten(0, (2, 2)).to(subject.device)
    view = cases.PUBLIC_LAYOUTS[layout](logits).requires_grad_()
    memory = view.detach().as_strided(
        (view.untyped_storage().nbytes() // view.element_size(),), (1,), 0
    )
    before = cases.bits(memory.clone())
    target = torch.arange(view.shape[:-1].numel(), device=subject.device).view(view.shape[:-1])
    loss = fused_sparse_ce(view, target, k, reduction="none", backend=subject.backend)
    upstream = torch.linspace(0.5, 1, loss.numel(), device=loss.device).view(loss.shape)
    (gradient,) = torch.autograd.grad(loss, view, upstream)
    assert loss.shape == target.shape and gradient.shape == view.shape
    if loss.numel():
        truth = Truth(view.detach(), target, k or 203)
        truth.assert_loss(loss)
        truth.assert_gradient(gradient, upstream)
    assert torch.equal(before, cases.bits(memory))


@pytest.mark.parametrize("dtype_of_target", [torch.int32, torch.int64])
@pytest.mark.parametrize("strides", ["contiguous", "every second", "expanded", "transposed"])
def test_target_layouts_and_dtypes(subject, dtype_of_target, strides):
    logits = cases.logits("random", 6, 37, torch.float32).unflatten(0, (2, 3)).to(subject.device)
    target = torch.tensor([[3, 0, 36], [7, 1, 5]], dtype=dtype_of_target, device=subject.device)
    target = {
        "contiguous": target,
        "every second": torch.stack([target, -torch.ones_like(target)], -1).flatten(1)[:, ::2],
        "expanded": target[:, :1].expand(2, 3),
        "transposed": target.T.contiguous().T,
    }[strides]
    loss = fused_sparse_ce(logits, target, 5, reduction="none", backend=subject.backend)
    Truth(logits, target, 5).assert_loss(loss)


@pytest.mark.parametrize("dtype_of_weight", [torch.bfloat16, torch.float32, torch.float64])
def test_weight_of_another_dtype_and_stride(subject, dtype_of_weight):
    logits = cases.logits("random", 6, 37, torch.float32).to(subject.device)
    target = torch.arange(6, device=subject.device)
    weight = torch.rand(74, device=subject.device).to(dtype_of_weight)[::2]
    loss = fused_sparse_ce(
        logits, target, 5, weight=weight, reduction="none", backend=subject.backend
    )
    Truth(logits, target, 5, weight.float()).assert_loss(loss)


@pytest.mark.interpreter
@pytest.mark.parametrize("k", [20, None])
def test_loss_without_gradient_is_the_same(subject, k):
    logits = cases.logits("random", 3, 203, torch.float32).to(subject.device)
    target = torch.arange(3, device=subject.device)
    with torch.no_grad():
        evaluated = fused_sparse_ce(logits, target, k, backend=subject.backend)
    trained = fused_sparse_ce(logits.requires_grad_(), target, k, backend=subject.backend)
    assert torch.equal(evaluated, trained) and not evaluated.requires_grad


@pytest.mark.parametrize("dtype_of_autocast", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(subject, dtype_of_autocast):
    logits = cases.logits("random", 3, 203, torch.float32).to(subject.device)
    target = torch.arange(3, device=subject.device)
    with torch.autocast(subject.device, dtype_of_autocast):
        loss = fused_sparse_ce(logits, target, 20, backend=subject.backend)
    assert torch.equal(loss, fused_sparse_ce(logits, target, 20, backend=subject.backend))


@pytest.mark.interpreter
@pytest.mark.parametrize("regime", REGIMES)
def test_backward_twice(subject, regime):
    options = REGIMES[regime]
    if regime == "list of all" and not subject.lists(options["k"]):
        pytest.skip("the backend lists no such k")
    logits = cases.logits("random", 3, 203 if regime != "threshold" else 1100, torch.bfloat16)
    logits = logits.to(subject.device).requires_grad_()
    target = torch.arange(3, device=subject.device)
    loss = losses(logits, target, **options, reduction="none", backend=subject.backend)
    upstream = torch.tensor([1.0, 0.25, -2], device=subject.device)
    gradients = [
        torch.autograd.grad(loss, logits, upstream, retain_graph=True)[0] for _ in range(2)
    ]
    assert torch.equal(*gradients)
    k = logits.shape[-1] if options["k"] is None else options["k"]
    Truth(logits.detach(), target, k).assert_gradient(gradients[1], upstream)


@pytest.mark.interpreter
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_gradient_of_a_layer_below(subject, reduction):
    """The gradient that comes from above is not one, and logits are not a leaf."""
    hidden = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).double()
    head = torch.randn(37, 8, generator=torch.Generator().manual_seed(1)).double()
    target = torch.arange(5)

    def gradients(function, device, dtype):
        x, w = (t.to(device, dtype).requires_grad_() for t in (hidden, head))
        (3 * function(x @ w.T, target.to(device), 5, reduction=reduction)).backward()
        return x.grad, w.grad

    ours = gradients(
        partial(fused_sparse_ce, backend=subject.backend), subject.device, torch.float32
    )
    # 3 x a sum of at most 37 products of numbers below 4, and logits that are off by 8 ulp of 16
    tolerance = torch.tensor(3 * 37 * 4 * 8 * 16 * 2.0**-24).double()
    for found, expected in zip(
        ours, gradients(reference.sparse_ce, "cpu", torch.float64), strict=True
    ):
        assert_within("gradient", found, expected, tolerance)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("ignore_index", [-100, 3, -1, 2**40])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignored_rows_are_exactly_zero(subject, regime, ignore_index, reduction):
    """SPEC 7: where the logits are NaN too. The other rows are as if they were alone."""
    classes = 1100 if regime == "threshold" else 203
    logits = cases.logits("random", 4, classes, torch.float32)
    logits[1] = torch.nan
    logits[2, 5] = torch.inf
    logits = logits.to(subject.device).requires_grad_()
    target = torch.tensor([7, ignore_index, ignore_index, 9], device=subject.device)
    options = dict(
        reduction=reduction, label_smoothing=0.1, backend=subject.backend, **REGIMES[regime]
    )
    if not subject.lists(options["k"] or 0):
        options["return_support"] = False
    loss = losses(logits, target, ignore_index=ignore_index, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    # in place: a row that begins elsewhere in a chunk of 16 bytes is added up in another order
    counted = slice(None, None, 3)
    alone = logits.detach()[counted].requires_grad_()
    expected = losses(alone, target[counted], **options)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), alone)
    assert (gradient[[1, 2]] == 0).all()
    assert torch.equal(gradient[counted], expected_gradient)
    if reduction == "none":
        assert loss[[1, 2]].tolist() == [0, 0]
        loss = loss[counted]
    assert torch.equal(loss, expected)


@pytest.mark.interpreter
@pytest.mark.parametrize("k", [20, None])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weight"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [0, 3], ids=["no rows", "all ignored"])
def test_nothing_to_count_is_zero(subject, rows, reduction, weighted, k):
    logits = torch.full((rows, 203), torch.nan, device=subject.device, requires_grad=True)
    target = torch.full((rows,), -100, device=subject.device)
    weight = torch.rand(203, device=subject.device) if weighted else None
    loss = fused_sparse_ce(
        logits, target, k, weight=weight, reduction=reduction, backend=subject.backend
    )
    assert loss.shape == ((rows,) if reduction == "none" else ()) and (loss == 0).all()
    loss.sum().backward()
    assert logits.grad.shape == (rows, 203) and (logits.grad == 0).all()


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (2, 0, 3)], ids=str)
def test_no_rows_of_more_dimensions(subject, shape):
    logits = torch.empty(*shape, 203, device=subject.device, requires_grad=True)
    target = torch.empty(shape, dtype=torch.int64, device=subject.device)
    loss, support = fused_sparse_ce(
        logits, target, 20, reduction="none", return_support=True, backend=subject.backend
    )
    loss.sum().backward()
    assert (
        loss.shape == shape
        and support.probs.shape == (*shape, 20)
        and logits.grad.shape == logits.shape
    )


@pytest.mark.interpreter
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_saved_for_backward_is_of_the_size_of_the_support(subject, dtype, reduction):
    """SPEC 1: k indices and probabilities and a target per row, 8 k + 8 bytes, and little more."""
    rows, k = 4, 20
    logits = cases.logits("random", rows, 1003, dtype).to(subject.device).requires_grad_()
    target = torch.arange(rows, device=subject.device)
    tensors = saved(
        lambda: fused_sparse_ce(logits, target, k, reduction=reduction, backend=subject.backend)
    )
    probability = 8 if dtype == torch.float64 else 4
    size = sum(t.numel() * t.element_size() for t in tensors)
    # a mask of ignored rows; sums of one number
    assert size <= rows * (k * (4 + probability) + 8 + 1) + 3 * 8


@pytest.mark.interpreter
@pytest.mark.parametrize("regime", ["threshold", "dense"])
def test_saved_for_backward_is_the_logits_themselves(subject, dtype, regime):
    """SPEC 1: past the list regime O(N), and the logits by reference."""
    rows = 4
    logits = cases.logits("random", rows, 1100, dtype).to(subject.device).requires_grad_()
    target = torch.arange(rows, device=subject.device)
    tensors = saved(
        lambda: fused_sparse_ce(logits, target, **REGIMES[regime], backend=subject.backend)
    )
    (wide,) = [t for t in tensors if t.numel() > 10 * rows]
    assert wide.data_ptr() == logits.data_ptr() and wide.shape == logits.shape
    assert (
        sum(t.numel() * t.element_size() for t in tensors if t is not wide)
        <= rows * (8 + 1 + 4 * 8 + 4) + 3 * 8
    )


@pytest.mark.parametrize("linked", [False, True], ids=["", "link"])
def test_backward_allocates_one_gradient(subject, dtype, linked):
    """Nothing else of its size: torch's scatter_ takes a float32 copy of a 16-bit tensor."""
    if subject.device != "cpu":
        pytest.skip("the allocations of the CPU are looked at")
    link = MonotonicPLIF(100) if linked else None
    logits = cases.logits("random", 64, 5003, dtype).requires_grad_()
    target = torch.arange(64)
    loss = fused_sparse_ce(logits, target, 20, link=link, backend=subject.backend)
    allocations, _ = sizes_of_allocations(lambda: loss.backward())
    wide = [size for size in allocations if size >= 64 * 5003]
    assert wide == [logits.numel() * dtype.itemsize]


@pytest.mark.interpreter
@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_sparse_softmax_is_the_softmax_of_the_support(subject, dtype, dim):
    logits = cases.logits("random", 3 * 4, 5, dtype).view(3, 4, 5)
    ours = sparse_softmax(logits.to(subject.device), 2, dim, backend=subject.backend)
    assert ours.dtype == dtype and ours.shape == logits.shape
    moved = logits.movedim(dim, -1)
    truth = Truth(moved, torch.zeros(moved.shape[:-1], dtype=torch.int64), 2)
    # it is the gradient of the log-sum-exp of the support
    truth.assert_gradient(ours.movedim(dim, -1), dlse=torch.ones(moved.shape[:-1]))


@pytest.mark.parametrize("k", [4, 9, None])
def test_sparse_softmax_with_all_classes_is_softmax(subject, k):
    logits = cases.logits("random", 3, 4, torch.float32).to(subject.device)
    assert torch.equal(
        sparse_softmax(logits, k, backend=subject.backend), torch.softmax(logits, -1)
    )


def test_sparse_softmax_of_a_vector_and_of_ties(subject):
    logits = torch.tensor([1.0, 2, 2, 2, 0], device=subject.device)
    assert sparse_softmax(logits, 2, backend=subject.backend).tolist() == [0, 0.5, 0.5, 0, 0]


@pytest.mark.float64
def test_gradient_of_sparse_softmax(subject):
    """As a masked softmax: the mask is the support, and has no gradient."""
    z = cases.logits("random", 3, 9, torch.float64)
    upstream = torch.randn(3, 9).double()
    ours, theirs = z.clone().to(subject.device).requires_grad_(), z.clone().requires_grad_()
    sparse_softmax(ours, 4, backend=subject.backend).backward(upstream.to(subject.device))
    outside = torch.ones(3, 9, dtype=torch.bool).scatter(-1, reference.support_indices(z, 4), False)
    theirs.masked_fill(outside, -torch.inf).softmax(-1).backward(upstream)
    # a dozen roundings of numbers below 4
    assert torch.allclose(
        ours.grad.cpu(), theirs.grad, rtol=0, atol=48 * torch.finfo(torch.float64).eps
    )


def test_automatic_choice_is_the_first_backend_that_can(subject):
    logits = cases.logits("random", 3, 203, torch.float32).to(subject.device)
    first = next(
        s.backend
        for s in subjects.SUBJECTS
        if s.device == subject.device and not (s.backend == "triton" and s.device == "cpu")
    )
    assert backends.resolve("auto", subject.device, torch.float32, False) == first
    target = torch.arange(3, device=subject.device)
    assert torch.equal(
        fused_sparse_ce(logits, target, 20), fused_sparse_ce(logits, target, 20, backend=first)
    )


@pytest.mark.parametrize("k", [3, None])
def test_shapes_without_numbers(k):
    """On the meta device, and of fake tensors outside of a compiled graph, which have no numbers to
    be looked at.
    """
    fake_tensor = pytest.importorskip("torch._subclasses.fake_tensor")
    for context, device in (
        (contextlib.nullcontext(), "meta"),
        (fake_tensor.FakeTensorMode(), "cpu"),
    ):
        with context:
            logits = torch.empty(4, 9, device=device, requires_grad=True)
            hidden = torch.empty(4, 5, device=device, requires_grad=True)
            weight = torch.empty(9, 5, device=device, requires_grad=True)
            target = torch.zeros(4, dtype=torch.int64, device=device)
            for loss in (
                fused_sparse_ce(logits, target, k),
                fused_linear_sparse_ce(hidden, weight, target, k),
                adaptive_sparse_ce(logits, target),
                adaptive_sparse_ce(logits, torch.zeros_like(logits)),
                continuous_output_loss(hidden, target, weight.detach()),
            ):
                assert loss.shape == () and loss.dtype == torch.float32
                loss.backward()
            assert logits.grad.shape == (4, 9) and weight.grad.shape == (9, 5)


@pytest.mark.parametrize("name", ["list", "threshold", "adaptive", "continuous"])
def test_second_derivative_of_an_ignored_row_of_nan_is_zero(subject, name):
    """SPEC 1: a second derivative is never wrong."""
    z = torch.randn(2, 40, device=subject.device)
    z[0] = torch.nan
    z.requires_grad_()
    target = torch.tensor([7, 1], device=subject.device)
    options = {"ignore_index": 7, "backend": subject.backend}
    if name == "adaptive":
        loss = adaptive_sparse_ce(z, target, 0.5, **options)
    elif name == "continuous":
        loss = continuous_output_loss(
            z, target, torch.randn(9, 40, device=subject.device), **options
        )
    else:
        loss = fused_sparse_ce(z, target, 5 if name == "list" else None, **options)
    (gradient,) = torch.autograd.grad(loss, z, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), z)
    assert (gradient[0] == 0).all() and (second[0] == 0).all()
    assert second[1].isfinite().all() and second[1].abs().sum() > 0


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)])
def test_no_rows_of_any_strides(subject, shape):
    logits = torch.empty(*shape[:-1], 10, device=subject.device)[..., ::2].requires_grad_()
    target = torch.empty(shape[:-1], dtype=torch.int64, device=subject.device)
    name = {"backend": subject.backend}
    for loss in (
        fused_sparse_ce(logits, target, 2, **name),
        fused_sparse_ce(logits, target, None, **name),
        fused_sparse_ce(logits, target, 2, return_support=True, **name)[0],
        fused_sparse_ce(logits, target, 2, link=MonotonicPLIF(4).to(subject.device), **name),
        adaptive_sparse_ce(logits, target, **name),
        adaptive_sparse_ce(logits, torch.zeros_like(logits), **name),
        continuous_output_loss(logits, target, torch.ones(3, 5, device=subject.device), **name),
    ):
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss == 0 and gradient.shape == shape
    assert sparse_softmax(logits, 2, **name).shape == shape


def test_softmax_of_nothing_along_another_dimension(subject):
    x = torch.empty(5, 0, device=subject.device)
    assert sparse_softmax(x, 2, 0, backend=subject.backend).shape == (5, 0)
    with pytest.raises(ValueError, match="^logits: expected at least one entry along dim=1"):
        sparse_softmax(x, 2, 1)


@pytest.mark.parametrize("statistic", ["entropy", "tail_mass", "lse"])
@pytest.mark.parametrize(
    "options", [dict(k=5), dict(k=None), dict(k=5, normalizer="full")], ids=str
)
def test_a_masked_row_that_is_nan_leaves_no_trace(subject, statistic, options):
    """SPEC 7, of what is composed from the support as well."""
    logits = cases.logits("random", 3, 37, torch.float32).to(subject.device)
    logits[0] = torch.nan
    target = torch.tensor([-100, 1, 2], device=subject.device)
    gradients = []
    for rows in (slice(0, 3), slice(1, 3)):
        z = logits[rows].clone().requires_grad_()
        loss, support = fused_sparse_ce(
            z, target[rows], return_support=True, backend=subject.backend, **options
        )
        found = getattr(support, statistic)
        found = found if isinstance(found, torch.Tensor) else found()
        (loss - 0.01 * found[target[rows] != -100].mean()).backward()
        gradients.append(z.grad)
    assert (gradients[0][0] == 0).all() and torch.equal(gradients[0][1:], gradients[1])


def test_infinite_upstream(subject):
    """What is not kept has no gradient, however large the upstream one; a link that is the identity
    changes nothing.
    """
    logits = torch.tensor([[2.0, 1.9, 0.0, -1.0]], device=subject.device, requires_grad=True)
    target = torch.tensor([0], device=subject.device)
    options = dict(reduction="none", backend=subject.backend)
    upstream = torch.full((1,), torch.inf, device=subject.device)

    def gradient(loss):
        return torch.autograd.grad(loss, logits, upstream)[0]

    kept = gradient(adaptive_sparse_ce(logits, target, 0.1, label_smoothing=0.1, **options))
    assert kept[0, :2].isnan().all() and (kept[0, 2:] == 0).all()
    plif = MonotonicPLIF(10, 5.0).to(subject.device).requires_grad_(False)
    linked = gradient(fused_sparse_ce(logits, target, None, link=plif, **options))
    plain = gradient(fused_sparse_ce(logits, target, None, **options))
    torch.testing.assert_close(linked, plain, equal_nan=True)
