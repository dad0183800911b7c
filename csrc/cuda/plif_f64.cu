#include "plif.cuh"
#include "plif_tables.cuh"

namespace sparse_ce::cuda {
template cudaError_t forward_rows<double>(const PlifForward&, cudaStream_t);
template cudaError_t backward_rows<double>(const PlifBackward&, cudaStream_t);
template cudaError_t forward_rows<double>(const PlifCeForward&, cudaStream_t);
template cudaError_t backward_rows<double>(const PlifCeBackward&, cudaStream_t);
template cudaError_t forward_rows<double>(const PlifTopkForward&, cudaStream_t);
template cudaError_t backward_rows<double>(const PlifTopkBackward&, cudaStream_t);
template cudaError_t tables_of<double>(const PlifTables&, cudaStream_t);
template cudaError_t scale_of<double>(const PlifScale&, cudaStream_t);
template cudaError_t dslopes_of<double>(const PlifDslopes&, cudaStream_t);
}  // namespace sparse_ce::cuda
