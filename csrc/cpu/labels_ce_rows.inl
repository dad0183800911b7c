// The kernels of labels_ce, included by each simd_*.cpp. Forward looks at a row as threshold_ce does where a cut depends on the
// softmax itself: for the maximum, for the exponentials of all classes, and for those of the classes that are kept. The second look
// finds the extremes of either side too, which bound the other side and are the largest exponents of their own.
#pragma once

#include "threshold_ce_rows.inl"

// Of a row: what bounds its logits, less the maximum, on either side of the labels, and the largest exponents, or 0.
template <class T> struct Sides {
  static constexpr T kInfinity = std::numeric_limits<T>::infinity();
  T row_max;
  T low = kInfinity, high = -kInfinity;  // least positive, largest negative
  T from_below = -kInfinity;             // of negatives
  T from_above = kInfinity;              // of positives
  T above_negatives = 0, above_positives = 0;

  // p of the least positive less p_i is at most delta, p_i less that of the largest negative too, in logarithms; what equals
  // either of them whatever the rounding
  void bound(double log_all, double delta, bool negatives) {
    const T lowest = low - row_max, highest = high - row_max;
    const double rest = std::exp(lowest - log_all) - delta;
    if (low < kInfinity && rest > 0)
      from_below = std::min(static_cast<T>(log_all + std::log(rest)), lowest);
    if (negatives && std::isfinite(log_all))
      from_above = std::max(static_cast<T>(log_all + std::log(std::exp(highest - log_all) + delta)),
                            highest);
    // whether a side keeps anything its extreme tells
    if (!(highest < from_below) && high > 0) above_negatives = high;
    if (!(lowest > from_above) && low < 0) above_positives = -low;
  }

  // log(1 + sum of exponentials), from one relative to the largest exponent
  double log_one_plus(double sum, T above) const {
    // beside NaN infinity is NaN too
    if (above == kInfinity && row_max == row_max) return above;
    return above + std::log(std::exp(-static_cast<double>(above)) + sum);
  }
};

// Of a block, as wide as what they choose between: compilers vectorise no choice by a bool.
inline void widen_labels(const bool* labels, int64_t count, int32_t* wide) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(labels);
  for (int64_t i = 0; i < count; ++i) wide[i] = bytes[i];
}

template <Dtype D> void labels_forward_rows(const LabelsForward& a, int64_t begin, int64_t end) {
  using F = Format<D>;
  using Key = typename F::Key;
  using T = typename F::Statistic;
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  const int64_t classes = a.logits.classes;
  const auto least = [](T x, T y) { return y < x ? y : x; };
  const auto most = [](T x, T y) { return y > x ? y : x; };
  T z[kBlock], below[kBlock], above[kBlock];
  int32_t y[kBlock], kept[kBlock];
  const auto of_below = [&](int64_t i) { return below[i]; };
  const auto of_above = [&](int64_t i) { return above[i]; };
  for (int64_t n = begin; n < end; ++n) {
    const Key* x = static_cast<const Key*>(a.logits.data) + a.logits.start(n);
    const bool* labels = a.labels + n * classes;
    Sides<T> sides;
    sides.row_max = value_of_key<D>(largest_key<D>(x, classes));
    int64_t positives = 0;
    const auto look = [&](const T* z, int64_t first, int64_t count, int32_t*) {
      const int64_t width = width_of(count);
      int32_t marked = 0;
      widen_labels(labels + first, count, y);
      for (int64_t i = 0; i < count; ++i) marked += y[i];
      for (int64_t i = 0; i < count; ++i) below[i] = y[i] ? z[i] : kInfinity;
      for (int64_t i = 0; i < count; ++i) above[i] = y[i] ? -kInfinity : z[i];
      std::fill(below + count, below + width, kInfinity);
      std::fill(above + count, above + width, -kInfinity);
      positives += marked;
      sides.low = combine_by_lanes(width, sides.low, of_below, least);
      sides.high = combine_by_lanes(width, sides.high, of_above, most);
      return count;
    };
    const Sums all = sums_of<D>(x, classes, sides.row_max, nullptr, false, look);
    sides.bound(std::log(all.exponentials), a.delta, positives < classes);

    double negative = 0, positive = 0;
    T cut_negative = kInfinity, cut_positive = -kInfinity;
    for (int64_t first = 0; first < classes; first += kBlock) {
      const int64_t count = std::min(kBlock, classes - first), width = width_of(count);
      widen_labels(labels + first, count, y);
      for (int64_t i = 0; i < count; ++i) z[i] = F::value(x[first + i]);
      for (int64_t i = 0; i < count; ++i) {
        const T shifted = z[i] - sides.row_max;
        const int32_t over = shifted > sides.from_above, under = shifted < sides.from_below;
        kept[i] = 1 - (y[i] ? over : under);
      }
      if (sides.from_below > -kInfinity) {
        for (int64_t i = 0; i < count; ++i) below[i] = kept[i] > y[i] ? z[i] : kInfinity;
        std::fill(below + count, below + width, kInfinity);
        cut_negative = combine_by_lanes(width, cut_negative, of_below, least);
      }
      if (sides.from_above < kInfinity) {
        for (int64_t i = 0; i < count; ++i) above[i] = (kept[i] & y[i]) ? z[i] : -kInfinity;
        std::fill(above + count, above + width, -kInfinity);
        cut_positive = combine_by_lanes(width, cut_positive, of_above, most);
      }
      for (int64_t i = 0; i < count; ++i) {
        const T of_positive = -z[i] - sides.above_positives,
                of_negative = z[i] - sides.above_negatives;
        const T exponent = y[i] ? of_positive : of_negative;
        z[i] = kept[i] ? exponent : -kInfinity;
      }
      std::fill(z + count, z + width, -kInfinity);
      for (int64_t i = 0; i < width; ++i) z[i] = exp_nonpositive(z[i]);
      for (int64_t i = 0; i < count; ++i) above[i] = y[i] ? z[i] : T{0};
      for (int64_t i = 0; i < count; ++i) below[i] = y[i] ? T{0} : z[i];
      std::fill(above + count, above + width, T{0});
      std::fill(below + count, below + width, T{0});
      positive += sum_by_lanes<T>(width, of_above);
      negative += sum_by_lanes<T>(width, of_below);
    }
    negative = sides.log_one_plus(negative, sides.above_negatives);
    positive = sides.log_one_plus(positive, sides.above_positives);
    static_cast<T*>(a.loss)[n] = static_cast<T>(negative + positive);
    static_cast<T*>(a.negative)[n] = static_cast<T>(negative);
    static_cast<T*>(a.positive)[n] = static_cast<T>(positive);
    static_cast<T*>(a.cut_negative)[n] = sides.from_below > -kInfinity ? cut_negative : -kInfinity;
    static_cast<T*>(a.cut_positive)[n] = sides.from_above < kInfinity ? cut_positive : kInfinity;
  }
}

template <Dtype D> void labels_backward_rows(const LabelsBackward& a, int64_t begin, int64_t end) {
  using F = Format<D>;
  using Key = typename F::Key;
  using T = typename F::Statistic;
  const int64_t classes = a.logits.classes;
  T z[kBlock], g[kBlock];
  int32_t y[kBlock];
  for (int64_t n = begin; n < end; ++n) {
    Key* out = static_cast<Key*>(a.dlogits) + n * classes;
    const Key* x = static_cast<const Key*>(a.logits.data) + a.logits.start(n);
    const T dloss = static_cast<const T*>(a.dloss)[n];
    if (dloss == 0) {
      std::memset(out, 0, classes * sizeof(Key));
      continue;
    }
    const T negative = static_cast<const T*>(a.negative)[n];
    const T positive = static_cast<const T*>(a.positive)[n];
    const T cut_negative = static_cast<const T*>(a.cut_negative)[n];
    const T cut_positive = static_cast<const T*>(a.cut_positive)[n];
    for (int64_t first = 0; first < classes; first += kBlock) {
      const int64_t count = std::min(kBlock, classes - first), width = width_of(count);
      fetch_ahead(x + first, count);
      widen_labels(a.labels + n * classes + first, count, y);
      for (int64_t i = 0; i < count; ++i) z[i] = F::value(x[first + i]);
      for (int64_t i = 0; i < count; ++i) {
        const T of_positive = -z[i] - positive, of_negative = z[i] - negative;
        g[i] = y[i] ? of_positive : of_negative;
      }
      std::fill(g + count, g + width, T{0});
      for (int64_t i = 0; i < width; ++i) g[i] = exp_nonpositive(g[i]);
      for (int64_t i = 0; i < count; ++i) {
        const int32_t over = z[i] > cut_positive, under = z[i] < cut_negative;
        const int32_t dropped = y[i] ? over : under;
        const T scaled = g[i] * (y[i] ? -dloss : dloss);
        g[i] = dropped ? T{0} : scaled;
      }
      for (int64_t i = 0; i < count; ++i) out[first + i] = F::bits(g[i]);
    }
  }
}

inline void labels_forward(const LabelsForward& a, int64_t begin, int64_t end) {
  switch (a.logits.dtype) {
    case Dtype::f32: return labels_forward_rows<Dtype::f32>(a, begin, end);
    case Dtype::bf16: return labels_forward_rows<Dtype::bf16>(a, begin, end);
    case Dtype::f16: return labels_forward_rows<Dtype::f16>(a, begin, end);
    case Dtype::f64: return labels_forward_rows<Dtype::f64>(a, begin, end);
  }
}

inline void labels_backward(const LabelsBackward& a, int64_t begin, int64_t end) {
  switch (a.logits.dtype) {
    case Dtype::f32: return labels_backward_rows<Dtype::f32>(a, begin, end);
    case Dtype::bf16: return labels_backward_rows<Dtype::bf16>(a, begin, end);
    case Dtype::f16: return labels_backward_rows<Dtype::f16>(a, begin, end);
    case Dtype::f64: return labels_backward_rows<Dtype::f64>(a, begin, end);
  }
}
