#include "threshold_ce.cuh"

namespace sparse_ce::cuda {
template cudaError_t forward_rows<double>(const ThresholdForward&, cudaStream_t);
template cudaError_t backward_rows<double>(const ThresholdBackward&, cudaStream_t);
}  // namespace sparse_ce::cuda
