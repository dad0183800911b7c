// The operators of stem plif on CPU tensors. Contract: python/sparse_ce/schema.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <mutex>
#include <optional>
#include <tuple>
#include <vector>

#include "glue.h"
#include "gradient_memory.h"
#include "isa.h"

namespace sparse_ce {
namespace {

// About 16 Ki exponentials per task.
int64_t grain(int64_t classes) { return std::max<int64_t>(1, 16384 / classes); }

// Runs `part(sums, begin, end)` over the rows, and adds up what it found in cells and outside.
template <class Part>
std::tuple<Tensor, Tensor> sums_over(int64_t rows, int64_t grain, int64_t cells,
                                     const std::optional<Tensor>& scale, Part part) {
  const Tensor total = at::zeros({scale ? cells : 0, 2}, at::kLong);
  const Tensor outside = at::zeros({2}, at::kDouble);
  std::vector<double> outside_rows(2 * rows);
  const double factor = scale ? scale->item<double>() : 0;
  int64_t* sum = total.mutable_data_ptr<int64_t>();
  std::mutex mutex;
  at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    cpu::PlifSums sums{scale ? sum : nullptr, outside_rows.data(), factor};
    if (!scale || end - begin == rows) return part(sums, begin, end);
    std::vector<int64_t> own(total.numel());
    sums.cells = own.data();
    part(sums, begin, end);
    const std::lock_guard<std::mutex> lock(mutex);
    // integers: the sum does not know who came first
    for (size_t i = 0; i < own.size(); ++i) sum[i] += own[i];
  });
  double* ends = outside.mutable_data_ptr<double>();
  for (int64_t n = 0; n < rows; ++n)
    for (int side = 0; side < 2; ++side) ends[side] += outside_rows[2 * n + side];
  return {total, outside};
}

Tensor plif_fwd(const Tensor& x, const Tensor& slopes, const Tensor& offsets, double bound) {
  const Tensor lines = lines_of(slopes, offsets, x), y = at::empty_like(x);
  const auto arguments = plif_forward_arguments<cpu::PlifForward>(lines, bound, x, y);
  const auto forward = cpu::isa().plif_forward;
  at::parallel_for(0, x.numel(), 16384,
                   [&](int64_t begin, int64_t end) { forward(arguments, begin, end); });
  return y;
}

PlifGradients plif_bwd(const Tensor& dy, const Tensor& x, const Tensor& slopes, double bound,
                       const std::optional<Tensor>& scale) {
  const Tensor lines = lines_of(slopes, slopes, x),
               dx = cpu::empty_gradient(x.sizes(), x.scalar_type());
  const auto arguments = plif_backward_arguments<cpu::PlifBackward>(lines, bound, dy, x, dx);
  const auto backward = cpu::isa().plif_backward;
  const int64_t pieces = (x.numel() + cpu::kPlifPiece - 1) / cpu::kPlifPiece;
  // a thread brings sums of its own: it should have more to add to them than they are
  const int64_t grain = 4 + 2 * slopes.size(0) / cpu::kPlifPiece;
  const auto [cells, outside] = sums_over(pieces, grain, slopes.size(0), scale,
                                          [&](auto&&... rest) { backward(arguments, rest...); });
  return {dx, cells, outside};
}

Outputs plif_ce_fwd(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight,
                    const Tensor& slopes, const Tensor& offsets, double bound,
                    double label_smoothing) {
  const Tensor lines = lines_of(slopes, offsets, logits);
  const Outputs outputs = empty_plif_ce_outputs(logits);
  auto arguments = plif_ce_forward_arguments<cpu::PlifCeForward>(lines, bound, logits, target,
                                                                 weight, label_smoothing, outputs);
  arguments.logits.dtype = dtype_of<cpu::Dtype>(logits.scalar_type());
  const auto forward = cpu::isa().plif_ce_forward;
  at::parallel_for(0, target.numel(), grain(logits.size(-1)),
                   [&](int64_t begin, int64_t end) { forward(arguments, begin, end); });
  return outputs;
}

PlifGradients plif_ce_bwd(const std::optional<Tensor>& dloss, const std::optional<Tensor>& dlse,
                          const Tensor& logits, const Tensor& target, const Tensor& row_max,
                          const Tensor& log_sum, const std::optional<Tensor>& weight,
                          const Tensor& slopes, const Tensor& offsets, double bound,
                          double label_smoothing, const std::optional<Tensor>& scale) {
  const Tensor lines = lines_of(slopes, offsets, logits),
               dlogits = cpu::empty_gradient(logits.sizes(), logits.scalar_type());
  const auto dloss_rows = contiguous(dloss), dlse_rows = contiguous(dlse);
  auto arguments = plif_ce_backward_arguments<cpu::PlifCeBackward>(
      lines, bound, dloss_rows, dlse_rows, logits, target, row_max, log_sum, weight,
      label_smoothing, dlogits);
  arguments.logits.dtype = dtype_of<cpu::Dtype>(logits.scalar_type());
  const auto backward = cpu::isa().plif_ce_backward;
  const auto [cells, outside] =
      sums_over(target.numel(), grain(logits.size(-1)), slopes.size(0), scale,
                [&](auto&&... rest) { backward(arguments, rest...); });
  return {dlogits, cells, outside};
}

}  // namespace
}  // namespace sparse_ce

TORCH_LIBRARY_IMPL(sparse_ce_native, CPU, m) {
  m.impl("plif_fwd", sparse_ce::plif_fwd);
  m.impl("plif_bwd", sparse_ce::plif_bwd);
  m.impl("plif_ce_fwd", sparse_ce::plif_ce_fwd);
  m.impl("plif_ce_bwd", sparse_ce::plif_ce_bwd);
}
