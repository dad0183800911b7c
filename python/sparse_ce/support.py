"""What the loss knows about the classes that it kept, returned by ``return_support=True``."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import checks


class Support(NamedTuple):
    """The k classes that each row kept. N stands for the shape of target.

    ``indices`` (N, k) int32, sorted by (logit descending, index ascending); ``probs`` (N, k), their
    softmax over the support, and ``lse`` (N), the log-sum-exp of their logits, with
    normalizer="full" the softmax and log-sum-exp of all classes: float32, or float64 for float64
    logits. ``probs`` and ``lse`` are differentiable (their gradient has k non-zeros per row, with
    normalizer="full" those of the loss), so a z-loss, ``1e-4 * support.lse.square().mean()``, or an
    entropy bonus composes outside. Rows of ``ignore_index`` are not blanked out here: mask them.
    """

    indices: Tensor
    probs: Tensor
    lse: Tensor
    num_classes: int

    def hit(self, target: Tensor) -> Tensor:
        """(N) bool: the target is in the support. A share of hits near k / V says that training
        starves (README). Rows of ``ignore_index`` are no hits: leave them out of a mean.
        """
        checks.target(target, self.indices, "the support")
        return (self.indices == target.unsqueeze(-1)).any(-1)

    def accuracy(self, target: Tensor) -> Tensor:
        """(N) bool: the target is the first class. ``.float().mean()`` is the top-1 accuracy, where
        no row is ignored.
        """
        checks.target(target, self.indices, "the support")
        return self.indices[..., 0] == target

    def entropy(self) -> Tensor:
        """(N): entropy of ``probs`` in nats, differentiable."""
        smallest = torch.finfo(self.probs.dtype).tiny
        # a row that is NaN, and masked, would send NaN times its upstream gradient of 0
        empty = self.probs.isnan().any(-1)
        p = self.probs.masked_fill(empty.unsqueeze(-1), 0)
        return -(p * p.clamp(min=smallest).log()).sum(-1).masked_fill(empty, torch.nan)

    def tail_mass(self) -> Tensor:
        """(N): the probability outside of the support, differentiable: of normalizer="full", 0
        otherwise, to rounding. What it has beside the target is missing in the gradient without
        tail_samples.
        """
        return (1 - self.probs.sum(-1)).clamp(min=0)

    def to_sparse_csr(self) -> Tensor:
        """The probabilities as a sparse CSR tensor (rows, V) with exactly k entries per row,
        leading dimensions flattened.
        """
        k = self.indices.shape[-1]
        indices, probs = self.indices.reshape(-1, k), self.probs.reshape(-1, k)
        columns, order = indices.sort(dim=-1)
        rows = indices.shape[0]
        starts = torch.arange(0, rows * k + 1, k, device=indices.device, dtype=torch.int64)
        return torch.sparse_csr_tensor(
            starts,
            columns.flatten().long(),
            probs.gather(-1, order).flatten(),
            (rows, self.num_classes),
            check_invariants=False,  # unset, torch 2.13 warns
        )
