// Dispatch over dtypes of the output; each is compiled in a file of its own, cosine_<dtype>.cu.
#include "cosine.cuh"

namespace sparse_ce::cuda {

extern template cudaError_t forward_rows<float>(const CosineForward&, cudaStream_t);
extern template cudaError_t forward_rows<bfloat16>(const CosineForward&, cudaStream_t);
extern template cudaError_t forward_rows<float16>(const CosineForward&, cudaStream_t);
extern template cudaError_t forward_rows<double>(const CosineForward&, cudaStream_t);
extern template cudaError_t backward_rows<float>(const CosineBackward&, cudaStream_t);
extern template cudaError_t backward_rows<bfloat16>(const CosineBackward&, cudaStream_t);
extern template cudaError_t backward_rows<float16>(const CosineBackward&, cudaStream_t);
extern template cudaError_t backward_rows<double>(const CosineBackward&, cudaStream_t);

namespace {

bool possible(const Rows& output, Dtype dtype, const Table& table) {
  return in_range(output.count, output.classes) &&
         (dtype == Dtype::f64) == (table.dtype == Dtype::f64);
}

}  // namespace

cudaError_t forward(const CosineForward& a, cudaStream_t stream) {
  if (a.output.count == 0) return cudaSuccess;
  if (!possible(a.output, a.dtype, a.table)) return cudaErrorInvalidValue;
  switch (a.dtype) {
    case Dtype::f32: return forward_rows<float>(a, stream);
    case Dtype::bf16: return forward_rows<bfloat16>(a, stream);
    case Dtype::f16: return forward_rows<float16>(a, stream);
    default: return forward_rows<double>(a, stream);
  }
}

cudaError_t backward(const CosineBackward& a, cudaStream_t stream) {
  if (a.output.count == 0) return cudaSuccess;
  if (!possible(a.output, a.dtype, a.table)) return cudaErrorInvalidValue;
  switch (a.dtype) {
    case Dtype::f32: return backward_rows<float>(a, stream);
    case Dtype::bf16: return backward_rows<bfloat16>(a, stream);
    case Dtype::f16: return backward_rows<float16>(a, stream);
    default: return backward_rows<double>(a, stream);
  }
}

}  // namespace sparse_ce::cuda
