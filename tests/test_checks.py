"""Every error that a caller can cause, once: "name: expected ..., got ...". SPEC 7."""

import re

import pytest
import torch
import torch.distributed as dist
from sparse_ce import (
    ContinuousOutputHead,
    KSchedule,
    MonotonicPLIF,
    SparseCrossEntropyLoss,
    SparseLinearCrossEntropy,
    adaptive_sparse_ce,
    backends,
    continuous_output_loss,
    fused_linear_sparse_ce,
    fused_sparse_ce,
    sparse_softmax,
)


class Halved(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x) / 2


def hooked():
    layer = torch.nn.Linear(4, 5)
    layer.register_forward_hook(lambda *_: None)
    return layer


def support():
    return loss(return_support=True)[1]


LOGITS = torch.zeros(3, 5)
NUMPY_INT = type("int64", (), {"__module__": "numpy"})
TARGET = torch.tensor([0, 1, 4])


def loss(logits=LOGITS, target=TARGET, k=2, **options):
    return fused_sparse_ce(logits, target, k, **options)


def softmax(logits=LOGITS, k=2, dim=-1, **options):
    return sparse_softmax(logits, k, dim, **options)


EMBEDDING = torch.ones(7, 5)


def distance(output=LOGITS, target=TARGET, embedding=EMBEDDING, *options, **named):
    return continuous_output_loss(output, target, embedding, *options, **named)


def head(hidden=LOGITS, target=TARGET, embedding=EMBEDDING, target_vectors=None, **options):
    return ContinuousOutputHead(5, embedding, **options)(hidden, target, target_vectors)


# name of the argument -> (call, error, message after "name: ")
ERRORS = {
    "logits no tensor": (lambda: loss([[0.0]]), TypeError, "expected a torch.Tensor, got list"),
    "logits dtype": (
        lambda: loss(LOGITS.int()),
        TypeError,
        "expected float32, bfloat16, float16 or float64, got torch.int32",
    ),
    "logits complex": (
        lambda: softmax(LOGITS.to(torch.complex64)),
        TypeError,
        "expected float32.*got torch.complex64",
    ),
    "logits scalar": (
        lambda: loss(torch.tensor(1.0)),
        ValueError,
        r"expected shape \(\.\.\., V\) with V >= 1, got \(\)",
    ),
    "logits no classes": (
        lambda: loss(torch.zeros(3, 0)),
        ValueError,
        r"expected shape .* got \(3, 0\)",
    ),
    "logits nothing along dim": (
        lambda: softmax(torch.zeros(3, 0, 2), dim=1),
        ValueError,
        r"expected at least one entry along dim=1, got shape \(3, 0, 2\)",
    ),
    "target no tensor": (
        lambda: loss(target=[0, 1, 4]),
        TypeError,
        "expected a torch.Tensor, got list",
    ),
    "target dtype": (
        lambda: loss(target=TARGET.float()),
        TypeError,
        r"expected int64 or int32 class indices, got torch.float32 .*; .* pass target.long\(\)",
    ),
    "target one-hot": (
        lambda: loss(target=LOGITS),
        TypeError,
        r"expected int64 or int32 .* got torch.float32 .*; of one-hot rows pass target.argmax\(-",
    ),
    "target not shifted": (
        lambda: loss(torch.zeros(2, 3, 5), torch.zeros(2, 4, dtype=torch.int64)),
        ValueError,
        r"expected shape \(2, 3\), got \(2, 4\); to predict the next token shift the target alone",
    ),
    "target device": (
        lambda: loss(target=TARGET.to("meta")),
        ValueError,
        "expected the device of logits, cpu, got meta",
    ),
    "target shape": (
        lambda: loss(target=TARGET[:2]),
        ValueError,
        r"expected shape \(3,\), got \(2,\)$",
    ),
    "target shape of logits": (
        lambda: loss(target=LOGITS.long()),
        ValueError,
        r"expected shape \(3,\), got \(3, 5\); of one-hot rows pass target.argmax\(-1\)$",
    ),
    "target layout of F.cross_entropy": (
        lambda: loss(torch.zeros(2, 5, 7), torch.zeros(2, 7, dtype=torch.int64)),
        ValueError,
        r"expected shape \(2, 5\), got \(2, 7\); "
        r"these shapes fit the \(N, C, d1, \.\.\.\) layout of F.cross_entropy, "
        r"here the classes come last: pass logits.movedim\(1, -1\)",
    ),
    "target too large": (
        lambda: loss(target=torch.tensor([0, 5, 7])),
        IndexError,
        r"expected classes in \[0, 5\) or ignore_index=-100, got 5 at target\[1\]",
    ),
    "target negative": (
        lambda: loss(LOGITS.view(1, 3, 5), torch.tensor([[0, -3, -1]]), ignore_index=-1),
        IndexError,
        r"expected classes in \[0, 5\) or ignore_index=-1, got -3 at target\[0, 1\]",
    ),
    "target of padding": (
        lambda: loss(target=TARGET - 1),
        IndexError,
        r"expected .* got -1 at target\[0\]; if it marks padding pass ignore_index=-1$",
    ),
    "target of one row": (
        lambda: loss(LOGITS[0], torch.tensor(9)),
        IndexError,
        r"expected .* got 9 at target\[",
    ),
    "k zero": (lambda: loss(k=0), ValueError, "expected 1 <= k, got 0"),
    "k negative": (lambda: softmax(k=-1), ValueError, "expected 1 <= k, got -1"),
    "k float": (
        lambda: loss(k=2.0),
        TypeError,
        r"expected an int or None \(the dense softmax\), got float",
    ),
    "k bool": (lambda: loss(k=True), TypeError, "expected an int or None .*, got bool"),
    "k tensor": (
        lambda: softmax(k=torch.tensor(2)),
        TypeError,
        "expected an int or None .*, got Tensor",
    ),
    "backend that cannot run, though torch.softmax could": (
        lambda: softmax(k=5, backend="cuda"),
        RuntimeError,
        "'cuda' cannot run here: ",
    ),
    "weight no tensor": (
        lambda: loss(weight=[1.0] * 5),
        TypeError,
        "expected a torch.Tensor or None, got list",
    ),
    "weight dtype": (
        lambda: loss(weight=torch.ones(5, dtype=torch.int64)),
        TypeError,
        "expected a floating-point dtype, got torch.int64",
    ),
    "weight shape": (
        lambda: loss(weight=torch.ones(4)),
        ValueError,
        r"expected shape \(5,\), one weight per class, got \(4,\)",
    ),
    "weight device": (
        lambda: loss(weight=torch.ones(5, device="meta")),
        ValueError,
        "expected the device of logits, cpu, got meta",
    ),
    "weight gradient": (
        lambda: loss(weight=torch.ones(5, requires_grad=True)),
        ValueError,
        "expected a tensor without requires_grad, got one that needs a gradient",
    ),
    "ignore_index type": (lambda: loss(ignore_index=1.0), TypeError, "expected an int, got float"),
    "ignore_index None": (
        lambda: loss(ignore_index=None),
        TypeError,
        "expected an int, got NoneType",
    ),
    "label_smoothing type": (
        lambda: loss(label_smoothing="0.1"),
        TypeError,
        "expected a float, got str",
    ),
    "label_smoothing range": (
        lambda: loss(label_smoothing=1.5),
        ValueError,
        "expected 0 <= label_smoothing <= 1, got 1.5",
    ),
    "label_smoothing nan": (
        lambda: loss(label_smoothing=float("nan")),
        ValueError,
        "expected 0 <= .*, got nan",
    ),
    "reduction unknown": (
        lambda: loss(reduction="avg"),
        ValueError,
        "expected one of mean, sum, none, got 'avg'",
    ),
    "backend unknown": (
        lambda: loss(backend="gpu"),
        ValueError,
        f"expected one of auto, {', '.join(backends.NAMES)}, got 'gpu'",
    ),
    "backend of softmax": (
        lambda: softmax(backend="gpu"),
        ValueError,
        "expected one of auto, .*, got 'gpu'",
    ),
    "dim type": (lambda: softmax(dim=1.0), TypeError, "expected an int, got float"),
    "dim range": (lambda: softmax(dim=2), IndexError, "expected -2 <= dim < 2, got 2"),
    "num_cells type": (
        lambda: MonotonicPLIF(10.0),
        TypeError,
        "expected an int, got float",
    ),
    "num_cells range": (
        lambda: MonotonicPLIF(0),
        ValueError,
        r"expected 1 <= num_cells <= 2\^24, got 0",
    ),
    "bound type": (lambda: MonotonicPLIF(4, "20"), TypeError, "expected a float, got str"),
    "bound range": (
        lambda: MonotonicPLIF(4, 0.0),
        ValueError,
        "expected 0 < bound, finite, got 0.0",
    ),
    "init_std range": (
        lambda: MonotonicPLIF(4, 2.0, -1.0),
        ValueError,
        "expected 0 <= init_std, finite, got -1.0",
    ),
    "x no tensor": (
        lambda: MonotonicPLIF(4)([0.0]),
        TypeError,
        "expected a torch.Tensor, got list",
    ),
    "x dtype": (
        lambda: MonotonicPLIF(4)(TARGET),
        TypeError,
        "expected float32, bfloat16, float16 or float64, got torch.int64",
    ),
    "x device": (
        lambda: MonotonicPLIF(4)(LOGITS.to("meta")),
        ValueError,
        "expected the device of w, cpu, got meta",
    ),
    "link type": (
        lambda: loss(link=torch.nn.Tanh()),
        TypeError,
        "expected a MonotonicPLIF or None, got Tanh",
    ),
    "link device": (
        lambda: loss(link=MonotonicPLIF(4).to("meta")),
        ValueError,
        "expected the device of logits, cpu, got meta",
    ),
    "num_classes type": (lambda: KSchedule(10.0, 2, 0, 0), TypeError, "expected an int, got float"),
    "num_classes range": (
        lambda: KSchedule(0, 2, 0, 0),
        ValueError,
        "expected num_classes >= 1, got 0",
    ),
    "k of a schedule": (lambda: KSchedule(10, 0, 0, 0), ValueError, "expected k >= 1, got 0"),
    "warmup_steps range": (
        lambda: KSchedule(10, 2, -1, 0),
        ValueError,
        "expected warmup_steps >= 0, got -1",
    ),
    "dense_from range": (
        lambda: KSchedule(10, 2, dense_from=-1),
        ValueError,
        "expected dense_from >= 0, got -1",
    ),
    "dense_from within the warm-up": (
        lambda: KSchedule(10, 2, warmup_steps=3, dense_from=3),
        ValueError,
        "expected a step after warmup_steps=3, got 3",
    ),
    "anneal_steps type": (
        lambda: KSchedule(10, 2, 0, True),
        TypeError,
        "expected an int, got bool",
    ),
    "weight of a module": (
        lambda: SparseCrossEntropyLoss(2, weight=[1.0, 2.0]),
        TypeError,
        "expected a torch.Tensor or None, got list",
    ),
    "link of a module": (
        lambda: SparseCrossEntropyLoss(2, link=3),
        TypeError,
        "expected a MonotonicPLIF or None, got int",
    ),
    "k of a module": (lambda: SparseCrossEntropyLoss(0), ValueError, "expected 1 <= k, got 0"),
    "reduction of a module": (
        lambda: SparseCrossEntropyLoss(2, reduction="avg"),
        ValueError,
        "expected one of mean, sum, none, got 'avg'",
    ),
    "output no tensor": (lambda: distance([[0.0]]), TypeError, "expected a torch.Tensor, got list"),
    "output dtype": (
        lambda: distance(LOGITS.int()),
        TypeError,
        "expected float32, bfloat16, float16 or float64, got torch.int32",
    ),
    "output scalar": (
        lambda: distance(torch.tensor(1.0)),
        ValueError,
        r"expected shape \(\.\.\., D\) with D >= 1, got \(\)",
    ),
    "target beside an output": (
        lambda: distance(target=TARGET.to("meta")),
        ValueError,
        "expected the device of output, cpu, got meta",
    ),
    "target outside the table": (
        lambda: distance(target=TARGET + 3),
        IndexError,
        r"expected classes in \[0, 7\) or ignore_index=-100, got 7 at target\[2\]",
    ),
    "target of no vectors": (
        lambda: distance(target=TARGET + 4, target_vectors=EMBEDDING[:1]),
        IndexError,
        r"expected classes in \[0, 8\) or ignore_index=-100, got 8 at target\[2\]",
    ),
    "embedding no tensor": (
        lambda: distance(embedding=[[0.0]]),
        TypeError,
        "expected a torch.Tensor, got list",
    ),
    "embedding dtype": (
        lambda: distance(embedding=EMBEDDING.int()),
        TypeError,
        "expected float32, bfloat16, float16 or float64, got torch.int32",
    ),
    "embedding shape": (
        lambda: distance(embedding=EMBEDDING[:, :4]),
        ValueError,
        r"expected shape \(V, 5\) with V >= 1, got \(7, 4\)",
    ),
    "embedding empty": (
        lambda: distance(embedding=EMBEDDING[:0]),
        ValueError,
        r"expected shape \(V, 5\) with V >= 1, got \(0, 5\)",
    ),
    "embedding gradient": (
        lambda: distance(embedding=EMBEDDING.clone().requires_grad_()),
        ValueError,
        "expected a tensor without requires_grad, got one that needs a gradient: the vectors are "
        r"frozen, pass embedding.detach\(\)",
    ),
    "embedding device": (
        lambda: distance(embedding=EMBEDDING.to("meta")),
        ValueError,
        "expected the device of output, cpu, or cpu, got meta",
    ),
    "embedding precision": (
        lambda: distance(embedding=EMBEDDING.double()),
        TypeError,
        "expected float32, bfloat16 or float16 beside output of torch.float32, got torch.float64",
    ),
    "embedding of a head": (
        lambda: head(embedding=EMBEDDING[0]),
        ValueError,
        r"expected shape \(V, D\) with V >= 1, got \(5,\)",
    ),
    "target_vectors shape": (
        lambda: distance(target_vectors=EMBEDDING[0]),
        ValueError,
        r"expected shape \(V, 5\) with V >= 0, got \(5,\)",
    ),
    "target or target_vectors": (
        lambda: head(target=None),
        TypeError,
        "expected a target, or target_vectors in its place, got neither",
    ),
    "target_vectors instead of a target": (
        lambda: head(target=None, target_vectors=[EMBEDDING]),
        TypeError,
        "expected a torch.Tensor where there is no target, got list",
    ),
    "target_vectors for each row": (
        lambda: head(target=None, target_vectors=EMBEDDING),
        ValueError,
        r"expected shape \(3, 5\), a vector for each row, where target is None, got \(7, 5\)",
    ),
    "distance unknown": (
        lambda: distance(LOGITS, TARGET, EMBEDDING, "l1"),
        ValueError,
        "expected one of cosine, l2, got 'l1'",
    ),
    "distance of a head": (
        lambda: head(distance="dot"),
        ValueError,
        "expected one of cosine, l2, got 'dot'",
    ),
    "reduction of a head": (
        lambda: head(reduction="avg"),
        ValueError,
        "expected one of mean, sum, none, got 'avg'",
    ),
    "hidden of a head": (
        lambda: head(LOGITS[:, :4]),
        ValueError,
        r"expected shape \(\.\.\., 5\), got \(3, 4\)",
    ),
    "k of numpy": (
        lambda: loss(k=NUMPY_INT()),
        TypeError,
        r"expected an int or None \(the dense softmax\), got numpy.int64",
    ),
    "target flattened": (
        lambda: loss(LOGITS.view(3, 1, 5)),
        ValueError,
        r"expected shape \(3, 1\), got \(3,\); .* pass target.view\(\(3, 1\)\)",
    ),
    "logits sparse": (
        lambda: loss(LOGITS.to_sparse()),
        TypeError,
        r"expected a dense torch.Tensor \(torch.strided\), got torch.sparse_coo",
    ),
    "logits nested": (
        lambda: loss(torch.nested.nested_tensor([LOGITS, LOGITS])),
        TypeError,
        r"expected a dense torch.Tensor \(torch.strided\), got a nested tensor",
    ),
    "target sparse": (
        lambda: loss(target=TARGET.to_sparse()),
        TypeError,
        r"expected a dense torch.Tensor \(torch.strided\), got torch.sparse_coo",
    ),
    "weight of a layer, sparse": (
        lambda: fused_linear_sparse_ce(LOGITS, EMBEDDING.to_sparse(), TARGET, 2),
        TypeError,
        r"expected a dense torch.Tensor \(torch.strided\), got torch.sparse_coo",
    ),
    "return_support type": (
        lambda: loss(return_support="no"),
        TypeError,
        "expected a bool, got str",
    ),
    "class_weight of a module": (
        lambda: SparseLinearCrossEntropy(4, 5, 2, class_weight=torch.ones(4)),
        ValueError,
        r"expected shape \(5,\), one weight per class, got \(4,\)",
    ),
    "weight of a module, two of a class": (
        lambda: SparseCrossEntropyLoss(2, weight=torch.ones(4, 2)),
        ValueError,
        r"expected shape \(V,\), one weight per class, got \(4, 2\)",
    ),
    "weight of a module's classes": (
        lambda: SparseCrossEntropyLoss(2, weight=torch.ones(4, dtype=torch.int64)),
        TypeError,
        "expected a floating-point dtype, got torch.int64",
    ),
    "linear type": (
        lambda: SparseLinearCrossEntropy.from_linear(EMBEDDING, 2),
        TypeError,
        "expected a torch.nn.Linear, got torch.Tensor",
    ),
    "linear lazy": (
        lambda: SparseLinearCrossEntropy.from_linear(torch.nn.LazyLinear(5), 2),
        ValueError,
        "expected a plain torch.nn.Linear, got LazyLinear with parameters that have no shape yet",
    ),
    "linear parametrised": (
        lambda: SparseLinearCrossEntropy.from_linear(
            torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 5)), 2
        ),
        ValueError,
        "expected a plain torch.nn.Linear, got ParametrizedLinear with a parametrised weight",
    ),
    "linear with hooks": (
        lambda: SparseLinearCrossEntropy.from_linear(hooked(), 2),
        ValueError,
        "expected a plain torch.nn.Linear, got Linear with hooks",
    ),
    "linear of its own": (
        lambda: SparseLinearCrossEntropy.from_linear(Halved(4, 5), 2),
        ValueError,
        "expected a plain torch.nn.Linear, got Halved with a forward of its own",
    ),
    "bias beside a linear": (
        lambda: SparseLinearCrossEntropy.from_linear(torch.nn.Linear(4, 5), 2, bias=True),
        TypeError,
        "expected that of linear, got True",
    ),
    "target of hit": (
        lambda: support().hit(TARGET.unsqueeze(-1)),
        ValueError,
        r"expected shape \(3,\), got \(3, 1\)",
    ),
    "target of accuracy": (
        lambda: support().accuracy(TARGET.float()),
        TypeError,
        "expected int64 or int32 class indices, got torch.float32",
    ),
    "bound of another function": (
        lambda: MonotonicPLIF(4).load_state_dict(MonotonicPLIF(4, bound=5.0).state_dict()),
        ValueError,
        "expected 20.0, that of the MonotonicPLIF which loads, got 5.0",
    ),
    "unk type": (lambda: head(unk="<unk>"), TypeError, "expected an int or None, got str"),
    "unk range": (
        lambda: head(unk=7),
        ValueError,
        r"expected a row in \[0, 7\) other than ignore_index=-100, got 7",
    ),
    "unk ignored": (
        lambda: head(unk=2, ignore_index=2),
        ValueError,
        r"expected a row in \[0, 7\) other than ignore_index=2, got 2",
    ),
    "unk zero": (
        lambda: head(unk=2, embedding=torch.zeros(7, 5)),
        ValueError,
        "expected a row that is not zero itself, got 2",
    ),
    "k of predict": (
        lambda: ContinuousOutputHead(5, EMBEDDING).predict(LOGITS, 0),
        ValueError,
        "expected 1 <= k, got 0",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_message(case):
    call, error, message = ERRORS[case]
    with pytest.raises(error, match=f"^{re.escape(case.split()[0])}: {message}"):
        call()


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    """Of this process alone."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch was built without gloo")
    rendezvous = tmp_path_factory.mktemp("gloo") / "rendezvous"
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    from torch.distributed.device_mesh import init_device_mesh

    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["logits", "target", "weight"])
def test_dtensor(mesh, name):
    """SPEC 7: the error names vocab_parallel_sparse_ce."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    plain = {"logits": LOGITS, "target": TARGET, "weight": torch.ones(5)}
    arguments = plain | {name: distribute_tensor(plain[name], mesh, [Replicate()])}
    with pytest.raises(
        TypeError,
        match=f"^{name}: expected a plain torch.Tensor, got a DTensor; .*vocab_parallel_sparse_ce",
    ):
        loss(**arguments)


def test_out_of_range_is_looked_for_on_request_on_a_gpu(monkeypatch):
    """Elsewhere than on the CPU looking is a synchronisation: only with SPARSE_CE_DEBUG=1."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    logits, target = LOGITS.cuda().requires_grad_(), torch.tensor([0, 5, 4], device="cuda")
    losses = loss(logits, target, reduction="none")
    losses.sum().backward()
    assert losses.isnan().tolist() == [False, True, False]
    assert (logits.grad[1] == 0).all() and (logits.grad[0] != 0).any()
    monkeypatch.setenv("SPARSE_CE_DEBUG", "1")
    with pytest.raises(IndexError, match=r"got 5 at target\[1\]"):
        loss(logits, target)


@pytest.mark.parametrize("ignore_index", [-100, -1, 5, 2**40])
def test_ignore_index_is_no_class_out_of_range(ignore_index):
    target = torch.tensor([0, ignore_index, 4])
    assert loss(target=target, ignore_index=ignore_index, reduction="none")[1] == 0


OUT_OF_RANGE = {
    "topk": {"k": 2},
    "dense": {"k": None},
    "cut": {"k": 1100},
    # also where the nearest class has no weight
    "weight": {"k": 2, "weight": torch.arange(1200).remainder(1199).clamp(max=1).float()},
    "tail": {"k": 2, "normalizer": "full", "tail_samples": 4},
    "plif": {"k": None, "link": MonotonicPLIF(num_cells=4)},
    "adaptive": {"delta": 0.1},
}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("case", OUT_OF_RANGE)
@pytest.mark.parametrize("wrong", [-1, 1200, 2**40])
def test_a_class_out_of_range_is_found(case, reduction, wrong):
    """Where rows are reduced it is looked for only in a loss that is NaN."""
    options = OUT_OF_RANGE[case] | {"reduction": reduction}
    function = adaptive_sparse_ce if "delta" in options else fused_sparse_ce
    logits, target = torch.randn(70, 1200), torch.arange(70)
    assert not function(logits, target, **options).isnan().any()
    target[63] = wrong
    for z in (logits, logits.requires_grad_()):
        with pytest.raises(IndexError, match=rf"got {wrong} at target\[63\]"):
            function(z, target, **options)
    # of a loss that is NaN for another reason targets in range are no error
    target[63] = 3
    assert function(torch.full_like(logits, torch.nan), target, **options).isnan().all()
