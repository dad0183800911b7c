// AVX-512 (F, BW, DQ, VL). The pragma comes after the standard headers, so that no code shared with other files gets these
// instructions.
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

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(                                                               \
    __attribute__((                                                                         \
        target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt"))), \
    apply_to = function)
#else
// the undefined operands inside GCC's own AVX-512 headers, gcc.gnu.org/PR105593
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC push_options
#pragma GCC target( \
    "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt,prefer-vector-width=512")
#endif

namespace sparse_ce::cpu {
namespace with_avx512 {

template <class Key> struct Vector;

struct Vector512 {
  using Register = __m512i;
  static constexpr int64_t sorts = 0;
  static constexpr bool loads_first = false;
  static Register load(const void* p) { return _mm512_loadu_si512(p); }
  static void store(void* p, Register a) { _mm512_storeu_si512(p, a); }
  static Register both(Register a, Register b) { return _mm512_and_si512(a, b); }
  static int first(uint64_t mask) { return __builtin_ctzll(mask); }
  static int count(uint64_t mask) { return __builtin_popcountll(mask); }
  // bits ^ (sign & all but the sign bit), in one instruction
  static Register order(Register bits, Register sign, Register magnitude) {
    return _mm512_ternarylogic_epi64(bits, sign, magnitude, 0x78);
  }
  // Sixteen keys and their indices, those of the mask side by side
  static int compress16(int32_t* out, int32_t* indices, Register keys, uint64_t mask,
                        int32_t index) {
    const auto lanes = static_cast<__mmask16>(mask);
    const Register places =
        _mm512_add_epi32(_mm512_set1_epi32(index),
                         _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
    store(out, _mm512_maskz_compress_epi32(lanes, keys));
    store(indices, _mm512_maskz_compress_epi32(lanes, places));
    return count(lanes);
  }
  // As a mask, for n of 0 to 64
  static uint64_t first_lanes(int64_t n) {
    return _bzhi_u64(~uint64_t{0}, static_cast<unsigned>(n));
  }
};

template <> struct Vector<int16_t> : Vector512 {
  static constexpr int lanes = 32;
  static constexpr bool compresses = true, loads_first = true;
  static int compress(int32_t* out, int32_t* indices, Register keys, uint64_t mask, int32_t index) {
    keys = canonical(keys);
    const int n =
        compress16(out, indices, _mm512_cvtepi16_epi32(_mm512_castsi512_si256(keys)), mask, index);
    return n + compress16(out + n, indices + n,
                          _mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(keys, 1)), mask >> 16,
                          index + 16);
  }
  static Register canonical(Register keys) {
    return _mm512_mask_mov_epi16(keys, _mm512_cmpeq_epi16_mask(keys, broadcast(-1)), broadcast(0));
  }
  static Register load_first(const int16_t* p, int64_t n, int16_t rest) {
    return _mm512_mask_loadu_epi16(broadcast(rest), static_cast<__mmask32>(first_lanes(n)), p);
  }
  static Register broadcast(int16_t a) { return _mm512_set1_epi16(a); }
  static Register max(Register a, Register b) { return _mm512_max_epi16(a, b); }
  static Register min(Register a, Register b) { return _mm512_min_epi16(a, b); }
  static Register max_unsigned(Register a, Register b) { return _mm512_max_epu16(a, b); }
  static uint64_t reaches(Register a, Register b) { return _mm512_cmpge_epi16_mask(a, b); }
  static Register ordered(Register bits) {
    return order(bits, _mm512_srai_epi16(bits, 15), broadcast(0x7fff));
  }
  static int16_t highest_lane(Register a) {
    // per 32-bit lane the maximum of its two halves, in the high half
    const __m512i swapped = _mm512_or_si512(_mm512_slli_epi32(a, 16), _mm512_srli_epi32(a, 16));
    return static_cast<int16_t>(_mm512_reduce_max_epi32(_mm512_srai_epi32(max(a, swapped), 16)));
  }
  static int16_t lowest_lane(Register a) {
    return static_cast<int16_t>(~highest_lane(_mm512_xor_si512(a, _mm512_set1_epi32(-1))));
  }
};
template <> struct Vector<int32_t> : Vector512 {
  static constexpr int lanes = 16;
  static constexpr bool compresses = true, loads_first = true;
  static int compress(int32_t* out, int32_t* indices, Register keys, uint64_t mask, int32_t index) {
    return compress16(out, indices, canonical(keys), mask, index);
  }
  static Register load_first(const int32_t* p, int64_t n, int32_t rest) {
    return _mm512_mask_loadu_epi32(broadcast(rest), static_cast<__mmask16>(first_lanes(n)), p);
  }
  static Register canonical(Register keys) {
    return _mm512_mask_mov_epi32(keys, _mm512_cmpeq_epi32_mask(keys, broadcast(-1)), broadcast(0));
  }
  static constexpr int registers = 32;
  static Register shift_left(Register a, int n) { return _mm512_slli_epi32(a, n); }
  // Their lanes in turn: the lower halves, and the upper ones.
  static void zip(Register a, Register b, Register& low, Register& high) {
    low = _mm512_permutex2var_epi32(
        a, _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0), b);
    high = _mm512_permutex2var_epi32(
        a, _mm512_set_epi32(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8), b);
  }
  static Register add(Register a, Register b) { return _mm512_add_epi32(a, b); }
  static Register count_greater(Register n, Register a, Register b) {
    return _mm512_mask_add_epi32(n, _mm512_cmpgt_epi32_mask(a, b), n, broadcast(1));
  }
  static Register broadcast(int32_t a) { return _mm512_set1_epi32(a); }
  static Register max(Register a, Register b) { return _mm512_max_epi32(a, b); }
  static Register min(Register a, Register b) { return _mm512_min_epi32(a, b); }
  static Register max_unsigned(Register a, Register b) { return _mm512_max_epu32(a, b); }
  static uint64_t reaches(Register a, Register b) { return _mm512_cmpge_epi32_mask(a, b); }
  static Register ordered(Register bits) {
    return order(bits, _mm512_srai_epi32(bits, 31), broadcast(0x7fffffff));
  }
  static int32_t highest_lane(Register a) { return _mm512_reduce_max_epi32(a); }
  static int32_t lowest_lane(Register a) { return _mm512_reduce_min_epi32(a); }

  // A stage of a sorting network: lanes DISTANCE apart are compared, those of MAXIMA keep the larger.
  template <int DISTANCE, int MAXIMA> static Register exchange(Register a) {
    Register other;
    if constexpr (DISTANCE == 8) other = _mm512_shuffle_i64x2(a, a, 0x4e);
    if constexpr (DISTANCE == 4) other = _mm512_shuffle_i64x2(a, a, 0xb1);
    if constexpr (DISTANCE == 2) other = _mm512_shuffle_epi32(a, _MM_PERM_BADC);
    if constexpr (DISTANCE == 1) other = _mm512_shuffle_epi32(a, _MM_PERM_CDAB);
    return _mm512_mask_max_epi32(min(a, other), MAXIMA & 0xffff, a, other);
  }
  // Of a bitonic register. All bits of FLIP set: ascending.
  template <int FLIP> static Register merge_lanes(Register a) {
    a = exchange<4, 0x0f0f ^ FLIP>(exchange<8, 0x00ff ^ FLIP>(a));
    return exchange<1, 0x5555 ^ FLIP>(exchange<2, 0x3333 ^ FLIP>(a));
  }
  template <int FLIP> static Register sort_lanes(Register a) {
    a = exchange<1, 0x9999 ^ FLIP>(a);
    a = exchange<1, 0xa5a5 ^ FLIP>(exchange<2, 0xc3c3 ^ FLIP>(a));
    a = exchange<1, 0xaa55 ^ FLIP>(exchange<2, 0xcc33 ^ FLIP>(exchange<4, 0xf00f ^ FLIP>(a)));
    return merge_lanes<FLIP>(a);
  }
  // Runs of so many registers, side by side one descending and one ascending -> half as many, of twice the length.
  template <int RUN, int COUNT> static void merge(Register (&z)[COUNT]) {
#pragma GCC unroll 8
    for (int distance = RUN; distance > 0; distance /= 2) {
#pragma GCC unroll 8
      for (int i = 0; i < COUNT; ++i) {
        if ((i & distance) != 0) continue;
        const bool ascending = i / (2 * RUN) % 2 == 1;
        const Register larger = max(z[i], z[i + distance]), less = min(z[i], z[i + distance]);
        z[i] = ascending ? less : larger;
        z[i + distance] = ascending ? larger : less;
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < COUNT; ++i)
      z[i] = i / (2 * RUN) % 2 == 1 ? merge_lanes<0xffff>(z[i]) : merge_lanes<0>(z[i]);
  }

  // What so many registers hold, side by side.
  template <int COUNT> static Register at_places(const Register* table, Register place) {
    if constexpr (COUNT == 2) {
      return _mm512_permutex2var_epi32(table[0], place, table[1]);
    } else {
      const __mmask16 later = _mm512_test_epi32_mask(place, broadcast(8 * COUNT));
      return _mm512_mask_mov_epi32(at_places<COUNT / 2>(table, place), later,
                                   at_places<COUNT / 2>(table + COUNT / 2, place));
    }
  }

  // Up to 128 candidates in the order of the index -> (key desc, index asc), in registers. What is sorted are keys, of BITS bits,
  // with the place in the list in the lowest bits: all are different. A key of 32 bits loses its own there. Returns false where
  // it needed them: keys that differ in these alone then stand in the order of the index.
  static constexpr int64_t sorts = 128;
  template <int BITS> static bool sort(const int32_t* keys, const int32_t* indices, int64_t n,
                                       int32_t* sorted_keys, int32_t* sorted_indices) {
    return n <= 32   ? sort_in<2, BITS>(keys, indices, n, sorted_keys, sorted_indices)
           : n <= 64 ? sort_in<4, BITS>(keys, indices, n, sorted_keys, sorted_indices)
                     : sort_in<8, BITS>(keys, indices, n, sorted_keys, sorted_indices);
  }
  template <int COUNT, int BITS> static bool sort_in(const int32_t* keys, const int32_t* indices,
                                                     int64_t n, int32_t* sorted_keys,
                                                     int32_t* sorted_indices) {
    constexpr int places = 16 * COUNT, shift = BITS == 32 ? 0 : COUNT == 2 ? 5 : COUNT == 4 ? 6 : 7;
    const Register lowest = broadcast(std::numeric_limits<int32_t>::min() >> shift);
    const Register last = broadcast(places - 1);
    const Register backwards =
        _mm512_set_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    Register own[COUNT], all[COUNT], z[COUNT], sorted[COUNT + 1];
#pragma GCC unroll 8
    for (int i = 0; i < COUNT; ++i) {
      const auto lanes =
          static_cast<__mmask16>(first_lanes(std::clamp<int64_t>(n - 16 * i, 0, 16)));
      own[i] = _mm512_mask_loadu_epi32(lowest, lanes, keys + 16 * i);
      const Register rest = add(backwards, broadcast(places - 16 - 16 * i));
      // (key & ~last) | rest
      z[i] = _mm512_ternarylogic_epi32(_mm512_slli_epi32(own[i], shift), last, rest, 0xba);
      z[i] = i % 2 == 1 ? sort_lanes<0xffff>(z[i]) : sort_lanes<0>(z[i]);
      all[i] = load(indices + 16 * i);
    }
    merge<1>(z);
    if constexpr (COUNT > 2) merge<2>(z);
    if constexpr (COUNT > 4) merge<4>(z);
#pragma GCC unroll 8
    for (int i = 0; i < COUNT; ++i) {
      const Register place = _mm512_andnot_si512(z[i], last);
      sorted[i] = at_places<COUNT>(own, place);
      store(sorted_keys + 16 * i, sorted[i]);
      store(sorted_indices + 16 * i, at_places<COUNT>(all, place));
    }
    sorted[COUNT] = lowest;
    __mmask16 rising = 0;
#pragma GCC unroll 8
    for (int i = 0; i < COUNT; ++i)
      rising |=
          _mm512_cmplt_epi32_mask(sorted[i], _mm512_alignr_epi32(sorted[i + 1], sorted[i], 1));
    return rising == 0;
  }
};
template <> struct Vector<int64_t> : Vector512 {
  static constexpr int lanes = 8;
  static constexpr bool compresses = false;
  static Register add(Register a, Register b) { return _mm512_add_epi64(a, b); }
  static Register count_greater(Register n, Register a, Register b) {
    return _mm512_mask_add_epi64(n, _mm512_cmpgt_epi64_mask(a, b), n, broadcast(1));
  }
  static Register broadcast(int64_t a) { return _mm512_set1_epi64(a); }
  static Register max(Register a, Register b) { return _mm512_max_epi64(a, b); }
  static Register min(Register a, Register b) { return _mm512_min_epi64(a, b); }
  static uint64_t reaches(Register a, Register b) { return _mm512_cmpge_epi64_mask(a, b); }
  static Register ordered(Register bits) {
    return order(bits, _mm512_srai_epi64(bits, 63), broadcast(0x7fffffffffffffff));
  }
  static int64_t highest_lane(Register a) { return _mm512_reduce_max_epi64(a); }
  static int64_t lowest_lane(Register a) { return _mm512_reduce_min_epi64(a); }
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

}  // namespace with_avx512

static bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("fma");
}
extern const Isa avx512 = {"avx512",
                           has_avx512,
                           with_avx512::forward,
                           with_avx512::backward,
                           with_avx512::threshold_forward,
                           with_avx512::threshold_backward,
                           with_avx512::tail,
                           with_avx512::labels_forward,
                           with_avx512::labels_backward,
                           with_avx512::plif_slopes,
                           with_avx512::plif_topk_forward,
                           with_avx512::plif_topk_backward,
                           with_avx512::plif_forward,
                           with_avx512::plif_backward,
                           with_avx512::plif_ce_forward,
                           with_avx512::plif_ce_backward,
                           with_avx512::weighted_rows,
                           with_avx512::cosine_forward,
                           with_avx512::cosine_backward};

}  // namespace sparse_ce::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#else
namespace sparse_ce::cpu {
extern const Isa avx512 = absent("avx512");
}  // namespace sparse_ce::cpu
#endif
