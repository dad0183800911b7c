#include "reduce.cuh"

namespace sparse_ce::cuda {
template cudaError_t forward_rows<float>(const ReduceForward&, cudaStream_t);
template cudaError_t backward_rows<float>(const ReduceBackward&, cudaStream_t);
}  // namespace sparse_ce::cuda
