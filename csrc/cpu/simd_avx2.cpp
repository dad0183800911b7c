// AVX2. The pragma comes after the standard headers, so that no code shared with other files gets these instructions.
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
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt")
#endif

namespace sparse_ce::cpu {
namespace with_avx2 {

template <class Key> struct Vector;

// The lanes of each mask of eight, side by side, a byte for each: older AMD processors take ages for pdep and pext.
static constexpr struct LanesOfMask {
  uint64_t lanes[256] = {};
  constexpr LanesOfMask() {
    for (int mask = 0; mask < 256; ++mask)
      for (uint64_t lane = 0, n = 0; lane < 8; ++lane)
        if (mask >> lane & 1) lanes[mask] |= lane << 8 * n++;
  }
} lanes_of_mask;

struct Vector256 {
  using Register = __m256i;
  static constexpr int64_t sorts = 0;
  static constexpr bool loads_first = false;
  static Register load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void store(void* p, Register a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a); }
  static Register both(Register a, Register b) { return _mm256_and_si256(a, b); }
  static Register flip(Register a) { return _mm256_xor_si256(a, _mm256_set1_epi32(-1)); }
  static int first(uint32_t mask) { return __builtin_ctz(mask); }
  static int count(uint32_t mask) { return __builtin_popcount(mask); }

  // Eight keys and their indices, those of the mask side by side
  static int compress8(int32_t* out, int32_t* indices, Register keys, uint32_t mask,
                       int32_t index) {
    const Register lanes = _mm256_cvtepu8_epi32(
        _mm_loadl_epi64(reinterpret_cast<const __m128i*>(lanes_of_mask.lanes + (mask & 0xff))));
    const Register places =
        _mm256_add_epi32(_mm256_set1_epi32(index), _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0));
    store(out, _mm256_permutevar8x32_epi32(keys, lanes));
    store(indices, _mm256_permutevar8x32_epi32(places, lanes));
    return count(mask & 0xff);
  }
};

template <> struct Vector<int16_t> : Vector256 {
  static constexpr int lanes = 16;
  static constexpr bool compresses = true;
  static int compress(int32_t* out, int32_t* indices, Register keys, uint64_t mask, int32_t index) {
    keys = canonical(keys);
    const auto half = static_cast<uint32_t>(mask);
    const int n =
        compress8(out, indices, _mm256_cvtepi16_epi32(_mm256_castsi256_si128(keys)), half, index);
    return n + compress8(out + n, indices + n,
                         _mm256_cvtepi16_epi32(_mm256_extracti128_si256(keys, 1)), half >> 8,
                         index + 8);
  }
  static Register canonical(Register keys) {
    return _mm256_andnot_si256(_mm256_cmpeq_epi16(keys, broadcast(-1)), keys);
  }
  static Register broadcast(int16_t a) { return _mm256_set1_epi16(a); }
  static Register max(Register a, Register b) { return _mm256_max_epi16(a, b); }
  static Register min(Register a, Register b) { return _mm256_min_epi16(a, b); }
  static Register max_unsigned(Register a, Register b) { return _mm256_max_epu16(a, b); }
  static uint32_t reaches(Register a, Register b) {
    // one byte per lane: narrow the 16-bit masks, undo the interleaving of the two halves, take the sign bits
    const __m256i below = _mm256_cmpgt_epi16(b, a);
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(below, below), 0x08);
    return ~static_cast<uint32_t>(_mm_movemask_epi8(_mm256_castsi256_si128(bytes))) & 0xffff;
  }
  static Register ordered(Register bits) {
    return _mm256_xor_si256(bits, _mm256_srli_epi16(_mm256_srai_epi16(bits, 15), 1));
  }
  static int16_t highest_lane(Register a) {
    __m128i b = _mm_max_epi16(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    b = _mm_max_epi16(b, _mm_srli_si128(b, 8));
    b = _mm_max_epi16(b, _mm_srli_si128(b, 4));
    b = _mm_max_epi16(b, _mm_srli_si128(b, 2));
    return static_cast<int16_t>(_mm_extract_epi16(b, 0));
  }
  static int16_t lowest_lane(Register a) { return static_cast<int16_t>(~highest_lane(flip(a))); }
};
template <> struct Vector<int32_t> : Vector256 {
  static constexpr int lanes = 8;
  static constexpr bool compresses = true;
  static int compress(int32_t* out, int32_t* indices, Register keys, uint64_t mask, int32_t index) {
    return compress8(out, indices, canonical(keys), static_cast<uint32_t>(mask), index);
  }
  static constexpr int registers = 16;
  static Register canonical(Register keys) {
    return _mm256_andnot_si256(_mm256_cmpeq_epi32(keys, broadcast(-1)), keys);
  }
  static Register shift_left(Register a, int n) { return _mm256_slli_epi32(a, n); }
  // Their lanes in turn: the lower halves, and the upper ones.
  static void zip(Register a, Register b, Register& low, Register& high) {
    const Register even = _mm256_unpacklo_epi32(a, b), odd = _mm256_unpackhi_epi32(a, b);
    low = _mm256_permute2x128_si256(even, odd, 0x20);
    high = _mm256_permute2x128_si256(even, odd, 0x31);
  }
  static Register add(Register a, Register b) { return _mm256_add_epi32(a, b); }
  static Register count_greater(Register n, Register a, Register b) {
    return _mm256_sub_epi32(n, _mm256_cmpgt_epi32(a, b));
  }
  static Register broadcast(int32_t a) { return _mm256_set1_epi32(a); }
  static Register max(Register a, Register b) { return _mm256_max_epi32(a, b); }
  static Register min(Register a, Register b) { return _mm256_min_epi32(a, b); }
  static Register max_unsigned(Register a, Register b) { return _mm256_max_epu32(a, b); }
  static uint32_t reaches(Register a, Register b) {
    return ~static_cast<uint32_t>(
               _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(b, a)))) &
           0xff;
  }
  static Register ordered(Register bits) {
    return _mm256_xor_si256(bits, _mm256_srli_epi32(_mm256_srai_epi32(bits, 31), 1));
  }
  static int32_t highest_lane(Register a) {
    __m128i b = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    b = _mm_max_epi32(b, _mm_srli_si128(b, 8));
    b = _mm_max_epi32(b, _mm_srli_si128(b, 4));
    return _mm_cvtsi128_si32(b);
  }
  static int32_t lowest_lane(Register a) { return ~highest_lane(flip(a)); }
};
template <> struct Vector<int64_t> : Vector256 {
  static constexpr int lanes = 4;
  static constexpr bool compresses = false;
  static Register add(Register a, Register b) { return _mm256_add_epi64(a, b); }
  static Register count_greater(Register n, Register a, Register b) {
    return _mm256_sub_epi64(n, _mm256_cmpgt_epi64(a, b));
  }
  static Register broadcast(int64_t a) { return _mm256_set1_epi64x(a); }
  static Register max(Register a, Register b) {
    return _mm256_blendv_epi8(b, a, _mm256_cmpgt_epi64(a, b));
  }
  static Register min(Register a, Register b) {
    return _mm256_blendv_epi8(a, b, _mm256_cmpgt_epi64(a, b));
  }
  static uint32_t reaches(Register a, Register b) {
    return ~static_cast<uint32_t>(
               _mm256_movemask_pd(_mm256_castsi256_pd(_mm256_cmpgt_epi64(b, a)))) &
           0xf;
  }
  static Register ordered(Register bits) {
    const __m256i negative = _mm256_cmpgt_epi64(_mm256_setzero_si256(), bits);
    return _mm256_xor_si256(bits, _mm256_srli_epi64(negative, 1));
  }
  static int64_t highest_lane(Register a) {
    alignas(32) int64_t lane[4];
    store(lane, a);
    return std::max(std::max(lane[0], lane[1]), std::max(lane[2], lane[3]));
  }
  static int64_t lowest_lane(Register a) { return ~highest_lane(flip(a)); }
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

}  // namespace with_avx2

static bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") &&
         __builtin_cpu_supports("fma");
}
extern const Isa avx2 = {"avx2",
                         has_avx2,
                         with_avx2::forward,
                         with_avx2::backward,
                         with_avx2::threshold_forward,
                         with_avx2::threshold_backward,
                         with_avx2::tail,
                         with_avx2::labels_forward,
                         with_avx2::labels_backward,
                         with_avx2::plif_slopes,
                         with_avx2::plif_topk_forward,
                         with_avx2::plif_topk_backward,
                         with_avx2::plif_forward,
                         with_avx2::plif_backward,
                         with_avx2::plif_ce_forward,
                         with_avx2::plif_ce_backward,
                         with_avx2::weighted_rows,
                         with_avx2::cosine_forward,
                         with_avx2::cosine_backward};

}  // namespace sparse_ce::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#else
namespace sparse_ce::cpu {
extern const Isa avx2 = absent("avx2");
}  // namespace sparse_ce::cpu
#endif
