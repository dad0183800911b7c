// Dispatch over dtypes; each is compiled in a file of its own, plif_<dtype>.cu.
#include "plif.cuh"

namespace sparse_ce::cuda {

extern template cudaError_t forward_rows<float>(const PlifForward&, cudaStream_t);
extern template cudaError_t forward_rows<bfloat16>(const PlifForward&, cudaStream_t);
extern template cudaError_t forward_rows<float16>(const PlifForward&, cudaStream_t);
extern template cudaError_t forward_rows<double>(const PlifForward&, cudaStream_t);
extern template cudaError_t backward_rows<float>(const PlifBackward&, cudaStream_t);
extern template cudaError_t backward_rows<bfloat16>(const PlifBackward&, cudaStream_t);
extern template cudaError_t backward_rows<float16>(const PlifBackward&, cudaStream_t);
extern template cudaError_t backward_rows<double>(const PlifBackward&, cudaStream_t);
extern template cudaError_t forward_rows<float>(const PlifCeForward&, cudaStream_t);
extern template cudaError_t forward_rows<bfloat16>(const PlifCeForward&, cudaStream_t);
extern template cudaError_t forward_rows<float16>(const PlifCeForward&, cudaStream_t);
extern template cudaError_t forward_rows<double>(const PlifCeForward&, cudaStream_t);
extern template cudaError_t backward_rows<float>(const PlifCeBackward&, cudaStream_t);
extern template cudaError_t backward_rows<bfloat16>(const PlifCeBackward&, cudaStream_t);
extern template cudaError_t backward_rows<float16>(const PlifCeBackward&, cudaStream_t);
extern template cudaError_t backward_rows<double>(const PlifCeBackward&, cudaStream_t);
extern template cudaError_t forward_rows<float>(const PlifTopkForward&, cudaStream_t);
extern template cudaError_t forward_rows<bfloat16>(const PlifTopkForward&, cudaStream_t);
extern template cudaError_t forward_rows<float16>(const PlifTopkForward&, cudaStream_t);
extern template cudaError_t forward_rows<double>(const PlifTopkForward&, cudaStream_t);
extern template cudaError_t backward_rows<float>(const PlifTopkBackward&, cudaStream_t);
extern template cudaError_t backward_rows<bfloat16>(const PlifTopkBackward&, cudaStream_t);
extern template cudaError_t backward_rows<float16>(const PlifTopkBackward&, cudaStream_t);
extern template cudaError_t backward_rows<double>(const PlifTopkBackward&, cudaStream_t);

namespace {

template <class Start> auto by_dtype(Dtype dtype, Start start) {
  switch (dtype) {
    case Dtype::f32: return start(float{});
    case Dtype::bf16: return start(bfloat16{});
    case Dtype::f16: return start(float16{});
    default: return start(double{});
  }
}

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

}  // namespace sparse_ce::cuda
