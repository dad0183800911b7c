"""continuous_output_loss, the operators of cosine, and ContinuousOutputHead. SPEC 5."""

import itertools
import math

import pytest
import subjects
import torch
import torch.nn.functional as F
from closeness import DistanceTruth
from sparse_ce import (
    ContinuousOutputHead,
    backends,
    continuous,
    continuous_output_loss,
    ops,
    reference,
)
from test_linear import sizes_of_allocations
from torch.autograd import gradcheck, gradgradcheck

DISTANCES = ("cosine", "l2")
VECTORS = 37
TABLE_DTYPES = {torch.float64: [torch.float64]}
EPS = torch.finfo(torch.float32).eps


def table(width, dtype=torch.float32):
    torch.manual_seed(1)
    vectors = torch.randn(VECTORS, width).to(dtype)
    vectors[5] = 0
    return vectors


def problem(rows, width, dtype, embedding):
    """Norms of 1/64 to 64; along, against and away from the target; zeros on either side."""
    torch.manual_seed(0)
    target = torch.randint(6, VECTORS, (rows,))
    output = torch.randn(rows, width) * 2.0 ** torch.randint(-6, 7, (rows, 1))
    output[0] = 3 * embedding[target[0]]
    output[1] = -embedding[target[1]] / 3
    output[2] = 0
    target[3] = 5
    return output.to(dtype), target


def check(subject, output, target, embedding, distance):
    """Forward and backward against the truth; shapes, dtypes and strides as the schema promises."""
    truth = DistanceTruth(output, target, embedding, distance)
    there = [t.to(subject.device) for t in (output, target, embedding)]
    found = ops.cosine_fwd(*there, distance == "cosine", subject.backend)
    wide = torch.float64 if output.dtype == torch.float64 else torch.float32
    assert [(t.dtype, t.shape) for t in found] == [(wide, target.shape)] * 3
    truth.assert_loss(found[0])
    torch.manual_seed(2)
    dloss = torch.randn(target.shape, dtype=wide)
    dloss.view(-1)[-1] = 0
    doutput = ops.cosine_bwd(dloss.to(subject.device), *there, *found[1:], subject.backend)
    assert all(t.is_contiguous() for t in (*found, doutput))
    truth.assert_gradient(doutput, dloss)


@pytest.mark.interpreter
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("width", [1, 2, 33, 128, 300, 1100])
@pytest.mark.parametrize("distance", DISTANCES)
def test_values(subject, dtype, width, distance):
    if not subject.defines("cosine"):
        pytest.skip("it has no kernels of its own for this")
    others = [dtype] if subjects.INTERPRETING and width not in (33, 300) else subject.dtypes
    for other in TABLE_DTYPES.get(dtype, [t for t in others if t != torch.float64]):
        embedding = table(width, other)
        few = subjects.EMULATING or width > 1000
        rows = 6 if subjects.INTERPRETING else 9 if few else 41
        check(subject, *problem(rows, width, dtype, embedding), embedding, distance)


@pytest.mark.interpreter
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("y", [-1, -100, VECTORS, 2**31, 2**32 + 7, -(2**63), 2**63 - 1])
def test_target_out_of_range_is_no_hit(subject, y):
    embedding = table(33)
    output, target = problem(6, 33, torch.float32, embedding)
    target[0] = y
    for distance in DISTANCES:
        check(subject, output, target, embedding, distance)


LAYOUTS = {
    "three dimensions": lambda t: t,
    "next token": lambda t: torch.cat([t, t[:, :1]], 1)[:, :-1],
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "every second row": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "expanded": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("distance", DISTANCES)
def test_layouts_are_read_in_place(subject, layout, distance):
    embedding = table(36)
    output, target = problem(6, 36, torch.float32, embedding)
    output = LAYOUTS[layout](output.view(2, 3, 36))
    wide = torch.cat([embedding, torch.full((VECTORS, 5), torch.nan)], 1)[:, :36]
    check(subject, output, target.view(2, 3), wide, distance)


@pytest.mark.interpreter
def test_strides_that_operators_do_not_take(subject):
    """Of the output one copy; of the table the rows of the batch alone."""
    embedding = table(7).t().contiguous().t()
    output = torch.randn(2, 7, 3).transpose(1, 2)
    target = torch.tensor([[0, 7, 36], [5, -100, 8]], dtype=torch.int32)
    expected = reference.continuous_output(output.reshape(6, 7), target.flatten(), embedding)
    there = [t.to(subject.device) for t in (output, target, embedding)]
    loss = continuous_output_loss(*there, backend=subject.backend)
    assert abs(loss.item() - expected.item()) <= 20 * EPS
    scalar = continuous_output_loss(there[0][0, 0], there[1][0, 0], there[2], reduction="none")
    assert scalar.shape == ()


@pytest.mark.interpreter
@pytest.mark.parametrize("distance", DISTANCES)
def test_strided_upstream_gradients(subject, distance):
    embedding = table(33)
    output, target = problem(6, 33, torch.float32, embedding)
    truth = DistanceTruth(output, target, embedding, distance)
    there = [t.to(subject.device) for t in (output, target, embedding)]
    found = ops.cosine_fwd(*there, distance == "cosine", subject.backend)
    for dloss in (torch.tensor(0.3).expand(6), torch.randn(6, 2)[:, 0]):
        above = dloss.to(subject.device)
        doutput = ops.cosine_bwd(above, *there, *found[1:], subject.backend)
        truth.assert_gradient(doutput, dloss)


@pytest.mark.interpreter
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignore_index", [-100, 0, 2**40])
def test_function_against_the_reference(subject, distance, reduction, ignore_index):
    """With ignored rows of NaN: SPEC 7. Their gradient is exactly 0."""
    embedding = table(33)
    output, target = problem(6, 33, torch.float32, embedding)
    target[4:] = ignore_index
    options = {"ignore_index": ignore_index, "reduction": reduction}
    expected = reference.continuous_output(output, target, embedding, distance, **options)
    output[4:] = torch.nan
    leaf = output.to(subject.device).requires_grad_()
    loss = continuous_output_loss(
        leaf, target.to(subject.device), embedding.to(subject.device), distance,
        backend=subject.backend, **options,
    )  # fmt: skip
    truth = DistanceTruth(output, target, embedding, distance)
    # the tolerance of the largest row, and three roundings of a sum of four
    tolerance = (truth.loss_tolerance[:4] + 2 * EPS * truth.loss[:4]).sum()
    assert ((loss.cpu().double() - expected).abs() <= tolerance).all()
    above = torch.rand(expected.shape)
    loss.backward(above.to(loss))
    dloss = (above / (4 if reduction == "mean" else 1)).expand(6).clone()
    dloss[4:] = 0
    truth.assert_gradient(leaf.grad, dloss)


def test_the_losses_of_pytorch(subject):
    embedding = table(300)[6:]
    output, target = torch.randn(9, 300), torch.randint(31, (9,))
    there = [t.to(subject.device) for t in (output, target, embedding)]
    e = embedding[target]
    cosine = continuous_output_loss(*there, backend=subject.backend)
    torch.testing.assert_close(
        cosine.cpu(), F.cosine_embedding_loss(output, e, torch.ones(9)), rtol=0, atol=16 * EPS
    )
    l2 = continuous_output_loss(*there, "l2", backend=subject.backend)
    torch.testing.assert_close(l2.cpu(), F.mse_loss(output, e) * 300 / 2, rtol=16 * EPS, atol=0)


def test_the_formula_of_the_paper(subject):
    """-cos with gradient -(e/|e| - cos c/|c|) / |c|: orthogonal to c, as 1/|c|, without |e|."""
    embedding = table(300, torch.float64)[6:]
    output = torch.randn(9, 300, dtype=torch.float64)
    y = torch.randint(31, (9,))

    def loss_and_gradient(c, vectors):
        c = c.float().to(subject.device).requires_grad_()
        there = (y.to(subject.device), vectors.float().to(subject.device))
        loss = continuous_output_loss(c, *there, reduction="none", backend=subject.backend)
        loss.sum().backward()
        return loss.detach().double().cpu(), c.grad.double().cpu()

    loss, gradient = loss_and_gradient(output, embedding)
    e, norm = embedding[y], output.norm(dim=-1, keepdim=True)
    cos = (output * e).sum(-1, keepdim=True) / (norm * e.norm(dim=-1, keepdim=True))
    tolerance = {"rtol": 0, "atol": 20 * EPS}
    torch.testing.assert_close(loss - 1, -cos.squeeze(-1), **tolerance)
    expected = -(e / e.norm(dim=-1, keepdim=True) - cos * output / norm) / norm
    torch.testing.assert_close(gradient, expected, **tolerance)
    assert ((gradient * output).sum(-1).abs() <= 20 * EPS).all()
    _, longer = loss_and_gradient(output * 8, embedding)
    torch.testing.assert_close(longer * 8, gradient, rtol=0, atol=0)
    assert torch.equal(loss_and_gradient(output, embedding * 4)[0], loss)


@pytest.mark.interpreter
@pytest.mark.parametrize("zero", ["output", "embedding", "both"])
def test_a_vector_of_zeros_has_no_direction(subject, zero):
    """Loss 1, gradient 0; of l2 there is nothing special about it."""
    output, embedding = torch.randn(2, 9), torch.randn(3, 9)
    if zero != "embedding":
        output[0] = 0
    if zero != "output":
        embedding[1] = 0
    target = torch.tensor([1, 2])
    there = [t.to(subject.device) for t in (output, target, embedding)]
    there[0].requires_grad_()
    loss = continuous_output_loss(*there, reduction="none", backend=subject.backend)
    loss.sum().backward()
    assert loss[0] == 1 and (there[0].grad[0] == 0).all() and (there[0].grad[1] != 0).any()
    for distance in DISTANCES:
        check(subject, output, target, embedding, distance)


@pytest.mark.interpreter
@pytest.mark.parametrize("norm", [1e-25, 1e-18, 1e18, 1e25])
@pytest.mark.parametrize("which", ["output", "embedding"])
def test_norms_out_of_range(subject, norm, which):
    """Squares have the range: below it there is no direction, beyond it NaN; never a wrong loss."""
    vectors = {"output": torch.ones(1, 4) / 2, "embedding": torch.tensor([[0.5, 0.5, 0.5, -0.5]])}
    vectors[which] = vectors[which] * norm
    output, embedding = (vectors[name].to(subject.device) for name in ("output", "embedding"))
    output.requires_grad_()
    target = torch.zeros(1, dtype=torch.int64, device=subject.device)
    loss = continuous_output_loss(output, target, embedding, backend=subject.backend)
    loss.backward()
    if norm == 1e25:
        assert loss.isnan()
    elif norm == 1e-25:
        assert loss == 1 and (output.grad == 0).all()
    else:
        assert abs(loss.item() - 0.5) <= 8 * EPS and (output.grad != 0).all()


@pytest.mark.interpreter
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_seen(subject, value):
    output, embedding = torch.randn(2, 9), torch.randn(3, 9)
    output[0, 4] = value
    there = [t.to(subject.device) for t in (output, torch.tensor([1, 2]), embedding)]
    for distance in DISTANCES:
        loss = continuous_output_loss(*there, distance, reduction="none", backend=subject.backend)
        assert not loss[0].isfinite() and loss[1].isfinite()
        assert loss[0].isnan() or distance == "l2"


@pytest.mark.interpreter
@pytest.mark.parametrize("rows", [0, 4])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_counted(subject, rows, reduction):
    output = torch.full((rows, 9), torch.nan, device=subject.device, requires_grad=True)
    target = torch.full((rows,), -100, device=subject.device)
    loss = continuous_output_loss(
        output, target, torch.randn(3, 9, device=subject.device), reduction=reduction,
        backend=subject.backend,
    )  # fmt: skip
    assert (loss == 0).all() and loss.shape == ((rows,) if reduction == "none" else ())
    loss.sum().backward()
    assert (output.grad == 0).all()


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "forward, backward", list(itertools.permutations(subjects.SUBJECTS, 2)), ids=str
)
def test_backward_of_another_backend(forward, backward):
    if forward.device != backward.device:
        pytest.skip("saved tensors do not change their device")
    embedding = table(33)
    for dtype, distance in itertools.product((torch.float32, torch.bfloat16), DISTANCES):
        output, target = problem(6, 33, dtype, embedding)
        truth = DistanceTruth(output, target, embedding, distance)
        there = [t.to(forward.device) for t in (output, target, embedding)]
        found = ops.cosine_fwd(*there, distance == "cosine", forward.backend)
        dloss = torch.randn(6)
        above = dloss.to(forward.device)
        doutput = ops.cosine_bwd(above, *there, *found[1:], backward.backend)
        truth.assert_gradient(doutput, dloss)


@pytest.mark.float64
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_first_and_second_derivative(subject, distance, reduction):
    embedding = table(5, torch.float64).to(subject.device)
    target = torch.tensor([[0, 7, -100], [36, 9, 7]], device=subject.device)
    output = torch.randn(2, 3, 5, dtype=torch.float64, device=subject.device, requires_grad=True)

    def loss(c):
        return continuous_output_loss(
            c, target, embedding, distance, reduction=reduction, backend=subject.backend
        )

    assert gradcheck(loss, output)
    assert gradgradcheck(loss, output)


@pytest.mark.float64
def test_derivatives_of_the_coefficients(subject):
    """All outputs of the operator are differentiable, at any order, one without the others."""
    embedding = table(4, torch.float64).to(subject.device)
    target = torch.tensor([0, 7], device=subject.device)
    output = torch.randn(2, 4, dtype=torch.float64, device=subject.device, requires_grad=True)
    for which in ([0, 1, 2], [1], [2]):

        def outputs(c, which=which):
            found = ops.cosine_fwd(c, target, embedding, True, subject.backend)
            return [found[i] for i in which]

        assert gradcheck(outputs, output)
        assert gradgradcheck(outputs, output)

    def third(c):
        loss = outputs(c, [0])[0].sum()
        (gradient,) = torch.autograd.grad(loss, c, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), c, create_graph=True)[0]

    assert gradcheck(third, output)


def test_second_derivative_without_a_direction_is_zero(subject):
    output = torch.zeros(2, 4, device=subject.device, requires_grad=True)
    target = torch.tensor([0, -100], device=subject.device)
    embedding = torch.randn(3, 4, device=subject.device)
    loss = continuous_output_loss(output, target, embedding, backend=subject.backend)
    (gradient,) = torch.autograd.grad(loss, output, create_graph=True)
    gradient.square().sum().backward()
    assert (output.grad == 0).all()


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("shape", [(3,), (2, 3)])
def test_opcheck(subject, distance, shape):
    pytest.importorskip("expecttest", reason="torch.library.opcheck imports expecttest")
    embedding = table(9).to(subject.device)
    output = torch.randn(*shape, 9, device=subject.device, requires_grad=True)
    target = torch.randint(6, VECTORS, shape, device=subject.device)
    forward = (output, target, embedding, distance == "cosine")
    torch.library.opcheck(ops.cosine_fwd.overload, (*forward, subject.backend))
    _, by_output, by_target = (t.detach() for t in ops.cosine_fwd(*forward, subject.backend))
    dloss = torch.randn(shape, device=subject.device, requires_grad=True)
    backward = (dloss, output, target, embedding, by_output, by_target)
    torch.library.opcheck(ops.cosine_bwd.overload, (*backward, subject.backend))
    if subjects.ROWS[subject.backend].modules == ("sparse_ce.native",):
        native = torch.ops.sparse_ce_native
        for op, arguments in ((native.cosine_fwd, forward), (native.cosine_bwd, backward)):
            torch.library.opcheck(op.default, arguments, test_utils="test_schema")


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("more", [False, True], ids=["", "target_vectors"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_equals_eager_bit_by_bit(subject, distance, more, dynamic):
    """No graph break; a target out of range is not looked for: its loss is NaN, its gradient 0."""
    torch.compiler.reset()
    embedding = table(33).to(subject.device)
    extra = torch.randn(2, 33, device=subject.device) if more else None

    def step(c, y):
        return continuous_output_loss(
            c, y, embedding, distance, target_vectors=extra, reduction="none",
            backend=subject.backend,
        )  # fmt: skip

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (3, 4):
        output = torch.randn(2, rows, 33, device=subject.device, requires_grad=True)
        target = torch.randint(6, VECTORS + 2 * more, (2, rows), device=subject.device)
        target[0, 0] = -100
        found = []
        for function in (step, compiled):
            loss = function(output, target)
            found.append((loss.detach(), *torch.autograd.grad(loss.sum(), output)))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    target[1, 1] = VECTORS + 2
    loss = compiled(output, target)
    (gradient,) = torch.autograd.grad(loss.sum(), output)
    assert loss[1, 1].isnan() and loss.isnan().sum() == 1 and (gradient[1, 1] == 0).all()


def test_two_runs_and_any_number_of_threads_agree_in_all_bits(subject):
    embedding = table(300).to(subject.device)
    output, target = torch.randn(999, 300), torch.randint(6, VECTORS, (999,))
    there, threads, found = [t.to(subject.device) for t in (output, target)], None, []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            leaf = there[0].clone().requires_grad_()
            loss = continuous_output_loss(
                leaf, there[1], embedding, reduction="none", backend=subject.backend
            )
            loss.sum().backward()
            found.append((loss.detach(), leaf.grad))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(found[1] * 2, found[0] + found[2], strict=True))


def test_saved_are_the_output_by_reference_and_two_numbers_per_row(subject):
    embedding = table(64).to(subject.device)
    output = torch.randn(8, 6, 64, device=subject.device)[:, :-1].requires_grad_()
    target = torch.randint(6, VECTORS, (8, 5), device=subject.device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        continuous_output_loss(output, target, embedding, reduction="sum", backend=subject.backend)
    owners = {t.untyped_storage().data_ptr() for t in (output, target, embedding)}
    extra = [t for t in saved if t.untyped_storage().data_ptr() not in owners]
    # the coefficients, and which rows are ignored
    assert sum(t.nbytes for t in extra) <= 40 * (4 + 4 + 1)


def test_backward_twice(subject):
    embedding = table(9).to(subject.device)
    output = torch.randn(3, 9, device=subject.device, requires_grad=True)
    target = torch.tensor([0, 7, 8], device=subject.device)
    loss = continuous_output_loss(output, target, embedding, backend=subject.backend)
    first, second = (torch.autograd.grad(loss, output, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


# words outside the table, tables elsewhere


@pytest.mark.interpreter
def test_vectors_outside_the_table(subject):
    embedding, more = table(9), torch.randn(2, 9)
    output = torch.randn(2, 3, 9)
    target = torch.tensor([[0, VECTORS, VECTORS + 1], [36, -100, VECTORS]])
    everything = torch.cat([embedding, more])
    options = {"reduction": "none", "backend": subject.backend}
    there = [t.to(subject.device) for t in (output, target, embedding, more, everything)]
    ours = continuous_output_loss(*there[:3], target_vectors=there[3], **options)
    theirs = continuous_output_loss(there[0], there[1], there[4], **options)
    assert torch.equal(ours, theirs)
    with pytest.raises(IndexError, match=rf"^target: expected classes in \[0, {VECTORS + 2}\) or"):
        continuous_output_loss(output, target + 2, embedding, target_vectors=more)


def test_only_the_rows_of_the_batch_travel():
    """What a table on the CPU hands to a GPU: a row per target, and no target of another row."""
    embedding, target = table(9), torch.tensor([[7, -100, 7], [36, VECTORS, 2**40]])
    vectors, places = continuous.gather(target, embedding, None)
    assert vectors.shape == (6, 9) and vectors.is_contiguous()
    assert places.tolist() == [[0, -1, 2], [3, -1, -1]]
    assert torch.equal(vectors[[0, 2, 3]], embedding[[7, 7, 36]])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_table_on_the_cpu_beside_an_output_on_the_gpu(subject):
    if subject.device != "cuda":
        pytest.skip("a test of GPUs")
    embedding = table(33)
    output, target = problem(6, 33, torch.float32, embedding)
    found = [
        continuous_output_loss(
            output.cuda(), target.cuda(), rows, target_vectors=torch.ones(1, 33),
            backend=subject.backend, reduction="none",
        )
        for rows in (embedding, embedding.cuda())
    ]  # fmt: skip
    assert torch.equal(*found)
    with pytest.raises(IndexError, match="^target: expected classes in"):
        continuous_output_loss(output.cuda(), target.cuda() + VECTORS, embedding)


# the head


def head(**options):
    torch.manual_seed(0)
    return ContinuousOutputHead(12, table(9), **options), torch.randn(2, 3, 12)


def test_head_is_a_projection_and_the_loss():
    layer, hidden = head(distance="l2", ignore_index=-1, reduction="sum")
    target = torch.tensor([[0, 7, -1], [36, 9, 7]])
    loss = layer(hidden, target)
    expected = continuous_output_loss(
        layer.projection(hidden), target, layer.embedding, "l2", ignore_index=-1, reduction="sum"
    )
    assert torch.equal(loss, expected)
    loss.backward()
    assert {name for name, _ in layer.named_parameters()} == {
        "projection.weight",
        "projection.bias",
    }
    assert layer.projection.weight.grad.abs().sum() > 0 and not layer.embedding.requires_grad
    assert "distance='l2'" in repr(layer) and f"vectors={VECTORS}" in repr(layer)
    assert head(bias=False, dtype=torch.bfloat16)[0].projection.bias is None


def test_state_dict_holds_the_projection_alone():
    layer, hidden = head(unk=1)
    assert list(layer.state_dict()) == ["projection.weight", "projection.bias"]
    other, _ = head(unk=1)
    torch.nn.init.zeros_(other.projection.weight)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(
        other(hidden, torch.ones(2, 3).long()), layer(hidden, torch.ones(2, 3).long())
    )


def test_the_table_is_not_copied_and_stays_where_it_is_told_to():
    embedding = table(9)
    moving = ContinuousOutputHead(12, embedding, unk=1)
    staying = ContinuousOutputHead(12, embedding, unk=1, table_device="cpu")
    for layer in (moving, staying):
        assert layer.embedding.data_ptr() == embedding.data_ptr()
    moving.to("meta"), staying.to("meta")
    assert moving.embedding.device.type == moving.missing.device.type == "meta"
    assert staying.projection.weight.device.type == "meta"
    assert staying.embedding is embedding and staying.missing.device.type == "cpu"
    half = ContinuousOutputHead(12, embedding, table_device="cpu").bfloat16()
    assert half.projection.weight.dtype == torch.bfloat16
    assert half.embedding.dtype == torch.float32
    hidden = torch.randn(3, 12, dtype=torch.bfloat16)
    assert half(hidden, torch.tensor([0, 1, 2])).dtype == torch.float32


@pytest.mark.parametrize("ignore_index", [-100, 5])
def test_rows_of_zeros_fall_back_to_unk(ignore_index):
    """The row of zeros is 5; as ignore_index it stays ignored."""
    layer, hidden = head(unk=8, ignore_index=ignore_index, reduction="none")
    target = torch.tensor([[0, 5, -100], [5, 8, 7]])
    replaced = target.where(target != 5, 8 if ignore_index == -100 else 5)
    target[0, 2] = replaced[0, 2] = ignore_index
    expected = continuous_output_loss(
        layer.projection(hidden), replaced, layer.embedding, ignore_index=ignore_index,
        reduction="none",
    )  # fmt: skip
    assert torch.equal(layer(hidden, target), expected)
    assert (expected == 0).sum() == (1 if ignore_index == -100 else 3)
    without, _ = head(reduction="none")
    assert without(hidden, torch.full((2, 3), 5)).tolist() == [[1.0] * 3] * 2
    with pytest.raises(IndexError, match="^target: expected classes"):
        layer(hidden, target.clamp(min=0) + 100)


@pytest.mark.parametrize("ignore_index", [-100, 0])
def test_vectors_instead_of_targets(ignore_index):
    """Also where ignore_index is the number of a row."""
    layer, hidden = head(ignore_index=ignore_index, unk=1)
    vectors = torch.randn(2, 3, 9)
    expected = F.cosine_embedding_loss(
        layer.projection(hidden).flatten(0, 1), vectors.flatten(0, 1), torch.ones(6)
    )
    found = layer(hidden, target_vectors=vectors)
    torch.testing.assert_close(found, expected, rtol=0, atol=8 * EPS)
    target = torch.tensor([[7, VECTORS, ignore_index], [VECTORS + 1, 5, 9]])
    mixed = layer(hidden, target, target_vectors=vectors[0])
    everything = torch.cat([layer.embedding, vectors[0]])
    expected = continuous_output_loss(
        layer.projection(hidden), target.where(target != 5, 1), everything,
        ignore_index=ignore_index,
    )  # fmt: skip
    assert torch.equal(mixed, expected)


def test_no_vectors_and_one_row():
    layer, hidden = head()
    none = layer(hidden[:, :0], target_vectors=torch.randn(2, 0, 9))
    assert none == 0
    none.backward()
    target = torch.tensor([[0, 7, -100], [36, 9, 7]])
    assert torch.equal(layer(hidden, target, torch.empty(0, 9)), layer(hidden, target))
    vector = torch.randn(9)
    one = layer(hidden[0, 0], target_vectors=vector)
    cosine = F.cosine_similarity(layer.projection(hidden[0, 0]), vector, dim=-1)
    torch.testing.assert_close(one, 1 - cosine, rtol=0, atol=8 * EPS)
    with pytest.raises(
        ValueError, match="^target_vectors: expected a tensor without requires_grad"
    ):
        layer(hidden, target_vectors=torch.randn(2, 3, 9).requires_grad_())


@pytest.mark.parametrize("k", [1, 5, 36, VECTORS, 99])
@pytest.mark.parametrize("block_bytes", [1, 700, 1 << 20])
def test_nearest_vectors(subject, k, block_bytes):
    """As a sort of all cosines, in blocks of any size; a tie goes to the lowest row."""
    embedding = table(9)
    embedding[[3, 20, 30]] = embedding[11].clone()  # the same vector four times, in several blocks
    output = torch.randn(2, 4, 9)
    output[0, 0] = embedding[11]
    k = min(k, VECTORS)
    values, indices = continuous.nearest(
        output.to(subject.device), embedding.to(subject.device), k, subject.backend, block_bytes
    )
    cosines = F.cosine_similarity(output.unsqueeze(-2).double(), embedding.double(), dim=-1)
    cosines[..., 5] = -torch.inf
    expected = cosines.sort(dim=-1, descending=True, stable=True)
    assert indices.dtype == torch.int64 and indices.shape == (2, 4, k)
    assert torch.equal(indices.cpu(), expected.indices[..., :k])
    assert indices[0, 0, : min(k, 4)].tolist() == [3, 11, 20, 30][:k]
    torch.testing.assert_close(
        values.cpu().double(), expected.values[..., :k], rtol=0, atol=8 * EPS
    )


def test_predict():
    layer, hidden = head()
    for half in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            cosines, rows = layer.predict(hidden, 4)
            expected = layer.projection(hidden)
        assert cosines.dtype == torch.float32 and not cosines.requires_grad
        assert rows.shape == (2, 3, 4)
        similarity = F.cosine_similarity(expected.float().unsqueeze(-2), layer.embedding, dim=-1)
        assert torch.equal(rows, similarity.topk(4).indices)
    assert layer.predict(hidden[:0], 4)[1].shape == (0, 3, 4)
    assert layer.predict(hidden[0, 0])[1].shape == (1,)
    assert layer.predict(hidden, 99)[1].shape == (2, 3, VECTORS)


def test_memory_of_predict_is_bounded_by_a_block(subject):
    if subject.device != "cpu" or subject.backend == "eager":
        pytest.skip("weighs the memory of the CPU; tensor operations make keys of 64 bits")
    output, embedding, block = torch.randn(64, 32), torch.randn(20000, 32), 1 << 18
    _, peak = sizes_of_allocations(
        lambda: continuous.nearest(output, embedding, 5, subject.backend, block)
    )
    assert peak <= 3 * block < 4 * 64 * 20000 / 5


def test_learns_to_name_words():
    """A table of words, a projection from noisy features: it finds most of them after 200 steps."""
    torch.manual_seed(0)
    words, mixing = torch.randn(500, 24), torch.randn(24, 32) / 5
    layer = ContinuousOutputHead(32, words)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    for _ in range(200):
        target = torch.randint(500, (256,))
        hidden = words[target] @ mixing + torch.randn(256, 32) / 5
        optimizer.zero_grad()
        layer(hidden, target).backward()
        optimizer.step()
    target = torch.arange(500)
    found = layer.predict(words @ mixing, 1)[1].squeeze(-1)
    assert (found == target).float().mean() > 0.9


def test_backends_define_whole_operators():
    for subject in subjects.SUBJECTS:
        own = [backends.implementation(subject.backend, f"cosine_{d}") for d in ("fwd", "bwd")]
        assert len({function.__module__ for function in own}) == 1
