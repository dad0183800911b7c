#include "tail.cuh"

namespace sparse_ce::cuda {
template cudaError_t forward_rows<double>(const Tail&, cudaStream_t);
}  // namespace sparse_ce::cuda
