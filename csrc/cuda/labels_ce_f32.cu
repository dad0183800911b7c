#include "labels_ce.cuh"

namespace sparse_ce::cuda {
template cudaError_t forward_rows<float>(const LabelsForward&, cudaStream_t);
template cudaError_t backward_rows<float>(const LabelsBackward&, cudaStream_t);
}  // namespace sparse_ce::cuda
