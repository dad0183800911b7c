// The operators of stem plif on CPU tensors. Contract: python/sparse_ce/schema.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <mutex>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "glue.h"
#include "gradient_memory.h"
#include "grain.h"
#include "isa.h"

namespace sparse_ce {
namespace {

// (N, 2) -> (2), in one order.
Tensor sum_of_rows(const std::vector<double>& rows) {
  const Tensor sums = at::zeros({2}, at::kDouble);
  double* sum = sums.mutable_data_ptr<double>();
  for (size_t i = 0; i < rows.size(); ++i) sum[i % 2] += rows[i];
  return sums;
}

// Runs `part(sums, begin, end)` over the rows, and adds up what it found in cells and outside.
template <class Part>
std::tuple<Tensor, Tensor> sums_over(int64_t rows, int64_t grain, int64_t cells,
                                     const std::optional<Tensor>& scale, Part part) {
  const Tensor total = at::zeros({scale ? cells : 0, 2}, at::kLong);
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
  return {total, sum_of_rows(outside_rows)};
}

// Slopes, and with them offsets: f(0) = 0, and at the knot between two cells their lines meet. Added up from the middle, in one order.
std::tuple<Tensor, Tensor> plif_tables(const Tensor& w, double bound, at::ScalarType dtype) {
  const auto options = w.options().dtype(dtype);
  const Tensor learnt = w.contiguous(), slopes = at::empty(w.sizes(), options),
               offsets = at::empty(w.sizes(), options);
  const cpu::PlifSlopes arguments{learnt.const_data_ptr(), dtype_of<cpu::Dtype>(w.scalar_type()),
                                  slopes.data_ptr(), dtype == at::kDouble};
  const int64_t cells = w.size(0);
  const auto run = cpu::isa().plif_slopes;
  at::parallel_for(0, cells, 16384,
                   [&](int64_t begin, int64_t end) { run(arguments, begin, end); });
  const auto add = [&](const auto* slope, auto* offset) {
    using T = std::remove_reference_t<decltype(*offset)>;
    const int64_t middle = cells / 2;
    const double unit = bound / static_cast<double>(cells);
    // offset of cell i - offset of cell i - 1
    const auto step = [&](int64_t i) {
      return (static_cast<double>(slope[i - 1]) - slope[i]) *
             (unit * static_cast<double>(2 * i - cells));
    };
    offset[middle] = 0;
    const auto half = [&](bool right) {
      double sum = 0;
      if (right)
        for (int64_t i = middle + 1; i < cells; ++i) offset[i] = static_cast<T>(sum += step(i));
      else
        for (int64_t i = middle; i > 0; --i) offset[i - 1] = static_cast<T>(sum -= step(i));
    };
    at::parallel_for(0, 2, cells < 16384 ? 2 : 1, [&](int64_t begin, int64_t end) {
      for (int64_t side = begin; side < end; ++side) half(side != 0);
    });
  };
  if (dtype == at::kDouble)
    add(slopes.const_data_ptr<double>(), offsets.mutable_data_ptr<double>());
  else
    add(slopes.const_data_ptr<float>(), offsets.mutable_data_ptr<float>());
  return {slopes, offsets};
}

// The formula stands in python/sparse_ce/ops.py.
Tensor plif_dslopes(const Tensor& cells, const Tensor& outside, const Tensor& scale, double bound,
                    at::ScalarType dtype) {
  constexpr int64_t kPiece = 4096;
  const int64_t count = cells.size(0), middle = count / 2, pieces = (count - 1) / kPiece + 1;
  const Tensor dslopes = at::empty({count}, outside.options().dtype(dtype));
  const int64_t* sums = cells.const_data_ptr<int64_t>();
  const double* ends = outside.const_data_ptr<double>();
  std::vector<int64_t> before(pieces + 1);
  const auto over_pieces = [&](auto part) {
    at::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) part(p, p * kPiece, std::min(count, (p + 1) * kPiece));
    });
  };
  over_pieces([&](int64_t p, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) before[p + 1] += sums[2 * i];
  });
  for (int64_t p = 0; p < pieces; ++p) before[p + 1] += before[p];
  const int64_t total = before[pieces];
  const double width = 2 * bound / static_cast<double>(count) / scale.item<double>();
  const auto fill = [&](auto* out) {
    using T = std::remove_reference_t<decltype(*out)>;
    over_pieces([&](int64_t p, int64_t begin, int64_t end) {
      int64_t passed = before[p];
      for (int64_t i = begin; i < end; ++i) {
        passed += sums[2 * i];
        double sum = static_cast<double>(sums[2 * i + 1] - passed + (i < middle ? 0 : total));
        // the cell around 0
        if (i == middle && count % 2 != 0) sum -= static_cast<double>(total) / 2;
        sum *= width;
        if (i == 0) sum += ends[0];
        if (i == count - 1) sum += ends[1];
        out[i] = static_cast<T>(sum);
      }
    });
  };
  if (dtype == at::kDouble)
    fill(dslopes.mutable_data_ptr<double>());
  else
    fill(dslopes.mutable_data_ptr<float>());
  return dslopes;
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

cpu::PlifColumns columns_of(const Tensor& slopes, const Tensor& offsets, double bound) {
  return {slopes.const_data_ptr(), offsets.const_data_ptr(), slopes.size(0), bound};
}

PlifTopkOutputs plif_topk_ce_fwd(const Tensor& logits, const Tensor& target,
                                 const std::optional<Tensor>& weight, const Tensor& slopes,
                                 const Tensor& offsets, double bound, int64_t k,
                                 double label_smoothing) {
  check_lines(slopes, offsets, logits);
  const Outputs outputs = empty_outputs(logits, k);
  const Tensor values = empty_values(logits, k);
  cpu::PlifTopkForward arguments{
      forward_arguments<cpu::Forward>(logits, target, weight, k, label_smoothing, outputs),
      columns_of(slopes, offsets, bound), values.data_ptr()};
  arguments.list.logits.dtype = dtype_of<cpu::Dtype>(logits.scalar_type());
  const auto forward = cpu::isa().plif_topk_forward;
  at::parallel_for(0, target.numel(), cpu::rows_to_stream(logits.size(-1)),
                   [&](int64_t begin, int64_t end) { forward(arguments, begin, end); });
  return std::tuple_cat(outputs, std::tuple(values));
}

PlifGradients plif_topk_ce_bwd(const std::optional<Tensor>& dloss,
                               const std::optional<Tensor>& dlse,
                               const std::optional<Tensor>& dprobs, const Tensor& target,
                               const Tensor& indices, const Tensor& probs, const Tensor& values,
                               const std::optional<Tensor>& weight, const Tensor& slopes,
                               double bound, double label_smoothing, int64_t num_classes,
                               at::ScalarType dtype, const std::optional<Tensor>& scale) {
  auto shape = probs.sizes().vec();
  shape.back() = num_classes;
  const Tensor dlogits = cpu::empty_gradient(shape, dtype);
  const auto dloss_rows = contiguous(dloss), dlse_rows = contiguous(dlse),
             dprobs_rows = contiguous(dprobs);
  const Tensor cells = at::zeros({scale ? slopes.size(0) : 0, 2}, at::kLong);
  std::vector<double> outside_rows(2 * target.numel());
  const cpu::PlifTopkBackward arguments{
      backward_arguments<cpu::Backward>(dloss_rows, dlse_rows, dprobs_rows, target, indices, probs,
                                        weight, label_smoothing, dlogits),
      columns_of(slopes, slopes, bound), values.const_data_ptr(), outside_rows.data(),
      scale ? scale->item<double>() : 0};
  const auto backward = cpu::isa().plif_topk_backward;
  int64_t* sums = cells.mutable_data_ptr<int64_t>();
  std::mutex mutex;
  at::parallel_for(
      0, target.numel(), cpu::rows_to_stream(num_classes), [&](int64_t begin, int64_t end) {
        if (!scale) return backward(arguments, nullptr, begin, end);
        // a thread adds what it found while it is in the cache
        const int64_t pairs = values.size(-1), step = std::max<int64_t>(1, 8192 / pairs);
        std::vector<int32_t> cell(step * pairs + 16);
        std::vector<int64_t> mass(cell.size()), moment(cell.size());
        for (int64_t first = begin; first < end; first += step) {
          cpu::PlifAddends addends{cell.data(), mass.data(), moment.data(), 0};
          backward(arguments, &addends, first, std::min(first + step, end));
          const std::lock_guard<std::mutex> lock(mutex);
          for (int64_t i = 0; i < addends.count; ++i) {
            int64_t* sum = sums + 2 * static_cast<int64_t>(cell[i]);
            sum[0] += mass[i];
            sum[1] += moment[i];
          }
        }
      });
  return {dlogits, cells, sum_of_rows(outside_rows)};
}

// The contract of the fixed point is that of schema.py.
Tensor plif_scale(const std::optional<Tensor>& dloss, const std::optional<Tensor>& dlse,
                  const std::optional<Tensor>& dprobs, const Tensor& target,
                  const std::optional<Tensor>& weight, const Tensor& lse, int64_t num_classes) {
  const auto a = contiguous(dloss), b = contiguous(dlse), q = contiguous(dprobs);
  const Tensor rows = lse.reshape({-1}), scale = at::empty({}, at::kDouble);
  const int64_t* y = target.const_data_ptr<int64_t>();
  const auto largest_of = [&](auto zero) {
    using T = decltype(zero);
    const auto data = [](const std::optional<Tensor>& t) {
      return t ? t->const_data_ptr<T>() : nullptr;
    };
    // a NaN is the largest
    const auto larger = [](double x, double y) { return x > y || std::isnan(x) ? x : y; };
    const auto largest_in = [&](const T* from, int64_t count) {
      double largest = 0;
      for (int64_t i = 0; i < count; ++i) largest = larger(std::abs(double{from[i]}), largest);
      return largest;
    };
    const T *as = data(a), *bs = data(b), *qs = data(q), *lses = rows.const_data_ptr<T>();
    const int64_t k = q ? q->size(-1) : 0;
    const double at_most = weight ? largest_in(weight->const_data_ptr<T>(), num_classes) : 1;
    double largest = 0;
    for (int64_t n = 0; n < target.numel(); ++n) {
      double above = bs ? std::abs(double{bs[n]}) : 0;
      if (qs) above += 2 * largest_in(qs + n * k, k);
      // a loss moves its weights to the target, or away from it: twice their sum
      if (as && y[n] >= 0 && y[n] < num_classes) above += 2 * at_most * std::abs(double{as[n]});
      if (above != 0 && !std::isfinite(lses[n * rows.stride(0)]))
        above = std::numeric_limits<double>::quiet_NaN();
      largest = larger(above, largest);
    }
    return largest;
  };
  double total = lse.scalar_type() == at::kDouble ? largest_of(double{}) : largest_of(float{});
  total *= static_cast<double>(target.numel());
  int exponent = 0;
  const double mantissa = std::frexp(std::max(total, 0x1p-900), &exponent);
  *scale.mutable_data_ptr<double>() =
      std::ldexp(1.0, 60 - exponent + (mantissa == 0.5 ? 1 : 0)) + 0 * total;
  return scale;
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
  at::parallel_for(0, target.numel(), cpu::rows_of_exponentials(logits.size(-1)),
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
      sums_over(target.numel(), cpu::rows_of_exponentials(logits.size(-1)), slopes.size(0), scale,
                [&](auto&&... rest) { backward(arguments, rest...); });
  return {dlogits, cells, outside};
}

}  // namespace
}  // namespace sparse_ce

TORCH_LIBRARY_IMPL(sparse_ce_native, CPU, m) {
  m.impl("plif_tables", sparse_ce::plif_tables);
  m.impl("plif_scale", sparse_ce::plif_scale);
  m.impl("plif_dslopes", sparse_ce::plif_dslopes);
  m.impl("plif_topk_ce_fwd", sparse_ce::plif_topk_ce_fwd);
  m.impl("plif_topk_ce_bwd", sparse_ce::plif_topk_ce_bwd);
  m.impl("plif_fwd", sparse_ce::plif_fwd);
  m.impl("plif_bwd", sparse_ce::plif_bwd);
  m.impl("plif_ce_fwd", sparse_ce::plif_ce_fwd);
  m.impl("plif_ce_bwd", sparse_ce::plif_ce_bwd);
}
