"""Fused kernels for output layers with many classes.

In the place of ``F.cross_entropy`` stands ``fused_sparse_ce`` (``SparseCrossEntropyLoss`` as a
module), of an output layer and its loss ``fused_linear_sparse_ce`` (``SparseLinearCrossEntropy``),
where its classes are sharded over ranks ``vocab_parallel_linear_sparse_ce``. ``KSchedule`` says how
many classes to keep at a step, ``adaptive_sparse_ce`` drops those that have been learnt,
``MonotonicPLIF`` is a learnable function of the logits, ``ContinuousOutputHead`` an output layer
without a softmax. ``python -m sparse_ce`` shows what runs on this machine.
"""

try:
    import torch
except ImportError as error:
    raise ImportError("sparse_ce needs PyTorch 2.11 or later: install torch first") from error
if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 11):
    raise ImportError(f"sparse_ce needs PyTorch 2.11 or later, found {torch.__version__}")

from .adaptive import AdaptiveSupport, adaptive_sparse_ce
from .continuous import continuous_output_loss
from .functional import fused_sparse_ce, sparse_softmax
from .linear import fused_linear_sparse_ce
from .modules import ContinuousOutputHead, SparseCrossEntropyLoss, SparseLinearCrossEntropy
from .parallel import vocab_parallel_linear_sparse_ce, vocab_parallel_sparse_ce
from .plif import MonotonicPLIF
from .schedule import AdaptiveAccumulation, KSchedule
from .support import Support

__version__ = "0.1.0"
__all__ = [
    "AdaptiveAccumulation",
    "AdaptiveSupport",
    "ContinuousOutputHead",
    "KSchedule",
    "MonotonicPLIF",
    "SparseCrossEntropyLoss",
    "SparseLinearCrossEntropy",
    "Support",
    "adaptive_sparse_ce",
    "continuous_output_loss",
    "fused_linear_sparse_ce",
    "fused_sparse_ce",
    "sparse_softmax",
    "vocab_parallel_linear_sparse_ce",
    "vocab_parallel_sparse_ce",
]
