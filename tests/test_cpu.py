"""The CPU kernels on every instruction set of this processor, through the user's own override."""

import math

import cases
import pytest
import torch
from sparse_ce import backends, fused_sparse_ce
from stems import STEMS, Call
from subjects import Subject
from test_cosine import test_values as check_distances
from test_kernels import check
from test_labels import check as check_labels
from test_labels import problem as labels_problem
from test_linear import test_sums_of_weighted_rows as check_sums_of_weighted_rows

pytestmark = [
    pytest.mark.skipif(
        backends.unavailable("cpu") is not None, reason=str(backends.unavailable("cpu"))
    ),
    pytest.mark.usefixtures("poisoned_memory"),
]

CPU = Subject("cpu", "cpu")
TOPK_CE, THRESHOLD_CE = STEMS


@pytest.fixture(params=["avx512", "avx2", "neon", "portable"])
def isa(request, monkeypatch):
    monkeypatch.setenv("SPARSE_CE_CPU_ISA", request.param)
    try:
        chosen = torch.ops.sparse_ce_native.cpu_isa()
    except RuntimeError:
        pytest.skip(f"this processor does not have {request.param}")
    assert chosen == request.param
    return request.param


# Around the sizes of a vector, a group of vectors and the buffers of candidates.
SIZES = [(1, 1), (33, 33), (127, 1), (1003, 20), (4099, 700)]


@pytest.mark.parametrize("classes, k", SIZES)
@pytest.mark.parametrize("dtype", CPU.dtypes, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("stem", STEMS, ids=str)
def test_values(isa, stem, dtype, classes, k):
    for filler in cases.FILLERS:
        logits = cases.logits(filler, 2, classes, dtype)
        call = Call(logits, cases.targets(logits, k), k, label_smoothing=0.1 * (k % 2))
        check(CPU, stem, call, "ab")


@pytest.mark.parametrize("dtype", CPU.dtypes, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_a_maximum_in_any_block(isa, dtype):
    """The sums of the dense softmax are relative to the largest logit that came so far."""
    block, classes = 512, 4 * 512 + 77
    of_block = torch.arange(classes) // block
    z = torch.randn(9, classes)
    z[0] += 8 * of_block
    z[1] -= 8 * of_block
    z[2] += 100 * (of_block == 4)
    z[3, of_block < 2] = -torch.inf
    z[4, of_block != 1] = -torch.inf
    z[5, -1], z[5, :-1] = 1.0, -torch.inf
    z[6, 3] = torch.nan  # before larger ones
    z[7, 1500] = torch.nan
    z[8, 700] = torch.inf
    target = torch.tensor([classes - 1, 0, classes - 1, 1024, 600, classes - 1, 0, 0, 0])
    check(CPU, THRESHOLD_CE, Call(z.to(dtype), target, classes), "ab")


@pytest.mark.parametrize("filler", ["random", "last_bits", "ties", "both_inf", "descending"])
@pytest.mark.parametrize("dtype", CPU.dtypes, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_sorted_lists(isa, dtype, filler):
    """Of every length that registers hold, and beyond; keys that differ in their last bits too."""
    for n in range(1, 140):
        logits = cases.logits(filler, 2, n, dtype)
        call = Call(logits, torch.zeros(2, dtype=torch.int64), n)
        indices = TOPK_CE.forward(call, "cpu")[2]
        expected = logits.double().sort(dim=-1, descending=True, stable=True).indices
        assert torch.equal(indices.long(), expected)


# Around the sizes of a block of classes, and of the runs to which blocks are merged.
FEW_CLASSES = [
    (1, 1), (7, 7), (9, 8), (16, 16), (17, 3), (33, 20), (64, 33), (65, 64), (100, 20), (127, 100),
    (128, 128),
]  # fmt: skip


@pytest.mark.parametrize("filler", cases.FILLERS)
@pytest.mark.parametrize("dtype", CPU.dtypes, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_few_classes(isa, dtype, filler):
    """Rows side by side, a lane of a vector for each, and those that are left over."""
    for classes, k in FEW_CLASSES:
        logits = cases.logits(filler, 35, classes, dtype)
        if filler == "wide":
            logits = logits / 2  # a loss beyond float32 is infinite
        check(CPU, TOPK_CE, Call(logits, cases.targets(logits, k), k))


def test_few_classes_where_denormals_are_flushed(isa):
    """They are no zeros to the order of a list, wherever a row stands."""
    logits = torch.tensor([5, 9, 7, 1, 8], dtype=torch.int32).repeat(19, 1).view(torch.float32)
    target = torch.zeros(19, dtype=torch.int64)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.set_flush_denormal(True)
        indices = TOPK_CE.forward(Call(logits, target, 4), "cpu")[2]
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)
    assert indices.tolist() == [[1, 4, 2, 0]] * 19


@pytest.mark.parametrize("often", [2, 5])
def test_few_classes_of_all_kinds(isa, often):
    """Some of the rows side by side have logits that differ in their last bits."""
    for classes, k in FEW_CLASSES:
        logits = cases.logits("random", 70, classes, torch.float32)
        logits[::often] = cases.logits("last_bits", 70, classes, torch.float32)[::often]
        logits[1::7] = cases.logits("ties", 70, classes, torch.float32)[1::7]
        check(CPU, TOPK_CE, Call(logits, cases.targets(logits, k), k))


@pytest.mark.parametrize("features", [1, 33])
@pytest.mark.parametrize("dtype", CPU.dtypes, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_sums_of_rows(isa, dtype, features):
    check_sums_of_weighted_rows(CPU, dtype, features, "same")


@pytest.mark.parametrize("width", [1, 31, 300])
@pytest.mark.parametrize("dtype", CPU.dtypes, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("distance", ["cosine", "l2"])
def test_distances(isa, dtype, width, distance):
    check_distances(CPU, dtype, width, distance)


@pytest.mark.parametrize("classes", [1, 33, 127, 1003])
@pytest.mark.parametrize("dtype", CPU.dtypes, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_several_labels(isa, dtype, classes):
    check_labels(CPU, *labels_problem(9, classes, dtype), 0.1)


@pytest.mark.parametrize("k", [1, 20, 700])
@pytest.mark.parametrize("dtype", CPU.dtypes, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_every_class_a_candidate(isa, dtype, k):
    """Ties at the cut fill the buffer of candidates over and over; each time a little better."""
    rising = torch.arange(20000).div(700, rounding_mode="floor").to(dtype)
    logits = torch.stack([torch.zeros_like(rising), rising, -rising, rising.flip(0)])
    check(CPU, TOPK_CE, Call(logits, cases.targets(logits, k), k))


@pytest.mark.parametrize("classes", [129, 1003, 4099])
@pytest.mark.parametrize("dtype", CPU.dtypes, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_rows_of_all_signs(isa, dtype, classes):
    """A row is taken for one of positive numbers where the row before was: all kinds after both."""
    k = 20
    negative = -cases.logits("random", 1, classes, dtype).abs().clamp(min=1e-3)
    zeros = torch.where(torch.rand(1, classes) < 0.5, -0.0, 0.0).to(dtype)
    place = torch.randperm(classes)

    def with_positive(count: int, rest: torch.Tensor = negative) -> torch.Tensor:
        return rest.index_fill(-1, place[:count], 1.0)

    kinds = [with_positive(count, rest) for rest in (negative, zeros) for count in (0, k - 1, k)]
    # two NaNs of a sign: of equal ones the first comes first, though the other has the larger bits
    first, second = place[-2:].sort().values
    for infinity in cases.bits(torch.tensor([math.inf, -math.inf], dtype=dtype)):
        for row in (negative, with_positive(k)):
            bits = cases.bits(row.clone())
            bits[:, first], bits[:, second] = infinity + 1, infinity + 2
            kinds.append(bits.view(dtype))
    logits = torch.cat([row for kind in kinds for row in (-negative, kind, negative, kind)])
    check(CPU, TOPK_CE, Call(logits, cases.targets(logits, k), k))


def test_threads_change_nothing(isa):
    logits = cases.logits("random", 64, 5001, torch.float32)
    target = torch.arange(64)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            x = logits.clone().requires_grad_()
            loss = fused_sparse_ce(x, target, 20, backend="cpu")
            loss.backward()
            results.append((loss.detach(), x.grad))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_an_unknown_instruction_set_is_an_error(monkeypatch):
    monkeypatch.setenv("SPARSE_CE_CPU_ISA", "sse9")
    with pytest.raises(RuntimeError, match="SPARSE_CE_CPU_ISA: expected .* got sse9"):
        fused_sparse_ce(torch.randn(2, 9), torch.tensor([1, 2]), 3, backend="cpu")
