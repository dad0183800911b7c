// Dispatch over dtypes; each is compiled in a file of its own, topk_ce_<dtype>.cu.
#include "topk_ce.cuh"
#include "topk_ce.h"

namespace sparse_ce::cuda {

extern template cudaError_t forward_rows<float>(const Forward&, cudaStream_t);
extern template cudaError_t forward_rows<bfloat16>(const Forward&, cudaStream_t);
extern template cudaError_t forward_rows<float16>(const Forward&, cudaStream_t);
extern template cudaError_t forward_rows<double>(const Forward&, cudaStream_t);
extern template cudaError_t backward_rows<float>(const Backward&, cudaStream_t);
extern template cudaError_t backward_rows<bfloat16>(const Backward&, cudaStream_t);
extern template cudaError_t backward_rows<float16>(const Backward&, cudaStream_t);
extern template cudaError_t backward_rows<double>(const Backward&, cudaStream_t);

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
  switch (a.dtype) {
    case Dtype::f32: return forward_rows<float>(a, stream);
    case Dtype::bf16: return forward_rows<bfloat16>(a, stream);
    case Dtype::f16: return forward_rows<float16>(a, stream);
    default: return forward_rows<double>(a, stream);
  }
}

cudaError_t backward(const Backward& a, cudaStream_t stream) {
  if (a.count == 0) return cudaSuccess;
  if (!in_range(a.count, a.classes, a.k)) return cudaErrorInvalidValue;
  switch (a.dtype) {
    case Dtype::f32: return backward_rows<float>(a, stream);
    case Dtype::bf16: return backward_rows<bfloat16>(a, stream);
    case Dtype::f16: return backward_rows<float16>(a, stream);
    default: return backward_rows<double>(a, stream);
  }
}

}  // namespace sparse_ce::cuda
