// The kernels by dtype: see dtypes.cuh.
#include "topk_ce.cuh"

#include "dtypes.cuh"
#include "topk_ce.h"

namespace sparse_ce::cuda {

DECLARE_FOR_DTYPES(forward_rows, Forward);
DECLARE_FOR_DTYPES(backward_rows, Backward);

int64_t scratch_bytes(const Forward& a) {
  if (!in_range(a.logits.count, a.logits.classes, a.k)) return 0;
  const int64_t item = a.dtype == Dtype::f64 ? sizeof(Item64) : sizeof(Item32);
  if (a.k > kMaxListK) return a.logits.count * radix_capacity(a.k) * item;
  const int parts = split_of(a).parts;
  return parts == 1 ? 0 : a.logits.count * parts * a.k * item;
}

cudaError_t forward(const Forward& a, cudaStream_t stream) {
  if (a.logits.count == 0) return cudaSuccess;
  if (!in_range(a.logits.count, a.logits.classes, a.k)) return cudaErrorInvalidValue;
  return by_dtype(a.dtype, [&](auto x) { return forward_rows<decltype(x)>(a, stream); });
}

cudaError_t backward(const Backward& a, cudaStream_t stream) {
  if (a.count == 0) return cudaSuccess;
  if (!in_range(a.count, a.classes) || a.k < 1 || a.k > kMaxK) return cudaErrorInvalidValue;
  return by_dtype(a.dtype, [&](auto x) { return backward_rows<decltype(x)>(a, stream); });
}

}  // namespace sparse_ce::cuda
