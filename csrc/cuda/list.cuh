// The k classes that a row lists, whoever found them: their softmax, and the gradient of their logits. What topk_ce and plif
// share; the formulas stand in triton_kernels/topk_ce.py.
#pragma once

#include "group.cuh"
#include "rows.cuh"
#include "topk_ce.h"

namespace sparse_ce::cuda {

// f(rank, turn) of the ranks of a list that are a thread's own. Of at most TURNS turns, where that is known, what a thread has
// is in registers; a loop has turn -1.
template <int TURNS, int THREADS, class F>
__device__ __forceinline__ void for_each_rank(const Group<THREADS>& group, int k, F f) {
  if constexpr (TURNS > 0) {
#pragma unroll
    for (int turn = 0; turn < TURNS; ++turn) {
      const int rank = turn * THREADS + group.rank;
      if (rank < k) f(rank, turn);
    }
  } else {
    // unrolled, the decisions of the loop cost more than a list that takes one turn
#pragma unroll 1
    for (int rank = group.rank; rank < k; rank += THREADS) f(rank, -1);
  }
}

// By its bits: gaming cards have few units that compare float64.
__device__ __forceinline__ bool is_smooth(double label_smoothing) {
  return bit_cast<int64_t>(label_smoothing) != 0;
}

// Loss, log-sum-exp and probabilities from the list, index(rank, turn) and value(rank, turn) in its order, the largest of these
// logits, and the target's.
template <class S, int TURNS, int THREADS, class Index, class Value>
__device__ __forceinline__ void list_softmax(Group<THREADS>& group, const Forward& a, int64_t n,
                                             Index index, Value value, S row_max, int64_t target,
                                             S at_target) {
  const int k = static_cast<int>(a.k);
  const auto weight = static_cast<const S*>(a.weight);
  S total = 0;
  [[maybe_unused]] S numerators[TURNS > 0 ? TURNS : 1] = {};
  if constexpr (TURNS > 0) {
    // without a branch: what is beyond the list has a value as well
#pragma unroll
    for (int turn = 0; turn < TURNS; ++turn) {
      const int rank = turn * THREADS + group.rank;
      numerators[turn] = std::exp(value(rank, turn) - row_max);
      total += rank < k ? numerators[turn] : S{0};
    }
  } else {
    for_each_rank<0>(group, k,
                     [&](int rank, int turn) { total += std::exp(value(rank, turn) - row_max); });
  }
  total = group.sum(total);
  const S log_sum = std::log(total), inverse = 1 / total;

  for_each_rank<TURNS>(group, k, [&](int rank, int turn) {
    const S numerator = TURNS > 0 ? numerators[turn] : std::exp(value(rank, turn) - row_max);
    static_cast<S*>(a.probs)[n * a.k + rank] = numerator * inverse;
  });
  const bool smooth = is_smooth(a.label_smoothing);
  S spread = 0;
  if (smooth) {
    for_each_rank<0>(group, k, [&](int rank, int turn) {
      const S shifted = value(rank, turn) - row_max;
      spread += (weight ? weight[index(rank, turn)] : S{1}) * (log_sum - shifted);
    });
    spread = group.sum(spread);
  }
  if (group.rank == 0) {
    S loss = kNan<S>;
    if (is_class(target, a.logits.classes)) {
      loss = (weight ? weight[target] : S{1}) * (log_sum - (at_target - row_max));
      if (smooth) {
        const S smoothing = static_cast<S>(a.label_smoothing);
        loss = (1 - smoothing) * loss + smoothing / k * spread;
      }
    }
    static_cast<S*>(a.loss)[n] = loss;
    static_cast<S*>(a.lse)[n] = row_max + log_sum;
  }
}

// The target of a row and its logit, which waits for it. Most kernels ask for both before they list, so that finish need not
// wait for memory; held.cuh once its registers hold the row no more.
template <class T> struct Target {
  int64_t index;
  T logit;

  __device__ __forceinline__ void load_index(const Forward& a, int64_t n) { index = a.target[n]; }
  __device__ __forceinline__ void load_logit(const Forward& a, const T* row) {
    logit = {};
    if (is_class(index, a.logits.classes)) logit = row[index];
  }
};

// Everything that forward returns, from the k first classes of the row: item(rank, turn) in their order, and the first of them.
template <class T, int TURNS, int THREADS, class Item, class First>
__device__ __forceinline__ void finish(Group<THREADS>& group, const Forward& a, int64_t n,
                                       const Target<T>& target, Item item, First first) {
  const auto index = [&](int rank, int turn) { return item(rank, turn).index(); };
  for_each_rank<TURNS>(group, static_cast<int>(a.k),
                       [&](int rank, int turn) { a.indices[n * a.k + rank] = index(rank, turn); });
  const auto value = [&](int rank, int turn) { return Order<T>::value(item(rank, turn).key()); };
  list_softmax<StatisticOf<T>, TURNS>(group, a, n, index, value, Order<T>::value(first.key()),
                                      target.index, number_of(target.logit));
}

// The same of a list in memory, of any length.
template <class T, class Item, int THREADS, class List>
__device__ void finish_list(Group<THREADS>& group, List list, const Forward& a, int64_t n,
                            const Target<T>& target) {
  const auto item = [&](int rank, int) { return Item(list[rank]); };
  finish<T, 0>(group, a, n, target, item, item(0, -1));
}

// The gradient of the logits of the list, by rank. The target's is -at_target, joined to that in the list where it is there.
template <class S> struct ListGradient {
  const int32_t* indices;
  const S *probs, *dprobs, *weight;
  int64_t target;
  S dloss, dlse;
  bool hit;
  S at_target, share, factor;

  // Asks memory, and waits for nothing.
  __device__ __forceinline__ ListGradient(const Backward& a, int64_t n)
      : indices(a.indices + n * a.k),
        probs(static_cast<const S*>(a.probs) + n * a.k),
        dprobs(a.dprobs ? static_cast<const S*>(a.dprobs) + n * a.k : nullptr),
        weight(static_cast<const S*>(a.weight)),
        target(a.target[n]),
        dloss(a.dloss ? static_cast<const S*>(a.dloss)[n] : S{0}),
        dlse(a.dlse ? static_cast<const S*>(a.dlse)[n] : S{0}) {}

  // Of all threads of the group, before anything that follows.
  template <int THREADS>
  __device__ __forceinline__ void prepare(Group<THREADS>& group, const Backward& a) {
    const int k = static_cast<int>(a.k);
    const S smoothing = is_smooth(a.label_smoothing) ? static_cast<S>(a.label_smoothing) : S{0};
    hit = is_class(target, a.classes);
    if (!hit) dloss = 0;
    at_target = dloss * (1 - smoothing) * (weight && hit ? weight[target] : S{1});
    share = smoothing == 0 ? S{0} : dloss * (smoothing / k);
    factor = at_target + dlse;
    if (smoothing != 0 || dprobs) {
      S sum = 0;
      // unrolled it takes half as many registers again, and most lists are short
#pragma unroll 1
      for (int rank = group.rank; rank < k; rank += THREADS) {
        sum += share * (weight ? weight[indices[rank]] : S{1});
        if (dprobs && dprobs[rank] != 0) sum -= dprobs[rank] * probs[rank];
      }
      factor += group.sum(sum);
    }
  }

  __device__ __forceinline__ bool is_target(int index) const { return hit && index == target; }

  __device__ __forceinline__ S operator()(int rank, int index, S prob) const {
    const S slope = factor + (dprobs ? dprobs[rank] : S{0});
    // without upstream gradient exactly zero, also where the probability is NaN
    S g = slope == 0 ? S{0} : prob * slope;
    g -= share * (weight ? weight[index] : S{1});
    return is_target(index) ? g - at_target : g;
  }
};

}  // namespace sparse_ce::cuda
