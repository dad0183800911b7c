// tail in CUDA C++: the normaliser of a row, and draws from what is outside of its list. The contract, which is in integers,
// stands in python/sparse_ce/schema.py: q of a class is floor(2^52 p).
//
// A row of up to 8 KB belongs to a warp, a longer one to a block of 256 threads. Forward reads V * itemsize bytes per row from memory, once, for
// the softmax of all classes. Draws take a second look, from the cache: it sums q by segments, and these sums stand in shared
// memory. The list is in them at first and is subtracted afterwards, which saves a comparison per class. A draw then finds its
// segment, and a warp goes through that again, for the class; draws ascend, so that a warp takes some that follow each other, and
// all that lie in a step at once.
//
// Integers have one sum in any order: which warp adds what changes no draw.
#pragma once

#include "group.cuh"
#include "order.cuh"
#include "rows.cuh"
#include "softmax.cuh"
#include "tail.h"

namespace sparse_ce::cuda {

// A sum of q, below 2^54. CUDA adds this type atomically.
using Mass = unsigned long long;

// q, by a shift: of conversions to 64 bits a multiprocessor of a gaming card makes two per cycle. p is at most 1, the sum of
// exponentials being at least 1.
__device__ __forceinline__ Mass mass_of(float p) {
  const auto bits = bit_cast<uint32_t>(p);
  // the mantissa from bit 63 on, from which that of 1, whose exponent is 127, goes to bit 52
  return shifted_right(Mass{bits << 8 | 0x80000000} << 32, 138 - (bits >> 23));
}
__device__ __forceinline__ Mass mass_of(double p) { return static_cast<Mass>(p * 0x1p52); }

// Of the lanes of a warp: two sums of 32 bits in place of ten shuffles.
__device__ __forceinline__ Mass sum_of_lanes(Mass x) {
  constexpr int kLow = 26;
  const int low = static_cast<int>(x & ((1 << kLow) - 1)), high = static_cast<int>(x >> kLow);
  return (Mass(__reduce_add_sync(kAllLanes, high)) << kLow) + __reduce_add_sync(kAllLanes, low);
}

// A row in steps of 32 chunks, which a warp takes at once. They begin at multiples of 16 bytes, so that the first chunk may
// begin before the row.
template <class T> struct TailRow {
  using S = StatisticOf<T>;
  static constexpr int kElements = Chunk<T>::kElements, kStep = 32 * kElements;

  const T* row;
  int classes, before;
  S row_max, log_sum;

  __device__ TailRow(const T* row, int classes, S row_max, S log_sum)
      : row(row),
        classes(classes),
        before(static_cast<int>(bit_cast<uintptr_t>(row) % 16 / sizeof(T))),
        row_max(row_max),
        log_sum(log_sum) {}

  __device__ __forceinline__ int step_of(int i) const { return (i + before) / kStep; }
  __device__ __forceinline__ int steps() const { return step_of(classes - 1) + 1; }
  // The first class of a lane's chunk.
  __device__ __forceinline__ int class_of(int step, int lane) const {
    return (step * 32 + lane) * kElements - before;
  }

  // What is no class of the row is minus infinity.
  __device__ __forceinline__ Chunk<T> chunk_at(int first) const {
    if (first >= 0 && first <= classes - kElements)
      return *reinterpret_cast<const Chunk<T>*>(row + first);
    T x[kElements];
    for (int e = 0; e < kElements; ++e) {
      const int i = first + e;
      x[e] = i >= 0 && i < classes ? row[i] : element_of(lowest_chunk<T>(), 0);
    }
    return packed(x);
  }

  __device__ __forceinline__ Mass mass(S z) const {
    return mass_of(exp_nonpositive((z - row_max) - log_sum));
  }
};

// Segments of a row at most; each is of as many steps.
template <int THREADS> constexpr int kSegments = Group<THREADS>::kInWarp ? 32 : 1024;

// The last come first: they are the most likely to be in the cache still, which the rows of all blocks may exceed.
template <class T, int THREADS> __device__ void sum_segments(const Group<THREADS>& group,
                                                             const TailRow<T>& tail, int length,
                                                             Shared<Mass> sums) {
  constexpr int kWarps = Group<THREADS>::kWarps;
  const int lane = group.rank % 32, steps = tail.steps(), count = (steps - 1) / length + 1;
#pragma unroll 1
  for (int segment = count - 1 - group.rank / 32; segment >= 0; segment -= kWarps) {
    int step = segment * length;
    const int end = step + length < steps ? step + length : steps;
    Mass sum = 0;
#pragma unroll 1
    do {
      const Chunk<T> x = tail.chunk_at(tail.class_of(step, lane));
      for (int e = 0; e < tail.kElements; ++e) sum += tail.mass(number_of(element_of(x, e)));
    } while (++step < end);
    sum = sum_of_lanes(sum);
    if (lane == 0) sums[segment] = sum;
  }
  for (int segment = count + group.rank; segment < kSegments<THREADS>; segment += THREADS)
    sums[segment] = 0;
}

// Sums of segments become those of the segments before each; every 32nd goes to `coarse` too, side by side, as all in `sums`
// lie in one bank. Returns that of all.
template <int THREADS> __device__ Mass add_up(const Group<THREADS>& group, Shared<Mass> sums,
                                              Shared<Mass> coarse, Shared<Mass> warp_sums) {
  constexpr int kWarps = Group<THREADS>::kWarps, kEach = kSegments<THREADS> / THREADS;
  const int first = group.rank * kEach, warp = group.rank / 32, lane = group.rank % 32;
  Mass mine = 0, all = 0;
  for (int s = 0; s < kEach; ++s) mine += sums[first + s];
  Mass before = sum_of_lanes_before(mine, lane, all);
  if constexpr (kWarps > 1) {
    if (lane == 0) warp_sums[warp] = all;
    group.sync();
    all = 0;
    for (int w = 0; w < kWarps; ++w) {
      if (w == warp) before += all;
      all += warp_sums[w];
    }
  }
  if (kWarps > 1 && first % 32 == 0) coarse[first / 32] = before;
  for (int s = 0; s < kEach; ++s) {
    const Mass sum = sums[first + s];
    sums[first + s] = before;
    before += sum;
  }
  group.sync();
  return all;
}

template <class T, int THREADS>
__global__ void __launch_bounds__(Group<THREADS>::kBlock,
                                  resident<T>(Group<THREADS>::kBlock) - (sizeof(T) == 8))
    tail_forward_kernel(const Tail a) {
  using S = StatisticOf<T>;
  using G = Group<THREADS>;
  GROUP_MEMORY(THREADS, group);
  SHARED_ARRAY(Mass, segments, G::kPerBlock * kSegments<THREADS>);
  SHARED_ARRAY(Mass, coarse, kSegments<THREADS> / 32);
  SHARED_ARRAY(Mass, warp_sums, G::kBlock / 32);
  const int64_t n = group.job();
  if (n >= a.logits.count) return;
  const T* row = row_of<T>(a.logits, n);
  const int classes = static_cast<int>(a.logits.classes), k = static_cast<int>(a.k);
  const int warp = group.rank / 32, lane = group.rank % 32;

  const Softmax<S> softmax = softmax_of(group, row, classes);
  // a row of only minus infinity
  const S log_sum = softmax.total == 0 ? kNan<S> : std::log(softmax.total);
  const TailRow<T> tail(row, classes, softmax.largest, log_sum);
  const int length = (tail.steps() - 1) / kSegments<THREADS> + 1;
  const Shared<Mass> sums = segments + group.number * kSegments<THREADS>;
  const int32_t* list = a.indices + n * a.k;
  const int cut_index = list[k - 1];
  const S cut = number_of(row[cut_index]);
  const int target = is_class(a.target[n], a.logits.classes) ? static_cast<int>(a.target[n]) : -1;
  const bool is_number = log_sum - log_sum == 0;
  Mass all = 0, stride = 0;
  if (a.uniform && a.samples > 0 && is_number) {
    sum_segments(group, tail, length, sums);
    group.sync();
    const auto subtract = [&](int i) {
      atomicAdd(sums + tail.step_of(i) / length, Mass{0} - tail.mass(number_of(row[i])));
    };
#pragma unroll 1
    for (int rank = group.rank; rank < k; rank += THREADS) subtract(list[rank]);
    if (group.rank == 0 && target >= 0 && !is_kept(number_of(row[target]), target, cut, cut_index))
      subtract(target);
    group.sync();
    all = add_up(group, sums, coarse, warp_sums);
    stride = all / static_cast<Mass>(a.samples);
  }
  if (group.rank == 0) {
    static_cast<S*>(a.row_max)[n] = softmax.largest;
    static_cast<S*>(a.log_sum)[n] = log_sum;
    static_cast<S*>(a.mass)[n] = a.uniform && !is_number ? kNan<S>
                                 : stride == 0           ? S{0}
                                                         : static_cast<S>(all) * S{0x1p-52};
  }

  int32_t* draws = a.draws + n * a.samples;
  if (stride == 0) {
    for (int64_t j = group.rank; j < a.samples; j += THREADS) draws[j] = -1;
    return;
  }
  const double uniform = static_cast<const S*>(a.uniform)[n];
  const auto first = static_cast<Mass>(uniform * static_cast<double>(stride));
  const int64_t each = (a.samples - 1) / G::kWarps + 1;
  const int64_t last = (warp + 1) * each < a.samples ? (warp + 1) * each : a.samples;
  for (int64_t j = warp * each; j < last;) {
    Mass place = first + static_cast<Mass>(j) * stride;
    // the last of the segments that do not begin after it, in two looks at 32 of them, or one
    const auto last_of = [&](Shared<Mass> begins) {
      return __popc(__ballot_sync(kAllLanes, begins[lane] <= place)) - 1;
    };
    int segment = G::kWarps > 1 ? 32 * last_of(coarse) : 0;
    segment += last_of(sums + segment);
    place -= sums[segment];
#pragma unroll 1
    for (int step = segment * length; step < (segment + 1) * length && j < last; ++step) {
      const int i = tail.class_of(step, lane);
      const Chunk<T> x = tail.chunk_at(i);
      Mass up_to[tail.kElements], own = 0, of_step;
      for (int e = 0; e < tail.kElements; ++e) {
        const S z = number_of(element_of(x, e));
        const bool out = is_kept(z, i + e, cut, cut_index) || i + e == target;
        up_to[e] = own += tail.mass(out ? -kInfinite<S> : z);
      }
      const Mass before = sum_of_lanes_before(own, lane, of_step);
#pragma unroll 1
      for (; place < of_step && j < last; ++j, place += stride) {
        if (before <= place && place < before + own) {
          int e = 0;
          for (const Mass sum : up_to) e += before + sum <= place;
          draws[j] = i + e;
        }
      }
      place -= of_step;
    }
  }
}

template <class T> cudaError_t forward_rows(const Tail& a, cudaStream_t stream) {
  const auto rows = static_cast<unsigned>(a.logits.count);
  if (is_short<T>(a.logits.classes))
    launch(tail_forward_kernel<T, 32>, blocks_for(rows), 128, stream, a);
  else
    launch(tail_forward_kernel<T, 256>, dim3(rows), 256, stream, a);
  return cudaGetLastError();
}

}  // namespace sparse_ce::cuda
