"""Continuous outputs: a trunk predicts the pre-trained vector of the next word. No softmax layer.

A step costs O(N D) whatever the number of words: of the table only the rows of the batch are read,
and it has no gradient. Source: Li et al., Efficient Contextual Representation Learning With
Continuous Outputs, arXiv 1902.11269.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends, checks, functional, ops, schema

# Of the similarities of a block of rows with a block of vectors, and of the vectors of a block.
BLOCK_BYTES = 64 << 20
_BLOCK_ROWS = 1024


def continuous_output_loss(
    output: Tensor,
    target: Tensor,
    embedding: Tensor,
    distance: str = "cosine",
    *,
    target_vectors: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Distance of each output from the vector of its target.

    With ``e = embedding[target]``: "cosine" is ``1 - cos(output, e)``, whose gradient
    ``-(e / |e| - cos output / |output|) / |output|`` is orthogonal to the output and does not see
    the length of ``e``; "l2" is ``|output - e|**2 / 2``. The gather, the distance and its gradient
    are one pass over the N pairs of vectors; saved are the output by reference and two numbers per
    row, and the vectors of the targets where they had to be gathered: where the table is on another
    device, or ``target_vectors`` are given. Source: Li et al., arXiv 1902.11269; the paper's loss
    is this one less 1.

    Args:
        output: (..., D) float32, bfloat16, float16 or float64, any strides. Never written to.
        target: (...) int64 or int32, numbers of rows of the table.
        embedding: (V, D), the frozen table, in any of these dtypes but float64 beside float64 only.
            On the device of output, or on the CPU: then only the rows of the batch travel, which
            waits for the targets.
        distance: "cosine" or "l2".
        target_vectors: (M, D), M >= 0, vectors of words that the table lacks: target V + j names
            ``target_vectors[j]``.
        ignore_index: rows with this target have loss 0 and gradient 0, even where they are NaN.
        reduction: "mean" over the rows that are not ignored (0 when all are), "sum" or "none".
        backend: "auto", "triton", "cuda", "cpu" or "eager". A named backend runs or raises.

    Returns:
        The loss, a scalar or (...) for "none", float32 (float64 for float64 output), as all
        arithmetic. A vector of zeros, of output or table, has no direction: the cosine loss of such
        a row is 1, its gradient 0. So it is for norms below 1e-19 (1e-154 in float64); norms beyond
        1e19 (1e154) give NaN.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range.
        IndexError: on the CPU, a target outside [0, V + M). On a GPU and in a compiled graph the
            loss of that row is NaN and its gradient 0; ``SPARSE_CE_DEBUG=1`` looks and raises on a
            GPU too, outside of compiled graphs.
        RuntimeError: the named backend cannot run here; the message says why.
    """
    checks.output(output)
    checks.target(target, output, beside="output")
    checks.table("embedding", embedding, output)
    known = embedding.shape[0]
    if target_vectors is not None:
        checks.table("target_vectors", target_vectors, output, least=0)
        known += target_vectors.shape[0]
        target_vectors = target_vectors if target_vectors.shape[0] else None
    checks.distance(distance)
    checks.ignore_index(ignore_index)
    checks.reduction(reduction)
    checks.backend(backend)
    elsewhere = embedding.device != output.device
    # to gather elsewhere is to wait for the targets: then looking at them costs nothing more
    checks.target_range(target.to(embedding.device) if elsewhere else target, known, ignore_index)

    rows = functional.as_rows(output)
    row_target = functional.as_row_target(target, rows)
    name = backends.resolve(backend, output.device.type, output.dtype, False)
    table, places = embedding, row_target
    if elsewhere or target_vectors is not None or embedding.stride(-1) != 1:
        table, places = gather(row_target, embedding, target_vectors)
    loss = ops.cosine_fwd(rows, places, table, distance == "cosine", name)[0]
    return functional.reduce(loss, row_target, None, ignore_index, reduction, name, target.shape)


def gather(target: Tensor, embedding: Tensor, more: Tensor | None) -> tuple[Tensor, Tensor]:
    """A table (N, D) of the vectors of the targets alone, on their device, and the targets in it,
    -1 where there is none.
    """
    y, known = target.flatten(), embedding.shape[0]
    vectors = embedding[y.clamp(0, known - 1).to(embedding.device)].to(target.device)
    if more is not None:
        place = (y - known).clamp(0, more.shape[0] - 1).to(more.device)
        vectors = torch.where((y < known).unsqueeze(-1), vectors, more[place].to(target.device))
        known += more.shape[0]
    places = torch.arange(y.numel(), device=target.device)
    places = torch.where((y >= 0) & (y < known), places, -1)
    return vectors.contiguous(), places.view(target.shape)


def nearest(
    output: Tensor, embedding: Tensor, k: int, backend: str, block_bytes: int = BLOCK_BYTES
) -> tuple[Tensor, Tensor]:
    """Cosines (..., k) in descending order and rows (..., k) int64 of the k vectors of the
    embedding (V, D) that are nearest to each output (..., D); the lowest row wins a tie. A row of
    zeros comes last, at -inf.
    """
    dtype = schema.statistics_dtype(output.dtype)
    name = backends.resolve(backend, output.device.type, dtype, functional.is_large(k))
    smallest = torch.finfo(dtype).tiny ** 0.5
    directions = F.normalize(output.to(dtype), dim=-1, eps=smallest).reshape(-1, output.shape[-1])
    count, width = directions.shape
    block_rows = max(1, min(count, _BLOCK_ROWS))
    block_vectors = max(k, block_bytes // (dtype.itemsize * max(block_rows, width)))
    values = directions.new_empty((count, 0))
    indices = torch.empty((count, 0), dtype=torch.int64, device=output.device)
    for first in range(0, embedding.shape[0], block_vectors):
        vectors = embedding[first : first + block_vectors].to(output.device, dtype)
        norms = torch.linalg.vector_norm(vectors, dim=-1)
        found = []
        for part in torch.split(directions, block_rows):
            cosines = (part @ vectors.t()).div_(norms).masked_fill_(norms < smallest, -torch.inf)
            found.append(_largest(cosines, min(k, vectors.shape[0]), name))
        block_values, block_indices = (torch.cat(t) for t in zip(*found, strict=True))
        # what comes first wins a tie: the blocks before this one
        values = torch.cat([values, block_values], -1)
        indices = torch.cat([indices, block_indices + first], -1)
        values, places = _largest(values, min(k, values.shape[-1]), name)
        indices = indices.gather(-1, places)
    shape = (*output.shape[:-1], k)
    return values.view(shape), indices.view(shape)


def _largest(values: Tensor, k: int, backend: str) -> tuple[Tensor, Tensor]:
    """By (value desc, index asc): values, and indices int64."""
    no_target = values.new_full(values.shape[:-1], -1, dtype=torch.int64)
    indices = ops.topk_ce_fwd(values, no_target, None, k, 0.0, backend)[2].long()
    return values.gather(-1, indices), indices
