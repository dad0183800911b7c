#pragma once

#include <cstdint>

namespace sparse_ce::cpu {

enum class Dtype { f32, bf16, f16, f64 };

// Rows of a tensor (outer, inner, classes) with unit stride in the classes: row n = o * inner + i.
struct Rows {
  const void* data;
  Dtype dtype;
  int64_t classes;
  int64_t inner;
  int64_t outer_stride;
  int64_t inner_stride;

  // Of row n, in elements.
  int64_t start(int64_t n) const { return n / inner * outer_stride + n % inner * inner_stride; }
};

}  // namespace sparse_ce::cpu
