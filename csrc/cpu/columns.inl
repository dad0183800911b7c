// Rows of few classes, sorted as many at a time as a vector has lanes, a row in each: a comparison of two registers is one in every
// row, none waits for another of its row, and no branch depends on a logit.
#pragma once

namespace columns {

using V = Vector<int32_t>;
using Register = V::Register;
constexpr int kRows = V::lanes;
constexpr int64_t kMostClasses = 128;
constexpr int32_t kLast = kMostClasses - 1;
// So many numbers of a row are sorted in registers.
constexpr int kBlock = V::registers == 32 ? 16 : 8;
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
constexpr int kUpper = 0;  // which of two keys in a lane is its upper half
#else
constexpr int kUpper = 1;
#endif

constexpr int64_t whole_blocks(int64_t n) { return (n + kBlock - 1) / kBlock * kBlock; }

inline void exchange(Register& a, Register& b) {
  const Register larger = V::max(a, b);
  b = V::min(a, b);
  a = larger;
}

// Batcher's merge exchange (Knuth, The Art of Computer Programming, 5.2.2, algorithm M).
constexpr struct Network {
  int count = 0;
  int8_t first[64] = {}, second[64] = {};
  constexpr Network() {
    for (int p = kBlock / 2; p > 0; p /= 2) {
      int r = 0, distance = p;
      for (int q = kBlock / 2; q >= p; q /= 2) {
        for (int i = 0; i < kBlock - distance; ++i) {
          if ((i & p) != r) continue;
          first[count] = static_cast<int8_t>(i);
          second[count++] = static_cast<int8_t>(i + distance);
        }
        distance = q - p;
        r = p;
      }
    }
  }
} network;

template <size_t... I> void sort_registers(Register (&a)[kBlock], std::index_sequence<I...>) {
  (exchange(a[network.first[I]], a[network.second[I]]), ...);
}

// A block of columns -> descending. Of BITONIC ones it takes half as much.
template <bool BITONIC> void sort_block(int32_t* z) {
  Register a[kBlock];
#pragma GCC unroll 16
  for (int i = 0; i < kBlock; ++i) a[i] = V::load(z + i * kRows);
  if constexpr (BITONIC) {
#pragma GCC unroll 4
    for (int distance = kBlock / 2; distance > 0; distance /= 2) {
#pragma GCC unroll 16
      for (int i = 0; i < kBlock; ++i)
        if ((i & distance) == 0) exchange(a[i], a[i + distance]);
    }
  } else {
    sort_registers(a, std::make_index_sequence<network.count>());
  }
#pragma GCC unroll 16
  for (int i = 0; i < kBlock; ++i) V::store(z + i * kRows, a[i]);
}

// Columns from p on with as many from q on, or back from there, in whole blocks: the larger numbers go to p.
inline void exchange_runs(int32_t* p, int32_t* q, int64_t count, int step = 1) {
  for (int64_t i = 0; i < count; i += 4) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Register a = V::load(p), b = V::load(q);
      V::store(p, V::max(a, b));
      V::store(q, V::min(a, b));
      p += kRows;
      q += step * kRows;
    }
  }
}

// Whole blocks that descend and then ascend -> descending: a bitonic merge, as if numbers larger than all came before them and
// made their count a power of two.
inline void merge(int32_t* z, int64_t length) {
  int64_t power = kBlock;
  while (power < length) power *= 2;
  const int64_t before = power - length;
  for (int64_t distance = power / 2; distance >= kBlock; distance /= 2) {
    for (int64_t start = 0; start < power; start += 2 * distance) {
      const int64_t first = std::max(start, before), end = start + distance;
      int32_t* p = z + (first - before) * kRows;
      if (first < end) exchange_runs(p, p + distance * kRows, end - first);
    }
  }
  for (int64_t i = 0; i < length; i += kBlock) sort_block<true>(z + i * kRows);
}

// Two runs, z and y, descending, in whole blocks -> the first `kept` of both, from z on.
inline void merge_runs(int32_t* z, int64_t own, int32_t* y, int64_t other, int64_t kept) {
  if (own == other && kept == own + other) {
    exchange_runs(z, y + (own - 1) * kRows, own, -1);
    merge(z, own);
    return merge(y, own);
  }
  // the i-th from the front of one with the i-th from the back of the other, where both are
  const auto back = [&](int64_t i) { return y + (kept - 1 - i) * kRows; };
  for (int64_t i = std::max<int64_t>(0, kept - other); i < std::min(own, kept); ++i)
    V::store(z + i * kRows, V::max(V::load(z + i * kRows), V::load(back(i))));
  // what there is of y alone may lie where it goes to
  for (int64_t i = own, j = kept - 1; i <= j; ++i, --j) {
    const Register a = V::load(back(i)), b = V::load(back(j));
    V::store(z + i * kRows, a);
    V::store(z + j * kRows, b);
  }
  merge(z, kept);
}

// Whole blocks -> the k largest of every column come first, descending.
inline void sort(int32_t* z, int64_t length, int64_t k) {
  const int64_t most = whole_blocks(k);
  for (int64_t i = 0; i < length; i += kBlock) sort_block<false>(z + i * kRows);
  for (int64_t distance = kBlock; distance < length; distance *= 2) {
    for (int64_t i = 0; i + distance < length; i += 2 * distance) {
      const int64_t own = std::min(most, distance), other = std::min(own, length - i - distance);
      merge_runs(z + i * kRows, own, z + (i + distance) * kRows, other,
                 std::min(most, own + other));
    }
  }
}

// As many registers as they have lanes. Each round takes the bits of a number's place once around.
inline void transpose(Register (&a)[kRows]) {
#pragma GCC unroll 4
  for (int round = 1; round < kRows; round *= 2) {
    Register zipped[kRows];
#pragma GCC unroll 8
    for (int i = 0; i < kRows / 2; ++i)
      V::zip(a[i], a[i + kRows / 2], zipped[2 * i], zipped[2 * i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) a[i] = zipped[i];
  }
}

// The k first columns -> rows of k numbers. Vectors are written whole where there is room: what one writes beyond its row is
// overwritten, as the last columns go first, and the rows in their order.
inline void write_rows(const void* columns, int64_t k, void* rows) {
  const auto* z = static_cast<const int32_t*>(columns);
  for (int64_t first = (k - 1) / kRows * kRows; first >= 0; first -= kRows) {
    auto* out = static_cast<int32_t*>(rows) + first;
    Register a[kRows];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) a[i] = V::load(z + (first + i) * kRows);
    transpose(a);
    const int64_t room = kRows * k - first;  // behind `out`
    const int64_t whole = room < kRows ? 0 : (room - kRows) / k + 1;
    int32_t others[kRows][kRows];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) V::store(r < whole ? out + r * k : others[r], a[r]);
    for (int64_t r = whole; r < kRows; ++r)
      std::copy_n(others[r], std::min<int64_t>(kRows, k - first), out + r * k);
  }
}

// The class goes into the lowest bits, where keys of 16 bits have nothing and others are cut short; of equal ones the first is the
// largest.
template <class Key> Register with_class(Register key, int64_t index) {
  return V::add(V::both(key, V::broadcast(sizeof(Key) == 2 ? -65536 : ~kLast)),
                V::broadcast(kLast - static_cast<int32_t>(index)));
}

// Rows -> columns of keys with their classes, the k largest sorted; of keys that are cut short one more. In the bits of the result:
// rows with NaN, which are not.
template <Dtype D> uint64_t sort_rows(const typename Format<D>::Key* const (&rows)[kRows],
                                      int64_t classes, int64_t k, int32_t* z) {
  using Key = typename Format<D>::Key;
  using Row = Vector<Key>;
  constexpr int kParts = 4 / sizeof(Key);  // keys of a lane
  const auto magnitude = Row::broadcast(std::numeric_limits<Key>::max());
  const auto not_a_number = Row::broadcast(static_cast<Key>(Format<D>::infinity + 1));
  // the last vector ends with the row, and comes upon columns that are there
  const auto start_of = [&](int64_t next) {
    return std::max<int64_t>(0, std::min(next, classes - Row::lanes));
  };
  const auto bits_at = [&](int r, int64_t first) {
    return classes < Row::lanes ? load_first<Key>(rows[r], classes, 0) : Row::load(rows[r] + first);
  };
  auto largest = Row::broadcast(0);
  for (int64_t next = 0; next < classes; next += Row::lanes) {
    const int64_t first = start_of(next);
    Register a[kRows];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const auto bits = bits_at(r, first);
      largest = Row::max(largest, Row::both(bits, magnitude));
      const auto keys = Row::canonical(Row::ordered(bits));
      std::memcpy(&a[r], &keys, sizeof keys);
    }
    transpose(a);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const int64_t index = first + kParts * i;
      if constexpr (kParts == 2) {
        const int64_t upper = index + kUpper, lower = index + 1 - kUpper;
        V::store(z + upper * kRows, with_class<Key>(a[i], upper));
        V::store(z + lower * kRows, with_class<Key>(V::shift_left(a[i], 16), lower));
      } else {
        V::store(z + index * kRows, with_class<Key>(a[i], index));
      }
    }
  }
  const auto lowest = V::broadcast(std::numeric_limits<int32_t>::min());
  for (int64_t i = classes; i < whole_blocks(classes); ++i) V::store(z + i * kRows, lowest);
  sort(z, whole_blocks(classes), std::min(classes, k + (sizeof(Key) == 4)));
  uint64_t with_nan = 0;
  if (Row::reaches(largest, not_a_number) != 0) {
    for (int r = 0; r < kRows; ++r)
      for (int64_t next = 0; next < classes; next += Row::lanes) {
        const auto of_row = Row::both(bits_at(r, start_of(next)), magnitude);
        with_nan |= static_cast<uint64_t>(Row::reaches(of_row, not_a_number) != 0) << r;
      }
  }
  return with_nan;
}

}  // namespace columns
