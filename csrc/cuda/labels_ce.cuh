// labels_ce in CUDA C++: several labels per row, a threshold on either side of them, the loss and its gradient. The formulas
// and what is saved for backward stand in triton_kernels/labels_ce.py; the contract in python/sparse_ce/schema.py.
//
// Rows belong to groups of threads as those of threshold_ce do. Forward reads V * (itemsize + 1) bytes per row from memory,
// logits and labels once each: chunks of 16 bytes, and the labels of a chunk in one access beside it. The first look finds the
// softmax of all classes and the extremes of either side, the second, from the cache, the sums over what is kept. Where the
// labels of a row do not begin as its logits do, a view of these, both go one by one.
//
// Backward reads logits and labels and writes the gradient, once each; a row without upstream gradient is not even read.
// Positives are few as a rule: chunks without any take less than half the instructions.
#pragma once

#include "group.cuh"
#include "labels_ce.h"
#include "order.cuh"
#include "rows.cuh"
#include "softmax.cuh"

namespace sparse_ce::cuda {

// The labels of a chunk of logits, a byte each.
template <class T> using LabelsOf =
    std::conditional_t<sizeof(T) == 2, uint64_t,
                       std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;

template <class Labels> __device__ __forceinline__ bool label_of(Labels labels, int place) {
  return labels >> (8 * place) & 1;
}

// How many are positive.
__device__ __forceinline__ int count_of(uint64_t labels) {
  return __popc(static_cast<unsigned>(labels)) + __popc(static_cast<unsigned>(labels >> 32));
}

template <class T>
__device__ __forceinline__ bool are_aligned(const bool* labels, const Whole& whole) {
  return bit_cast<uintptr_t>(labels + whole.head) % sizeof(LabelsOf<T>) == 0;
}

// The whole chunks of a row, or none, where its labels do not begin as it does.
template <class T>
__device__ __forceinline__ Whole labelled_chunks(const T* row, const bool* labels, int classes) {
  const Whole whole = whole_chunks(row, classes);
  return are_aligned<T>(labels, whole) ? whole : Whole{classes, 0};
}

// turn(chunks, labels) of LOADS chunks at a time; what there is not are negatives at minus infinity.
template <int LOADS, class T, int THREADS, class Turn>
__device__ __forceinline__ void for_each_labelled(const Group<THREADS>& group, const T* row,
                                                  const bool* labels, const Whole& whole,
                                                  Turn turn) {
  const auto chunks = reinterpret_cast<const Chunk<T>*>(row + whole.head);
  const auto words = reinterpret_cast<const LabelsOf<T>*>(labels + whole.head);
#pragma unroll 1
  for (int begin = group.rank; begin < whole.count; begin += LOADS * THREADS) {
    Chunk<T> x[LOADS];
    LabelsOf<T> y[LOADS];
#pragma unroll
    for (int c = 0; c < LOADS; ++c) {
      const int chunk = begin + c * THREADS;
      const bool exists = chunk < whole.count;
      x[c] = exists ? chunks[chunk] : lowest_chunk<T>();
      y[c] = exists ? words[chunk] : LabelsOf<T>{0};
    }
    turn(x, y);
  }
}

// The extremes of either side, and the number of positives.
template <class S> struct Extremes {
  S low = kInfinite<S>, high = -kInfinite<S>;  // least positive, largest negative
  int positives = 0;

  __device__ __forceinline__ void see(S z, bool label) {
    low = label && z < low ? z : low;
    high = !label && z > high ? z : high;
  }
};

template <class S, int THREADS>
__device__ Extremes<S> together(Group<THREADS>& group, Extremes<S> seen) {
  seen.low = group.least(seen.low);
  seen.high = group.greatest(seen.high);
  seen.positives = group.sum(seen.positives);
  return seen;
}

// What bounds the logits, less the maximum, on either side of the labels, and the largest exponents, or 0.
template <class S> struct Sides {
  S row_max;
  S from_below = -kInfinite<S>;  // of negatives
  S from_above = kInfinite<S>;   // of positives
  S above_negatives = 0, above_positives = 0;

  // p of the least positive less p_i is at most delta, p_i less that of the largest negative too, in logarithms; what equals
  // either of them whatever the rounding
  __device__ Sides(const Softmax<S>& softmax, const Extremes<S>& seen, int classes, S delta)
      : row_max(softmax.largest) {
    const S log_all = std::log(softmax.total);
    const S lowest = seen.low - row_max, highest = seen.high - row_max;
    const S rest = std::exp(lowest - log_all) - delta;
    if (seen.positives > 0 && rest > 0) {
      const S bound = log_all + std::log(rest);
      from_below = bound < lowest ? bound : lowest;
    }
    if (seen.positives < classes && log_all - log_all == 0) {
      const S bound = log_all + std::log(std::exp(highest - log_all) + delta);
      from_above = bound > highest ? bound : highest;
    }
    // whether a side keeps anything its extreme tells
    if (!(highest < from_below) && seen.high > 0) above_negatives = seen.high;
    if (!(lowest > from_above) && seen.low < 0) above_positives = -seen.low;
  }

  __device__ __forceinline__ bool keeps(S z, bool label) const {
    const S shifted = z - row_max;
    return !(label ? shifted > from_above : shifted < from_below);
  }

  // log(1 + sum of exponentials), from one relative to the largest exponent.
  __device__ S log_one_plus(S sum, S above) const {
    // beside NaN infinity is NaN too
    if (above == kInfinite<S> && row_max == row_max) return above;
    return above + std::log(std::exp(-above) + sum);
  }
};

// The second look, at the classes that are kept: sums of exponentials, the least negative and the largest positive.
template <class S> struct Kept {
  S negative = 0, positive = 0;
  S least = kInfinite<S>, most = -kInfinite<S>;

  __device__ __forceinline__ void see_negative(S z, const Sides<S>& sides) {
    const bool kept = sides.keeps(z, false);
    const S e = exp_nonpositive(z - sides.above_negatives);
    negative += kept ? e : S{0};
    least = kept && z < least ? z : least;
  }

  __device__ __forceinline__ void see(S z, bool label, const Sides<S>& sides) {
    const bool kept = sides.keeps(z, label);
    const S e = exp_nonpositive(label ? -z - sides.above_positives : z - sides.above_negatives);
    negative += kept && !label ? e : S{0};
    positive += kept && label ? e : S{0};
    least = kept && !label && z < least ? z : least;
    most = kept && label && z > most ? z : most;
  }
};

template <class S, int THREADS> __device__ Kept<S> together(Group<THREADS>& group, Kept<S> kept) {
  kept.negative = group.sum(kept.negative);
  kept.positive = group.sum(kept.positive);
  kept.least = group.least(kept.least);
  kept.most = group.greatest(kept.most);
  return kept;
}

// Fewer blocks at a time than elsewhere, here and in backward: with their registers nothing spills.
template <class T, int THREADS>
__global__ void __launch_bounds__(Group<THREADS>::kBlock,
                                  resident<T>(Group<THREADS>::kBlock) * 3 / 4)
    labels_forward_kernel(const LabelsForward a) {
  using S = StatisticOf<T>;
  GROUP_MEMORY(THREADS, group);
  const int64_t n = group.row(a.logits.count);
  const T* row = row_of<T>(a.logits, n);
  const bool* labels = a.labels + n * a.logits.classes;
  const int classes = static_cast<int>(a.logits.classes);
  const Whole whole = labelled_chunks(row, labels, classes);

  Softmax<S> softmax;
  Extremes<S> seen;
  for_each_labelled<kInFlight>(group, row, labels, whole, [&](const auto& x, const auto& y) {
    const S highest = absorb<T>(softmax, x, Unchanged{});
    LabelsOf<T> any = 0;
    for (int c = 0; c < kInFlight; ++c) any |= y[c];
    if (any == 0) {
      seen.see(highest, false);
      return;
    }
    for (int c = 0; c < kInFlight; ++c) {
      seen.positives += count_of(y[c]);
      for (int e = 0; e < Chunk<T>::kElements; ++e)
        seen.see(number_of(element_of(x[c], e)), label_of(y[c], e));
    }
  });
  for_each_edge<T>(group, whole, classes, [&](int i) {
    absorb(softmax, number_of(row[i]));
    seen.positives += labels[i];
    seen.see(number_of(row[i]), labels[i]);
  });
  const Sides<S> sides(together(group, softmax), together(group, seen), classes,
                       static_cast<S>(a.delta));

  Kept<S> kept;
  constexpr int kLoads = sizeof(T) == 8 ? 1 : 2;
  for_each_labelled<kLoads>(group, row, labels, whole, [&](const auto& x, const auto& y) {
    for (int c = 0; c < kLoads; ++c) {
      if (y[c] == 0)
        for (int e = 0; e < Chunk<T>::kElements; ++e)
          kept.see_negative(number_of(element_of(x[c], e)), sides);
      else
        for (int e = 0; e < Chunk<T>::kElements; ++e)
          kept.see(number_of(element_of(x[c], e)), label_of(y[c], e), sides);
    }
  });
  for_each_edge<T>(group, whole, classes,
                   [&](int i) { kept.see(number_of(row[i]), labels[i], sides); });
  kept = together(group, kept);
  if (group.rank != 0 || group.job() >= a.logits.count) return;

  const S negative = sides.log_one_plus(kept.negative, sides.above_negatives);
  const S positive = sides.log_one_plus(kept.positive, sides.above_positives);
  static_cast<S*>(a.loss)[n] = negative + positive;
  static_cast<S*>(a.negative)[n] = negative;
  static_cast<S*>(a.positive)[n] = positive;
  static_cast<S*>(a.cut_negative)[n] =
      sides.from_below == -kInfinite<S> ? -kInfinite<S> : kept.least;
  static_cast<S*>(a.cut_positive)[n] = sides.from_above == kInfinite<S> ? kInfinite<S> : kept.most;
}

template <class T, int THREADS>
__global__ void __launch_bounds__(Group<THREADS>::kBlock, resident<T>(Group<THREADS>::kBlock) - 1)
    labels_backward_kernel(const LabelsBackward a) {
  using S = StatisticOf<T>;
  GROUP_MEMORY(THREADS, group);
  const int64_t n = group.job();
  if (n >= a.logits.count) return;
  const T* row = row_of<T>(a.logits, n);
  const bool* labels = a.labels + n * a.logits.classes;
  T* out = static_cast<T*>(a.dlogits) + n * a.logits.classes;
  const Slice slice = slice_of(out, static_cast<int>(a.logits.classes));
  const S dloss = static_cast<const S*>(a.dloss)[n];
  const S negative = static_cast<const S*>(a.negative)[n];
  const S positive = static_cast<const S*>(a.positive)[n];
  const S cut_negative = static_cast<const S*>(a.cut_negative)[n];
  const S cut_positive = static_cast<const S*>(a.cut_positive)[n];

  if (dloss == 0) {
    fill_zeros(group, out, slice);
    return;
  }
  const auto of_class = [&](S z, bool label) {
    const S e = exp_nonpositive(label ? -z - positive : z - negative);
    const bool dropped = label ? z > cut_positive : z < cut_negative;
    return dropped ? S{0} : (label ? -dloss : dloss) * e;
  };
  const auto gradient = [&](int i) { return of_class(number_of(row[i]), labels[i]); };
  if (begin_alike(row, out) && are_aligned<T>(labels, slice.whole))
    // float64 takes twice the registers
    sweep_chunks<sizeof(T) == 8 ? 2 : kInFlight>(
        group, slice, row, out, [&](const Chunk<T>& x, auto& g, int first, bool exist) {
          const auto from = reinterpret_cast<const LabelsOf<T>*>(labels + first);
          const LabelsOf<T> y = exist ? load_constant(from) : LabelsOf<T>{0};
          if (y == 0)
            for (int e = 0; e < Chunk<T>::kElements; ++e)
              g[e] = of_class(number_of(element_of(x, e)), false);
          else
            for (int e = 0; e < Chunk<T>::kElements; ++e)
              g[e] = of_class(number_of(element_of(x, e)), label_of(y, e));
        });
  else
    sweep(group, slice, out, gradient);
  for_each_edge<T>(group, slice, [&](int i) { out[i] = Order<T>::element(gradient(i)); });
}

template <class T> cudaError_t forward_rows(const LabelsForward& a, cudaStream_t stream) {
  by_threads<T>(a.logits.classes, [&](auto threads) {
    constexpr int kThreads = decltype(threads)::value;
    launch(labels_forward_kernel<T, kThreads>, blocks_for<kThreads>(a.logits.count),
           Group<kThreads>::kBlock, stream, a);
  });
  return cudaGetLastError();
}

template <class T> cudaError_t backward_rows(const LabelsBackward& a, cudaStream_t stream) {
  by_threads<T>(a.logits.classes, [&](auto threads) {
    constexpr int kThreads = decltype(threads)::value;
    launch(labels_backward_kernel<T, kThreads>,
           blocks_for_gradient<T, kThreads>(a.logits.count, a.logits.classes),
           Group<kThreads>::kBlock, stream, a);
  });
  return cudaGetLastError();
}

}  // namespace sparse_ce::cuda
