// sparse_linear in CUDA C++: the gradients of a linear layer from the m non-zeros per row of dlogits, as sums of weighted rows. The
// formulas stand in triton_kernels/sparse_linear.py; the contract in python/sparse_ce/schema.py.
//
// What is summed is read once, m rows per token; what is returned is written once, zeros included. A thread owns a few columns,
// 16 bytes of the source, keeps their sums in registers, and loads kInFlight rows before it adds the first. Threads share
// nothing, so there is no barrier, and no atomic: the pairs of a class come sorted, and are added in their order.
//
// Frequent classes would keep their threads long: whole pieces of kPiece sorted pairs that belong to one class are summed before,
// and the threads of the class add these sums in order.
#pragma once

#include "order.cuh"
#include "sparse_linear.h"

namespace sparse_ce::cuda {

constexpr int kBlock = 128, kInFlight = 4;
// Sorted pairs of a class that are summed apart: at most that many, twice, are left to the threads of the class.
constexpr int kPiece = 256;

// Which columns of which row a thread has: `lanes` threads, a power of two, share a row.
template <int N> struct Place {
  int64_t row;
  int64_t column;
  int64_t step;

  __device__ explicit Place(int lanes)
      : row(static_cast<int64_t>(blockIdx.x) * (kBlock / lanes) +
            static_cast<int>(threadIdx.x) / lanes),
        column((static_cast<int64_t>(blockIdx.y) * lanes + static_cast<int>(threadIdx.x) % lanes) *
               N),
        step(static_cast<int64_t>(gridDim.y) * lanes * N) {}
};

// N columns of a row. Where rows begin anywhere, ALIGNED is false and they are moved one by one.
template <bool ALIGNED, class T, int N>
__device__ __forceinline__ Chunk<T, N> load(const T* from, int64_t columns) {
  if constexpr (ALIGNED) {
    return *reinterpret_cast<const Chunk<T, N>*>(from);
  } else {
    T x[N];
    for (int e = 0; e < N; ++e) x[e] = e < columns ? from[e] : T{};
    return packed(x);
  }
}

template <bool ALIGNED, class T, int N>
__device__ __forceinline__ void store(void* out, int64_t at, const StatisticOf<T> (&x)[N],
                                      int64_t columns) {
  T* to = static_cast<T*>(out) + at;
  if constexpr (ALIGNED) {
    *reinterpret_cast<Chunk<T, N>*>(to) = chunk_of<T>(x);
  } else {
    for (int e = 0; e < N; ++e)
      if (e < columns) to[e] = Order<T>::element(x[e]);
  }
}

template <bool ALIGNED, class S, int N>
__device__ __forceinline__ void store_rounded(void* out, Dtype dtype, int64_t at, const S (&x)[N],
                                              int64_t columns) {
  if constexpr (sizeof(S) == 8) {
    store<ALIGNED, double>(out, at, x, columns);
  } else {
    switch (dtype) {
      case Dtype::bf16: return store<ALIGNED, bfloat16>(out, at, x, columns);
      case Dtype::f16: return store<ALIGNED, float16>(out, at, x, columns);
      default: return store<ALIGNED, float>(out, at, x, columns);
    }
  }
}

template <class S> struct Pair {
  S coefficient;
  int64_t row;
};

// To the sums, the rows of pairs begin to end, in this order.
template <bool ALIGNED, class T, int N, class PairOf>
__device__ __forceinline__ void add_rows(StatisticOf<T> (&sums)[N], const T* source, int64_t width,
                                         int64_t column, int64_t begin, int64_t end,
                                         PairOf pair_of) {
  using S = StatisticOf<T>;
#pragma unroll 1
  for (int64_t first = begin; first < end; first += kInFlight) {
    Pair<S> pairs[kInFlight];
    Chunk<T, N> x[kInFlight] = {};
#pragma unroll
    for (int i = 0; i < kInFlight; ++i)
      pairs[i] = first + i < end ? pair_of(first + i) : Pair<S>{0, 0};
#pragma unroll
    for (int i = 0; i < kInFlight; ++i)
      if (pairs[i].coefficient != 0)
        x[i] = load<ALIGNED, T, N>(source + pairs[i].row * width + column, width - column);
#pragma unroll
    for (int i = 0; i < kInFlight; ++i)
      for (int e = 0; e < N; ++e) sums[e] += pairs[i].coefficient * number_of(element_of(x[i], e));
  }
}

template <class T, bool ALIGNED> __global__ void __launch_bounds__(kBlock)
    gather_kernel(const Gather a, int lanes) {
  using S = StatisticOf<T>;
  constexpr int N = Chunk<T>::kElements;
  const Place<N> place(lanes);
  if (place.row >= a.tokens) return;
  const auto coefficients = static_cast<const S*>(a.coefficients);
  for (int64_t column = place.column; column < a.width; column += place.step) {
    S sums[N] = {};
    add_rows<ALIGNED>(sums, static_cast<const T*>(a.source), a.width, column, place.row * a.m,
                      place.row * a.m + a.m,
                      [&](int64_t p) { return Pair<S>{coefficients[p], a.classes[p]}; });
    store_rounded<ALIGNED>(a.out, a.out_dtype, place.row * a.width + column, sums,
                           a.width - column);
  }
}

// The token and the coefficient of a sorted pair.
template <class S> __device__ __forceinline__ Pair<S> sorted_pair(const Segments& a, int64_t p) {
  // pairs fit 32 bits, and a division of 64 costs as much as the rest
  const auto number = static_cast<uint32_t>(a.order[p]);
  return {static_cast<const S*>(a.coefficients)[number], number / static_cast<uint32_t>(a.m)};
}

template <class T, bool ALIGNED> __global__ void __launch_bounds__(kBlock)
    piece_kernel(const Segments a, int lanes) {
  using S = StatisticOf<T>;
  constexpr int N = Chunk<T>::kElements;
  const Place<N> place(lanes);
  const int64_t begin = place.row * kPiece, end = begin + kPiece;
  if (end > a.pairs || a.sorted[begin] != a.sorted[end - 1]) return;
  for (int64_t column = place.column; column < a.width; column += place.step) {
    S sums[N] = {};
    add_rows<ALIGNED>(sums, static_cast<const T*>(a.source), a.width, column, begin, end,
                      [&](int64_t p) { return sorted_pair<S>(a, p); });
    store<ALIGNED, S>(a.scratch, place.row * a.width + column, sums, a.width - column);
  }
}

template <class T, bool ALIGNED> __global__ void __launch_bounds__(kBlock)
    segment_kernel(const Segments a, int lanes) {
  using S = StatisticOf<T>;
  constexpr int N = Chunk<T>::kElements;
  const Place<N> place(lanes);
  if (place.row >= a.classes) return;
  const int64_t begin = a.starts[place.row], end = a.starts[place.row + 1];
  const int64_t first = (begin + kPiece - 1) / kPiece, last = end / kPiece;
  // without a whole piece all pairs come before it
  const int64_t before = first < last ? first * kPiece : end;
  const int64_t after = first < last ? last * kPiece : end;
  const auto pair_of = [&](int64_t p) { return sorted_pair<S>(a, p); };
  const auto source = static_cast<const T*>(a.source);
  for (int64_t column = place.column; column < a.width; column += place.step) {
    S sums[N] = {};
    add_rows<ALIGNED>(sums, source, a.width, column, begin, before, pair_of);
    add_rows<ALIGNED>(sums, static_cast<const S*>(a.scratch), a.width, column, first, last,
                      [](int64_t piece) { return Pair<S>{1, piece}; });
    add_rows<ALIGNED>(sums, source, a.width, column, after, end, pair_of);
    store_rounded<ALIGNED>(a.out, a.out_dtype, place.row * a.width + column, sums,
                           a.width - column);
  }
}

// Threads to a row, as many as have a column in it. Where rows are few, several blocks share the columns of one.
template <class Arguments> void launch_rows(void (*kernel)(Arguments, int), const Arguments& a,
                                            int64_t rows, int columns, cudaStream_t stream) {
  int lanes = 1;
  while (lanes < kBlock && lanes * columns < a.width) lanes *= 2;
  const int64_t per_block = kBlock / lanes, blocks = (a.width - 1) / (lanes * columns) + 1;
  const int64_t parts = rows < 1024 && blocks < 65536 ? blocks : 1;
  launch(
      kernel,
      dim3(static_cast<unsigned>((rows + per_block - 1) / per_block), static_cast<unsigned>(parts)),
      kBlock, stream, a, lanes);
}

template <class T> bool is_aligned(const void* source, int64_t width) {
  return reinterpret_cast<uintptr_t>(source) % 16 == 0 && width % Chunk<T>::kElements == 0;
}

template <class T> cudaError_t gather_rows(const Gather& a, cudaStream_t stream) {
  const bool aligned = is_aligned<T>(a.source, a.width);
  launch_rows(aligned ? gather_kernel<T, true> : gather_kernel<T, false>, a, a.tokens,
              Chunk<T>::kElements, stream);
  return cudaGetLastError();
}

template <class T> cudaError_t segment_rows(const Segments& a, cudaStream_t stream) {
  const bool aligned = is_aligned<T>(a.source, a.width);
  if (a.pairs >= kPiece)
    launch_rows(aligned ? piece_kernel<T, true> : piece_kernel<T, false>, a, a.pairs / kPiece,
                Chunk<T>::kElements, stream);
  launch_rows(aligned ? segment_kernel<T, true> : segment_kernel<T, false>, a, a.classes,
              Chunk<T>::kElements, stream);
  return cudaGetLastError();
}

}  // namespace sparse_ce::cuda
