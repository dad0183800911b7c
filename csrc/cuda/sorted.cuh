// Some classes in their order, over the lanes that share a row: sorted in registers, by networks of comparisons.
#pragma once

#include "group.cuh"
#include "order.cuh"

namespace sparse_ce::cuda {

// The greater of two first.
template <class Item> __device__ __forceinline__ void put_in_order(Item& a, Item& b) {
  const Item first = first_of(a, b);
  b = last_of(a, b);
  a = first;
}

// Lane 0 has the first kEach of the TOP, lane 1 those that follow.
template <class Item, int LANES, int TOP = 32> struct Sorted {
  static constexpr int kEach = TOP / LANES;
  Item items[kEach];

  // Of any TOP. Each lane sorts its own, then runs of lanes are merged two by two.
  __device__ __forceinline__ void sort(int lane) {
    if constexpr (kEach > 1) sort_own<1, 1>();
#pragma unroll
    for (int run = 1; run < LANES; run *= 2) {
      const Sorted other = turned(2 * run - 1);
#pragma unroll
      for (int i = 0; i < kEach; ++i) items[i] = chosen(items[i], other.items[i], lane, run);
      settle(lane, run);
    }
  }

  // The first of these and of as many more.
  __device__ __forceinline__ void merge(Sorted more, int lane) {
    more = more.turned(LANES - 1);
#pragma unroll
    for (int i = 0; i < kEach; ++i) items[i] = first_of(items[i], more.items[i]);
    settle(lane, LANES);
  }

  // From then on a lane has the ranks lane, lane + LANES, ..., as they are written to memory. Through memory of the group, of
  // kApart items, so that groups meet in few banks.
  static constexpr int kApart = kEach == 1 ? 0 : TOP + LANES + 1;
  template <class Memory>
  __device__ __forceinline__ void deal(const Group<LANES>& group, Memory memory) {
    if constexpr (kEach > 1) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) memory[group.rank * kEach + i] = items[i];
      group.sync();
#pragma unroll
      for (int i = 0; i < kEach; ++i) items[i] = memory[i * LANES + group.rank];
    }
  }

 private:
  // Batcher's merging of odd and even places. By templates, as the compiler does not unroll such loops for 16 items.
  template <int RUN, int DISTANCE> __device__ __forceinline__ void sort_own() {
#pragma unroll
    for (int i = 0; i + DISTANCE < kEach; ++i)
      if (i >= DISTANCE % RUN && (i - DISTANCE % RUN) % (2 * DISTANCE) < DISTANCE &&
          i / (2 * RUN) == (i + DISTANCE) / (2 * RUN))
        put_in_order(items[i], items[i + DISTANCE]);
    if constexpr (DISTANCE > 1)
      sort_own<RUN, DISTANCE / 2>();
    else if constexpr (2 * RUN < kEach)
      sort_own<2 * RUN, 2 * RUN>();
  }

  // What the lane has whose number differs by these bits, last item first.
  __device__ __forceinline__ Sorted turned(int bits) const {
    Sorted other;
#pragma unroll
    for (int i = 0; i < kEach; ++i) other.items[i] = across(items[kEach - 1 - i], bits);
    return other;
  }

  // The lane without this bit takes the greater, the one with it the lesser.
  static __device__ __forceinline__ Item chosen(Item mine, Item other, int lane, int bit) {
    return ((lane & bit) == 0) == (other > mine) ? other : mine;
  }

  // Runs of so many lanes that rise and then fall, or the other way round: into order.
  __device__ __forceinline__ void settle(int lane, int lanes) {
#pragma unroll
    for (int bit = lanes / 2; bit > 0; bit /= 2)
#pragma unroll
      for (Item& item : items) item = chosen(item, across(item, bit), lane, bit);
#pragma unroll
    for (int distance = kEach / 2; distance > 0; distance /= 2)
#pragma unroll
      for (int i = 0; i < kEach; ++i)
        if ((i & distance) == 0) put_in_order(items[i], items[i + distance]);
  }
};

}  // namespace sparse_ce::cuda
