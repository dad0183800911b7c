"""How the CUDA kernels are chosen, and what their launchers refuse. What they compute is tested in
test_kernels.py, as on every backend.
"""

import ctypes
import re
import sys

import cases
import pytest
import subjects
import torch

if not subjects.EMULATING:
    pytest.skip("runs with SPARSE_CE_EMULATE=1", allow_module_level=True)

import emulated_cuda  # noqa: E402
import emulation  # noqa: E402
from sparse_ce import eager  # noqa: E402
from test_tail import assert_draws, listed  # noqa: E402

pytestmark = pytest.mark.interpreter

# (dtype, rows, classes, k) -> the kernels of forward with their numbers: threads of a row first
CHOSEN = [
    (torch.bfloat16, 5, 64, 32, ["few 4 4"]),
    (torch.float16, 5, 63, 32, ["few 4 1"]),
    (torch.float32, 5, 62, 32, ["few 4 1"]),
    (torch.float64, 5, 32, 32, ["few 8 1"]),
    (torch.bfloat16, 5, 65, 32, ["held 4 4 32 false"]),
    (torch.bfloat16, 5, 135, 32, ["held 4 4 32 false"]),
    (torch.bfloat16, 5, 136, 32, ["held 4 8 32 false"]),
    (torch.float32, 5, 65, 32, ["held 4 4 32 false"]),
    (torch.float64, 5, 65, 32, ["held 8 4 32 false"]),
    (torch.bfloat16, 5, 263, 32, ["held 4 8 32 false"]),
    (torch.bfloat16, 5, 264, 32, ["held 4 16 32 false"]),
    (torch.bfloat16, 5, 519, 32, ["held 4 16 32 false"]),
    (torch.bfloat16, 5, 520, 32, ["held 8 16 32 false"]),
    (torch.bfloat16, 5, 1031, 32, ["held 8 16 32 false"]),
    (torch.bfloat16, 5, 1032, 32, ["held 16 16 32 false"]),
    (torch.float32, 5, 515, 32, ["held 8 16 32 false"]),
    (torch.float32, 5, 2048, 32, ["held 32 16 32 false"]),
    (torch.float64, 5, 129, 32, ["held 8 8 32 false"]),
    (torch.float64, 5, 130, 32, ["held 8 16 32 false"]),
    (torch.float64, 5, 2048, 32, ["held 32 32 32 false"]),
    (torch.float32, 5, 4099, 32, ["held 32 32 32 false"]),
    (torch.float32, 5, 4100, 32, ["held 32 16 32 true"]),
    (torch.float16, 5, 24583, 32, ["held 32 16 32 true"]),
    (torch.float16, 5, 24584, 32, ["long 128 8 1 1024"]),
    (torch.float32, 5, 33, 33, ["held 8 2 64 false"]),
    (torch.float32, 5, 67, 65, ["held 8 2 128 false"]),
    (torch.float16, 5, 263, 128, ["held 8 4 128 false"]),
    (torch.float16, 5, 264, 33, ["held 8 8 64 false"]),
    (torch.float16, 5, 1031, 128, ["held 8 16 128 false"]),
    (torch.float16, 5, 1032, 128, ["held 16 16 128 false"]),
    (torch.float32, 5, 2048, 64, ["held 32 16 64 false"]),
    (torch.float64, 5, 65, 65, ["held 32 1 128 false"]),
    (torch.float64, 5, 200, 128, ["held 32 4 128 false"]),
    (torch.float16, 5, 8199, 128, ["held 32 32 128 false"]),
    (torch.float16, 5, 8200, 128, ["long 128 8 1 1024"]),
    (torch.float32, 5, 4096, 129, ["short 512 8 4096"]),
    (torch.float64, 5, 4096, 1024, ["short 512 8 2048"]),
    (torch.float32, 5, 4097, 1024, ["long 512 4 4 4096"]),
    (torch.float64, 5, 4097, 129, ["long 512 4 2 2048"]),
    (torch.float32, 5, 1025, 1025, ["radix 1024"]),
    (torch.float32, 1, 32767, 20, ["long 128 8 1 1024"]),
    (torch.float32, 1, 32768, 20, ["long 128 8 1 1024", "merge 512 2048"]),
    (torch.float64, 2, 32768, 1024, ["long 512 4 2 2048", "merge 512 2048"]),
    (torch.float32, 129, 32768, 20, ["long 128 8 1 1024"]),
    (torch.float32, 129, 32768, 128, ["long 128 8 1 1024"]),
    (torch.float32, 129, 32772, 33, ["long 512 4 1 1024"]),
]


@pytest.mark.parametrize("dtype, rows, classes, k, kernels", CHOSEN, ids=str)
def test_chosen_kernels(dtype, rows, classes, k, kernels):
    logits = torch.randn(1, classes).to(dtype).expand(rows, -1)
    emulated_cuda.launched()
    outputs = emulated_cuda.topk_ce_fwd(logits, torch.zeros(rows, dtype=torch.int64), None, k, 0.0)
    found = [
        re.search(r"forward_([a-z]+)_kernel<[^,>]+(.*?)>", name)
        for name in emulated_cuda.launched()
    ]
    names = ["".join(match.groups()).replace(",", "") for match in found]
    assert names == kernels
    expected = logits[0].double().sort(descending=True, stable=True).indices[:k]
    assert (outputs[2] == expected).all()


@pytest.fixture(scope="module")
def comparing_bfloat16():
    library = ctypes.CDLL(str(emulation.build(emulation.HEADERS / "bfloat16.cpp")))
    library.topk_ce_scratch_bytes.restype = ctypes.c_int64
    library.topk_ce_forward.restype = ctypes.c_char_p
    return library


@pytest.mark.skipif("compiled_cuda" in sys.modules, reason="of two emulations")
@pytest.mark.parametrize("classes, k", [(101, 20), (1003, 20), (1000, 100), (2051, 50), (9001, 20)])
@pytest.mark.parametrize("filler", cases.FILLERS)
def test_pairs_of_bfloat16(comparing_bfloat16, monkeypatch, filler, classes, k):
    """Compared by an instruction of their own: the same bits as by one of float16."""
    logits = cases.logits(filler, 3, classes, torch.bfloat16)
    arguments = (logits, torch.zeros(3, dtype=torch.int64), None, k, 0.0)
    expected = emulated_cuda.topk_ce_fwd(*arguments)
    monkeypatch.setattr(emulated_cuda, "_library", lambda: comparing_bfloat16)
    found = emulated_cuda.topk_ce_fwd(*arguments)
    assert all(map(torch.equal, map(cases.bits, found), map(cases.bits, expected)))
    assert torch.equal(found[2], eager.topk_ce_fwd(*arguments)[2])


@pytest.mark.parametrize(
    "classes, k, kernel",
    [
        (256, 20, "together 512"),
        (257, 128, "together 1024"),
        (512, 20, "together 1024"),
        (512, 129, "32"),
        (513, 20, "8"),
        (1023, 20, "8"),
        (1024, 20, "32"),
        (4095, 20, "32"),
        (4096, 20, "128"),
    ],
)
def test_chosen_kernel_of_backward(classes, k, kernel):
    logits, target = torch.randn(3, classes).bfloat16(), torch.tensor([0, 1, 2])
    _, _, indices, probs = emulated_cuda.topk_ce_fwd(logits, target, None, k, 0.0)
    emulated_cuda.launched()
    arguments = (target, indices, probs, None, 0.0, classes, torch.bfloat16)
    emulated_cuda.topk_ce_bwd(torch.ones(3), None, None, *arguments)
    (name,) = emulated_cuda.launched()
    found = re.search(r"backward_(?:(together)_)?kernel<\S+bfloat16, (\d+)>", name)
    assert " ".join(filter(None, found.groups())) == kernel


@pytest.mark.parametrize(
    "dtype, classes, k, threads",
    [
        (torch.bfloat16, 256, 256, [4]),
        (torch.float32, 129, 129, [8]),
        (torch.bfloat16, 1024, 1024, [8]),
        (torch.bfloat16, 1025, 1025, [32]),
        (torch.bfloat16, 4096, 4096, [32]),
        (torch.bfloat16, 4097, 4096, [1024, 256]),
        (torch.float64, 1024, 1023, [1024, 32]),
        (torch.float64, 1025, 1025, [256]),
    ],
)
def test_chosen_kernels_of_threshold_ce(dtype, classes, k, threads):
    """One more where k cuts; lanes or threads by the bytes of a row, backward as forward."""
    logits, target = torch.randn(3, classes).to(dtype), torch.tensor([0, 1, 2])
    emulated_cuda.launched()
    outputs = emulated_cuda.threshold_ce_fwd(logits, target, None, k, 1.0, 0.0)
    ones, saved = torch.ones_like(outputs[0]), outputs[2:]
    emulated_cuda.threshold_ce_bwd(ones, None, logits, target, *saved, None, 0.0)
    found = [re.search(r", (\d+)>", name)[1] for name in emulated_cuda.launched()]
    assert found == [str(t) for t in (*threads, threads[-1])]


@pytest.mark.parametrize(
    "dtype, classes, threads",
    [(torch.bfloat16, 4096, 32), (torch.bfloat16, 4097, 256), (torch.float64, 1025, 256)],
)
def test_chosen_kernels_of_labels_ce(dtype, classes, threads):
    logits, labels = torch.randn(3, classes).to(dtype), torch.rand(3, classes) < 0.1
    emulated_cuda.launched()
    outputs = emulated_cuda.labels_ce_fwd(logits, labels, 0.1)
    emulated_cuda.labels_ce_bwd(torch.ones(3).to(outputs[0].dtype), logits, labels, *outputs[1:])
    found = [re.search(r", (\d+)>", name)[1] for name in emulated_cuda.launched()]
    assert found == [str(threads)] * 2


@pytest.mark.parametrize(
    "classes, threads",
    # from 65536 on, 1024 segments of one step, there are segments of two
    [(4, 32), (1024, 32), (1025, 256), (65_536, 256), (65_537, 256)],
)
@pytest.mark.parametrize("begin", [0, 1])
def test_chosen_kernels_of_tail(classes, threads, begin):
    """Of equal logits all q are equal, and their sum is exact in float64: every draw is known."""
    k, samples, left_out = 2, 1500, 3
    logits = torch.zeros(2, classes + begin).double()[:, begin:]
    target, indices = torch.tensor([-1, left_out]), torch.arange(k).int().repeat(2, 1)
    uniform = torch.tensor([0, 1 - 2.0**-53]).double()
    emulated_cuda.launched()
    _, _, mass, draws = emulated_cuda.tail_fwd(logits, target, indices, uniform, samples)
    (name,) = emulated_cuda.launched()
    assert re.search(rf"tail_forward_kernel<\S+, {threads}>", name)
    for n, classes_left in enumerate((classes - k, classes - k - 1)):
        all_q = int(mass[n].item() * 2**52)
        q, stride = all_q // classes_left, all_q // samples
        assert q * classes_left == all_q
        number = (int(uniform[n].item() * stride) + torch.arange(samples) * stride) // q
        assert torch.equal(draws[n], (number + k + (n == 1) * (number >= left_out - k)).int())


@pytest.mark.parametrize("dtype, classes", [(torch.bfloat16, 263_001), (torch.float32, 140_001)])
def test_segments_of_several_steps(dtype, classes):
    logits, target = torch.randn(1, classes).to(dtype), torch.tensor([7])
    indices = listed(logits, 20)
    uniform = torch.tensor([0.3])
    found = emulated_cuda.tail_fwd(logits, target, indices, uniform, 400)
    assert_draws(logits, target, indices, uniform, found[2], found[3], found[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_q_of_any_probability(dtype):
    """A tail of one class: its mass is p, rounded down to a multiple of 2^-52."""
    distance = torch.linspace(0.01, 44, 1000, dtype=dtype)
    logits, none = torch.stack((torch.zeros_like(distance), -distance), -1), torch.full((1000,), -1)
    uniform, indices = torch.full_like(distance, 0.5), torch.zeros(1000, 1).int()
    _, log_sum, mass, draws = emulated_cuda.tail_fwd(logits, none, indices, uniform, 1)
    q, p = mass.double() * 2**52, (-distance - log_sum).double().exp()
    assert torch.equal(q, q.floor())
    # as in test_tail.py: the exponent is rounded, and so is exp; of float64 the truth too
    units = torch.finfo(dtype).eps * (distance + 3) * (2 if dtype == torch.float64 else 1)
    assert ((q <= p * 2**52 * (1 + units)) & (q > p * 2**52 * (1 - units) - 1)).all()
    assert torch.equal(draws.squeeze(-1), torch.where(q > 0, 1, -1).int())


def test_rows_without_a_tail():
    """All but the list is the target, or so improbable that no draw has a share."""
    logits = torch.tensor([[0.0, -1.0, -2.0], [0.0, -1.0, -40.0], [0.0, -1.0, -torch.inf]])
    target, indices = torch.tensor([2, 0, -1]), torch.tensor([0, 1]).int().repeat(3, 1)
    found = emulated_cuda.tail_fwd(logits, target, indices, torch.full((3,), 0.5), 4)
    assert (found[2] == 0).all() and (found[3] == -1).all()


ONE, MANY, ANYWHERE = "8 1", "8 4", "1 8"


@pytest.mark.parametrize(
    "width, begin, rows, m, classes, gather, piece, segment",
    [
        (24, 0, 300, 5, 7, ONE, ONE, ONE),
        (24, 1, 300, 5, 7, ANYWHERE, ANYWHERE, ANYWHERE),
        (20, 0, 51, 5, 7, ANYWHERE, None, ANYWHERE),
        (1024, 0, 1024, 1, 1023, MANY, ONE, ONE),
        (1024, 0, 1023, 1, 1024, ONE, ONE, MANY),
        (1024, 0, 1024, 256, 1024, MANY, MANY, MANY),
        (1016, 0, 1024, 1, 1024, ONE, ONE, ONE),
        (1024, 1, 1024, 1, 1024, ANYWHERE, ANYWHERE, ANYWHERE),
    ],
)
def test_chosen_kernels_of_sparse_linear(width, begin, rows, m, classes, gather, piece, segment):
    """Columns of an access, and accesses of a thread: more where there are sums and columns enough.
    Few pairs make no piece.
    """
    hidden = torch.randn(rows * width + begin).bfloat16()[begin:].view(rows, width)
    g, index = torch.zeros(rows, m), torch.randint(min(rows, classes), (rows, m)).int()
    emulated_cuda.launched()
    emulated_cuda.sparse_linear_dhidden(g, index, hidden, torch.float32)
    emulated_cuda.sparse_linear_dweight(g, index, hidden, classes, torch.float32)
    found = [
        re.search(r"([a-z]+)_kernel<\S+, (\d+), (\d+)>", name).groups()
        for name in emulated_cuda.launched()
    ]
    kernels = {"gather": gather, "piece": piece, "segment": segment}
    assert found == [(name, *form.split()) for name, form in kernels.items() if form]


@pytest.mark.parametrize(
    "dtype, table, width, begin, size",
    [
        (torch.float32, torch.float32, 300, 0, 16),
        (torch.float32, torch.float32, 300, 1, 4),
        (torch.float32, torch.bfloat16, 300, 0, 8),
        (torch.bfloat16, torch.float32, 304, 0, 16),
        (torch.bfloat16, torch.float16, 300, 4, 8),
        (torch.float16, torch.float16, 300, 2, 2),
        (torch.float64, torch.float64, 33, 0, 8),
    ],
)
def test_chosen_kernels_of_cosine(dtype, table, width, begin, size):
    """The widest accesses, of the narrower of the two, in which all rows lie."""
    output = torch.randn(3 * width + begin).to(dtype)[begin:].view(3, width)
    embedding, target = torch.randn(5, width).to(table), torch.tensor([0, 1, 4])
    emulated_cuda.launched()
    found = emulated_cuda.cosine_fwd(output, target, embedding, True)
    emulated_cuda.cosine_bwd(torch.ones(3).to(found[0]), output, target, embedding, *found[1:])
    names = emulated_cuda.launched()
    assert [re.search(r", (\d+)>", name)[1] for name in names] == [str(size)] * 2


def tables(cells=37):
    return eager.plif_tables(torch.randn(cells), 3.0, torch.float32)


SCALE = torch.tensor(2.0**40, dtype=torch.float64)


@pytest.mark.parametrize(
    "classes, threads, parts", [(4096, 32, 1), (4097, 256, 1), (16385, 256, 2)]
)
def test_chosen_kernels_of_plif(classes, threads, parts):
    """Warps or blocks by the bytes of a row, and parts where long rows are few: sums are of all."""
    logits, target = 2 * torch.randn(2, classes).bfloat16(), torch.tensor([0, classes - 1])
    slopes, offsets = tables()
    emulated_cuda.launched()
    saved = emulated_cuda.plif_ce_fwd(logits, target, None, slopes, offsets, 3.0, 0.1)[2:]
    rest = (logits, target, *saved, None, slopes, offsets, 3.0, 0.1, SCALE)
    found = emulated_cuda.plif_ce_bwd(torch.ones(2), None, *rest)
    names = emulated_cuda.launched()
    assert [re.search(r", (\d+)>", name)[1] for name in names] == [str(threads)] * 2
    rows = emulated_cuda.Rows(None, 2, classes, 1, classes, 0)
    arguments = emulated_cuda.PlifCeBackward(logits=rows, dtype=1)
    assert emulated_cuda.outside_parts(arguments) == 2 * parts
    expected = eager.plif_ce_bwd(torch.ones(2), None, *rest)
    for ours, theirs in zip(found, expected, strict=True):
        # as in test_plif.py: the gradient of a row is off by some units of its 2; and both are
        # rounded to bfloat16, on different sides of a middle perhaps
        step = theirs.double().abs().max() if theirs.is_floating_point() else SCALE
        rtol = 2**-7 if theirs.dtype == torch.bfloat16 else 1e-5
        assert torch.allclose(ours.double(), theirs.double(), rtol=rtol, atol=1e-6 * step)


@pytest.mark.parametrize("k, threads", [(128, 32), (129, 256)])
def test_chosen_kernels_of_plif_on_lists(k, threads):
    logits, target = 2 * torch.randn(2, 200).bfloat16(), torch.tensor([0, 199])
    slopes, offsets = tables()
    emulated_cuda.launched()
    saved = emulated_cuda.plif_topk_ce_fwd(logits, target, None, slopes, offsets, 3.0, k, 0.1)[2:]
    rest = (target, *saved, None, slopes, 3.0, 0.1, 200, torch.bfloat16, SCALE)
    emulated_cuda.plif_topk_ce_bwd(torch.ones(2), None, None, *rest)
    names = [name for name in emulated_cuda.launched() if "plif" in name]
    assert [re.search(r", (\d+)>", name)[1] for name in names] == [str(threads)] * 2
    assert emulated_cuda.outside_parts(emulated_cuda.PlifTopkBackward()) == 0


@pytest.mark.parametrize("cells", [1, 523_264, 523_265, 1_046_529])
def test_chosen_kernels_of_plif_on_cells(cells):
    """Whatever their number. From 523265 on, 512 times 1022 and one, a block takes turns."""
    torch.manual_seed(cells)
    w, scale = torch.randn(cells), torch.tensor(2.0**20).double()
    sums, outside = torch.randint(-(2**20), 2**20, (cells, 2)), torch.randn(2).double()
    emulated_cuda.launched()
    slopes, offsets = emulated_cuda.plif_tables(w, 3.0, torch.float32)
    dslopes = emulated_cuda.plif_dslopes(sums, outside, scale, 3.0, torch.float64)
    names = [re.search(r"plif_([a-z]+)_kernel", name)[1] for name in emulated_cuda.launched()]
    assert names == ["slopes", "steps", "offsets", "masses", "dslopes"]
    expected = eager.plif_tables(w, 3.0, torch.float32)
    # an ulp of float64 is seen in float32 once in 2^29 numbers
    assert torch.equal(slopes, expected[0]) and torch.equal(offsets, expected[1])
    assert torch.equal(dslopes, eager.plif_dslopes(sums, outside, scale, 3.0, torch.float64))


@pytest.mark.parametrize(
    "rows, k, kernels",
    [
        (0, None, ["scale 1"]),
        (16384, None, ["scale 1"]),
        (16385, None, ["scale 1", "scale_join 128"]),
        # blocks take turns, the last of them not whole
        (128 * 1024 * 3 + 5, None, ["scale 1", "scale_join 128"]),
        (819, 20, ["scale 32"]),
        (820, 20, ["scale 32", "scale_join 128"]),
    ],
)
def test_chosen_kernels_of_the_scale(rows, k, kernels):
    """One launch, or two; a warp to a row where its probabilities have gradients."""
    target, lse = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows)
    dloss, dprobs = torch.rand(rows), None if k is None else torch.randn(rows, k)
    if rows:
        dloss[-1] = 1  # the largest comes last
    emulated_cuda.launched()
    scale = emulated_cuda.plif_scale(dloss, None, dprobs, target, None, lse, 5)
    found = [re.search(r"plif_(\w+)_kernel<\D*(\d+)", n) for n in emulated_cuda.launched()]
    assert [" ".join(match.groups()) for match in found] == kernels
    assert scale == eager.plif_scale(dloss, None, dprobs, target, None, lse, 5)


@pytest.mark.parametrize("begins", [(0, 0), (1, 0), (0, 3)])
def test_elements_of_plif_begin_anywhere(begins):
    """In memory: neither of the two, x or dy, at 16 bytes changes a bit."""
    given = [torch.randn(2101).bfloat16() for _ in range(2)]
    moved = [torch.cat([t[:begin], t])[begin:] for t, begin in zip(given, begins, strict=True)]
    slopes, offsets = tables()
    (x, dy), (there, above) = given, moved
    found = emulated_cuda.plif_fwd(there, slopes, offsets, 3.0)
    assert torch.equal(found, emulated_cuda.plif_fwd(x, slopes, offsets, 3.0))
    expected = emulated_cuda.plif_bwd(dy, x, slopes, 3.0, SCALE)
    for ours, theirs in zip(
        emulated_cuda.plif_bwd(above, there, slopes, 3.0, SCALE), expected, strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "rows, kernels",
    [
        (0, ["forward"]),
        (16384, ["forward", "backward"]),
        (16385, ["forward", "join", "backward"]),
        # blocks take turns, some of them one more, and the last is not whole
        (4096 * 1024 + 4099, ["forward", "join", "backward"]),
    ],
)
def test_chosen_kernels_of_reduce(rows, kernels):
    """One launch forward up to 16384 rows, two beyond; one backward. Of whole numbers the sums are
    exact.
    """
    target = torch.arange(rows) % 3
    loss = (torch.arange(rows) % 5).masked_fill(target == 1, 0).float()
    weight = torch.tensor([1.0, torch.nan, 3.0])
    emulated_cuda.launched()
    reduced, divisor = emulated_cuda.reduce_fwd(loss, target, weight, 1, True)
    dloss = emulated_cuda.reduce_bwd(torch.tensor(6.0), target, divisor, 1)
    names = emulated_cuda.launched()
    assert [re.search(r"reduce_([a-z]+)_kernel<float>", name)[1] for name in names] == kernels
    expected = (target == 0).sum() + 3 * (target == 2).sum() if rows else torch.tensor(1)
    assert divisor.double() == expected
    assert reduced == (loss.double().sum().float() / divisor)
    assert torch.equal(dloss, torch.where(target == 1, 0, 6 / divisor))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_bits_of_reduce_in_any_order_of_threads(dtype):
    """Which the emulation shuffles anew in every block."""
    torch.manual_seed(0)
    loss, target = torch.rand(40_001, dtype=dtype), torch.randint(9, (40_001,))
    weight = torch.rand(9, dtype=dtype)
    runs = [emulated_cuda.reduce_fwd(loss, target, weight, 3, True) for _ in range(5)]
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize(
    "rows, classes, k",
    [(2**31, 5, 2), (1, 5, 6), (1, 5, 0), (1, 2**31 - 1, 5), (1, 2**30 + 2, 2**30 + 1)],
)
def test_sizes_out_of_range_are_refused(rows, classes, k):
    """Before anything is launched, or looked at: neither these logits nor these rows are there."""
    row = emulated_cuda.Rows(None, rows, classes, 1, classes, 0)
    forward = emulated_cuda.Forward(row, 0, k)
    backward = emulated_cuda.Backward(count=rows, classes=classes, k=k)
    columns = emulated_cuda.PlifColumns(None, None, 9, 3.0)
    linked = (
        emulated_cuda.PlifTopkForward(forward, columns),
        emulated_cuda.PlifTopkBackward(backward, columns),
    )
    # where a list names a class twice it may be longer than its row, backward alone
    for arguments in (forward, *linked, *([] if k == classes + 1 else [backward])):
        assert_refused(arguments)


@pytest.mark.parametrize("rows, classes, k", [(2**31, 5, 2), (1, 5, 6), (1, 5, 0), (1, 2**31, 5)])
def test_sizes_out_of_range_are_refused_by_threshold_ce(rows, classes, k):
    row = emulated_cuda.Rows(None, rows, classes, 1, classes, 0)
    assert_refused(emulated_cuda.ThresholdForward(row, 0, k, 1.0))
    if 1 <= k <= classes:
        assert_refused(emulated_cuda.ThresholdBackward(None, None, row, 0))


@pytest.mark.parametrize(
    "rows, classes, k, samples",
    [(2**31, 5, 2, 3), (1, 2**31, 2, 3), (1, 5, 0, 3), (1, 5, 5, 3), (1, 5, 2, -1)],
)
def test_sizes_out_of_range_are_refused_by_tail(rows, classes, k, samples):
    row = emulated_cuda.Rows(None, rows, classes, 1, classes, 0)
    assert_refused(emulated_cuda.Tail(row, 0, k=k, samples=samples))


@pytest.mark.parametrize("rows, classes", [(2**31, 5), (1, 0), (1, 2**31)])
def test_sizes_out_of_range_are_refused_by_labels_ce(rows, classes):
    row = emulated_cuda.Rows(None, rows, classes, 1, classes, 0)
    assert_refused(emulated_cuda.LabelsForward(row, 0))
    assert_refused(emulated_cuda.LabelsBackward(None, row, 0))


def test_sizes_out_of_range_are_refused_by_sparse_linear():
    half = 2**30
    assert_refused(emulated_cuda.Gather(tokens=half, m=2, width=5))
    assert_refused(emulated_cuda.Gather(tokens=1, m=0, width=5))
    assert_refused(emulated_cuda.Segments(pairs=2 * half, m=2, classes=5, width=5))
    assert_refused(emulated_cuda.Segments(pairs=5, m=1, classes=2 * half, width=5))
    assert_refused(emulated_cuda.Gather(tokens=1, m=1, width=2**24))
    assert_refused(emulated_cuda.Segments(pairs=5, m=1, classes=5, width=2**24))
    # float64 goes with float64 alone
    assert_refused(emulated_cuda.Gather(tokens=1, m=1, width=5, out_dtype=3))


@pytest.mark.parametrize("rows, width, dtype", [(2**31, 5, 0), (1, 0, 0), (1, 2**31, 0), (1, 5, 3)])
def test_sizes_out_of_range_are_refused_by_cosine(rows, width, dtype):
    """And float64 beside anything else."""
    given = (emulated_cuda.Rows(None, rows, width, 1, width, 0), dtype)
    assert_refused(emulated_cuda.CosineForward(*given))
    assert_refused(emulated_cuda.CosineBackward(None, *given))


@pytest.mark.parametrize(
    "rows, classes, cells, bound",
    [
        (2**31, 5, 9, 3.0),
        (1, 2**31, 9, 3.0),
        (1, 5, 0, 3.0),
        (1, 5, 2**24 + 1, 3.0),
        (1, 5, 9, 0.0),
    ],
)
def test_sizes_out_of_range_are_refused_by_plif(rows, classes, cells, bound):
    f = emulated_cuda.Plif(None, cells, bound)
    row = emulated_cuda.Rows(None, rows, classes, 1, classes, 0)
    assert_refused(emulated_cuda.PlifCeForward(f, row))
    assert_refused(emulated_cuda.PlifCeBackward(f, None, None, row))
    columns = emulated_cuda.PlifColumns(None, None, cells, bound)
    forward = emulated_cuda.Forward(row, 0, 2)
    assert_refused(emulated_cuda.PlifTopkForward(forward, columns))
    backward = emulated_cuda.Backward(count=rows, classes=classes, k=2)
    assert_refused(emulated_cuda.PlifTopkBackward(backward, columns))
    if (rows, classes) == (1, 5):
        assert_refused(emulated_cuda.PlifForward(f, elements=5))
        assert_refused(emulated_cuda.PlifBackward(f, elements=5))


def test_what_reduce_refuses():
    """Losses of 16 bits, and more rows than a grid has."""
    assert_refused(emulated_cuda.ReduceForward(dtype=1))
    assert_refused(emulated_cuda.ReduceBackward(dtype=2, rows=1))
    assert_refused(emulated_cuda.ReduceBackward(rows=2**41))


def test_more_elements_of_plif_than_a_grid_has_are_refused():
    f, too_many = emulated_cuda.Plif(None, 9, 3.0), 2**31 * 1024
    assert_refused(emulated_cuda.PlifForward(f, elements=too_many))
    assert_refused(emulated_cuda.PlifBackward(f, elements=too_many))


@pytest.mark.parametrize(
    "cells, bound, dtype", [(0, 3.0, 0), (2**24 + 1, 3.0, 0), (9, 0.0, 0), (9, 3.0, 1)]
)
def test_what_tables_and_dslopes_of_plif_refuse(cells, bound, dtype):
    """Tables of 16 bits too."""
    assert_refused(emulated_cuda.PlifTables(cells=cells, bound=bound, dtype=dtype))
    assert_refused(emulated_cuda.PlifDslopes(cells=cells, bound=bound, dtype=dtype))
    if dtype:
        assert_refused(emulated_cuda.PlifScale(dtype=dtype))


def assert_refused(arguments):
    with pytest.raises(RuntimeError, match="^the launch was refused$"):
        emulated_cuda.run(arguments)


@pytest.mark.parametrize("filler", cases.FILLERS)
@pytest.mark.parametrize(
    "dtype, classes",
    [(torch.bfloat16, 9001), (torch.float32, 4603), (torch.float64, 2307)],
    ids=str,
)
def test_rows_of_several_tiles(dtype, classes, filler):
    """Whatever comes first or last in a row, the bound of its earlier tiles loses nothing."""
    logits = cases.logits(filler, 2, classes, dtype)
    for z in (logits, logits.flip(-1)):
        _, _, indices, _ = emulated_cuda.topk_ce_fwd(
            z.contiguous(), torch.zeros(2, dtype=torch.int64), None, 20, 0.0
        )
        expected = z.double().sort(descending=True, stable=True).indices[:, :20]
        assert (indices == expected).all()
