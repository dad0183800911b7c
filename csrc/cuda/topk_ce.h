// The CUDA kernels of topk_ce on raw pointers and a stream. No torch headers, and none of CUDA's kernel language: what the
// glue, a C++ program or an IDE sees.
#pragma once

#include "rows.h"

namespace sparse_ce::cuda {

constexpr int64_t kMaxK = 1 << 29;

// Statistics (weight, loss, lse, probs and their gradients) are float, or double for f64 logits.
struct Forward {
  Rows logits;
  Dtype dtype;
  int64_t k;              // 1 <= k <= classes, at most kMaxK
  const int64_t* target;  // (N)
  const void* weight;     // (classes) or null
  double label_smoothing;
  void* loss;        // (N)
  void* lse;         // (N)
  int32_t* indices;  // (N, k)
  void* probs;       // (N, k)
  void* scratch;     // scratch_bytes, 16-byte aligned
};

struct Backward {
  const void* dloss;       // (N) or null
  const void* dlse;        // (N) or null
  const void* dprobs;      // (N, k) or null
  const int64_t* target;   // (N)
  const int32_t* indices;  // (N, k)
  const void* probs;       // (N, k)
  const void* weight;      // (classes) or null
  double label_smoothing;
  int64_t count;
  int64_t k;  // at most kMaxK; above classes where a list names a class twice
  int64_t classes;
  void* dlogits;  // (N, classes) of dtype, 16-byte aligned
  Dtype dtype;
};

inline bool in_range(int64_t rows, int64_t classes, int64_t k) {
  return in_range(rows, classes) && 1 <= k && k <= classes && k <= kMaxK;
}

// Of the arguments, all but the pointers are looked at.
int64_t scratch_bytes(const Forward& arguments);

// Both return before the kernels have run; what they return is the error of the launch, cudaErrorInvalidValue for sizes that
// are out of range.
cudaError_t forward(const Forward& arguments, cudaStream_t stream);
cudaError_t backward(const Backward& arguments, cudaStream_t stream);

}  // namespace sparse_ce::cuda
