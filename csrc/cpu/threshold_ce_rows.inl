// The kernels of threshold_ce, included by each simd_*.cpp: the softmax over all classes, or over those that a cut keeps. Forward
// looks at a row twice, for its maximum and for the exponentials; a cut that depends on the softmax itself takes a third look.
// After the first the row comes from the cache. Rows go through in blocks, whose numbers stay in the first cache between simple
// loops that the compiler vectorises.
#pragma once

constexpr int64_t kBlock = 512;

// Of a block of `count` classes the power of two that loops run over: a short row is not worth a whole block.
inline int64_t width_of(int64_t count) {
  int64_t width = kBlock;
  while (width > 32 && width / 2 >= count) width /= 2;
  return width;
}

// The row's maximum as a key, NaN above all.
template <Dtype D, class Key> Key largest_key(const Key* x, int64_t classes) {
  using V = Vector<Key>;
  constexpr Key kLargest = std::numeric_limits<Key>::max();
  const auto magnitude = V::broadcast(kLargest);
  const Key minus_infinity =
      static_cast<Key>(Format<D>::infinity | std::numeric_limits<Key>::min());
  auto top = V::broadcast(std::numeric_limits<Key>::min()), largest = V::broadcast(0);
  int64_t i = 0;
  for (; i + V::lanes <= classes; i += V::lanes) {
    const auto bits = V::load(x + i);
    largest = V::max(largest, V::both(bits, magnitude));
    top = V::max(top, V::ordered(bits));
  }
  const auto bits = load_first<Key>(x + i, classes - i, minus_infinity);
  largest = V::max(largest, V::both(bits, magnitude));
  top = V::max(top, V::ordered(bits));
  const bool has_nan =
      V::reaches(largest, V::broadcast(static_cast<Key>(Format<D>::infinity + 1))) != 0;
  return has_nan ? kLargest : canonical(V::highest_lane(top));
}

template <Dtype D, class Key> typename Format<D>::Statistic value_of_key(Key key) {
  if (key > Format<D>::infinity)
    return std::numeric_limits<typename Format<D>::Statistic>::quiet_NaN();
  return Format<D>::value(ordered(key));
}

// In the order (value desc, index asc) the key of the first class, and the k-th class: its key and its index.
template <class Key> struct Ranked {
  Key top, kth;
  int64_t index;
};

// `keys` is scratch. Counts at two keys say about where between them the k-th lies: a few looks find it among a handful.
template <Dtype D, class Key>
Ranked<Key> kth_class(const Key* x, int64_t classes, int64_t k, std::vector<Key>& keys) {
  using V = Vector<Key>;
  constexpr Key kLowest = std::numeric_limits<Key>::min(),
                kLargest = std::numeric_limits<Key>::max();
  constexpr int64_t kHandful = 32;
  const int64_t whole = (classes + V::lanes - 1) / V::lanes * V::lanes;
  keys.resize(whole);
  for (int64_t i = 0; i < classes; ++i) {
    const Key key = canonical(ordered(x[i]));
    keys[i] = (x[i] & kLargest) > Format<D>::infinity ? kLargest : key;
  }
  std::fill(keys.begin() + classes, keys.end(), kLowest);
  const auto vector = [&](int64_t i) { return V::load(keys.data() + i); };
  const auto reaching = [&](Key key) {
    const auto bound = V::broadcast(key);
    int64_t n = 0;
    for (int64_t i = 0; i < whole; i += V::lanes) n += V::count(V::reaches(vector(i), bound));
    return n;
  };
  const auto between = [&](int64_t i, Key least, Key most) {
    return V::reaches(vector(i), V::broadcast(least)) & V::reaches(V::broadcast(most), vector(i));
  };
  auto largest = V::broadcast(kLowest);
  for (int64_t i = 0; i < whole; i += V::lanes) largest = V::max(largest, vector(i));
  const Key top = V::highest_lane(largest);
  // at least k keys reach `low`, fewer than k exceed `high`
  Key low = kLowest, high = top;
  int64_t reach = whole, exceed = 0;
  const auto distance = [&] { return static_cast<uint64_t>(high) - static_cast<uint64_t>(low); };
  bool slow = false;  // a line between the counts has not halved the distance: nearer to the middle
  while (low < high && reach - exceed > kHandful) {
    const uint64_t before = distance();
    double share = (static_cast<double>(k - exceed) - 0.5) / static_cast<double>(reach - exceed);
    if (slow) share = (share + 0.5) / 2;
    const auto down = static_cast<uint64_t>(share * static_cast<double>(before));
    const Key probe = static_cast<Key>(static_cast<uint64_t>(high) - std::min(down, before - 1));
    const int64_t n = reaching(probe);
    if (n >= k) {
      low = probe;
      reach = n;
    } else {
      high = static_cast<Key>(probe - 1);
      exceed = n;
    }
    slow = !slow && distance() > before / 2;
  }
  int64_t missing = k - exceed;
  if (low < high) {
    Key handful[kHandful];
    int64_t n = 0;
    for (int64_t i = 0; i < whole; i += V::lanes)
      for (auto found = between(i, low, high); found != 0; found &= found - 1)
        handful[n++] = keys[i + V::first(found)];
    std::nth_element(handful, handful + (missing - 1), handful + n, std::greater<>());
    low = handful[missing - 1];
    missing -= std::count_if(handful, handful + n, [low](Key key) { return key > low; });
  }
  for (int64_t i = 0;; i += V::lanes) {
    auto found = between(i, low, low);
    const int64_t n = V::count(found);
    if (n >= missing) {
      for (; missing > 1; --missing) found &= found - 1;
      return {top, low, i + V::first(found)};
    }
    missing -= n;
  }
}

// Where all are kept nobody needs to know which.
struct MarkAll {
  template <class T> int64_t operator()(const T*, int64_t, int64_t count, int32_t*) const {
    return count;
  }
};

// Of a block of classes: 1 for those that are kept, 0 for the others. Returns how many are.
template <class T> int64_t mark_kept(const T* z, int64_t first, int64_t count, T cut,
                                     int64_t cut_index, int32_t* kept) {
  const int64_t last = cut_index - first;  // of those at the cut
  int32_t marked = 0;
  if (std::isnan(cut)) {
    for (int64_t i = 0; i < count; ++i) marked += kept[i] = z[i] != z[i] && i <= last;
  } else {
    for (int64_t i = 0; i < count; ++i) {
      const int32_t above = !(z[i] <= cut), at = z[i] == cut;  // a NaN is above
      marked += kept[i] = above | (at & static_cast<int32_t>(i <= last));
    }
  }
  return marked;
}

// The same for those whose distance from the maximum is not below `bound`. `least` becomes the least of them.
template <class T>
int64_t mark_near(const T* z, int64_t count, T row_max, T bound, int32_t* kept, T& least) {
  int32_t marked = 0;
  for (int64_t i = 0; i < count; ++i) marked += kept[i] = z[i] - row_max >= bound;
  if (marked != 0)
    for (int64_t i = 0; i < count; ++i) least = kept[i] && z[i] < least ? z[i] : least;
  return marked;
}

// What blocks after the next will need, of this row or of what lies behind it, which is mostly the next one: a block takes so many
// instructions that a processor sees no more than the next lines before it needs them.
template <class Key> void fetch_ahead(const Key* x, int64_t count) {
  constexpr int64_t line = 64, ahead = 2048;
  const auto address = reinterpret_cast<uintptr_t>(x) + ahead;
  for (int64_t i = 0; i < count * static_cast<int64_t>(sizeof(Key)); i += line)
    fetch_line(reinterpret_cast<const void*>(address + i));
}

// Of exponentials relative to the maximum, and with weights where labels are smoothed.
struct Sums {
  double exponentials = 0, spread = 0, weights = 0;
  int64_t kept = 0;
};

// One look at the row. `mark` is given a block, whose logits it may map, and says how many of its classes are kept, and which.
// Where `row` is not null the exponentials go there, by whole blocks; those of blocks that keep nothing are left out.
template <Dtype D, class Mark>
Sums sums_of(const typename Format<D>::Key* x, int64_t classes,
             typename Format<D>::Statistic row_max, const typename Format<D>::Statistic* weight,
             bool smoothed, Mark mark, typename Format<D>::Statistic* row = nullptr) {
  using F = Format<D>;
  using T = typename F::Statistic;
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  T z[kBlock], own[kBlock], w[kBlock];
  int32_t kept[kBlock];
  Sums sums;
  for (int64_t first = 0; first < classes; first += kBlock) {
    const int64_t count = std::min(kBlock, classes - first), width = width_of(count);
    T* e = row ? row + first : own;
    fetch_ahead(x + first, count);
    if (std::is_same_v<Mark, MarkAll> && count == kBlock && !smoothed) {
      sums.kept += kBlock;
      for (int64_t i = 0; i < kBlock; ++i) e[i] = exp_nonpositive(F::value(x[first + i]) - row_max);
    } else {
      for (int64_t i = 0; i < count; ++i) z[i] = F::value(x[first + i]);
      const int64_t marked = mark(z, first, count, kept);
      sums.kept += marked;
      if (marked == 0) continue;
      for (int64_t i = 0; i < count; ++i) z[i] -= row_max;
      if (smoothed) {
        for (int64_t i = 0; i < count; ++i) w[i] = weight ? weight[first + i] : T{1};
        if (marked < count)
          for (int64_t i = 0; i < count; ++i) {
            w[i] = kept[i] ? w[i] : T{0};
            z[i] = kept[i] ? z[i] : T{0};
          }
        std::fill(w + count, w + width, T{0});
        std::fill(z + count, z + width, T{0});
        sums.weights += sum_by_lanes<double>(width, [&](int64_t i) { return double{w[i]}; });
        sums.spread -= sum_by_lanes<double>(width, [&](int64_t i) { return double{w[i]} * z[i]; });
      }
      if (marked < count)
        for (int64_t i = 0; i < count; ++i) z[i] = kept[i] ? z[i] : -kInfinity;
      for (int64_t i = count; i < width; ++i) z[i] = -kInfinity;
      for (int64_t i = 0; i < width; ++i) e[i] = exp_nonpositive(z[i]);
    }
    sums.exponentials += sum_by_lanes<T>(width, [=](int64_t i) { return e[i]; });
  }
  return sums;
}

// The same of all classes, without weights, and the row's maximum: where a block has a larger one, what there was is scaled down.
template <Dtype D> Sums sums_of_all(const typename Format<D>::Key* x, int64_t classes,
                                    typename Format<D>::Statistic& row_max) {
  using F = Format<D>;
  using T = typename F::Statistic;
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  T e[kBlock];
  Sums sums;
  sums.kept = classes;
  row_max = -kInfinity;
  for (int64_t first = 0; first < classes; first += kBlock) {
    const int64_t count = std::min(kBlock, classes - first), width = width_of(count);
    fetch_ahead(x + first, count);
    const T of_block = value_of_key<D>(largest_key<D>(x + first, count));
    if (of_block > row_max || std::isnan(of_block)) {
      sums.exponentials *= std::exp(static_cast<double>(row_max) - of_block);
      row_max = of_block;
    }
    if (row_max == -kInfinity) continue;
    if (count == kBlock) {
      for (int64_t i = 0; i < kBlock; ++i) e[i] = exp_nonpositive(F::value(x[first + i]) - row_max);
    } else {
      for (int64_t i = 0; i < count; ++i) e[i] = F::value(x[first + i]) - row_max;
      std::fill(e + count, e + width, -kInfinity);
      for (int64_t i = 0; i < width; ++i) e[i] = exp_nonpositive(e[i]);
    }
    sums.exponentials += sum_by_lanes<T>(width, [&](int64_t i) { return e[i]; });
  }
  if (row_max == -kInfinity) sums.exponentials = std::numeric_limits<double>::quiet_NaN();
  return sums;
}

template <Dtype D>
void threshold_forward_rows(const ThresholdForward& a, int64_t begin, int64_t end) {
  using F = Format<D>;
  using Key = typename F::Key;
  using T = typename F::Statistic;
  const int64_t classes = a.logits.classes;
  const T* weight = static_cast<const T*>(a.weight);
  const bool smoothed = a.label_smoothing != 0;
  std::vector<Key> keys;
  for (int64_t n = begin; n < end; ++n) {
    const Key* x = static_cast<const Key*>(a.logits.data) + a.logits.start(n);
    T row_max, cut = -std::numeric_limits<T>::infinity();
    int64_t cut_index = classes - 1;
    Sums sums;
    if (a.k >= classes && !smoothed) {
      sums = sums_of_all<D>(x, classes, row_max);
    } else if (a.k < classes) {
      const auto [top, kth, index] = kth_class<D>(x, classes, a.k, keys);
      row_max = value_of_key<D>(top);
      cut = value_of_key<D>(kth);
      cut_index = index;
      sums = sums_of<D>(
          x, classes, row_max, weight, smoothed,
          [cut = cut, cut_index](const T* z, int64_t first, int64_t count, int32_t* kept) {
            return mark_kept(z, first, count, cut, cut_index, kept);
          });
    } else {
      row_max = value_of_key<D>(largest_key<D>(x, classes));
      sums = sums_of<D>(x, classes, row_max, weight, true, MarkAll{});
    }
    const int64_t y = a.target[n];
    const bool hit = y >= 0 && y < classes;
    const double z_y = hit ? static_cast<double>(F::value(x[y])) - row_max : 0;
    const double log_all = std::log(sums.exponentials);
    const double rest = std::exp(z_y - log_all) - a.delta;
    if (a.delta < 1 && hit && rest > 0) {
      // p_y - p_i <= delta, in logarithms; the target itself whatever the rounding
      const T bound = std::min(static_cast<T>(log_all + std::log(rest)), static_cast<T>(z_y));
      cut = std::numeric_limits<T>::infinity();
      sums = sums_of<D>(x, classes, row_max, weight, smoothed,
                        [&](const T* z, int64_t, int64_t count, int32_t* kept) {
                          return mark_near(z, count, row_max, bound, kept, cut);
                        });
    }
    const double log_sum = std::log(sums.exponentials);
    double loss = std::numeric_limits<double>::quiet_NaN();
    if (hit) {
      // the maximum leaves both terms before they meet
      loss = log_sum - z_y;
      if (weight) loss *= weight[y];
      if (smoothed)
        loss = (1 - a.label_smoothing) * loss + a.label_smoothing / static_cast<double>(sums.kept) *
                                                    (sums.weights * log_sum + sums.spread);
    }
    static_cast<T*>(a.loss)[n] = static_cast<T>(loss);
    static_cast<T*>(a.lse)[n] = static_cast<T>(row_max + log_sum);
    static_cast<T*>(a.row_max)[n] = row_max;
    static_cast<T*>(a.log_sum)[n] = static_cast<T>(log_sum);
    static_cast<T*>(a.cut)[n] = cut;
    a.cut_index[n] = static_cast<int32_t>(cut_index);
    a.kept[n] = static_cast<int32_t>(sums.kept);
  }
}

template <Dtype D>
void threshold_backward_rows(const ThresholdBackward& a, int64_t begin, int64_t end) {
  using F = Format<D>;
  using Key = typename F::Key;
  using T = typename F::Statistic;
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  const int64_t classes = a.logits.classes;
  const T* weight = static_cast<const T*>(a.weight);
  T z[kBlock], g[kBlock];
  int32_t kept[kBlock];
  for (int64_t n = begin; n < end; ++n) {
    Key* out = static_cast<Key*>(a.dlogits) + n * classes;
    const Key* x = static_cast<const Key*>(a.logits.data) + a.logits.start(n);
    const T row_max = static_cast<const T*>(a.row_max)[n];
    const int64_t cut_index = a.cut_index[n];
    const int64_t y = a.target[n];
    const bool hit = y >= 0 && y < classes;
    const T log_sum = static_cast<const T*>(a.log_sum)[n];
    // of a row that keeps its target alone the loss is 0, or NaN where that is at +inf
    const bool alone =
        hit && a.kept[n] == 1 && log_sum == 0 && y <= cut_index && F::value(x[y]) == row_max;
    const double dloss = a.dloss && hit && !alone ? static_cast<const T*>(a.dloss)[n] : 0;
    double share = a.dlse ? static_cast<const T*>(a.dlse)[n] : 0;
    if (dloss == 0 && share == 0) {
      std::memset(out, 0, classes * sizeof(Key));
      continue;
    }
    const T cut = static_cast<const T*>(a.cut)[n];
    const bool dense = a.kept[n] == classes;
    const double at_target =
        hit ? dloss * (1 - a.label_smoothing) * (weight ? weight[y] : T{1}) : 0;
    const T spread =
        a.label_smoothing == 0
            ? T{0}  // also where dloss is infinite
            : static_cast<T>(dloss * a.label_smoothing / static_cast<double>(a.kept[n]));
    share += at_target;
    if (spread != 0) {
      double total = weight ? 0 : static_cast<double>(a.kept[n]);
      for (int64_t first = 0; weight && first < classes; first += kBlock) {
        const int64_t count = std::min(kBlock, classes - first);
        for (int64_t i = 0; i < count; ++i) z[i] = F::value(x[first + i]);
        if (!dense) mark_kept(z, first, count, cut, cut_index, kept);
        for (int64_t i = 0; i < count; ++i)
          total += dense || kept[i] ? static_cast<double>(weight[first + i]) : 0;
      }
      share += spread * total;
    }
    const T factor = static_cast<T>(share);
    for (int64_t first = 0; first < classes; first += kBlock) {
      const int64_t count = std::min(kBlock, classes - first);
      fetch_ahead(x + first, count);
      if (dense && count == kBlock && factor != 0) {
        for (int64_t i = 0; i < kBlock; ++i)
          g[i] = exp_nonpositive((F::value(x[first + i]) - row_max) - log_sum) * factor;
      } else {
        for (int64_t i = 0; i < count; ++i) z[i] = F::value(x[first + i]);
        if (!dense) mark_kept(z, first, count, cut, cut_index, kept);
        for (int64_t i = 0; i < count; ++i) z[i] = (z[i] - row_max) - log_sum;
        if (!dense)
          for (int64_t i = 0; i < count; ++i) z[i] = kept[i] ? z[i] : -kInfinity;
        const int64_t width = width_of(count);
        for (int64_t i = count; i < width; ++i) z[i] = -kInfinity;
        for (int64_t i = 0; i < width; ++i) g[i] = exp_nonpositive(z[i]);
        if (factor == 0)
          std::fill_n(g, count, T{0});  // also where the probability is NaN
        else
          for (int64_t i = 0; i < count; ++i) g[i] *= factor;
      }
      if (!dense && !std::isfinite(factor))
        for (int64_t i = 0; i < count; ++i) g[i] = kept[i] ? g[i] : T{0};
      if (spread != 0)
        for (int64_t i = 0; i < count; ++i)
          if (dense || kept[i]) g[i] -= spread * (weight ? weight[first + i] : T{1});
      if (hit && y >= first && y < first + count) g[y - first] -= static_cast<T>(at_target);
      for (int64_t i = 0; i < count; ++i) out[first + i] = F::bits(g[i]);
    }
  }
}

inline void threshold_forward(const ThresholdForward& a, int64_t begin, int64_t end) {
  switch (a.logits.dtype) {
    case Dtype::f32: return threshold_forward_rows<Dtype::f32>(a, begin, end);
    case Dtype::bf16: return threshold_forward_rows<Dtype::bf16>(a, begin, end);
    case Dtype::f16: return threshold_forward_rows<Dtype::f16>(a, begin, end);
    case Dtype::f64: return threshold_forward_rows<Dtype::f64>(a, begin, end);
  }
}

inline void threshold_backward(const ThresholdBackward& a, int64_t begin, int64_t end) {
  switch (a.logits.dtype) {
    case Dtype::f32: return threshold_backward_rows<Dtype::f32>(a, begin, end);
    case Dtype::bf16: return threshold_backward_rows<Dtype::bf16>(a, begin, end);
    case Dtype::f16: return threshold_backward_rows<Dtype::f16>(a, begin, end);
    case Dtype::f64: return threshold_backward_rows<Dtype::f64>(a, begin, end);
  }
}
