// NEON, which every 64-bit ARM has: Apple's processors, AWS Graviton, NVIDIA Grace.
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

#if defined(__aarch64__) && defined(__GNUC__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#include <arm_neon.h>

namespace sparse_ce::cpu {
namespace with_neon {

template <class Key> struct Vector;

// The bytes of the lanes of each mask of four, side by side.
alignas(16) static constexpr struct LanesOfMask {
  uint8_t bytes[16][16] = {};
  constexpr LanesOfMask() {
    for (int mask = 0; mask < 16; ++mask)
      for (int lane = 0, n = 0; lane < 4; ++lane)
        for (int byte = 0; byte < 4 && (mask >> lane & 1); ++byte)
          bytes[mask][n++] = static_cast<uint8_t>(4 * lane + byte);
  }
} lanes_of_mask;

struct Vector128 {
  static constexpr int64_t sorts = 0;
  static constexpr bool loads_first = false;
  static int first(uint64_t mask) { return __builtin_ctzll(mask); }
  static int count(uint64_t mask) { return __builtin_popcountll(mask); }

  // Four keys and their indices, those of the mask side by side
  static int compress4(int32_t* out, int32_t* indices, int32x4_t keys, uint32_t mask,
                       int32_t index) {
    static constexpr int32_t from_0[4] = {0, 1, 2, 3};
    const uint8x16_t bytes = vld1q_u8(lanes_of_mask.bytes[mask & 0xf]);
    const auto side_by_side = [&](int32x4_t a) {
      return vreinterpretq_s32_u8(vqtbl1q_u8(vreinterpretq_u8_s32(a), bytes));
    };
    vst1q_s32(out, side_by_side(keys));
    vst1q_s32(indices, side_by_side(vaddq_s32(vdupq_n_s32(index), vld1q_s32(from_0))));
    return count(mask & 0xf);
  }
};

template <> struct Vector<int16_t> : Vector128 {
  using Register = int16x8_t;
  static constexpr int lanes = 8;
  static constexpr bool compresses = true;
  static int compress(int32_t* out, int32_t* indices, Register keys, uint64_t mask, int32_t index) {
    keys = canonical(keys);
    const auto half = static_cast<uint32_t>(mask);
    const int n = compress4(out, indices, vmovl_s16(vget_low_s16(keys)), half, index);
    return n + compress4(out + n, indices + n, vmovl_high_s16(keys), half >> 4, index + 4);
  }
  static Register load(const int16_t* p) { return vld1q_s16(p); }
  static void store(int16_t* p, Register a) { vst1q_s16(p, a); }
  static Register broadcast(int16_t a) { return vdupq_n_s16(a); }
  static Register both(Register a, Register b) { return vandq_s16(a, b); }
  static Register max(Register a, Register b) { return vmaxq_s16(a, b); }
  static Register min(Register a, Register b) { return vminq_s16(a, b); }
  static Register max_unsigned(Register a, Register b) {
    return vreinterpretq_s16_u16(vmaxq_u16(vreinterpretq_u16_s16(a), vreinterpretq_u16_s16(b)));
  }
  static Register canonical(Register keys) {
    return vbicq_s16(keys, vreinterpretq_s16_u16(vceqq_s16(keys, broadcast(-1))));
  }
  static uint32_t reaches(Register a, Register b) {
    static constexpr uint16_t bits[lanes] = {1, 2, 4, 8, 16, 32, 64, 128};
    return vaddvq_u16(vandq_u16(vcgeq_s16(a, b), vld1q_u16(bits)));
  }
  static Register ordered(Register bits) {
    const uint16x8_t negative = vreinterpretq_u16_s16(vshrq_n_s16(bits, 15));
    return veorq_s16(bits, vreinterpretq_s16_u16(vshrq_n_u16(negative, 1)));
  }
  static int16_t highest_lane(Register a) { return vmaxvq_s16(a); }
  static int16_t lowest_lane(Register a) { return vminvq_s16(a); }
};
template <> struct Vector<int32_t> : Vector128 {
  using Register = int32x4_t;
  static constexpr int lanes = 4;
  static constexpr bool compresses = true;
  static int compress(int32_t* out, int32_t* indices, Register keys, uint64_t mask, int32_t index) {
    return compress4(out, indices, canonical(keys), static_cast<uint32_t>(mask), index);
  }
  static constexpr int registers = 32;
  static Register load(const int32_t* p) { return vld1q_s32(p); }
  static void store(int32_t* p, Register a) { vst1q_s32(p, a); }
  static Register broadcast(int32_t a) { return vdupq_n_s32(a); }
  static Register both(Register a, Register b) { return vandq_s32(a, b); }
  static Register max(Register a, Register b) { return vmaxq_s32(a, b); }
  static Register min(Register a, Register b) { return vminq_s32(a, b); }
  static Register max_unsigned(Register a, Register b) {
    return vreinterpretq_s32_u32(vmaxq_u32(vreinterpretq_u32_s32(a), vreinterpretq_u32_s32(b)));
  }
  static Register canonical(Register keys) {
    return vbicq_s32(keys, vreinterpretq_s32_u32(vceqq_s32(keys, broadcast(-1))));
  }
  static Register shift_left(Register a, int n) { return vshlq_s32(a, broadcast(n)); }
  // Their lanes in turn: the lower halves, and the upper ones.
  static void zip(Register a, Register b, Register& low, Register& high) {
    low = vzip1q_s32(a, b);
    high = vzip2q_s32(a, b);
  }
  static Register add(Register a, Register b) { return vaddq_s32(a, b); }
  static Register count_greater(Register n, Register a, Register b) {
    return vsubq_s32(n, vreinterpretq_s32_u32(vcgtq_s32(a, b)));
  }
  static uint32_t reaches(Register a, Register b) {
    static constexpr uint32_t bits[lanes] = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(vcgeq_s32(a, b), vld1q_u32(bits)));
  }
  static Register ordered(Register bits) {
    const uint32x4_t negative = vreinterpretq_u32_s32(vshrq_n_s32(bits, 31));
    return veorq_s32(bits, vreinterpretq_s32_u32(vshrq_n_u32(negative, 1)));
  }
  static int32_t highest_lane(Register a) { return vmaxvq_s32(a); }
  static int32_t lowest_lane(Register a) { return vminvq_s32(a); }
};
template <> struct Vector<int64_t> : Vector128 {
  using Register = int64x2_t;
  static constexpr int lanes = 2;
  static constexpr bool compresses = false;
  static Register load(const int64_t* p) { return vld1q_s64(p); }
  static void store(int64_t* p, Register a) { vst1q_s64(p, a); }
  static Register broadcast(int64_t a) { return vdupq_n_s64(a); }
  static Register both(Register a, Register b) { return vandq_s64(a, b); }
  static Register max(Register a, Register b) { return vbslq_s64(vcgtq_s64(a, b), a, b); }
  static Register min(Register a, Register b) { return vbslq_s64(vcgtq_s64(a, b), b, a); }
  static Register add(Register a, Register b) { return vaddq_s64(a, b); }
  static Register count_greater(Register n, Register a, Register b) {
    return vsubq_s64(n, vreinterpretq_s64_u64(vcgtq_s64(a, b)));
  }
  static uint32_t reaches(Register a, Register b) {
    static constexpr uint64_t bits[lanes] = {1, 2};
    return static_cast<uint32_t>(vaddvq_u64(vandq_u64(vcgeq_s64(a, b), vld1q_u64(bits))));
  }
  static Register ordered(Register bits) {
    const uint64x2_t negative = vreinterpretq_u64_s64(vshrq_n_s64(bits, 63));
    return veorq_s64(bits, vreinterpretq_s64_u64(vshrq_n_u64(negative, 1)));
  }
  static int64_t highest_lane(Register a) {
    return std::max(vgetq_lane_s64(a, 0), vgetq_lane_s64(a, 1));
  }
  static int64_t lowest_lane(Register a) {
    return std::min(vgetq_lane_s64(a, 0), vgetq_lane_s64(a, 1));
  }
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

}  // namespace with_neon

extern const Isa neon = {"neon",
                         [] { return true; },
                         with_neon::forward,
                         with_neon::backward,
                         with_neon::threshold_forward,
                         with_neon::threshold_backward,
                         with_neon::tail,
                         with_neon::labels_forward,
                         with_neon::labels_backward,
                         with_neon::plif_slopes,
                         with_neon::plif_topk_forward,
                         with_neon::plif_topk_backward,
                         with_neon::plif_forward,
                         with_neon::plif_backward,
                         with_neon::plif_ce_forward,
                         with_neon::plif_ce_backward,
                         with_neon::weighted_rows,
                         with_neon::cosine_forward,
                         with_neon::cosine_backward};

}  // namespace sparse_ce::cpu

#else
namespace sparse_ce::cpu {
extern const Isa neon = absent("neon");
}  // namespace sparse_ce::cpu
#endif
