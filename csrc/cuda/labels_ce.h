// The CUDA kernels of labels_ce on raw pointers and a stream. No torch headers, and none of CUDA's kernel language: what the
// glue, a C++ program or an IDE sees.
#pragma once

#include "rows.h"

namespace sparse_ce::cuda {

// Statistics (all but logits and labels) are float, or double for f64 logits.
struct LabelsForward {
  Rows logits;
  Dtype dtype;
  const bool* labels;  // (N, classes)
  double delta;
  void* loss;          // (N)
  void* negative;      // (N)
  void* positive;      // (N)
  void* cut_negative;  // (N)
  void* cut_positive;  // (N)
};

struct LabelsBackward {
  const void* dloss;  // (N)
  Rows logits;
  Dtype dtype;
  const bool* labels;        // (N, classes)
  const void* negative;      // (N)
  const void* positive;      // (N)
  const void* cut_negative;  // (N)
  const void* cut_positive;  // (N)
  void* dlogits;             // (N, classes) of the dtype of the logits
};

// Both return before the kernels have run; what they return is the error of the launch, cudaErrorInvalidValue for sizes that
// are out of range.
cudaError_t forward(const LabelsForward& arguments, cudaStream_t stream);
cudaError_t backward(const LabelsBackward& arguments, cudaStream_t stream);

}  // namespace sparse_ce::cuda
