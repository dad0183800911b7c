"""Short rows, several of which share a warp: what test_kernels.py, whose rows are alike, does not
see. And Triton's kernel of such rows.
"""

import importlib

import cases
import pytest
import torch
from stems import STEMS, Call
from test_kernels import check

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poisoned_memory")]

SETTLED = 0x7FFFFFFF
# of eight, four, two rows and one to a program, with lists of 64, 128 and 256 classes
SIZES = [
    *((260, 20), (1000, 50), (1001, 32), (1500, 100), (2051, 20), (3001, 20), (4099, 20)),
    *((5001, 128), (8190, 20)),
]
# and what else CUDA has kernels for: four, eight and sixteen lanes to a row, and warps that hold it
MORE = [
    *((65, 20), (127, 100), (130, 128), (200, 32), (263, 50), (515, 100), (2048, 128), (4097, 33)),
    *((8190, 128), (9001, 32)),
]
MIXED = (
    *("random", "constant", "ties", "all_nan", "wide", "signalling_nan", "one_negative_nan"),
    *("clustered", "99_percent_minus_inf", "descending", "all_minus_inf", "random"),
)


@pytest.fixture
def short_rows(subject):
    if subject.backend != "triton":
        pytest.skip("kernels of Triton")
    return importlib.import_module("sparse_ce.triton_kernels.short_rows")


@pytest.mark.parametrize("classes, k", [*SIZES, *MORE])
def test_rows_of_a_warp_are_their_own(subject, dtype, classes, k):
    """Rows that overflow their lists, whose bound is NaN, that are clear, side by side."""
    if subject.backend == "triton" and ((classes, k) in MORE or classes * dtype.itemsize > 16384):
        pytest.skip("no other code there")
    rows = [cases.logits(filler, 1, classes, dtype) for filler in MIXED]
    logits = torch.cat(rows[: 12 if classes < 2000 else 5])
    stem = next(stem for stem in STEMS if stem.lists)
    check(subject, stem, Call(logits, cases.targets(logits, k), k))


@pytest.mark.parametrize("delta", [1.0, 0.2])
@pytest.mark.parametrize("smoothing, weighted", [(0.0, False), (0.1, False), (0.1, True)])
@pytest.mark.parametrize("classes", [100, 257])
def test_softmax_of_rows_of_a_warp(subject, dtype, classes, smoothing, weighted, delta):
    """The same numbers of a row alone as beside others: some drop their rivals, some have no
    upstream gradient, some are NaN. Values: test_kernels.py::test_delta.
    """
    threshold = next(stem for stem in STEMS if stem.name == "threshold_ce")
    if subject.backend not in ("cuda", "triton"):
        pytest.skip("there are no warps")
    fillers = ["peaked", "random", "all_nan", "peaked", "all_minus_inf", "plus_inf", "random"]
    logits = torch.cat([cases.logits(filler, 1, classes, dtype) for filler in fillers])
    target = logits.nan_to_num(-100).argmax(-1)
    target[1], target[6] = -100, classes - 1
    weight = torch.rand(classes, dtype=Call(logits, target, 1).statistics) if weighted else None
    call = Call(logits, target, classes, weight, smoothing).to(subject.device)
    above = threshold.above(call, "ab")
    above[0][3], above[1][[0, 2]] = 0, 0

    def run(rows):
        part = Call(call.logits[rows], call.target[rows], classes, call.weight, smoothing)
        outputs = threshold.fwd(
            part.logits, part.target, part.weight, classes, delta, smoothing, subject.backend
        )
        upstream = [d[rows] for d in above]
        return *outputs, threshold.backward(part, outputs, upstream, subject.backend)

    together = run(slice(None))
    for row in (0, 5, 6):
        for alone, found in zip(run(slice(row, row + 1)), together, strict=True):
            here = found[row : row + 1]
            assert torch.equal(alone.isnan(), here.isnan())
            assert torch.equal(alone.nan_to_num(), here.nan_to_num())


@pytest.mark.parametrize("classes, k", SIZES)
@pytest.mark.parametrize("filler", ["random", "constant"])
def test_who_is_left_to_the_exact_kernel(subject, short_rows, dtype, filler, classes, k):
    """All rows of ties, with the bound that they share, and of normal logits none."""
    options = short_rows.short_fwd_options(dtype.itemsize, classes, k)
    if options is None:
        pytest.skip("not a short row")
    # the last program is whole: behind its lists there is nothing
    n = 2 * options["ROWS"]
    logits = cases.logits(filler, n, classes, dtype).to(subject.device)
    target = torch.zeros(n, dtype=torch.int64, device=subject.device)
    outputs = [logits.new_empty(shape, dtype=torch.float32) for shape in ((n,), (n,), (n, k))]
    indices = target.new_empty((n, k), dtype=torch.int32)
    tensors = (logits, target, None, *outputs[:2], indices, outputs[2])
    flags = {"HAS_WEIGHT": False, "HAS_SMOOTHING": False}
    pending = short_rows.launch_short_fwd(tensors, k, 0.0, flags, options)
    if filler == "random":
        assert (pending == SETTLED).all()
        # of equal numbers of 16 bits the one of the lower index is first
        best = logits.double().sort(dim=-1, descending=True, stable=True).indices[:, :k]
        assert torch.equal(indices.long(), best)
    else:
        bits = cases.bits(logits[:, 0]).int()
        assert torch.equal(pending, bits)  # a positive number's key is its bits


def test_what_is_not_short(subject, short_rows):
    assert short_rows.short_fwd_options(2, 8192, 128)
    assert short_rows.short_fwd_options(2, 8193, 20) is None
    assert short_rows.short_fwd_options(4, 4096, 129) is None
    for itemsize in (2, 4):
        for classes in range(65, 16384 // itemsize):
            options = short_rows.short_fwd_options(itemsize, classes, 20)
            assert options["ROWS"] * classes * itemsize <= short_rows.BYTES
            assert options["TILES"] * options["SLOTS"] == 8
