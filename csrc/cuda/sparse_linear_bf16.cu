#include "sparse_linear.cuh"

namespace sparse_ce::cuda {
template cudaError_t gather_rows<bfloat16>(const Gather&, cudaStream_t);
template cudaError_t segment_rows<bfloat16>(const Segments&, cudaStream_t);
}  // namespace sparse_ce::cuda
