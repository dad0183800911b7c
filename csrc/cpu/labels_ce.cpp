// The operators of stem labels_ce on CPU tensors. Contract: python/sparse_ce/schema.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>

#include "glue.h"
#include "gradient_memory.h"
#include "grain.h"
#include "isa.h"

namespace sparse_ce {
namespace {

LabelsOutputs labels_ce_fwd(const Tensor& logits, const Tensor& labels, double delta) {
  const LabelsOutputs outputs = empty_labels_outputs(logits);
  auto arguments = labels_forward_arguments<cpu::LabelsForward>(logits, labels, delta, outputs);
  arguments.logits.dtype = dtype_of<cpu::Dtype>(logits.scalar_type());
  const auto forward = cpu::isa().labels_forward;
  at::parallel_for(0, std::get<0>(outputs).numel(), cpu::rows_of_exponentials(logits.size(-1)),
                   [&](int64_t begin, int64_t end) { forward(arguments, begin, end); });
  return outputs;
}

Tensor labels_ce_bwd(const Tensor& dloss, const Tensor& logits, const Tensor& labels,
                     const Tensor& negative, const Tensor& positive, const Tensor& cut_negative,
                     const Tensor& cut_positive) {
  const Tensor dlogits = cpu::empty_gradient(logits.sizes(), logits.scalar_type());
  const Tensor dloss_rows = dloss.contiguous();
  auto arguments = labels_backward_arguments<cpu::LabelsBackward>(
      dloss_rows, logits, labels, negative, positive, cut_negative, cut_positive, dlogits);
  arguments.logits.dtype = dtype_of<cpu::Dtype>(logits.scalar_type());
  const auto backward = cpu::isa().labels_backward;
  at::parallel_for(0, negative.numel(), cpu::rows_of_exponentials(logits.size(-1)),
                   [&](int64_t begin, int64_t end) { backward(arguments, begin, end); });
  return dlogits;
}

}  // namespace
}  // namespace sparse_ce

TORCH_LIBRARY_IMPL(sparse_ce_native, CPU, m) {
  m.impl("labels_ce_fwd", sparse_ce::labels_ce_fwd);
  m.impl("labels_ce_bwd", sparse_ce::labels_ce_bwd);
}
