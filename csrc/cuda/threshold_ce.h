// The CUDA kernels of threshold_ce on raw pointers and a stream. No torch headers, and none of CUDA's kernel language: what the
// glue, a C++ program or an IDE sees.
#pragma once

#include "rows.h"

namespace sparse_ce::cuda {

// Statistics (all but logits, target, index and count) are float, or double for f64 logits.
struct ThresholdForward {
  Rows logits;
  Dtype dtype;
  int64_t k;              // 1 <= k <= classes
  double delta;           // 1 where k or nothing cuts
  const int64_t* target;  // (N)
  const void* weight;     // (classes) or null
  double label_smoothing;
  void* loss;          // (N)
  void* lse;           // (N)
  void* row_max;       // (N)
  void* log_sum;       // (N)
  void* cut;           // (N)
  int32_t* cut_index;  // (N)
  int32_t* kept;       // (N)
};

struct ThresholdBackward {
  const void* dloss;  // (N) or null
  const void* dlse;   // (N) or null
  Rows logits;
  Dtype dtype;
  const int64_t* target;     // (N)
  const void* row_max;       // (N)
  const void* log_sum;       // (N)
  const void* cut;           // (N)
  const int32_t* cut_index;  // (N)
  const int32_t* kept;       // (N)
  const void* weight;        // (classes) or null
  double label_smoothing;
  void* dlogits;  // (N, classes) of the dtype of the logits
};

// Both return before the kernels have run; what they return is the error of the launch, cudaErrorInvalidValue for sizes that
// are out of range.
cudaError_t forward(const ThresholdForward& arguments, cudaStream_t stream);
cudaError_t backward(const ThresholdBackward& arguments, cudaStream_t stream);

}  // namespace sparse_ce::cuda
