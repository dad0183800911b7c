// The operators of stem reduce on CPU tensors. Contract: python/sparse_ce/schema.py.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "glue.h"

namespace sparse_ce {
namespace {

// Rows of a partial sum, so that the order of the additions is the same on any number of threads, and partial sums of a task.
constexpr int64_t part = 4096, parts_of_task = 8;

struct Sums {
  double loss = 0, weight = 0;
  int64_t rows = 0;
};

template <class T> Sums sums_of(const T* loss, const int64_t* target, const T* weight,
                                int64_t classes, int64_t ignore_index, int64_t rows) {
  Sums sums;
  for (int64_t i = 0; i < rows; ++i) {
    if (target[i] == ignore_index) continue;
    sums.loss += loss[i];
    if (weight) sums.weight += weight[std::clamp<int64_t>(target[i], 0, classes - 1)];
    ++sums.rows;
  }
  return sums;
}

std::tuple<Tensor, Tensor> reduce_fwd(const Tensor& loss, const Tensor& target,
                                      const std::optional<Tensor>& weight, int64_t ignore_index,
                                      bool mean) {
  const Tensor losses = loss.contiguous();
  const Tensor reduced = at::empty({}, loss.options()), divisor = at::empty({}, loss.options());
  const int64_t rows = target.numel(), classes = weight ? weight->numel() : 0;
  std::vector<Sums> parts((rows + part - 1) / part);
  AT_DISPATCH_FLOATING_TYPES(loss.scalar_type(), "reduce_fwd", [&] {
    const auto* of_rows = losses.const_data_ptr<scalar_t>();
    const auto* of_classes = weight ? weight->const_data_ptr<scalar_t>() : nullptr;
    const auto* targets = target.const_data_ptr<int64_t>();
    at::parallel_for(0, static_cast<int64_t>(parts.size()), parts_of_task,
                     [&](int64_t begin, int64_t end) {
                       for (int64_t i = begin; i < end; ++i)
                         parts[i] = sums_of(of_rows + i * part, targets + i * part, of_classes,
                                            classes, ignore_index, std::min(part, rows - i * part));
                     });
    Sums all;
    for (const Sums& sums : parts) {
      all.loss += sums.loss;
      all.weight += sums.weight;
      all.rows += sums.rows;
    }
    const double over =
        !mean || all.rows == 0 ? 1 : (weight ? all.weight : static_cast<double>(all.rows));
    *reduced.data_ptr<scalar_t>() = static_cast<scalar_t>(all.loss / over);
    *divisor.data_ptr<scalar_t>() = static_cast<scalar_t>(over);
  });
  return {reduced, divisor};
}

Tensor reduce_bwd(const Tensor& dreduced, const Tensor& target, const Tensor& divisor,
                  int64_t ignore_index) {
  const Tensor dloss = at::empty(target.sizes(), dreduced.options());
  AT_DISPATCH_FLOATING_TYPES(dreduced.scalar_type(), "reduce_bwd", [&] {
    const scalar_t share =
        *dreduced.const_data_ptr<scalar_t>() / *divisor.const_data_ptr<scalar_t>();
    const auto* targets = target.const_data_ptr<int64_t>();
    auto* out = dloss.data_ptr<scalar_t>();
    at::parallel_for(0, target.numel(), part * parts_of_task, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) out[i] = targets[i] == ignore_index ? 0 : share;
    });
  });
  return dloss;
}

}  // namespace
}  // namespace sparse_ce

TORCH_LIBRARY_IMPL(sparse_ce_native, CPU, m) {
  m.impl("reduce_fwd", sparse_ce::reduce_fwd);
  m.impl("reduce_bwd", sparse_ce::reduce_bwd);
}
