// The CUDA kernels of cosine on raw pointers and a stream. No torch headers, and none of CUDA's kernel language: what the
// glue, a C++ program or an IDE sees.
#pragma once

#include "rows.h"

namespace sparse_ce::cuda {

// The vectors that targets name.
struct Table {
  const void* data;
  Dtype dtype;  // f64 if and only if the output is
  int64_t vectors;
  int64_t stride;  // elements from one vector to the next
};

// Statistics (loss and coefficients) are float, or double for an f64 output.
struct CosineForward {
  Rows output;
  Dtype dtype;
  const int64_t* target;  // (N)
  Table table;
  bool normalize;
  void* loss;       // (N)
  void* by_output;  // (N)
  void* by_target;  // (N)
};

struct CosineBackward {
  const void* dloss;  // (N)
  Rows output;
  Dtype dtype;
  const int64_t* target;  // (N)
  Table table;
  const void* by_output;  // (N)
  const void* by_target;  // (N)
  void* doutput;          // (N, D) of the dtype of the output, 16-byte aligned
};

// Both return before the kernels have run; what they return is the error of the launch, cudaErrorInvalidValue for sizes that
// are out of range.
cudaError_t forward(const CosineForward& arguments, cudaStream_t stream);
cudaError_t backward(const CosineBackward& arguments, cudaStream_t stream);

}  // namespace sparse_ce::cuda
