// The operators of stem cosine on CPU tensors. Contract: python/sparse_ce/schema.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>

#include "glue.h"
#include "gradient_memory.h"
#include "isa.h"

namespace sparse_ce {
namespace {

// About 16 Ki elements of the output per task.
int64_t grain(const Tensor& output) {
  return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, output.size(-1)));
}

CosineOutputs cosine_fwd(const Tensor& output, const Tensor& target, const Tensor& embedding,
                         bool normalize) {
  const CosineOutputs outputs = empty_cosine_outputs(output, target);
  auto arguments =
      cosine_forward_arguments<cpu::CosineForward>(output, target, embedding, normalize, outputs);
  arguments.output.dtype = dtype_of<cpu::Dtype>(output.scalar_type());
  const auto forward = cpu::isa().cosine_forward;
  at::parallel_for(0, target.numel(), grain(output),
                   [&](int64_t begin, int64_t end) { forward(arguments, begin, end); });
  return outputs;
}

Tensor cosine_bwd(const Tensor& dloss, const Tensor& output, const Tensor& target,
                  const Tensor& embedding, const Tensor& by_output, const Tensor& by_target) {
  const Tensor doutput = cpu::empty_gradient(output.sizes(), output.scalar_type());
  const Tensor dloss_rows = dloss.contiguous();
  auto arguments = cosine_backward_arguments<cpu::CosineBackward>(
      dloss_rows, output, target, embedding, by_output, by_target, doutput);
  arguments.output.dtype = dtype_of<cpu::Dtype>(output.scalar_type());
  const auto backward = cpu::isa().cosine_backward;
  at::parallel_for(0, target.numel(), grain(output),
                   [&](int64_t begin, int64_t end) { backward(arguments, begin, end); });
  return doutput;
}

}  // namespace
}  // namespace sparse_ce

TORCH_LIBRARY_IMPL(sparse_ce_native, CPU, m) {
  m.impl("cosine_fwd", sparse_ce::cosine_fwd);
  m.impl("cosine_bwd", sparse_ce::cosine_bwd);
}
