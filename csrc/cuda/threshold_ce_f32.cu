#include "threshold_ce.cuh"

namespace sparse_ce::cuda {
template cudaError_t forward_rows<float>(const ThresholdForward&, cudaStream_t);
template cudaError_t backward_rows<float>(const ThresholdBackward&, cudaStream_t);
}  // namespace sparse_ce::cuda
