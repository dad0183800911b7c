// The operators of stem sparse_linear on CPU tensors. Contract: python/sparse_ce/schema.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "glue.h"
#include "gradient_memory.h"
#include "isa.h"

namespace sparse_ce {
namespace {

// A class with more pairs is summed in pieces of this many, which are then added in their order: the pieces go to several
// threads, and how many those are changes no result.
constexpr int64_t kPiece = 1024;

cpu::WeightedRows onto(const Tensor& source, const Tensor& out) {
  cpu::WeightedRows arguments{};
  arguments.source = source.const_data_ptr();
  arguments.source_dtype = dtype_of<cpu::Dtype>(source.scalar_type());
  arguments.width = source.size(1);
  arguments.out = out.data_ptr();
  arguments.out_dtype = dtype_of<cpu::Dtype>(out.scalar_type());
  return arguments;
}

Tensor dhidden(const Tensor& coefficients, const Tensor& classes, const Tensor& weight,
               at::ScalarType dtype) {
  check_weighted_rows(coefficients, classes, weight, dtype);
  const int64_t rows = classes.size(0), m = classes.size(1);
  const Tensor out = cpu::empty_gradient({rows, weight.size(1)}, dtype);
  std::vector<int64_t> starts(rows + 1);
  for (int64_t n = 0; n <= rows; ++n) starts[n] = n * m;
  cpu::WeightedRows arguments = onto(weight, out);
  arguments.coefficients = coefficients.const_data_ptr();
  arguments.indices = classes.const_data_ptr<int32_t>();
  arguments.starts = starts.data();
  arguments.ends = starts.data() + 1;
  const auto weighted_rows = cpu::isa().weighted_rows;
  const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, m * weight.size(1)));
  at::parallel_for(0, rows, grain,
                   [&](int64_t begin, int64_t end) { weighted_rows(arguments, begin, end); });
  return out;
}

// The pairs by class, in the order of the tokens, those of coefficient 0 left out.
template <class T> struct Pairs {
  std::vector<int64_t> starts;  // (V + 1)
  std::vector<int32_t> tokens;
  std::vector<T> coefficients;

  Pairs(const Tensor& g, const Tensor& classes, int64_t num_classes) : starts(num_classes + 1) {
    const int64_t pairs = classes.numel(), m = classes.size(1);
    const int32_t* c = classes.const_data_ptr<int32_t>();
    const T* value = g.const_data_ptr<T>();
    for (int64_t p = 0; p < pairs; ++p) {
      TORCH_CHECK(0 <= c[p] && c[p] < num_classes, "classes: expected classes in [0, ", num_classes,
                  "), got ", c[p]);
      starts[c[p] + 1] += value[p] != 0;
    }
    for (int64_t i = 0; i < num_classes; ++i) starts[i + 1] += starts[i];
    tokens.resize(starts.back());
    coefficients.resize(starts.back());
    std::vector<int64_t> next(starts.begin(), starts.end() - 1);
    for (int64_t p = 0; p < pairs; ++p) {
      if (value[p] == 0) continue;
      const int64_t place = next[c[p]]++;
      tokens[place] = static_cast<int32_t>(p / m);
      coefficients[place] = value[p];
    }
  }
};

template <class T> Tensor dweight_of(const Tensor& g, const Tensor& classes, const Tensor& hidden,
                                     int64_t num_classes, at::ScalarType dtype) {
  const Pairs<T> pairs(g, classes, num_classes);
  const int64_t width = hidden.size(1);
  const Tensor out = cpu::empty_gradient({num_classes, width}, dtype);
  const auto weighted_rows = cpu::isa().weighted_rows;

  // a class of many pairs is left empty at first
  std::vector<int64_t> ends(pairs.starts.begin() + 1, pairs.starts.end()), many;
  for (int64_t i = 0; i < num_classes; ++i)
    if (ends[i] - pairs.starts[i] > kPiece) {
      many.push_back(i);
      ends[i] = pairs.starts[i];
    }
  cpu::WeightedRows arguments = onto(hidden, out);
  arguments.coefficients = pairs.coefficients.data();
  arguments.indices = pairs.tokens.data();
  arguments.starts = pairs.starts.data();
  arguments.ends = ends.data();
  // shares of equal cost, not of equally many classes: frequent ones stand side by side. A row that is written costs about as
  // much as two that are read
  const auto cost = [&](int64_t i) { return pairs.starts[i] + 2 * i; };
  const int64_t tasks = 8 * at::get_num_threads();
  const auto boundary = [&](int64_t task) {
    const int64_t wanted = cost(num_classes) * task / tasks;
    int64_t low = 0, high = num_classes;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (cost(middle) < wanted)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  };
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    weighted_rows(arguments, boundary(begin), end == tasks ? num_classes : boundary(end));
  });
  if (many.empty()) return out;

  std::vector<int64_t> starts, first_piece;
  ends.clear();
  for (const int64_t i : many) {
    first_piece.push_back(static_cast<int64_t>(starts.size()));
    for (int64_t p = pairs.starts[i]; p < pairs.starts[i + 1]; p += kPiece) {
      starts.push_back(p);
      ends.push_back(std::min(p + kPiece, pairs.starts[i + 1]));
    }
  }
  const auto pieces = static_cast<int64_t>(starts.size());
  const Tensor sums = at::empty({pieces, width}, g.options());
  cpu::WeightedRows piecewise = arguments;
  piecewise.starts = starts.data();
  piecewise.ends = ends.data();
  piecewise.out = sums.data_ptr();
  piecewise.out_dtype = dtype_of<cpu::Dtype>(sums.scalar_type());
  at::parallel_for(0, pieces, 1,
                   [&](int64_t begin, int64_t end) { weighted_rows(piecewise, begin, end); });

  const std::vector<T> ones(pieces, T{1});
  std::vector<int32_t> order(pieces);
  for (int64_t i = 0; i < pieces; ++i) order[i] = static_cast<int32_t>(i);
  const auto count = static_cast<int64_t>(many.size());
  for (int64_t i = 0; i < count; ++i) {
    const int64_t begin = first_piece[i], end = i + 1 < count ? first_piece[i + 1] : pieces;
    cpu::WeightedRows whole = onto(sums, out);
    whole.coefficients = ones.data();
    whole.indices = order.data();
    whole.starts = &begin;
    whole.ends = &end;
    whole.out = static_cast<char*>(out.data_ptr()) + many[i] * width * out.element_size();
    weighted_rows(whole, 0, 1);
  }
  return out;
}

Tensor dweight(const Tensor& coefficients, const Tensor& classes, const Tensor& hidden,
               int64_t num_classes, at::ScalarType dtype) {
  check_weighted_rows(coefficients, classes, hidden, dtype);
  if (hidden.scalar_type() == at::kDouble)
    return dweight_of<double>(coefficients, classes, hidden, num_classes, dtype);
  return dweight_of<float>(coefficients, classes, hidden, num_classes, dtype);
}

Tensor buffer(const Tensor& like, int64_t rows, int64_t num_classes) {
  return cpu::empty_gradient({rows, num_classes}, like.scalar_type());
}

}  // namespace
}  // namespace sparse_ce

TORCH_LIBRARY_IMPL(sparse_ce_native, CPU, m) {
  m.impl("sparse_linear_buffer", sparse_ce::buffer);
  m.impl("sparse_linear_dhidden", sparse_ce::dhidden);
  m.impl("sparse_linear_dweight", sparse_ce::dweight);
}
