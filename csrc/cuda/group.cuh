// The threads that share a row: some lanes of a warp, a warp, or a whole block. What they do together.
#pragma once

#include "platform.cuh"

namespace sparse_ce::cuda {

constexpr unsigned kAllLanes = 0xFFFFFFFF;

// Shared memory of the groups of a block.
#define GROUP_MEMORY(THREADS, name)                                        \
  SHARED_ARRAY(uint64_t, name##_slots, 2 * (Group<THREADS>::kBlock / 32)); \
  SHARED_ARRAY(int, name##_lengths, Group<THREADS>::kPerBlock);            \
  Group<THREADS> name(name##_slots, name##_lengths)

// Blocks that shall find room on a multiprocessor, for __launch_bounds__: up to 96 registers per thread in blocks of 128, 64 in
// larger ones, 128 for float64. Left to itself the compiler aims for more blocks, and spills.
template <class T> constexpr int resident(int block) {
  return block == 128 ? 5 : sizeof(T) == 8 ? 512 / block : 1024 / block;
}

// Values of any type of 4, 8 or 16 bytes, from lane to lane.
template <class V, class Shuffle> __device__ __forceinline__ V by_words(V x, Shuffle shuffle) {
  using Word = std::conditional_t<sizeof(V) == 4, unsigned, unsigned long long>;
  Word words[sizeof(V) / sizeof(Word)];
  memcpy(words, &x, sizeof(V));
  for (Word& word : words) word = shuffle(word);
  memcpy(&x, words, sizeof(V));
  return x;
}

template <class V> __device__ __forceinline__ V of_lane(V x, int lane) {
  return by_words(x, [&](auto word) { return __shfl_sync(kAllLanes, word, lane); });
}

// Of the lane whose number differs by these bits.
template <class V> __device__ __forceinline__ V across(V x, int bits) {
  return by_words(x, [&](auto word) { return __shfl_xor_sync(kAllLanes, word, bits); });
}

// Of so many lanes, a tree.
template <int LANES = 32, class V, class Combine>
__device__ __forceinline__ V reduce_lanes(V x, Combine combine) {
#pragma unroll
  for (int distance = LANES / 2; distance > 0; distance /= 2) x = combine(x, across(x, distance));
  return x;
}

// Of the lanes before this one, of so many that share a row; and of all.
template <int LANES = 32, class V>
__device__ __forceinline__ V sum_of_lanes_before(V x, int lane, V& all) {
  V sum = x;
#pragma unroll
  for (int distance = 1; distance < LANES; distance *= 2) {
    const V other =
        by_words(sum, [&](auto word) { return __shfl_up_sync(kAllLanes, word, distance); });
    if (lane >= distance) sum += other;
  }
  all = of_lane(sum, LANES == 32 ? 31 : static_cast<int>(threadIdx.x % 32) | (LANES - 1));
  return sum - x;
}

// Lanes of a warp go together, whosever row they have: where rows end within a warp, the lanes left over take the last row too.
template <int THREADS> class Group {
 public:
  static constexpr bool kInWarp = THREADS <= 32;
  static constexpr int kLanes = kInWarp ? THREADS : 32;
  static constexpr int kWarps = THREADS / 32;
  static constexpr int kBlock = kInWarp ? 128 : THREADS;
  static constexpr int kPerBlock = kBlock / THREADS;

  __device__ Group(Shared<uint64_t> slots, Shared<int> lengths)
      : number(static_cast<int>(threadIdx.x / THREADS)),
        rank(static_cast<int>(threadIdx.x % THREADS)),
        slots_(slots + 2 * kWarps * number),
        length_(lengths + number) {}

  const int number;  // of the group in its block
  const int rank;    // of the thread in its group

  // Its number among those of all blocks.
  __device__ __forceinline__ int64_t job() const {
    return static_cast<int64_t>(blockIdx.x) * kPerBlock + number;
  }
  // Of `rows` that such groups share, in their order.
  __device__ __forceinline__ int64_t row(int64_t rows) const {
    return job() < rows ? job() : rows - 1;
  }

  // A barrier, and all memory that any of them wrote before it is seen by all after it.
  __device__ __forceinline__ void sync() const {
    if constexpr (kInWarp)
      __syncwarp();
    else
      __syncthreads();
  }

  // The same result in every thread, from the same order of operations in every run. One barrier: the slots are used in
  // turns, and nobody writes to a slot again before all have passed the barrier of the other.
  template <class V, class Combine> __device__ V reduce(V x, Combine combine) {
    return across_warps(reduce_lanes<kLanes>(x, combine), combine);
  }

  template <class V> __device__ V sum(V x) {
    static_assert(!std::is_same<V, bool>::value, "a sum of bools is a bool: see count");
    const auto combine = [](V a, V b) { return a + b; };
    if constexpr (kLanes == 32 && std::is_same<V, int>::value)
      return across_warps(__reduce_add_sync(kAllLanes, x), combine);
    else
      return reduce(x, combine);
  }

  template <class V> __device__ V least(V x) {
    const auto combine = [](V a, V b) { return a < b ? a : b; };
    if constexpr (kLanes == 32 && std::is_same<V, int>::value)
      return across_warps(__reduce_min_sync(kAllLanes, x), combine);
    else
      return reduce(x, combine);
  }

  template <class V> __device__ V greatest(V x) {
    const auto combine = [](V a, V b) { return a > b ? a : b; };
    if constexpr (kLanes == 32 && std::is_same<V, int>::value)
      return across_warps(__reduce_max_sync(kAllLanes, x), combine);
    else
      return reduce(x, combine);
  }

  // Of the group in its warp.
  __device__ __forceinline__ int first_lane() const {
    static_assert(kInWarp);
    return kLanes == 32 ? 0 : static_cast<int>(threadIdx.x % 32) - rank;
  }
  __device__ __forceinline__ int last_lane() const { return first_lane() + kLanes - 1; }

  // Whether any group of the warp says yes, where all threads of a group say the same.
  __device__ __forceinline__ bool any_of_warp(bool yes) const {
    return kLanes == 32 ? yes : __any_sync(kAllLanes, yes);
  }

  // How many threads say yes.
  __device__ int count(bool yes) { return sum(static_cast<int>(yes)); }

  // And of those before this one.
  __device__ int count_before(bool yes) {
    static_assert(kLanes == 32);
    const unsigned all = __ballot_sync(kAllLanes, yes);
    int count = __popc(all & ((1u << rank % 32) - 1));
    if constexpr (!kInWarp) {
      const Shared<uint64_t> slots = next_slots();
      if (rank % 32 == 0) slots[rank / 32] = static_cast<uint64_t>(__popc(all));
      sync();
      for (int warp = 0; warp < rank / 32; ++warp)
        count += static_cast<int>(static_cast<uint64_t>(slots[warp]));
    }
    return count;
  }

  // A list that all threads of a block fill, in any order. Its length goes on where its capacity ends.
  __device__ void set_length(int length) {
    sync();
    if (rank == 0) length_[0] = length;
    sync();
  }

  template <class List, class V>
  __device__ __forceinline__ void append(List list, int capacity, bool keep, V value) {
    static_assert(kLanes == 32);
    const unsigned kept = __ballot_sync(kAllLanes, keep);
    if (kept == 0) return;
    const int lane = rank % 32, leader = __ffs(static_cast<int>(kept)) - 1;
    int place = 0;
    if (lane == leader) place = atomicAdd(length_ + 0, __popc(kept));
    place = __shfl_sync(kAllLanes, place, leader) + __popc(kept & ((1u << lane) - 1));
    if (keep && place < capacity) list[place] = value;
  }

  // The length of the list; the list itself is then seen by all.
  __device__ int length() const {
    sync();
    return length_[0];
  }

 private:
  template <class V, class Combine> __device__ V across_warps(V x, Combine combine) {
    if constexpr (!kInWarp) {
      static_assert(sizeof(V) <= sizeof(uint64_t));
      const Shared<uint64_t> slots = next_slots();
      uint64_t bits = 0;
      memcpy(&bits, &x, sizeof(V));
      if (rank % 32 == 0) slots[rank / 32] = bits;
      sync();
      for (int warp = 0; warp < kWarps; ++warp) {
        const uint64_t other = slots[warp];
        V y;
        memcpy(&y, &other, sizeof(V));
        x = warp == 0 ? y : combine(x, y);
      }
    }
    return x;
  }

  __device__ __forceinline__ Shared<uint64_t> next_slots() {
    turn_ ^= 1;
    return slots_ + turn_ * kWarps;
  }

  Shared<uint64_t> slots_;  // (2, kWarps)
  Shared<int> length_;
  int turn_ = 0;
};

// The blocks of so many groups, which are not none.
template <int THREADS = 32> dim3 blocks_for(int64_t rows) {
  return dim3(static_cast<unsigned>((rows - 1) / Group<THREADS>::kPerBlock + 1));
}

}  // namespace sparse_ce::cuda
