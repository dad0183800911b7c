#include "labels_ce.cuh"

namespace sparse_ce::cuda {
template cudaError_t forward_rows<double>(const LabelsForward&, cudaStream_t);
template cudaError_t backward_rows<double>(const LabelsBackward&, cudaStream_t);
}  // namespace sparse_ce::cuda
