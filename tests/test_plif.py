"""MonotonicPLIF: the function alone, before the dense softmax and on the sparse support, per
backend, against the float64 oracle. SPEC 4.

How far a result may be from the truth, in units of the ulp of 1 of the statistics (two for
float64, whose truth errs as much):

f(x)      slope x + offset: slope and offset are rounded, so are their product and the sum:
          2 |slope x| + 2 |offset| at most. An x so near to a knot that its cell is the next:
          x + bound and its product with the rate are rounded, 3 bound units of x, times the
          difference of the slopes.
loss      the tolerance of closeness.py at logits f(z), and what an error d of f(z) makes of it:
          sum p d + d_y, and for smoothed labels the mean of d, times the weights.
gradient  of f(z): p is off by the factor d_i + sum p d more. Of z: times a slope, 2 units.
slopes    dw = sum_i g_i df(z_i)/dw_j: the errors of g times |df/dw|, and 4 units of their absolute
          values for roundings of slopes and sums. In the cell of z, where the share of the cell is
          rounded and halves may cancel, that is relative to its width; 3 bound units more, there
          and beside it, where z is as near to a knot. The fixed point keeps 2^-60 of the sum of
          |g|, or of a bound 4 N times as large, per logit.
"""

import itertools
import math

import cases
import pytest
import subjects
import torch
from allocations import saved
from closeness import Truth, assert_within
from sparse_ce import (
    MonotonicPLIF,
    SparseCrossEntropyLoss,
    backends,
    fused_sparse_ce,
    ops,
    plif,
    reference,
    schema,
)
from torch.autograd import gradcheck

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# cells and bound: one cell; knots that all dtypes have, 0 among them; no such knots, 0 in a cell
SHAPES = [(1, 3.0), (8, 4.0), (37, 3.0), (1001, 20.0)]


def bent(cells=37, bound=3.0, dtype=torch.float32, device="cpu"):
    torch.manual_seed(2)
    return MonotonicPLIF(cells, bound, init_std=1.0).to(device, dtype)


def of_dtype(dtype):
    """The dtype of w beside such logits."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class LinkTruth:
    """Losses and gradients of a link, in float64, and how closely."""

    def __init__(self, link, logits, target, k=None, upstream=None, weight=None, smoothing=0.0):
        self.bound, w = link.bound, link.w.detach().cpu().double().requires_grad_()
        z = logits.detach().cpu().double().requires_grad_()
        classes = z.shape[-1]
        self.k = classes if k is None else min(k, classes)
        f = reference.plif(z.flatten(), w, self.bound).view(z.shape)
        options = dict(weight=weight, label_smoothing=smoothing, reduction="none")
        self.loss = reference.sparse_ce(f, target, self.k, **options)
        upstream = torch.ones_like(self.loss) if upstream is None else upstream.double()
        (slopes,) = torch.autograd.grad(f.sum(), z, retain_graph=True)
        df, dz, dw = torch.autograd.grad((self.loss * upstream).sum(), (f, z, w))
        self.loss, self.dz, self.dw = self.loss.detach(), dz, dw

        base = Truth(f.detach(), target, self.k, weight, smoothing)
        base.dtype, base.unit = logits.dtype, torch.finfo(of_dtype(logits.dtype)).eps
        base.unit *= 2 if logits.dtype == torch.float64 else 1
        d = function_tolerance(link, z.detach(), base.unit)
        p = torch.zeros_like(d).scatter(-1, base.indices, base.probs)
        w_y = torch.ones(len(target)).double() if weight is None else weight.double()[target]
        largest = 1 if weight is None else weight.abs().max().double()
        mean = d.gather(-1, base.indices).mean(-1)
        moved = w_y * ((p * d).sum(-1) + d.gather(-1, target.unsqueeze(-1)).squeeze(-1))
        self.loss_tolerance = base.loss_tolerance + moved + smoothing * largest * 2 * mean
        relative = (d + (p * d).sum(-1, keepdim=True)) * p * upstream.abs().unsqueeze(-1) * largest
        active = upstream.nonzero().flatten()
        error = torch.zeros_like(p)
        zero = torch.zeros(len(active)).double()
        error[active] = base._gradient_tolerance(
            active, upstream[active], zero, zero.unsqueeze(-1).expand(-1, self.k)
        )
        error += relative
        out = torch.finfo(logits.dtype)
        rounding = out.eps / 2 if out.bits < 32 else 0
        self.dz_tolerance = error * slopes + (2 * base.unit + rounding) * self.dz.abs()
        self.dz_tolerance += out.smallest_normal
        z = z.detach().flatten()
        fixed = 2.0**-60 * 4 * len(target) * upstream.abs().max() * largest
        self.dw_tolerance = slopes_tolerance(
            link, z, df.flatten(), error.flatten(), fixed, base.unit
        )
        self.dw_tolerance += base.unit * dw.abs()

    def assert_loss(self, loss):
        assert_within("loss", loss, self.loss, self.loss_tolerance)

    def assert_gradients(self, dz, dw):
        assert_within("dlogits", dz, self.dz, self.dz_tolerance)
        assert_within("dw", dw, self.dw, self.dw_tolerance)


def function_tolerance(link, x, unit):
    w, cells = link.w.detach().cpu().double(), link.num_cells
    f = reference.plif(x.flatten(), w, link.bound).view(x.shape).abs()
    slopes = torch.nn.functional.softplus(w)
    steepest, jump = slopes.max(), (slopes.max() - slopes.min()) * link.bound
    # |offset| <= |f| + |slope x|
    result = unit * (4 * steepest * x.abs() + 2 * f + 3 * jump)
    # what only float64 sees: a step of the offsets loses 2^-60 of their sum, the truth adds heights
    truth = cells * (f + steepest * 2 * link.bound / cells) * 2.0**-52
    return result + cells**2 * jump * 2.0**-60 + truth


def slopes_tolerance(link, x, g, error, fixed, unit):
    """Of dw, but for its own rounding: x, g and the error of g are one-dimensional."""
    w, cells = link.w.detach().cpu().double(), link.num_cells
    share = torch.func.jacrev(lambda w: reference.plif(x, w, link.bound))(w).abs()
    place, width = (x + link.bound) * cells / (2 * link.bound), 2 * link.bound / cells
    cell = place.floor().clamp(0, cells - 1)
    distance = (torch.arange(cells) - cell.unsqueeze(-1)).abs()
    knot = (place - place.round()).abs() * width <= 3 * link.bound * unit
    # knots, of the truth too, are rounded in float64
    own = 4 * unit * width * (distance == 0) + 3 * link.bound * 2.0**-52
    beside = 3 * link.bound * unit * (distance <= 1) * knot.unsqueeze(-1)
    derivative = w.sigmoid() * (own + beside)
    return (error + 4 * unit * g.abs() + fixed) @ share + (g.abs() + fixed / unit) @ derivative


def numbers(dtype, bound, count=400):
    """Inside, outside and on the knots of 8 cells on [-4, 4]."""
    torch.manual_seed(0)
    random = torch.randn(count) * bound
    return torch.cat([random, torch.arange(-6.0, 7.0), torch.tensor([0.0, -0.0])]).to(dtype)


# the oracle


@pytest.mark.parametrize("cells, bound", [(1, 2.0), (4, 2.0), (5, 2.0)])
def test_the_oracle_is_the_integral_of_the_slopes(cells, bound):
    w = bent(cells, bound).w.detach().double()
    slopes = torch.nn.functional.softplus(w)
    for x in (-3.1, -2.0, -0.7, 0.0, 0.3, 1.0, 2.5):
        steps = 20000
        total = 0.0
        for i in range(steps):  # the midpoint rule errs in the steps with a knot
            at = x * (i + 0.5) / steps
            cell = min(max(math.floor((at + bound) * cells / (2 * bound)), 0), cells - 1)
            total += slopes[cell].item() * x / steps
        found = reference.plif(torch.tensor([x]).double(), w, bound).item()
        assert abs(found - total) <= (cells + 1) * slopes.max() * abs(x) / steps


# the function


def leave_to_bfloat16(dtype):
    if subjects.INTERPRETING and dtype != torch.bfloat16:
        pytest.skip("100,000 cells take seconds in the interpreter, of any dtype")


@pytest.mark.interpreter
def test_the_start_is_the_identity(subject, dtype):
    """To the last bit."""
    leave_to_bfloat16(dtype)
    link = MonotonicPLIF().to(subject.device)
    x = numbers(dtype, 20.0).to(subject.device)
    x = torch.cat([x, x.new_tensor([math.inf, -math.inf, math.nan])])
    y = link(x, subject.backend)
    assert torch.equal(y[:-1], x[:-1]) and y[-1].isnan()


def test_slopes_of_the_start_are_one():
    for dtype in (torch.float32, torch.float64):
        slopes, offsets = MonotonicPLIF().tables(dtype)
        assert slopes.dtype == offsets.dtype == dtype
        assert (slopes == 1).all() and (offsets == 0).all()


def test_slopes_do_not_underflow(subject):
    """f increases whatever w, and knows what becomes of an infinity."""
    link = MonotonicPLIF(8, 4.0).to(subject.device)
    with torch.no_grad():
        link.w.fill_(-200)
    assert (link.tables(torch.float32)[0] > 0).all()
    x = torch.tensor([-torch.inf, torch.inf], device=subject.device)
    assert torch.equal(link(x, subject.backend), x)


@pytest.mark.interpreter
@pytest.mark.parametrize("cells, bound", SHAPES)
def test_values_and_gradients(subject, dtype, cells, bound):
    link = bent(cells, bound, of_dtype(dtype), subject.device)
    values = numbers(dtype, bound)
    x = values.to(subject.device).requires_grad_()
    y = link(x, subject.backend)
    assert y.dtype == dtype and y.shape == x.shape
    upstream = torch.randn(x.shape).to(dtype)
    y.backward(upstream.to(subject.device))

    z = values.double().requires_grad_()
    w = link.w.detach().cpu().double().requires_grad_()
    expected = reference.plif(z, w, bound)
    unit = torch.finfo(of_dtype(dtype)).eps * (2 if dtype == torch.float64 else 1)
    output = torch.finfo(dtype)
    rounding = output.eps / 2 if output.bits < 32 else 0
    d = function_tolerance(link, z.detach(), unit)
    assert_within("y", y, expected, d + rounding * (expected.abs() + d).detach())
    g = upstream.double()
    dz, dw = torch.autograd.grad(expected, (z, w), g)
    assert_within("dx", x.grad, dz, (2 * unit + rounding) * dz.abs() + output.smallest_normal)
    fixed = 2.0**-60 * g.abs().max() * g.numel()
    tolerance = slopes_tolerance(link, z.detach(), g, torch.zeros_like(g), fixed, unit)
    assert_within("dw", link.w.grad, dw, tolerance + unit * dw.abs())


@pytest.mark.interpreter
@pytest.mark.parametrize("cells", [1, 2, 7, 8, 1001])
def test_zero_stays_zero_and_order_stays(subject, cells):
    link = bent(cells, 3.0, device=subject.device)
    assert link(torch.zeros(2, device=subject.device), subject.backend).tolist() == [0, 0]
    x = torch.linspace(-5, 5, 801, device=subject.device)
    y = link(x, subject.backend)
    # steps of 1/80 are far above the rounding: not one is lost
    assert (y[1:] > y[:-1]).all()


@pytest.mark.interpreter
def test_shapes_and_strides(subject):
    link = bent(device=subject.device)
    x = torch.randn(4, 5, 6, device=subject.device)
    flat = link(x.flatten(), subject.backend)
    for view in (x, x.transpose(0, 2), x[:, ::2], x[:0], x[0, 0, 0]):
        found = link(view, subject.backend)
        assert found.shape == view.shape
    assert torch.equal(link(x.transpose(0, 2), subject.backend).transpose(0, 2).flatten(), flat)
    link(x[:0], subject.backend).sum().backward()
    assert (link.w.grad == 0).all()


@pytest.mark.interpreter
def test_numbers_that_are_none(subject):
    """NaN and infinities go through; a gradient of 0 keeps them out of that of w, others do not."""
    link = bent(device=subject.device)
    x = torch.tensor([math.nan, math.inf, -math.inf, 1.0], device=subject.device).requires_grad_()
    y = link(x, subject.backend)
    assert y[0].isnan() and y[1] == math.inf and y[2] == -math.inf
    (dw,) = torch.autograd.grad(y, link.w, y.new_tensor([0.0, 0, 0, 1]), retain_graph=True)
    (alone,) = torch.autograd.grad(link(x[3:], subject.backend), link.w, y.new_ones(1))
    assert torch.equal(dw, alone)
    for place in range(3):
        above = torch.zeros_like(y)
        above[place] = 1
        (dw,) = torch.autograd.grad(y, link.w, above, retain_graph=True)
        assert not dw.isfinite().all()
    for wrong in (math.nan, math.inf):
        (dw,) = torch.autograd.grad(y, link.w, torch.full_like(y, wrong), retain_graph=True)
        assert dw.isnan().all()


# what is made of w, and what w gets

# a turn of a program on a GPU has 512 cells, and one begins at the middle
CELLS = [1, 2, 3, 511, 512, 513, 1023, 1024, 1025, 1026, 5001, 100_000]


def statistics(subject):
    return [d for d in (torch.float32, torch.float64) if d in subject.dtypes]


def power_of_two(total):
    """That takes `total` to at most 2^60, and is the largest that does."""
    mantissa, exponent = math.frexp(max(total, 2.0**-900))
    return math.ldexp(1.0, 60 - exponent + (mantissa == 0.5))


def offsets_of(slopes, bound):
    """By Python's integers; and how far those may be that are added up as floats."""
    cells, wide = len(slopes), slopes.double().tolist()
    pairs = enumerate(itertools.pairwise(wide), 1)
    steps = [(a - b) * ((2 * i - cells) * (bound / cells)) for i, (a, b) in pairs]
    scale = power_of_two(max(map(abs, steps), default=0.0) * cells)
    sums = [0, *itertools.accumulate(int(step * scale) for step in steps)]
    offsets = torch.tensor([(x - sums[cells // 2]) / scale for x in sums], dtype=torch.float64)
    # every partial sum is rounded; an integer is cut by up to 1
    return offsets, cells * (2.0**-53 * sum(map(abs, steps)) + 1 / scale)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "dtype_of_w, cells",
    [*itertools.product(backends.ALL_DTYPES, CELLS[:-1]), (torch.float32, CELLS[-1])],
    ids=str,
)
def test_tables(subject, dtype_of_w, cells):
    """Slopes: exp and log1p, or what stands for it, err by 8 units of float64 together; then they
    are rounded to the dtype of w, and to that of the tables. The offsets that follow from these
    slopes are exact but where floats are added up.
    """
    torch.manual_seed(cells)
    w = (3 * torch.randn(cells)).clamp(-19, 19).to(dtype_of_w)
    w[0], w[-1] = -200, 12
    for dtype in statistics(subject):
        found = ops.plif_tables(w.to(subject.device), 3.1, dtype, subject.backend)
        slopes, offsets = (t.cpu() for t in found)
        assert slopes.dtype == offsets.dtype == dtype
        expected = torch.logaddexp(w.double(), torch.zeros(()).double())
        units = [torch.finfo(d).eps / 2 for d in (dtype_of_w, dtype)]
        least = sum(torch.finfo(d).smallest_normal for d in (dtype_of_w, dtype))
        assert_within("slopes", slopes, expected, (sum(units) + 8 * 2.0**-52) * expected + least)
        assert (slopes > 0).all()
        expected, tolerance = offsets_of(slopes, 3.1)
        if subject.backend == "cpu":
            rounding = units[1] * expected.abs()
            assert_within("offsets", offsets, expected, tolerance + rounding)
        else:
            assert torch.equal(offsets, expected.to(dtype))


@pytest.mark.interpreter
def test_cells_of_several_turns(subject, monkeypatch):
    """As of more cells than all programs of Triton have in a turn, here six: three on either side
    of the middle, and one more where that is no multiple.
    """
    if subject.backend != "triton":
        pytest.skip("tests/test_emulated_cuda.py has as many cells as it takes")
    monkeypatch.setattr("sparse_ce.triton_kernels.plif_tables.PARTS", 8)
    for cells in (6 * 512 + 1, 12 * 512 - 1, 12 * 512 + 700):
        test_tables(subject, torch.float32, cells)
        test_dslopes(subject, cells)


@pytest.mark.interpreter
@pytest.mark.parametrize("wrong", [math.nan, -math.nan, math.inf])
def test_tables_of_no_number(subject, wrong):
    """A slope is none, and no offset that its step is in."""
    for cells, place in ((3, 0), (1030, 700)):
        w = torch.zeros(cells)
        w[place] = wrong
        slopes, offsets = ops.plif_tables(w.to(subject.device), 3.0, torch.float32, subject.backend)
        assert slopes.isfinite().sum() == cells - 1 and not slopes[place].isfinite()
        if subject.backend != "cpu":  # there it is in those of one side
            assert offsets.isnan().all()
    slopes, offsets = ops.plif_tables(
        torch.full((1,), wrong, device=subject.device), 3.0, torch.float32, subject.backend
    )
    assert not slopes.isfinite().any() and offsets.tolist() == [0]


def scale_of(subject, dloss, dlse, dprobs, target, weight, lse):
    given = (None if t is None else t.to(subject.device) for t in (dloss, dlse, dprobs, target))
    rest = (None if t is None else t.to(subject.device) for t in (weight, lse))
    scale = ops.plif_scale(*given, *rest, 7, subject.backend)
    assert scale.dtype == torch.float64 and scale.shape == ()
    return scale.item()


@pytest.mark.interpreter
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weight"])
@pytest.mark.parametrize("which", ["a", "b", "q", "ab", "abq"])
@pytest.mark.parametrize("rows, k", [(0, 3), (1, 1), (5, 40), (1025, 3), (16385, 2)])
def test_scale(subject, rows, k, which, weighted):
    """Exact: of float32 no product is rounded in float64, and what is summed has one order. Of the
    rows 16384 are those of one program.
    """
    torch.manual_seed(rows)
    target = torch.randint(-2, 9, (rows,))
    for dtype in statistics(subject):
        weight = 3 * torch.rand(7, dtype=dtype) - 2 if weighted else None
        shapes = {"a": (rows,), "b": (rows,), "q": (rows, k)}
        above = [torch.randn(s, dtype=dtype) if n in which else None for n, s in shapes.items()]
        lse = torch.randn(rows, k, dtype=dtype)[:, 0]
        a, b, q = (None if t is None else t.double().abs() for t in above)
        most = torch.zeros(rows).double() if b is None else b
        if q is not None:
            most = most + 2 * q.amax(-1)
        if a is not None:
            at_most = 2 * (1.0 if weight is None else weight.double().abs().max())
            most = most + at_most * a * ((target >= 0) & (target < 7))
        total = rows * max(most.tolist(), default=0.0)
        assert scale_of(subject, *above, target, weight, lse) == power_of_two(total)


@pytest.mark.interpreter
def test_scale_of_powers_of_two(subject):
    """And of the floats beside them; of zeros; of an expanded gradient, as of a sum."""
    target = torch.arange(8).view(2, 4) % 7
    lse = torch.zeros(2, 4)
    for exponent in (-140, -30, 0, 60, 120):
        power = torch.tensor(2.0**exponent)
        for to in (0.0, 2.0**exponent, math.inf):
            dlse = torch.nextafter(power, torch.tensor(to)).expand(2, 4)
            expected = power_of_two(8 * dlse[0, 0].item())
            assert scale_of(subject, None, dlse, None, target, None, lse) == expected
    zeros = torch.zeros(2, 4)
    assert scale_of(subject, zeros, None, None, target, None, lse) == 2.0**960


@pytest.mark.interpreter
@pytest.mark.parametrize("wrong", [math.nan, -math.nan, math.inf, -math.inf])
def test_scale_of_no_number(subject, wrong):
    """Wherever one is that a gradient is made of; elsewhere it does not matter."""
    rows = torch.tensor([0, 3, 7, -100])  # the last two are no classes
    one, zero = torch.ones(4), torch.zeros(4)
    for place in range(4):
        above, q = one.clone(), torch.ones(4, 3)
        above[place] = q[place, 1] = wrong
        found = scale_of(subject, above, None, None, rows, None, zero)
        assert math.isnan(found) if place < 2 else found == 2.0**57
        assert math.isnan(scale_of(subject, None, above, None, rows, None, zero))
        assert math.isnan(scale_of(subject, one, None, q, rows, None, zero))
        assert math.isnan(scale_of(subject, zero, one, None, rows, None, above))
        alone = zero.clone()
        alone[1] = 1
        found = scale_of(subject, alone, None, None, rows, None, above)
        assert math.isnan(found) if place == 1 else found == 2.0**57
    weight = torch.ones(7)
    weight[4] = wrong
    assert math.isnan(scale_of(subject, one, None, None, rows, weight, zero))


@pytest.mark.interpreter
@pytest.mark.parametrize("cells", CELLS)
def test_dslopes(subject, cells):
    """By Python's integers, whose sums reach 2^60: exact."""
    torch.manual_seed(cells)
    largest = 2**60 // cells
    sums = torch.randint(-largest, largest, (cells, 2))
    outside = torch.tensor([0.37, -1.3]).double()
    masses, moments = sums.T.tolist()
    before, total = list(itertools.accumulate(masses)), sum(masses)
    exact = [
        float(m - b + (total if i >= cells // 2 else 0))
        for i, (m, b) in enumerate(zip(moments, before, strict=True))
    ]
    if cells % 2:
        exact[cells // 2] -= float(total) / 2
    expected = torch.tensor(exact, dtype=torch.float64) * (2 * 3.1 / cells / 2.0**41)
    expected[0] += outside[0]
    expected[-1] += outside[1]
    scale = torch.tensor(2.0**41).double()
    sums, outside, scale = (t.to(subject.device) for t in (sums, outside, scale))
    for dtype in statistics(subject):
        found = ops.plif_dslopes(sums, outside, scale, 3.1, dtype, subject.backend)
        assert torch.equal(found.cpu(), expected.to(dtype))
        found = ops.plif_dslopes(sums, outside, scale * math.nan, 3.1, dtype, subject.backend)
        assert found.isnan().all()


# before the softmax

KEPT = {"dense": None, "list": 20, "large": 1100, "list of all": 1200}


def problem(dtype, rows=5, classes=203, filler="random"):
    logits = 2 * cases.logits(filler, rows, classes, dtype)
    target = cases.targets(logits, 20)
    return logits, torch.where((target >= 0) & (target < classes), target, 7)


@pytest.mark.interpreter
@pytest.mark.parametrize("weighted, smoothing", [(False, 0.0), (True, 0.1)], ids=["", "options"])
@pytest.mark.parametrize("cells, bound", SHAPES[1:])
@pytest.mark.parametrize("k", [None, 20])
def test_losses_and_gradients(subject, dtype, k, cells, bound, weighted, smoothing):
    logits, target = problem(dtype, rows=3 if subjects.INTERPRETING else 5)
    link = bent(cells, bound, of_dtype(dtype), subject.device)
    weight = torch.rand(203, dtype=of_dtype(dtype)) + 0.5 if weighted else None
    z = logits.to(subject.device).requires_grad_()
    loss = fused_sparse_ce(
        z,
        target.to(subject.device),
        k,
        weight=None if weight is None else weight.to(subject.device),
        label_smoothing=smoothing,
        link=link,
        reduction="none",
        backend=subject.backend,
    )
    upstream = torch.randn(loss.shape, dtype=loss.dtype)
    loss.backward(upstream.to(subject.device))
    truth = LinkTruth(link, logits, target, k, upstream, weight, smoothing)
    assert loss.dtype == of_dtype(dtype) and z.grad.dtype == dtype
    truth.assert_loss(loss)
    truth.assert_gradients(z.grad, link.w.grad)


@pytest.mark.interpreter
@pytest.mark.parametrize("k, classes", [(1, 37), (129, 203), (1024, 1030)])
def test_lists_of_any_length(subject, k, classes):
    """A single class, one more than a power of two, and the longest list of all backends; the
    target inside and outside of each.
    """
    logits, _ = problem(torch.bfloat16, rows=3, classes=classes)
    target = logits.argsort(descending=True, stable=True)[torch.arange(3), [0, k - 1, k]]
    link = bent(device=subject.device)
    weight, upstream = torch.rand(classes) + 0.5, torch.tensor([1.0, -0.5, 2.0])
    z = logits.to(subject.device).requires_grad_()
    loss = fused_sparse_ce(
        z, target.to(subject.device), k, weight=weight.to(subject.device), label_smoothing=0.1,
        link=link, reduction="none", backend=subject.backend,
    )  # fmt: skip
    loss.backward(upstream.to(subject.device))
    truth = LinkTruth(link, logits, target, k, upstream, weight, 0.1)
    truth.assert_loss(loss)
    truth.assert_gradients(z.grad, link.w.grad)


@pytest.mark.interpreter
@pytest.mark.parametrize("layout", cases.PUBLIC_LAYOUTS)
@pytest.mark.parametrize("k", [None, 5])
def test_layouts(subject, layout, k):
    """Rows in any strides and dimensions give what the same rows give contiguously."""
    logits = problem(torch.bfloat16, rows=4, classes=37)[0].unflatten(0, (2, 2))
    view = cases.PUBLIC_LAYOUTS[layout](logits.to(subject.device))
    link = bent(device=subject.device)
    target = torch.arange(view.shape[:-1].numel(), device=subject.device).view(view.shape[:-1])
    results = []
    for z in (view, view.contiguous().view(-1, 37)):
        z = z.detach().requires_grad_()
        link.w.grad = None
        y = target.view(z.shape[:-1])
        loss = fused_sparse_ce(z, y, k, link=link, reduction="none", backend=subject.backend)
        loss.sum().backward()
        results.append((loss.detach().flatten(), z.grad.reshape(-1, 37), link.w.grad))
    for found, expected in zip(*results, strict=True):
        # chunks of 16 bytes begin elsewhere where memory does: other orders of addition
        assert torch.allclose(found, expected, rtol=2**-7, atol=1e-6)


@pytest.mark.interpreter
@pytest.mark.parametrize("regime", ["dense", "list"])
def test_the_start_changes_no_loss(subject, dtype, regime):
    """Dense, on the CPU and in tensor operations, not one bit; else what the backend's tolerance
    allows.
    """
    leave_to_bfloat16(dtype)
    logits, target = problem(dtype)
    k = KEPT[regime]
    link = MonotonicPLIF().to(subject.device)
    results = []
    for option in (None, link):
        z = logits.clone().to(subject.device).requires_grad_()
        loss = fused_sparse_ce(
            z, target.to(subject.device), k, link=option, reduction="none", backend=subject.backend
        )
        loss.sum().backward()
        results.append((loss.detach(), z.grad))
    if subject.backend == "eager" or (subject.backend == "cpu" and regime == "dense"):
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    truth = Truth(logits, target, logits.shape[-1] if k is None else k)
    truth.assert_loss(results[1][0])
    truth.assert_gradient(results[1][1], torch.ones(len(target)))


@pytest.mark.interpreter
@pytest.mark.parametrize("regime", ["list", "list of all"])
def test_the_support_is_that_of_the_logits(subject, dtype, regime):
    """Ties too. Probabilities and log-sum-exp are those of f."""
    classes = 203 if regime == "list" else 37
    logits, target = problem(dtype, classes=classes, filler="ties")
    target = target.clamp(max=classes - 1)
    z, y = logits.to(subject.device), target.to(subject.device)
    link = bent(dtype=of_dtype(dtype), device=subject.device)
    k = min(KEPT[regime], classes)
    options = dict(return_support=True, backend=subject.backend)
    _, without = fused_sparse_ce(z, y, k, **options)
    loss, support = fused_sparse_ce(z, y, k, link=link, **options)
    assert torch.equal(support.indices, without.indices)
    f = reference.plif(logits.flatten(), link.w.detach().cpu(), link.bound).view(logits.shape)
    kept = f.gather(-1, support.indices.cpu().long())
    unit = torch.finfo(of_dtype(dtype)).eps * (2 if dtype == torch.float64 else 1)
    d = function_tolerance(link, logits.double(), unit).amax()
    base = Truth(f, target, k)
    base.unit = unit
    assert_within("probs", support.probs, kept.softmax(-1), base.probs_tolerance + 2 * d)
    assert_within("lse", support.lse, kept.logsumexp(-1), base.lse_tolerance + 2 * d)


@pytest.mark.interpreter
def test_large_k_and_every_reduction(subject):
    if not subject.lists(1100):
        pytest.skip("the backend lists no such k")
    logits, target = problem(torch.float32, rows=3, classes=1200)
    link = bent(device=subject.device)
    truth = LinkTruth(link, logits, target, 1100)
    z, y = logits.to(subject.device), target.to(subject.device)
    found = {
        reduction: fused_sparse_ce(
            z, y, 1100, link=link, reduction=reduction, backend=subject.backend
        )
        for reduction in ("none", "sum", "mean")
    }
    truth.assert_loss(found["none"])
    for reduction in ("sum", "mean"):
        assert torch.allclose(found[reduction], getattr(found["none"], reduction)(), rtol=1e-6)


@pytest.mark.interpreter
@pytest.mark.parametrize("k", [None, 20])
def test_ignored_rows_and_masked_classes(subject, k):
    """SPEC 7: ignored rows leave no trace, NaN or not; a class at -inf has probability 0."""
    logits, target = problem(torch.float32)
    logits[1], logits[3, 5] = math.nan, math.inf
    logits[2, 10:20] = -math.inf
    target[2] = 3
    target[1] = target[3] = -100
    logits, target = logits.to(subject.device), target.to(subject.device)
    link = bent(device=subject.device)

    def gradients(rows):
        # in place: a row that begins elsewhere in a chunk is added up in another order
        z, y = logits[rows].requires_grad_(), target[rows]
        loss = fused_sparse_ce(z, y, k, link=link, reduction="sum", backend=subject.backend)
        return loss.detach(), *torch.autograd.grad(loss, (z, link.w))

    counted = slice(None, None, 2)
    loss, dz, dw = gradients(slice(None))
    expected_loss, expected_dz, expected_dw = gradients(counted)
    assert (dz[[1, 3]] == 0).all() and (dz[2, 10:20] == 0).all() and dz.isfinite().all()
    assert torch.equal(dz[counted], expected_dz) and dw.isfinite().all()
    # the number of rows moves the point of the fixed point, the number of losses their sum
    assert torch.allclose(loss, expected_loss, rtol=1e-6)
    assert torch.allclose(dw, expected_dw, rtol=1e-6, atol=1e-9)


@pytest.mark.interpreter
@pytest.mark.parametrize("k", [None, 20])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_counted_row_of_nan_makes_nan(subject, k, value):
    logits, target = problem(torch.float32)
    logits[1, 3] = value
    link = bent(device=subject.device)
    z = logits.to(subject.device).requires_grad_()
    loss = fused_sparse_ce(
        z, target.to(subject.device), k, link=link, reduction="none", backend=subject.backend
    )
    loss.sum().backward()
    assert loss.isnan().tolist() == [False, True, False, False, False]
    assert link.w.grad.isnan().all() and z.grad[[0, 2, 3, 4]].isfinite().all()


@pytest.mark.interpreter
@pytest.mark.parametrize("k", [None, 20])
@pytest.mark.parametrize("rows", [0, 3], ids=["no rows", "all ignored"])
def test_nothing_to_count_is_zero(subject, k, rows):
    link = bent(device=subject.device)
    z = torch.full((rows, 203), math.nan, device=subject.device, requires_grad=True)
    target = torch.full((rows,), -100, device=subject.device)
    loss = fused_sparse_ce(z, target, k, link=link, backend=subject.backend)
    loss.backward()
    assert loss == 0 and (z.grad == 0).all() and (link.w.grad == 0).all()


@pytest.mark.interpreter
def test_target_out_of_range_has_no_gradient(subject):
    logits, _ = problem(torch.float32, rows=2)
    z, y = logits.to(subject.device), torch.tensor([-1, 203], device=subject.device)
    link = bent(device=subject.device)
    tables = link.tables(torch.float32, subject.backend)
    arguments = (z.requires_grad_(), y, None)
    for loss in (
        ops.plif_ce_fwd(*arguments, *tables, 3.0, 0.1, subject.backend)[0],
        plif.topk_plif_ce_fwd(*arguments, link.w, 3.0, 20, 0.1, subject.backend)[0],
    ):
        assert loss.isnan().all()
        z.grad = link.w.grad = None
        loss.sum().backward()
        assert (z.grad == 0).all() and (link.w.grad == 0).all()


# what autograd and the compiler make of it


@pytest.mark.float64
@pytest.mark.parametrize("cells", [1, 4, 5])
@pytest.mark.parametrize("weighted, smoothing", [(False, 0.0), (True, 0.2)], ids=["", "options"])
@pytest.mark.parametrize("k", ["function", None, 1, 3])
def test_first_derivative(subject, k, cells, weighted, smoothing):
    link = bent(cells, 2.0, torch.float64, subject.device)
    torch.manual_seed(0)
    # finite differences cross neither a knot nor the order: thirds lie on no knot
    x = ((torch.randperm(28).double() - 14) / 3 + 0.01).view(4, 7).to(subject.device)
    target = torch.tensor([0, 3, 6, -100], device=subject.device)
    weight = torch.rand(7, device=subject.device).double() if weighted else None

    def function(x, w):
        slopes, offsets = ops.plif_tables(w, link.bound, torch.float64, subject.backend)
        if k == "function":
            return ops.plif_fwd(x, slopes, offsets, link.bound, subject.backend)
        arguments, rest = (x, target, weight), (smoothing, subject.backend)
        if k is None:
            loss, lse, *_ = ops.plif_ce_fwd(*arguments, slopes, offsets, link.bound, *rest)
            return loss[:3], lse
        loss, lse, _, probs, *_ = plif.topk_plif_ce_fwd(*arguments, w, link.bound, k, *rest)
        return loss[:3], lse, probs

    assert gradcheck(function, (x.requires_grad_(), link.w))


@pytest.mark.parametrize("k", ["function", None, 5])
def test_a_second_derivative_is_an_error(subject, k):
    link = bent(device=subject.device)
    z = torch.randn(3, 37, device=subject.device, requires_grad=True)
    target = torch.arange(3, device=subject.device)
    if k == "function":
        loss = link(z, subject.backend).sum()
    else:
        loss = fused_sparse_ce(z, target, k, link=link, backend=subject.backend)
    (gradient,) = torch.autograd.grad(loss, z, create_graph=True)
    with pytest.raises(RuntimeError, match="^MonotonicPLIF: expected a first derivative only"):
        gradient.sum().backward()


@pytest.mark.interpreter
@pytest.mark.parametrize("k", ["function", None, 20])
def test_two_runs_agree_in_all_bits(subject, dtype, k):
    torch.use_deterministic_algorithms(False)
    logits, target = problem(dtype, rows=9 if not subjects.INTERPRETING else 2, classes=1003)
    link = bent(1000, 3.0, of_dtype(dtype), subject.device)
    threads = torch.get_num_threads()

    def run():
        z = logits.clone().to(subject.device).requires_grad_()
        link.w.grad = None
        if k == "function":
            link(z, subject.backend).sum().backward()
        else:
            y = target.to(subject.device)
            fused_sparse_ce(z, y, k, link=link, backend=subject.backend).backward()
        return z.grad, link.w.grad

    first = run()
    try:
        for count in (1, 2):
            # the tensor operations promise it for one number of threads
            if subject.backend != "eager":
                torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.interpreter
@pytest.mark.parametrize("k", [None, 20])
@pytest.mark.parametrize("learns", [True, False], ids=["", "frozen"])
def test_saved_for_backward(subject, dtype, k, learns):
    """Dense: the logits by reference, O(N) and O(K). Sparse: O(N k) and O(K), not the logits."""
    cells, rows, classes = 50, 4, 1003
    link = bent(cells, 3.0, of_dtype(dtype), subject.device).requires_grad_(learns)
    logits = problem(dtype, rows, classes)[0].to(subject.device).requires_grad_()
    target = torch.arange(rows, device=subject.device)
    tensors = saved(lambda: fused_sparse_ce(logits, target, k, link=link, backend=subject.backend))
    wide = [t for t in tensors if t.numel() >= rows * classes]
    assert [t.data_ptr() for t in wide] == ([logits.data_ptr()] if k is None else [])
    size = sum(t.numel() * t.element_size() for t in tensors if t.numel() < rows * classes)
    statistic = 8 if of_dtype(dtype) == torch.float64 else 4
    per_row = 8 + 1 + 2 * statistic if k is None else 9 + k * (4 + statistic) + (k + 1) * statistic
    # slopes and offsets, and the softplus's own input
    assert size <= rows * per_row + cells * (2 * statistic + 8) + 3 * 8


@pytest.mark.interpreter
@pytest.mark.parametrize("k", [None, 20])
def test_backward_of_another_backend(subject, k):
    """What forward saves is all that any backward needs."""
    logits, target = problem(torch.float32)
    z, y = logits.to(subject.device), target.to(subject.device)
    slopes, offsets = (t.detach() for t in bent(device=subject.device).tables(torch.float32))
    scale = torch.tensor(2.0**50, dtype=torch.float64, device=subject.device)
    dloss = torch.ones(len(target), device=subject.device)
    tables = (slopes, offsets, 3.0)
    if k is None:
        _, _, *saved = ops.plif_ce_fwd(z, y, None, *tables, 0.1, subject.backend)
        backward = ops.plif_ce_bwd
        arguments = (dloss, None, z, y, *saved, None, *tables, 0.1, scale)
    else:
        _, _, *saved = ops.plif_topk_ce_fwd(z, y, None, *tables, k, 0.1, subject.backend)
        backward = ops.plif_topk_ce_bwd
        dprobs = torch.linspace(-0.5, 0.5, k, device=subject.device).expand(len(target), k)
        rest = (None, slopes, 3.0, 0.1, z.shape[-1], z.dtype, scale)
        arguments = (dloss, -dloss, dprobs, y, *saved, *rest)
    for other in ("eager", "cpu"):
        if backends.unavailable(other) is not None or (other == "cpu" and z.is_cuda):
            continue
        results = [backward(*arguments, name) for name in (subject.backend, other)]
        # g is off by some units of 1 in either; a row has some of them
        for found, expected in zip(*results, strict=True):
            step = expected.double().abs().max() if expected.is_floating_point() else 2.0**50
            assert torch.allclose(found.double(), expected.double(), rtol=1e-5, atol=1e-6 * step)


@pytest.mark.parametrize("shape", [(3,), (2, 3)])
@pytest.mark.parametrize("learns", [True, False], ids=["", "frozen"])
def test_opcheck(subject, shape, learns):
    pytest.importorskip("expecttest", reason="torch.library.opcheck imports expecttest")
    link, backend = bent(device=subject.device), subject.backend
    slopes, offsets = (t.detach() for t in link.tables(torch.float32))
    torch.manual_seed(0)
    z = torch.randn(*shape, 11, device=subject.device)
    y = torch.randint(0, 11, shape, device=subject.device)
    weight, above = torch.rand(11, device=subject.device), torch.randn(shape).to(z.device)
    scale = torch.tensor(2.0**40, dtype=torch.float64, device=z.device) if learns else None
    leaf, slope_leaf = z.clone().requires_grad_(), slopes.clone().requires_grad_(learns)

    def check(op, *arguments):
        torch.library.opcheck(op.overload, (*arguments, backend))

    tables = (slope_leaf, offsets, 3.0)
    check(ops.plif_tables, link.w, 3.0, torch.float32)
    check(ops.plif_scale, above, None, None, y, weight, torch.zeros_like(above), 11)
    if learns:
        _, *sums = ops.plif_bwd(z, z, slopes, 3.0, scale, backend)
        check(ops.plif_dslopes, *sums, scale, 3.0, torch.float32)
    check(ops.plif_fwd, leaf, *tables)
    check(ops.plif_bwd, z, z, slopes, 3.0, scale)
    check(ops.plif_ce_fwd, leaf, y, weight, *tables, 0.1)
    statistics = ops.plif_ce_fwd(z, y, weight, slopes, offsets, 3.0, 0.1, backend)[2:]
    check(ops.plif_ce_bwd, above, None, z, y, *statistics, weight, slopes, offsets, 3.0, 0.1, scale)
    check(ops.plif_topk_ce_fwd, z, y, weight, slopes, offsets, 3.0, 4, 0.1)
    found = ops.plif_topk_ce_fwd(z, y, weight, slopes, offsets, 3.0, 4, 0.1, backend)[2:]
    given, rest = (above, None, None, y, *found, weight), (3.0, 0.1, 11, torch.float32)
    check(ops.plif_topk_ce_bwd, *given, slopes, *rest, scale)
    w = link.w.detach()
    check(plif.topk_plif_ce_fwd, leaf, y, weight, w.clone().requires_grad_(learns), 3.0, 4, 0.1)
    check(plif.topk_plif_ce_bwd, *given, w, slopes, *rest, learns)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("k", ["function", None, 5])
def test_compiled_equals_eager(subject, k):
    link = bent(device=subject.device)
    z = torch.randn(6, 37, device=subject.device).bfloat16().requires_grad_()
    target = torch.tensor([3, 36, -100, 0, 7, 1], device=subject.device)

    def function(z, y):
        if k == "function":
            return link(z, subject.backend).float().sum()
        return fused_sparse_ce(z, y, k, link=link, reduction="sum", backend=subject.backend)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for run in (function, compiled):
        loss = run(z, target)
        results.append((loss.detach(), *torch.autograd.grad(loss, (z, link.w))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# as a module, and on every instruction set


def test_it_learns_in_a_criterion():
    """Logits that are twice as large as they should be: the function learns to halve them."""
    torch.manual_seed(0)
    truth = torch.randn(512, 50)
    target = torch.multinomial(truth.softmax(-1), 1).squeeze(-1)
    for k in (None, 10):
        criterion = SparseCrossEntropyLoss(k, link=MonotonicPLIF(40, 8.0))
        assert [name for name, _ in criterion.named_parameters()] == ["link.w"]
        optimizer = torch.optim.Adam(criterion.parameters(), lr=0.05)
        losses = []
        for _ in range(40):
            loss = criterion(2 * truth, target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0] - 0.05
        assert criterion.link.tables(torch.float32)[0][18:22].mean() < 0.8


def test_parameters_of_other_dtypes_and_devices():
    """Of w in bfloat16 too the start is the identity; the tables follow w."""
    link = MonotonicPLIF(64).bfloat16()
    x = torch.randn(9)
    assert torch.equal(link(x), x)
    assert "num_cells=64, bound=20.0, init_std=0.0" in repr(link)
    noisy = MonotonicPLIF(1000, init_std=0.5)
    copy = MonotonicPLIF(1000)
    copy.load_state_dict(noisy.state_dict())
    assert 0.4 < noisy.w.std() < 0.6 and torch.equal(copy(x), noisy(x))
    assert copy.bfloat16().state_dict()["_extra_state"].item() == 20.0
    odd = MonotonicPLIF(4, bound=7.3)
    for dtype in (torch.float32, torch.bfloat16):
        odd.load_state_dict({name: value.to(dtype) for name, value in odd.state_dict().items()})
    with torch.device("meta"):
        state = odd.state_dict()
    assert not state["_extra_state"].is_meta
    state = {name: value.to("meta") for name, value in state.items()}
    odd.load_state_dict(state, assign=True)
    assert odd.w.is_meta and odd.bound == 7.3
    noisy.reset_parameters()
    assert not torch.equal(copy.w, noisy.w)


@pytest.mark.parametrize("isa", ["avx512", "avx2", "neon", "portable"])
@pytest.mark.parametrize("dtype", backends.ALL_DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_every_instruction_set(isa, dtype, monkeypatch):
    if backends.unavailable("cpu") is not None:
        pytest.skip(backends.unavailable("cpu"))
    monkeypatch.setenv("SPARSE_CE_CPU_ISA", isa)
    try:
        torch.ops.sparse_ce_native.cpu_isa()
    except RuntimeError:
        pytest.skip(f"this processor does not have {isa}")
    cpu = subjects.Subject("cpu", "cpu")
    for (cells, bound), k in itertools.product(SHAPES[1:3], (None, 20)):
        test_values_and_gradients(cpu, dtype, cells, bound)
        test_losses_and_gradients(cpu, dtype, k, cells, bound, True, 0.1)


def test_every_operator_is_here():
    names = {name for name in (*schema.SIGNATURES, *schema.COMPOSITIONS) if "plif" in name}
    forms = {"plif", "plif_ce", "plif_topk_ce", "topk_plif_ce"}
    passes = {f"{form}_{way}" for form in forms for way in ("fwd", "bwd")}
    assert names == passes | {"plif_tables", "plif_scale", "plif_dslopes"}


@pytest.mark.parametrize("k", ["function", None, 5])
def test_many_cells_agree_in_all_bits_on_any_number_of_threads(k):
    """More cells than torch gives to one thread, of slopes that are not those of the start."""
    link = MonotonicPLIF(100_000, init_std=1.0)
    x = torch.randn(64, 500).mul_(10).requires_grad_()
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            if k == "function":
                loss = link(x).square().sum()
            else:
                loss = fused_sparse_ce(x, torch.arange(64), k, link=link)
            found.append(torch.autograd.grad(loss, link.w)[0])
    finally:
        torch.set_num_threads(threads)
    assert found[0].abs().sum() > 0
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
