// The operator of stem tail on CPU tensors. Contract: python/sparse_ce/schema.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <optional>

#include "glue.h"
#include "grain.h"
#include "isa.h"

namespace sparse_ce {
namespace {

TailOutputs tail_fwd(const Tensor& logits, const Tensor& target, const Tensor& indices,
                     const std::optional<Tensor>& uniform, int64_t samples) {
  const TailOutputs outputs = empty_tail_outputs(logits, samples);
  auto arguments = tail_arguments<cpu::Tail>(logits, target, indices, uniform, samples, outputs);
  arguments.logits.dtype = dtype_of<cpu::Dtype>(logits.scalar_type());
  const auto tail = cpu::isa().tail;
  at::parallel_for(0, target.numel(), cpu::rows_of_exponentials(logits.size(-1)),
                   [&](int64_t begin, int64_t end) { tail(arguments, begin, end); });
  return outputs;
}

}  // namespace
}  // namespace sparse_ce

TORCH_LIBRARY_IMPL(sparse_ce_native, CPU, m) { m.impl("tail_fwd", sparse_ce::tail_fwd); }
