// The k-th class of a row for k beyond what lists hold, by the digits of its key, most significant first. Each of the 2, 4 or 8
// looks at the row counts the classes of every next digit.
#pragma once

#include "rows.cuh"

namespace sparse_ce::cuda {

// The k-th largest key, its place among the classes of this key, and how many those are.
template <class Key> struct Kth {
  Key key;
  int missing;
  int ties;
};

template <class T, int THREADS>
__device__ Kth<KeyOf<T>> kth_largest(Group<THREADS>& group, const T* row, int classes, int k) {
  using Digits = typename std::make_unsigned<KeyOf<T>>::type;
  constexpr int kBits = 8, kBins = 1 << kBits;
  constexpr int kKeyBits = sizeof(T) == 2 ? 16 : 8 * sizeof(KeyOf<T>);
  static_assert(THREADS >= kBins && kBins % 32 == 0);
  SHARED_ARRAY(int, bins, kBins);
  SHARED_ARRAY(int, warp_totals, kBins / 32);
  SHARED_ARRAY(int, chosen, 3);
  // from signed to unsigned order
  constexpr Digits kOffset = Digits{1} << (kKeyBits - 1);

  Digits prefix = 0;
  int missing = k, ties = classes;
#pragma unroll 1
  for (int shift = kKeyBits - kBits; shift >= 0; shift -= kBits) {
    if (group.rank < kBins) bins[group.rank] = 0;
    group.sync();
    const Digits above = shift + kBits == kKeyBits ? 0 : ~Digits{0} << (shift + kBits);
    for_each_class<T>(group, row, classes, [&](T x, int) {
      const Digits digits =
          (static_cast<Digits>(Order<T>::key(x)) + kOffset) & (kOffset | (kOffset - 1));
      if ((digits & above) == (prefix & above))
        atomicAdd(bins + static_cast<int>((digits >> shift) & (kBins - 1)), 1);
    });
    group.sync();
    // of each bin: how many classes lie in it and in those above
    const int lane = group.rank % 32;
    const int mine = group.rank < kBins ? static_cast<int>(bins[group.rank]) : 0;
    int reached = mine;
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_sync(kAllLanes, reached, lane + distance);
      if (lane + distance < 32) reached += other;
    }
    if (lane == 0 && group.rank < kBins) warp_totals[group.rank / 32] = reached;
    group.sync();
    if (group.rank < kBins) {
      for (int warp = group.rank / 32 + 1; warp < kBins / 32; ++warp) reached += warp_totals[warp];
      if (reached >= missing && reached - mine < missing) {
        chosen[0] = group.rank;
        chosen[1] = missing - (reached - mine);
        chosen[2] = mine;
      }
    }
    group.sync();
    prefix |= static_cast<Digits>(static_cast<int>(chosen[0])) << shift;
    missing = chosen[1];
    ties = chosen[2];
  }
  return {static_cast<KeyOf<T>>(prefix - kOffset), missing, ties};
}

// The class that is number `missing` among those of the key, in the order of the index. Each warp counts in a stretch of the
// row of its own; then one of them looks at its stretch again.
template <class T, int THREADS> __device__ int index_of_tie(Group<THREADS>& group, const T* row,
                                                            int classes, KeyOf<T> key,
                                                            int missing) {
  constexpr int kWarps = Group<THREADS>::kWarps;
  SHARED_ARRAY(int, warp_ties, kWarps);
  SHARED_ARRAY(int, found, 1);
  const int warp = group.rank / 32, lane = group.rank % 32;
  const int size = (classes + kWarps - 1) / kWarps;
  const int first = warp * size < classes ? warp * size : classes;
  const int last = first + size < classes ? first + size : classes;
  int count = 0;
  for (int i = first + lane; i < last; i += 32) count += Order<T>::key(row[i]) == key;
  count = __reduce_add_sync(kAllLanes, count);
  if (lane == 0) warp_ties[warp] = count;
  group.sync();
  int before = 0;
  for (int other = 0; other < warp; ++other) before += warp_ties[other];
  if (before < missing && before + count >= missing) {
    for (int begin = first; before < missing; begin += 32) {
      const int i = begin + lane;
      const bool tie = i < last && Order<T>::key(row[i]) == key;
      const unsigned all = __ballot_sync(kAllLanes, tie);
      if (tie && before + __popc(all & ((1u << lane) - 1)) == missing - 1) found[0] = i;
      before += __popc(all);
    }
  }
  group.sync();
  return found[0];
}

}  // namespace sparse_ce::cuda
