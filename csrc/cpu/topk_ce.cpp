// The operators of stem topk_ce on CPU tensors: tensors in, pointers out, rows in parallel. Contract: python/sparse_ce/schema.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <optional>
#include <string>

#include "glue.h"
#include "gradient_memory.h"
#include "grain.h"
#include "isa.h"

namespace sparse_ce {
namespace {

std::string isa_name() { return cpu::isa().name; }

Outputs topk_ce_fwd(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight,
                    int64_t k, double label_smoothing) {
  const Outputs outputs = empty_outputs(logits, k);
  auto arguments =
      forward_arguments<cpu::Forward>(logits, target, weight, k, label_smoothing, outputs);
  arguments.logits.dtype = dtype_of<cpu::Dtype>(logits.scalar_type());
  const auto forward = cpu::isa().forward;
  at::parallel_for(0, target.numel(), cpu::rows_to_stream(logits.size(-1)),
                   [&](int64_t begin, int64_t end) { forward(arguments, begin, end); });
  return outputs;
}

Tensor topk_ce_bwd(const std::optional<Tensor>& dloss, const std::optional<Tensor>& dlse,
                   const std::optional<Tensor>& dprobs, const Tensor& target, const Tensor& indices,
                   const Tensor& probs, const std::optional<Tensor>& weight, double label_smoothing,
                   int64_t num_classes, at::ScalarType dtype) {
  auto shape = probs.sizes().vec();
  shape.back() = num_classes;
  const Tensor dlogits = cpu::empty_gradient(shape, dtype);
  const auto dloss_rows = contiguous(dloss), dlse_rows = contiguous(dlse),
             dprobs_rows = contiguous(dprobs);
  const auto arguments = backward_arguments<cpu::Backward>(
      dloss_rows, dlse_rows, dprobs_rows, target, indices, probs, weight, label_smoothing, dlogits);
  const auto backward = cpu::isa().backward;
  at::parallel_for(0, target.numel(), cpu::rows_to_stream(num_classes),
                   [&](int64_t begin, int64_t end) { backward(arguments, begin, end); });
  return dlogits;
}

}  // namespace
}  // namespace sparse_ce

TORCH_LIBRARY_IMPL(sparse_ce_native, CPU, m) {
  m.impl("topk_ce_fwd", sparse_ce::topk_ce_fwd);
  m.impl("topk_ce_bwd", sparse_ce::topk_ce_bwd);
}

TORCH_LIBRARY_IMPL(sparse_ce_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", sparse_ce::isa_name);
}
