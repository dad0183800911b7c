// The CUDA kernels of sparse_linear on raw pointers and a stream. No torch headers, and none of CUDA's kernel language: what
// the glue, a C++ program or an IDE sees.
#pragma once

#include "rows.h"

namespace sparse_ce::cuda {

// Coefficients are float, or double for an f64 source. One of 0 adds nothing, not even NaN. Sums are float, or double for an
// f64 source, and every one has one order: that of the pairs.

// The rows of the weight that tokens have chosen: out[n] = sum_j coefficients[n, j] source[classes[n, j]].
struct Gather {
  const void* coefficients;  // (tokens, m)
  const int32_t* classes;    // (tokens, m)
  const void* source;        // (., width), 16-byte aligned
  Dtype source_dtype;
  int64_t tokens;  // pairs, tokens * m, are below 2^31
  int64_t m;
  int64_t width;    // at most 2^24 - 2^8
  void* out;        // (tokens, width), 16-byte aligned
  Dtype out_dtype;  // f64 if and only if the source is
};

// The tokens that have chosen a class: out[c] = sum of coefficients[pair] source[pair / m] over the pairs of class c.
struct Segments {
  const void* coefficients;  // (pairs)
  const int32_t* sorted;     // (pairs): classes, ascending
  const int64_t* order;      // (pairs): the number of each sorted pair, ascending within a class
  const int64_t* starts;     // (classes + 1): where the sorted pairs of each begin
  const void* source;        // (pairs / m, width), 16-byte aligned
  Dtype source_dtype;
  int64_t pairs;  // below 2^31
  int64_t m;
  int64_t classes;
  int64_t width;    // at most 2^24 - 2^8
  void* scratch;    // scratch_bytes, 16-byte aligned
  void* out;        // (classes, width), 16-byte aligned
  Dtype out_dtype;  // f64 if and only if the source is
};

// Of the arguments, all but the pointers are looked at.
int64_t scratch_bytes(const Segments& arguments);

// Both return before the kernels have run; what they return is the error of the launch, cudaErrorInvalidValue for sizes that
// are out of range.
cudaError_t gather(const Gather& arguments, cudaStream_t stream);
cudaError_t add_segments(const Segments& arguments, cudaStream_t stream);

}  // namespace sparse_ce::cuda
