#include "labels_ce.cuh"

namespace sparse_ce::cuda {
template cudaError_t forward_rows<bfloat16>(const LabelsForward&, cudaStream_t);
template cudaError_t backward_rows<bfloat16>(const LabelsBackward&, cudaStream_t);
}  // namespace sparse_ce::cuda
