// The kernels by dtype: see dtypes.cuh.
#include "plif.cuh"

#include "dtypes.cuh"
#include "plif_tables.cuh"

namespace sparse_ce::cuda {

DECLARE_FOR_DTYPES(forward_rows, PlifForward);
DECLARE_FOR_DTYPES(backward_rows, PlifBackward);
DECLARE_FOR_DTYPES(forward_rows, PlifCeForward);
DECLARE_FOR_DTYPES(backward_rows, PlifCeBackward);
DECLARE_FOR_DTYPES(forward_rows, PlifTopkForward);
DECLARE_FOR_DTYPES(backward_rows, PlifTopkBackward);

DECLARE_FOR_STATISTICS(tables_of, PlifTables);
DECLARE_FOR_STATISTICS(scale_of, PlifScale);
DECLARE_FOR_STATISTICS(dslopes_of, PlifDslopes);

namespace {

int64_t elements_of_block(Dtype dtype) {
  return by_dtype(dtype, [](auto x) { return kElementsOfBlock<decltype(x)>; });
}

// A float numbers 2^24 cells.
template <class F> bool possible(const F& f) {
  return 1 <= f.cells && f.cells <= 1 << 24 && f.bound > 0;
}

bool possible(const Plif& f, Dtype dtype, int64_t elements) {
  return possible(f) && elements <= kMaxRows * elements_of_block(dtype);
}

constexpr int64_t kBytes = sizeof(int64_t);  // of what a part has found

bool possible(const Plif& f, const Rows& logits) {
  return possible(f) && in_range(logits.count, logits.classes);
}

}  // namespace

int64_t outside_parts(const PlifBackward& a) {
  const int64_t each = elements_of_block(a.dtype);
  return (a.elements + each - 1) / each;
}

int64_t outside_parts(const PlifCeBackward& a) {
  if (a.logits.count == 0) return 0;
  return a.logits.count * by_dtype(a.dtype, [&](auto x) {
           return parts_of_gradient<decltype(x)>(a.logits.count, a.logits.classes);
         });
}

int64_t outside_parts(const PlifTopkBackward& a) { return a.list.count; }

int64_t scratch_bytes(const PlifTables& a) {
  return possible(a) ? 2 * kBytes * CellParts(a.cells, a.bound).count : 0;
}

int64_t scratch_bytes(const PlifScale& a) {
  const int64_t parts = parts_of(a);
  return parts == 1 ? 0 : kBytes * parts;
}

int64_t scratch_bytes(const PlifDslopes& a) {
  return possible(a) ? kBytes * CellParts(a.cells, a.bound).count : 0;
}

cudaError_t forward(const PlifForward& a, cudaStream_t stream) {
  if (a.elements == 0) return cudaSuccess;
  if (!possible(a.f, a.dtype, a.elements)) return cudaErrorInvalidValue;
  return by_dtype(a.dtype, [&](auto x) { return forward_rows<decltype(x)>(a, stream); });
}

cudaError_t backward(const PlifBackward& a, cudaStream_t stream) {
  if (a.elements == 0) return cudaSuccess;
  if (!possible(a.f, a.dtype, a.elements)) return cudaErrorInvalidValue;
  return by_dtype(a.dtype, [&](auto x) { return backward_rows<decltype(x)>(a, stream); });
}

cudaError_t forward(const PlifCeForward& a, cudaStream_t stream) {
  if (a.logits.count == 0) return cudaSuccess;
  if (!possible(a.f, a.logits)) return cudaErrorInvalidValue;
  return by_dtype(a.dtype, [&](auto x) { return forward_rows<decltype(x)>(a, stream); });
}

cudaError_t backward(const PlifCeBackward& a, cudaStream_t stream) {
  if (a.logits.count == 0) return cudaSuccess;
  if (!possible(a.f, a.logits)) return cudaErrorInvalidValue;
  return by_dtype(a.dtype, [&](auto x) { return backward_rows<decltype(x)>(a, stream); });
}

cudaError_t forward(const PlifTopkForward& a, cudaStream_t stream) {
  if (a.list.logits.count == 0) return cudaSuccess;
  if (!possible(a.f)) return cudaErrorInvalidValue;
  // f keeps the order: of the list of the logits the indices stay
  Forward list = a.list;
  list.weight = nullptr;
  list.label_smoothing = 0;
  const cudaError_t error = forward(list, stream);
  if (error != cudaSuccess) return error;
  return by_dtype(list.dtype, [&](auto x) { return forward_rows<decltype(x)>(a, stream); });
}

cudaError_t backward(const PlifTopkBackward& a, cudaStream_t stream) {
  if (a.list.count == 0) return cudaSuccess;
  if (!possible(a.f) || !in_range(a.list.count, a.list.classes, a.list.k))
    return cudaErrorInvalidValue;
  return by_dtype(a.list.dtype, [&](auto x) { return backward_rows<decltype(x)>(a, stream); });
}

cudaError_t make_tables(const PlifTables& a, cudaStream_t stream) {
  if (!possible(a)) return cudaErrorInvalidValue;
  return by_statistic(a.dtype, [&](auto x) { return tables_of<decltype(x)>(a, stream); });
}

// Without a row too.
cudaError_t find_scale(const PlifScale& a, cudaStream_t stream) {
  return by_statistic(a.dtype, [&](auto x) { return scale_of<decltype(x)>(a, stream); });
}

cudaError_t make_dslopes(const PlifDslopes& a, cudaStream_t stream) {
  if (!possible(a)) return cudaErrorInvalidValue;
  return by_statistic(a.dtype, [&](auto x) { return dslopes_of<decltype(x)>(a, stream); });
}

}  // namespace sparse_ce::cuda
