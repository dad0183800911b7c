"""The Triton kernels compiled ahead of time for a GPU that need not be there, and their code.

``python tests/aot.py`` compiles every row of the tuning table for sm_90 and writes registers and
instruction counts into tests/triton_resources.json, under the version of Triton that runs it.
``python tests/aot.py fwd bfloat16 128256 20 --arch 80 --sass`` prints one kernel.
"""

import argparse
import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sass
import torch
import triton
from sparse_ce.triton_kernels import (
    cosine,
    labels_ce,
    plif,
    plif_tables,
    reduce,
    short_rows,
    softmax,
    sparse_linear,
    tail,
    threshold_ce,
    topk_ce,
)
from sparse_ce.triton_kernels.rows import warps
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

RESOURCES = Path(__file__).with_name("triton_resources.json")
VERSION = ".".join(triton.__version__.split(".")[:2])
TYPES = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}
ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}
LONG_ROW = 128256

# Types of arguments; of others, a pointer is to float32, the logits excepted, and a number int32.
_ARGUMENTS = {
    "target_ptr": "*i64",
    "indices_ptr": "*i32",
    "draws_ptr": "*i32",
    "quotas_ptr": "*i64",
    "best_ptr": "*i64",
    "found_ptr": "*i16",  # but of fwd
    "list_ptr": "*i64",
    "pieces_ptr": "*i32",
    "places_ptr": "*i16",
    "pending_ptr": "*i32",
    "stride_b": "i64",
    "stride_t": "i64",
    "label_smoothing": "fp32",
    "classes_ptr": "*i32",
    "tokens_ptr": "*i32",
    "starts_ptr": "*i64",
    "cells_ptr": "*i64",
    "outside_ptr": "*fp64",
    "scale_ptr": "*fp64",
    "maxima_ptr": "*i64",
    "parts_ptr": "*i64",
    "lse_stride": "i64",
    "unit": "fp64",
    "tiny": "fp64",
    "width": "fp64",
    "bound": "fp32",
    "rate": "fp32",
    "cut_index_ptr": "*i32",
    "labels_ptr": "*u8",
    "kept_ptr": "*i32",
    "delta": "fp32",
    "units_b": "i64",
    "units_t": "i64",
}
# Those of the dtype of the case, and those that a launch finds to be multiples of 16.
_OF_DTYPE = (
    "x_ptr", "y_ptr", "dy_ptr", "dx_ptr", "w_ptr",
    "logits_ptr", "dlogits_ptr", "weight_ptr", "hidden_ptr", "dhidden_ptr", "dweight_ptr",
    "output_ptr", "doutput_ptr", "embedding_ptr",
)  # fmt: skip
LINEAR = ("dhidden", "piece", "dweight")
# dense where k is the number of classes; k = 0 stands for delta
THRESHOLD = ("threshold_fwd", "threshold_bwd")
TAIL = ("tail_fwd",)
LABELS = ("labels_fwd", "labels_bwd")
PLIF = ("plif_fwd", "plif_bwd", "plif_ce_fwd", "plif_ce_bwd")
LISTED = ("plif_topk_fwd", "plif_topk_bwd")
# of float32 but for w, whatever the classes
TABLES = (
    "plif_slopes", "plif_steps", "plif_offsets", "plif_masses", "plif_dslopes", "plif_scale",
    "plif_join",
)  # fmt: skip
COSINE = ("cosine_fwd", "cosine_bwd")  # num_classes is the width of the vectors

SHORT = ("few", "short_fwd", "short_bwd")
REDUCE = ("reduce_fwd", "reduce_join", "reduce_bwd")  # of float32, whatever the classes


def module_of(kernel: str) -> Any:
    modules = dict.fromkeys(LINEAR, sparse_linear) | dict.fromkeys(THRESHOLD, threshold_ce)
    modules |= dict.fromkeys(COSINE, cosine) | dict.fromkeys((*PLIF, *LISTED), plif)
    modules |= dict.fromkeys(LABELS, labels_ce) | dict.fromkeys(REDUCE, reduce)
    modules |= dict.fromkeys(TABLES, plif_tables) | dict.fromkeys(TAIL, tail)
    modules |= dict.fromkeys(SHORT, short_rows)
    return modules.get(kernel, topk_ce)


@dataclass(frozen=True)
class Case:
    """One kernel at one problem. Its options are those that the launchers choose."""

    kernel: str
    dtype: str
    num_classes: int
    k: int
    aligned: bool = True
    full: bool = False  # with every option: weights, smoothing, all upstream gradients
    loss: bool = True  # backward from the loss; False: from lse alone
    changes: tuple[tuple[str, Any], ...] = ()  # of options, or a pointer that is None

    def __str__(self) -> str:
        flags = ("" if self.aligned else " unaligned") + (" full" if self.full else "")
        flags += "" if self.loss else " lse"
        flags += "".join(f" {name}={value}" for name, value in self.changes)
        return f"{self.kernel} {self.dtype} V={self.num_classes} k={self.k}{flags}"

    def options(self) -> dict[str, Any]:
        return {**self._options(), **dict(self.changes)}

    def _options(self) -> dict[str, int]:
        itemsize = ITEMSIZE[self.dtype]
        if self.kernel in LINEAR:  # num_classes is the width of their rows
            config = sparse_linear.options(self.num_classes, itemsize, sparse_linear.FEW)
            return config if self.kernel == "dhidden" else {**config, "PIECE": sparse_linear.PIECE}
        if self.kernel in COSINE:
            config = cosine.options(cosine.unit(self.num_classes), itemsize)
            return config | ({"NORMALIZE": True} if self.kernel == "cosine_fwd" else {})
        if self.kernel in REDUCE:
            fwd = {"HAS_WEIGHT": self.full, "ALONE": True}
            options = {"reduce_fwd": fwd | {"MEAN": True}, "reduce_join": {"MEAN": True}}
            return reduce.options(self.kernel[7:]) | options.get(self.kernel, {})
        if self.kernel in TABLES:
            given = dict.fromkeys(("HAS_DLSE", "HAS_DPROBS", "HAS_WEIGHT"), self.full)
            scale = {"ALONE": not self.full, "HAS_DLOSS": True, **given}
            options = plif_tables.options(self.kernel[5:], self.full)
            return options | (scale if self.kernel == "plif_scale" else {})
        if self.kernel in TAIL:
            given = {"ALIGNED": self.aligned, "HAS_UNIFORM": True}
            return tail.options(itemsize, self.num_classes) | given
        if self.kernel in LABELS:
            alike = {"ALIKE": True} if self.kernel == "labels_bwd" else {}
            alike |= {"ALIGNED": self.aligned, "LABELS_ALIKE": True}
            return softmax.lane_options(itemsize, self.num_classes) | alike
        shared = {"HAS_WEIGHT": self.full, "HAS_SMOOTHING": self.full}
        if self.kernel in ("plif_fwd", "plif_bwd"):  # num_classes is the number of elements
            learns = {"LEARNS": True} if self.kernel == "plif_bwd" else {}
            return {"BLOCK": plif.BLOCK, **warps(4), **learns}
        if self.kernel in PLIF:
            shared |= {"ALIGNED": self.aligned}
            if self.kernel == "plif_ce_bwd":
                shared |= {"HAS_DLOSS": self.loss, "HAS_DLSE": self.full or not self.loss}
                shared |= {"ALIKE": True, "LEARNS": True}
            return {**softmax.lane_options(itemsize, self.num_classes), **shared}
        if self.kernel in THRESHOLD:
            shared |= {"ALIGNED": self.aligned}
            if self.kernel == "threshold_fwd":
                shared |= {
                    "KEEP": threshold_ce.keep_of(
                        self.k or self.num_classes, self.num_classes, 0.1 if self.k == 0 else 1.0
                    )
                }
            else:
                shared |= {"HAS_DLOSS": self.loss, "HAS_DLSE": self.full or not self.loss}
                shared |= {"ALIKE": True}
            return {**softmax.lane_options(itemsize, self.num_classes), **shared}
        upstream = {"HAS_DLOSS": self.loss, "HAS_DPROBS": self.full}
        upstream["HAS_DLSE"] = self.full or not self.loss
        if self.kernel in LISTED:
            upstream |= {"LEARNS": True}
            backward = upstream if self.kernel == "plif_topk_bwd" else {}
            return {**plif.list_options(self.k), **shared, **backward}
        if self.kernel == "bwd":
            aligned = {"ALIGNED": self.aligned}
            return {
                **topk_ce.bwd_options(itemsize, self.num_classes, self.k),
                **upstream,
                **shared,
                **aligned,
            }
        if self.kernel == "short_bwd":
            options = short_rows.short_bwd_options(itemsize, self.num_classes, self.k)
            return {**options, **upstream, **shared}
        if self.kernel == "merge":
            return {**topk_ce.merge_options(self.num_classes), **shared}
        if self.kernel == "short_fwd":
            options = short_rows.short_fwd_options(itemsize, self.num_classes, self.k)
            return {**options, "ALIGNED": self.aligned, **shared}
        if self.kernel == "few":
            return {**short_rows.few_options(self.num_classes, self.k), **shared}
        if self.kernel == "exact":
            return {**topk_ce.exact_options(self.k), "SPLIT": False, **shared}
        selection = topk_ce.fwd_selection(itemsize, self.num_classes, self.k)
        return {**selection.options(), "ALIGNED": self.aligned, "SPLIT": False, **shared}


def tuning_cases() -> list[Case]:
    """One per row of the tuning table: its longest rows, and a k below its largest."""
    cases = []
    for row in topk_ce.TUNING:
        dtype = "bfloat16" if row.itemsize == 2 else "float32"
        k = {32: 20, 128: 100, 1024: 1000}[row.max_k]
        cases.append(Case("fwd", dtype, min(row.max_v, LONG_ROW), k))
    return cases


def compile_case(case: Case, architecture: int) -> sass.Report:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled(case, architecture).asm["cubin"])
        file.flush()
        (report,) = sass.read(Path(file.name)).values()
    return report


def compiled(case: Case, architecture: int | GPUTarget) -> Any:
    """For a compute capability of NVIDIA's, or for another maker's target."""
    module = module_of(case.kernel)
    stem = r"^(plif|threshold|labels|cosine|reduce|tail)_"
    kernel = getattr(module, f"_{re.sub(stem, '', case.kernel)}_kernel")
    options = case.options()
    launch = {name: options.pop(name) for name in warps(1)}
    signature = {}
    for parameter in kernel.params:
        name = parameter.name
        if name in options:
            signature[name] = "constexpr"
        elif name in _OF_DTYPE and not (name == "weight_ptr" and module is not sparse_linear):
            signature[name] = TYPES[case.dtype]
        else:
            signature[name] = _ARGUMENTS.get(name, "*fp32" if name.endswith("_ptr") else "i32")
    if case.kernel == "fwd":
        sizes = (ITEMSIZE[case.dtype], case.num_classes, options["SORT"], options["SPLIT"])
        packed = topk_ce.list_dtype(*sizes)
        signature["found_ptr"] = {torch.int32: "*i32", torch.int64: "*i64"}[packed]
    attributes = {}
    if module in (sparse_linear, cosine):
        aligned = (i for i, kind in enumerate(signature.values()) if kind[0] == "*")
        attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=options, attrs=attributes)
    if isinstance(architecture, int):
        architecture = GPUTarget("cuda", architecture, 32)
    return triton.compile(source, target=architecture, options=launch)


# They depend on the data: the range of the bound in bfloat16 keys is some 2^10 wide.
BISECTION_STEPS = 12


def row_instructions(case: Case, report: sass.Report) -> int:
    """Warp-instructions that a row issues, an estimate: what is jumped over counts as well."""
    options = case.options()
    if case.kernel == "short_fwd":
        return round(_short_instructions(case, report) / options["ROWS"])
    threads = 32 * options["num_warps"]
    chunks = case.num_classes * ITEMSIZE[case.dtype] // 16
    issued = float(report.straight)
    if case.kernel == "bwd":
        issued += report.per_chunk("STG.E.128") * chunks / threads
    if case.kernel == "fwd":
        issued += report.per_chunk("LDG.E.128") * chunks / threads
        tiles = -(-chunks // options["NSEG"])
        pieces = (case.k + case.k // 8) * tiles
        second_look = max(report.loops, key=lambda loop: loop.count("ATOM")).instructions
        issued += -(-pieces // (options["BLOCK"] // options["PIECE"])) * second_look
        bisection = min(loop.instructions for loop in report.loops if loop.count("LDG") == 0)
        issued += BISECTION_STEPS * bisection
    return round(issued * options["num_warps"])


def _short_instructions(case: Case, report: sass.Report) -> float:
    """Those of a program of _short_fwd_kernel. With normal logits and k = 20 the bisection of eight
    rows takes 6.5 steps (6.7 of four rows with k = 100), the fullest word has 7.2 bits, the longest
    of eight lists 27.6 places.
    """
    options = case.options()
    lanes = 32 // options["ROWS"]
    tile = short_rows.EACH.value * lanes
    chunks = case.num_classes * ITEMSIZE[case.dtype] // 16
    whole = chunks // tile
    places = 1.25 * case.k + 3
    full, masked = (x.instructions for x in report.loops if x.count("LDG.E.128"))
    others = [x for x in report.loops if not x.count("LDG.E.128")]
    bisection = next(x for x in others if not x.count("STG")).instructions
    bits = next(x for x in others if x.count("STG") and not x.count("LDG")).instructions
    # where a step has room for a whole list, it is no loop
    looks = [x.instructions for x in others if x.count("STG") and x.count("LDG")]
    issued = report.straight + whole * full + (-(-chunks // tile) - whole) * masked
    issued += 7 * bisection + 7 * bits
    return issued + -(-places // (options["SLOTS"] * lanes)) * sum(looks)


def resources(case: Case, report: sass.Report) -> dict[str, float]:
    access = "STG.E.128" if case.kernel == "bwd" else "LDG.E.128"
    if case.kernel in TAIL:  # the softmax, the look that adds up integers, and that at the draws
        writing = [x for x in report.loops if x.count("MUFU") and x.count("STG")]
        second = [x.instructions / x.count(access) for x in writing if x.count(access)]
        draws = max(x.instructions for x in writing if not x.count(access))
        draws *= case.options()["num_warps"] / case.options()["DRAWS"]
        looks = {"per_chunk": round(report.per_chunk(access), 2), "second_look": min(second)}
        return {"registers": report.registers, **looks, "per_draw": draws}
    if case.kernel in (*THRESHOLD, *LABELS, *PLIF):
        return {"registers": report.registers, "per_chunk": round(report.per_chunk("LDG.E.128"), 2)}
    if case.kernel in TABLES:
        return {"registers": report.registers, "instructions": report.operations.total()}
    if case.kernel == "short_fwd":
        return {"registers": report.registers, "per_row": row_instructions(case, report)}
    if case.kernel in (*LISTED, *SHORT):  # a row, or several, are one tile
        per_row = report.straight / case.options().get("ROWS", 1)
        return {"registers": report.registers, "per_row": round(per_row)}
    if case.kernel in COSINE:
        return {
            "registers": report.registers,
            "per_step": max(x.instructions for x in report.loops),
        }
    if case.kernel in LINEAR:  # how many pairs there are is up to the data
        return {"registers": report.registers, "per_step": report.streaming(access).instructions}
    return {
        "registers": report.registers,
        "per_chunk": round(report.per_chunk(access), 2),
        "per_row": row_instructions(case, report),
    }


def recorded_cases() -> list[Case]:
    """What triton_resources.json records, on sm_90."""
    linear = [Case(name, dtype, 4096, 20) for name in LINEAR for dtype in ("bfloat16", "float32")]
    dense = [Case(name, dtype, LONG_ROW, LONG_ROW) for name in THRESHOLD for dtype in TYPES]
    labelled = [
        Case(name, dtype, LONG_ROW, LONG_ROW)
        for name in (*TAIL, *LABELS)
        for dtype in ("bfloat16", "float32")
    ]
    linked = [
        Case(name, dtype, LONG_ROW, LONG_ROW)
        for name in ("plif_ce_fwd", "plif_ce_bwd")
        for dtype in ("bfloat16", "float32")
    ]
    linked += [Case(name, "bfloat16", LONG_ROW, k) for name in LISTED for k in (20, 1000)]
    tables = [Case(name, "float32", 1, 1) for name in TABLES]
    tables.append(Case("plif_scale", "float32", 1, 1, full=True))
    backward = [Case("bwd", dtype, LONG_ROW, 20) for dtype in TYPES]
    short = [Case("few", "bfloat16", 100, 20), Case("few", "float32", 60, 20)]
    short += [Case("short_bwd", dtype, 100, 20) for dtype in ("bfloat16", "float32")]
    for dtype, size in (("bfloat16", 1000), ("bfloat16", 4096), ("float32", 1000)):
        short += [Case("short_fwd", dtype, size, k) for k in (20, 100)]
    vectors = [Case(name, dtype, 300, 1) for name in COSINE for dtype in ("bfloat16", "float32")]
    listed = [*tuning_cases(), *backward, *short]
    return [*listed, *linear, *dense, *labelled, *linked, *tables, *vectors]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("case", nargs="*", help="kernel dtype V k; default: all, into the file")
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--unaligned", action="store_true")
    parser.add_argument("--full", action="store_true", help="with every option")
    parser.add_argument("--sass", action="store_true")
    arguments = parser.parse_args()
    if arguments.case:
        kernel, dtype, num_classes, k = arguments.case
        case = Case(
            kernel, dtype, int(num_classes), int(k), not arguments.unaligned, arguments.full
        )
        report = compile_case(case, arguments.arch)
        print(report.sass if arguments.sass else "")
        sizes = [loop.instructions for loop in report.loops]
        print(f"{case}: {report.registers} registers, {report.spills()} spills, loops {sizes}")
        return
    table = json.loads(RESOURCES.read_text()) if RESOURCES.exists() else {}
    table[VERSION] = {
        str(case): resources(case, compile_case(case, 90)) for case in recorded_cases()
    }
    lines = []
    for version in sorted(table):
        rows = ",\n".join(
            f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in table[version].items()
        )
        lines.append(f"  {json.dumps(version)}: {{\n{rows}\n  }}")
    RESOURCES.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
