// reduce in CUDA C++: the losses of the rows to one, and what each row gets of its gradient. The contract stands in
// python/sparse_ce/schema.py.
//
// Forward reads 12 bytes per row, and the weight of its target; backward reads 8 and writes 4. Up to kAlone rows are one block
// and one launch. Beyond, up to kParts blocks take turns, and one more launch adds what they found. Which thread adds what
// follows from the number of rows alone: the bits are the same in every run, on every GPU. Of 2^31 rows a thread adds 512 sums
// of kLoads numbers; all else are trees.
#pragma once

#include "group.cuh"
#include "reduce.h"

namespace sparse_ce::cuda {

// A warp of warps, for a tree of two equal halves.
constexpr int kSumThreads = 32 * 32;
constexpr int kLoads = 4;  // of each kind by a thread, before it uses the first
constexpr int64_t kTurn = kLoads * kSumThreads;
constexpr int64_t kAlone = 4 * kTurn;
constexpr int64_t kParts = kSumThreads;
constexpr int kShareThreads = 256;
constexpr int64_t kShares = kLoads * kShareThreads;

template <class S> struct Sums {
  S loss, weight;
  int64_t rows;
};

inline int64_t parts_of(int64_t rows) {
  if (rows <= kAlone) return 1;
  const int64_t turns = (rows - 1) / kTurn + 1;
  return turns < kParts ? turns : kParts;
}

template <class V> __device__ V sum_of_lanes(V x) {
  return reduce_lanes(x, [](V a, V b) { return a + b; });
}

template <class S> __device__ Sums<S> sum_of_lanes(const Sums<S>& x) {
  return {sum_of_lanes(x.loss), sum_of_lanes(x.weight), sum_of_lanes(x.rows)};
}

// Of a block of kSumThreads, the same in every thread. Ten additions lie on the way of a number: Group adds warps in a row,
// here it would be 36.
template <class S> __device__ Sums<S> sum_of_block(const Sums<S>& x) {
  SHARED_ARRAY(S, losses, 32);
  SHARED_ARRAY(S, weights, 32);
  SHARED_ARRAY(int64_t, rows, 32);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const Sums<S> of_warp = sum_of_lanes(x);
  if (lane == 0) {
    losses[warp] = of_warp.loss;
    weights[warp] = of_warp.weight;
    rows[warp] = of_warp.rows;
  }
  __syncthreads();
  return sum_of_lanes(Sums<S>{losses[lane], weights[lane], rows[lane]});
}

template <class S> __device__ void finish(const ReduceForward& a, const Sums<S>& all) {
  S divisor = 1;
  if (a.mean && all.rows > 0) divisor = a.weight ? all.weight : static_cast<S>(all.rows);
  *static_cast<S*>(a.reduced) = all.loss / divisor;
  *static_cast<S*>(a.divisor) = divisor;
}

// One block of a multiprocessor asks for enough at a time; for two the compiler would ask for less.
template <class S> __global__ void __launch_bounds__(kSumThreads, 1)
    reduce_forward_kernel(const ReduceForward a) {
  const S* weight = a.mean ? static_cast<const S*>(a.weight) : nullptr;
  Sums<S> sums{};
#pragma unroll 1
  for (int64_t first = blockIdx.x * kTurn + threadIdx.x; first < a.rows;
       first += gridDim.x * kTurn) {
    S loss[kLoads] = {}, share[kLoads] = {};
    int64_t target[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int64_t row = first + i * kSumThreads;
      target[i] = row < a.rows ? a.target[row] : a.ignore_index;
      // not after the target has come: a loss that does not count is there too
      if (row < a.rows) loss[i] = static_cast<const S*>(a.loss)[row];
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int64_t y = target[i] < 0 ? 0 : target[i] < a.classes ? target[i] : a.classes - 1;
      if (weight && target[i] != a.ignore_index) share[i] = weight[y];
    }
    S losses = 0, shares = 0;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const bool counted = target[i] != a.ignore_index;
      losses += counted ? loss[i] : 0;  // it may be NaN where it is not
      shares += share[i];
      sums.rows += counted;
    }
    sums.loss += losses;
    sums.weight += shares;
  }
  const Sums<S> of_block = sum_of_block(sums);
  if (threadIdx.x != 0) return;
  if (gridDim.x == 1)
    finish(a, of_block);
  else
    static_cast<Sums<S>*>(a.scratch)[blockIdx.x] = of_block;
}

template <class S> __global__ void __launch_bounds__(kSumThreads)
    reduce_join_kernel(const ReduceForward a, int parts) {
  Sums<S> sums{};
  if (static_cast<int>(threadIdx.x) < parts)
    sums = static_cast<const Sums<S>*>(a.scratch)[threadIdx.x];
  const Sums<S> all = sum_of_block(sums);
  if (threadIdx.x == 0) finish(a, all);
}

template <class S> __global__ void __launch_bounds__(kShareThreads)
    reduce_backward_kernel(const ReduceBackward a) {
  const int64_t first = blockIdx.x * kShares + threadIdx.x;
  int64_t target[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int64_t row = first + i * kShareThreads;
    target[i] = row < a.rows ? a.target[row] : a.ignore_index;
  }
  const S share = *static_cast<const S*>(a.dreduced) / *static_cast<const S*>(a.divisor);
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int64_t row = first + i * kShareThreads;
    if (row < a.rows) static_cast<S*>(a.dloss)[row] = target[i] == a.ignore_index ? 0 : share;
  }
}

template <class S> cudaError_t forward_rows(const ReduceForward& a, cudaStream_t stream) {
  const auto parts = static_cast<unsigned>(parts_of(a.rows));
  launch(reduce_forward_kernel<S>, dim3(parts), kSumThreads, stream, a);
  if (parts > 1)
    launch(reduce_join_kernel<S>, dim3(1), kSumThreads, stream, a, static_cast<int>(parts));
  return cudaGetLastError();
}

template <class S> cudaError_t backward_rows(const ReduceBackward& a, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((a.rows - 1) / kShares + 1);
  launch(reduce_backward_kernel<S>, dim3(blocks), kShareThreads, stream, a);
  return cudaGetLastError();
}

}  // namespace sparse_ce::cuda
