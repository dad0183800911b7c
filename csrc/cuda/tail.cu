// The kernels by dtype: see dtypes.cuh.
#include "tail.cuh"

#include "dtypes.cuh"

namespace sparse_ce::cuda {

DECLARE_FOR_DTYPES(forward_rows, Tail);

cudaError_t forward(const Tail& a, cudaStream_t stream) {
  if (a.logits.count == 0) return cudaSuccess;
  if (!in_range(a.logits.count, a.logits.classes) || a.k < 1 || a.k >= a.logits.classes ||
      a.samples < 0)
    return cudaErrorInvalidValue;
  return by_dtype(a.dtype, [&](auto x) { return forward_rows<decltype(x)>(a, stream); });
}

}  // namespace sparse_ce::cuda
