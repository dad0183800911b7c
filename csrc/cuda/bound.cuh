// Where a list begins: a key that k classes of a row reach, and few more, so that a list has room for all that reach it.
#pragma once

#include "group.cuh"

namespace sparse_ce::cuda {

// A key that at least k of the group's keys reach: at most k + slack of them, or else the k-th largest itself. By bisection,
// with the keys in registers; a few more to list and sort cost less than another step.
template <class Key, int COUNT, int THREADS>
__device__ Key bound_of(Group<THREADS>& group, const Key (&keys)[COUNT], int k, int slack) {
  Key low = keys[0], high = keys[0];
  for (int i = 1; i < COUNT; ++i) {
    low = keys[i] < low ? keys[i] : low;
    high = keys[i] > high ? keys[i] : high;
  }
  low = group.least(low);
  high = group.greatest(high);
  while (low < high) {
    // the mean rounded up; without a sign there is no overflow
    using Distance = typename std::make_unsigned<Key>::type;
    const auto distance = static_cast<Distance>(high) - static_cast<Distance>(low) + 1;
    const Key middle = low + static_cast<Key>(distance / 2);
    int reached = 0;
    for (int i = 0; i < COUNT; ++i) reached += keys[i] >= middle;
    reached = group.sum(reached);
    if (reached >= k) {
      low = middle;
      if (reached <= k + slack) break;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

}  // namespace sparse_ce::cuda
