// What the kernels of every stem are given: where rows of logits lie, and how many there may be. No torch headers, and none of
// CUDA's kernel language: what the glue, a C++ program or an IDE sees.
#pragma once

#include <cstdint>

#ifdef SPARSE_CE_EMULATION
#include <emulation.h>
#else
#include <cuda_runtime_api.h>
#endif

namespace sparse_ce::cuda {

enum class Dtype { f32, bf16, f16, f64 };

// Rows of a tensor (outer, inner, classes) with unit stride in the classes: row n = o * inner + i starts at
// o * outer_stride + i * inner_stride elements.
struct Rows {
  const void* data;
  int64_t count;    // below 2^31
  int64_t classes;  // at most 2^31 - 2^24
  int64_t inner;
  int64_t outer_stride;
  int64_t inner_stride;
};

// Rows are on x of the grid, and `int` counts classes, what a block looks for beyond the last included.
constexpr int64_t kMaxRows = 0x7FFFFFFF, kMaxClasses = 0x7FFFFFFF - (1 << 24);

inline bool in_range(int64_t rows, int64_t classes) {
  return rows <= kMaxRows && 1 <= classes && classes <= kMaxClasses;
}

}  // namespace sparse_ce::cuda
