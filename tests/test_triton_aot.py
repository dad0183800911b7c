"""The machine code of the Triton kernels, compiled ahead of time: without a GPU, so without times.

On sm_90 every row of the tuning table, on the other architectures a few. The kernels must not
spill, must move the logits in accesses of 16 bytes, and must not grow: triton_resources.json holds
registers and instruction counts per Triton version; ``python tests/aot.py`` writes it anew.
``SPARSE_CE_AOT=full`` takes every case to every architecture (half an hour).
"""

import json
import os
import re

import pytest
import sass
import subjects

pytest.importorskip("triton", reason="the package triton is not installed")
if subjects.INTERPRETING:
    pytest.skip("TRITON_INTERPRET replaces the compiler", allow_module_level=True)

import aot  # noqa: E402  (imports triton)
from ptx import parse  # noqa: E402
from triton.backends import backends  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

RECORDED = aot.recorded_cases()
UNALIGNED = [aot.Case("fwd", dtype, 50257, 20, aligned=False) for dtype in aot.TYPES]
OTHERS = [
    *UNALIGNED,
    aot.Case("bwd", "bfloat16", 50257, 20, aligned=False),
    aot.Case("fwd", "float16", aot.LONG_ROW, 20),
    aot.Case("fwd", "bfloat16", aot.LONG_ROW, 100, full=True),
    aot.Case("bwd", "bfloat16", aot.LONG_ROW, 1000, full=True),
    aot.Case("bwd", "float32", aot.LONG_ROW, 100, loss=False),
    aot.Case("few", "float16", 128, 32, full=True),
    # of each number of rows to a program
    aot.Case("short_fwd", "float16", 2047, 32, aligned=False, full=True),
    aot.Case("short_fwd", "bfloat16", 8192, 128, full=True),
    aot.Case("short_fwd", "float32", 4095, 128, aligned=False),
    aot.Case("short_fwd", "float32", 257, 64, aligned=False),
    aot.Case("short_fwd", "float32", 65, 5, aligned=False),
    aot.Case("few", "bfloat16", 128, 128, full=True),
    aot.Case("few", "float32", 1000, 1000, full=True),
    aot.Case("few", "float32", 2048, 1024, full=True),
    aot.Case("short_bwd", "float32", 512, 20, full=True),
    aot.Case("merge", "bfloat16", 2048, 20, full=True),
    aot.Case("exact", "bfloat16", aot.LONG_ROW, 20),
    aot.Case("exact", "float32", aot.LONG_ROW, 1000),
    aot.Case("threshold_fwd", "bfloat16", aot.LONG_ROW, 5000, full=True),
    aot.Case("threshold_bwd", "bfloat16", aot.LONG_ROW, 5000, full=True),
    aot.Case("threshold_fwd", "bfloat16", aot.LONG_ROW, 0),
    aot.Case("threshold_fwd", "float32", 50257, 0, aligned=False),
    aot.Case("threshold_fwd", "bfloat16", 50257, 50257, aligned=False, full=True),
    aot.Case("threshold_bwd", "bfloat16", 50257, 50257, aligned=False),
    aot.Case("tail_fwd", "bfloat16", 50257, 50257, aligned=False),
    # of one, two and four warps
    aot.Case("tail_fwd", "float32", 203, 203, aligned=False),
    aot.Case("tail_fwd", "float32", 204, 204),
    aot.Case("tail_fwd", "bfloat16", 1000, 1000, aligned=False),
    aot.Case("tail_fwd", "float16", 2048, 2048),
    aot.Case("labels_fwd", "bfloat16", 50257, 50257, aligned=False),
    aot.Case("labels_bwd", "float32", 50257, 50257, aligned=False),
    aot.Case("plif_ce_fwd", "bfloat16", 50257, 50257, aligned=False, full=True),
    aot.Case("plif_ce_bwd", "bfloat16", 50257, 50257, aligned=False, full=True),
    aot.Case("plif_topk_fwd", "float32", aot.LONG_ROW, 100, full=True),
    aot.Case("plif_topk_bwd", "float16", aot.LONG_ROW, 1024, full=True),
    aot.Case("plif_fwd", "bfloat16", aot.LONG_ROW, aot.LONG_ROW),
    aot.Case("plif_bwd", "float32", aot.LONG_ROW, aot.LONG_ROW),
    aot.Case("plif_slopes", "bfloat16", 1, 1),
    aot.Case("plif_slopes", "float16", 1, 1),
    aot.Case("cosine_fwd", "float32", 33, 1),
    aot.Case("cosine_bwd", "bfloat16", 4096, 1),
    *(
        aot.Case(
            name, dtype, 4096, 20, changes=tuple(aot.sparse_linear.options(4096, size, 1).items())
        )
        for name in aot.LINEAR
        for dtype, size in aot.ITEMSIZE.items()
    ),
    *(aot.Case(name, "float32", 1, 1, full=True) for name in aot.REDUCE),
]
# what else a launch may ask for: a pointer that is None is another kernel to Triton
PLAIN = (("weight_ptr", None),)
SPLIT = (("SPLIT", True), *PLAIN)
VARIANTS = [
    aot.Case("fwd", "bfloat16", aot.LONG_ROW, 20, changes=SPLIT),
    aot.Case("exact", "bfloat16", aot.LONG_ROW, 20, changes=SPLIT),
    aot.Case("merge", "bfloat16", 2048, 20, changes=PLAIN),
    aot.Case("few", "bfloat16", 10, 5, changes=PLAIN),
    aot.Case(
        "short_bwd", "float16", 10, 5, changes=(*PLAIN, ("dlse_ptr", None), ("dprobs_ptr", None))
    ),
    aot.Case(
        "short_bwd", "bfloat16", 100, 20, loss=False,
        changes=(*PLAIN, ("dloss_ptr", None), ("dprobs_ptr", None)),
    ),
    aot.Case("few", "bfloat16", 2048, 1024, changes=PLAIN),
    aot.Case(
        "bwd", "bfloat16", 50257, 20, changes=(*PLAIN, ("dlse_ptr", None), ("dprobs_ptr", None))
    ),
    aot.Case("threshold_fwd", "float32", aot.LONG_ROW, 5000, changes=PLAIN),
    aot.Case("threshold_fwd", "bfloat16", aot.LONG_ROW, 0, full=True),
    aot.Case(
        "threshold_fwd", "bfloat16", aot.LONG_ROW, aot.LONG_ROW,
        changes=(("HAS_SMOOTHING", True), *PLAIN),
    ),
    aot.Case(
        "threshold_bwd", "bfloat16", 50257, 50257, aligned=False, loss=False,
        changes=(*PLAIN, ("ALIKE", False), ("dloss_ptr", None)),
    ),
    aot.Case(
        "tail_fwd", "float16", 50257, 50257, aligned=False,
        changes=(("HAS_UNIFORM", False), ("uniform_ptr", None)),
    ),
    aot.Case(
        "labels_bwd", "bfloat16", 50257, 50257, aligned=False,
        changes=(("ALIKE", False), ("LABELS_ALIKE", False)),
    ),
    aot.Case("plif_bwd", "bfloat16", 4096, 4096, changes=(("LEARNS", False), ("scale_ptr", None))),
    aot.Case(
        "plif_ce_bwd", "bfloat16", 50257, 50257, aligned=False, loss=False,
        changes=(
            ("LEARNS", False), ("scale_ptr", None), ("ALIKE", False), ("dloss_ptr", None),
            ("class_weight_ptr", None), ("weights_ptr", None),
        ),
    ),
    aot.Case("plif_topk_fwd", "bfloat16", 50257, 20, changes=(("class_weight_ptr", None),)),
    aot.Case(
        "plif_topk_bwd", "float32", 50257, 20, loss=False,
        changes=(
            ("LEARNS", False), ("scale_ptr", None), ("dloss_ptr", None), ("dprobs_ptr", None),
            ("class_weight_ptr", None),
        ),
    ),
    aot.Case(
        "plif_scale", "float32", 1, 1,
        changes=(
            ("dlse_ptr", None), ("dprobs_ptr", None), ("at_most_ptr", None), ("maxima_ptr", None),
        ),
    ),
    aot.Case(
        "plif_scale", "float32", 1, 1, full=True,
        changes=(("HAS_DLOSS", False), ("dloss_ptr", None)),
    ),
    aot.Case(
        "plif_scale", "float32", 1, 1,
        changes=(
            ("HAS_DLOSS", False), ("dloss_ptr", None), ("HAS_DLSE", True), ("dprobs_ptr", None),
            ("at_most_ptr", None), ("maxima_ptr", None),
        ),
    ),
    *(aot.Case(name, "float32", width, 20) for name in aot.LINEAR for width in (1, 4097)),
    *(
        aot.Case("reduce_fwd", "float32", 1, 1, changes=(("MEAN", mean), *PLAIN, *rest))
        for mean in (True, False)
        for rest in ((("sums_ptr", None),), (("ALONE", False),))
    ),
    aot.Case("reduce_fwd", "float32", 1, 1, full=True, changes=(("ALONE", False),)),
    aot.Case(
        "reduce_fwd", "float32", 1, 1, full=True, changes=(("MEAN", False), ("sums_ptr", None))
    ),
    aot.Case("reduce_join", "float32", 1, 1, changes=(("MEAN", False),)),
]  # fmt: skip
SELECTED = [
    aot.Case("fwd", "bfloat16", aot.LONG_ROW, 20),
    aot.Case("fwd", "float32", aot.LONG_ROW, 100),
    aot.Case("short_fwd", "bfloat16", 1000, 20),
    aot.Case("bwd", "bfloat16", aot.LONG_ROW, 20),
    aot.Case("threshold_fwd", "bfloat16", aot.LONG_ROW, aot.LONG_ROW),
    aot.Case("tail_fwd", "bfloat16", aot.LONG_ROW, aot.LONG_ROW),
    aot.Case("labels_fwd", "bfloat16", aot.LONG_ROW, aot.LONG_ROW),
    aot.Case("plif_ce_bwd", "bfloat16", aot.LONG_ROW, aot.LONG_ROW),
    aot.Case("plif_slopes", "float32", 1, 1),
    aot.Case("plif_offsets", "float32", 1, 1),
    aot.Case("cosine_fwd", "float32", 300, 1),
    aot.Case("dweight", "bfloat16", 4096, 20),
]
ELSEWHERE = [architecture for architecture in sass.ARCHITECTURES if architecture != 90]
FULL = os.environ.get("SPARSE_CE_AOT") == "full"
MATRIX = [(case, 90) for case in [*RECORDED, *OTHERS, *VARIANTS]]
MATRIX += [
    (case, arch) for arch in ELSEWHERE for case in ([*RECORDED, *OTHERS] if FULL else SELECTED)
]


@pytest.mark.parametrize(
    "case, architecture", MATRIX, ids=[f"{case} sm_{arch}" for case, arch in MATRIX]
)
def test_compiled(case: aot.Case, architecture: int) -> None:
    report = aot.compile_case(case, architecture)
    assert (report.stack, report.local, report.spills()) == (0, 0, 0)
    alike = case.options().get("ALIKE", True)
    if case.kernel in (*aot.THRESHOLD, *aot.PLIF) and case.k in (0, case.num_classes) and alike:
        # as rows stream past no thread waits for another: it has its own classes, and keeps them
        streaming = [loop for loop in report.loops if loop.count("LDG.E.128")]
        assert not any(loop.count("BAR") or loop.count("SHFL") for loop in streaming)
    if case in VARIANTS:
        return
    if case.kernel == "fwd":
        # all logits of the streaming pass come in 16 bytes at a time: no narrower load in its loop
        loop = report.streaming("LDG.E.128")
        assert loop.count("LDG.E.128") == loop.count("LDG") >= 4
    if case.kernel == "short_fwd":
        # as above; the bits of a word are taken one by one, with no look at memory
        assert all(loop.count("LDG") == 8 for loop in report.loops if loop.count("LDG.E.128"))
        assert any(loop.count("STG") and not loop.count("LDG") for loop in report.loops)
    if case.kernel == "bwd":
        loop = report.streaming("STG.E.128")
        assert loop.count("STG.E.128") == loop.count("STG") >= 4
    if case.kernel in ("threshold_fwd", *aot.TAIL):
        # two chunks at a time, or four looks at once where keys are counted
        loop = report.streaming("LDG.E.128")
        assert loop.count("LDG.E.128") == loop.count("LDG") >= 2
    if case.kernel == "threshold_bwd":
        loop = report.streaming("STG.E.128")
        assert loop.count("STG.E.128") == loop.count("STG") >= 1
        assert loop.count("LDG.E.128") >= 1
    if case.kernel in aot.LABELS:
        # a chunk of logits, and its labels in one access
        loop = report.streaming("LDG.E.128")
        assert loop.count("LDG.E.128") * 2 == loop.count("LDG") >= 2
        assert loop.count("STG.E.128") == (case.kernel == "labels_bwd")
    if case.kernel in ("plif_ce_fwd", "plif_ce_bwd"):
        # besides the logits the loop loads lines of the table, one number at a time
        assert report.streaming("LDG.E.128").count("LDG.E.128") >= 1
    if case.kernel == "plif_ce_bwd" and case.aligned:
        assert report.streaming("STG.E.128").count("STG") == 1
    if case.kernel in aot.LINEAR:
        # rows are read 16 bytes at a time, all of a step before the first is added
        options = case.options()
        accesses = options["BLOCK_D"] // (32 * options["num_warps"] * options["UNIT"])
        assert report.in_flight("LDG.E.128") >= accesses * options["UNROLL"] >= 8
        # one rounding a pair, as in CUDA
        assert not any(name.startswith("FMUL") for name in report.operations)
        # no sum crosses threads, but what is stored in another width
        assert case.kernel == "piece" or report.shared == 0
    if case.kernel in aot.COSINE:
        # as wide as the width of the vectors allows: 300 numbers are units of four
        bits = (
            8
            * aot.ITEMSIZE[case.dtype]
            * min(aot.cosine.unit(case.num_classes), 16 // aot.ITEMSIZE[case.dtype])
        )
        access = "LDG.E" if bits == 32 else f"LDG.E.{bits}"
        loop = report.streaming(access)
        assert loop.count(access) == loop.count("LDG") >= 2
    if case in RECORDED and architecture == 90:
        _compare(case, aot.resources(case, report))


def _compare(case: aot.Case, now: dict[str, float]) -> None:
    recorded = json.loads(aot.RESOURCES.read_text()).get(aot.VERSION)
    # another version of Triton compiles otherwise; what it must not do is asserted above
    if recorded is not None:
        then = recorded[str(case)]
        assert now.keys() == then.keys()
        assert now.pop("registers") <= then.pop("registers") + sass.MARGIN_REGISTERS
        for name, instructions in now.items():
            assert instructions <= then[name] * sass.MARGIN_INSTRUCTIONS, name


# AMD's, and how many threads a warp has there.
AMD = {"gfx942": 64, "gfx1100": 32}
AMD_MATRIX = [(case, name) for name in AMD for case in (RECORDED if name == "gfx942" else SELECTED)]
if FULL:
    AMD |= {"gfx90a": 64, "gfx950": 64, "gfx1201": 32}
    AMD_MATRIX = [(case, name) for name in AMD for case in [*RECORDED, *OTHERS, *VARIANTS]]


@pytest.mark.skipif("amd" not in backends, reason="this Triton does not compile for AMD's GPUs")
@pytest.mark.parametrize(
    "case, name", AMD_MATRIX, ids=[f"{case} {name}" for case, name in AMD_MATRIX]
)
def test_compiled_for_amd(case: aot.Case, name: str) -> None:
    """No register is kept in memory, and the lists and their gradients move 16 bytes at a time;
    where a warp has 64 threads the looks of the dense softmax move 8. No more is known.
    """
    found = aot.compiled(case, GPUTarget("hip", name, AMD[name]))
    code = found.asm["amdgcn"]
    for number in ("vgpr_spill_count", "private_segment_fixed_size"):
        assert re.findall(rf"\.{number}: *(\d+)", code) == ["0"], number
    assert found.metadata.num_warps * AMD[name] <= 1024
    assert found.metadata.shared <= 1 << 16
    if case.kernel in ("fwd", "short_fwd", "bwd", *aot.LINEAR):
        access = "store" if case.kernel == "bwd" else "load"
        assert re.search(rf"\b(global|buffer)_{access}_(dwordx4|b128)\b", code)


TOPK = ("fwd", "exact", "merge", "bwd", *aot.SHORT)


def test_a_new_problem_compiles_nothing_new() -> None:
    """No number is specialised, nor an address in the kernels that get slices of the rows; the
    options, all that a kernel knows of k besides, are buckets.
    """
    linear = [getattr(aot.sparse_linear, f"_{name}_kernel") for name in aot.LINEAR]
    topk = [getattr(aot.module_of(name), f"_{name}_kernel") for name in TOPK]
    threshold = [getattr(aot.threshold_ce, f"_{name}_kernel") for name in ("fwd", "bwd")]
    tail = [aot.tail._fwd_kernel]
    labels = [getattr(aot.labels_ce, f"_{name}_kernel") for name in ("fwd", "bwd")]
    forms = ("fwd", "bwd", "ce_fwd", "ce_bwd", "topk_fwd", "topk_bwd")
    plif = [getattr(aot.plif, f"_{name}_kernel") for name in forms]
    names = [name.removeprefix("plif_") for name in aot.TABLES]
    tables = [getattr(aot.plif_tables, f"_{name}_kernel") for name in names]
    cosine = [getattr(aot.cosine, f"_{name}_kernel") for name in ("fwd", "bwd")]
    reduce = [getattr(aot.reduce, f"_{name}_kernel") for name in ("fwd", "join", "bwd")]
    for kernel in (*topk, *linear, *threshold, *tail, *labels, *plif, *tables, *cosine, *reduce):
        for parameter in kernel.params:
            number = not parameter.is_constexpr and not parameter.name.endswith("_ptr")
            # Triton specialises no float
            floats = ("label_smoothing", "delta", "bound", "rate")
            assert not number or parameter.do_not_specialize or parameter.name in floats
    for kernel in (*topk, *threshold, *tail, *labels, *plif[2:], *tables):
        assert all(p.do_not_specialize or p.is_constexpr for p in kernel.params)
    for name, bucket in (
        ("fwd", range(14, 33)), ("bwd", range(65, 129)), ("plif_topk_bwd", range(64, 128)),
    ):  # fmt: skip
        for num_classes in (1000, 5000, 32000, 128256):
            options = [aot.Case(name, "bfloat16", num_classes, k).options() for k in bucket]
            assert all(other == options[0] for other in options)


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("classes", [256, 5000], ids=["one_warp", "warps"])
@pytest.mark.parametrize("kernel", [*aot.TAIL, "threshold_fwd", "labels_fwd", "plif_ce_fwd"])
def test_lanes_of_a_warp_sum_alike(kernel: str, classes: int, aligned: bool) -> None:
    """In no sum of lanes is a product, rounded for the other lanes, added unrounded to theirs: each
    lane would end with another sum, and with other draws or another cut.
    """
    text = aot.compiled(aot.Case(kernel, "bfloat16", classes, classes, aligned), 90).asm["ptx"]
    of_others, sums = set(), 0
    for block in parse.parsed(text).blocks:
        for instruction in block.instructions:
            first, *rest = instruction.operands or (None,)
            if instruction.opcode == "shfl":
                of_others.add(first if isinstance(first, parse.Register) else first[0])
            elif instruction.opcode == "mov" and rest[0] in of_others:
                of_others.add(first)
            elif instruction.opcode in ("add", "fma") and "f32" in instruction.modifiers:
                sums += rest[-1] in of_others
                assert instruction.opcode == "add" or rest[-1] not in of_others, instruction.text
    assert sums >= 5


def test_records_are_of_the_table() -> None:
    names = {str(case) for case in RECORDED}
    for version, recorded in json.loads(aot.RESOURCES.read_text()).items():
        assert set(recorded) == names, f"{version}: python tests/aot.py"
