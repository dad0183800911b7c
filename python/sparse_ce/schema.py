"""The operator signatures, the only copy of them, and what every implementation promises.

Two namespaces share each signature. ``sparse_ce::<op>`` is the public operator: it carries the name
of the backend as its last argument, because the backward pass of a GPU runs on threads where no
context variable of the caller is visible. ``sparse_ce_native::<op>`` has no Python body: the
compiled library implements it for the dispatch keys it was built for.

Shapes: N stands for the leading shape, (N,) or (B, T); V classes, k kept ones.

topk_ce, the list regime
    fwd  logits (N, V), any strides with unit stride in V; target (N) int64 contiguous;
         weight (V) or None
         ->  loss (N), lse (N), indices (N, k) int32 sorted by (value desc, index asc), probs (N, k)
    bwd  the gradients of loss, lse and probs, each of which may be None (that is zero),
         and what forward got and returned
         ->  dlogits (N, V) in `dtype`. A class may be listed twice, where that comes to the same.

threshold_ce, the threshold regime: the same loss where many classes are kept, with O(N) saved
    fwd  as above, with `delta`. k < V keeps the k largest. delta < 1, of a row whose target has a
         probability p_y > delta among all classes, keeps those with p_y - p_i <= delta and the
         target. Otherwise all are kept: the dense softmax. Not both k < V and delta < 1.
         ->  loss (N), lse (N), row_max (N), log_sum (N) = lse - row_max, cut (N),
             cut_index (N) int32: class i is kept where z_i > cut, or z_i = cut and i <= cut_index,
             kept (N) int32: how many are. Where all are, the cut is -inf and the index V - 1.
    bwd  reads the logits again
         ->  dlogits (N, V) in the dtype of the logits; of the loss of a row that keeps its target
             alone exact zeros

tail, what is outside of a list: the classes other than the k largest and the target
    fwd  logits (N, V), any strides with unit stride in V; target (N) int64 contiguous, a hit or
         not; indices (N, k) int32, the k largest of topk_ce, k < V; uniform (N) in [0, 1), in the
         dtype of the statistics, or None
         ->  row_max (N), log_sum (N) = lse - row_max, of all V classes;
             mass (N), the probability of the tail, and 0 without `uniform`;
             draws (N, samples) int32, from the tail in proportion to p, by systematic sampling.
         In integers, so that no order of additions matters: class i has
         q_i = floor(2^52 min(p_i, 1)), 0 outside of the tail, with p_i = exp(z_i - row_max -
         log_sum); C_i is the sum of q up to and with class i, Q that of all,
         stride = floor(Q / samples). Draw j is the first class with
         C_i > floor(uniform stride) + j stride, the product in float64: draws ascend, and a class
         may be drawn several times. mass is Q / 2^52. Where stride is 0 draws are -1 and mass is 0;
         where log_sum is not finite draws are -1 and mass is NaN.

labels_ce, several labels per row: a threshold on either side of them
    fwd  logits (N, V), any strides with unit stride in V; labels (N, V) bool contiguous, true of
         the positives; delta. With p the softmax over all classes, a negative is kept where
         (least p of the positives) - p_i <= delta, a positive where p_i - (largest p of the
         negatives) <= delta; where the other side is empty, or p is no number, all are kept.
         Whatever the rounding, what equals the other side's extreme is.
         ->  loss (N) = negative + positive,
             negative (N) = log(1 + sum of exp(z) over the kept negatives),
             positive (N) = log(1 + sum of exp(-z) over the kept positives),
             cut_negative (N), the least kept negative: negative i is kept unless z_i < it; -inf
             where all are kept without a bound, inf where none is,
             cut_positive (N), the largest kept positive: positive i is kept unless z_i > it; inf
             where all are kept without a bound, -inf where none is.
         The loss of a row with NaN is NaN.
    bwd  the gradient of loss; reads the logits and the labels again
         ->  dlogits (N, V) in the dtype of the logits: dloss exp(z - negative) of a kept negative,
             -dloss exp(-z - positive) of a kept positive, exact zeros elsewhere

plif, one increasing piecewise-linear function f for all logits: K cells of equal width on [-bound,
bound], f(x) = slopes[i] x + offsets[i] in cell i, the end cells without end. The cell of x is
(x + bound) * (K / (2 bound)) limited to [0, K - 1] (NaN to 0), its integer part, in the arithmetic
of the statistics, which is the dtype of slopes (K) and offsets (K). The offsets follow from the
slopes, f being continuous and f(0) = 0; they have no gradient of their own.
    tables  w (K), any floating dtype
            ->  slopes, softplus(w) rounded to the dtype of w and never 0, and offsets, in `dtype`
    scale   the gradients of loss, lse and probs, each of which may be None; target and weight; lse
            (N), or what is finite where it is
            ->  () float64: the scale of bwd, for the gradient of f of the logits of a loss. It is
                NaN where one of them is
    dslopes cells, outside and scale as of bwd
            ->  the gradient of the slopes (K) in `dtype`, with what they are worth in the offsets
    fwd     x, any shape, contiguous
            ->  f(x), as x
    bwd     the gradient of f(x), as x, contiguous; scale () float64, or None for dx alone
            ->  dx, as x;
                cells (K, 2) int64: of the x in each cell the sum of g = dy * scale, and of g times
                the share of the cell left of x, between 0 and 1. Each addend is an integer, rounded
                towards 0, so that the sums are the same in any order: where scale takes the sum of
                all |dy| to at most 2^60 they do not overflow. Empty (0, 2) without a scale.
                outside (2) float64: the sum of dy (x + bound) of x < -bound, of dy (x - bound) of
                x > bound, in one order. NaN counts as x < -bound, and dy = 0 as nothing.
    ce_fwd  the dense softmax of f(logits): logits, target and weight as of threshold_ce
            ->  loss (N), lse (N), row_max (N), log_sum (N) = lse - row_max
    ce_bwd  reads the logits again
            ->  dlogits, cells and outside as of bwd, with the gradient of f(logits) for dy
    topk_ce_fwd  f keeps the order, so the k largest are those of the logits: as topk_ce, with f
            applied to them and to the target's
            ->  loss, lse, indices and probs as of topk_ce on f(logits); values (N, k + 1), the
                logits of the support and of the target, in the dtype of the statistics
    topk_ce_bwd  does not read the logits again
            ->  dlogits (N, V) in `dtype`, cells and outside as of bwd, with the gradient of
                f(values), that of the target joined to the one in the support where it is there

sparse_linear, the gradients of a linear layer whose logits have m non-zero gradients per row
    buffer   an uninitialised (rows, V) tensor for the logits of a chunk, as `like` is
    dhidden  coefficients (N, m), classes (N, m) int32 in [0, V), weight (V, D)
             ->  sum_j coefficients[n, j] weight[classes[n, j]]: (N, D) in `dtype`
    dweight  coefficients and classes as above, hidden (N, D)
             ->  the sum of coefficients[n, j] hidden[n] over the pairs of each class, in the order
             of n and j: (V, D) in `dtype`
    A pair whose coefficient is 0 adds nothing, not even NaN; classes may repeat within a row. The
    tensors are contiguous, and N is one dimension.

cosine, the distance from the vector of the target: continuous outputs
    fwd  output (N, D), any strides with unit stride in D; target (N) int64 contiguous; embedding
         (V, D) with unit stride in D; both vectors are divided by their norms where `normalize`
         ->  loss (N) = |output - e|^2 / 2 with e = embedding[target], that is 1 - cos(output, e)
             where `normalize`; by_output (N) and by_target (N), such that
             by_output * output + by_target * e is the gradient of the loss.
         A vector whose sum of squares is below the smallest normal number has no direction: with
         `normalize` the loss is 1, by_output and by_target are 0. They are 0 too where the target
         is no hit.
    bwd  the gradient of loss, and what forward got and returned; zeros where by_target is 0
         ->  doutput (N, D) in the dtype of output

reduce, the losses of all rows to one
    fwd  loss (N); target (N) int64 contiguous; weight (V) or None, in the dtype of loss. A row
         counts unless its target is ignore_index
         ->  reduced (), the sum of loss over the rows that count, divided by
             divisor (): with `mean` the number of these rows, or the sum of the weights of their
             targets, and 1 where no row counts; without it 1.
         A target out of range, whose loss is NaN, has the weight of the nearest class.
    bwd  the gradient of reduced, and what forward got and returned
         ->  dloss (N): dreduced / divisor, and exact zeros where a row does not count

Promises. Outputs are fresh and contiguous; no input is written to. Statistics (everything but
logits, target, labels, indices and counts) are float32, or float64 for float64 logits. Saved
tensors are part of the signature, so any backend can run the backward of any other. In the order of
the classes NaN is largest and -0 equals +0. A target outside [0, V) is "no hit": its loss is NaN
and the gradient of that loss has no effect. A row whose upstream gradients are all zero gets a
gradient of exact zeros, NaN logits or not: that is how ignored rows reach a kernel.
"""

import importlib
import json
from pathlib import Path

import torch

_THRESHOLD_OUTPUTS = (
    "(Tensor loss, Tensor lse, Tensor row_max, Tensor log_sum, Tensor cut, Tensor cut_index, "
    "Tensor kept)"
)
SIGNATURES = {
    "topk_ce_fwd": (
        "Tensor logits, Tensor target, Tensor? weight, SymInt k, float label_smoothing",
        "(Tensor loss, Tensor lse, Tensor indices, Tensor probs)",
    ),
    "topk_ce_bwd": (
        "Tensor? dloss, Tensor? dlse, Tensor? dprobs, Tensor target, Tensor indices, Tensor probs, "
        "Tensor? weight, float label_smoothing, SymInt num_classes, ScalarType dtype",
        "Tensor",
    ),
    "threshold_ce_fwd": (
        "Tensor logits, Tensor target, Tensor? weight, SymInt k, float delta, "
        "float label_smoothing",
        _THRESHOLD_OUTPUTS,
    ),
    "threshold_ce_bwd": (
        "Tensor? dloss, Tensor? dlse, Tensor logits, Tensor target, Tensor row_max, "
        "Tensor log_sum, Tensor cut, Tensor cut_index, Tensor kept, Tensor? weight, "
        "float label_smoothing",
        "Tensor",
    ),
    "tail_fwd": (
        "Tensor logits, Tensor target, Tensor indices, Tensor? uniform, SymInt samples",
        "(Tensor row_max, Tensor log_sum, Tensor mass, Tensor draws)",
    ),
    "labels_ce_fwd": (
        "Tensor logits, Tensor labels, float delta",
        "(Tensor loss, Tensor negative, Tensor positive, Tensor cut_negative, Tensor cut_positive)",
    ),
    "labels_ce_bwd": (
        "Tensor dloss, Tensor logits, Tensor labels, Tensor negative, Tensor positive, "
        "Tensor cut_negative, Tensor cut_positive",
        "Tensor",
    ),
    "plif_tables": (
        "Tensor w, float bound, ScalarType dtype",
        "(Tensor slopes, Tensor offsets)",
    ),
    "plif_scale": (
        "Tensor? dloss, Tensor? dlse, Tensor? dprobs, Tensor target, Tensor? weight, Tensor lse, "
        "SymInt num_classes",
        "Tensor",
    ),
    "plif_dslopes": (
        "Tensor cells, Tensor outside, Tensor scale, float bound, ScalarType dtype",
        "Tensor",
    ),
    "plif_fwd": ("Tensor x, Tensor slopes, Tensor offsets, float bound", "Tensor"),
    "plif_bwd": (
        "Tensor dy, Tensor x, Tensor slopes, float bound, Tensor? scale",
        "(Tensor dx, Tensor cells, Tensor outside)",
    ),
    "plif_ce_fwd": (
        "Tensor logits, Tensor target, Tensor? weight, Tensor slopes, Tensor offsets, float bound, "
        "float label_smoothing",
        "(Tensor loss, Tensor lse, Tensor row_max, Tensor log_sum)",
    ),
    "plif_ce_bwd": (
        "Tensor? dloss, Tensor? dlse, Tensor logits, Tensor target, Tensor row_max, "
        "Tensor log_sum, Tensor? weight, Tensor slopes, Tensor offsets, float bound, "
        "float label_smoothing, Tensor? scale",
        "(Tensor dlogits, Tensor cells, Tensor outside)",
    ),
    "plif_topk_ce_fwd": (
        "Tensor logits, Tensor target, Tensor? weight, Tensor slopes, Tensor offsets, float bound, "
        "SymInt k, float label_smoothing",
        "(Tensor loss, Tensor lse, Tensor indices, Tensor probs, Tensor values)",
    ),
    "plif_topk_ce_bwd": (
        "Tensor? dloss, Tensor? dlse, Tensor? dprobs, Tensor target, Tensor indices, Tensor probs, "
        "Tensor values, Tensor? weight, Tensor slopes, float bound, float label_smoothing, "
        "SymInt num_classes, ScalarType dtype, Tensor? scale",
        "(Tensor dlogits, Tensor cells, Tensor outside)",
    ),
    "sparse_linear_buffer": ("Tensor like, SymInt rows, SymInt num_classes", "Tensor"),
    "sparse_linear_dhidden": (
        "Tensor coefficients, Tensor classes, Tensor weight, ScalarType dtype",
        "Tensor",
    ),
    "sparse_linear_dweight": (
        "Tensor coefficients, Tensor classes, Tensor hidden, SymInt num_classes, ScalarType dtype",
        "Tensor",
    ),
    "reduce_fwd": (
        "Tensor loss, Tensor target, Tensor? weight, int ignore_index, bool mean",
        "(Tensor reduced, Tensor divisor)",
    ),
    "reduce_bwd": (
        "Tensor dreduced, Tensor target, Tensor divisor, int ignore_index",
        "Tensor",
    ),
    "cosine_fwd": (
        "Tensor output, Tensor target, Tensor embedding, bool normalize",
        "(Tensor loss, Tensor by_output, Tensor by_target)",
    ),
    "cosine_bwd": (
        "Tensor dloss, Tensor output, Tensor target, Tensor embedding, Tensor by_output, "
        "Tensor by_target",
        "Tensor",
    ),
}

# A forward and its reduction as one operator with a derivative, of the compiled library alone:
# csrc/loss.cpp. ops.py calls it in the place of both, where nobody but autograd listens.
LOSSES = {
    f"{_stem}_loss": (
        f"{SIGNATURES[f'{_stem}_fwd'][0]}, int ignore_index, bool mean, str backend",
        f"(Tensor reduced, Tensor loss, Tensor lse, {_rest})",
    )
    for _stem, _rest in (
        ("topk_ce", "Tensor indices, Tensor probs"),
        ("threshold_ce", "Tensor kept"),
    )
}

# Compositions of the operators above, the same on every backend; implemented in linear.py, in
# tail.py and plif.py those of tail and plif, in parallel.py those of the list of a shard. `uniform`
# and `samples`, where they are given, are those of tail: the softmax is that of all classes, and
# the lists of k are longer, as tail.py says.
_LINEAR = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? class_weight, SymInt k, "
    "float label_smoothing, ScalarType dtype, SymInt chunk_rows, float? softcap"
)
_LIST = "(Tensor values, Tensor classes, Tensor row_max, Tensor log_sum, Tensor share)"
COMPOSITIONS = {
    "tail_ce_fwd": (
        "Tensor logits, Tensor target, Tensor? weight, Tensor? uniform, SymInt k, SymInt samples, "
        "float label_smoothing",
        "(Tensor loss, Tensor lse, Tensor classes, Tensor probs)",
    ),
    "tail_ce_bwd": (
        "Tensor? dloss, Tensor? dlse, Tensor? dprobs, Tensor target, Tensor classes, Tensor probs, "
        "Tensor? weight, SymInt k, float label_smoothing, SymInt num_classes, ScalarType dtype",
        "Tensor",
    ),
    "topk_plif_ce_fwd": (
        "Tensor logits, Tensor target, Tensor? weight, Tensor w, float bound, SymInt k, "
        "float label_smoothing",
        "(Tensor loss, Tensor lse, Tensor indices, Tensor probs, Tensor values, Tensor slopes)",
    ),
    "topk_plif_ce_bwd": (
        "Tensor? dloss, Tensor? dlse, Tensor? dprobs, Tensor target, Tensor indices, Tensor probs, "
        "Tensor values, Tensor? weight, Tensor w, Tensor slopes, float bound, "
        "float label_smoothing, SymInt num_classes, ScalarType dtype, bool needed",
        "(Tensor dlogits, Tensor dw)",
    ),
    "topk_linear_ce_fwd": (
        f"{_LINEAR}, Tensor? uniform, SymInt? samples, bool sparse",
        "(Tensor loss, Tensor lse, Tensor indices, Tensor probs, Tensor slopes)",
    ),
    "topk_linear_ce_bwd": (
        "Tensor? dloss, Tensor? dlse, Tensor? dprobs, Tensor hidden, Tensor weight, Tensor target, "
        "Tensor indices, Tensor probs, Tensor slopes, Tensor? class_weight, SymInt k, "
        "float label_smoothing, ScalarType dtype, SymInt chunk_rows, bool sparse, bool[3] needed",
        "(Tensor dhidden, Tensor dweight, Tensor dbias)",
    ),
    "listed_fwd": (
        "Tensor logits, Tensor target, Tensor? uniform, SymInt k, SymInt? samples",
        _LIST,
    ),
    "listed_bwd": (
        "Tensor dvalues, Tensor classes, SymInt k, SymInt num_classes, ScalarType dtype",
        "Tensor",
    ),
    "listed_linear_fwd": (
        "Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? uniform, SymInt k, "
        "SymInt? samples, ScalarType dtype, SymInt chunk_rows, float? softcap, bool sparse",
        _LIST,
    ),
    "listed_linear_bwd": (
        "Tensor dvalues, Tensor classes, Tensor hidden, Tensor weight, SymInt k, ScalarType dtype, "
        "SymInt chunk_rows, bool sparse, bool[3] needed",
        "(Tensor dhidden, Tensor dweight, Tensor dbias)",
    ),
    "threshold_linear_ce_fwd": (_LINEAR, _THRESHOLD_OUTPUTS),
    "threshold_linear_ce_bwd": (
        "Tensor? dloss, Tensor? dlse, Tensor hidden, Tensor weight, Tensor? bias, Tensor target, "
        "Tensor row_max, Tensor log_sum, Tensor cut, Tensor cut_index, Tensor kept, "
        "Tensor? class_weight, float label_smoothing, ScalarType dtype, SymInt chunk_rows, "
        "float? softcap, bool[3] needed",
        "(Tensor dhidden, Tensor dweight, Tensor dbias)",
    ),
}


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the statistics of logits in `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def fixed_point(total: torch.Tensor) -> torch.Tensor:
    """() float64: the power of two that takes a sum of at most `total` to integers of 2^60 at most.

    Integers, unlike floats, add up to the same bits in any order. Of NaN and infinity the scale is
    NaN, and so is what is divided by it.
    """
    # from the bits: a logarithm is rounded, and a power of two is as each device computes it
    bits = total.double().clamp(min=2.0**-900).view(torch.int64)
    exponent = (bits + 0xFFFFFFFFFFFFF) >> 52  # rounded up
    return ((2 * 1023 + 60 - exponent) << 52).view(torch.float64) + 0 * total


# The library is loaded before the definitions: a stale one that brings implementations of other
# signatures then fails with a clean error, where in the other order it aborts the process.
NATIVE_ERROR: str | None = None
try:
    importlib.import_module("sparse_ce._C")
except ImportError as error:
    NATIVE_ERROR = str(error)

try:
    for _name, (_arguments, _returns) in SIGNATURES.items():
        torch.library.define(f"sparse_ce::{_name}", f"({_arguments}, str backend) -> {_returns}")
        torch.library.define(f"sparse_ce_native::{_name}", f"({_arguments}) -> {_returns}")
    for _name, (_arguments, _returns) in LOSSES.items():
        torch.library.define(f"sparse_ce_native::{_name}", f"({_arguments}) -> {_returns}")
    for _name, (_arguments, _returns) in COMPOSITIONS.items():
        torch.library.define(f"sparse_ce::{_name}", f"({_arguments}, str backend) -> {_returns}")
    torch.library.define("sparse_ce_native::cpu_isa", "() -> str")
    torch.library.define("sparse_ce_native::cuda_architectures", "() -> str")
except RuntimeError as error:
    raise ImportError(
        "sparse_ce: the compiled library does not fit these Python sources; rebuild it with "
        "`pip install --no-build-isolation -e .` (or `python setup.py build_ext --inplace`)"
    ) from error


def build_note() -> dict[str, str]:
    """What setup.py wrote down: what was built, against which torch, or why it was not."""
    path = Path(__file__).with_name("_build.json")
    note: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    return {"cpu": "no record", "cuda": "no record", **note}
