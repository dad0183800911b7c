// What threshold_ce, tail, labels_ce and plif share: the softmax over all classes of a row in one look at it, and a gradient
// that is written while the logits are read.
#pragma once

#include "group.cuh"
#include "order.cuh"
#include "rows.cuh"

namespace sparse_ce::cuda {

// Chunks that a thread loads before it uses the first.
constexpr int kInFlight = 4;

// What a thread has seen of a row, and what all have: the largest logit, and the sum of exponentials relative to it.
template <class S> struct Softmax {
  static constexpr S kLowest = std::numeric_limits<S>::lowest();
  // finite, so that minus infinity is never subtracted from itself
  S largest = kLowest;
  S total = 0;

  __device__ __forceinline__ void rise_to(S above) {
    total *= exp_nonpositive(largest - above);
    largest = above;
  }
};

struct Unchanged {
  template <class S> __device__ __forceinline__ S operator()(S z) const { return z; }
};

// Returns the largest of these logits.
template <class T, class F>
__device__ __forceinline__ StatisticOf<T> absorb(Softmax<StatisticOf<T>>& seen,
                                                 const Chunk<T> (&x)[kInFlight], const F& f) {
  using S = StatisticOf<T>;
  auto top = x[0].unit[0];
#pragma unroll
  for (int c = 0; c < kInFlight; ++c)
    for (int u = 0; u < Chunk<T>::kUnits; ++u) top = Packed<T>::max(top, x[c].unit[u]);
  const Chunk<T, sizeof(top) / sizeof(T)> tops{{top}};
  S highest = number_of(element_of(tops, 0));
  for (int e = 1; e < tops.kElements; ++e)
    highest = larger(highest, number_of(element_of(tops, e)));
  const S above = larger(seen.largest, f(highest));
  seen.rise_to(above);
  S sums[kInFlight];
#pragma unroll
  for (int c = 0; c < kInFlight; ++c) {
    sums[c] = 0;
    for (int e = 0; e < Chunk<T>::kElements; ++e)
      sums[c] += exp_nonpositive(f(number_of(element_of(x[c], e))) - above);
  }
  for (int step = 1; step < kInFlight; step *= 2)
    for (int c = 0; c < kInFlight; c += 2 * step) sums[c] += sums[c + step];
  seen.total += sums[0];
  return highest;
}

// One more logit.
template <class S> __device__ __forceinline__ void absorb(Softmax<S>& seen, S z) {
  seen.rise_to(larger(seen.largest, z));
  seen.total += exp_nonpositive(z - seen.largest);
}

// What all have seen.
template <class S, int THREADS>
__device__ __forceinline__ Softmax<S> together(Group<THREADS>& group, Softmax<S> seen) {
  seen.rise_to(group.reduce(seen.largest, [](S x, S y) { return larger(x, y); }));
  seen.total = group.sum(seen.total);
  // the exponential of the largest is 1, unless there is none but minus infinity
  if (seen.total == 0) seen.largest = -kInfinite<S>;
  return seen;
}

// Of f of all classes of the row, f being increasing.
template <class T, int THREADS, class F = Unchanged>
__device__ Softmax<StatisticOf<T>> softmax_of(Group<THREADS>& group, const T* row, int classes,
                                              const F& f = {}) {
  using S = StatisticOf<T>;
  constexpr int kStep = kInFlight * THREADS;
  const Whole whole = whole_chunks(row, classes);
  const auto chunks = reinterpret_cast<const Chunk<T>*>(row + whole.head);
  Softmax<S> seen;
  int begin = group.rank;
#pragma unroll 1
  for (; begin - group.rank + kStep <= whole.count; begin += kStep) {
    Chunk<T> x[kInFlight];
#pragma unroll
    for (int c = 0; c < kInFlight; ++c) x[c] = chunks[begin + c * THREADS];
    absorb<T>(seen, x, f);
  }
  if (begin < whole.count) {
    Chunk<T> x[kInFlight];
#pragma unroll
    for (int c = 0; c < kInFlight; ++c)
      x[c] = begin + c * THREADS < whole.count ? chunks[begin + c * THREADS] : lowest_chunk<T>();
    absorb<T>(seen, x, f);
  }
  for_each_edge<T>(group, whole, classes, [&](int i) { absorb(seen, f(number_of(row[i]))); });
  return together(group, seen);
}

// Whether the whole chunks of a gradient are whole chunks of the logits: unless a view of them begins elsewhere.
template <class T> __device__ __forceinline__ bool begin_alike(const T* row, const T* out) {
  return bit_cast<uintptr_t>(row) % 16 == bit_cast<uintptr_t>(out) % 16;
}

// The whole chunks of a slice of the gradient, from those of the logits, LOADS at a time: turn(chunk, gradients, first class,
// whether there is such a chunk).
template <int LOADS, class T, int THREADS, class Turn>
__device__ __forceinline__ void sweep_chunks(const Group<THREADS>& group, const Slice& slice,
                                             const T* row, T* out, Turn turn) {
  constexpr int kElements = Chunk<T>::kElements;
  const auto from = reinterpret_cast<const Chunk<T>*>(row + slice.whole.head);
  const auto to = reinterpret_cast<Chunk<T>*>(out + slice.whole.head);
#pragma unroll 1
  for (int begin = slice.begin + group.rank; begin < slice.end; begin += LOADS * THREADS) {
    Chunk<T> x[LOADS];
#pragma unroll
    for (int c = 0; c < LOADS; ++c)
      if (begin + c * THREADS < slice.end) x[c] = from[begin + c * THREADS];
#pragma unroll
    for (int c = 0; c < LOADS; ++c) {
      const int chunk = begin + c * THREADS;
      StatisticOf<T> g[kElements];
      turn(x[c], g, slice.whole.head + chunk * kElements, chunk < slice.end);
      if (chunk < slice.end) to[chunk] = chunk_of<T>(g);
    }
  }
}

// The same from gradient(logit, class).
template <class T, int THREADS, class Gradient>
__device__ __forceinline__ void sweep(const Group<THREADS>& group, const Slice& slice, const T* row,
                                      T* out, Gradient gradient) {
  // float64 takes twice the registers
  sweep_chunks<sizeof(T) == 8 ? 2 : kInFlight>(
      group, slice, row, out, [&](const auto& x, auto& g, int first, bool) {
        for (int e = 0; e < Chunk<T>::kElements; ++e)
          g[e] = gradient(number_of(element_of(x, e)), first + e);
      });
}

// The same from gradient(class).
template <class T, int THREADS, class Gradient>
__device__ __forceinline__ void sweep(const Group<THREADS>& group, const Slice& slice, T* out,
                                      Gradient gradient) {
  constexpr int kElements = Chunk<T>::kElements;
  for (int chunk = slice.begin + group.rank; chunk < slice.end; chunk += THREADS) {
    const int first = slice.whole.head + chunk * kElements;
    StatisticOf<T> g[kElements];
    for (int e = 0; e < kElements; ++e) g[e] = gradient(first + e);
    *reinterpret_cast<Chunk<T>*>(out + first) = chunk_of<T>(g);
  }
}

}  // namespace sparse_ce::cuda
