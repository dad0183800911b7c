#include "reduce.cuh"

namespace sparse_ce::cuda {
template cudaError_t forward_rows<double>(const ReduceForward&, cudaStream_t);
template cudaError_t backward_rows<double>(const ReduceBackward&, cudaStream_t);
}  // namespace sparse_ce::cuda
