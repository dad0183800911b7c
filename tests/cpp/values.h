// Logits of several kinds, and the 16-bit float that C++ has not got.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

inline double value(std::mt19937& random, int kind) {
  const double x = std::normal_distribution<>()(random);
  switch (kind) {
    case 0: return x;
    case 1: return std::round(x);                              // ties
    case 2: return 0.0;                                        // one value
    case 3: return x < 0 ? -0.0 : 0.0;                         // equal zeros
    case 4: return x < 1 ? -kInfinity : x;                     // masked classes
    default: return x > 2 ? std::copysign(kNan, x - 2.5) : x;  // NaN of both signs
  }
}

struct Bfloat16 {
  uint16_t bits;
  Bfloat16() = default;
  explicit Bfloat16(double x) {  // cut off
    const float narrow = static_cast<float>(x);
    uint32_t b;
    std::memcpy(&b, &narrow, 4);
    bits = static_cast<uint16_t>(b >> 16);
  }
  operator double() const {
    const uint32_t b = uint32_t{bits} << 16;
    float x;
    std::memcpy(&x, &b, 4);
    return x;
  }
};
