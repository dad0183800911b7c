// The CUDA kernels of reduce on raw pointers and a stream. No torch headers, and none of CUDA's kernel language: what the
// glue, a C++ program or an IDE sees.
#pragma once

#include "rows.h"

namespace sparse_ce::cuda {

// f32 or f64 is the dtype of all numbers but targets.
struct ReduceForward {
  const void* loss;  // (rows)
  Dtype dtype;
  const int64_t* target;  // (rows)
  const void* weight;     // (classes) or null
  int64_t rows;
  int64_t classes;
  int64_t ignore_index;
  bool mean;
  void* scratch;  // scratch_bytes, 8-byte aligned
  void* reduced;  // ()
  void* divisor;  // ()
};

struct ReduceBackward {
  const void* dreduced;  // ()
  Dtype dtype;
  const int64_t* target;  // (rows)
  const void* divisor;    // ()
  int64_t rows;           // at most 2^40
  int64_t ignore_index;
  void* dloss;  // (rows)
};

// Of the arguments, all but the pointers are looked at.
int64_t scratch_bytes(const ReduceForward& arguments);

// Both return before the kernels have run; what they return is the error of the launch, cudaErrorInvalidValue for sizes that
// are out of range.
cudaError_t forward(const ReduceForward& arguments, cudaStream_t stream);
cudaError_t backward(const ReduceBackward& arguments, cudaStream_t stream);

}  // namespace sparse_ce::cuda
