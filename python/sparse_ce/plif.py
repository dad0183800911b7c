"""A learnable increasing function of all logits.

Before the sparse softmax it costs O(N k): f keeps the order of the logits, so the k largest of a
row are those of its logits, and only k + 1 numbers per row pass through f. Saved are 12 k bytes per
row, not the logits.

f is held as one line per cell, f(x) = slope x + offset, not as a height above a knot: with slopes
of 1 the offsets are 0, and f(x) is x to the last bit.
"""

import torch
from torch import Tensor, nn

from . import backends, checks, ops, schema

_SLOPE_ONE = 0.541324854612918108  # log(e - 1): its softplus is 1


class MonotonicPLIF(nn.Module):
    """A learnable, strictly increasing, piecewise-linear function with f(0) = 0, applied to every
    element: ``plif(x)``, or between logits and softmax ``fused_sparse_ce(logits, target, k,
    link=plif)``.

    ``num_cells`` cells of equal width on [-bound, bound] have the slopes ``softplus(w)``; beyond,
    the end cells go on. It starts as the identity, to the last bit. Source: Ganea et al., Learnable
    monotonic pointwise non-linearities, arXiv 1902.08077.

    The gradient of ``w`` is summed in fixed point: the same bits in every run, on any number of
    threads. A NaN in ``x``, or in a row that counts, makes NaN of it. There is no second
    derivative.

    Args:
        num_cells: K, at most 2^24.
        bound: T, in units of the logits.
        init_std: standard deviation of the start of ``w`` around slope 1; the source's is 1.

    Attributes:
        w: (K,) float32, learnable.
    """

    def __init__(
        self, num_cells: int = 100_000, bound: float = 20.0, init_std: float = 0.0
    ) -> None:
        super().__init__()
        checks.plif(num_cells, bound, init_std)
        self.num_cells, self.bound, self.init_std = num_cells, float(bound), float(init_std)
        self.w = nn.Parameter(torch.empty(num_cells))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.w, _SLOPE_ONE, self.init_std)

    def tables(self, dtype: torch.dtype, backend: str = "auto") -> tuple[Tensor, Tensor]:
        """Slopes and offsets, (K,) each, in the dtype of the statistics of ``dtype``."""
        name = backends.resolve(backend, self.w.device.type, dtype, False)
        slopes, offsets = ops.plif_tables(self.w, self.bound, schema.statistics_dtype(dtype), name)
        return slopes, offsets

    def forward(self, x: Tensor, backend: str = "auto") -> Tensor:
        """f of every element of ``x``: any shape, float32, bfloat16, float16 or float64, on the
        device of ``w``. Computed in float32 (float64 for float64), returned in the dtype of ``x``.
        """
        checks.plif_input(x, self.w)
        checks.backend(backend)
        name = backends.resolve(backend, x.device.type, x.dtype, False)
        y: Tensor = ops.plif_fwd(x.contiguous(), *self.tables(x.dtype, name), self.bound, name)
        return y

    def extra_repr(self) -> str:
        return f"num_cells={self.num_cells}, bound={self.bound}, init_std={self.init_std}"
