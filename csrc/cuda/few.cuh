// topk_ce forward for up to 32 of so few classes that all are sorted. Several rows share a warp: within a lane two items are
// put in order by two instructions, between lanes by three, and what a row needs once costs a part of what it costs a warp.
#pragma once

#include "list.cuh"
#include "sorted.cuh"

namespace sparse_ce::cuda {

constexpr int kMaxFew = 64;
// Lanes of a row: with fewer float64 leaves the registers.
template <class T> constexpr int kFewLanes = sizeof(T) == 8 ? 8 : 4;

template <class T> using ShortItem = std::conditional_t<sizeof(T) == 2, Item16, ItemOf<T>>;

// Where rows allow it, a lane loads so many classes at a time.
template <class T, int N> struct alignas(N * sizeof(T)) Vector {
  T elements[N];
};

// Everything that forward returns. The classes go to memory of the group, and to the lanes in whose turns they are.
template <class T, class Item, int LANES, int TOP>
__device__ __forceinline__ void finish_sorted(Group<LANES>& group, const Forward& a, int64_t n,
                                              const Target<T>& target,
                                              Sorted<Item, LANES, TOP> best, Shared<Item> all) {
  const Item first = of_lane(best.items[0], group.first_lane());
  const Shared<Item> memory = all + group.number * best.kApart;
  best.deal(group, memory);
  const auto item = [&](int rank, int turn) {
    if (best.kEach == 1) return best.items[0];
    return turn < 0 ? Item(memory[rank]) : best.items[turn];
  };
  finish<T, TOP / LANES>(group, a, n, target, item, first);
}

template <class T, int LANES, int VECTOR>
__global__ void __launch_bounds__(Group<LANES>::kBlock, sizeof(T) == 2 ? 5 : 4)
    forward_few_kernel(const Forward a) {
  using G = Group<LANES>;
  using Item = ShortItem<T>;
  using Best = Sorted<Item, LANES>;
  constexpr int kVectors = kMaxFew / (LANES * VECTOR);
  GROUP_MEMORY(LANES, group);
  SHARED_ARRAY(Item, sorted, G::kPerBlock * Best::kApart);
  const int64_t n = group.row(a.logits.count);
  const int lane = group.rank, classes = static_cast<int>(a.logits.classes);
  const T* row = row_of<T>(a.logits, n);
  Target<T> target;
  target.load_index(a, n);

  // a class that does not exist comes after all that do
  Vector<T, VECTOR> x[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int i = (v * LANES + lane) * VECTOR;
    for (T& element : x[v].elements) element = lowest_element<T>();
    if (i < classes) x[v] = *reinterpret_cast<const Vector<T, VECTOR>*>(row + i);
  }
  target.load_logit(a, row);
  const auto sorted_from = [&](int first) {
    Best best;
#pragma unroll
    for (int e = 0; e < Best::kEach; ++e) {
      const int v = first + e / VECTOR, place = e % VECTOR;
      best.items[e] = item_of<Item>(x[v].elements[place], (v * LANES + lane) * VECTOR + place);
    }
    best.sort(lane);
    return best;
  };
  Best best = sorted_from(0);
  if (classes > 32) best.merge(sorted_from(kVectors / 2), lane);
  finish_sorted<T>(group, a, n, target, best, sorted);
}

template <class T> cudaError_t forward_few(const Forward& a, cudaStream_t stream) {
  constexpr int kLanes = kFewLanes<T>, kVector = sizeof(T) == 8 ? 1 : 4;
  const auto kernel = rows_are_of<T>(a.logits, kVector) ? forward_few_kernel<T, kLanes, kVector>
                                                        : forward_few_kernel<T, kLanes, 1>;
  launch(kernel, blocks_for<kLanes>(a.logits.count), Group<kLanes>::kBlock, stream, a);
  return cudaGetLastError();
}

}  // namespace sparse_ce::cuda
