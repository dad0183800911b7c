// The algorithm of the CPU kernels. Each simd_*.cpp includes this file inside its own namespace, after its vector types
// Vector<int16_t>, Vector<int32_t> and Vector<int64_t>; what the functions do with instructions is decided there.
//
// Forward, exact for every input, row by row:
//   1. scan   One integer maximum per element, no exponential. The bits of a float, sign-magnitude, become an integer of the
//             same order with one xor, so float32, bfloat16, float16 and float64 share the code of their width. A group is
//             G vectors; its lane-wise maximum goes into `group_max`, and into one of `segments` vectors of running maxima.
//   2. cut    Each lane of a segment is the maximum of its own elements ("delegate"), so the k-th largest delegate is a lower
//             bound of the k-th largest element. Found by counting lanes, from the cut of the row before.
//   3. visit  Only groups whose maxima reach the cut are looked at again; elements that reach it become candidates. On random
//             logits there are little more than k of them.
//   4. sort   Candidates by (value desc, index asc): the place of one is how many others precede it.
//   5. finish The k exponentials, for some rows at a time.
// Ties can make every element a candidate: when the buffer is full it shrinks to its k best, and the cut rises above the k-th,
// because later elements lose a tie.
//
// Rows of few classes, as they are, go a shorter way, side by side: all of their classes are sorted, see columns.inl.
//
// Backward: zeros, then at most k + 1 stores per row.
//
// Both for an increasing function of the logits too, see plif_rows.inl: it keeps the order, so that only step 5 knows of it.
#pragma once

// --- candidates ----------------------------------------------------------------------------------------------------

// Candidates are two columns, key and index, in the order of the index. Their keys have 32 bits at least.
template <class Key> using Wide = std::conditional_t<sizeof(Key) == 8, int64_t, int32_t>;

// One of them, where single ones move: in the order (value desc, index asc) the larger comes first.
template <class Key> struct Candidate {
  Wide<Key> key;
  int32_t index;
  bool operator>(const Candidate& other) const {
    return key > other.key || (key == other.key && index < other.index);
  }
};

// Appends the lanes of `mask` in their order and returns how many; `index` is that of the first lane. May write a vector more.
template <class Key> int append(Wide<Key>* keys, int32_t* indices,
                                typename Vector<Key>::Register ordered, uint64_t mask,
                                int64_t index) {
  using V = Vector<Key>;
  if constexpr (V::compresses) {
    return V::compress(keys, indices, ordered, mask, static_cast<int32_t>(index));
  } else {
    Key lanes[V::lanes];
    V::store(lanes, ordered);
    int n = 0;
    for (; mask; mask &= mask - 1) {
      const int lane = V::first(mask);
      keys[n] = canonical(lanes[lane]);
      indices[n++] = static_cast<int32_t>(index + lane);
    }
    return n;
  }
}

// The beginning of a row that is read next is on its way meanwhile: a processor foresees a few lines of it at most.
template <class Key> void prefetch_row(const Key* row, int64_t classes) {
  constexpr int64_t most = 16384 / sizeof(Key), line = 64 / sizeof(Key);
  for (int64_t i = 0; i < std::min(classes, most); i += line) fetch_line(row + i);
}

// A function's scratch, reused from row to row.
template <class Key> struct Scratch {
  static constexpr int lanes = Vector<Key>::lanes;
  int64_t k;
  int64_t group;     // vectors per group: 1, 4 or 8
  int64_t groups;    // groups per row
  int64_t segments;  // a power of two, or `groups` where every group is its own segment
  int64_t capacity;  // of candidates
  std::vector<Key> storage;
  Key* group_max;             // (groups, lanes)
  Key* segment_max;           // (segments, lanes)
  std::vector<int32_t> hits;  // groups, then vectors, that reach the cut
  Key* tail;                  // (group, lanes): the last group of a row, padded with -inf
  std::vector<Wide<Key>> keys, sorted_keys, ranks;
  std::vector<int32_t> indices, sorted_indices;
  std::vector<Candidate<Key>> rows, other_rows;  // candidates where single ones move
  bool in_index_order;                           // of the candidates
  Key near = 1;                                  // cut of the row before
  const Key* next = nullptr;                     // the row that follows, if any

  Scratch(int64_t classes, int64_t k_) : k(k_) {
    // about eight delegates per kept class keep the cut tight; larger groups make the second look rarer
    group = classes >= 64 * k && classes >= 64 * lanes   ? 8
            : classes >= 16 * k && classes >= 32 * lanes ? 4
                                                         : 1;
    groups = (classes + group * lanes - 1) / (group * lanes);
    segments = 1;
    while (segments * lanes < 8 * k && segments < groups) segments *= 2;
    segments = std::min(segments, groups);
    capacity = 2 * k + 1024;
    storage.resize((groups + segments + group) * lanes + 64 / sizeof(Key));
    auto address = reinterpret_cast<uintptr_t>(storage.data());
    group_max = reinterpret_cast<Key*>((address + 63) / 64 * 64);
    segment_max = segments == groups ? group_max : group_max + groups * lanes;
    tail = group_max + (groups + segments) * lanes;
    if (group > 1) hits.resize(groups * (1 + group) + 1);
    for (auto* column : {&keys, &sorted_keys, &ranks}) column->resize(capacity + 2 * lanes + 16);
    for (auto* column : {&indices, &sorted_indices}) column->resize(keys.size());
  }
};

// A key that at least `k` of `count` (a multiple of the lanes, at least k) keys reach, and few more than k do. The search gallops
// away from `near`, that of the row before: rows of one model resemble each other, and then a few counts are enough.
template <class Key> Key about_kth_largest(const Key* keys, int64_t count, int64_t k, Key near) {
  using V = Vector<Key>;
  using Limits = std::numeric_limits<Key>;
  const auto reaching = [&](Key key) {
    const auto bound = V::broadcast(key);
    int64_t n = 0;
    for (int64_t i = 0; i < count; i += V::lanes)
      n += V::count(V::reaches(V::load(keys + i), bound));
    return n;
  };
  // the sort takes whole vectors, so that to fill them up costs nothing
  const int64_t enough = std::max(k + k / 8 + 2, (k + 15) / 16 * 16);
  // at least k keys reach `low`, fewer than k exceed `high`; both ends hold from the start
  Key low = Limits::min(), high = Limits::max();
  Key step = Key{1} << (std::numeric_limits<Key>::digits - 12), probe = near;
  while (true) {
    const int64_t n = reaching(probe);
    // selects, not branches: which way it goes is nothing that a processor could predict
    const bool reached = n >= k;
    low = reached ? probe : low;
    high = reached ? (n <= enough ? probe : high) : static_cast<Key>(probe - 1);
    if (low >= high) return low;
    const bool open = reached ? high == Limits::max() : low == Limits::min();
    // the upper middle, without overflow
    const Key middle = static_cast<Key>((low & high) + ((low ^ high) >> 1) + ((low ^ high) & 1));
    // as far as a step goes without leaving what is still open
    const Key far = reached
                        ? (low > Limits::max() - step ? middle : static_cast<Key>(low + step))
                        : (high < Limits::min() + step ? middle : static_cast<Key>(high - step));
    probe = open ? far : middle;
    step = open && step <= Limits::max() / 4 ? static_cast<Key>(step * 4) : step;
  }
}

// The place of a candidate is how many keys are larger, and how many equal ones came before it: no branches. A key that is equal
// and came before is larger than one less than the own key, so each pair takes one comparison.
template <class Key> void sort_by_counting(Scratch<Key>& s, int64_t n) {
  using V = Vector<Wide<Key>>;
  constexpr int64_t lanes = V::lanes, step = 2 * lanes;
  // from the lane after the r-th on minus one: the vector at lanes - 1 - r
  alignas(64) static constexpr struct Table {
    Wide<Key> value[2 * lanes] = {};
    constexpr Table() {
      for (int64_t i = lanes; i < 2 * lanes; ++i) value[i] = -1;
    }
  } after;
  Wide<Key>* keys = s.keys.data();
  // whole vectors only, filled up with what comes last
  const int64_t whole = (n + step - 1) / step * step;
  for (int64_t i = n; i < whole; ++i) keys[i] = std::numeric_limits<Wide<Key>>::min() + 1;
  for (int64_t i = 0; i < whole; i += step) {
    const auto own = V::load(keys + i), next = V::load(keys + i + lanes);
    const auto own_less = V::add(own, V::broadcast(-1)), next_less = V::add(next, V::broadcast(-1));
    auto rank = V::broadcast(0), next_rank = rank;
    const auto count = [&](int64_t j, auto bound, auto next_bound) {
      const auto other = V::broadcast(keys[j]);
      rank = V::count_greater(rank, other, bound);
      next_rank = V::count_greater(next_rank, other, next_bound);
    };
    const auto up_to = [&](int64_t r) { return V::load(after.value + lanes - 1 - r); };
    int64_t j = 0;
    for (; j < i; ++j) count(j, own_less, next_less);
    for (; j < std::min(n, i + lanes); ++j) count(j, V::add(own, up_to(j - i)), next_less);
    for (; j < std::min(n, i + step); ++j) count(j, own, V::add(next, up_to(j - i - lanes)));
    for (; j < n; ++j) count(j, own, next);
    V::store(s.ranks.data() + i, rank);
    V::store(s.ranks.data() + i + lanes, next_rank);
  }
  const Wide<Key>* ranks = s.ranks.data();
  const int32_t* indices = s.indices.data();
  Wide<Key>* sorted_keys = s.sorted_keys.data();
  int32_t* sorted_indices = s.sorted_indices.data();
  for (int64_t i = 0; i < n; ++i) {
    sorted_keys[ranks[i]] = keys[i];
    sorted_indices[ranks[i]] = indices[i];
  }
}

// Rows in index order -> sorted: stable counting passes over the bits in which the keys differ. Returns the sorted buffer.
inline Candidate<int32_t>* radix_sort(Candidate<int32_t>* from, Candidate<int32_t>* to, int64_t n) {
  constexpr int digit = 8;
  int32_t lowest = from[0].key, highest = lowest;
  for (int64_t i = 1; i < n; ++i) {
    lowest = std::min(lowest, from[i].key);
    highest = std::max(highest, from[i].key);
  }
  // distance from the highest key, which orders descending
  const auto distance = [&](const Candidate<int32_t>& a) {
    return static_cast<uint32_t>(highest) - static_cast<uint32_t>(a.key);
  };
  const uint32_t range = static_cast<uint32_t>(highest) - static_cast<uint32_t>(lowest);
  for (int shift = 0; shift < 32 && (range >> shift) != 0; shift += digit, std::swap(from, to)) {
    int32_t start[(1 << digit) + 1] = {};
    for (int64_t i = 0; i < n; ++i) ++start[(distance(from[i]) >> shift & ((1 << digit) - 1)) + 1];
    for (int d = 0; d < 1 << digit; ++d) start[d + 1] += start[d];
    for (int64_t i = 0; i < n; ++i)
      to[start[distance(from[i]) >> shift & ((1 << digit) - 1)]++] = from[i];
  }
  return from;
}

template <class Key> void to_rows(Scratch<Key>& s, int64_t n) {
  s.rows.resize(s.keys.size());
  for (int64_t i = 0; i < n; ++i) s.rows[i] = {s.keys[i], s.indices[i]};
}

// Puts the k first of n candidates, sorted, into `sorted_keys` and `sorted_indices`.
template <class Key> void sort_candidates(Scratch<Key>& s, int64_t n) {
  using V = Vector<Wide<Key>>;
  if constexpr (V::sorts != 0) {
    if (n <= V::sorts && s.in_index_order &&
        V::template sort<8 * sizeof(Key)>(s.keys.data(), s.indices.data(), n, s.sorted_keys.data(),
                                          s.sorted_indices.data()))
      return;
  }
  if (n <= 256 && s.in_index_order) return sort_by_counting(s, n);
  to_rows(s, n);
  Candidate<Key>* sorted = s.rows.data();
  if constexpr (sizeof(Key) < 8) {
    if (s.in_index_order) {
      s.other_rows.resize(s.rows.size());
      const auto as_int32 = [](auto& rows) {
        return reinterpret_cast<Candidate<int32_t>*>(rows.data());
      };
      sorted = reinterpret_cast<Candidate<Key>*>(
          radix_sort(as_int32(s.rows), as_int32(s.other_rows), n));
    }
  }
  if (!s.in_index_order || sizeof(Key) == 8) {
    if (n > s.k) std::nth_element(sorted, sorted + s.k - 1, sorted + n, std::greater<>());
    std::sort(sorted, sorted + s.k, std::greater<>());
  }
  for (int64_t i = 0; i < s.k; ++i) {
    s.sorted_keys[i] = sorted[i].key;
    s.sorted_indices[i] = sorted[i].index;
  }
}

// Keeps the k best candidates and returns the cut above the k-th: a later element needs a larger value.
template <class Key> Key shrink(Scratch<Key>& s, int64_t& n, bool& closed) {
  to_rows(s, n);
  std::nth_element(s.rows.begin(), s.rows.begin() + s.k - 1, s.rows.begin() + n, std::greater<>());
  n = s.k;
  for (int64_t i = 0; i < n; ++i) {
    s.keys[i] = s.rows[i].key;
    s.indices[i] = s.rows[i].index;
  }
  s.in_index_order = false;
  const Key kth = static_cast<Key>(s.keys[s.k - 1]);
  closed = kth == std::numeric_limits<Key>::max();
  return closed ? kth : static_cast<Key>(kth + 1);
}

// A row with NaN, which is the largest value: one element at a time.
template <Dtype D, class Key>
int64_t collect_with_nan(const Key* x, int64_t classes, Scratch<Key>& s) {
  constexpr Key largest = std::numeric_limits<Key>::max();
  int64_t n = 0;
  Key cut = std::numeric_limits<Key>::min();
  bool closed = false;
  s.in_index_order = true;
  for (int64_t i = 0; i < classes && !closed; ++i) {
    const Key key = (x[i] & largest) > Format<D>::infinity ? largest : canonical(ordered(x[i]));
    if (key < cut) continue;
    s.keys[n] = key;
    s.indices[n++] = static_cast<int32_t>(i);
    if (n >= s.capacity) cut = shrink(s, n, closed);
  }
  return n;
}

// The bits of positive numbers are in order as they are, and above those of all others.
template <bool POSITIVE, class Key>
typename Vector<Key>::Register key_of(typename Vector<Key>::Register bits) {
  if constexpr (POSITIVE)
    return bits;
  else
    return Vector<Key>::ordered(bits);
}

// Steps 1 to 3: fills the columns of candidates, returns how many. POSITIVE takes all numbers for such, with half the instructions,
// and returns -1 where a candidate is none.
template <Dtype D, int G, bool POSITIVE, class Key>
int64_t collect_as(const Key* x, int64_t classes, Scratch<Key>& s) {
  using V = Vector<Key>;
  constexpr int64_t width = G * V::lanes;
  const auto magnitude = V::broadcast(std::numeric_limits<Key>::max());
  const auto lowest = V::broadcast(std::numeric_limits<Key>::min());
  const bool merged = s.segments < s.groups;
  if (merged)
    for (int64_t i = 0; i < s.segments; ++i) V::store(s.segment_max + i * V::lanes, lowest);

  const int64_t whole = classes / width;
  if (whole < s.groups) {
    const Key minus_infinity =
        static_cast<Key>(Format<D>::infinity | std::numeric_limits<Key>::min());
    for (int64_t v = 0; v < G; ++v) {
      const int64_t first = whole * width + v * V::lanes;
      const int64_t rest = std::clamp<int64_t>(classes - first, 0, V::lanes);
      V::store(s.tail + v * V::lanes, load_first<Key>(x + first, rest, minus_infinity));
    }
  }
  auto largest_magnitude = V::broadcast(0), largest_bits = largest_magnitude;
  const auto look = [&](typename V::Register bits) {
    if constexpr (POSITIVE)
      largest_bits = V::max_unsigned(largest_bits, bits);  // of a negative number, if there is one
    else
      largest_magnitude = V::max(largest_magnitude, V::both(bits, magnitude));
    return key_of<POSITIVE, Key>(bits);
  };
  for (int64_t g = 0; g < s.groups; ++g) {
    const Key* p = g < whole ? x + g * width : s.tail;
    auto top = look(V::load(p));
#pragma GCC unroll 8
    for (int v = 1; v < G; ++v) top = V::max(top, look(V::load(p + v * V::lanes)));
    if constexpr (POSITIVE) largest_magnitude = V::max(largest_magnitude, top);
    V::store(s.group_max + g * V::lanes, top);
    if (merged) {
      Key* segment = s.segment_max + (g & (s.segments - 1)) * V::lanes;
      V::store(segment, V::max(V::load(segment), top));
    }
  }
  if (s.next) prefetch_row(s.next, classes);
  if constexpr (POSITIVE)
    largest_magnitude = V::max(largest_magnitude, V::both(largest_bits, magnitude));
  if (V::reaches(largest_magnitude, V::broadcast(static_cast<Key>(Format<D>::infinity + 1))) != 0)
    return collect_with_nan<D>(x, classes, s);

  const int64_t delegates = s.segments * V::lanes;
  Key cut = std::numeric_limits<Key>::min();
  if (delegates >= s.k) cut = s.near = about_kth_largest(s.segment_max, delegates, s.k, s.near);
  if (POSITIVE && cut <= 0) return -1;
  if (cut == 0) cut = -1;  // -0, whose key is -1, ties with +0

  auto bound = V::broadcast(cut);
  int64_t n = 0;
  bool closed = false;
  s.in_index_order = true;
  const auto take = [&](typename V::Register keys, int64_t index) {
    uint64_t mask = V::reaches(keys, bound);
    if (index + V::lanes > classes)
      mask &= index < classes ? (uint64_t{1} << (classes - index)) - 1 : 0;
    n += append<Key>(s.keys.data() + n, s.indices.data() + n, keys, mask, index);
    if (n >= s.capacity) bound = V::broadcast(shrink(s, n, closed));
  };
  if constexpr (G == 1) {  // most vectors have a candidate, and `group_max` is their keys
    for (int64_t g = 0; g < s.groups && !closed; ++g)
      take(V::load(s.group_max + g * V::lanes), g * V::lanes);
    return n;
  }
  // Lists instead of branches: where an element reaches the cut is nothing that a processor could predict.
  int32_t* hits = s.hits.data();
  int64_t hit_groups = 0;
  for (int64_t g = 0; g < s.groups; ++g) {
    hits[hit_groups] = static_cast<int32_t>(g);
    hit_groups += V::reaches(V::load(s.group_max + g * V::lanes), bound) != 0;
  }
  const auto vector_at = [&](int64_t i) {
    return i < whole * G ? x + i * V::lanes : s.tail + (i - whole * G) * V::lanes;
  };
  int32_t* vectors = hits + hit_groups;
  int64_t hit_vectors = 0;
  for (int64_t h = 0; h < hit_groups; ++h) {
#pragma GCC unroll 8
    for (int64_t i = int64_t{hits[h]} * G; i < int64_t{hits[h]} * G + G; ++i) {
      vectors[hit_vectors] = static_cast<int32_t>(i);
      hit_vectors += V::reaches(key_of<POSITIVE, Key>(V::load(vector_at(i))), bound) != 0;
    }
  }
  for (int64_t h = 0; h < hit_vectors && !closed; ++h)
    take(key_of<POSITIVE, Key>(V::load(vector_at(vectors[h]))), int64_t{vectors[h]} * V::lanes);
  return n;
}

// Rows of one model resemble each other: as positive where the row before was.
template <Dtype D, int G, class Key>
int64_t collect(const Key* x, int64_t classes, Scratch<Key>& s) {
  if constexpr (requires(typename Vector<Key>::Register r) { Vector<Key>::max_unsigned(r, r); }) {
    if (s.near > 0) {
      const int64_t found = collect_as<D, G, true>(x, classes, s);
      if (found >= 0) return found;
    }
  }
  return collect_as<D, G, false>(x, classes, s);
}

// --- forward -------------------------------------------------------------------------------------------------------

constexpr int64_t whole_steps(int64_t n) { return (n + 15) / 16 * 16; }

struct Unchanged {
  // What the target's logit will look up is on its way while the candidates are sorted.
  template <class T> void expect(T) const {}
  // The logits of a row, sorted and filled up to `steps`, and the target's become f of them.
  template <class T> void apply(int64_t, T*, int64_t, T&) const {}
  // What the gradient of a row will look up is on its way while the zeros are written.
  void prefetch(int64_t) const {}
  // The gradients of f of them, filled up with zeros, become those of the logits. Where `finite` is false they are NaN.
  template <class T> void differentiate(int64_t, T*, bool) const {}
};

// Of a row on its way: `maximum` of what is listed, `sum` of the exponentials, relative to it.
template <class T, int64_t ROWS> struct Statistics {
  T maximum[ROWS], at_target[ROWS];
  double sum[ROWS];
};

// lse and loss of rows from `first` on. `shifted` are the listed logits less the maximum, number i of row r at
// r * row_step + i * step.
template <class T, int64_t ROWS> void finish(const Forward& a, int64_t first, int64_t rows,
                                             const Statistics<T, ROWS>& of_rows, const T* shifted,
                                             int64_t row_step, int64_t step) {
  const int64_t k = a.k;
  const T* weight = static_cast<const T*>(a.weight);
  double log_sum[ROWS];
  for (int64_t r = 0; r < rows; ++r) log_sum[r] = log_from_1(of_rows.sum[r]);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t n = first + r, y = a.target[n];
    static_cast<T*>(a.lse)[n] = static_cast<T>(of_rows.maximum[r] + log_sum[r]);
    double loss = std::numeric_limits<double>::quiet_NaN();
    if (y >= 0 && y < a.logits.classes) {
      // the maximum leaves both terms before they meet: m + log l - z_y would cancel at large offsets
      loss = log_sum[r] - (static_cast<double>(of_rows.at_target[r]) - of_rows.maximum[r]);
      if (weight) loss *= weight[y];
      if (a.label_smoothing != 0) {
        const T* z = shifted + r * row_step;
        const double spread = sum_by_lanes<double>(k, [&](int64_t i) {
          return (weight ? weight[a.indices[n * k + i]] : T{1}) * (log_sum[r] - z[i * step]);
        });
        loss = (1 - a.label_smoothing) * loss + a.label_smoothing / static_cast<double>(k) * spread;
      }
    }
    static_cast<T*>(a.loss)[n] = static_cast<T>(loss);
  }
}

// The sum of exponentials: of partial sums, of every eighth, whichever way a row takes.
template <class Partial> double joined(Partial partial) {
  return ((partial(0) + partial(4)) + (partial(2) + partial(6))) +
         ((partial(1) + partial(5)) + (partial(3) + partial(7)));
}

template <Dtype D> const typename Format<D>::Key* row_of(const Forward& a, int64_t n) {
  return static_cast<const typename Format<D>::Key*>(a.logits.data) + a.logits.start(n);
}

template <Dtype D> typename Format<D>::Statistic logit_at(const typename Format<D>::Key* row,
                                                          int64_t classes, int64_t y) {
  return Format<D>::value(row[std::clamp<int64_t>(y, 0, classes - 1)]);
}

// The bits of a canonical key, in the width of its column: a narrower one would split the vectors.
template <class Key> Wide<Key> bits_of(Wide<Key> key) {
  return key ^ (key >> (8 * sizeof(key) - 1) & std::numeric_limits<Key>::max());
}

// Rows of few classes, as many as there are lanes, from `first` on. In the bits of the result: those that it left, with NaN or with
// keys that are equal when cut short.
template <Dtype D> uint64_t forward_columns(const Forward& a, int64_t first) {
  using F = Format<D>;
  using Key = typename F::Key;
  constexpr int64_t R = columns::kRows, room = columns::kMostClasses * R;
  const int64_t k = a.k, count = k * R;
  const Key* rows[R];
  for (int64_t r = 0; r < R; ++r) rows[r] = row_of<D>(a, first + r);
  alignas(64) int32_t z[room], keys[room];
  alignas(64) float shifted[room], exponentials[room];
  uint64_t left = columns::sort_rows<D>(rows, a.logits.classes, k, z);
  // keys that are equal when cut short stand in the order of the classes
  int32_t unsure[R] = {};
  if (sizeof(Key) == 4 && k < a.logits.classes)
    for (int64_t r = 0; r < R; ++r)
      unsure[r] = static_cast<uint32_t>(z[count - R + r] ^ z[count + r]) <= columns::kLast;
  if constexpr (sizeof(Key) == 2)
    for (int64_t i = 0; i < count; ++i) keys[i] = z[i] >> 16;
  for (int64_t i = 0; i < count; ++i) z[i] = columns::kLast - (z[i] & columns::kLast);
  if constexpr (sizeof(Key) == 4) {
    for (int64_t r = 0; r < R; ++r)
      for (int64_t i = r; i < count; i += R) keys[i] = rows[r][z[i]];
    for (int64_t i = 0; i < count; ++i) keys[i] = canonical(ordered(keys[i]));
    for (int64_t i = R; i < count; i += R)
      for (int64_t r = 0; r < R; ++r) unsure[r] |= keys[i + r - R] < keys[i + r];
  }
  for (int64_t i = 0; i < count; ++i) shifted[i] = F::value(bits_of<Key>(keys[i]));
  Statistics<float, R> of_rows;
  std::copy_n(shifted, R, of_rows.maximum);
  for (int64_t r = 0; r < R; ++r)
    of_rows.at_target[r] = logit_at<D>(rows[r], a.logits.classes, a.target[first + r]);
  for (int64_t i = 0; i < count; i += R)
    for (int64_t r = 0; r < R; ++r) shifted[i + r] -= of_rows.maximum[r];
  for (int64_t i = 0; i < count; ++i) exponentials[i] = exp_nonpositive(shifted[i]);
  double partial[8][R];
  for (int64_t i = 0; i < 8; ++i)
    for (int64_t r = 0; r < R; ++r) partial[i][r] = i < k ? exponentials[i * R + r] : 0;
  for (int64_t i = 8; i < k; ++i)
    for (int64_t r = 0; r < R; ++r) partial[i % 8][r] += exponentials[i * R + r];
  float share[R];
  for (int64_t r = 0; r < R; ++r) {
    of_rows.sum[r] = joined([&](int i) { return partial[i][r]; });
    share[r] = static_cast<float>(1 / of_rows.sum[r]);
  }
  for (int64_t i = 0; i < count; i += R)
    for (int64_t r = 0; r < R; ++r) exponentials[i + r] *= share[r];
  columns::write_rows(z, k, a.indices + first * k);
  columns::write_rows(exponentials, k, static_cast<float*>(a.probs) + first * k);
  finish<float, R>(a, first, R, of_rows, shifted, 1, R);
  for (int64_t r = 0; r < R; ++r) left |= static_cast<uint64_t>(unsure[r] != 0) << r;
  return left;
}

template <Dtype D, class Curve>
void forward_rows(const Forward& a, int64_t begin, int64_t end, Curve f) {
  using F = Format<D>;
  using Key = typename F::Key;
  using T = typename F::Statistic;
  const int64_t k = a.k, classes = a.logits.classes;
  Scratch<Key> scratch(classes, k);
  // Rows are finished some at a time: long loops over whole steps, which have no remainder to run one by one.
  constexpr int64_t kMostRows = 32;
  const int64_t steps = whole_steps(k), block = std::max<int64_t>(1, 16 * kMostRows / steps);
  std::vector<T> shifted(block * steps), exponentials(block * steps);
  Statistics<T, kMostRows> of_rows;
  const auto some = [&](int64_t first, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) {
      const Key* x = row_of<D>(a, first + r);
      scratch.next = first + r + 1 < end ? row_of<D>(a, first + r + 1) : nullptr;
      const int64_t found = scratch.group == 8   ? collect<D, 8>(x, classes, scratch)
                            : scratch.group == 4 ? collect<D, 4>(x, classes, scratch)
                                                 : collect<D, 1>(x, classes, scratch);
      of_rows.at_target[r] = logit_at<D>(x, classes, a.target[first + r]);
      f.expect(of_rows.at_target[r]);
      sort_candidates(scratch, found);
      std::copy_n(scratch.sorted_indices.data(), k, a.indices + (first + r) * k);
      T* out = shifted.data() + r * steps;
      for (int64_t i = 0; i < steps; ++i) out[i] = F::value(bits_of<Key>(scratch.sorted_keys[i]));
      f.apply(first + r, out, steps, of_rows.at_target[r]);
      const T maximum = of_rows.maximum[r] = out[0];
      for (int64_t i = 0; i < steps; ++i) out[i] -= maximum;
      for (int64_t i = k; i < steps; ++i) out[i] = -std::numeric_limits<T>::infinity();
    }
    for (int64_t i = 0; i < rows * steps; ++i) exponentials[i] = exp_nonpositive(shifted[i]);
    for (int64_t r = 0; r < rows; ++r) {
      const T* e = exponentials.data() + r * steps;
      double partial[8] = {};
      for (int64_t i = 0; i < steps; i += 8)
        for (int64_t j = 0; j < 8; ++j) partial[j] += e[i + j];
      of_rows.sum[r] = joined([&](int i) { return partial[i]; });
      const T share = static_cast<T>(1 / of_rows.sum[r]);
      T* probs = static_cast<T*>(a.probs) + (first + r) * k;
      for (int64_t i = 0; i < k; ++i) probs[i] = e[i] * share;
    }
    finish(a, first, rows, of_rows, shifted.data(), steps, 1);
  };
  if constexpr (sizeof(Key) < 8 && std::is_same_v<Curve, Unchanged>) {
    constexpr int64_t R = columns::kRows;
    bool useful = classes <= columns::kMostClasses;  // until it leaves most rows
    for (; useful && begin + R <= end; begin += R) {
      for (int64_t n = begin + R; n < std::min(begin + 2 * R, end); ++n)
        prefetch_row(row_of<D>(a, n), classes);
      uint64_t left = forward_columns<D>(a, begin);
      useful = Vector<Key>::count(left) <= R / 2;
      for (; left != 0; left &= left - 1) some(begin + Vector<Key>::first(left), 1);
    }
  }
  for (; begin < end; begin += block) some(begin, std::min(block, end - begin));
}

// --- backward ------------------------------------------------------------------------------------------------------

template <Dtype D, class Curve>
void backward_rows(const Backward& a, int64_t begin, int64_t end, Curve f) {
  using F = Format<D>;
  using Key = typename F::Key;
  using T = typename F::Statistic;
  const int64_t k = a.k;
  const T* weight = static_cast<const T*>(a.weight);
  std::vector<T> gradients(whole_steps(k + 1));
  for (int64_t n = begin; n < end; ++n) {
    Key* row = static_cast<Key*>(a.dlogits) + n * a.classes;
    f.prefetch(n);
    std::memset(row, 0, a.classes * sizeof(Key));
    const int64_t y = a.target[n];
    const bool hit = y >= 0 && y < a.classes;
    const int32_t* indices = a.indices + n * k;
    const T* p = static_cast<const T*>(a.probs) + n * k;
    const T* q = a.dprobs ? static_cast<const T*>(a.dprobs) + n * k : nullptr;
    const double dloss = a.dloss && hit ? static_cast<const T*>(a.dloss)[n] : 0;
    double share = a.dlse ? static_cast<const T*>(a.dlse)[n] : 0;
    if (dloss == 0 && share == 0 && !q) continue;

    const double at_target =
        hit ? dloss * (1 - a.label_smoothing) * (weight ? weight[y] : T{1}) : 0;
    const double spread = a.label_smoothing == 0
                              ? 0  // also where dloss is infinite
                              : dloss * a.label_smoothing / static_cast<double>(k);
    share += at_target;
    if (spread != 0)
      share += spread * sum_by_lanes<double>(k, [&](int64_t i) {
                 return static_cast<double>(weight ? weight[indices[i]] : T{1});
               });
    if (q)
      share -= sum_by_lanes<double>(
          k, [&](int64_t i) { return q[i] == 0 ? 0 : static_cast<double>(q[i]) * p[i]; });
    bool outside = hit;
    for (int64_t i = 0; i < k; ++i) {
      const double factor = q ? share + q[i] : share;
      double g = factor == 0
                     ? 0
                     : p[i] * factor;  // a row without upstream gradient stays 0 where p is NaN
      if (spread != 0) g -= spread * (weight ? weight[indices[i]] : T{1});
      if (hit && indices[i] == y) {
        g -= at_target;
        outside = false;
      }
      gradients[i] = static_cast<T>(g);
    }
    gradients[k] = outside ? static_cast<T>(-at_target) : T{0};
    f.differentiate(n, gradients.data(), std::isfinite(p[0]));
    for (int64_t i = 0; i < k; ++i) row[indices[i]] = F::bits(gradients[i]);
    if (outside) row[y] = F::bits(gradients[k]);
  }
}

inline void forward(const Forward& a, int64_t begin, int64_t end) {
  switch (a.logits.dtype) {
    case Dtype::f32: return forward_rows<Dtype::f32>(a, begin, end, Unchanged{});
    case Dtype::bf16: return forward_rows<Dtype::bf16>(a, begin, end, Unchanged{});
    case Dtype::f16: return forward_rows<Dtype::f16>(a, begin, end, Unchanged{});
    case Dtype::f64: return forward_rows<Dtype::f64>(a, begin, end, Unchanged{});
  }
}

inline void backward(const Backward& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case Dtype::f32: return backward_rows<Dtype::f32>(a, begin, end, Unchanged{});
    case Dtype::bf16: return backward_rows<Dtype::bf16>(a, begin, end, Unchanged{});
    case Dtype::f16: return backward_rows<Dtype::f16>(a, begin, end, Unchanged{});
    case Dtype::f64: return backward_rows<Dtype::f64>(a, begin, end, Unchanged{});
  }
}
