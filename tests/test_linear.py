"""fused_linear_sparse_ce and the operators of sparse_linear. SPEC 2.

Hidden and weight are small multiples of a power of two, so that every logit is exact in every dtype
and in every order of summation: the truth of the logits is then the truth of closeness.py, ties and
all, and only the sums of the gradients have tolerances of their own.
"""

import importlib
import math

import pytest
import subjects
import torch
import torch.nn.functional as F
from allocations import sizes_of_allocations
from closeness import Truth, assert_within
from sparse_ce import (
    SparseLinearCrossEntropy,
    backends,
    fused_linear_sparse_ce,
    fused_sparse_ce,
    linear,
    ops,
)
from torch.utils.checkpoint import checkpoint

FEATURES, CLASSES, K = 24, 203, 7
STATISTICS = {torch.float64: torch.float64}


def layer(dtype, rows=(3, 5), bias=False, device="cpu", classes=CLASSES, features=FEATURES):
    torch.manual_seed(0)
    hidden = torch.randint(-2, 3, (*rows, features)) / 4
    weight = torch.randint(-2, 3, (classes, features)) / 2
    b = torch.randint(-4, 5, (classes,)) / 8 if bias else None
    target = torch.randint(classes, rows)
    made = (hidden, weight, b)
    made = [t if t is None else t.to(dtype).to(device).requires_grad_() for t in made]
    return (*made, target.to(device))


def statistics(dtype):
    return STATISTICS.get(dtype, torch.float32)


def of_layer(g, hidden, weight):
    """What numbers of the logits (N, V) make of hidden (N, D), weight and bias."""
    return {"dhidden": g @ weight, "dweight": g.t() @ hidden, "dbias": g.sum(0)}


class LinearTruth:
    """The gradients of sum(dloss loss) in float64, and how far from them a result may be."""

    def __init__(self, hidden, weight, bias, target, k, dloss, class_weight=None, smoothing=0.0):
        h, w = (t.detach().cpu().double().reshape(-1, t.shape[-1]) for t in (hidden, weight))
        self.dtype, self.rounded = hidden.dtype, {"dhidden": hidden.dtype, "dweight": weight.dtype}
        self.rounded["dbias"] = weight.dtype
        logits = F.linear(h, w, None if bias is None else bias.detach().cpu().double())
        exact = logits.to(hidden.dtype)
        assert torch.equal(exact.double(), logits), "the logits of these tests are exact"
        truth = Truth(exact, target, k, class_weight, smoothing)
        self.loss = truth
        a = dloss.detach().cpu().double().flatten()
        rows = torch.arange(h.shape[0])
        q = torch.zeros(h.shape[0], k).double()
        g = truth._gradient(rows, a, torch.zeros_like(a), q)
        dg = truth._gradient_tolerance(rows, a, torch.zeros_like(a), q)
        self.expected, self.error = of_layer(g, h, w), of_layer(dg, h.abs(), w.abs())
        # terms as large as what they are made of: the target's share may cancel against p
        size = g.abs() + 2 * (g < 0) * a.abs().unsqueeze(-1)
        self.size = of_layer(size, h.abs(), w.abs())
        self.terms = {"dhidden": k + 1, "dweight": h.shape[0], "dbias": h.shape[0]}
        self.unit = truth.unit

    def assert_gradients(self, dense=False, chunks=1, shards=1, **found):
        for name, gradient in found.items():
            size, eps = self.size[name], torch.finfo(self.rounded[name]).eps
            # float32 sums of that many products, in any order; then one rounding to the output
            tolerance = self.error[name] + self.unit * (self.terms[name] + 1) / 2 * size
            if dense:  # dlogits is rounded to the dtype of the product, and the sum of each chunk
                tolerance += (1 + chunks) * torch.finfo(self.dtype).eps * size
            if name == "dhidden" and shards > 1:  # that of each shard is rounded, then their sum
                tolerance += shards * eps / 2 * size
            tolerance += (self.expected[name].abs() + tolerance) * eps / 2
            assert gradient.dtype == self.rounded[name]
            expected = self.expected[name].reshape(gradient.shape)
            tolerance = tolerance.reshape(gradient.shape) + torch.finfo(self.rounded[name]).tiny
            assert_within(name, gradient, expected, tolerance)


def gradients(loss, dloss, hidden, weight, bias):
    inputs = {"dhidden": hidden, "dweight": weight, **({} if bias is None else {"dbias": bias})}
    return dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values()), dloss), strict=True))


@pytest.mark.interpreter
@pytest.mark.parametrize("backward", ["sparse", "dense"])
@pytest.mark.parametrize("smoothing, weighted, bias", [(0.0, False, False), (0.1, True, True)])
def test_values_and_gradients(subject, dtype, backward, smoothing, weighted, bias):
    rows = (2, 3) if subjects.INTERPRETING else (5, 9)
    classes = 37 if subjects.INTERPRETING else CLASSES
    hidden, weight, b, target = layer(dtype, rows, bias, subject.device, classes)
    w = torch.rand(classes, dtype=statistics(dtype)).to(subject.device) if weighted else None
    chunk_bytes = 4 * classes * dtype.itemsize
    loss = fused_linear_sparse_ce(
        hidden, weight, target, K, bias=b, class_weight=w, label_smoothing=smoothing,
        reduction="none", backward=backward, chunk_bytes=chunk_bytes, backend=subject.backend,
    )  # fmt: skip
    dloss = torch.randn(rows, dtype=loss.dtype).to(subject.device)
    truth = LinearTruth(hidden, weight, b, target, K, dloss, w, smoothing)
    truth.loss.assert_loss(loss)
    chunks = math.ceil(target.numel() / 4)
    found = gradients(loss, dloss, hidden, weight, b)
    truth.assert_gradients(backward == "dense", chunks, **found)


WAYS = {"list": {"k": K}, "dense": {"k": None}, "full": {"k": K, "normalizer": "full"}}


class CappedTruth:
    """Loss and gradients of c tanh(x / c) in float64, and how far from them a result may be. `kept`
    (N, V) are the classes with a gradient, where they are not the k largest and the target.
    """

    def __init__(
        self, hidden, weight, bias, target, way, cap, dloss, smoothing=0.0, cw=None, kept=None
    ):
        h, w = (t.detach().cpu().double().reshape(-1, t.shape[-1]) for t in (hidden, weight))
        x = F.linear(h, w, bias.detach().cpu().double())
        z, y = cap * torch.tanh(x / cap), target.cpu().flatten()
        v = x.shape[-1]
        if kept is None:
            kept = torch.zeros_like(x, dtype=torch.bool)
            first = x.sort(dim=-1, descending=True, stable=True).indices
            kept.scatter_(-1, first[:, : way["k"] or v], True)
        of_all = way["k"] is None or "normalizer" in way
        lse = z.masked_fill(~(kept | of_all), -math.inf).logsumexp(-1, keepdim=True)
        p = (z - lse).exp()
        at = F.one_hot(y, v).double()
        cw = torch.ones(v).double() if cw is None else cw.cpu().double()
        nll, e = lse - z, smoothing
        spread = e / kept.double().sum(-1, keepdim=True) * cw * kept
        shares = (1 - e) * at * cw + spread
        self.loss = (shares * nll).sum(-1)
        # where there is a gradient: of the support, and of the target, which has a share of the
        # softmax where that is of all classes
        a = dloss.detach().cpu().double().flatten().unsqueeze(-1)
        p = p * (kept | (at.bool() if of_all else False))
        slope = 1 - (z / cap).square()
        g = a * (p * shares.sum(-1, keepdim=True) - shares) * slope
        self.expected = of_layer(g, h, w)

        unit = torch.finfo(statistics(hidden.dtype)).eps
        terms = v if of_all else way["k"]
        # tanh and two products; of all classes in the dtype of the logits, rounded three times
        dz = 4 * unit * cap
        if of_all and hidden.dtype.itemsize == 2:
            dz += 3 / 2 * torch.finfo(hidden.dtype).eps * cap
        # nll of each share; then a sum of that many exponentials, its logarithm, and the loss
        self.dloss = shares.sum(-1) * (2 * dz + (terms + 8) * unit * (1 + 2 * cap))
        dp = p * (2 * dz + (terms + 8) * unit)
        ds = 2 * dz / cap + 4 * unit
        size = a.abs() * (p * shares.sum(-1, keepdim=True) + shares)
        dg = a.abs() * dp * shares.sum(-1, keepdim=True) * slope + size * (ds + 8 * unit)
        self.size = of_layer(size, h.abs(), w.abs())
        self.error = of_layer(dg, h.abs(), w.abs())
        self.unit, self.terms = unit, {"dhidden": v, "dweight": len(h), "dbias": len(h)}

    def assert_near(self, loss, found, dense, chunks, dtype, shards=1):
        assert_within("loss", loss.flatten(), self.loss, self.dloss)
        for name, gradient in found.items():
            size = self.size[name]
            tolerance = self.error[name] + self.unit * (self.terms[name] + 1) / 2 * size
            if dense:  # dlogits, its product with the slope, and the sum of each chunk are rounded
                tolerance = tolerance + (2 + chunks) * torch.finfo(dtype).eps * size
            eps = torch.finfo(gradient.dtype).eps
            if name == "dhidden" and shards > 1:  # as in LinearTruth
                tolerance = tolerance + shards * eps / 2 * size
            tolerance = tolerance + (self.expected[name].abs() + tolerance) * eps / 2
            assert_within(
                name, gradient, self.expected[name].reshape(gradient.shape),
                tolerance.reshape(gradient.shape) + torch.finfo(gradient.dtype).tiny,
            )  # fmt: skip


@pytest.mark.interpreter
@pytest.mark.parametrize("backward", ["sparse", "dense"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("smoothing, weighted", [(0.0, False), (0.1, True)])
def test_softcap(subject, dtype, way, backward, smoothing, weighted):
    """A cap near the largest logits, in chunks of four tokens; an ignored one among them."""
    rows = (2, 3) if subjects.INTERPRETING else (5, 9)
    classes = 37 if subjects.INTERPRETING else CLASSES
    hidden, weight, b, target = layer(dtype, rows, True, subject.device, classes)
    w = torch.rand(classes, dtype=statistics(dtype)).to(subject.device) if weighted else None
    ignored = target.clone()
    ignored[0, 0] = -100
    loss = fused_linear_sparse_ce(
        hidden, weight, ignored, **WAYS[way], bias=b, class_weight=w, label_smoothing=smoothing,
        softcap=3.0, reduction="none", backward=backward,
        chunk_bytes=4 * classes * dtype.itemsize, backend=subject.backend,
    )  # fmt: skip
    assert loss[0, 0] == 0
    dloss = torch.randn(rows, dtype=loss.dtype).to(subject.device)
    counted = dloss.clone()
    counted[0, 0] = 0
    truth = CappedTruth(hidden, weight, b, target, WAYS[way], 3.0, counted, smoothing, w)
    truth.loss[0] = 0
    found = gradients(loss, dloss, hidden, weight, b)
    dense = backward == "dense" or way == "dense"
    truth.assert_near(loss, found, dense, math.ceil(target.numel() / 4), dtype)


def test_softcap_with_draws(subject):
    """The draws are those of the capped logits, and the gradient goes through the cap."""
    hidden, weight, b, target = layer(torch.float32, (40,), True, subject.device)
    found = []
    for form in ("linear", "logits"):
        torch.manual_seed(7)
        options = {"normalizer": "full", "tail_samples": 5, "backend": subject.backend}
        if form == "linear":
            loss = fused_linear_sparse_ce(
                hidden, weight, target, K, bias=b, softcap=2.0, backward="sparse", **options
            )
        else:
            z = F.linear(hidden, weight, b).div(2.0).tanh().mul(2.0)
            loss = fused_sparse_ce(z, target, K, **options)
        found.append((loss, *torch.autograd.grad(loss, (hidden, weight, b))))
    for one, other in zip(*found, strict=True):
        # sums in other orders
        largest = other.detach().abs().max().item()
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 * largest)


@pytest.mark.parametrize("backward", ["sparse", "dense"])
@pytest.mark.parametrize("way", WAYS)
def test_softcap_of_an_ignored_nan(way, backward, monkeypatch):
    # as on a GPU, where ignored tokens go through the product
    monkeypatch.setattr(linear, "rows_that_count", lambda *_: None)
    hidden, weight, b, target = layer(torch.float32, bias=True)
    hidden.data[1, 2], target[1, 2] = torch.nan, -100
    options = {**WAYS[way], "softcap": 3.0, "backward": backward}
    loss = fused_linear_sparse_ce(hidden, weight, target, bias=b, **options)
    found = torch.autograd.grad(loss, (hidden, weight, b))
    assert loss.isfinite() and all(g.isfinite().all() for g in found)
    assert (found[0][1, 2] == 0).all() and found[1].abs().sum() > 0


def test_softcap_elsewhere():
    """Rows of a sparse gradient, a support, a module, a graph: as the plain function has it."""
    hidden, weight, _, target = layer(torch.float32)

    def step(hidden, weight, target, **options):
        return fused_linear_sparse_ce(hidden, weight, target, K, softcap=2.5, **options)

    loss, support = step(hidden, weight, target, return_support=True)
    z = 2.5 * torch.tanh(F.linear(hidden, weight) / 2.5)
    kept = z.gather(-1, support.indices.long())
    torch.testing.assert_close(support.lse, kept.logsumexp(-1))
    torch.testing.assert_close(support.probs, kept.softmax(-1))
    expected = torch.autograd.grad(loss + support.lse.square().mean(), (hidden, weight))
    plain = fused_sparse_ce(z, target, K) + kept.logsumexp(-1).square().mean()
    for one, other in zip(expected, torch.autograd.grad(plain, (hidden, weight)), strict=True):
        torch.testing.assert_close(one, other)

    dense = torch.autograd.grad(step(hidden, weight, target), (hidden, weight))
    rows = torch.autograd.grad(
        step(hidden, weight, target, weight_grad="row_sparse"), (hidden, weight)
    )
    assert torch.equal(rows[0], dense[0]) and torch.equal(rows[1].to_dense(), dense[1])
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    traced = torch.autograd.grad(compiled(hidden, weight, target), (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(traced, dense, strict=True))

    head = SparseLinearCrossEntropy(FEATURES, CLASSES, K, softcap=2.5)
    head.weight = torch.nn.Parameter(weight.detach())
    assert torch.equal(head(hidden, target), step(hidden, weight, target))
    assert "softcap=2.5" in repr(head) and torch.equal(head(hidden), F.linear(hidden, weight))
    head.softcap = None
    assert torch.equal(head(hidden, target), fused_linear_sparse_ce(hidden, weight, target, K))


@pytest.mark.interpreter
@pytest.mark.parametrize("features", [1, 33, 1100])
@pytest.mark.parametrize("out", ["same", "float32"])
def test_sums_of_weighted_rows(subject, dtype, features, out):
    """Also a class of more pairs than the kernels sum at once, and rows of NaN without a share."""
    if not subject.defines("sparse_linear"):
        pytest.skip("it has no kernels of its own for this")
    rows, m, classes = (140, 9, 11) if subjects.INTERPRETING else (700, 5, 40)
    if features > 1000:
        rows //= 4
    torch.manual_seed(0)
    wide = statistics(dtype)
    g = torch.randn(rows, m, dtype=wide)
    index = torch.randint(classes - 1, (rows, m), dtype=torch.int32)
    index[:, ::2] = 3  # more than half of all pairs
    g[5] = 0
    hidden, weight = torch.randn(rows, features).to(dtype), torch.randn(classes, features).to(dtype)
    exact_g = g.double()
    hidden[5], weight[4], g[index == 4] = torch.nan, torch.nan, 0
    exact_g[index == 4] = 0
    clean = [t.double().nan_to_num() for t in (hidden, weight)]
    output = wide if out == "float32" else dtype
    there = [t.to(subject.device) for t in (g, index, weight, hidden)]
    one_hot = torch.zeros(rows, classes).double().scatter_add_(1, index.long(), exact_g)
    size = torch.zeros(rows, classes).double().scatter_add_(1, index.long(), exact_g.abs())
    unit, eps = torch.finfo(wide).eps, torch.finfo(output).eps
    for name, found, expected, scale in (
        ("dhidden", ops.sparse_linear_dhidden(*there[:3], output, subject.backend),
         one_hot @ clean[1], size @ clean[1].abs()),
        ("dweight", ops.sparse_linear_dweight(
            *there[:2], there[3], classes, output, subject.backend),
         one_hot.t() @ clean[0], size.t() @ clean[0].abs()),
    ):  # fmt: skip
        terms = m if name == "dhidden" else int((index == 3).sum())
        tolerance = unit * (terms + 1) / 2 * scale
        tolerance = tolerance + (expected.abs() + tolerance) * eps / 2
        assert found.dtype == output and found.is_contiguous()
        assert_within(name, found, expected, tolerance)


@pytest.mark.interpreter
@pytest.mark.parametrize("features", [7, 48])
def test_pairs_without_a_share_change_no_bit(subject, dtype, features):
    """Wherever they stand between the others: sums are added up pair by pair, in their order."""
    if subject.backend == "eager":
        pytest.skip("the sums of torch have groups")
    rows, m, classes = 12, 5, 4
    torch.manual_seed(0)
    g = torch.randn(rows, m, dtype=statistics(dtype))
    index = torch.randint(classes, (rows, m), dtype=torch.int32)
    hidden, weight = torch.randn(rows, features).to(dtype), torch.randn(classes, features).to(dtype)
    found = []
    for among in (m, m + 1, 3 * m):
        places = torch.rand(rows, among).argsort(1)[:, :m].sort(1).values
        wider = torch.zeros(rows, among, dtype=g.dtype).scatter(1, places, g)
        pairs = torch.randint(classes, (rows, among), dtype=torch.int32).scatter(1, places, index)
        there = [t.to(subject.device) for t in (wider, pairs, weight, hidden)]
        found.append((
            ops.sparse_linear_dhidden(*there[:3], g.dtype, subject.backend),
            ops.sparse_linear_dweight(*there[:2], there[3], classes, g.dtype, subject.backend),
        ))  # fmt: skip
    assert all(
        torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True)
    )


@pytest.mark.interpreter
@pytest.mark.parametrize("features", [33, 600])
def test_triton_adds_in_one_order_however_many_sums_there_are(
    subject, dtype, features, monkeypatch
):
    if subject.backend != "triton":
        pytest.skip("it is about the Triton kernels")
    kernels = importlib.import_module("sparse_ce.triton_kernels.sparse_linear")
    torch.manual_seed(0)
    g, hidden = torch.randn(150, 9, dtype=statistics(dtype)), torch.randn(150, features).to(dtype)
    index = torch.randint(4, (150, 9), dtype=torch.int32)
    index[:, 1:] = 3  # three whole pieces and more
    there = [t.to(subject.device) for t in (g, index, hidden)]
    found = []
    for few in (1, 1 << 20):
        monkeypatch.setattr(kernels, "FEW", few)
        found.append((
            kernels.sparse_linear_dweight(*there, 4, g.dtype),
            kernels.sparse_linear_dhidden(there[0][:9], there[1][:9], there[2], g.dtype),
        ))  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    one_hot = torch.zeros(150, 4).double().scatter_add_(1, index.long(), g.double())
    expected = one_hot.t() @ hidden.double()
    torch.testing.assert_close(found[0][0].cpu().double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.interpreter
@pytest.mark.parametrize("chunks, m", [(127, 5), (128, 5), (129, 5), (513, 2)])
def test_cuda_adds_in_one_order_however_many_sums_there_are(subject, dtype, chunks, m):
    """A warp of the wide form has 128 chunks of 16 bytes, a block 512."""
    if subject.backend != "cuda":
        pytest.skip("it is about the CUDA kernels")
    torch.manual_seed(0)
    rows, classes, features = 1024, 1000, chunks * 16 // dtype.itemsize
    g = torch.randn(rows, m, dtype=statistics(dtype))
    g[::3, 0] = 0
    index = torch.randint(classes, (rows, m), dtype=torch.int32)
    index[:, 1] = 3  # three whole pieces and more
    hidden, weight = torch.randn(rows, features).to(dtype), torch.randn(classes, features).to(dtype)
    one_hot = torch.zeros(rows, classes, dtype=torch.double)
    one_hot.scatter_add_(1, index.long(), g.double())
    g, index, hidden, weight = (t.to(subject.device) for t in (g, index, hidden, weight))

    def dhidden(some):
        return ops.sparse_linear_dhidden(g[some], index[some], weight, g.dtype, subject.backend)

    def dweight(count):
        return ops.sparse_linear_dweight(g, index, hidden, count, g.dtype, subject.backend)

    many, few = slice(rows), (slice(rows // 2), slice(rows // 2, rows))
    assert torch.equal(dhidden(many), torch.cat([*map(dhidden, few)]))
    assert torch.equal(dweight(rows)[:classes], dweight(classes))
    assert not dweight(rows)[classes:].any()
    for found, expected in (
        (dhidden(many), one_hot @ weight.cpu().double()),
        (dweight(rows)[:classes], one_hot.t() @ hidden.cpu().double()),
    ):
        torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.interpreter
def test_cuda_sums_many_pieces(subject, dtype):
    """1024 of them, of integers: so the sums are exact."""
    if subject.backend != "cuda":
        pytest.skip("it is about the CUDA kernels")
    torch.manual_seed(0)
    rows, m, classes, features = 1024, 256, 1024, 2048 // dtype.itemsize
    g = torch.randint(-1, 2, (rows, m)) * (torch.rand(rows, m) < 0.02)
    index = (torch.arange(rows * m) // 5000).view(rows, m)
    hidden = torch.randint(-8, 9, (rows, features))
    expected = torch.zeros(rows, classes).scatter_add_(1, index, g.float()).t() @ hidden.float()
    there = (g.to(statistics(dtype)), index.int(), hidden.to(dtype))
    found = ops.sparse_linear_dweight(
        *(t.to(subject.device) for t in there), classes, statistics(dtype), subject.backend
    )
    assert torch.equal(found.cpu().float(), expected)


def test_two_runs_and_any_number_of_threads_agree_in_all_bits(subject):
    torch.manual_seed(0)
    g = torch.randn(3000, 5).to(subject.device)
    index = torch.randint(30, (3000, 5), dtype=torch.int32).clamp(max=20).to(subject.device)
    hidden = torch.randn(3000, 40).to(subject.device)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            found.append(ops.sparse_linear_dweight(g, index, hidden, 30, g.dtype, subject.backend))
            found.append(ops.sparse_linear_dhidden(g, index, hidden, g.dtype, subject.backend))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(found[2:], found[:-2], strict=True))


@pytest.mark.parametrize("k", [1, K, 150, CLASSES, None])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_equals_the_function_on_logits(subject, k, reduction):
    """With ignored tokens, three dimensions and a bias: as fused_sparse_ce on the logits."""
    hidden, weight, bias, target = layer(torch.float32, bias=True, device=subject.device)
    target[0, :3] = -100
    options = {"reduction": reduction, "label_smoothing": 0.1, "backend": subject.backend}
    ours = fused_linear_sparse_ce(
        hidden, weight, target, k, bias=bias, chunk_bytes=4 * 4 * CLASSES, **options
    )
    theirs = fused_sparse_ce(F.linear(hidden, weight, bias), target, k, **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    above = torch.randn_like(ours)
    inputs = (hidden, weight, bias)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, above),
        torch.autograd.grad(theirs, inputs, above),
        strict=True,
    ):
        # sums of up to 16 float32 terms of size at most 4
        torch.testing.assert_close(a, b, rtol=0, atol=16 * 4 * torch.finfo(torch.float32).eps)


def test_support(subject):
    hidden, weight, _, target = layer(torch.float32, device=subject.device)
    options = {"return_support": True, "backend": subject.backend}
    loss, support = fused_linear_sparse_ce(
        hidden, weight, target, K, chunk_bytes=4 * 4 * CLASSES, **options
    )
    _, expected = fused_sparse_ce(hidden @ weight.t(), target, K, **options)
    assert torch.equal(support.indices, expected.indices) and support.num_classes == CLASSES
    # lse and probs are differentiable through the layer
    ours = torch.autograd.grad(support.lse.sum() + support.entropy().sum(), (hidden, weight))
    theirs = torch.autograd.grad(expected.lse.sum() + expected.entropy().sum(), (hidden, weight))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


@pytest.mark.parametrize("which", [(True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("backward", ["sparse", "dense"])
def test_only_what_is_asked_for_is_computed(subject, which, backward):
    hidden, weight, _, target = layer(torch.float32, device=subject.device)
    both = torch.autograd.grad(
        fused_linear_sparse_ce(hidden, weight, target, K, backward=backward,
                               backend=subject.backend),
        (hidden, weight),
    )  # fmt: skip
    hidden, weight = (
        t.detach().requires_grad_(w) for t, w in zip((hidden, weight), which, strict=True)
    )
    loss = fused_linear_sparse_ce(
        hidden, weight, target, K, backward=backward, backend=subject.backend
    )
    assert loss.requires_grad == any(which)
    if any(which):
        loss.backward()
    for leaf, needed, expected in zip((hidden, weight), which, both, strict=True):
        assert (leaf.grad is None) == (not needed)
        assert not needed or torch.equal(leaf.grad, expected)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_no_tensor_of_all_logits_ever_exists(backend, softcap):
    """The peak is the chunk, the gradient of the weight, and O(N k)."""
    if backends.unavailable(backend) is not None:
        pytest.skip(str(backends.unavailable(backend)))
    rows, classes, features, k, chunk = 2048, 20000, 64, 20, 8 << 20
    hidden = torch.randn(rows, features, requires_grad=True)
    weight = torch.randn(classes, features, requires_grad=True)
    target = torch.randint(classes, (rows,))

    def step():
        fused_linear_sparse_ce(
            hidden, weight, target, k, chunk_bytes=chunk, backward="sparse", softcap=softcap,
            backend=backend,
        ).backward()  # fmt: skip

    allocations, peak = sizes_of_allocations(step)
    logits, dweight = 4 * rows * classes, 4 * classes * features
    # eager makes 64-bit keys of the logits of a chunk, and sums pairs in parts of 2^24 elements
    scratch = {"cpu": 0, "eager": max(2 * chunk, 4 * rows * (k + 1) * features)}[backend]
    assert max(allocations) <= max(chunk, dweight, scratch) < logits
    # a pair is a float and an int32; there are the probabilities, the pairs, their classes sorted
    assert peak <= chunk + dweight + 4 * hidden.numel() + 64 * rows * (k + 1) + 5 * scratch


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("k, buffers", [(20, 1), (None, 2)], ids=str)
def test_dense_steps_hold_the_gradient_of_one_chunk(k, buffers, softcap):
    """A chunk of logits, where they are made again, one of their gradient, and the gradients."""
    rows, classes, features, chunk = 1024, 3000, 64, 256 * 3000 * 4
    hidden = torch.randn(rows, features, requires_grad=True)
    weight = torch.randn(classes, features, requires_grad=True)
    target = torch.randint(classes, (rows,))
    loss = fused_linear_sparse_ce(
        hidden, weight, target, k, chunk_bytes=chunk, backward="dense", softcap=softcap
    )
    _, peak = sizes_of_allocations(loss.backward)
    assert peak <= buffers * chunk + weight.nbytes + 3 * hidden.nbytes + 64 * rows


def test_chunks_are_alike():
    for rows in (1, 100, 128, 1000, 1050, 8192, 16384, 16400):
        for most in (0, 1, 100, 127, 128, 130, 1046, 2000):
            size = linear.rows_of_chunk(rows, most)
            parts = list(linear.parts(rows, size))
            assert 1 <= size <= max(most, 1)
            if most >= 128:
                assert size % 128 == 0 and len(parts) == -(-rows // (most - most % 128))


def test_evaluation_allocates_no_gradient():
    hidden, weight = torch.randn(256, 64), torch.randn(5000, 64, requires_grad=True)
    target = torch.randint(5000, (256,))
    with torch.no_grad():
        allocations, _ = sizes_of_allocations(
            lambda: fused_linear_sparse_ce(hidden, weight, target, 20, chunk_bytes=1 << 20)
        )
    assert max(allocations) <= 1 << 20


def test_ignored_tokens_leave_before_the_product():
    hidden, weight = torch.randn(256, 64), torch.randn(5000, 64)
    target = torch.full((256,), -100)
    target[:10] = 1
    allocations, _ = sizes_of_allocations(
        lambda: fused_linear_sparse_ce(hidden, weight, target, 20)
    )
    assert max(allocations) == 4 * 10 * 5000
    hidden[10:] = torch.nan
    hidden.requires_grad_()
    loss = fused_linear_sparse_ce(hidden, weight, target, 20)
    loss.backward()
    assert loss.isfinite() and (hidden.grad[10:] == 0).all() and hidden.grad[:10].abs().sum() > 0


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("k", [K, None])
def test_no_tokens_and_all_ignored(subject, k, softcap):
    for rows in (0, 4):
        hidden, weight, _, target = layer(torch.float32, (rows,), device=subject.device)
        target.fill_(-100)
        loss = fused_linear_sparse_ce(
            hidden, weight, target, k, softcap=softcap, backend=subject.backend
        )
        assert loss == 0
        loss.backward()
        assert (hidden.grad == 0).all() and (weight.grad == 0).all()


@pytest.mark.parametrize("k", [K, 150, None])
@pytest.mark.parametrize("return_support", [False, True])
@pytest.mark.parametrize("backward", ["sparse", "dense"])
def test_ignored_tokens_may_be_nan(subject, k, return_support, backward):
    """Also where they go through the product: beside a support, and on a GPU."""
    options = {"return_support": return_support, "backward": backward, "backend": subject.backend}
    hidden, weight, bias, target = layer(torch.float32, bias=True, device=subject.device)
    target[0, 1] = target[2, 4] = -100
    found = []
    for fill in (0.0, math.nan):
        leaf = hidden.detach().clone()
        leaf[target == -100] = fill
        inputs = (leaf.requires_grad_(), weight, bias)
        loss = fused_linear_sparse_ce(leaf, weight, target, k, bias=bias, **options)
        loss = loss[0] if return_support else loss
        found.append((loss, *torch.autograd.grad(loss, inputs)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert (found[1][1][target == -100] == 0).all()


@pytest.mark.parametrize("return_support", [False, True])
def test_row_sparse_gradient(subject, return_support):
    hidden, weight, _, target = layer(torch.float32, device=subject.device)
    target[0, 0] = -100

    def gradients_of(form):
        found = fused_linear_sparse_ce(
            hidden, weight, target, K, weight_grad=form, backward="sparse",
            return_support=return_support, backend=subject.backend,
        )  # fmt: skip
        return torch.autograd.grad(found[0] if return_support else found, (hidden, weight))

    dense, sparse = gradients_of("dense"), gradients_of("row_sparse")
    # neither the support of an ignored token nor a class that stands for its target is touched
    touched = dense[1].any(-1).nonzero().squeeze(-1)
    assert torch.equal(sparse[1]._indices()[0], touched)
    assert sparse[1].layout == torch.sparse_coo and sparse[1].shape == weight.shape
    assert sparse[1]._nnz() <= target.numel() * (K + 1)
    assert torch.equal(sparse[1].to_dense(), dense[1]) and torch.equal(sparse[0], dense[0])


def test_row_sparse_gradient_has_no_compiled_form():
    hidden, weight, _, target = layer(torch.float32)
    compiled = torch.compile(
        lambda: fused_linear_sparse_ce(hidden, weight, target, K, weight_grad="row_sparse"),
        fullgraph=True,
    )
    with pytest.raises(Exception, match="weight_grad: expected 'dense' under torch.compile"):
        compiled()


@pytest.mark.parametrize("k", [None, CLASSES])
def test_row_sparse_gradient_of_all_classes(k):
    hidden, weight, _, target = layer(torch.float32)
    with pytest.raises(ValueError, match="weight_grad: expected 'dense' for k=None"):
        fused_linear_sparse_ce(
            hidden, weight, target, k, weight_grad="row_sparse", return_support=True
        )


def test_row_sparse_gradient_of_torch_func():
    hidden, weight, _, target = layer(torch.float32)
    with pytest.raises(ValueError, match="weight_grad: expected 'dense' under torch.compile and"):
        torch.func.grad(
            lambda w: fused_linear_sparse_ce(hidden, w, target, K, weight_grad="row_sparse")
        )(weight)


def test_row_sparse_gradient_trains():
    hidden, weight, _, target = layer(torch.float32)
    twin = weight.detach().clone().requires_grad_()
    for form, leaf in (("row_sparse", weight), ("dense", twin)):
        optimizer = torch.optim.SparseAdam([leaf]) if form == "row_sparse" else None
        fused_linear_sparse_ce(
            hidden, leaf, target, K, weight_grad=form, backward="sparse"
        ).backward()
        if optimizer:
            before = leaf.detach().clone()
            optimizer.step()
    touched = twin.grad.abs().sum(-1) > 0
    assert torch.equal((weight != before).any(-1), touched)


def test_mixed_dtypes_and_autocast():
    """The product in bfloat16, the gradient of a float32 weight in float32 without a rounding."""
    hidden, weight, _, target = layer(torch.float32)
    half = hidden.detach().bfloat16().requires_grad_()
    dloss = torch.rand(target.shape)
    truth = LinearTruth(half, weight, None, target, K, dloss)
    options = {"reduction": "none", "backward": "sparse"}
    loss = fused_linear_sparse_ce(half, weight, target, K, **options)
    truth.loss.assert_loss(loss)
    truth.assert_gradients(**gradients(loss, dloss, half, weight, None))
    with torch.autocast("cpu", torch.bfloat16):
        loss = fused_linear_sparse_ce(hidden, weight, target, K, **options)
    truth.loss.assert_loss(loss)
    truth.rounded["dhidden"] = torch.float32
    truth.assert_gradients(**gradients(loss, dloss, hidden, weight, None))


@pytest.mark.parametrize("k", [K, None])
def test_autocast_leaves_float64_alone(k):
    hidden, weight, _, target = layer(torch.float64)
    plain = fused_linear_sparse_ce(hidden, weight, target, k)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(hidden, weight).dtype == torch.float64
        loss = fused_linear_sparse_ce(hidden, weight, target, k)
    assert loss.dtype == torch.float64 and torch.equal(loss, plain)
    loss.backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float64


def test_tied_embeddings_accumulation_and_checkpointing():
    """As the plain layer: one weight as embedding and head, two micro-batches, a checkpoint."""
    torch.manual_seed(0)
    weight = torch.randn(CLASSES, FEATURES).requires_grad_()
    ids, target = torch.randint(CLASSES, (2, 6, 9)), torch.randint(CLASSES, (2, 6, 9))
    found = []
    for ours in (True, False):
        weight.grad = None
        for batch in range(2):
            hidden = torch.tanh(F.embedding(ids[batch], weight))

            def head(h, y=target[batch], ours=ours):
                if ours:
                    return fused_linear_sparse_ce(h, weight, y, K, backward="sparse")
                return fused_sparse_ce(F.linear(h, weight), y, K, backend="eager")

            checkpoint(head, hidden, use_reentrant=False).backward()
        found.append(weight.grad.clone())
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*:FutureWarning")
@pytest.mark.parametrize("k", [K, None])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_equals_eager_bit_by_bit(subject, k, dynamic):
    def step(hidden, weight, target):
        return fused_linear_sparse_ce(
            hidden, weight, target, k, backward="sparse", chunk_bytes=16 * CLASSES,
            backend=subject.backend,
        )  # fmt: skip

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    # powers of two: on a GPU the compiler divides by their number with an error of its own
    for rows in ((4, 4), (4, 8)):
        hidden, weight, _, target = layer(torch.float32, rows, device=subject.device)
        found = []
        for function in (step, compiled):
            loss = function(hidden, weight, target)
            found.append((*torch.autograd.grad(loss, (hidden, weight)), loss.detach()))
        *gradients_of_both, losses = zip(*found, strict=True)
        assert all(torch.equal(a, b) for a, b in gradients_of_both)
        # the compiler adds up the losses of the tokens in an order of its own
        torch.testing.assert_close(*losses, rtol=1e-6, atol=0)


NO_CAP = r"softcap: expected a positive number \(1.2e-38 to 3.4e.38\), or None for no cap,"


@pytest.mark.parametrize(
    "softcap, error, message",
    [
        (True, TypeError, "softcap: expected a float or None, got"),
        ("30", TypeError, "softcap: expected a float or None, got"),
        (0.0, ValueError, f"{NO_CAP} got 0.0"),
        (math.inf, ValueError, f"{NO_CAP} got inf"),
        (1e-50, ValueError, f"{NO_CAP} got 1e-50"),
        (math.nan, ValueError, f"{NO_CAP} got nan"),
    ],
)
def test_a_softcap_that_is_none(softcap, error, message):
    hidden, weight, _, target = layer(torch.float32)
    with pytest.raises(error, match=message):
        fused_linear_sparse_ce(hidden, weight, target, K, softcap=softcap)
    with pytest.raises(error, match=message):
        SparseLinearCrossEntropy(FEATURES, CLASSES, K, softcap=softcap)


@pytest.mark.parametrize(
    "k, weight_grad", [(K, "dense"), (None, "dense"), (K, "row_sparse")], ids=str
)
def test_a_second_derivative_is_an_error(k, weight_grad):
    hidden, weight, _, target = layer(torch.float32)
    loss = fused_linear_sparse_ce(hidden, weight, target, k, weight_grad=weight_grad)
    gradients = torch.autograd.grad(loss, (hidden, weight), create_graph=True)
    for gradient in gradients:
        with pytest.raises(RuntimeError, match="fused_linear_sparse_ce: expected a first deriv"):
            gradient.sum().backward(retain_graph=True)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("needed", [[True, True, True], [False, True, False]], ids=str)
def test_opcheck(subject, needed, softcap):
    pytest.importorskip("expecttest", reason="torch.library.opcheck imports expecttest")
    hidden, weight, bias, target = layer(torch.float32, (4,), True, subject.device)
    name, dtype = subject.backend, torch.float32
    arguments = (hidden, weight, bias, target, None, 5, 0.1, dtype, 2, softcap)
    topk = linear.topk_linear_ce_fwd(*arguments, None, None, True, name)
    drawn = (torch.rand(4).to(subject.device), 3)
    tail = linear.topk_linear_ce_fwd(*arguments, *drawn, True, name)
    threshold = linear.threshold_linear_ce_fwd(*arguments, name)
    above = torch.rand(4).to(subject.device)
    leaves = (hidden.detach(), weight.detach())
    lists = [[t.detach() for t in outputs[2:]] for outputs in (topk, tail)]
    listed = lists[0][:2]
    g, classes = ops.coefficients(above, None, None, target, *listed, None, 0.1, CLASSES, 5)
    checked = [
        (linear.topk_linear_ce_fwd, (*arguments, None, None, True, name)),
        (linear.topk_linear_ce_fwd, (*arguments, *drawn, True, name)),
        (linear.threshold_linear_ce_fwd, (*arguments, name)),
        *((linear.topk_linear_ce_bwd,
           (above, above, None, *leaves, target, *found, None, 5, 0.1, dtype, 2, sparse,
            needed, name)) for sparse in (True, False) for found in lists),
        (linear.threshold_linear_ce_bwd,
         (above, None, *leaves, bias.detach(), target, *(t.detach() for t in threshold[2:]), None,
          0.1, dtype, 2, softcap, needed, name)),
        (ops.sparse_linear_dhidden, (g, classes, leaves[1], dtype, name)),
        (ops.sparse_linear_dweight, (g, classes, leaves[0], CLASSES, dtype, name)),
    ]  # fmt: skip
    for op, inputs in checked:
        torch.library.opcheck(op.overload, inputs)


def test_module_in_the_place_of_a_linear_layer():
    torch.manual_seed(0)
    plain = torch.nn.Linear(FEATURES, CLASSES, bias=False)
    head = SparseLinearCrossEntropy.from_linear(plain, K, ignore_index=-1)
    assert head.weight is plain.weight and list(head.state_dict()) == list(plain.state_dict())
    hidden, target = torch.randn(6, FEATURES), torch.tensor([0, 1, 2, -1, 4, 5])
    assert torch.equal(head(hidden), plain(hidden))
    expected = fused_linear_sparse_ce(hidden, plain.weight, target, K, ignore_index=-1)
    assert torch.equal(head(hidden, target), expected)
    fresh = SparseLinearCrossEntropy(FEATURES, CLASSES, K, bias=True, dtype=torch.bfloat16)
    assert fresh.bias.dtype == torch.bfloat16 and f"k={K}" in repr(fresh)
    fresh.load_state_dict(torch.nn.Linear(FEATURES, CLASSES).state_dict())
    weighted = SparseLinearCrossEntropy(
        FEATURES, CLASSES, K, class_weight=torch.rand(CLASSES), label_smoothing=0.1
    )
    assert list(weighted.state_dict()) == ["weight"]
    assert weighted(hidden, target.clamp(min=0)).requires_grad


def test_break_even_rule():
    assert linear.is_sparse(20, 49152, "cpu", torch.float32)
    assert not linear.is_sparse(1000, 2000, "cpu", torch.float32)


@pytest.mark.parametrize("k", [K, None])
@pytest.mark.parametrize("backward", ["sparse", "dense"])
def test_gradient_of_the_bias_is_not_rounded_to_the_dtype_of_the_weight(subject, k, backward):
    hidden, weight, bias, target = layer(torch.float32, bias=True, device=subject.device)
    halves = weight.detach().bfloat16()
    options = {"k": k, "bias": bias, "backward": backward, "backend": subject.backend}
    found = [
        torch.autograd.grad(fused_linear_sparse_ce(hidden, w, target, **options), bias)[0]
        for w in (halves, halves.float())
    ]
    assert found[0].dtype == torch.float32 and torch.equal(*found)
    half = bias.detach().bfloat16().requires_grad_()
    options["bias"] = half
    (rounded,) = torch.autograd.grad(
        fused_linear_sparse_ce(hidden, halves, target, **options), half
    )
    assert rounded.dtype == torch.bfloat16 and rounded.abs().sum() > 0


@pytest.mark.parametrize("k", [K, None])
@pytest.mark.parametrize("backward", ["sparse", "dense"])
def test_ignored_tokens_beside_an_infinite_weight(subject, k, backward):
    hidden, weight, _, target = layer(torch.float32, device=subject.device)
    leaf = hidden.detach().abs().add(1).requires_grad_()
    with torch.no_grad():
        weight[5] = -math.inf
    target[target == 5] = 6
    target[0, 1] = -100
    loss = fused_linear_sparse_ce(
        leaf, weight, target, k, backward=backward, return_support=True, backend=subject.backend
    )[0]
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert loss.isfinite() and (gradient[0, 1] == 0).all()
