// The four dtypes as integers and as numbers, and what all kernels of one instruction set need. It comes before them.

template <Dtype D> struct Format;
template <> struct Format<Dtype::f32> {
  using Key = int32_t;
  using Statistic = float;
  static constexpr Key infinity = 0x7f800000;
  static float value(Key bits) {
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
  }
  static Key bits(float f) {
    Key b;
    std::memcpy(&b, &f, 4);
    return b;
  }
};
template <> struct Format<Dtype::f64> {
  using Key = int64_t;
  using Statistic = double;
  static constexpr Key infinity = 0x7ff0000000000000;
  static double value(Key bits) {
    double f;
    std::memcpy(&f, &bits, 8);
    return f;
  }
  static Key bits(double f) {
    Key b;
    std::memcpy(&b, &f, 8);
    return b;
  }
};
template <> struct Format<Dtype::bf16> {
  using Key = int16_t;
  using Statistic = float;
  static constexpr Key infinity = 0x7f80;
  static float value(int32_t bits) {
    return Format<Dtype::f32>::value(static_cast<int32_t>(static_cast<uint32_t>(bits) << 16));
  }
  static Key bits(float f) {  // round to nearest even; a NaN stays one
    const uint32_t b = static_cast<uint32_t>(Format<Dtype::f32>::bits(f));
    if ((b & 0x7fffffff) > 0x7f800000) return static_cast<Key>(0x7fc0);
    return static_cast<Key>(static_cast<uint16_t>((b + 0x7fff + ((b >> 16) & 1)) >> 16));
  }
};
template <> struct Format<Dtype::f16> {
  using Key = int16_t;
  using Statistic = float;
  static constexpr Key infinity = 0x7c00;
  static float value(int32_t bits) {
    // shift exponent and mantissa into place and rescale by 2^112: right for denormals too, infinity and NaN apart
    const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fff) << 13;
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
    float f = Format<Dtype::f32>::value(static_cast<int32_t>(magnitude)) * 0x1p112f;
    uint32_t b = static_cast<uint32_t>(Format<Dtype::f32>::bits(f));
    if ((bits & 0x7fff) >= infinity) b = magnitude | 0x7f800000;
    return Format<Dtype::f32>::value(static_cast<int32_t>(b | sign));
  }
  static Key bits(float f) {  // round to nearest even
    const uint32_t b = static_cast<uint32_t>(Format<Dtype::f32>::bits(f));
    const uint32_t sign = (b >> 16) & 0x8000;
    const uint32_t a = b & 0x7fffffff;
    uint32_t h;
    if (a > 0x7f800000)
      h = 0x7e00;
    else if (a >= 0x477ff000)
      h = 0x7c00;  // 65520 and above round to infinity
    else if (
        a <
        0x38800000) {  // below 2^-14: the addition aligns the mantissa to units of 2^-24 and rounds it
      h = static_cast<uint32_t>(
              Format<Dtype::f32>::bits(Format<Dtype::f32>::value(static_cast<int32_t>(a)) + 0.5f)) -
          0x3f000000;
    } else
      h = (a - 0x38000000 + 0xfff + ((a >> 13) & 1)) >> 13;
    return static_cast<Key>(static_cast<uint16_t>(h | sign));
  }
};

// Bits <-> integer of the same order. In this order -0 is -1, next below +0: `canonical` makes them equal.
template <class Key> Key ordered(Key bits) {
  return bits < 0 ? static_cast<Key>(bits ^ std::numeric_limits<Key>::max()) : bits;
}
template <class Key> Key canonical(Key key) { return key == -1 ? Key{0} : key; }

// e^x for x <= 0 or NaN within 1 ulp, branch-free so that the compiler vectorises a loop over it.
inline float exp_nonpositive(float x) {
  const float clamped = x < -105.0f ? -105.0f : x;  // e^-105 is 0 in float32; a NaN passes
  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits, here beside the exponent of 2^64
  const float rounder = 12582912.0f + (127 + 64);
  const float shifted = clamped * 1.44269504088896341f + rounder;
  const float n = shifted - rounder;
  float r = clamped - n * 0.693359375f;
  r -= n * -2.12194440e-4f;
  float p = 1.98756915e-4f;
  p = p * r + 1.39819995e-3f;
  p = p * r + 8.33345140e-3f;
  p = p * r + 4.16657959e-2f;
  p = p * r + 1.66666655e-1f;
  p = p * r + 5.00000012e-1f;
  p = p * r * r + r + 1.0f;
  // times 2^n, from 2^(n + 64): n reaches -151, below the smallest normal exponent
  const uint32_t bits = static_cast<uint32_t>(Format<Dtype::f32>::bits(shifted));
  return p * Format<Dtype::f32>::value(static_cast<int32_t>(bits << 23)) * 0x1p-64f;
}
inline double exp_nonpositive(double x) { return std::exp(x); }

// log x for x from 1 on or NaN within 2 ulp, branch-free too: x = m 2^e with m from sqrt(1/2) to sqrt(2), and log m is
// 2 artanh((m - 1) / (m + 1)), a series whose terms shrink 34 times and more.
inline double log_from_1(double x) {
  using F = Format<Dtype::f64>;
  constexpr int64_t root = 0x3fe6a09e667f3bcd;  // sqrt(1/2)
  const int64_t bits = F::bits(x);
  const uint64_t e = static_cast<uint64_t>(bits - root) >> 52;
  const double m = F::value(bits - static_cast<int64_t>(e << 52));
  // a number of 2^52 and more has integers in its lowest bits
  const double exponent = F::value(static_cast<int64_t>(e | 0x4330000000000000)) - 0x1p52;
  const double s = (m - 1) / (m + 1), t = s * s;
  double p = 1.0 / 19;
  p = p * t + 1.0 / 17;
  p = p * t + 1.0 / 15;
  p = p * t + 1.0 / 13;
  p = p * t + 1.0 / 11;
  p = p * t + 1.0 / 9;
  p = p * t + 1.0 / 7;
  p = p * t + 1.0 / 5;
  p = p * t + 1.0 / 3;
  const double log_m = 2 * s + 2 * s * t * p;
  const double log_x = exponent * 0.69314718055994531 + log_m;
  return x < std::numeric_limits<double>::infinity() ? log_x : x;
}

// The first half of 2 COUNT lanes becomes what pairs of them combine to, and so on: with counts that a compiler knows.
template <int COUNT, class T, class Combine> void halve_lanes(T* lanes, Combine combine) {
  for (int lane = 0; lane < COUNT; ++lane) lanes[lane] = combine(lanes[lane], lanes[lane + COUNT]);
  if constexpr (COUNT > 1) halve_lanes<COUNT / 2>(lanes, combine);
}

// term(j) of all j < width combined, beginning with `start`, in an order that is the same for every instruction set: kLanes partial
// results, then pairs of them.
template <class T, class Term, class Combine>
T combine_by_lanes(int64_t width, T start, Term term, Combine combine) {
  constexpr int64_t kLanes = 32;
  T lanes[kLanes], rest[kLanes];
  std::fill_n(lanes, kLanes, start);
  int64_t j = 0;
  for (; j + kLanes <= width; j += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane)
      lanes[lane] = combine(lanes[lane], term(j + lane));
  if (j < width) {
    std::fill_n(rest, kLanes, start);
    for (int64_t lane = 0; j + lane < width; ++lane) rest[lane] = term(j + lane);
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] = combine(lanes[lane], rest[lane]);
  }
  halve_lanes<kLanes / 2>(lanes, combine);
  return lanes[0];
}
template <class T, class Term> T sum_by_lanes(int64_t width, Term term) {
  return combine_by_lanes(width, T{0}, term, std::plus<T>());
}

// A line of memory on its way to the cache: a hint that not every compiler takes.
inline void fetch_line([[maybe_unused]] const void* p) {
#ifdef __GNUC__
  __builtin_prefetch(p);
#endif
}

// The first `n` of a vector, and `rest` in its other lanes.
template <class Key> typename Vector<Key>::Register load_first(const Key* p, int64_t n, Key rest) {
  using V = Vector<Key>;
  if constexpr (V::loads_first) {
    return V::load_first(p, n, rest);
  } else {
    Key lanes[V::lanes];
    std::fill(std::copy_n(p, n, lanes), lanes + V::lanes, rest);
    return V::load(lanes);
  }
}

// `width` numbers of any dtype, from element `start` on, as float, double for f64: in place where they are that, else in `scratch`.
template <Dtype D>
const typename Format<D>::Statistic* widened_as(const void* data, int64_t start, int64_t width,
                                                typename Format<D>::Statistic* scratch) {
  const auto* from = static_cast<const typename Format<D>::Key*>(data) + start;
  if constexpr (sizeof *from == sizeof *scratch) {
    return reinterpret_cast<const typename Format<D>::Statistic*>(from);
  } else {
    for (int64_t j = 0; j < width; ++j) scratch[j] = Format<D>::value(from[j]);
    return scratch;
  }
}
template <class T>
const T* widened(const void* data, Dtype dtype, int64_t start, int64_t width, T* scratch) {
  if constexpr (sizeof(T) == 8) {
    return widened_as<Dtype::f64>(data, start, width, scratch);
  } else {
    switch (dtype) {
      case Dtype::bf16: return widened_as<Dtype::bf16>(data, start, width, scratch);
      case Dtype::f16: return widened_as<Dtype::f16>(data, start, width, scratch);
      default: return widened_as<Dtype::f32>(data, start, width, scratch);
    }
  }
}

// The way back, rounded once.
template <Dtype D> void round_row_to(const typename Format<D>::Statistic* from, void* data,
                                     int64_t start, int64_t width) {
  auto* to = static_cast<typename Format<D>::Key*>(data) + start;
  for (int64_t j = 0; j < width; ++j) to[j] = Format<D>::bits(from[j]);
}
template <class T>
void round_row(const T* from, void* data, Dtype dtype, int64_t start, int64_t width) {
  if constexpr (sizeof(T) == 8) {
    round_row_to<Dtype::f64>(from, data, start, width);
  } else {
    switch (dtype) {
      case Dtype::bf16: return round_row_to<Dtype::bf16>(from, data, start, width);
      case Dtype::f16: return round_row_to<Dtype::f16>(from, data, start, width);
      default: return round_row_to<Dtype::f32>(from, data, start, width);
    }
  }
}
