"""The reduction of the losses of all rows: reduce, per backend, and what a call of a loss costs."""

import cases
import pytest
import torch
from closeness import assert_within
from sparse_ce import adaptive_sparse_ce, fused_linear_sparse_ce, fused_sparse_ce, ops
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

CLASSES = 37
# On a GPU one program up to 16384 rows, beyond it several and one that joins; on the CPU parts of
# 4096.
ROWS = [0, 1, 7, 4097, 16384, 16385, 70001]


def problem(subject, shape, dtype=torch.float32, weighted=False, ignore_index=-100):
    """Positive losses, NaN where the target is ignored, as every third is."""
    torch.manual_seed(0)
    target = torch.randint(0, CLASSES, shape)
    target = target.masked_fill(torch.rand(shape) < 0.3, ignore_index)
    loss = (0.5 + torch.rand(shape, dtype=dtype)).masked_fill(target == ignore_index, torch.nan)
    weight = 0.5 + torch.rand(CLASSES, dtype=dtype) if weighted else None
    return tuple(t if t is None else t.to(subject.device) for t in (loss, target, weight))


def statistics(subject):
    """The dtypes of losses that the backend meets."""
    return [torch.float32] + [torch.float64] * (torch.float64 in subject.dtypes)


@pytest.mark.interpreter
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("ignore_index", [-100, 2, 2**40])
@pytest.mark.parametrize("mean", [True, False], ids=["mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weight"])
@pytest.mark.parametrize("rows", ROWS)
def test_values(subject, rows, weighted, mean, ignore_index):
    """On the way of a number into a sum lie at most 40 additions, each off by half an ulp, and in
    float64 those of a part in C++; a mean is the quotient of two sums.
    """
    for dtype in statistics(subject):
        loss, target, weight = problem(subject, (rows,), dtype, weighted, ignore_index)
        reduced, divisor = ops.reduce_fwd(loss, target, weight, ignore_index, mean, subject.backend)
        counted = target != ignore_index
        total, expected = loss[counted].double().sum(), torch.tensor(1.0).double()
        if mean and counted.any():
            shares = torch.ones_like(loss) if weight is None else weight[target.clamp(0, 36)]
            expected = shares[counted].double().sum().cpu()
        near = (40 if dtype == torch.float32 else 40 + 4096) * torch.finfo(dtype).eps
        for found, truth in ((divisor, expected), (reduced, total.cpu() / expected)):
            assert found.dtype == dtype and found.shape == ()
            assert_within("reduced", found, truth, near * truth)
        above = torch.tensor(3.0, dtype=dtype, device=subject.device)
        dloss = ops.reduce_bwd(above, target, divisor, ignore_index, subject.backend)
        assert torch.equal(dloss, torch.where(counted, above / divisor, 0))


@pytest.mark.interpreter
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weight"])
def test_rows_that_do_not_count(subject, weighted):
    """All of them: 0 over 1. An upstream NaN reaches no ignored row. A target out of range makes
    the sum NaN, and has the weight of the nearest class.
    """
    _, _, weight = problem(subject, (3,), weighted=weighted)
    nan = torch.full((3,), torch.nan, device=subject.device)
    target = torch.full((3,), -100, device=subject.device)
    for mean in (True, False):
        outputs = ops.reduce_fwd(nan, target, weight, -100, mean, subject.backend)
        assert [output.item() for output in outputs] == [0, 1]
        dloss = ops.reduce_bwd(nan[0], target, outputs[1], -100, subject.backend)
        assert dloss.tolist() == [0, 0, 0]
        target_out = torch.tensor([-100, 37, -1], device=subject.device)
        outputs = ops.reduce_fwd(nan, target_out, weight, -100, mean, subject.backend)
        shares = torch.ones(2) if weight is None else weight[[36, 0]].cpu()
        assert outputs[0].isnan() and outputs[1].cpu() == (shares.sum() if mean else 1)


def test_the_same_bits_on_any_number_of_threads(subject):
    loss, target, weight = problem(subject, (200_003,), weighted=True)
    found = []
    threads = torch.get_num_threads()
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        found.append(ops.reduce_fwd(loss, target, weight, -100, True, subject.backend))
    torch.set_num_threads(threads)
    if subject.backend == "eager":
        pytest.skip("the order of torch.sum is its own")
    assert all(
        torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True)
    )


def test_more_than_2_31_rows(subject):
    """The last counts, and one in the middle."""
    if subject.device != "cuda" or torch.cuda.mem_get_info()[0] < 60 << 30:
        pytest.skip("26 GB of losses and targets and 9 GB of gradient: only on a large GPU")
    rows, counted = 2**31 + 5, [2**30 + 3, 2**31 + 4]
    target = torch.full((rows,), -100, device="cuda")
    loss = torch.full((rows,), torch.nan, device="cuda")
    target[counted], loss[counted] = 1, torch.tensor([0.5, 2.0], device="cuda")
    outputs = ops.reduce_fwd(loss, target, None, -100, True, subject.backend)
    assert [output.item() for output in outputs] == [1.25, 2]
    dloss = ops.reduce_bwd(outputs[0], target, outputs[1], -100, subject.backend)
    assert dloss.nonzero().flatten().tolist() == counted and (dloss[counted] == 0.625).all()


@pytest.mark.parametrize("shape", [(7,), (2, 3)], ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weight"])
@pytest.mark.parametrize("mean", [True, False], ids=["mean", "sum"])
def test_opcheck(subject, mean, weighted, shape):
    pytest.importorskip("expecttest", reason="torch.library.opcheck imports expecttest")
    loss, target, weight = problem(subject, shape, weighted=weighted)
    loss = loss.nan_to_num().requires_grad_()
    arguments = (target, weight, -100, mean, subject.backend)
    torch.library.opcheck(ops.reduce_fwd.overload, (loss, *arguments))
    divisor = ops.reduce_fwd(loss, *arguments)[1]
    above = torch.tensor(3.0, device=subject.device, requires_grad=True)
    torch.library.opcheck(ops.reduce_bwd.overload, (above, target, divisor, -100, subject.backend))


@pytest.mark.float64
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weight"])
@pytest.mark.parametrize("mean", [True, False], ids=["mean", "sum"])
def test_first_and_second_derivative(subject, mean, weighted):
    loss, target, weight = problem(subject, (2, 3), torch.float64, weighted)
    loss = loss.nan_to_num().requires_grad_()

    def reduced(x):
        # squared, so that there is a second derivative
        return ops.reduce_fwd(x, target, weight, -100, mean, subject.backend)[0].square()

    assert gradcheck(reduced, loss)
    assert gradgradcheck(reduced, loss)


class Operators(TorchDispatchMode):
    """Names of the operators that reach a device, views and what looks at the targets left out."""

    LOOKS = ("aminmax", "_local_scalar_dense", "view", "detach")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, arguments=(), options=None):
        if op.overloadpacket.__name__ not in self.LOOKS:
            self.names.append(op.overloadpacket.__name__)
        return op(*arguments, **(options or {}))


@pytest.mark.interpreter
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weight"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "name, function",
    [
        ("topk_ce", lambda z, y, **options: fused_sparse_ce(z, y, 5, **options)),
        ("threshold_ce", lambda z, y, **options: fused_sparse_ce(z, y, None, **options)),
        ("threshold_ce", adaptive_sparse_ce),
    ],
    ids=["list", "dense", "adaptive"],
)
def test_a_call_is_two_operators_and_so_is_its_gradient(
    subject, name, function, reduction, weighted
):
    """Of a small problem the calls are the time, on a GPU of a larger one too."""
    logits = cases.logits("random", 7, CLASSES, torch.float32).to(subject.device).requires_grad_()
    weight = torch.rand(CLASSES, device=subject.device) if weighted else None
    target = torch.arange(7, device=subject.device)
    with Operators() as forward:
        loss = function(logits, target, weight=weight, reduction=reduction, backend=subject.backend)
    assert forward.names == [f"{name}_fwd", "reduce_fwd"]
    with Operators() as backward:
        loss.backward()
    assert backward.names == ["ones_like", "reduce_bwd", f"{name}_bwd"]


def test_linear_calls_as_few(subject):
    hidden, weight = (torch.randn(n, 8, device=subject.device) for n in (7, CLASSES))
    target = torch.arange(7, device=subject.device)
    weight.requires_grad_()
    with Operators() as forward:
        loss = fused_linear_sparse_ce(hidden, weight, target, 5, backend=subject.backend)
    names = [name for name in forward.names if name not in ("ne", "nonzero", "squeeze")]
    assert names == ["topk_linear_ce_fwd", "reduce_fwd"]
    with Operators() as backward:
        loss.backward()
    assert backward.names == ["ones_like", "reduce_bwd", "topk_linear_ce_bwd"]
