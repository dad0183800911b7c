"""The compiled operators: csrc/ behind the namespace ``sparse_ce_native``, chosen by the device of
the tensors.
"""

import torch

from . import schema as schema  # loads the library and defines the namespace

topk_ce_fwd = torch.ops.sparse_ce_native.topk_ce_fwd.default
topk_ce_bwd = torch.ops.sparse_ce_native.topk_ce_bwd.default
topk_ce_loss = torch.ops.sparse_ce_native.topk_ce_loss.default
plif_tables = torch.ops.sparse_ce_native.plif_tables.default
plif_scale = torch.ops.sparse_ce_native.plif_scale.default
plif_dslopes = torch.ops.sparse_ce_native.plif_dslopes.default
plif_fwd = torch.ops.sparse_ce_native.plif_fwd.default
plif_bwd = torch.ops.sparse_ce_native.plif_bwd.default
plif_ce_fwd = torch.ops.sparse_ce_native.plif_ce_fwd.default
plif_ce_bwd = torch.ops.sparse_ce_native.plif_ce_bwd.default
plif_topk_ce_fwd = torch.ops.sparse_ce_native.plif_topk_ce_fwd.default
plif_topk_ce_bwd = torch.ops.sparse_ce_native.plif_topk_ce_bwd.default
sparse_linear_buffer = torch.ops.sparse_ce_native.sparse_linear_buffer.default
sparse_linear_dhidden = torch.ops.sparse_ce_native.sparse_linear_dhidden.default
sparse_linear_dweight = torch.ops.sparse_ce_native.sparse_linear_dweight.default
threshold_ce_fwd = torch.ops.sparse_ce_native.threshold_ce_fwd.default
threshold_ce_bwd = torch.ops.sparse_ce_native.threshold_ce_bwd.default
threshold_ce_loss = torch.ops.sparse_ce_native.threshold_ce_loss.default
tail_fwd = torch.ops.sparse_ce_native.tail_fwd.default
labels_ce_fwd = torch.ops.sparse_ce_native.labels_ce_fwd.default
labels_ce_bwd = torch.ops.sparse_ce_native.labels_ce_bwd.default
reduce_fwd = torch.ops.sparse_ce_native.reduce_fwd.default
reduce_bwd = torch.ops.sparse_ce_native.reduce_bwd.default
cosine_fwd = torch.ops.sparse_ce_native.cosine_fwd.default
cosine_bwd = torch.ops.sparse_ce_native.cosine_bwd.default
