#include "cosine.cuh"

namespace sparse_ce::cuda {
template cudaError_t forward_rows<float>(const CosineForward&, cudaStream_t);
template cudaError_t backward_rows<float>(const CosineBackward&, cudaStream_t);
}  // namespace sparse_ce::cuda
