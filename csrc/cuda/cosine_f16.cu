#include "cosine.cuh"

namespace sparse_ce::cuda {
template cudaError_t forward_rows<float16>(const CosineForward&, cudaStream_t);
template cudaError_t backward_rows<float16>(const CosineBackward&, cudaStream_t);
}  // namespace sparse_ce::cuda
