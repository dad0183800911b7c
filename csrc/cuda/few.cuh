// topk_ce forward for up to 32 of so few classes that all are sorted. Several rows share a warp: within a lane two items are
// put in order by two instructions, between lanes by three, and what a row needs once costs a part of what it costs a warp.
#pragma once

#include "list.cuh"
#include "sorted.cuh"

namespace sparse_ce::cuda {

template <class T> constexpr int kMaxFew = sizeof(T) == 2 ? 256 : 128;
// Lanes of a row: with fewer float64 leaves the registers.
template <class T> constexpr int kFewLanes = sizeof(T) == 8 ? 8 : 4;

template <class T> using ShortItem = std::conditional_t<sizeof(T) == 2, Item16, ItemOf<T>>;

// Where rows allow it, a lane loads so many classes at a time.
template <class T, int N> struct alignas(N * sizeof(T)) Vector {
  T elements[N];
};

template <class T, int LANES, int VECTOR>
__global__ void __launch_bounds__(Group<LANES>::kBlock, sizeof(T) == 2 ? 5 : 4)
    forward_few_kernel(const Forward a) {
  using G = Group<LANES>;
  using Item = ShortItem<T>;
  // of a tile, which is four lists of 32
  constexpr int kTile = 128, kVectors = kTile / (LANES * VECTOR);
  // from list to list, so that the same ranks of a warp's rows lie in different banks
  constexpr int kApart = 36;
  GROUP_MEMORY(LANES, group);
  SHARED_ARRAY(Item, lists, G::kPerBlock * kApart);
  const Shared<Item> list = lists + group.number * kApart;
  const int64_t n = group.row(a.logits.count);
  const int lane = group.rank, classes = static_cast<int>(a.logits.classes);
  const T* row = row_of<T>(a.logits, n);
  Target<T> target;
  target.load_index(a, n);

  // a class that does not exist comes after all that do
  const T lowest = element_of(lowest_chunk<T>(), 0);
  Sorted<Item, LANES> best;
#pragma unroll 1
  for (int begin = 0; begin < classes; begin += kTile) {
    Vector<T, VECTOR> x[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int i = begin + (v * LANES + lane) * VECTOR;
      for (T& element : x[v].elements) element = lowest;
      if (i < classes) x[v] = *reinterpret_cast<const Vector<T, VECTOR>*>(row + i);
    }
    if (begin == 0) target.load_logit(a, row);
#pragma unroll
    for (int first = 0; first < kTile; first += 32) {
      if (first > 0 && begin + first >= classes) break;
      Sorted<Item, LANES> more;
#pragma unroll
      for (int e = 0; e < best.kEach; ++e) {
        const int v = (first / LANES + e) / VECTOR;
        more.items[e] = item_of<Item>(x[v].elements[e % VECTOR],
                                      begin + (v * LANES + lane) * VECTOR + e % VECTOR);
      }
      more.sort(lane);
      if (begin + first == 0)
        best = more;
      else
        best.merge(more, lane);
    }
  }
#pragma unroll
  for (int e = 0; e < best.kEach; ++e) list[lane * best.kEach + e] = best.items[e];
  group.sync();
  finish<T, Item>(group, list, a, n, target);
}

template <class T> cudaError_t forward_few(const Forward& a, cudaStream_t stream) {
  constexpr int kLanes = kFewLanes<T>, kVector = sizeof(T) == 8 ? 1 : 4;
  const auto kernel = rows_are_of<T>(a.logits, kVector) ? forward_few_kernel<T, kLanes, kVector>
                                                        : forward_few_kernel<T, kLanes, 1>;
  launch(kernel, warps_for<kLanes>(a.logits.count), Group<kLanes>::kBlock, stream, a);
  return cudaGetLastError();
}

}  // namespace sparse_ce::cuda
