#include "cosine.cuh"

namespace sparse_ce::cuda {
template cudaError_t forward_rows<double>(const CosineForward&, cudaStream_t);
template cudaError_t backward_rows<double>(const CosineBackward&, cudaStream_t);
}  // namespace sparse_ce::cuda
