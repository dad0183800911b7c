// The operators of stem threshold_ce on CPU tensors. Contract: python/sparse_ce/schema.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>

#include "glue.h"
#include "gradient_memory.h"
#include "grain.h"
#include "isa.h"

namespace sparse_ce {
namespace {

ThresholdOutputs threshold_ce_fwd(const Tensor& logits, const Tensor& target,
                                  const std::optional<Tensor>& weight, int64_t k, double delta,
                                  double label_smoothing) {
  const ThresholdOutputs outputs = empty_threshold_outputs(logits, k);
  auto arguments = threshold_forward_arguments<cpu::ThresholdForward>(
      logits, target, weight, k, delta, label_smoothing, outputs);
  arguments.logits.dtype = dtype_of<cpu::Dtype>(logits.scalar_type());
  const auto forward = cpu::isa().threshold_forward;
  at::parallel_for(0, target.numel(), cpu::rows_of_exponentials(logits.size(-1)),
                   [&](int64_t begin, int64_t end) { forward(arguments, begin, end); });
  return outputs;
}

Tensor threshold_ce_bwd(const std::optional<Tensor>& dloss, const std::optional<Tensor>& dlse,
                        const Tensor& logits, const Tensor& target, const Tensor& row_max,
                        const Tensor& log_sum, const Tensor& cut, const Tensor& cut_index,
                        const Tensor& kept, const std::optional<Tensor>& weight,
                        double label_smoothing) {
  const Tensor dlogits = cpu::empty_gradient(logits.sizes(), logits.scalar_type());
  const auto dloss_rows = contiguous(dloss), dlse_rows = contiguous(dlse);
  auto arguments = threshold_backward_arguments<cpu::ThresholdBackward>(
      dloss_rows, dlse_rows, logits, target, row_max, log_sum, cut, cut_index, kept, weight,
      label_smoothing, dlogits);
  arguments.logits.dtype = dtype_of<cpu::Dtype>(logits.scalar_type());
  const auto backward = cpu::isa().threshold_backward;
  at::parallel_for(0, target.numel(), cpu::rows_of_exponentials(logits.size(-1)),
                   [&](int64_t begin, int64_t end) { backward(arguments, begin, end); });
  return dlogits;
}

}  // namespace
}  // namespace sparse_ce

TORCH_LIBRARY_IMPL(sparse_ce_native, CPU, m) {
  m.impl("threshold_ce_fwd", sparse_ce::threshold_ce_fwd);
  m.impl("threshold_ce_bwd", sparse_ce::threshold_ce_bwd);
}
