// From a dtype at run time to a type. Each is compiled in a file of its own, <stem>_<dtype>.cu, and only declared where it is
// chosen.
#pragma once

#include "platform.cuh"
#include "rows.h"

namespace sparse_ce::cuda {

#define DECLARE_FOR_DTYPES(function, Arguments)                                   \
  extern template cudaError_t function<float>(const Arguments&, cudaStream_t);    \
  extern template cudaError_t function<bfloat16>(const Arguments&, cudaStream_t); \
  extern template cudaError_t function<float16>(const Arguments&, cudaStream_t);  \
  extern template cudaError_t function<double>(const Arguments&, cudaStream_t)

#define DECLARE_FOR_STATISTICS(function, Arguments)                            \
  extern template cudaError_t function<float>(const Arguments&, cudaStream_t); \
  extern template cudaError_t function<double>(const Arguments&, cudaStream_t)

// start(a number of that type)
template <class Start> auto by_dtype(Dtype dtype, Start start) {
  switch (dtype) {
    case Dtype::f32: return start(float{});
    case Dtype::bf16: return start(bfloat16{});
    case Dtype::f16: return start(float16{});
    default: return start(double{});
  }
}

// The same where all numbers are statistics, which are f32 or f64.
template <class Start> cudaError_t by_statistic(Dtype dtype, Start start) {
  switch (dtype) {
    case Dtype::f32: return start(float{});
    case Dtype::f64: return start(double{});
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace sparse_ce::cuda
