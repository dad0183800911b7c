#include "sparse_linear.cuh"

namespace sparse_ce::cuda {
template cudaError_t gather_rows<float>(const Gather&, cudaStream_t);
template cudaError_t segment_rows<float>(const Segments&, cudaStream_t);
}  // namespace sparse_ce::cuda
