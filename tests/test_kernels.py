"""topk_ce and threshold_ce, per backend, against the float64 truth. SPEC 1, 7 and 8.

Every test of this file runs for each backend that implements the operator itself.
"""

import math
import mmap

import cases
import pytest
import subjects
import torch
from closeness import Truth
from sparse_ce import ops
from stems import STEMS, Call

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poisoned_memory")]

ROWS = 2 if subjects.INTERPRETING else 9
SHORT_ROWS = (
    *("random", "ties", "peaked", "plus_inf", "zeros_of_both_signs", "many_nan_of_both_signs"),
    *("all_minus_inf", "constant", "descending", "all_nan", "last_bits"),
)


def check(subject, stem, call, which="a"):
    """Forward and backward against the truth; shapes, dtypes and strides as the schema promises."""
    there = call.to(subject.device)
    outputs = stem.forward(there, subject.backend)
    assert [(o.dtype, tuple(o.shape)) for o in outputs] == stem.outputs(call)
    truth = call.truth()
    stem.assert_forward(truth, outputs)
    above = stem.above(there, which)
    dlogits = stem.backward(there, outputs, above, subject.backend)
    assert dlogits.shape == call.logits.shape
    assert all(t.is_contiguous() for t in (*outputs, dlogits))
    truth.assert_gradient(dlogits, *above)


def leave_to_another_dtype(subject, stem, dtype, table, case):
    """In the interpreter a cut takes seconds: each case of a table takes one dtype, in turn."""
    turn = subject.dtypes[list(table).index(case) % len(subject.dtypes)]
    if subjects.INTERPRETING and not stem.lists and dtype != turn:
        pytest.skip("the turn of another dtype")


@pytest.mark.parametrize("classes, k", [(1003, 20), (5001, 129)])
@pytest.mark.parametrize("filler", cases.FILLERS)
def test_values(subject, stem, dtype, filler, classes, k):
    if classes > 2000:
        leave_to_another_dtype(subject, stem, dtype, cases.FILLERS, filler)
    logits = cases.logits(filler, ROWS if classes < 2000 else min(3, ROWS), classes, dtype)
    check(subject, stem, Call(logits, cases.targets(logits, k), k))


@pytest.mark.parametrize("filler", ["plus_inf", "one_nan", "constant", "all_minus_inf"])
def test_one_class(subject, stem, filler):
    """A support that is the target alone: its loss is 0, or NaN where the target is at +inf."""
    logits = cases.logits(filler, ROWS, 203, torch.float32)
    check(subject, stem, Call(logits, cases.targets(logits, 1), 1))


@pytest.mark.parametrize("k", [3, 5, 9, 12, 14])
def test_nan_comes_before_infinity(subject, stem, dtype, k):
    """Five of the one and seven of the other: a cut among either, at their ends, and behind."""
    logits = cases.logits("random", min(3, ROWS), 203, dtype)
    logits[:, 7:203:40], logits[:, 3:203:30] = math.nan, math.inf
    assert logits[0].isnan().sum() == 5 and logits[0].isposinf().sum() == 7
    check(subject, stem, Call(logits, cases.targets(logits, k), k))


def test_sizes(subject, stem, dtype, size):
    classes, k = size
    fillers = ("random", "ties", "peaked", "99_percent_minus_inf", "constant")[
        : 2 if subjects.INTERPRETING else 5
    ]
    logits = torch.cat([cases.logits(filler, 1, classes, dtype) for filler in fillers])
    check(subject, stem, Call(logits, cases.targets(logits, k), k))


@pytest.mark.parametrize(
    "filler, classes, k",
    [
        ("random", 20011, 20),
        ("descending", 32768, 20),
        ("random", 50257, 20),
        ("constant", 50257, 100),
        ("ties", 70001, 1000),
    ],
)
def test_few_long_rows(subject, stem, dtype, filler, classes, k):
    """Several programs of a GPU share a row from 32768 classes on, where rows are few."""
    if subjects.INTERPRETING and not stem.lists and (dtype != torch.bfloat16 or classes > 32768):
        pytest.skip("no program shares a row, and a cut takes ten seconds in the interpreter")
    logits = cases.logits(filler, 2, classes, dtype)
    check(subject, stem, Call(logits, torch.tensor([classes - 1, 5]), k))


@pytest.mark.parametrize("classes, k", [(1, 1), (7, 5), (100, 20), (131, 32), (256, 33)])
def test_many_short_rows(subject, stem, dtype, classes, k):
    """On a GPU several rows share a warp, and the last ones may be fewer."""
    if subjects.INTERPRETING and (not stem.lists or classes > 128):
        pytest.skip("no other code there")
    logits = torch.cat([cases.logits(filler, 1, classes, dtype) for filler in SHORT_ROWS])
    check(subject, stem, Call(logits, cases.targets(logits, k), k), "abq")


@pytest.mark.parametrize("classes", [203, 517])
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_layouts_and_logits_unchanged(subject, stem, dtype, layout, classes):
    if subjects.INTERPRETING and classes > 256 and (not stem.lists or dtype == torch.float32):
        pytest.skip("no other code there")
    leave_to_another_dtype(subject, stem, dtype, cases.LAYOUTS, layout)
    logits = cases.logits("random", 4, classes, dtype).unflatten(0, (2, 2)).to(subject.device)
    logits = cases.LAYOUTS[layout](logits)
    before = cases.bits(logits.clone())
    target = torch.arange(logits.shape[:-1].numel()).view(logits.shape[:-1])
    check(subject, stem, Call(logits, target, 20))
    assert torch.equal(before, cases.bits(logits.clone()))


@pytest.mark.parametrize("y", [-1, -100, 203, 2**31, 2**32, 2**32 + 7, -(2**63), 2**63 - 1])
def test_target_out_of_range_is_no_hit(subject, stem, y):
    """SPEC 7: the loss is NaN, and of that loss there is no gradient; lse and probs have theirs."""
    call = Call(
        cases.logits("random", 2, 203, torch.float32), torch.tensor([y, 3]), 20, label_smoothing=0.1
    )
    check(subject, stem, call, "a")
    check(subject, stem, call, "abq")


@pytest.mark.parametrize("which", ["a", "b", "q", "ab", "abq"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weight"])
def test_options_and_upstream_gradients(subject, stem, dtype, weighted, smoothing, which):
    logits = cases.logits("random", ROWS, 205, dtype)
    call = Call(logits, cases.targets(logits, 21), 21, label_smoothing=smoothing)
    if weighted:
        call = Call(
            call.logits, call.target, 21, torch.rand(205, dtype=call.statistics).mul_(2), smoothing
        )
    check(subject, stem, call, which)


@pytest.mark.parametrize("filler", ["random", "all_nan", "plus_inf", "all_minus_inf"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_rows_without_upstream_gradient_are_exact_zeros(subject, stem, dtype, filler, smoothing):
    """SPEC 7, ignored rows: NaN in the logits does not get through."""
    logits = cases.logits(filler, 2, 203, dtype)
    call = Call(logits, torch.tensor([3, 5]), 20, label_smoothing=smoothing).to(subject.device)
    outputs = stem.forward(call, subject.backend)
    for which in ("a", "b", "q", "abq"):
        above = [None if d is None else torch.zeros_like(d) for d in stem.above(call, which)]
        dlogits = stem.backward(call, outputs, above, subject.backend)
        assert (dlogits == 0).all()


def test_an_infinite_upstream_gradient_stays_on_the_kept_classes(subject, stem, dtype):
    call = Call(cases.logits("random", 2, 203, dtype), torch.tensor([3, 5]), 20).to(subject.device)
    outputs = stem.forward(call, subject.backend)
    above = stem.above(call, "a")
    wanted = stem.backward(call, outputs, above, subject.backend) != 0
    above = [None if d is None else torch.full_like(d, torch.inf) for d in above]
    dlogits = stem.backward(call, outputs, above, subject.backend)
    assert (dlogits[~wanted] == 0).all() and not dlogits.isfinite().all()


@pytest.mark.parametrize("strides", ["one number", "one per row", "transposed", "every second"])
def test_strided_upstream_gradients(subject, stem, strides):
    """`.sum().backward()` hands over one number, of stride 0, for all rows."""
    strided = {
        "one number": lambda d: d.flatten()[0].expand(d.shape),
        "one per row": lambda d: d.view(3, -1)[:, 0].view(3, *(1,) * (d.dim() - 1)).expand(d.shape),
        "transposed": lambda d: d.mT.contiguous().mT if d.dim() > 1 else d,
        "every second": lambda d: torch.stack([d, torch.full_like(d, torch.nan)], -1).flatten(-2)[
            ..., ::2
        ],
    }[strides]
    call = Call(cases.logits("random", 3, 203, torch.float32), torch.tensor([3, 5, 7]), 20)
    there = call.to(subject.device)
    outputs = stem.forward(there, subject.backend)
    above = [strided(d) for d in stem.above(there, "abq")]
    call.truth().assert_gradient(stem.backward(there, outputs, above, subject.backend), *above)


def test_no_rows(subject, stem):
    call = Call(torch.empty(0, 203), torch.empty(0, dtype=torch.int64), 20).to(subject.device)
    outputs = stem.forward(call, subject.backend)
    assert [(o.dtype, tuple(o.shape)) for o in outputs] == stem.outputs(call)
    assert stem.backward(call, outputs, stem.above(call, "abq"), subject.backend).shape == (0, 203)


def test_rows_further_than_2_31_elements_apart(subject, stem):
    """SPEC 7, 64-bit offsets. The memory between the rows is reserved and never touched."""
    classes, apart = 203, 2**31 + 5
    if subject.device == "cpu":
        untouched = mmap.mmap(
            -1, 2 * (apart + classes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )
        base = torch.frombuffer(untouched, dtype=torch.float16)
    else:
        base = torch.empty(apart + classes, dtype=torch.float16, device=subject.device)
    logits = base.as_strided((2, classes), (apart, 1))
    logits.copy_(cases.logits("random", 2, classes, torch.float16))
    check(subject, stem, Call(logits, torch.tensor([3, 5]), 20))


def test_more_than_2_31_elements(subject, stem):
    """SPEC 7, 64-bit offsets, in the gradient too."""
    if subject.device != "cuda":
        pytest.skip("4 GB of logits and 4 GB of gradient: only on a GPU")
    rows, classes = 2**16 + 1, 2**15
    logits = torch.zeros(rows, classes, dtype=torch.float16, device="cuda")
    last = cases.logits("random", 1, classes, torch.float16)
    logits[-1] = last[0].cuda()
    call = Call(logits, torch.arange(rows, device="cuda") % classes, 20)
    outputs = stem.forward(call, subject.backend)
    above = [torch.ones_like(outputs[0]), *(None,) * (stem.differentiable - 1)]
    dlogits = stem.backward(call, outputs, above, subject.backend)
    truth = Truth(last, call.target[-1:], 20)
    truth.assert_loss(outputs[0][-1:])
    truth.assert_gradient(dlogits[-1:], torch.ones(1))


@pytest.mark.parametrize("filler", ["random", "ties", "many_nan_of_both_signs"])
def test_bit_identical_from_run_to_run(subject, stem, dtype, filler):
    if subjects.INTERPRETING:
        pytest.skip("one program after the other: there is one order")
    torch.use_deterministic_algorithms(False)  # the kernels as they run for a user
    logits = cases.logits(filler, ROWS, 5001, dtype)
    call = Call(logits, torch.arange(ROWS), 100, label_smoothing=0.1).to(subject.device)

    def run():
        outputs = stem.forward(call, subject.backend)
        dlogits = stem.backward(call, outputs, stem.above(call, "abq"), subject.backend)
        return [cases.bits(t) for t in (*outputs, dlogits)]

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_a_row_does_not_depend_on_the_others(subject, stem, dtype):
    logits = cases.logits("random", 2 * ROWS + 1, 1003, dtype)
    call = Call(logits, torch.arange(2 * ROWS + 1), 20).to(subject.device)
    together = stem.forward(call, subject.backend)
    alone = stem.forward(Call(call.logits[-1:], call.target[-1:], 20), subject.backend)
    assert all(torch.equal(a[-1:], b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_16_bit_logits_are_computed_in_float32(subject, stem, half):
    """SPEC 8: the same numbers in float32 give the same statistics, to the last bit but one.

    A GPU may add the exponentials of a row in another order, as warps have more rows of them. Where
    log_sum differs by an ulp, 2 eps, so do the logarithms of probabilities, which lie in (-4, 0],
    by two roundings of half an ulp there, 2 eps, and the exponentials have errors of 2 ulps each.
    """
    logits = cases.logits("random", ROWS, 1003, half)
    call = Call(logits, torch.arange(ROWS), 20).to(subject.device)
    outputs = stem.forward(call, subject.backend)
    in_float32 = stem.forward(Call(call.logits.float(), call.target, 20), subject.backend)
    eps = torch.finfo(torch.float32).eps
    for a, b in zip(outputs, in_float32, strict=True):
        is_list = a.dim() > 1 and a.is_floating_point()
        assert not is_list or b.log().min() > -4
        assert torch.allclose(a, b, rtol=(8 if is_list else 2) * eps, atol=0)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_upstream_gradient_is_applied_before_rounding(subject, stem, half):
    """SPEC 1, any upstream gradient is exact: it multiplies numbers that are not rounded yet."""
    logits = cases.logits("random", ROWS, 203, half)
    call = Call(logits, torch.arange(ROWS), 20)
    there = call.to(subject.device)
    outputs = stem.forward(there, subject.backend)
    above = [1 / 3 * torch.ones_like(outputs[0]), *(None,) * (stem.differentiable - 1)]
    dlogits = stem.backward(there, outputs, above, subject.backend)
    call.truth().assert_gradient(dlogits, above[0])


def test_small_probabilities_keep_their_relative_precision(subject):
    """No error is relative to the row's largest: 1e-30 is right to float32's relative precision."""
    logits = torch.tensor([[0.0, -20, -40, -60, -70] + [-1000.0] * 200]).to(subject.device)
    target = torch.tensor([0], device=subject.device)
    probs = ops.topk_ce_fwd(logits, target, None, 5, 0.0, subject.backend)[3]
    expected = [math.exp(-x) for x in (0, 20, 40, 60, 70)]
    # 1 + exp(-20) is 1 in float32; an exponent of 70 is rounded on its way to exp2: 70 units, and 2
    assert all(
        abs(p - e) <= 72 * 2**-23 * e for p, e in zip(probs[0].tolist(), expected, strict=True)
    )


@pytest.mark.parametrize("classes", [205, 5001])
@pytest.mark.parametrize("smoothing, weighted", [(0.0, False), (0.1, False), (0.1, True)])
def test_delta(subject, dtype, classes, smoothing, weighted):
    """SPEC 3: p_y - p_i <= delta keeps i. Those are the first classes of the row, as many as that
    keeps: the truth is that of a row's own k.
    """
    threshold = next(stem for stem in STEMS if stem.name == "threshold_ce")
    if not subject.defines(threshold.name):
        pytest.skip("it has no kernels of its own for this")
    delta, boosts = 0.1, [0, 30, 200, 6, 7, 8, 9]
    torch.manual_seed(0)
    logits = torch.randn(len(boosts), classes) * 2
    target = torch.arange(len(boosts)) * (classes // len(boosts))
    # no target, the target alone by far, then rivals near it
    for row, boost in enumerate(boosts):
        logits[row, target[row]] = boost
        if boost < 30:
            logits[row, [1, 2, classes - 1]] = boost - torch.tensor([0.0, 0.5, 2.0])
    logits = logits.to(dtype)
    p = logits.double().softmax(-1)
    behind = p.gather(-1, target.unsqueeze(-1)) - p
    assert (behind - delta).abs().min() > 1e-4
    kept = (behind <= delta).sum(-1).tolist()
    assert {1, 3, classes} <= set(kept)
    weight = torch.rand(classes, dtype=Call(logits, target, 1).statistics) if weighted else None
    call = Call(logits, target, classes, weight, smoothing).to(subject.device)
    outputs = threshold.fwd(
        call.logits, call.target, call.weight, classes, delta, smoothing, subject.backend
    )
    for which in ("a", "ab"):
        above = threshold.above(call, which)
        dlogits = threshold.backward(call, outputs, above, subject.backend)
        for row, k in enumerate(kept):
            only = slice(row, row + 1)
            truth = Truth(logits[only], target[only], k, weight, smoothing)
            threshold.assert_forward(truth, [o[only] for o in outputs])
            truth.assert_gradient(dlogits[only], *(d if d is None else d[only] for d in above))
            assert which == "ab" or k > 1 or (dlogits[row] == 0).all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_another_gpu_than_the_current(subject, stem):
    if subject.device != "cuda":
        pytest.skip("a test of GPUs")
    logits = cases.logits("random", ROWS, 1003, torch.float32)
    with torch.cuda.device(0):
        check(subject._replace(device="cuda:1"), stem, Call(logits, torch.arange(ROWS), 20))
