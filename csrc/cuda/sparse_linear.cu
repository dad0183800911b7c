// Dispatch over dtypes of what is summed; each is compiled in a file of its own, sparse_linear_<dtype>.cu.
#include "sparse_linear.cuh"

namespace sparse_ce::cuda {

extern template cudaError_t gather_rows<float>(const Gather&, cudaStream_t);
extern template cudaError_t gather_rows<bfloat16>(const Gather&, cudaStream_t);
extern template cudaError_t gather_rows<float16>(const Gather&, cudaStream_t);
extern template cudaError_t gather_rows<double>(const Gather&, cudaStream_t);
extern template cudaError_t segment_rows<float>(const Segments&, cudaStream_t);
extern template cudaError_t segment_rows<bfloat16>(const Segments&, cudaStream_t);
extern template cudaError_t segment_rows<float16>(const Segments&, cudaStream_t);
extern template cudaError_t segment_rows<double>(const Segments&, cudaStream_t);

namespace {

// Pairs are counted in 32 bits, rows are on x of the grid.
bool possible(int64_t rows, int64_t pairs, int64_t m, Dtype source, Dtype out) {
  return rows <= kMaxRows && pairs <= kMaxRows && m >= 1 &&
         (source == Dtype::f64) == (out == Dtype::f64);
}

}  // namespace

int64_t scratch_bytes(const Segments& a) {
  return a.pairs / kPiece * a.width *
         static_cast<int64_t>(a.source_dtype == Dtype::f64 ? sizeof(double) : sizeof(float));
}

cudaError_t gather(const Gather& a, cudaStream_t stream) {
  if (a.tokens == 0 || a.width == 0) return cudaSuccess;
  if (!possible(a.tokens, a.tokens * a.m, a.m, a.source_dtype, a.out_dtype))
    return cudaErrorInvalidValue;
  switch (a.source_dtype) {
    case Dtype::f32: return gather_rows<float>(a, stream);
    case Dtype::bf16: return gather_rows<bfloat16>(a, stream);
    case Dtype::f16: return gather_rows<float16>(a, stream);
    default: return gather_rows<double>(a, stream);
  }
}

cudaError_t add_segments(const Segments& a, cudaStream_t stream) {
  if (a.classes == 0 || a.width == 0) return cudaSuccess;
  if (!possible(a.classes, a.pairs, a.m, a.source_dtype, a.out_dtype)) return cudaErrorInvalidValue;
  switch (a.source_dtype) {
    case Dtype::f32: return segment_rows<float>(a, stream);
    case Dtype::bf16: return segment_rows<bfloat16>(a, stream);
    case Dtype::f16: return segment_rows<float16>(a, stream);
    default: return segment_rows<double>(a, stream);
  }
}

}  // namespace sparse_ce::cuda
