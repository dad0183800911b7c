#include "plif.cuh"

namespace sparse_ce::cuda {
template cudaError_t forward_rows<float16>(const PlifForward&, cudaStream_t);
template cudaError_t backward_rows<float16>(const PlifBackward&, cudaStream_t);
template cudaError_t forward_rows<float16>(const PlifCeForward&, cudaStream_t);
template cudaError_t backward_rows<float16>(const PlifCeBackward&, cudaStream_t);
template cudaError_t forward_rows<float16>(const PlifTopkForward&, cudaStream_t);
template cudaError_t backward_rows<float16>(const PlifTopkBackward&, cudaStream_t);
}  // namespace sparse_ce::cuda
