// The kernels by dtype: see dtypes.cuh.
#include "threshold_ce.cuh"

#include "dtypes.cuh"

namespace sparse_ce::cuda {

DECLARE_FOR_DTYPES(forward_rows, ThresholdForward);
DECLARE_FOR_DTYPES(backward_rows, ThresholdBackward);

cudaError_t forward(const ThresholdForward& a, cudaStream_t stream) {
  if (a.logits.count == 0) return cudaSuccess;
  if (!in_range(a.logits.count, a.logits.classes) || a.k < 1 || a.k > a.logits.classes)
    return cudaErrorInvalidValue;
  return by_dtype(a.dtype, [&](auto x) { return forward_rows<decltype(x)>(a, stream); });
}

cudaError_t backward(const ThresholdBackward& a, cudaStream_t stream) {
  if (a.logits.count == 0) return cudaSuccess;
  if (!in_range(a.logits.count, a.logits.classes)) return cudaErrorInvalidValue;
  return by_dtype(a.dtype, [&](auto x) { return backward_rows<decltype(x)>(a, stream); });
}

}  // namespace sparse_ce::cuda
