// Every processor: plain loops over 16 bytes, which compilers turn into the vectors of their baseline.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <type_traits>
#include <utility>
#include <vector>

#include "isa.h"

namespace sparse_ce::cpu {
namespace with_portable {

template <class Key> struct Vector {
  static constexpr int lanes = 16 / sizeof(Key);
  static constexpr bool compresses = false, loads_first = false;
  static constexpr int64_t sorts = 0;
  struct Register {
    Key lane[lanes];
  };
  template <class F> static Register each(F f) {
    Register r;
    for (int i = 0; i < lanes; ++i) r.lane[i] = f(i);
    return r;
  }
  static Register load(const Key* p) {
    Register r;
    std::memcpy(&r, p, sizeof r);
    return r;
  }
  static void store(Key* p, Register a) { std::memcpy(p, &a, sizeof a); }
  static Register broadcast(Key a) {
    return each([=](int) { return a; });
  }
  static Register both(Register a, Register b) {
    return each([&](int i) { return static_cast<Key>(a.lane[i] & b.lane[i]); });
  }
  static Register max(Register a, Register b) {
    return each([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  static Register min(Register a, Register b) {
    return each([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  static Register ordered(Register bits) {
    constexpr int top = 8 * sizeof(Key) - 1;
    return each([&](int i) {
      const Key a = bits.lane[i];
      return static_cast<Key>(a ^ static_cast<Key>((a >> top) & std::numeric_limits<Key>::max()));
    });
  }
  static uint32_t reaches(Register a, Register b) {
    uint32_t mask = 0;
    for (int i = 0; i < lanes; ++i) mask |= static_cast<uint32_t>(a.lane[i] >= b.lane[i]) << i;
    return mask;
  }
  static constexpr int registers = 16;
  static Register canonical(Register keys) {
    return each([&](int i) { return keys.lane[i] == -1 ? Key{0} : keys.lane[i]; });
  }
  static Register shift_left(Register a, int n) {
    return each([&](int i) {
      return static_cast<Key>(static_cast<std::make_unsigned_t<Key>>(a.lane[i]) << n);
    });
  }
  // Their lanes in turn: the lower halves, and the upper ones.
  static void zip(Register a, Register b, Register& low, Register& high) {
    for (int i = 0; i < lanes / 2; ++i) {
      low.lane[2 * i] = a.lane[i];
      low.lane[2 * i + 1] = b.lane[i];
      high.lane[2 * i] = a.lane[lanes / 2 + i];
      high.lane[2 * i + 1] = b.lane[lanes / 2 + i];
    }
  }
  static Register add(Register a, Register b) {
    return each([&](int i) { return static_cast<Key>(a.lane[i] + b.lane[i]); });
  }
  static Register count_greater(Register n, Register a, Register b) {
    return each([&](int i) { return static_cast<Key>(n.lane[i] + (a.lane[i] > b.lane[i])); });
  }
  static int first(uint32_t mask) {
    int i = 0;
    for (; !(mask >> i & 1); ++i) {}
    return i;
  }
  static int count(uint32_t mask) {
    int n = 0;
    for (; mask; mask &= mask - 1) ++n;
    return n;
  }
  static Key highest_lane(Register a) { return *std::max_element(a.lane, a.lane + lanes); }
  static Key lowest_lane(Register a) { return *std::min_element(a.lane, a.lane + lanes); }
};

// what all share
#include "formats.inl"

#include "columns.inl"
#include "cosine_rows.inl"
#include "labels_ce_rows.inl"
#include "plif_rows.inl"
#include "sparse_linear_rows.inl"
#include "tail_rows.inl"
#include "threshold_ce_rows.inl"
#include "topk_ce_rows.inl"

}  // namespace with_portable

extern const Isa portable = {"portable",
                             [] { return true; },
                             with_portable::forward,
                             with_portable::backward,
                             with_portable::threshold_forward,
                             with_portable::threshold_backward,
                             with_portable::tail,
                             with_portable::labels_forward,
                             with_portable::labels_backward,
                             with_portable::plif_slopes,
                             with_portable::plif_topk_forward,
                             with_portable::plif_topk_backward,
                             with_portable::plif_forward,
                             with_portable::plif_backward,
                             with_portable::plif_ce_forward,
                             with_portable::plif_ce_backward,
                             with_portable::weighted_rows,
                             with_portable::cosine_forward,
                             with_portable::cosine_backward};

}  // namespace sparse_ce::cpu
