// The CUDA kernels of tail on raw pointers and a stream. No torch headers, and none of CUDA's kernel language: what the
// glue, a C++ program or an IDE sees.
#pragma once

#include "rows.h"

namespace sparse_ce::cuda {

// Statistics (all but logits, target, indices and draws) are float, or double for f64 logits.
struct Tail {
  Rows logits;
  Dtype dtype;
  const int64_t* target;   // (N)
  const int32_t* indices;  // (N, k), in the order of the list
  int64_t k;               // 1 <= k < classes
  const void* uniform;     // (N) in [0, 1), or null: without draws
  int64_t samples;
  void* row_max;   // (N)
  void* log_sum;   // (N)
  void* mass;      // (N)
  int32_t* draws;  // (N, samples)
};

// Returns before the kernels have run; what it returns is the error of the launch, cudaErrorInvalidValue for sizes that are out
// of range.
cudaError_t forward(const Tail& arguments, cudaStream_t stream);

}  // namespace sparse_ce::cuda
