// The order of the classes as integers: value descending, NaN largest, -0 equal to +0, then index ascending.
#pragma once

#include <limits>

#include "platform.cuh"

namespace sparse_ce::cuda {

template <class S> constexpr S kInfinite = std::numeric_limits<S>::infinity();
template <class S> constexpr S kNan = std::numeric_limits<S>::quiet_NaN();
template <class S> constexpr S kSmallest = std::numeric_limits<S>::min();  // that is normal

// The key of an element: a signed integer whose order is that of the values. All NaNs have one key, both zeros another.
template <class Key, Key kInfinity, class Bits>
__device__ __forceinline__ Key key_of_bits(Bits bits) {
  constexpr Bits kMagnitude = static_cast<Bits>(~Bits{0}) >> 1;
  const Key magnitude = static_cast<Key>(bits & kMagnitude);
  // sign and magnitude -> two's complement
  const Key key = bits > kMagnitude ? -magnitude : magnitude;
  return magnitude > kInfinity ? kInfinity + 1 : key;
}

template <class Key, class Bits> __device__ __forceinline__ Bits bits_of_key(Key key) {
  constexpr Bits kSign = static_cast<Bits>(~(static_cast<Bits>(~Bits{0}) >> 1));
  return static_cast<Bits>(key < 0 ? kSign | static_cast<Bits>(-key) : static_cast<Bits>(key));
}

// A class of a row: its key and its index. Greater is earlier; no two are equal.
struct Item32 {
  using Key = int32_t;
  int64_t packed;
  static __device__ __forceinline__ Item32 of(Key key, int32_t index) {
    return {static_cast<int64_t>(key) * (int64_t{1} << 32) + (0x7FFFFFFF - index)};
  }
  __device__ __forceinline__ bool operator>(const Item32& other) const {
    return packed > other.packed;
  }
  __device__ __forceinline__ Key key() const { return static_cast<Key>(packed >> 32); }
  __device__ __forceinline__ int32_t index() const {
    return 0x7FFFFFFF - static_cast<int32_t>(packed & 0x7FFFFFFF);
  }
};

// Of a 16-bit float in a row of less than 2^16 classes: half the comparisons.
struct Item16 {
  using Key = int32_t;
  int32_t packed;
  static __device__ __forceinline__ Item16 of(Key key, int32_t index) {
    return {static_cast<int32_t>(static_cast<uint32_t>(key) << 16 | (0xFFFF - (index & 0xFFFF)))};
  }
  __device__ __forceinline__ bool operator>(const Item16& other) const {
    return packed > other.packed;
  }
  // without a branch an instruction each
  friend __device__ __forceinline__ Item16 first_of(Item16 a, Item16 b) {
    return {a.packed > b.packed ? a.packed : b.packed};
  }
  friend __device__ __forceinline__ Item16 last_of(Item16 a, Item16 b) {
    return {a.packed > b.packed ? b.packed : a.packed};
  }
  __device__ __forceinline__ Key key() const { return packed >> 16; }
  __device__ __forceinline__ int32_t index() const { return 0xFFFF - (packed & 0xFFFF); }
};

struct alignas(16) Item64 {
  using Key = int64_t;
  int64_t high;
  int64_t low;  // the index: all 16 bytes are the item's own
  static __device__ __forceinline__ Item64 of(Key key, int32_t index) { return {key, index}; }
  __device__ __forceinline__ bool operator>(const Item64& other) const {
    return high > other.high || (high == other.high && low < other.low);
  }
  __device__ __forceinline__ Key key() const { return high; }
  __device__ __forceinline__ int32_t index() const { return static_cast<int32_t>(low); }
};

template <class Item> __device__ __forceinline__ Item first_of(const Item& a, const Item& b) {
  return a > b ? a : b;
}
template <class Item> __device__ __forceinline__ Item last_of(const Item& a, const Item& b) {
  return a > b ? b : a;
}

// An index that no class has: such an item comes after all classes of its key.
constexpr int32_t kNoIndex = 0x7FFFFFFF;
template <class Item> constexpr int32_t kNoClass = sizeof(Item) == 4 ? 0xFFFF : kNoIndex;

template <class T> struct Order;

template <> struct Order<float> {
  using Key = int32_t;
  using Item = Item32;
  using Statistic = float;
  static constexpr Key kInfinity = 0x7F800000;
  static __device__ __forceinline__ Key key(float x) {
    return key_of_bits<Key, kInfinity>(bit_cast<uint32_t>(x));
  }
  static __device__ __forceinline__ float element_of_key(Key key) {
    return bit_cast<float>(bits_of_key<Key, uint32_t>(key));
  }
  static __device__ __forceinline__ float value(Key key) { return element_of_key(key); }
  static __device__ __forceinline__ Key unit_key(uint32_t unit) {
    return key(bit_cast<float>(unit));
  }
  static __device__ __forceinline__ float element(float x) { return x; }
};

template <class T, int kInfinityBits> struct Order16 {
  using Key = int32_t;
  using Item = Item32;
  using Statistic = float;
  static constexpr Key kInfinity = kInfinityBits;
  static __device__ __forceinline__ Key key(T x) { return key_of_bits<Key, kInfinity>(x.bits); }
  static __device__ __forceinline__ T element_of_key(Key key) {
    return {bits_of_key<Key, uint16_t>(key)};
  }
  static __device__ __forceinline__ float value(Key key) { return to_float(element_of_key(key)); }
  // An Item16, all of it in the upper half of a register; the key of NaN is another than that above.
  static __device__ __forceinline__ Item16 item(T x, int32_t index) {
    const auto bits = static_cast<int32_t>(Packed<T>::plain(uint32_t{x.bits} << 16));
    const int32_t sign = bits >> 31;
    return {((bits ^ (sign & 0x7FFF0000)) - (sign & ~0xFFFF)) | (0xFFFF - index)};
  }
  // Of the larger of the two, which Packed::max made: a NaN has no sign.
  static __device__ __forceinline__ Key unit_key(uint32_t unit) {
    const Key bits = static_cast<int16_t>(Packed<T>::max(unit, unit << 16 | unit >> 16));
    const Key sign = bits >> 31;
    const Key key = (bits ^ (sign & 0x7FFF)) - sign;
    return key > kInfinity ? kInfinity + 1 : key;
  }
};
template <> struct Order<bfloat16> : Order16<bfloat16, 0x7F80> {
  static __device__ __forceinline__ bfloat16 element(float x) { return to_bfloat16(x); }
};
template <> struct Order<float16> : Order16<float16, 0x7C00> {
  static __device__ __forceinline__ float16 element(float x) { return to_float16(x); }
};

template <> struct Order<double> {
  using Key = int64_t;
  using Item = Item64;
  using Statistic = double;
  static constexpr Key kInfinity = 0x7FF0000000000000;
  static __device__ __forceinline__ Key key(double x) {
    return key_of_bits<Key, kInfinity>(bit_cast<uint64_t>(x));
  }
  static __device__ __forceinline__ double element_of_key(Key key) {
    return bit_cast<double>(bits_of_key<Key, uint64_t>(key));
  }
  static __device__ __forceinline__ double value(Key key) { return element_of_key(key); }
  static __device__ __forceinline__ Key unit_key(uint64_t unit) {
    return key(bit_cast<double>(unit));
  }
  static __device__ __forceinline__ double element(double x) { return x; }
};

// Keys of the numbers that Packed::not_below compares lie between the negative of this one and it.
template <class T> constexpr typename Order<T>::Key kReach = Order<T>::kInfinity;
template <> inline constexpr Order<bfloat16>::Key kReach<bfloat16> =
    kComparesBfloat16 ? Order<bfloat16>::kInfinity : kInfinityOfHalf;

template <class T> using KeyOf = typename Order<T>::Key;
template <class T> using ItemOf = typename Order<T>::Item;
template <class T> using StatisticOf = typename Order<T>::Statistic;

// The item of an element; of two elements the order is that of their keys.
template <class Item, class T> __device__ __forceinline__ Item item_of(T x, int32_t index) {
  if constexpr (std::is_same<Item, Item16>::value)
    return Order<T>::item(x, index);
  else
    return Item::of(Order<T>::key(x), index);
}

// Before no class at all: every class is greater.
template <class T, class Item> __device__ __forceinline__ Item last_item() {
  return Item::of(static_cast<KeyOf<T>>(-Order<T>::kInfinity - 1), kNoIndex);
}

// What statistics are computed from.
template <class T> __device__ __forceinline__ StatisticOf<T> number_of(T x) {
  if constexpr (sizeof(T) == 2)
    return to_float(x);
  else
    return x;
}

// Whether a class is not after (cut, cut_index) in the order, where the cut is not NaN: fewer instructions than keys take.
template <class S> __device__ __forceinline__ bool is_kept(S z, int i, S cut, int cut_index) {
  return !(z <= cut) || (z == cut && i <= cut_index);
}

// Element `place` of a chunk.
template <class T, int N>
__device__ __forceinline__ T element_of(const Chunk<T, N>& chunk, int place) {
  if constexpr (sizeof(T) == 2)
    return T{static_cast<uint16_t>(chunk.unit[place / 2] >> (place % 2 ? 16 : 0))};
  else
    return bit_cast<T>(chunk.unit[place]);
}

// The same where the place is known at run time only: registers have no index.
template <class T, int N>
__device__ __forceinline__ T element_at(const Chunk<T, N>& chunk, int place) {
  constexpr int kPerUnit = N / Chunk<T, N>::kUnits;
  auto unit = chunk.unit[0];
#pragma unroll
  for (int u = 1; u < Chunk<T, N>::kUnits; ++u) unit = place >= u * kPerUnit ? chunk.unit[u] : unit;
  return element_of(Chunk<T, kPerUnit>{{unit}}, place % kPerUnit);
}

template <class T, int N>
__device__ __forceinline__ Chunk<T, N> chunk_of(const StatisticOf<T> (&x)[N]) {
  Chunk<T, N> chunk;
#pragma unroll
  for (int u = 0; u < Chunk<T, N>::kUnits; ++u) {
    if constexpr (sizeof(T) == 2)
      chunk.unit[u] = Packed<T>::of(x[2 * u], x[2 * u + 1]);
    else
      chunk.unit[u] = bit_cast<typename Chunk<T, N>::Unit>(x[u]);
  }
  return chunk;
}

template <class T> __device__ __forceinline__ Chunk<T> lowest_chunk() {
  Chunk<T> chunk;
  for (int u = 0; u < Chunk<T>::kUnits; ++u) {
    if constexpr (sizeof(T) == 2) {
      const uint32_t bits = Order<T>::kInfinity | 0x8000;
      chunk.unit[u] = bits << 16 | bits;
    } else {
      using Unit = typename Chunk<T>::Unit;
      chunk.unit[u] = static_cast<Unit>(Order<T>::kInfinity) | Unit{1} << (8 * sizeof(Unit) - 1);
    }
  }
  return chunk;
}

template <class T> __device__ __forceinline__ T lowest_element() {
  return element_of(lowest_chunk<T>(), 0);
}

}  // namespace sparse_ce::cuda
