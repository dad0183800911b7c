// Dispatch over dtypes of the losses; each is compiled in a file of its own, reduce_<dtype>.cu.
#include "reduce.cuh"

namespace sparse_ce::cuda {

extern template cudaError_t forward_rows<float>(const ReduceForward&, cudaStream_t);
extern template cudaError_t forward_rows<double>(const ReduceForward&, cudaStream_t);
extern template cudaError_t backward_rows<float>(const ReduceBackward&, cudaStream_t);
extern template cudaError_t backward_rows<double>(const ReduceBackward&, cudaStream_t);

namespace {

bool possible(Dtype dtype) { return dtype == Dtype::f32 || dtype == Dtype::f64; }

}  // namespace

int64_t scratch_bytes(const ReduceForward& a) {
  const int64_t parts = parts_of(a.rows);
  if (parts == 1) return 0;
  return parts *
         static_cast<int64_t>(a.dtype == Dtype::f64 ? sizeof(Sums<double>) : sizeof(Sums<float>));
}

// Without a row too: 0 over 1.
cudaError_t forward(const ReduceForward& a, cudaStream_t stream) {
  if (!possible(a.dtype)) return cudaErrorInvalidValue;
  return a.dtype == Dtype::f64 ? forward_rows<double>(a, stream) : forward_rows<float>(a, stream);
}

cudaError_t backward(const ReduceBackward& a, cudaStream_t stream) {
  if (a.rows == 0) return cudaSuccess;
  if (!possible(a.dtype) || a.rows > kMaxRows * kShares) return cudaErrorInvalidValue;
  return a.dtype == Dtype::f64 ? backward_rows<double>(a, stream) : backward_rows<float>(a, stream);
}

}  // namespace sparse_ce::cuda
