// The operators of stem cosine on CPU tensors. Contract: python/sparse_ce/schema.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "glue.h"
#include "gradient_memory.h"
#include "isa.h"

namespace sparse_ce {
namespace {

cpu::Table table_of(const Tensor& embedding, const Tensor& output) {
  TORCH_CHECK(embedding.dim() == 2 && embedding.size(1) == output.size(-1) &&
                  (embedding.stride(1) == 1 || embedding.size(1) == 1),
              "embedding: expected (V, ", output.size(-1),
              ") with unit stride in the last dimension, got ", embedding.sizes());
  TORCH_CHECK((embedding.scalar_type() == at::kDouble) == (output.scalar_type() == at::kDouble),
              "embedding: expected double beside double and nowhere else, got ",
              embedding.scalar_type(), " beside ", output.scalar_type());
  return {embedding.const_data_ptr(), dtype_of<cpu::Dtype>(embedding.scalar_type()),
          embedding.size(0), embedding.stride(0)};
}

cpu::Rows rows_of_output(const Tensor& output) {
  const int64_t dims = output.dim();
  TORCH_CHECK((dims == 2 || dims == 3) && (output.stride(-1) == 1 || output.size(-1) == 1),
              "output: expected (N, D) or (B, T, D) with unit stride in the last dimension, got ",
              dims, " dimensions and stride ", output.stride(-1));
  auto rows = rows_of<cpu::Rows>(output);
  rows.dtype = dtype_of<cpu::Dtype>(output.scalar_type());
  return rows;
}

// About 16 Ki elements of the output per task.
int64_t grain(const Tensor& output) {
  return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, output.size(-1)));
}

std::tuple<Tensor, Tensor, Tensor> cosine_fwd(const Tensor& output, const Tensor& target,
                                              const Tensor& embedding, bool normalize) {
  const auto statistics =
      output.options().dtype(output.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  const Tensor loss = at::empty(target.sizes(), statistics),
               by_output = at::empty(target.sizes(), statistics),
               by_target = at::empty(target.sizes(), statistics);
  const cpu::CosineForward arguments{rows_of_output(output),
                                     target.const_data_ptr<int64_t>(),
                                     table_of(embedding, output),
                                     normalize,
                                     loss.data_ptr(),
                                     by_output.data_ptr(),
                                     by_target.data_ptr()};
  const auto forward = cpu::isa().cosine_forward;
  at::parallel_for(0, target.numel(), grain(output),
                   [&](int64_t begin, int64_t end) { forward(arguments, begin, end); });
  return {loss, by_output, by_target};
}

Tensor cosine_bwd(const Tensor& dloss, const Tensor& output, const Tensor& target,
                  const Tensor& embedding, const Tensor& by_output, const Tensor& by_target) {
  const Tensor doutput = cpu::empty_gradient(output.sizes(), output.scalar_type());
  // an upstream gradient may be expanded from a scalar
  const Tensor dloss_rows = dloss.contiguous();
  const cpu::CosineBackward arguments{
      dloss_rows.const_data_ptr(), rows_of_output(output),     target.const_data_ptr<int64_t>(),
      table_of(embedding, output), by_output.const_data_ptr(), by_target.const_data_ptr(),
      doutput.data_ptr()};
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
