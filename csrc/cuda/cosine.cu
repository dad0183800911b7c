// The kernels by the dtype of the output: see dtypes.cuh.
#include "cosine.cuh"

#include "dtypes.cuh"

namespace sparse_ce::cuda {

DECLARE_FOR_DTYPES(forward_rows, CosineForward);
DECLARE_FOR_DTYPES(backward_rows, CosineBackward);

namespace {

bool possible(const Rows& output, Dtype dtype, const Table& table) {
  return in_range(output.count, output.classes) &&
         (dtype == Dtype::f64) == (table.dtype == Dtype::f64);
}

}  // namespace

cudaError_t forward(const CosineForward& a, cudaStream_t stream) {
  if (a.output.count == 0) return cudaSuccess;
  if (!possible(a.output, a.dtype, a.table)) return cudaErrorInvalidValue;
  return by_dtype(a.dtype, [&](auto x) { return forward_rows<decltype(x)>(a, stream); });
}

cudaError_t backward(const CosineBackward& a, cudaStream_t stream) {
  if (a.output.count == 0) return cudaSuccess;
  if (!possible(a.output, a.dtype, a.table)) return cudaErrorInvalidValue;
  return by_dtype(a.dtype, [&](auto x) { return backward_rows<decltype(x)>(a, stream); });
}

}  // namespace sparse_ce::cuda
