// threshold_ce in CUDA C++: the softmax over all classes of a row, or over the many that a cut keeps, its loss and its
// gradient. The formulas and what is saved for backward stand in triton_kernels/threshold_ce.py; the contract in
// python/sparse_ce/schema.py.
//
// Rows belong to groups of threads by their size: by_threads. Forward reads V * itemsize bytes per row from memory, once: every thread keeps a maximum and a sum of exponentials of its own, over kInFlight chunks of 16 bytes at a time
// that are loaded before the first of them is used. Per class that is one exponential, and per kInFlight chunks one more, which
// moves the sum to the new maximum. The threads meet when the row is over; there is no barrier in the loop. A cut, and label
// smoothing, take a second look, from the cache. Where k cuts, a kernel of its own has found the k-th class before.
//
// Backward reads the logits and writes the gradient, once each; a row without upstream gradient is not even read.
#pragma once

#include "group.cuh"
#include "order.cuh"
#include "rows.cuh"
#include "select.cuh"
#include "softmax.cuh"
#include "threshold_ce.h"

namespace sparse_ce::cuda {

// The classes that are kept: those not after (key, index) in their order whose distance from the maximum is not below `bound`.
template <class T> struct Cut {
  KeyOf<T> key = -Order<T>::kInfinity;
  int index;
  StatisticOf<T> bound = -kInfinite<StatisticOf<T>>;

  __device__ __forceinline__ bool keeps(T x, int i) const {
    const KeyOf<T> mine = Order<T>::key(x);
    return mine > key || (mine == key && i <= index);
  }
};

// A second look, at the classes that are kept: their number, their sum of exponentials, the least logit, and of label smoothing
// the sum of the weights and of the weighted distances from the maximum.
template <class S> struct Look {
  int kept = 0;
  S total = 0, least = kInfinite<S>, weights = 0, spread = 0;
};

template <class S, int THREADS> __device__ Look<S> together(Group<THREADS>& group, Look<S> look) {
  look.kept = group.sum(look.kept);
  look.total = group.sum(look.total);
  look.least = group.least(look.least);
  look.weights = group.sum(look.weights);
  look.spread = group.sum(look.spread);
  return look;
}

// With everything that can come together.
template <class T, int THREADS>
__device__ Look<StatisticOf<T>> look_at(Group<THREADS>& group, const T* row, int classes,
                                        StatisticOf<T> row_max, const Cut<T>& cut,
                                        const StatisticOf<T>* weight) {
  using S = StatisticOf<T>;
  Look<S> look;
  for_each_class<T>(group, row, classes, [&](T x, int i) {
    const S z = number_of(x), shifted = z - row_max;
    if (!cut.keeps(x, i) || shifted < cut.bound) return;
    const S w = weight ? weight[i] : S{1};
    ++look.kept;
    look.total += exp_nonpositive(shifted);
    look.least = z < look.least ? z : look.least;
    look.weights += w;
    look.spread -= w * shifted;
  });
  return together(group, look);
}

// Without label smoothing: of the classes whose distance from the maximum is not below the bound.
template <class T, int THREADS>
__device__ Look<StatisticOf<T>> look_at_near(Group<THREADS>& group, const T* row, int classes,
                                             StatisticOf<T> row_max, StatisticOf<T> bound) {
  using S = StatisticOf<T>;
  Look<S> look;
  for_each_class<T>(group, row, classes, [&](T x, int) {
    const S z = number_of(x), shifted = z - row_max, e = exp_nonpositive(shifted);
    const bool kept = shifted >= bound;
    look.kept += kept;
    look.total += kept ? e : S{0};
    look.least = kept && z < look.least ? z : look.least;
  });
  return together(group, look);
}

// Without label smoothing: the sum of exponentials of the k largest.
template <class T, int THREADS>
__device__ StatisticOf<T> total_of_largest(Group<THREADS>& group, const T* row, int classes,
                                           StatisticOf<T> row_max, StatisticOf<T> cut,
                                           int cut_index) {
  using S = StatisticOf<T>;
  S total = 0;
  for_each_class<T>(group, row, classes, [&](T x, int i) {
    const S z = number_of(x), e = exp_nonpositive(z - row_max);
    total += is_kept(z, i, cut, cut_index) ? e : S{0};
  });
  return group.sum(total);
}

// Of all classes, unweighted: the sum of their distances from the maximum.
template <class T, int THREADS> __device__ StatisticOf<T> spread_of_all(Group<THREADS>& group,
                                                                        const T* row, int classes,
                                                                        StatisticOf<T> row_max) {
  using S = StatisticOf<T>;
  S spread = 0;
  for_each_class<T>(group, row, classes, [&](T x, int) { spread += row_max - number_of(x); });
  return group.sum(spread);
}

// Where k cuts: the k-th class, as forward goes on with it and returns it.
template <class T, int THREADS> __global__ void __launch_bounds__(THREADS, resident<T>(THREADS))
    threshold_select_kernel(const ThresholdForward a) {
  GROUP_MEMORY(THREADS, group);
  const int64_t n = blockIdx.x;
  const T* row = row_of<T>(a.logits, n);
  const int classes = static_cast<int>(a.logits.classes);
  const Kth<KeyOf<T>> kth = kth_largest(group, row, classes, static_cast<int>(a.k));
  const int index = kth.missing == kth.ties
                        ? classes - 1
                        : index_of_tie(group, row, classes, kth.key, kth.missing);
  if (group.rank == 0) {
    static_cast<StatisticOf<T>*>(a.cut)[n] = Order<T>::value(kth.key);
    a.cut_index[n] = index;
  }
}

// One block fewer at a time of float64, and in backward, than elsewhere: with its registers nothing spills.
template <class T, int THREADS>
__global__ void __launch_bounds__(Group<THREADS>::kBlock,
                                  resident<T>(Group<THREADS>::kBlock) - (sizeof(T) == 8))
    threshold_forward_kernel(const ThresholdForward a) {
  using S = StatisticOf<T>;
  GROUP_MEMORY(THREADS, group);
  const int64_t n = group.row(a.logits.count);
  const T* row = row_of<T>(a.logits, n);
  const int classes = static_cast<int>(a.logits.classes);
  const auto weight = static_cast<const S*>(a.weight);
  const S smoothing = static_cast<S>(a.label_smoothing);
  const int64_t target = a.target[n];
  const bool hit = is_class(target, a.logits.classes);

  const Softmax<S> softmax = softmax_of(group, row, classes);
  const S row_max = softmax.largest;
  const S shifted_target = hit ? number_of(row[target]) - row_max : S{0};
  S cut_value = -kInfinite<S>;
  Cut<T> cut;
  cut.index = classes - 1;
  const bool largest = a.k < a.logits.classes;
  if (largest) {
    cut_value = static_cast<const S*>(a.cut)[n];
    cut.key = Order<T>::key(Order<T>::element(cut_value));
    cut.index = a.cut_index[n];
  }
  // p_target - p_i <= delta, in logarithms; the target itself whatever the rounding
  const S log_all = std::log(softmax.total);
  bool near = false;
  if (a.delta < 1) {
    const S rest = std::exp(shifted_target - log_all) - static_cast<S>(a.delta);
    near = hit && rest > 0;
    if (near) {
      const S bound = log_all + std::log(rest);
      cut.bound = bound < shifted_target ? bound : shifted_target;
    }
  }

  Look<S> look;
  look.total = softmax.total;
  look.kept = static_cast<int>(a.k);
  look.weights = S(classes);
  // lanes go together: whose row is not near takes nothing of what the others look for
  const bool any_near = group.any_of_warp(near);
  if (smoothing != 0 && (weight || largest || any_near)) {
    const Look<S> found = look_at(group, row, classes, row_max, cut, weight);
    if (weight || largest || near) look = found;
    look.spread = found.spread;
  } else if (smoothing != 0) {
    look.spread = spread_of_all(group, row, classes, row_max);
  } else if (any_near) {
    const Look<S> found = look_at_near(group, row, classes, row_max, cut.bound);
    if (near) look = found;
  } else if (largest) {
    look.total = total_of_largest(group, row, classes, row_max, cut_value, cut.index);
  }
  if (near) cut_value = look.least;
  if (group.rank != 0 || group.job() >= a.logits.count) return;

  S log_sum = look.total == softmax.total ? log_all : std::log(look.total);
  // a row of only minus infinity; beside NaN a cut may leave nothing
  if (look.total == 0) log_sum = kNan<S>;
  S loss = kNan<S>;
  if (hit) {
    // the maximum has left both terms before they meet
    loss = (weight ? weight[target] : S{1}) * (log_sum - shifted_target);
    if (smoothing != 0)
      loss =
          (1 - smoothing) * loss + smoothing / look.kept * (look.weights * log_sum + look.spread);
  }
  static_cast<S*>(a.loss)[n] = loss;
  static_cast<S*>(a.lse)[n] = row_max + log_sum;
  static_cast<S*>(a.row_max)[n] = row_max;
  static_cast<S*>(a.log_sum)[n] = log_sum;
  static_cast<S*>(a.cut)[n] = cut_value;
  a.cut_index[n] = cut.index;
  a.kept[n] = look.kept;
}

template <class T, int THREADS>
__global__ void __launch_bounds__(Group<THREADS>::kBlock, resident<T>(Group<THREADS>::kBlock) - 1)
    threshold_backward_kernel(const ThresholdBackward a) {
  using S = StatisticOf<T>;
  GROUP_MEMORY(THREADS, group);
  const int64_t n = group.row(a.logits.count);
  const T* row = row_of<T>(a.logits, n);
  const int classes = static_cast<int>(a.logits.classes), kept = a.kept[n];
  T* out = static_cast<T*>(a.dlogits) + n * a.logits.classes;
  const Slice slice = group.job() < a.logits.count ? slice_of(out, classes) : Slice{};
  const auto weight = static_cast<const S*>(a.weight);
  const S smoothing = static_cast<S>(a.label_smoothing);
  const S row_max = static_cast<const S*>(a.row_max)[n];
  const S log_sum = static_cast<const S*>(a.log_sum)[n];
  const int64_t target = a.target[n];
  const bool hit = is_class(target, a.logits.classes);
  Cut<T> cut;
  const S cut_value = static_cast<const S*>(a.cut)[n];
  cut.key = Order<T>::key(Order<T>::element(cut_value));
  cut.index = a.cut_index[n];

  // of a row that keeps its target alone the loss is 0, or NaN where that is at +inf
  const bool alone =
      hit && kept == 1 && log_sum == 0 && target <= cut.index && number_of(row[target]) == row_max;
  const bool counts = a.dloss && hit && !alone;
  const S dloss = counts ? static_cast<const S*>(a.dloss)[n] : S{0};
  const S at_target = dloss * (1 - smoothing) * (weight && hit ? weight[target] : S{1});
  const S share = smoothing == 0 ? S{0} : dloss * (smoothing / kept);
  S factor = at_target + (a.dlse ? static_cast<const S*>(a.dlse)[n] : S{0});
  S weights = S(kept);
  if (weight && group.any_of_warp(share != 0))
    weights = look_at(group, row, classes, row_max, cut, weight).weights;
  if (share != 0) factor += share * weights;

  const auto probability = [&](S z) { return exp_nonpositive((z - row_max) - log_sum); };
  const auto gradient = [&](int i) {
    const T x = row[i];
    if (!cut.keeps(x, i)) return S{0};
    // without upstream gradient exactly zero, also where the probability is NaN
    const S g = factor == 0 ? S{0} : probability(number_of(x)) * factor;
    return share == 0 ? g : g - share * (weight ? weight[i] : S{1});
  };
  const bool plain =
      begin_alike(row, out) && factor != 0 && (share == 0 || !weight) && cut_value == cut_value;
  if (factor == 0 && share == 0) {
    fill_zeros(group, out, slice);
  } else {
    if (plain && kept == classes)
      sweep(group, slice, row, out, [&](S z, int) { return probability(z) * factor - share; });
    else if (plain)
      sweep(group, slice, row, out, [&](S z, int i) {
        const S g = probability(z) * factor - share;
        return is_kept(z, i, cut_value, cut.index) ? g : S{0};
      });
    else
      sweep(group, slice, out, gradient);
    for_each_edge<T>(group, slice, [&](int i) { out[i] = Order<T>::element(gradient(i)); });
  }
  // the gradient of the softmax lies before that of the target
  group.sync();
  if (group.rank == 0 && at_target != 0 && target >= slice.low && target < slice.high)
    out[target] = Order<T>::element(gradient(static_cast<int>(target)) - at_target);
}

template <class T> cudaError_t forward_rows(const ThresholdForward& a, cudaStream_t stream) {
  const auto rows = static_cast<unsigned>(a.logits.count);
  if (a.k < a.logits.classes) launch(threshold_select_kernel<T, 1024>, dim3(rows), 1024, stream, a);
  by_threads<T>(a.logits.classes, [&](auto threads) {
    constexpr int kThreads = decltype(threads)::value;
    launch(threshold_forward_kernel<T, kThreads>, blocks_for<kThreads>(rows),
           Group<kThreads>::kBlock, stream, a);
  });
  return cudaGetLastError();
}

template <class T> cudaError_t backward_rows(const ThresholdBackward& a, cudaStream_t stream) {
  by_threads<T>(a.logits.classes, [&](auto threads) {
    constexpr int kThreads = decltype(threads)::value;
    launch(threshold_backward_kernel<T, kThreads>,
           blocks_for_gradient<T, kThreads>(a.logits.count, a.logits.classes),
           Group<kThreads>::kBlock, stream, a);
  });
  return cudaGetLastError();
}

}  // namespace sparse_ce::cuda
