// The kernels by the dtype of the losses: see dtypes.cuh.
#include "reduce.cuh"

#include "dtypes.cuh"

namespace sparse_ce::cuda {

DECLARE_FOR_STATISTICS(forward_rows, ReduceForward);
DECLARE_FOR_STATISTICS(backward_rows, ReduceBackward);

int64_t scratch_bytes(const ReduceForward& a) {
  const int64_t parts = parts_of(a.rows);
  if (parts == 1) return 0;
  return parts *
         static_cast<int64_t>(a.dtype == Dtype::f64 ? sizeof(Sums<double>) : sizeof(Sums<float>));
}

// Without a row too: 0 over 1.
cudaError_t forward(const ReduceForward& a, cudaStream_t stream) {
  return by_statistic(a.dtype, [&](auto x) { return forward_rows<decltype(x)>(a, stream); });
}

cudaError_t backward(const ReduceBackward& a, cudaStream_t stream) {
  if (a.rows == 0) return cudaSuccess;
  if (a.rows > kMaxRows * kShares) return cudaErrorInvalidValue;
  return by_statistic(a.dtype, [&](auto x) { return backward_rows<decltype(x)>(a, stream); });
}

}  // namespace sparse_ce::cuda
