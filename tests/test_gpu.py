"""What only a GPU shows: graphs, streams, synchronisation, memory."""

from functools import partial

import cases
import pytest
import torch
from sparse_ce import (
    MonotonicPLIF,
    continuous_output_loss,
    fused_linear_sparse_ce,
    fused_sparse_ce,
)

KS = (20, None)
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")


@pytest.fixture(autouse=True)
def on_a_gpu(request):
    if request.getfixturevalue("subject").device != "cuda":
        pytest.skip("a test of GPUs")


@pytest.fixture
def synchronisation_is_an_error():
    """What torch itself waits for. Our kernels are launched and never asked for anything."""
    before = torch.cuda.get_sync_debug_mode()
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode(before)


class Step:
    """Forward and backward of one problem whose inputs are filled in place, as a graph needs it."""

    def __init__(self, subject, reduction="mean", weighted=False, support=False, k=20):
        self.logits = torch.empty(6, 1003, dtype=torch.bfloat16, device="cuda").requires_grad_()
        self.target = torch.empty(6, dtype=torch.int64, device="cuda")
        self.options = {
            "weight": torch.rand(1003, device="cuda") if weighted else None,
            "reduction": reduction,
            "return_support": support,
            "label_smoothing": 0.1,
            "backend": subject.backend,
        }
        self.k = k

    def fill(self, filler, target):
        with torch.no_grad():
            self.logits.copy_(cases.logits(filler, 6, 1003, torch.bfloat16))
        self.target.copy_(torch.tensor(target))

    def __call__(self):
        """The loss and the gradient."""
        result = fused_sparse_ce(self.logits, self.target, self.k, **self.options)
        loss = result
        if self.options["return_support"]:
            loss = result[0] + 1e-4 * result[1].lse.square().mean() + result[1].entropy().mean()
        (gradient,) = torch.autograd.grad(loss.sum(), self.logits)
        return loss.detach(), gradient


class LayerStep(Step):
    """The same through an output layer: the gradients are sums of rows, sorted by class."""

    def __init__(self, subject, k):
        super().__init__(subject, k=k)
        self.weight = torch.randn(1003, 64, device="cuda").bfloat16().requires_grad_()

    def __call__(self):
        """The loss and the gradients."""
        hidden = self.logits[:, :64].detach().requires_grad_()
        loss = fused_linear_sparse_ce(
            hidden, self.weight, self.target, self.k, label_smoothing=0.1,
            backward="auto" if self.k is None else "sparse", backend=self.options["backend"],
        )  # fmt: skip
        return loss.detach(), *torch.autograd.grad(loss, (hidden, self.weight))


class LinkStep(Step):
    """The same of a function of the logits, with its tables and the gradient of its slopes."""

    def __init__(self, subject, k):
        super().__init__(subject, weighted=True, k=k)
        self.link = MonotonicPLIF(5001, 3.0, init_std=1.0).cuda()

    def __call__(self):
        """The loss and the gradients."""
        options = {**self.options, "link": self.link}
        loss = fused_sparse_ce(self.logits, self.target, self.k, **options)
        return loss.detach(), *torch.autograd.grad(loss, (self.logits, self.link.w))


class TailStep(Step):
    """The dense loss with a sparse gradient, whose draws are the same at every call."""

    def __init__(self, subject, samples):
        super().__init__(subject, weighted=True)
        self.options |= {"normalizer": "full", "tail_samples": samples}
        self.samples = samples

    def __call__(self):
        if self.samples:
            torch.cuda.manual_seed(1)
        return super().__call__()


FIRST, SECOND = ("random", [3, 36, -100, 0, 7, 1]), ("ties", [-100, -100, 5, 1002, -100, 9])
NONE_COUNTED = ("random", [-100] * 6)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weight"])
@pytest.mark.parametrize("support, k", [(False, 20), (True, 20), (False, None)])
def test_cuda_graph(subject, reduction, weighted, support, k):
    """A captured step gives on new logits and targets, bit by bit, what the step itself gives."""
    step = Step(subject, reduction, weighted, support, k)
    assert_captured(step)


@pytest.mark.parametrize("k", [20, None])
def test_cuda_graph_of_a_layer(subject, k):
    assert_captured(LayerStep(subject, k=k))


@pytest.mark.parametrize("k", [20, None])
def test_cuda_graph_of_a_function_of_the_logits(subject, k):
    assert_captured(LinkStep(subject, k))


def test_cuda_graph_of_the_dense_loss_with_a_sparse_gradient(subject):
    # without draws: those of a replay go on with the generator
    assert_captured(TailStep(subject, 0))


def assert_captured(step):
    step.fill(*FIRST)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles and tunes
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for inputs in (FIRST, SECOND, NONE_COUNTED, FIRST):
        step.fill(*inputs)
        expected = step()
        graph.replay()
        for ours, theirs in zip(captured, expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "make",
    [
        *(partial(Step, reduction=how, weighted=True, k=k) for how in ("none", "mean") for k in KS),
        *(partial(LinkStep, k=k) for k in KS),
        partial(TailStep, samples=8),
    ],
    ids=["none", "none dense", "mean", "mean dense", "link", "link dense", "tail"],
)
def test_no_host_synchronisation(subject, make, synchronisation_is_an_error):
    step = make(subject)
    step.fill(*FIRST)
    expected = step()  # compiles and tunes
    synchronisation_is_an_error()
    found = step()
    torch.cuda.set_sync_debug_mode("default")
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_the_current_stream_is_used(subject):
    """Kernels on another stream would run while this one still sleeps, on the old logits."""
    step = Step(subject)
    step.fill(*SECOND)
    expected = step()
    step.fill(*FIRST)
    step()
    new = cases.logits(SECOND[0], 6, 1003, torch.bfloat16).cuda()
    target = torch.tensor(SECOND[1], device="cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():
        torch.cuda._sleep(100_000_000)
        step.logits.copy_(new)
        step.target.copy_(target)
        with torch.enable_grad():
            found = step()
    stream.synchronize()
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype_of_logits", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("k", [20, None])
def test_memory(subject, dtype_of_logits, k):
    """Forward saves O(N k); backward adds the gradient, and nothing else of its size."""
    if subject.backend == "eager":
        pytest.skip("tensor operations make no such promise")
    rows, classes = 4096, 32000
    logits = torch.randn(rows, classes, device="cuda").to(dtype_of_logits).requires_grad_()
    target = torch.randint(classes, (rows,), device="cuda")

    def loss():
        return fused_sparse_ce(logits, target, k, backend=subject.backend)

    torch.autograd.grad(loss(), logits)  # compiles and tunes
    # indices and probabilities, a few numbers per row, and what the allocator rounds up
    small = 2 * rows * (k or 0) * 8 + 16 * rows * 8 + (4 << 20)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = loss()
    assert torch.cuda.max_memory_allocated() - before <= small
    gradient = torch.autograd.grad(found, logits)
    assert torch.cuda.max_memory_allocated() - before <= logits.nbytes + small
    assert gradient[0].shape == logits.shape


def test_continuous_outputs_in_a_cuda_graph(subject, synchronisation_is_an_error):
    """No host synchronisation; new outputs and targets, ignored ones too, give the same bits."""
    table = torch.randn(1003, 300, device="cuda")
    output = torch.empty(6, 300, dtype=torch.bfloat16, device="cuda").requires_grad_()
    target = torch.empty(6, dtype=torch.int64, device="cuda")

    def step():
        loss = continuous_output_loss(output, target, table, backend=subject.backend)
        return loss.detach(), *torch.autograd.grad(loss, output)

    def fill(y):
        with torch.no_grad():
            output.normal_()
        target.copy_(torch.tensor(y))

    fill(FIRST[1])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    synchronisation_is_an_error()
    step()
    torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for y in (FIRST[1], SECOND[1], NONE_COUNTED[1]):
        fill(y)
        expected = step()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
