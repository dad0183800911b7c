// The kernels by the dtype of what is summed: see dtypes.cuh.
#include "sparse_linear.cuh"

#include "dtypes.cuh"

namespace sparse_ce::cuda {

DECLARE_FOR_DTYPES(gather_rows, Gather);
DECLARE_FOR_DTYPES(segment_rows, Segments);

namespace {

// Pairs are counted in 32 bits, rows are on x of the grid.
bool possible(int64_t rows, int64_t pairs, int64_t m, int64_t width, Dtype source, Dtype out) {
  return rows <= kMaxRows && pairs <= kMaxRows && m >= 1 && width <= kMaxWidth &&
         (source == Dtype::f64) == (out == Dtype::f64);
}

}  // namespace

int64_t scratch_bytes(const Segments& a) {
  return a.pairs / kPiece * a.width *
         static_cast<int64_t>(a.source_dtype == Dtype::f64 ? sizeof(double) : sizeof(float));
}

cudaError_t gather(const Gather& a, cudaStream_t stream) {
  if (a.tokens == 0 || a.width == 0) return cudaSuccess;
  if (!possible(a.tokens, a.tokens * a.m, a.m, a.width, a.source_dtype, a.out_dtype))
    return cudaErrorInvalidValue;
  return by_dtype(a.source_dtype, [&](auto x) { return gather_rows<decltype(x)>(a, stream); });
}

cudaError_t add_segments(const Segments& a, cudaStream_t stream) {
  if (a.classes == 0 || a.width == 0) return cudaSuccess;
  if (!possible(a.classes, a.pairs, a.m, a.width, a.source_dtype, a.out_dtype))
    return cudaErrorInvalidValue;
  return by_dtype(a.source_dtype, [&](auto x) { return segment_rows<decltype(x)>(a, stream); });
}

}  // namespace sparse_ce::cuda
