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
  static Register load(const void* p) { return _mm512_loadu_si512(p); }
  static void store(void* p, Register a) { _mm512_storeu_si512(p, a); }
  static Register both(Register a, Register b) { return _mm512_and_si512(a, b); }
  static int first(uint64_t mask) { return __builtin_ctzll(mask); }
  static int count(uint64_t mask) { return __builtin_popcountll(mask); }
  // bits ^ (sign & all but the sign bit), in one instruction
  static Register order(Register bits, Register sign, Register magnitude) {
    return _mm512_ternarylogic_epi64(bits, sign, magnitude, 0x78);
  }
  // Sixteen keys and their indices, those of the mask side by side; -0, whose key is -1, becomes +0
  static int compress16(int32_t* out, int32_t* indices, Register keys, uint64_t mask,
                        int32_t index) {
    const auto lanes = static_cast<__mmask16>(mask);
    keys = _mm512_mask_mov_epi32(keys, _mm512_cmpeq_epi32_mask(keys, _mm512_set1_epi32(-1)),
                                 _mm512_setzero_si512());
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
  static constexpr bool compresses = true;
  static int compress(int32_t* out, int32_t* indices, Register keys, uint64_t mask, int32_t index) {
    const int n =
        compress16(out, indices, _mm512_cvtepi16_epi32(_mm512_castsi512_si256(keys)), mask, index);
    return n + compress16(out + n, indices + n,
                          _mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(keys, 1)), mask >> 16,
                          index + 16);
  }
  static Register load_first(const int16_t* p, int64_t n, int16_t rest) {
    return _mm512_mask_loadu_epi16(broadcast(rest), static_cast<__mmask32>(first_lanes(n)), p);
  }
  static Register broadcast(int16_t a) { return _mm512_set1_epi16(a); }
  static Register max(Register a, Register b) { return _mm512_max_epi16(a, b); }
  static Register min(Register a, Register b) { return _mm512_min_epi16(a, b); }
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
  static constexpr bool compresses = true;
  static int compress(int32_t* out, int32_t* indices, Register keys, uint64_t mask, int32_t index) {
    return compress16(out, indices, keys, mask, index);
  }
  static Register load_first(const int32_t* p, int64_t n, int32_t rest) {
    return _mm512_mask_loadu_epi32(broadcast(rest), static_cast<__mmask16>(first_lanes(n)), p);
  }
  static Register add(Register a, Register b) { return _mm512_add_epi32(a, b); }
  static Register count_greater(Register n, Register a, Register b) {
    return _mm512_mask_add_epi32(n, _mm512_cmpgt_epi32_mask(a, b), n, broadcast(1));
  }
  static Register broadcast(int32_t a) { return _mm512_set1_epi32(a); }
  static Register max(Register a, Register b) { return _mm512_max_epi32(a, b); }
  static Register min(Register a, Register b) { return _mm512_min_epi32(a, b); }
  static uint64_t reaches(Register a, Register b) { return _mm512_cmpge_epi32_mask(a, b); }
  static Register ordered(Register bits) {
    return order(bits, _mm512_srai_epi32(bits, 31), broadcast(0x7fffffff));
  }
  static int32_t highest_lane(Register a) { return _mm512_reduce_max_epi32(a); }
  static int32_t lowest_lane(Register a) { return _mm512_reduce_min_epi32(a); }
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

#include "cosine_rows.inl"
#include "plif_rows.inl"
#include "sparse_linear_rows.inl"
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
extern const Isa avx512 = {"avx512", [] { return false; },
                           nullptr,  nullptr,
                           nullptr,  nullptr,
                           nullptr,  nullptr,
                           nullptr,  nullptr,
                           nullptr,  nullptr,
                           nullptr};
}  // namespace sparse_ce::cpu
#endif
