// Dispatch over dtypes; each is compiled in a file of its own, labels_ce_<dtype>.cu.
#include "labels_ce.cuh"

namespace sparse_ce::cuda {

extern template cudaError_t forward_rows<float>(const LabelsForward&, cudaStream_t);
extern template cudaError_t forward_rows<bfloat16>(const LabelsForward&, cudaStream_t);
extern template cudaError_t forward_rows<float16>(const LabelsForward&, cudaStream_t);
extern template cudaError_t forward_rows<double>(const LabelsForward&, cudaStream_t);
extern template cudaError_t backward_rows<float>(const LabelsBackward&, cudaStream_t);
extern template cudaError_t backward_rows<bfloat16>(const LabelsBackward&, cudaStream_t);
extern template cudaError_t backward_rows<float16>(const LabelsBackward&, cudaStream_t);
extern template cudaError_t backward_rows<double>(const LabelsBackward&, cudaStream_t);

cudaError_t forward(const LabelsForward& a, cudaStream_t stream) {
  if (a.logits.count == 0) return cudaSuccess;
  if (!in_range(a.logits.count, a.logits.classes)) return cudaErrorInvalidValue;
  switch (a.dtype) {
    case Dtype::f32: return forward_rows<float>(a, stream);
    case Dtype::bf16: return forward_rows<bfloat16>(a, stream);
    case Dtype::f16: return forward_rows<float16>(a, stream);
    default: return forward_rows<double>(a, stream);
  }
}

cudaError_t backward(const LabelsBackward& a, cudaStream_t stream) {
  if (a.logits.count == 0) return cudaSuccess;
  if (!in_range(a.logits.count, a.logits.classes)) return cudaErrorInvalidValue;
  switch (a.dtype) {
    case Dtype::f32: return backward_rows<float>(a, stream);
    case Dtype::bf16: return backward_rows<bfloat16>(a, stream);
    case Dtype::f16: return backward_rows<float16>(a, stream);
    default: return backward_rows<double>(a, stream);
  }
}

}  // namespace sparse_ce::cuda
