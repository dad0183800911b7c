// sparse_linear in CUDA C++: the gradients of a linear layer from the m non-zeros per row of dlogits, as sums of weighted rows.
// The formulas stand in triton_kernels/sparse_linear.py; the contract in python/sparse_ce/schema.py.
//
// What is summed is read once, m rows per token; what is returned is written once, zeros included. A thread owns some columns
// of one sum, keeps it in registers, and loads several rows before it adds the first. Threads share nothing, so there is no
// barrier, and no atomic: the pairs of a class come sorted, and are added in their order.
//
// Most classes have three pairs or fewer, and their threads wait for where these start, then for pairs, for coefficients, and
// for rows. So a thread owns four chunks of 16 bytes of a sum, and a block waits once for 4096 columns of 16 bits. Where sums
// are few, or narrow, it owns one chunk and loads more rows at once: what a GPU lacks then is threads.
//
// Frequent classes would keep their threads long: whole pieces of kPiece sorted pairs that belong to one class are summed
// before, and the threads of the class add these sums in order.
#pragma once

#include "order.cuh"
#include "sparse_linear.h"

namespace sparse_ce::cuda {

constexpr int kBlock = 128;
// Sorted pairs of a class that are summed apart: at most that many, twice, are left to the threads of the class.
constexpr int kPiece = 256;
// Chunks of a thread in the wide form, and how many sums are too few for it.
constexpr int kWide = 4, kFewSums = 1024;
// Rows that are loaded before the first is added.
template <int CHUNKS> constexpr int kRowsInFlight = CHUNKS == 1 ? 8 : 4;
// Blocks on a multiprocessor: left to itself the compiler aims for more, and loads a row after it has added the one before.
template <int CHUNKS> constexpr int kResident = CHUNKS == 1 ? 6 : 4;
// A thread has two columns or more, and blocks beside each other are on y of the grid.
constexpr int64_t kMaxWidth = int64_t{65535} * kBlock * 2;

// N columns of a row: 16 bytes, or one where rows begin anywhere.
template <class T, int N> using Access = std::conditional_t<N == 1, T, Chunk<T, N>>;

template <class T, int N>
__device__ __forceinline__ StatisticOf<T> number_at(const Access<T, N>& x, int place) {
  if constexpr (N == 1)
    return number_of(x);
  else
    return number_of(element_of(x, place));
}

// The columns of a thread: CHUNKS times N of a row, a warp's width apart. 2^log_lanes threads share a row.
template <int N, int CHUNKS> struct Place {
  static constexpr int kApart = 32 * N;
  int64_t row;
  int column;

  __device__ explicit Place(int log_lanes) {
    const int thread = static_cast<int>(threadIdx.x), lane = thread & ((1 << log_lanes) - 1);
    row = static_cast<int64_t>(blockIdx.x) * (kBlock >> log_lanes) + (thread >> log_lanes);
    const int warp = (static_cast<int>(blockIdx.y) << log_lanes) + lane / 32 * 32;
    column = warp * CHUNKS * N + lane % 32 * N;
  }
};

template <class S> struct Pair {
  S coefficient;
  uint32_t row;
};

// To the sums, the rows of pairs begin to end, in this order.
template <int ROWS, class T, int N, int CHUNKS, class PairOf>
__device__ __forceinline__ void add_rows(StatisticOf<T> (&sums)[CHUNKS][N], const T* source,
                                         int width, int column, uint32_t begin, uint32_t end,
                                         PairOf pair_of) {
  constexpr int kApart = Place<N, CHUNKS>::kApart;
#pragma unroll 1
  for (uint32_t first = begin; first < end; first += ROWS) {
    Pair<StatisticOf<T>> pairs[ROWS];
    Access<T, N> x[ROWS][CHUNKS] = {};
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      // the last pair in place of none: behind a branch each pair would be waited for by itself
      pairs[i] = pair_of(first + i < end ? first + i : end - 1);
      if (first + i >= end) pairs[i].coefficient = 0;
    }
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
      if (pairs[i].coefficient != 0) {
        const T* from = source + static_cast<int64_t>(pairs[i].row) * width + column;
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c)
          if (column + c * kApart < width)
            x[i][c] = *reinterpret_cast<const Access<T, N>*>(from + c * kApart);
      }
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
      // the few additions of one chunk stay below all loads only where they have no condition
      if (CHUNKS == 1 || pairs[i].coefficient != 0)
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c)
          for (int e = 0; e < N; ++e)
            sums[c][e] += pairs[i].coefficient * number_at<T, N>(x[i][c], e);
  }
}

template <class T, int N, int CHUNKS>
__device__ __forceinline__ void store(void* out, const Place<N, CHUNKS>& place, int width,
                                      const StatisticOf<T> (&sums)[CHUNKS][N]) {
  constexpr int kApart = Place<N, CHUNKS>::kApart;
  T* to = static_cast<T*>(out) + place.row * width + place.column;
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c)
    if (place.column + c * kApart < width) {
      if constexpr (N == 1)
        to[c * kApart] = Order<T>::element(sums[c][0]);
      else
        *reinterpret_cast<Chunk<T, N>*>(to + c * kApart) = chunk_of<T>(sums[c]);
    }
}

template <class S, int N, int CHUNKS>
__device__ __forceinline__ void store_rounded(void* out, Dtype dtype, const Place<N, CHUNKS>& place,
                                              int width, const S (&sums)[CHUNKS][N]) {
  if constexpr (sizeof(S) == 8) {
    store<double>(out, place, width, sums);
  } else {
    switch (dtype) {
      case Dtype::bf16: return store<bfloat16>(out, place, width, sums);
      case Dtype::f16: return store<float16>(out, place, width, sums);
      default: return store<float>(out, place, width, sums);
    }
  }
}

template <class T, int N, int CHUNKS> __global__ void __launch_bounds__(kBlock, kResident<CHUNKS>)
    gather_kernel(const Gather a, int log_lanes) {
  using S = StatisticOf<T>;
  const Place<N, CHUNKS> place(log_lanes);
  const int width = static_cast<int>(a.width);
  if (place.row >= a.tokens || place.column >= width) return;
  const auto coefficients = static_cast<const S*>(a.coefficients) + place.row * a.m;
  const auto classes = a.classes + place.row * a.m;
  const auto pair_of = [&](uint32_t j) {
    return Pair<S>{coefficients[j], static_cast<uint32_t>(classes[j])};
  };
  S sums[CHUNKS][N] = {};
  add_rows<kRowsInFlight<CHUNKS>>(sums, static_cast<const T*>(a.source), width, place.column, 0,
                                  static_cast<uint32_t>(a.m), pair_of);
  store_rounded(a.out, a.out_dtype, place, width, sums);
}

// The token and the coefficient of a sorted pair.
template <class S> __device__ __forceinline__ Pair<S> sorted_pair(const Segments& a, uint32_t p) {
  // pairs fit 32 bits, and a division of 64 costs as much as the rest
  const auto number = static_cast<uint32_t>(a.order[p]);
  return {static_cast<const S*>(a.coefficients)[number], number / static_cast<uint32_t>(a.m)};
}

template <class T, int N, int CHUNKS> __global__ void __launch_bounds__(kBlock, kResident<CHUNKS>)
    piece_kernel(const Segments a, int log_lanes) {
  using S = StatisticOf<T>;
  const Place<N, CHUNKS> place(log_lanes);
  const int width = static_cast<int>(a.width);
  const int64_t begin = place.row * kPiece, end = begin + kPiece;
  if (end > a.pairs || place.column >= width || a.sorted[begin] != a.sorted[end - 1]) return;
  S sums[CHUNKS][N] = {};
  add_rows<kRowsInFlight<CHUNKS>>(sums, static_cast<const T*>(a.source), width, place.column,
                                  static_cast<uint32_t>(begin), static_cast<uint32_t>(end),
                                  [&](uint32_t p) { return sorted_pair<S>(a, p); });
  store<S>(a.scratch, place, width, sums);
}

template <class T, int N, int CHUNKS> __global__ void __launch_bounds__(kBlock, kResident<CHUNKS>)
    segment_kernel(const Segments a, int log_lanes) {
  using S = StatisticOf<T>;
  constexpr int kRows = kRowsInFlight<CHUNKS>;
  // of sums, what fits the registers of that many rows
  constexpr int kSums = kRows * static_cast<int>(sizeof(T)) / static_cast<int>(sizeof(S));
  const Place<N, CHUNKS> place(log_lanes);
  const int width = static_cast<int>(a.width), column = place.column;
  if (place.row >= a.classes || column >= width) return;
  const auto begin = static_cast<uint32_t>(a.starts[place.row]);
  const auto end = static_cast<uint32_t>(a.starts[place.row + 1]);
  const uint32_t first = (begin + kPiece - 1) / kPiece, last = end / kPiece;
  // without a whole piece all pairs come before it
  const uint32_t before = first < last ? first * kPiece : end;
  const uint32_t after = first < last ? last * kPiece : end;
  const auto pair_of = [&](uint32_t p) { return sorted_pair<S>(a, p); };
  const auto source = static_cast<const T*>(a.source);
  S sums[CHUNKS][N] = {};
  add_rows<kRows>(sums, source, width, column, begin, before, pair_of);
  add_rows<kSums>(sums, static_cast<const S*>(a.scratch), width, column, first, last,
                  [](uint32_t piece) { return Pair<S>{1, piece}; });
  add_rows<kRows>(sums, source, width, column, after, end, pair_of);
  store_rounded(a.out, a.out_dtype, place, width, sums);
}

// Threads to a row, as many as have a column in it, but whole warps where the chunks of a thread lie apart; then blocks.
template <int N, int CHUNKS, class Arguments> void launch_rows(void (*kernel)(Arguments, int),
                                                               const Arguments& a, int64_t rows,
                                                               cudaStream_t stream) {
  int log_lanes = CHUNKS == 1 ? 0 : 5;
  while (1 << log_lanes < kBlock && CHUNKS * N << log_lanes < a.width) ++log_lanes;
  const int64_t per_block = kBlock >> log_lanes, columns = CHUNKS * N << log_lanes;
  launch(kernel,
         dim3(static_cast<unsigned>((rows - 1) / per_block + 1),
              static_cast<unsigned>((a.width - 1) / columns + 1)),
         kBlock, stream, a, log_lanes);
}

// start(N, CHUNKS), as types.
template <class T, class Arguments, class Start>
void start_for(const Arguments& a, int64_t rows, Start start) {
  constexpr int N = Chunk<T>::kElements;
  using One = std::integral_constant<int, 1>;
  using Elements = std::integral_constant<int, N>;
  if (reinterpret_cast<uintptr_t>(a.source) % 16 != 0 || a.width % N != 0)
    start(One{}, Elements{});
  else if (rows < kFewSums || a.width < 32 * N * kWide)
    start(Elements{}, One{});
  else
    start(Elements{}, std::integral_constant<int, kWide>{});
}

template <class T> cudaError_t gather_rows(const Gather& a, cudaStream_t stream) {
  start_for<T>(a, a.tokens, [&](auto n, auto chunks) {
    constexpr int N = decltype(n)::value, CHUNKS = decltype(chunks)::value;
    launch_rows<N, CHUNKS>(gather_kernel<T, N, CHUNKS>, a, a.tokens, stream);
  });
  return cudaGetLastError();
}

template <class T> cudaError_t segment_rows(const Segments& a, cudaStream_t stream) {
  const int64_t pieces = a.pairs / kPiece;
  if (pieces > 0)
    start_for<T>(a, pieces, [&](auto n, auto chunks) {
      constexpr int N = decltype(n)::value, CHUNKS = decltype(chunks)::value;
      launch_rows<N, CHUNKS>(piece_kernel<T, N, CHUNKS>, a, pieces, stream);
    });
  start_for<T>(a, a.classes, [&](auto n, auto chunks) {
    constexpr int N = decltype(n)::value, CHUNKS = decltype(chunks)::value;
    launch_rows<N, CHUNKS>(segment_kernel<T, N, CHUNKS>, a, a.classes, stream);
  });
  return cudaGetLastError();
}

}  // namespace sparse_ce::cuda
