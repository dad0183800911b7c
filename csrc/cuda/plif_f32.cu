#include "plif.cuh"
#include "plif_tables.cuh"

namespace sparse_ce::cuda {
template cudaError_t forward_rows<float>(const PlifForward&, cudaStream_t);
template cudaError_t backward_rows<float>(const PlifBackward&, cudaStream_t);
template cudaError_t forward_rows<float>(const PlifCeForward&, cudaStream_t);
template cudaError_t backward_rows<float>(const PlifCeBackward&, cudaStream_t);
template cudaError_t forward_rows<float>(const PlifTopkForward&, cudaStream_t);
template cudaError_t backward_rows<float>(const PlifTopkBackward&, cudaStream_t);
template cudaError_t tables_of<float>(const PlifTables&, cudaStream_t);
template cudaError_t scale_of<float>(const PlifScale&, cudaStream_t);
template cudaError_t dslopes_of<float>(const PlifDslopes&, cudaStream_t);
}  // namespace sparse_ce::cuda
