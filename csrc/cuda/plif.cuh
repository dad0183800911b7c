// plif in CUDA C++: one increasing piecewise-linear function f of all logits, alone and before the dense softmax. The formulas
// and what is saved for backward stand in triton_kernels/plif.py; the contract in python/sparse_ce/schema.py.
//
// A logit is looked up each time that it is read: slope and offset lie side by side, so that it is one load, from the second
// cache. Its cell and f(x) are never stored. Alone, f has 16 bytes to a thread. Before the softmax rows are read as
// threshold_ce reads them; f of the largest is the largest, so that the running maximum costs one look-up per kInFlight chunks.
//
// Where the slopes learn, backward sends two atomic additions of 64-bit integers per logit, whose sums are the same in any
// order. What lies outside of the bounds is summed by each thread, then by the threads of a part of the data, in one order, and
// the parts are summed outside.
//
// On the k largest logits, which topk_ce lists, and the target's: a warp to a row, or a block where k is large.
#pragma once

#include "group.cuh"
#include "list.cuh"
#include "order.cuh"
#include "plif.h"
#include "rows.cuh"
#include "softmax.cuh"

namespace sparse_ce::cuda {

// Threads of a block of the function alone.
constexpr int kPlifBlock = 256;

template <class S> struct alignas(2 * sizeof(S)) Line {
  S slope, offset;
  __device__ __forceinline__ S operator()(S x) const { return slope * x + offset; }
};

template <class S> struct Cells {
  S bound, rate, last;
  double wide_bound, wide_rate;

  Cells(int64_t cells, double bound)
      : bound(static_cast<S>(bound)),
        rate(static_cast<S>(static_cast<double>(cells) / (2 * bound))),
        last(static_cast<S>(cells - 1)),
        wide_bound(bound),
        wide_rate(static_cast<double>(cells) / (2 * bound)) {}

  __device__ __forceinline__ int cell_of(S x) const {
    S place = (x + bound) * rate;
    place = place > 0 ? place : S{0};  // a NaN too
    return static_cast<int>(place < last ? place : last);
  }
};

template <class S> struct Link : Cells<S> {
  const Line<S>* lines;

  explicit Link(const Plif& f)
      : Cells<S>(f.cells, f.bound), lines(static_cast<const Line<S>*>(f.lines)) {}

  __device__ __forceinline__ Line<S> line(int cell) const { return load_constant(lines + cell); }
  __device__ __forceinline__ S operator()(S x) const { return line(this->cell_of(x))(x); }
};

template <class S> struct ColumnLink : Cells<S> {
  const S *slopes, *offsets;

  explicit ColumnLink(const PlifColumns& f)
      : Cells<S>(f.cells, f.bound),
        slopes(static_cast<const S*>(f.slopes)),
        offsets(static_cast<const S*>(f.offsets)) {}

  __device__ __forceinline__ S operator()(S x) const {
    const int cell = this->cell_of(x);
    return slopes[cell] * x + offsets[cell];
  }
};

// What a thread adds to the sums, and what it has found outside.
template <class S> struct Adding {
  const Cells<S>& f;
  int64_t* cells;
  double scale;
  double left = 0, right = 0;

  __device__ __forceinline__ void add(S g, S x, int cell) {
    const double scaled = static_cast<double>(g) * scale, wide = x;
    const auto mass = static_cast<int64_t>(scaled);
    if (mass != 0) {
      // in float64: of one cell in 100,000, float32 resolves a hundredth
      double share = (wide + f.wide_bound) * f.wide_rate - cell;
      share = share > 0 ? share : 0;
      share = share < 1 ? share : 1;
      int64_t* sums = cells + 2 * static_cast<int64_t>(cell);
      add_atomically(sums, mass);
      add_atomically(sums + 1, static_cast<int64_t>(scaled * share));
    }
    if (x >= -f.bound && x <= f.bound) return;
    if (g == 0) return;  // also where x is -inf
    if (x > f.bound)
      right += static_cast<double>(g) * (wide - f.wide_bound);
    else
      left += static_cast<double>(g) * (wide + f.wide_bound);
  }

  // Of all threads of the group.
  template <int THREADS> __device__ void finish(Group<THREADS>& group, double* outside) {
    left = group.sum(left);
    right = group.sum(right);
    if (group.rank != 0) return;
    outside[0] = left;
    outside[1] = right;
  }
};

// Up to N elements, of which there may be none; zeros for the rest.
template <class T, int N> __device__ __forceinline__ void read(const void* data, int64_t at,
                                                               int64_t end,
                                                               StatisticOf<T> (&x)[N]) {
  const T* from = static_cast<const T*>(data) + at;
  if (at + N <= end && bit_cast<uintptr_t>(from) % 16 == 0) {
    const auto chunk = *reinterpret_cast<const Chunk<T>*>(from);
    for (int e = 0; e < N; ++e) x[e] = number_of(element_of(chunk, e));
  } else {
    for (int e = 0; e < N; ++e) x[e] = at + e < end ? number_of(from[e]) : StatisticOf<T>{0};
  }
}

template <class T, int N> __device__ __forceinline__ void write(void* data, int64_t at, int64_t end,
                                                                const StatisticOf<T> (&x)[N]) {
  T* to = static_cast<T*>(data) + at;
  if (at + N <= end && bit_cast<uintptr_t>(to) % 16 == 0) {
    *reinterpret_cast<Chunk<T>*>(to) = chunk_of<T>(x);
  } else {
    for (int e = 0; e < N; ++e)
      if (at + e < end) to[e] = Order<T>::element(x[e]);
  }
}

template <class T> __global__ void __launch_bounds__(kPlifBlock)
    plif_forward_kernel(const PlifForward a, const Link<StatisticOf<T>> f) {
  constexpr int N = Chunk<T>::kElements;
  const int64_t at =
      (static_cast<int64_t>(blockIdx.x) * kPlifBlock + static_cast<int>(threadIdx.x)) * N;
  StatisticOf<T> x[N];
  read<T>(a.x, at, a.elements, x);
  for (int e = 0; e < N; ++e) x[e] = f(x[e]);
  write<T>(a.y, at, a.elements, x);
}

template <class T> __global__ void __launch_bounds__(kPlifBlock)
    plif_backward_kernel(const PlifBackward a, const Link<StatisticOf<T>> f) {
  using S = StatisticOf<T>;
  constexpr int N = Chunk<T>::kElements;
  GROUP_MEMORY(kPlifBlock, group);
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kPlifBlock + group.rank) * N;
  S x[N], g[N];
  read<T>(a.x, at, a.elements, x);
  read<T>(a.dy, at, a.elements, g);
  int cells[N];
  S dx[N];
  for (int e = 0; e < N; ++e) {
    cells[e] = f.cell_of(x[e]);
    dx[e] = g[e] * f.line(cells[e]).slope;
  }
  write<T>(a.dx, at, a.elements, dx);
  if (!a.sums.scale) return;
  Adding<S> sums{f, a.sums.cells, *a.sums.scale};
  for (int e = 0; e < N; ++e) sums.add(g[e], x[e], cells[e]);
  sums.finish(group, a.sums.outside + 2 * static_cast<int64_t>(blockIdx.x));
}

template <class T, int THREADS>
__global__ void __launch_bounds__(Group<THREADS>::kBlock,
                                  resident<T>(Group<THREADS>::kBlock) - (sizeof(T) == 8))
    plif_ce_forward_kernel(const PlifCeForward a, const Link<StatisticOf<T>> f) {
  using S = StatisticOf<T>;
  GROUP_MEMORY(THREADS, group);
  const int64_t n = group.job();
  if (n >= a.logits.count) return;
  const T* row = row_of<T>(a.logits, n);
  const int classes = static_cast<int>(a.logits.classes);
  const auto weight = static_cast<const S*>(a.weight);
  const S smoothing = static_cast<S>(a.label_smoothing);
  const int64_t target = a.target[n];
  const bool hit = is_class(target, a.logits.classes);

  const Softmax<S> softmax = softmax_of(group, row, classes, f);
  const S row_max = softmax.largest;
  S spread = 0;
  if (smoothing != 0) {
    for_each_class<T>(group, row, classes, [&](T x, int i) {
      spread += (weight ? weight[i] : S{1}) * (row_max - f(number_of(x)));
    });
    spread = group.sum(spread);
  }
  if (group.rank != 0) return;

  // a row of only minus infinity
  const S log_sum = softmax.total == 0 ? kNan<S> : std::log(softmax.total);
  S loss = kNan<S>;
  if (hit) {
    // the maximum leaves both terms before they meet
    loss = (weight ? weight[target] : S{1}) * (log_sum - (f(number_of(row[target])) - row_max));
    const S weights = a.weights ? *static_cast<const S*>(a.weights) : S(classes);
    if (smoothing != 0)
      loss = (1 - smoothing) * loss + smoothing / classes * (weights * log_sum + spread);
  }
  static_cast<S*>(a.loss)[n] = loss;
  static_cast<S*>(a.lse)[n] = row_max + log_sum;
  static_cast<S*>(a.row_max)[n] = row_max;
  static_cast<S*>(a.log_sum)[n] = log_sum;
}

// 16 warps at a time on a multiprocessor: with their registers nothing spills.
template <class T, int THREADS>
__global__ void __launch_bounds__(Group<THREADS>::kBlock, 512 / Group<THREADS>::kBlock)
    plif_ce_backward_kernel(const PlifCeBackward a, const Link<StatisticOf<T>> f) {
  using S = StatisticOf<T>;
  GROUP_MEMORY(THREADS, group);
  const int64_t n = group.job();
  if (n >= a.logits.count) return;
  const T* row = row_of<T>(a.logits, n);
  const int classes = static_cast<int>(a.logits.classes);
  T* out = static_cast<T*>(a.dlogits) + n * a.logits.classes;
  const Slice slice = slice_of(out, classes);
  const auto weight = static_cast<const S*>(a.weight);
  const S smoothing = static_cast<S>(a.label_smoothing);
  const S row_max = static_cast<const S*>(a.row_max)[n];
  const S log_sum = static_cast<const S*>(a.log_sum)[n];

  // of a row with one class the loss is 0
  const bool hit = is_class(a.target[n], a.logits.classes) && classes > 1;
  const int target = hit ? static_cast<int>(a.target[n]) : -1;
  const S dloss = a.dloss && hit ? static_cast<const S*>(a.dloss)[n] : S{0};
  const S at_target = dloss * (1 - smoothing) * (weight && hit ? weight[target] : S{1});
  const S share = smoothing == 0 ? S{0} : dloss * (smoothing / classes);
  S factor = at_target + (a.dlse ? static_cast<const S*>(a.dlse)[n] : S{0});
  if (share != 0) factor += share * (a.weights ? *static_cast<const S*>(a.weights) : S(classes));

  Adding<S> sums{f, a.sums.cells, a.sums.scale ? *a.sums.scale : 0};
  // the gradient of a row whose log-sum-exp is not finite is NaN, and no integer
  const S lse = row_max + log_sum;
  const bool counted = a.sums.scale && lse - lse == 0;
  const bool weighted = weight && share != 0;
  // from the logits of some classes, the gradients; look-ups before additions, for which they would wait
  const auto turn = [&](auto& x, int first, bool exist) {
    constexpr int kElements = sizeof(x) / sizeof(S);
    S g[kElements], slopes[kElements];
    int cells[kElements];
    for (int e = 0; e < kElements; ++e) {
      // what was not loaded may be anything
      cells[e] = exist ? f.cell_of(x[e]) : 0;
      const Line<S> line = f.line(cells[e]);
      slopes[e] = line.slope;
      // without upstream gradient exactly zero, also where the probability is NaN
      g[e] = factor == 0 ? S{0} : exp_nonpositive((line(x[e]) - row_max) - log_sum) * factor;
    }
    for (int e = 0; e < kElements; ++e)
      g[e] -= share * (weighted && exist ? weight[first + e] : S{1});
    for (int e = 0; e < kElements; ++e)
      if (first + e == target) g[e] -= at_target;
    if (counted && exist)
      for (int e = 0; e < kElements; ++e) sums.add(g[e], x[e], cells[e]);
    for (int e = 0; e < kElements; ++e) x[e] = g[e] * slopes[e];
  };
  const auto gradient = [&](int i) {
    S x[1] = {number_of(row[i])};
    turn(x, i, true);
    return x[0];
  };
  if (factor == 0 && share == 0) {
    fill_zeros(group, out, slice);
  } else {
    if (begin_alike(row, out))
      sweep_chunks<2>(group, slice, row, out,
                      [&](const Chunk<T>& chunk, auto& x, int first, bool exist) {
                        for (int e = 0; e < Chunk<T>::kElements; ++e)
                          x[e] = number_of(element_of(chunk, e));
                        turn(x, first, exist);
                      });
    else
      sweep(group, slice, out, gradient);
    for_each_edge<T>(group, slice, [&](int i) { out[i] = Order<T>::element(gradient(i)); });
  }
  if (a.sums.scale) sums.finish(group, a.sums.outside + 2 * (n * gridDim.y + blockIdx.y));
}

// After topk_ce has listed the row: its indices are there, and everything else is written anew.
template <class T, int THREADS>
__global__ void __launch_bounds__(Group<THREADS>::kBlock, 512 / Group<THREADS>::kBlock)
    plif_topk_forward_kernel(const PlifTopkForward a, const ColumnLink<StatisticOf<T>> f) {
  using S = StatisticOf<T>;
  GROUP_MEMORY(THREADS, group);
  const int64_t n = group.job();
  if (n >= a.list.logits.count) return;
  const int k = static_cast<int>(a.list.k);
  const T* row = row_of<T>(a.list.logits, n);
  const int32_t* indices = a.list.indices + n * a.list.k;
  S* values = static_cast<S*>(a.values) + n * (a.list.k + 1);
  const int64_t last = a.list.logits.classes - 1, target = a.list.target[n];
  const int64_t y = target < 0 ? 0 : target < last ? target : last;
  for (int rank = group.rank; rank <= k; rank += THREADS)
    values[rank] = number_of(row[rank < k ? indices[rank] : y]);
  group.sync();
  const auto index = [&](int rank, int) { return indices[rank]; };
  const auto value = [&](int rank, int) { return f(values[rank]); };
  list_softmax<S, 0>(group, a.list, n, index, value, value(0, -1), target, value(k, -1));
}

template <class T, int THREADS>
__global__ void __launch_bounds__(Group<THREADS>::kBlock, 512 / Group<THREADS>::kBlock)
    plif_topk_backward_kernel(const PlifTopkBackward a, const ColumnLink<StatisticOf<T>> f) {
  using S = StatisticOf<T>;
  GROUP_MEMORY(THREADS, group);
  const int64_t n = group.job();
  if (n >= a.list.count) return;
  const int k = static_cast<int>(a.list.k);
  T* row = static_cast<T*>(a.list.dlogits) + n * a.list.classes;
  const S* values = static_cast<const S*>(a.values) + n * (a.list.k + 1);
  ListGradient<S> gradient(a.list, n);
  gradient.prepare(group, a.list);

  Adding<S> sums{f, a.sums.cells, a.sums.scale ? *a.sums.scale : 0};
  // the gradient of a row whose probabilities are NaN is NaN, and no integer
  const bool counted = a.sums.scale && gradient.probs[0] == gradient.probs[0];
  const auto turn = [&](S g, S x) {
    const int cell = f.cell_of(x);
    if (counted) sums.add(g, x, cell);
    return Order<T>::element(g * f.slopes[cell]);
  };
  bool in_support = false;
  for (int rank = group.rank; rank < k; rank += THREADS) {
    const int index = gradient.indices[rank];
    in_support = in_support || gradient.is_target(index);
    row[index] = turn(gradient(rank, index, gradient.probs[rank]), values[rank]);
  }
  const int found = group.count(in_support);
  if (group.rank == 0 && gradient.hit && found == 0)
    row[gradient.target] = turn(0 - gradient.at_target, values[k]);
  if (a.sums.scale) sums.finish(group, a.sums.outside + 2 * n);
}

template <class T> constexpr int64_t kElementsOfBlock = kPlifBlock * Chunk<T>::kElements;

template <class T> dim3 blocks_of(int64_t elements) {
  return dim3(static_cast<unsigned>((elements - 1) / kElementsOfBlock<T> + 1));
}

template <class T> cudaError_t forward_rows(const PlifForward& a, cudaStream_t stream) {
  launch(plif_forward_kernel<T>, blocks_of<T>(a.elements), kPlifBlock, stream, a,
         Link<StatisticOf<T>>(a.f));
  return cudaGetLastError();
}

template <class T> cudaError_t backward_rows(const PlifBackward& a, cudaStream_t stream) {
  launch(plif_backward_kernel<T>, blocks_of<T>(a.elements), kPlifBlock, stream, a,
         Link<StatisticOf<T>>(a.f));
  return cudaGetLastError();
}

template <class T> cudaError_t forward_rows(const PlifCeForward& a, cudaStream_t stream) {
  const auto rows = static_cast<unsigned>(a.logits.count);
  const Link<StatisticOf<T>> f(a.f);
  if (is_short<T>(a.logits.classes))
    launch(plif_ce_forward_kernel<T, 32>, blocks_for(rows), 128, stream, a, f);
  else
    launch(plif_ce_forward_kernel<T, 256>, dim3(rows), 256, stream, a, f);
  return cudaGetLastError();
}

template <class T> cudaError_t backward_rows(const PlifCeBackward& a, cudaStream_t stream) {
  const auto rows = static_cast<unsigned>(a.logits.count);
  const Link<StatisticOf<T>> f(a.f);
  if (is_short<T>(a.logits.classes))
    launch(plif_ce_backward_kernel<T, 32>, blocks_for(rows), 128, stream, a, f);
  else
    launch(plif_ce_backward_kernel<T, 256>,
           blocks_for_gradient<T, 256>(a.logits.count, a.logits.classes), 256, stream, a, f);
  return cudaGetLastError();
}

// Lists that a warp has for itself, where longer ones have a block.
constexpr int64_t kWarpList = 128;

template <class T> cudaError_t forward_rows(const PlifTopkForward& a, cudaStream_t stream) {
  const auto rows = static_cast<unsigned>(a.list.logits.count);
  const ColumnLink<StatisticOf<T>> f(a.f);
  if (a.list.k <= kWarpList)
    launch(plif_topk_forward_kernel<T, 32>, blocks_for(rows), 128, stream, a, f);
  else
    launch(plif_topk_forward_kernel<T, 256>, dim3(rows), 256, stream, a, f);
  return cudaGetLastError();
}

template <class T> cudaError_t backward_rows(const PlifTopkBackward& a, cudaStream_t stream) {
  const auto rows = static_cast<unsigned>(a.list.count);
  const ColumnLink<StatisticOf<T>> f(a.f);
  if (a.list.k <= kWarpList)
    launch(plif_topk_backward_kernel<T, 32>, blocks_for(rows), 128, stream, a, f);
  else
    launch(plif_topk_backward_kernel<T, 256>, dim3(rows), 256, stream, a, f);
  return cudaGetLastError();
}

}  // namespace sparse_ce::cuda
