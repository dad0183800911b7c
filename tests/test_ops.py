"""The operators as torch sees them: registration, derivatives, crossed backends, compilation."""

import contextlib
import itertools
from dataclasses import replace

import allocations
import cases
import pytest
import subjects
import torch
from sparse_ce import (
    adaptive_sparse_ce,
    fused_linear_sparse_ce,
    fused_sparse_ce,
    ops,
    sparse_softmax,
)
from stems import STEMS, Call
from torch.autograd import gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import BaseTorchFunctionMode, TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


def example(subject, shape=(3,), k=4, smoothing=0.1, weighted=True, dtype=torch.float32):
    torch.manual_seed(0)
    logits = torch.randn(*shape, 11, dtype=dtype)
    target = torch.randint(0, 11, shape)
    weight = torch.rand(11, dtype=dtype) if weighted else None
    return Call(logits, target, k, weight, smoothing).to(subject.device)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "forward, backward", list(itertools.permutations(subjects.SUBJECTS, 2)), ids=str
)
@pytest.mark.parametrize("stem", STEMS, ids=str)
def test_backward_of_another_backend(forward, backward, stem):
    """What forward returns is all that any backward needs."""
    if forward.device != backward.device:
        pytest.skip("saved tensors do not change their device")
    for filler, dtype in itertools.product(
        ("random", "ties", "one_nan"), (torch.float32, torch.bfloat16)
    ):
        logits = cases.logits(filler, 9, 203, dtype)
        call = Call(logits, cases.targets(logits, 20), 20, label_smoothing=0.1)
        there = call.to(forward.device)
        outputs = stem.forward(there, forward.backend)
        above = stem.above(there, "abq")
        call.truth().assert_gradient(stem.backward(there, outputs, above, backward.backend), *above)


@pytest.fixture
def opcheck_imports():
    pytest.importorskip("expecttest", reason="torch.library.opcheck imports expecttest")


@pytest.mark.parametrize(
    "shape, layout, smoothing, weighted, which",
    [
        ((3,), "contiguous", 0.0, False, "a"),
        ((2, 3), "transposed", 0.1, True, "abq"),
        ((1,), "expanded", 0.1, False, "b"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.usefixtures("opcheck_imports")
def test_opcheck(subject, stem, shape, layout, smoothing, weighted, which):
    call = example(subject, shape, smoothing=smoothing, weighted=weighted)
    logits = {
        "contiguous": call.logits,
        "transposed": call.logits.movedim(0, -2).contiguous().movedim(-2, 0),
        "expanded": call.logits[:1].expand(call.logits.shape),
    }[layout]
    call = replace(call, logits=logits.detach().requires_grad_())
    torch.library.opcheck(stem.fwd.overload, (*stem.forward_arguments(call), subject.backend))
    outputs = [output.detach() for output in stem.forward(call, subject.backend)]
    above = [d if d is None else d.requires_grad_() for d in stem.above(call, which)]
    torch.library.opcheck(
        stem.bwd.overload, (*stem.backward_arguments(call, outputs, above), subject.backend)
    )


@pytest.mark.usefixtures("opcheck_imports")
def test_opcheck_of_the_compiled_operators(subject):
    """sparse_ce_native has no fake and no derivative: what it must keep is its schema."""
    if subjects.ROWS[subject.backend].modules != ("sparse_ce.native",):
        pytest.skip("it is not compiled")
    for stem in (stem for stem in STEMS if subject.defines(stem.name)):
        call = example(subject)
        outputs = stem.forward(call, subject.backend)
        backward = stem.backward_arguments(call, outputs, stem.above(call, "abq"))
        for direction, arguments in (("fwd", stem.forward_arguments(call)), ("bwd", backward)):
            native = getattr(torch.ops.sparse_ce_native, f"{stem.name}_{direction}").default
            torch.library.opcheck(native, arguments, test_utils="test_schema")


class Hearing:
    def __init__(self):
        super().__init__()
        self.heard = []

    def hear(self, function, types, args=(), kwargs=None):
        self.heard.append(str(function))
        return function(*args, **(kwargs or {}))


class DispatchMode(Hearing, TorchDispatchMode):
    __torch_dispatch__ = Hearing.hear


class FunctionMode(Hearing, TorchFunctionMode):
    __torch_function__ = Hearing.hear


class Wrapper(torch.Tensor):
    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner, self.heard = inner, []

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        args[0].heard.append(str(function))
        return function(args[0].inner, *args[1:], **(kwargs or {}))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_whoever_listens_hears_the_operators(subject):
    """Not the short way past the dispatcher: modes, subclasses of tensors, traces, profilers."""
    call = example(subject)
    logits, target = call.logits.requires_grad_(), call.target

    def step():
        fused_sparse_ce(logits, target, 4, backend=subject.backend).backward()

    forward = {f"sparse_ce.{op}.default" for op in ("topk_ce_fwd", "reduce_fwd")}
    backward = {f"sparse_ce.{op}.default" for op in ("topk_ce_bwd", "reduce_bwd")}
    # a function mode is of its thread, and backward has another on a GPU
    for mode, expected in ((DispatchMode(), forward | backward), (FunctionMode(), forward)):
        with mode:
            step()
        assert expected <= set(mode.heard)
    with torch.profiler.profile() as profile:
        step()
    names = {event.key for event in profile.key_averages()}
    assert {op.replace(".", "::", 1).removesuffix(".default") for op in forward | backward} <= names
    if subject.device == "cpu":
        wrapped = Wrapper(logits.detach())
        fused_sparse_ce(wrapped, target, 4, backend=subject.backend)
        assert "sparse_ce.topk_ce_fwd.default" in wrapped.heard
    trace = torch.jit.trace(
        lambda z: fused_sparse_ce(z, target, 4, backend=subject.backend),
        (logits.detach(),),
        check_trace=False,
    )
    assert {node.kind() for node in trace.graph.nodes()} >= {
        "sparse_ce::topk_ce_fwd",
        "sparse_ce::reduce_fwd",
    }


LOSSES = {
    "k=4": lambda z, y, w, **more: fused_sparse_ce(z, y, 4, reduction="sum", **more),
    "k=4, weight": lambda z, y, w, **more: fused_sparse_ce(z, y, 4, weight=w, **more),
    "dense": lambda z, y, w, **more: fused_sparse_ce(z, y, None, label_smoothing=0.1, **more),
    "dense, weight": lambda z, y, w, **more: fused_sparse_ce(z, y, None, weight=w, **more),
    "adaptive": lambda z, y, w, **more: adaptive_sparse_ce(z, y, 0.05, weight=w, **more),
}


@pytest.mark.parametrize("listed", [False, True], ids=["", "return_support"])
@pytest.mark.parametrize("loss", LOSSES)
def test_nobody_listens(subject, monkeypatch, loss, listed):
    """The short way, to the same numbers and the same derivatives of any order."""
    if subject.backend == "eager":
        pytest.skip("it runs on devices that may listen themselves")
    call = example(subject, (2, 3))
    logits, target = call.logits.requires_grad_(), call.target
    target[0, 1] = -100

    def step():
        more = {"return_support": listed, "backend": subject.backend}
        found = LOSSES[loss](logits, target, call.weight, **more)
        value, support = found if listed else (found, ())
        tensors = [part for part in support if isinstance(part, torch.Tensor)]
        # lse, and the probabilities of a list
        parts = [(part * part.detach().sin()).sum() for part in tensors if part.requires_grad]
        assert len(parts) == (0 if not listed else 1 if loss == "adaptive" else 2)
        return sum(parts, -1.5 * value), value, *tensors

    def derivatives():
        total, *values = step()
        (first,) = torch.autograd.grad(total, logits, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), logits)
        return *values, first, second

    with DispatchMode():
        expected = derivatives()

    def refuse(*_):
        raise AssertionError("the dispatcher was called")

    forward = ops.topk_ce_fwd, ops.threshold_ce_fwd, ops.reduce_fwd
    backward = ops.topk_ce_bwd, ops.threshold_ce_bwd, ops.reduce_bwd
    # a node in C++ has the dispatcher call a backward that is recorded itself, and no other
    compiled = subjects.ROWS[subject.backend].modules == ("sparse_ce.native",)
    for op in forward if compiled else (*forward, *backward):
        monkeypatch.setattr(op, "overload", refuse)
    for ours, theirs in zip(derivatives(), expected, strict=True):
        assert torch.equal(ours, theirs)
    for op in backward:
        monkeypatch.setattr(op, "overload", refuse)
    (gradient,) = torch.autograd.grad(step()[0], logits)
    assert torch.equal(gradient, expected[-2])


@pytest.mark.parametrize("k", [4, None])
def test_one_node(subject, k):
    """Of a compiled backend the loss and its reduction are one node of the graph."""
    if subjects.ROWS[subject.backend].modules != ("sparse_ce.native",):
        pytest.skip("it is not compiled")
    call = example(subject)
    found = {}

    def forward():
        found["loss"] = fused_sparse_ce(
            call.logits.requires_grad_(), call.target, k, backend=subject.backend
        )

    saved = {tuple(tensor.shape) for tensor in allocations.saved(forward)}
    # the divisor of the mean, the target or a statistic, and the list or the logits
    assert saved == {(), (3,), (3, 4) if k else (3, 11)}
    following = [node for node, _ in found["loss"].grad_fn.next_functions if node is not None]
    assert [type(node).__name__ for node in following] == ["AccumulateGrad"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("loss", [*LOSSES, "linear"])
def test_compiled_autograd(subject, loss):
    """torch.compile of the backward pass, as of a hook of DDP."""
    call = example(subject, (6,))
    weight = torch.randn(11, 5, device=subject.device)
    x = torch.randn(6, 5, device=subject.device, requires_grad=True)

    def gradient(run):
        if loss == "linear":
            value = fused_linear_sparse_ce(x, weight, call.target, 4, backend=subject.backend)
        else:
            logits = x @ weight.T
            value = LOSSES[loss](logits, call.target, call.weight, backend=subject.backend)
        return run(value)

    def compiled(value):
        x.grad = None
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
            value.backward()
        return x.grad

    expected = gradient(lambda value: torch.autograd.grad(value, x)[0])
    assert torch.equal(gradient(compiled), expected)


def distinct(*shape, device):
    """Logits a tenth apart: no step of finite differences changes the support."""
    torch.manual_seed(0)
    count = torch.Size(shape).numel()
    return (torch.randperm(count).double() / 10).view(shape).to(device).requires_grad_()


@pytest.mark.float64
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weight"])
@pytest.mark.parametrize("k", [1, 4, 7])
def test_first_and_second_derivative_of_every_output(subject, stem, k, weighted, smoothing):
    logits = distinct(4, 7, device=subject.device)
    target = torch.tensor([0, 3, 6, -1], device=subject.device)
    weight = torch.rand(7, device=subject.device).double() if weighted else None

    def outputs(z):
        found = stem.forward(Call(z, target, k, weight, smoothing), subject.backend)
        # the last row has no target: of its loss, NaN, there is no derivative
        return (found[0][:-1], found[1], *(found[3:] if stem.lists else ()))

    assert gradcheck(outputs, logits)
    assert gradgradcheck(outputs, logits)


@pytest.mark.float64
@pytest.mark.parametrize("k", [1, 3, None])
@pytest.mark.parametrize("listed", [False, True], ids=["", "return_support"])
def test_first_and_second_derivative_of_the_function(subject, k, listed):
    logits = distinct(2, 3, 5, device=subject.device)
    target = torch.tensor([[0, 4, -100], [2, 2, 1]], device=subject.device)

    def function(z):
        result = fused_sparse_ce(z, target, k, return_support=listed, backend=subject.backend)
        if not listed:
            return result
        loss, support = result
        return loss, support.lse, support.probs, support.entropy()

    assert gradcheck(function, logits)
    assert gradgradcheck(function, logits)


@pytest.mark.float64
@pytest.mark.parametrize("dim", [0, 1, 2, -1, -3])
def test_first_and_second_derivative_of_sparse_softmax(subject, dim):
    logits = distinct(3, 4, 5, device=subject.device)
    assert gradcheck(lambda z: sparse_softmax(z, 2, dim, backend=subject.backend), logits)
    assert gradgradcheck(lambda z: sparse_softmax(z, 2, dim, backend=subject.backend), logits)


def loss_and_gradient(function, logits, *arguments):
    logits = logits.detach().requires_grad_()
    loss = function(logits, *arguments)
    (gradient,) = torch.autograd.grad(
        loss, logits, torch.linspace(0.5, 1, loss.numel(), device=loss.device).view(loss.shape)
    )
    return loss.detach(), gradient


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("k", [5, None])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_compiled_equals_eager(subject, compiler, k, reduction):
    """No graph break, with ignore_index too; the kernels are the same, so are the bits."""

    def function(z, y):
        return fused_sparse_ce(
            z, y, k, label_smoothing=0.1, reduction=reduction, backend=subject.backend
        )

    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    logits = cases.logits("random", 9, 37, torch.bfloat16).to(subject.device)
    # eight count: on a GPU the compiler divides by another number with an error of its own
    target = torch.tensor([3, 36, -100, 0, 7, 1, 5, 9, 2], device=subject.device)
    expected_loss, expected_gradient = loss_and_gradient(function, logits, target)
    loss, gradient = loss_and_gradient(compiled, logits, target)
    assert torch.equal(gradient, expected_gradient)
    # inductor may add the eight losses in another order: seven roundings of half an ulp a side
    order = 0 if reduction == "none" else 7 * torch.finfo(torch.float32).eps
    assert torch.allclose(loss, expected_loss, rtol=order, atol=0)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_once_for_all_shapes_and_k(subject):
    """A schedule that changes k, and batches of any size, cost one compilation per regime."""
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def function(z, y, k):
        return fused_sparse_ce(z, y, k, reduction="none", backend=subject.backend)

    counted = torch.compile(function, fullgraph=True, dynamic=True, backend=counting)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, classes, k in [(6, 37, 5), (3, 41, 7), (8, 50, 20), (9, 64, 63)]:
        logits = cases.logits("random", rows, classes, torch.float32).to(subject.device)
        target = torch.arange(rows, device=subject.device)
        counted(logits, target, k)
        expected = loss_and_gradient(function, logits, target, k)
        for ours, theirs in zip(
            loss_and_gradient(compiled, logits, target, k), expected, strict=True
        ):
            assert torch.equal(ours, theirs)
    assert len(graphs) == 1


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_with_support_and_sparse_softmax(subject):
    def function(z, y):
        loss, support = fused_sparse_ce(z, y, 5, return_support=True, backend=subject.backend)
        z_loss = support.lse.square().mean() + support.entropy().mean()
        return loss + z_loss + sparse_softmax(z, 3, backend=subject.backend).square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    logits = cases.logits("random", 6, 37, torch.float32).to(subject.device)
    target = torch.arange(6, device=subject.device)
    expected = loss_and_gradient(function, logits, target)
    for ours, theirs in zip(loss_and_gradient(compiled, logits, target), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("k", [5, None])
def test_compiled_target_out_of_range(subject, k):
    """SPEC 7: a compiled graph does not look; the loss of that row is NaN, its gradient 0."""
    compiled = torch.compile(
        lambda z, y: fused_sparse_ce(z, y, k, reduction="none", backend=subject.backend),
        fullgraph=True,
        backend="aot_eager",
    )
    logits = cases.logits("random", 3, 37, torch.float32).to(subject.device)
    target = torch.tensor([3, 37, -1], device=subject.device)
    loss, gradient = loss_and_gradient(compiled, logits, target)
    assert loss.isnan().tolist() == [False, True, True]
    assert (gradient[1:] == 0).all() and (gradient[0] != 0).any()


LISTENERS = {
    "profiler": lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
    "mode": BaseTorchFunctionMode,
}


@pytest.mark.parametrize("k", [5, None])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("of_forward", [False, True])
@pytest.mark.parametrize("listener", LISTENERS)
def test_checkpoint_with_a_listener_to_one_pass(subject, listener, of_forward, weighted, k):
    """The node in C++ saves what those in Python do, which the other pass may take."""
    logits = cases.logits("random", 9, 37, torch.float32).to(subject.device).requires_grad_()
    target = torch.arange(9, device=subject.device)
    weight = torch.arange(1.0, 38.0, device=subject.device) if weighted else None

    def function(z):
        return fused_sparse_ce(z, target, k, weight=weight, backend=subject.backend)

    (expected,) = torch.autograd.grad(function(logits), logits)
    with LISTENERS[listener]() if of_forward else contextlib.nullcontext():
        loss = torch.utils.checkpoint.checkpoint(function, logits, use_reentrant=False)
    with contextlib.nullcontext() if of_forward else LISTENERS[listener]():
        (found,) = torch.autograd.grad(loss, logits)
    assert torch.equal(found, expected)


FORMS = {
    "k": lambda z, w, y, **o: fused_sparse_ce(z, y, 5, **o),
    "dense": lambda z, w, y, **o: fused_sparse_ce(z, y, None, **o),
    "none": lambda z, w, y, **o: fused_sparse_ce(z, y, 5, reduction="none", **o),
    "full": lambda z, w, y, **o: fused_sparse_ce(z, y, 5, normalizer="full", tail_samples=3, **o),
    "linear": lambda z, w, y, **o: fused_linear_sparse_ce(z, w, y, 5, **o),
    "row_sparse": lambda z, w, y, **o: fused_linear_sparse_ce(
        z, w, y, 5, weight_grad="row_sparse", **o
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_gradients_asked_for_in_inference_mode(subject, form):
    """As of F.cross_entropy nothing is recorded, though the gradient mode is on."""
    z = torch.randn(4, 40, device=subject.device, requires_grad=True)
    w = torch.randn(30, 40, device=subject.device, requires_grad=True)
    y = torch.arange(4, device=subject.device)
    function = FORMS[form]
    torch.manual_seed(0)
    expected = function(z, w, y, backend=subject.backend).detach()
    torch.manual_seed(0)
    with torch.inference_mode(), torch.enable_grad():
        found = function(z, w, y, backend=subject.backend)
    assert torch.equal(found, expected) and not found.requires_grad


# of "full" a graph draws numbers of its own
@pytest.mark.parametrize("form", ["k", "dense", "none", "linear"])
def test_graphs_of_make_fx(subject, form):
    """No look at numbers that are being traced: the graph serves other inputs."""
    z, other = (torch.randn(4, 40, device=subject.device) for _ in range(2))
    w = torch.randn(30, 40, device=subject.device)
    y = torch.arange(4, device=subject.device)

    def function(z, y):
        z = z.requires_grad_()
        loss = FORMS[form](z, w, y, backend=subject.backend)
        return loss, torch.autograd.grad(loss.sum(), z)[0]

    graph = make_fx(function)(z, y)
    assert any("sparse_ce" in str(node.target) for node in graph.graph.nodes)
    y = y.flip(0)
    for ours, theirs in zip(graph(other.clone(), y), function(other.clone(), y), strict=True):
        assert torch.equal(ours, theirs)
