"""The backend `cuda` on CPU tensors: its kernels emulated, for tests. As the glue, on ctypes."""

import ctypes
import math
from functools import cache
from pathlib import Path

import emulation
import torch
from sparse_ce import backends, schema
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # as in rows.h
# What a kernel must not write to, on both sides of each of its outputs.
_MARGIN = 1024


class Rows(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("count", "classes", "inner")),
        *((name, ctypes.c_int64) for name in ("outer_stride", "inner_stride")),
    ]


class Forward(ctypes.Structure):
    _fields_ = [
        ("logits", Rows),
        ("dtype", ctypes.c_int),
        ("k", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("target", "weight")),
        ("label_smoothing", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("loss", "lse", "indices", "probs", "scratch")),
    ]


class Backward(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("dloss", "dlse", "dprobs")),
        *((name, ctypes.c_void_p) for name in ("target", "indices", "probs", "weight")),
        ("label_smoothing", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("count", "k", "classes")),
        ("dlogits", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
    ]


class ThresholdForward(ctypes.Structure):
    _fields_ = [
        ("logits", Rows),
        ("dtype", ctypes.c_int),
        ("k", ctypes.c_int64),
        ("delta", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("target", "weight")),
        ("label_smoothing", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("loss", "lse", "row_max", "log_sum", "cut")),
        *((name, ctypes.c_void_p) for name in ("cut_index", "kept")),
    ]


class ThresholdBackward(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("dloss", "dlse")),
        ("logits", Rows),
        ("dtype", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("target", "row_max", "log_sum", "cut")),
        *((name, ctypes.c_void_p) for name in ("cut_index", "kept", "weight")),
        ("label_smoothing", ctypes.c_double),
        ("dlogits", ctypes.c_void_p),
    ]


class Tail(ctypes.Structure):
    _fields_ = [
        ("logits", Rows),
        ("dtype", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("target", "indices")),
        ("k", ctypes.c_int64),
        ("uniform", ctypes.c_void_p),
        ("samples", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("row_max", "log_sum", "mass", "draws")),
    ]


class LabelsForward(ctypes.Structure):
    _fields_ = [
        ("logits", Rows),
        ("dtype", ctypes.c_int),
        ("labels", ctypes.c_void_p),
        ("delta", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("loss", "negative", "positive")),
        *((name, ctypes.c_void_p) for name in ("cut_negative", "cut_positive")),
    ]


class LabelsBackward(ctypes.Structure):
    _fields_ = [
        ("dloss", ctypes.c_void_p),
        ("logits", Rows),
        ("dtype", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("labels", "negative", "positive")),
        *((name, ctypes.c_void_p) for name in ("cut_negative", "cut_positive", "dlogits")),
    ]


class Gather(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("coefficients", "classes", "source")),
        ("source_dtype", ctypes.c_int),
        *((name, ctypes.c_int64) for name in ("tokens", "m", "width")),
        ("out", ctypes.c_void_p),
        ("out_dtype", ctypes.c_int),
    ]


class Segments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("coefficients", "sorted", "order", "starts")),
        ("source", ctypes.c_void_p),
        ("source_dtype", ctypes.c_int),
        *((name, ctypes.c_int64) for name in ("pairs", "m", "classes", "width")),
        *((name, ctypes.c_void_p) for name in ("scratch", "out")),
        ("out_dtype", ctypes.c_int),
    ]


class Table(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        *((name, ctypes.c_int64) for name in ("vectors", "stride")),
    ]


class CosineForward(ctypes.Structure):
    _fields_ = [
        ("output", Rows),
        ("dtype", ctypes.c_int),
        ("target", ctypes.c_void_p),
        ("table", Table),
        ("normalize", ctypes.c_bool),
        *((name, ctypes.c_void_p) for name in ("loss", "by_output", "by_target")),
    ]


class CosineBackward(ctypes.Structure):
    _fields_ = [
        ("dloss", ctypes.c_void_p),
        ("output", Rows),
        ("dtype", ctypes.c_int),
        ("target", ctypes.c_void_p),
        ("table", Table),
        *((name, ctypes.c_void_p) for name in ("by_output", "by_target", "doutput")),
    ]


class Plif(ctypes.Structure):
    _fields_ = [
        ("lines", ctypes.c_void_p),
        ("cells", ctypes.c_int64),
        ("bound", ctypes.c_double),
    ]


class PlifSums(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("scale", "cells", "outside")]


class PlifForward(ctypes.Structure):
    _fields_ = [
        ("f", Plif),
        ("x", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        ("elements", ctypes.c_int64),
        ("y", ctypes.c_void_p),
    ]


class PlifBackward(ctypes.Structure):
    _fields_ = [
        ("f", Plif),
        *((name, ctypes.c_void_p) for name in ("dy", "x")),
        ("dtype", ctypes.c_int),
        ("elements", ctypes.c_int64),
        ("dx", ctypes.c_void_p),
        ("sums", PlifSums),
    ]


class PlifCeForward(ctypes.Structure):
    _fields_ = [
        ("f", Plif),
        ("logits", Rows),
        ("dtype", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("target", "weight", "weights")),
        ("label_smoothing", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("loss", "lse", "row_max", "log_sum")),
    ]


class PlifCeBackward(ctypes.Structure):
    _fields_ = [
        ("f", Plif),
        *((name, ctypes.c_void_p) for name in ("dloss", "dlse")),
        ("logits", Rows),
        ("dtype", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("target", "row_max", "log_sum")),
        *((name, ctypes.c_void_p) for name in ("weight", "weights")),
        ("label_smoothing", ctypes.c_double),
        ("dlogits", ctypes.c_void_p),
        ("sums", PlifSums),
    ]


class PlifColumns(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("slopes", "offsets")),
        ("cells", ctypes.c_int64),
        ("bound", ctypes.c_double),
    ]


class PlifTopkForward(ctypes.Structure):
    _fields_ = [("list", Forward), ("f", PlifColumns), ("values", ctypes.c_void_p)]


class PlifTopkBackward(ctypes.Structure):
    _fields_ = [
        ("list", Backward),
        ("f", PlifColumns),
        ("values", ctypes.c_void_p),
        ("sums", PlifSums),
    ]


class PlifTables(ctypes.Structure):
    _fields_ = [
        ("w", ctypes.c_void_p),
        ("w_dtype", ctypes.c_int),
        ("cells", ctypes.c_int64),
        ("bound", ctypes.c_double),
        ("dtype", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("scratch", "slopes", "offsets")),
    ]


class PlifScale(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("dloss", "dlse", "dprobs")),
        ("dtype", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("target", "at_most", "lse")),
        *((name, ctypes.c_int64) for name in ("lse_stride", "rows", "k", "classes")),
        *((name, ctypes.c_void_p) for name in ("scratch", "scale")),
    ]


class PlifDslopes(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("sums", "outside", "scale")),
        ("cells", ctypes.c_int64),
        ("bound", ctypes.c_double),
        ("dtype", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("scratch", "dslopes")),
    ]


class ReduceForward(ctypes.Structure):
    _fields_ = [
        ("loss", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("target", "weight")),
        *((name, ctypes.c_int64) for name in ("rows", "classes", "ignore_index")),
        ("mean", ctypes.c_bool),
        *((name, ctypes.c_void_p) for name in ("scratch", "reduced", "divisor")),
    ]


class ReduceBackward(ctypes.Structure):
    _fields_ = [
        ("dreduced", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("target", "divisor")),
        *((name, ctypes.c_int64) for name in ("rows", "ignore_index")),
        ("dloss", ctypes.c_void_p),
    ]


_LAUNCHES = {
    Forward: "topk_ce_forward",
    Backward: "topk_ce_backward",
    ThresholdForward: "threshold_ce_forward",
    ThresholdBackward: "threshold_ce_backward",
    Tail: "tail_forward",
    LabelsForward: "labels_ce_forward",
    LabelsBackward: "labels_ce_backward",
    Gather: "sparse_linear_gather",
    Segments: "sparse_linear_segments",
    CosineForward: "cosine_forward",
    CosineBackward: "cosine_backward",
    PlifForward: "plif_forward",
    PlifBackward: "plif_backward",
    PlifCeForward: "plif_ce_forward",
    PlifCeBackward: "plif_ce_backward",
    PlifTopkForward: "plif_topk_ce_forward",
    PlifTopkBackward: "plif_topk_ce_backward",
    PlifTables: "plif_tables",
    PlifScale: "plif_scale",
    PlifDslopes: "plif_dslopes",
    ReduceForward: "reduce_forward",
    ReduceBackward: "reduce_backward",
}


def opened(path: Path) -> ctypes.CDLL:
    """The library of tests/cuda/emulated.cpp."""
    library = ctypes.CDLL(str(path))
    tables = ("plif_tables", "plif_scale", "plif_dslopes")
    for stem in ("topk_ce", "sparse_linear", "reduce", *tables):
        getattr(library, f"{stem}_scratch_bytes").restype = ctypes.c_int64
    for stem in ("plif", "plif_ce", "plif_topk_ce"):
        getattr(library, f"{stem}_outside_parts").restype = ctypes.c_int64
    for name in ("kernels_launched", *_LAUNCHES.values()):
        getattr(library, name).restype = ctypes.c_char_p
    return library


@cache
def _library() -> ctypes.CDLL:
    return opened(emulation.build_kernels())


def run(arguments: ctypes.Structure) -> None:
    error = getattr(_library(), _LAUNCHES[type(arguments)])(ctypes.byref(arguments))
    if error is not None:
        raise RuntimeError(error.decode())


class _Outputs:
    """Tensors within memory that a kernel must leave alone. What they hold at first is NaN."""

    def __init__(self) -> None:
        self._all: list[Tensor] = []

    def new(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        # whole lines, so that a row begins where it would in an allocation of its own
        memory = torch.full((size + 2 * _MARGIN,), 0xFF, dtype=torch.uint8)
        start = _MARGIN - memory.data_ptr() % 64
        self._all.append(memory)
        self._all.append(memory[start : start + size])
        return memory[start : start + size].view(dtype).view(shape)

    def check(self) -> None:
        for memory, inside in zip(self._all[::2], self._all[1::2], strict=True):
            start = inside.data_ptr() - memory.data_ptr()
            around = memory[:start], memory[start + inside.numel() :]
            assert all((part == 0xFF).all() for part in around), "a kernel wrote beyond its output"


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _rows(logits: Tensor) -> Rows:
    """As csrc/glue.h fills it."""
    *rows, classes = logits.shape
    outer_stride = logits.stride(0) if logits.dim() == 3 else 0
    strides = (outer_stride, logits.stride(-2))
    return Rows(logits.data_ptr(), math.prod(rows), classes, max(1, rows[-1]), *strides)


def _list(
    outputs: _Outputs,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    k: int,
    label_smoothing: float,
) -> tuple[Forward, tuple[Tensor, Tensor, Tensor, Tensor]]:
    leading, statistics = tuple(logits.shape[:-1]), schema.statistics_dtype(logits.dtype)
    loss, lse = outputs.new(leading, statistics), outputs.new(leading, statistics)
    indices = outputs.new((*leading, k), torch.int32)
    probs = outputs.new((*leading, k), statistics)
    arguments = Forward(
        _rows(logits), _DTYPES.index(logits.dtype), k, _pointer(target), _pointer(weight),
        label_smoothing, *map(_pointer, (loss, lse, indices, probs)),
    )  # fmt: skip
    scratch = outputs.new((_library().topk_ce_scratch_bytes(ctypes.byref(arguments)),), torch.uint8)
    arguments.scratch = scratch.data_ptr()
    return arguments, (loss, lse, indices, probs)


def topk_ce_fwd(
    logits: Tensor, target: Tensor, weight: Tensor | None, k: int, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = _Outputs()
    arguments, found = _list(outputs, logits, target, weight, k, label_smoothing)
    run(arguments)
    outputs.check()
    return found


def topk_ce_bwd(
    dloss: Tensor | None,
    dlse: Tensor | None,
    dprobs: Tensor | None,
    target: Tensor,
    indices: Tensor,
    probs: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
    num_classes: int,
    dtype: torch.dtype,
) -> Tensor:
    above = [None if d is None else d.contiguous() for d in (dloss, dlse, dprobs)]
    outputs = _Outputs()
    dlogits = outputs.new((*target.shape, num_classes), dtype)
    arguments = Backward(
        *map(_pointer, (*above, target, indices, probs, weight)), label_smoothing,
        target.numel(), indices.shape[-1], num_classes, dlogits.data_ptr(), _DTYPES.index(dtype),
    )  # fmt: skip
    run(arguments)
    outputs.check()
    return dlogits


def threshold_ce_fwd(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    k: int,
    delta: float,
    label_smoothing: float,
) -> tuple[Tensor, ...]:
    leading, outputs = tuple(logits.shape[:-1]), _Outputs()
    statistics = [outputs.new(leading, schema.statistics_dtype(logits.dtype)) for _ in range(5)]
    counts = [outputs.new(leading, torch.int32) for _ in range(2)]
    run(
        ThresholdForward(
            _rows(logits), _DTYPES.index(logits.dtype), k, delta, _pointer(target),
            _pointer(weight), label_smoothing, *map(_pointer, (*statistics, *counts)),
        )
    )  # fmt: skip
    outputs.check()
    return *statistics, *counts


def threshold_ce_bwd(
    dloss: Tensor | None,
    dlse: Tensor | None,
    logits: Tensor,
    target: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    cut: Tensor,
    cut_index: Tensor,
    kept: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
) -> Tensor:
    above = [None if d is None else d.contiguous() for d in (dloss, dlse)]
    outputs = _Outputs()
    dlogits = outputs.new(tuple(logits.shape), logits.dtype)
    saved = (target, row_max, log_sum, cut, cut_index, kept, weight)
    run(
        ThresholdBackward(
            *map(_pointer, above), _rows(logits), _DTYPES.index(logits.dtype),
            *map(_pointer, saved), label_smoothing, dlogits.data_ptr(),
        )
    )  # fmt: skip
    outputs.check()
    return dlogits


def tail_fwd(
    logits: Tensor, target: Tensor, indices: Tensor, uniform: Tensor | None, samples: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    leading, outputs = tuple(logits.shape[:-1]), _Outputs()
    row_max, log_sum, mass = (
        outputs.new(leading, schema.statistics_dtype(logits.dtype)) for _ in range(3)
    )
    draws = outputs.new((*leading, samples), torch.int32)
    run(
        Tail(
            _rows(logits), _DTYPES.index(logits.dtype), *map(_pointer, (target, indices)),
            indices.shape[-1], _pointer(uniform), samples,
            *map(_pointer, (row_max, log_sum, mass, draws)),
        )
    )  # fmt: skip
    outputs.check()
    return row_max, log_sum, mass, draws


def labels_ce_fwd(logits: Tensor, labels: Tensor, delta: float) -> tuple[Tensor, ...]:
    leading, outputs = tuple(logits.shape[:-1]), _Outputs()
    found = [outputs.new(leading, schema.statistics_dtype(logits.dtype)) for _ in range(5)]
    dtype = _DTYPES.index(logits.dtype)
    run(LabelsForward(_rows(logits), dtype, labels.data_ptr(), delta, *map(_pointer, found)))
    outputs.check()
    return tuple(found)


def labels_ce_bwd(
    dloss: Tensor,
    logits: Tensor,
    labels: Tensor,
    negative: Tensor,
    positive: Tensor,
    cut_negative: Tensor,
    cut_positive: Tensor,
) -> Tensor:
    above, outputs = dloss.contiguous(), _Outputs()
    dlogits = outputs.new(tuple(logits.shape), logits.dtype)
    given = (labels, negative, positive, cut_negative, cut_positive, dlogits)
    dtype = _DTYPES.index(logits.dtype)
    run(LabelsBackward(above.data_ptr(), _rows(logits), dtype, *map(_pointer, given)))
    outputs.check()
    return dlogits


def sparse_linear_buffer(like: Tensor, rows: int, num_classes: int) -> Tensor:
    return like.new_empty(rows, num_classes)


def sparse_linear_dhidden(
    coefficients: Tensor, classes: Tensor, weight: Tensor, dtype: torch.dtype
) -> Tensor:
    (tokens, m), width = classes.shape, weight.shape[1]
    outputs = _Outputs()
    out = outputs.new((tokens, width), dtype)
    run(
        Gather(
            *map(_pointer, (coefficients, classes, weight)), _DTYPES.index(weight.dtype),
            tokens, m, width, out.data_ptr(), _DTYPES.index(dtype),
        )
    )  # fmt: skip
    outputs.check()
    return out


def sparse_linear_dweight(
    coefficients: Tensor, classes: Tensor, hidden: Tensor, num_classes: int, dtype: torch.dtype
) -> Tensor:
    by_class, order = torch.sort(classes.flatten(), stable=True)
    starts = torch.searchsorted(by_class, torch.arange(num_classes + 1, dtype=torch.int32))
    outputs = _Outputs()
    out = outputs.new((num_classes, hidden.shape[1]), dtype)
    arguments = Segments(
        *map(_pointer, (coefficients, by_class, order, starts, hidden)),
        _DTYPES.index(hidden.dtype), classes.numel(), classes.shape[1], *out.shape, None,
        out.data_ptr(), _DTYPES.index(dtype),
    )  # fmt: skip
    size = _library().sparse_linear_scratch_bytes(ctypes.byref(arguments))
    scratch = outputs.new((size,), torch.uint8)
    arguments.scratch = scratch.data_ptr()
    run(arguments)
    outputs.check()
    return out


def _output_and_table(output: Tensor, target: Tensor, embedding: Tensor) -> tuple[object, ...]:
    table = Table(
        embedding.data_ptr(), _DTYPES.index(embedding.dtype), len(embedding), embedding.stride(0)
    )
    return _rows(output), _DTYPES.index(output.dtype), target.data_ptr(), table


def cosine_fwd(
    output: Tensor, target: Tensor, embedding: Tensor, normalize: bool
) -> tuple[Tensor, ...]:
    outputs = _Outputs()
    found = [
        outputs.new(tuple(target.shape), schema.statistics_dtype(output.dtype)) for _ in range(3)
    ]
    given = _output_and_table(output, target, embedding)
    run(CosineForward(*given, normalize, *map(_pointer, found)))
    outputs.check()
    return tuple(found)


def cosine_bwd(
    dloss: Tensor,
    output: Tensor,
    target: Tensor,
    embedding: Tensor,
    by_output: Tensor,
    by_target: Tensor,
) -> Tensor:
    above, outputs = dloss.contiguous(), _Outputs()
    doutput = outputs.new(tuple(output.shape), output.dtype)
    given = _output_and_table(output, target, embedding)
    run(CosineBackward(above.data_ptr(), *given, *map(_pointer, (by_output, by_target, doutput))))
    outputs.check()
    return doutput


def _run_with_scratch(arguments: PlifTables | PlifScale | PlifDslopes, outputs: _Outputs) -> None:
    size = getattr(_library(), f"{_LAUNCHES[type(arguments)]}_scratch_bytes")
    scratch = outputs.new((size(ctypes.byref(arguments)),), torch.uint8)
    arguments.scratch = scratch.data_ptr()
    run(arguments)
    outputs.check()


def plif_tables(w: Tensor, bound: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    learnt, outputs = w.contiguous(), _Outputs()
    slopes, offsets = (outputs.new(tuple(w.shape), dtype) for _ in range(2))
    arguments = PlifTables(
        learnt.data_ptr(), _DTYPES.index(w.dtype), len(w), bound, _DTYPES.index(dtype), None,
        *map(_pointer, (slopes, offsets)),
    )  # fmt: skip
    _run_with_scratch(arguments, outputs)
    return slopes, offsets


def plif_scale(
    dloss: Tensor | None,
    dlse: Tensor | None,
    dprobs: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    num_classes: int,
) -> Tensor:
    above = [None if d is None else d.contiguous() for d in (dloss, dlse, dprobs)]
    at_most = None if weight is None else torch.linalg.vector_norm(weight, torch.inf)
    rows, outputs = lse.reshape(-1), _Outputs()
    scale = outputs.new((), torch.float64)
    arguments = PlifScale(
        *map(_pointer, above), _DTYPES.index(lse.dtype), *map(_pointer, (target, at_most, rows)),
        rows.stride(0), target.numel(), 0 if dprobs is None else dprobs.shape[-1], num_classes,
        None, scale.data_ptr(),
    )  # fmt: skip
    _run_with_scratch(arguments, outputs)
    return scale


def plif_dslopes(
    cells: Tensor, outside: Tensor, scale: Tensor, bound: float, dtype: torch.dtype
) -> Tensor:
    outputs = _Outputs()
    dslopes = outputs.new((len(cells),), dtype)
    arguments = PlifDslopes(
        *map(_pointer, (cells, outside, scale)), len(cells), bound, _DTYPES.index(dtype), None,
        dslopes.data_ptr(),
    )  # fmt: skip
    _run_with_scratch(arguments, outputs)
    return dslopes


def _lines(slopes: Tensor, offsets: Tensor) -> Tensor:
    return torch.stack((slopes, offsets), -1)


def _plif(lines: Tensor, bound: float) -> Plif:
    return Plif(lines.data_ptr(), len(lines), bound)


_PlifBackwards = PlifBackward | PlifCeBackward | PlifTopkBackward


def outside_parts(arguments: _PlifBackwards) -> int:
    name = _LAUNCHES[type(arguments)].replace("backward", "outside_parts")
    return getattr(_library(), name)(ctypes.byref(arguments))


def _run_with_sums(
    arguments: _PlifBackwards,
    cells: int,
    scale: Tensor | None,
    outputs: _Outputs,
) -> tuple[Tensor, Tensor]:
    parts = outside_parts(arguments)
    sums = outputs.new((0 if scale is None else cells, 2), torch.int64).zero_()
    outside = outputs.new((0 if scale is None else parts, 2), torch.float64)
    if scale is not None:
        arguments.sums = PlifSums(*map(_pointer, (scale, sums, outside)))
    run(arguments)
    outputs.check()
    return sums, outside.sum(0)


def plif_fwd(x: Tensor, slopes: Tensor, offsets: Tensor, bound: float) -> Tensor:
    lines, outputs = _lines(slopes, offsets), _Outputs()
    y = outputs.new(tuple(x.shape), x.dtype)
    dtype = _DTYPES.index(x.dtype)
    run(PlifForward(_plif(lines, bound), x.data_ptr(), dtype, x.numel(), y.data_ptr()))
    outputs.check()
    return y


def plif_bwd(
    dy: Tensor, x: Tensor, slopes: Tensor, bound: float, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    lines, outputs = _lines(slopes, slopes), _Outputs()
    dx = outputs.new(tuple(x.shape), x.dtype)
    arguments = PlifBackward(
        _plif(lines, bound), dy.data_ptr(), x.data_ptr(), _DTYPES.index(x.dtype), x.numel(),
        dx.data_ptr(),
    )  # fmt: skip
    return dx, *_run_with_sums(arguments, len(slopes), scale, outputs)


def _sum_of(weight: Tensor | None, label_smoothing: float) -> Tensor | None:
    return None if weight is None or label_smoothing == 0 else weight.sum()


def plif_ce_fwd(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    slopes: Tensor,
    offsets: Tensor,
    bound: float,
    label_smoothing: float,
) -> tuple[Tensor, ...]:
    lines, weights = _lines(slopes, offsets), _sum_of(weight, label_smoothing)
    outputs = _Outputs()
    found = [outputs.new(tuple(target.shape), slopes.dtype) for _ in range(4)]
    run(
        PlifCeForward(
            _plif(lines, bound), _rows(logits), _DTYPES.index(logits.dtype),
            *map(_pointer, (target, weight, weights)), label_smoothing, *map(_pointer, found),
        )
    )  # fmt: skip
    outputs.check()
    return tuple(found)


def plif_ce_bwd(
    dloss: Tensor | None,
    dlse: Tensor | None,
    logits: Tensor,
    target: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    weight: Tensor | None,
    slopes: Tensor,
    offsets: Tensor,
    bound: float,
    label_smoothing: float,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    lines, weights = _lines(slopes, offsets), _sum_of(weight, label_smoothing)
    above = [None if d is None else d.contiguous() for d in (dloss, dlse)]
    outputs = _Outputs()
    dlogits = outputs.new(tuple(logits.shape), logits.dtype)
    arguments = PlifCeBackward(
        _plif(lines, bound), *map(_pointer, above), _rows(logits), _DTYPES.index(logits.dtype),
        *map(_pointer, (target, row_max, log_sum, weight, weights)), label_smoothing,
        dlogits.data_ptr(),
    )  # fmt: skip
    return dlogits, *_run_with_sums(arguments, len(slopes), scale, outputs)


def plif_topk_ce_fwd(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    slopes: Tensor,
    offsets: Tensor,
    bound: float,
    k: int,
    label_smoothing: float,
) -> tuple[Tensor, ...]:
    outputs = _Outputs()
    arguments, found = _list(outputs, logits, target, weight, k, label_smoothing)
    values = outputs.new((*target.shape, k + 1), slopes.dtype)
    columns = PlifColumns(slopes.data_ptr(), offsets.data_ptr(), len(slopes), bound)
    run(PlifTopkForward(arguments, columns, values.data_ptr()))
    outputs.check()
    return *found, values


def plif_topk_ce_bwd(
    dloss: Tensor | None,
    dlse: Tensor | None,
    dprobs: Tensor | None,
    target: Tensor,
    indices: Tensor,
    probs: Tensor,
    values: Tensor,
    weight: Tensor | None,
    slopes: Tensor,
    bound: float,
    label_smoothing: float,
    num_classes: int,
    dtype: torch.dtype,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    above = [None if d is None else d.contiguous() for d in (dloss, dlse, dprobs)]
    outputs = _Outputs()
    dlogits = outputs.new((*target.shape, num_classes), dtype).zero_()
    arguments = PlifTopkBackward(
        Backward(
            *map(_pointer, (*above, target, indices, probs, weight)), label_smoothing,
            target.numel(), indices.shape[-1], num_classes, dlogits.data_ptr(),
            _DTYPES.index(dtype),
        ),
        PlifColumns(slopes.data_ptr(), None, len(slopes), bound),
        values.data_ptr(),
    )  # fmt: skip
    return dlogits, *_run_with_sums(arguments, len(slopes), scale, outputs)


def reduce_fwd(
    loss: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, mean: bool
) -> tuple[Tensor, Tensor]:
    losses, outputs = loss.contiguous(), _Outputs()
    reduced, divisor = (outputs.new((), loss.dtype) for _ in range(2))
    arguments = ReduceForward(
        losses.data_ptr(), _DTYPES.index(loss.dtype), *map(_pointer, (target, weight)),
        target.numel(), 0 if weight is None else len(weight), ignore_index, mean, None,
        *map(_pointer, (reduced, divisor)),
    )  # fmt: skip
    scratch = outputs.new((_library().reduce_scratch_bytes(ctypes.byref(arguments)),), torch.uint8)
    arguments.scratch = scratch.data_ptr()
    run(arguments)
    outputs.check()
    return reduced, divisor


def reduce_bwd(dreduced: Tensor, target: Tensor, divisor: Tensor, ignore_index: int) -> Tensor:
    outputs = _Outputs()
    dloss = outputs.new(tuple(target.shape), dreduced.dtype)
    run(
        ReduceBackward(
            dreduced.data_ptr(), _DTYPES.index(dreduced.dtype), *map(_pointer, (target, divisor)),
            target.numel(), ignore_index, dloss.data_ptr(),
        )
    )  # fmt: skip
    outputs.check()
    return dloss


def launched() -> list[str]:
    """The kernels that have run since the last call."""
    return _library().kernels_launched().decode().splitlines()


def _unavailable() -> str | None:
    return None if emulation.compiler() else "no C++ compiler was found"


ROW = backends.Backend(
    "cuda",
    (__name__,),
    devices=("cpu",),
    dtypes=backends.ALL_DTYPES,
    large_k=True,
    why_here="the CUDA kernels on the processor: for tests, never for speed",
    unavailable=_unavailable,
)


def register() -> None:
    """Put it into the registry, in the place of the backend for GPUs or at the end."""
    if _unavailable() is None:
        _library()  # what does not compile says so once, and not in every test
    rows = [row for row in backends.BACKENDS if row.name != ROW.name]
    backends.BACKENDS = (*rows, ROW)
    backends.NAMES = tuple(row.name for row in backends.BACKENDS)
