// The kernels by dtype: see dtypes.cuh.
#include "labels_ce.cuh"

#include "dtypes.cuh"

namespace sparse_ce::cuda {

DECLARE_FOR_DTYPES(forward_rows, LabelsForward);
DECLARE_FOR_DTYPES(backward_rows, LabelsBackward);

cudaError_t forward(const LabelsForward& a, cudaStream_t stream) {
  if (a.logits.count == 0) return cudaSuccess;
  if (!in_range(a.logits.count, a.logits.classes)) return cudaErrorInvalidValue;
  return by_dtype(a.dtype, [&](auto x) { return forward_rows<decltype(x)>(a, stream); });
}

cudaError_t backward(const LabelsBackward& a, cudaStream_t stream) {
  if (a.logits.count == 0) return cudaSuccess;
  if (!in_range(a.logits.count, a.logits.classes)) return cudaErrorInvalidValue;
  return by_dtype(a.dtype, [&](auto x) { return backward_rows<decltype(x)>(a, stream); });
}

}  // namespace sparse_ce::cuda
