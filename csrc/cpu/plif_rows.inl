// The kernels of plif, included by each simd_*.cpp. They share the sums of threshold_ce and the lists of topk_ce: with f(x) = x the
// results are the same to the last bit. A logit is looked up, in the first or second cache, each time that it is read; its
// cell and f(x) are never stored.
#include "threshold_ce_rows.inl"
#include "topk_ce_rows.inl"

// log(1 + e^x) to 10 digits, branch-free so that the compiler vectorises a loop over it.
inline double softplus(double x) {
  const double a = std::min(std::abs(x), 700.0);
  const double rounder = 6755399441055744.0;  // 1.5 * 2^52, as in exp_nonpositive
  const double shifted = a * -1.4426950408889634 + rounder;
  const double n = shifted - rounder;
  const double r = -a - n * 0.6931471805599453;
  double p = 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 1.0 / 2;
  p = p * r + 1.0;
  p = p * r + 1.0;
  const int64_t e = Format<Dtype::f64>::bits(shifted) - Format<Dtype::f64>::bits(rounder);
  const double u =
      p * Format<Dtype::f64>::value(static_cast<int64_t>(static_cast<uint64_t>(e + 1023) << 52));
  // log(1 + u) = 2 artanh(u / (2 + u))
  const double s = u / (2 + u), t = s * s;
  double sum = 1.0 / 19;
  sum = sum * t + 1.0 / 17;
  sum = sum * t + 1.0 / 15;
  sum = sum * t + 1.0 / 13;
  sum = sum * t + 1.0 / 11;
  sum = sum * t + 1.0 / 9;
  sum = sum * t + 1.0 / 7;
  sum = sum * t + 1.0 / 5;
  sum = sum * t + 1.0 / 3;
  sum = sum * t + 1.0;
  return std::max(x, 0.0) + 2 * s * sum;
}

template <Dtype D, class T> void plif_slopes_of(const PlifSlopes& a, int64_t begin, int64_t end) {
  using F = Format<D>;
  const auto* w = static_cast<const typename F::Key*>(a.w);
  auto* slopes = static_cast<T*>(a.slopes);
  double x[kBlock];
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t count = std::min(kBlock, end - first);
    for (int64_t i = 0; i < count; ++i) x[i] = static_cast<double>(F::value(w[first + i]));
    if constexpr (D == Dtype::f64)
      for (int64_t i = 0; i < count; ++i)
        x[i] = std::max(x[i], 0.0) + std::log1p(std::exp(-std::abs(x[i])));
    else
      for (int64_t i = 0; i < count; ++i) x[i] = softplus(x[i]);
    // that of the start, which is rounded too, is then 1 and not next to it; none is 0
    for (int64_t i = 0; i < count; ++i)
      slopes[first + i] =
          static_cast<T>(F::value(F::bits(static_cast<typename F::Statistic>(x[i])))) +
          std::numeric_limits<T>::min();
  }
}

// STRIDE: of slopes and offsets, 2 where a line lies in one place of the cache.
template <class T, int STRIDE> struct Link {
  const T *slopes, *offsets;
  T bound, rate, last;
  double wide_bound, wide_rate;

  explicit Link(const Plif& f)
      : Link(static_cast<const T*>(f.lines), static_cast<const T*>(f.lines) + 1, f.cells, f.bound) {
    static_assert(STRIDE == 2);
  }
  explicit Link(const PlifColumns& f)
      : Link(static_cast<const T*>(f.slopes), static_cast<const T*>(f.offsets), f.cells, f.bound) {
    static_assert(STRIDE == 1);
  }
  Link(const T* slopes_, const T* offsets_, int64_t cells, double bound_)
      : slopes(slopes_),
        offsets(offsets_),
        bound(static_cast<T>(bound_)),
        rate(static_cast<T>(static_cast<double>(cells) / (2 * bound_))),
        last(static_cast<T>(cells - 1)),
        wide_bound(bound_),
        wide_rate(static_cast<double>(cells) / (2 * bound_)) {}

  void find(const T* x, int64_t count, int32_t* cell) const {
    for (int64_t i = 0; i < count; ++i) {
      T place = (x[i] + bound) * rate;
      place = place > 0 ? place : T{0};  // a NaN too
      place = place < last ? place : last;
      cell[i] = static_cast<int32_t>(place);
    }
  }
  void apply(const int32_t* cell, T* x, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = STRIDE * static_cast<int64_t>(cell[i]);
      x[i] = slopes[at] * x[i] + offsets[at];
    }
  }
  // g becomes f'(x) g.
  void differentiate(const int32_t* cell, T* g, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) g[i] *= slopes[STRIDE * static_cast<int64_t>(cell[i])];
  }

  // What gradients of f(x) add to the sums of their cells.
  void weigh(const T* g, const T* x, const int32_t* cell, int64_t count, double scale,
             int64_t* mass, int64_t* moment) const {
    for (int64_t i = 0; i < count; ++i) {
      const double scaled = static_cast<double>(g[i]) * scale;
      double share = (static_cast<double>(x[i]) + wide_bound) * wide_rate - cell[i];
      share = share > 0 ? share : 0;
      share = share < 1 ? share : 1;
      mass[i] = static_cast<int64_t>(scaled);
      moment[i] = static_cast<int64_t>(scaled * share);
    }
  }

  // Adds up to kBlock gradients of f(x).
  void add(const T* g, const T* x, const int32_t* cell, int64_t count, const PlifSums& sums,
           double* outside) const {
    int64_t mass[kBlock], moment[kBlock];
    weigh(g, x, cell, count, sums.scale, mass, moment);
    for (int64_t i = 0; i < count; ++i) {
      int64_t* sum = sums.cells + 2 * static_cast<int64_t>(cell[i]);
      sum[0] += mass[i];
      sum[1] += moment[i];
    }
    add_beyond(g, x, count, outside);
  }

  void add_beyond(const T* g, const T* x, int64_t count, double* outside) const {
    int32_t beyond = 0;
    for (int64_t i = 0; i < count; ++i)
      beyond += !(x[i] >= -bound) | static_cast<int32_t>(x[i] > bound);
    if (beyond == 0) return;
    for (int64_t i = 0; i < count; ++i) {
      if (g[i] == 0) continue;  // also where x is -inf
      const double wide = x[i];
      if (wide > wide_bound)
        outside[1] += g[i] * (wide - wide_bound);
      else if (!(wide >= -wide_bound))
        outside[0] += g[i] * (wide + wide_bound);
    }
  }
};

template <Dtype D> void plif_forward_of(const PlifForward& a, int64_t begin, int64_t end) {
  using F = Format<D>;
  using T = typename F::Statistic;
  const Link<T, 2> f(a.f);
  const auto* x = static_cast<const typename F::Key*>(a.x);
  auto* y = static_cast<typename F::Key*>(a.y);
  T z[kBlock];
  int32_t cell[kBlock];
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t count = std::min(kBlock, end - first);
    for (int64_t i = 0; i < count; ++i) z[i] = F::value(x[first + i]);
    f.find(z, count, cell);
    f.apply(cell, z, count);
    for (int64_t i = 0; i < count; ++i) y[first + i] = F::bits(z[i]);
  }
}

template <Dtype D>
void plif_backward_of(const PlifBackward& a, const PlifSums& sums, int64_t begin, int64_t end) {
  using F = Format<D>;
  using T = typename F::Statistic;
  const Link<T, 2> f(a.f);
  const auto* x = static_cast<const typename F::Key*>(a.x);
  const auto* dy = static_cast<const typename F::Key*>(a.dy);
  auto* dx = static_cast<typename F::Key*>(a.dx);
  T z[kBlock], g[kBlock];
  int32_t cell[kBlock];
  for (int64_t n = begin; n < end; ++n) {
    double outside[2] = {};
    const int64_t stop = std::min((n + 1) * kPlifPiece, a.elements);
    for (int64_t first = n * kPlifPiece; first < stop; first += kBlock) {
      const int64_t count = std::min(kBlock, stop - first);
      for (int64_t i = 0; i < count; ++i) z[i] = F::value(x[first + i]);
      for (int64_t i = 0; i < count; ++i) g[i] = F::value(dy[first + i]);
      f.find(z, count, cell);
      if (sums.cells) f.add(g, z, cell, count, sums, outside);
      f.differentiate(cell, g, count);
      for (int64_t i = 0; i < count; ++i) dx[first + i] = F::bits(g[i]);
    }
    std::copy_n(outside, 2, sums.outside + 2 * n);
  }
}

// f on the lists of topk_ce: see Unchanged there.
template <class T> struct ListForward {
  Link<T, 1> f;
  int64_t k;
  T* values;
  void expect(T z_y) const {
    int32_t cell;
    f.find(&z_y, 1, &cell);
    fetch_line(f.slopes + cell);
    fetch_line(f.offsets + cell);
  }
  void apply(int64_t n, T* z, int64_t steps, T& z_y) const {
    T* row = values + n * (k + 1);
    int32_t cell[kBlock];
    std::copy_n(z, k, row);
    row[k] = z_y;
    for (int64_t first = 0; first < steps; first += kBlock) {
      const int64_t count = std::min(kBlock, steps - first);
      f.find(z + first, count, cell);
      f.apply(cell, z + first, count);
    }
    f.find(&z_y, 1, cell);
    f.apply(cell, &z_y, 1);
  }
};

template <class T> struct ListBackward {
  Link<T, 1> f;
  int64_t k;
  const T* values;
  double* outside;
  double scale;
  PlifAddends* addends;
  T x[kBlock] = {};
  int32_t cell[kBlock] = {};

  // A block of a row, filled up to whole steps; returns how many.
  int64_t load(int64_t n, int64_t first, int64_t pairs) {
    const int64_t count = whole_steps(pairs);
    std::fill(std::copy_n(values + n * (k + 1) + first, pairs, x), x + count, T{0});
    f.find(x, count, cell);
    return count;
  }
  void prefetch(int64_t n) {
    const int64_t pairs = std::min(kBlock, k + 1);
    load(n, 0, pairs);
    for (int64_t i = 0; i < pairs; ++i) fetch_line(f.slopes + cell[i]);
  }
  void differentiate(int64_t n, T* g, bool finite) {
    for (int64_t first = 0; first <= k; first += kBlock) {
      const int64_t pairs = std::min(kBlock, k + 1 - first);
      const int64_t count = k < kBlock ? whole_steps(pairs) : load(n, first, pairs);
      if (addends && finite) {
        const int64_t at = addends->count;
        std::copy_n(cell, count, addends->cell + at);
        f.weigh(g + first, x, cell, count, scale, addends->mass + at, addends->moment + at);
        f.add_beyond(g + first, x, count, outside + 2 * n);
        addends->count += pairs;
      }
      f.differentiate(cell, g + first, count);
    }
  }
};

template <Dtype D>
void plif_topk_forward_rows(const PlifTopkForward& a, int64_t begin, int64_t end) {
  using T = typename Format<D>::Statistic;
  const ListForward<T> f{Link<T, 1>(a.f), a.list.k, static_cast<T*>(a.values)};
  forward_rows<D>(a.list, begin, end, f);
}

template <Dtype D> void plif_topk_backward_rows(const PlifTopkBackward& a, PlifAddends* addends,
                                                int64_t begin, int64_t end) {
  using T = typename Format<D>::Statistic;
  const ListBackward<T> f{Link<T, 1>(a.f), a.list.k, static_cast<const T*>(a.values),
                          a.outside,       a.scale,  addends};
  backward_rows<D>(a.list, begin, end, f);
}

template <Dtype D> void plif_ce_forward_rows(const PlifCeForward& a, int64_t begin, int64_t end) {
  using F = Format<D>;
  using Key = typename F::Key;
  using T = typename F::Statistic;
  const Link<T, 2> f(a.f);
  const int64_t classes = a.logits.classes;
  const T* weight = static_cast<const T*>(a.weight);
  const bool smoothed = a.label_smoothing != 0;
  int32_t cell[kBlock];
  const auto apply = [&](T* z, int64_t count) {
    f.find(z, count, cell);
    f.apply(cell, z, count);
  };
  for (int64_t n = begin; n < end; ++n) {
    const Key* x = static_cast<const Key*>(a.logits.data) + a.logits.start(n);
    // f of the largest is the largest
    T row_max = value_of_key<D>(largest_key<D>(x, classes));
    apply(&row_max, 1);
    const Sums sums = sums_of<D>(x, classes, row_max, weight, smoothed,
                                 [&](T* z, int64_t, int64_t count, int32_t*) {
                                   apply(z, count);
                                   return count;
                                 });
    const int64_t y = a.target[n];
    const double log_sum = std::log(sums.exponentials);
    double loss = std::numeric_limits<double>::quiet_NaN();
    if (y >= 0 && y < classes) {
      T z_y = F::value(x[y]);
      apply(&z_y, 1);
      // the maximum leaves both terms before they meet
      loss = log_sum - (static_cast<double>(z_y) - row_max);
      if (weight) loss *= weight[y];
      if (smoothed)
        loss = (1 - a.label_smoothing) * loss + a.label_smoothing / static_cast<double>(classes) *
                                                    (sums.weights * log_sum + sums.spread);
    }
    static_cast<T*>(a.loss)[n] = static_cast<T>(loss);
    static_cast<T*>(a.lse)[n] = static_cast<T>(row_max + log_sum);
    static_cast<T*>(a.row_max)[n] = row_max;
    static_cast<T*>(a.log_sum)[n] = static_cast<T>(log_sum);
  }
}

template <Dtype D> void plif_ce_backward_rows(const PlifCeBackward& a, const PlifSums& sums,
                                              int64_t begin, int64_t end) {
  using F = Format<D>;
  using Key = typename F::Key;
  using T = typename F::Statistic;
  const Link<T, 2> f(a.f);
  const int64_t classes = a.logits.classes;
  const T* weight = static_cast<const T*>(a.weight);
  T x[kBlock], z[kBlock], g[kBlock];
  int32_t cell[kBlock];
  double total_weight = static_cast<double>(classes);
  if (weight) total_weight = std::accumulate(weight, weight + classes, 0.0);
  for (int64_t n = begin; n < end; ++n) {
    Key* out = static_cast<Key*>(a.dlogits) + n * classes;
    const Key* row = static_cast<const Key*>(a.logits.data) + a.logits.start(n);
    const T row_max = static_cast<const T*>(a.row_max)[n];
    const T log_sum = static_cast<const T*>(a.log_sum)[n];
    const int64_t y = a.target[n];
    // of a row with one class the loss is 0
    const bool hit = y >= 0 && y < classes && classes > 1;
    const double dloss = a.dloss && hit ? static_cast<const T*>(a.dloss)[n] : 0;
    double share = a.dlse ? static_cast<const T*>(a.dlse)[n] : 0;
    double outside[2] = {};
    if (dloss == 0 && share == 0) {
      std::memset(out, 0, classes * sizeof(Key));
    } else {
      const T at_target =
          static_cast<T>(hit ? dloss * (1 - a.label_smoothing) * (weight ? weight[y] : T{1}) : 0);
      const T spread =
          a.label_smoothing == 0
              ? 0
              : static_cast<T>(dloss * a.label_smoothing / static_cast<double>(classes));
      share += hit ? dloss * (1 - a.label_smoothing) * (weight ? weight[y] : T{1}) : 0;
      if (spread != 0) share += spread * total_weight;
      const T factor = static_cast<T>(share);
      const bool counted = sums.cells && std::isfinite(row_max + log_sum);
      for (int64_t first = 0; first < classes; first += kBlock) {
        const int64_t count = std::min(kBlock, classes - first);
        for (int64_t i = 0; i < count; ++i) z[i] = x[i] = F::value(row[first + i]);
        f.find(x, count, cell);
        f.apply(cell, z, count);
        for (int64_t i = 0; i < count; ++i) z[i] = (z[i] - row_max) - log_sum;
        for (int64_t i = count; i < kBlock; ++i) z[i] = -std::numeric_limits<T>::infinity();
        for (int64_t i = 0; i < kBlock; ++i) g[i] = exp_nonpositive(z[i]);
        if (factor == 0)
          std::fill_n(g, count, T{0});  // also where the probability is NaN
        else
          for (int64_t i = 0; i < count; ++i) g[i] *= factor;
        if (spread != 0)
          for (int64_t i = 0; i < count; ++i) g[i] -= spread * (weight ? weight[first + i] : T{1});
        if (hit && y >= first && y < first + count) g[y - first] -= at_target;
        if (counted) f.add(g, x, cell, count, sums, outside);
        f.differentiate(cell, g, count);
        for (int64_t i = 0; i < count; ++i) out[first + i] = F::bits(g[i]);
      }
    }
    std::copy_n(outside, 2, sums.outside + 2 * n);
  }
}

inline void plif_slopes(const PlifSlopes& a, int64_t begin, int64_t end) {
  const auto run = [&](auto of_float, auto of_double) {
    return a.wide ? of_double(a, begin, end) : of_float(a, begin, end);
  };
  switch (a.dtype) {
    case Dtype::f32:
      return run(plif_slopes_of<Dtype::f32, float>, plif_slopes_of<Dtype::f32, double>);
    case Dtype::bf16:
      return run(plif_slopes_of<Dtype::bf16, float>, plif_slopes_of<Dtype::bf16, double>);
    case Dtype::f16:
      return run(plif_slopes_of<Dtype::f16, float>, plif_slopes_of<Dtype::f16, double>);
    case Dtype::f64:
      return run(plif_slopes_of<Dtype::f64, float>, plif_slopes_of<Dtype::f64, double>);
  }
}

inline void plif_topk_forward(const PlifTopkForward& a, int64_t begin, int64_t end) {
  switch (a.list.logits.dtype) {
    case Dtype::f32: return plif_topk_forward_rows<Dtype::f32>(a, begin, end);
    case Dtype::bf16: return plif_topk_forward_rows<Dtype::bf16>(a, begin, end);
    case Dtype::f16: return plif_topk_forward_rows<Dtype::f16>(a, begin, end);
    case Dtype::f64: return plif_topk_forward_rows<Dtype::f64>(a, begin, end);
  }
}

inline void plif_topk_backward(const PlifTopkBackward& a, PlifAddends* addends, int64_t begin,
                               int64_t end) {
  switch (a.list.dtype) {
    case Dtype::f32: return plif_topk_backward_rows<Dtype::f32>(a, addends, begin, end);
    case Dtype::bf16: return plif_topk_backward_rows<Dtype::bf16>(a, addends, begin, end);
    case Dtype::f16: return plif_topk_backward_rows<Dtype::f16>(a, addends, begin, end);
    case Dtype::f64: return plif_topk_backward_rows<Dtype::f64>(a, addends, begin, end);
  }
}

inline void plif_forward(const PlifForward& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case Dtype::f32: return plif_forward_of<Dtype::f32>(a, begin, end);
    case Dtype::bf16: return plif_forward_of<Dtype::bf16>(a, begin, end);
    case Dtype::f16: return plif_forward_of<Dtype::f16>(a, begin, end);
    case Dtype::f64: return plif_forward_of<Dtype::f64>(a, begin, end);
  }
}

inline void plif_backward(const PlifBackward& a, const PlifSums& sums, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case Dtype::f32: return plif_backward_of<Dtype::f32>(a, sums, begin, end);
    case Dtype::bf16: return plif_backward_of<Dtype::bf16>(a, sums, begin, end);
    case Dtype::f16: return plif_backward_of<Dtype::f16>(a, sums, begin, end);
    case Dtype::f64: return plif_backward_of<Dtype::f64>(a, sums, begin, end);
  }
}

inline void plif_ce_forward(const PlifCeForward& a, int64_t begin, int64_t end) {
  switch (a.logits.dtype) {
    case Dtype::f32: return plif_ce_forward_rows<Dtype::f32>(a, begin, end);
    case Dtype::bf16: return plif_ce_forward_rows<Dtype::bf16>(a, begin, end);
    case Dtype::f16: return plif_ce_forward_rows<Dtype::f16>(a, begin, end);
    case Dtype::f64: return plif_ce_forward_rows<Dtype::f64>(a, begin, end);
  }
}

inline void plif_ce_backward(const PlifCeBackward& a, const PlifSums& sums, int64_t begin,
                             int64_t end) {
  switch (a.logits.dtype) {
    case Dtype::f32: return plif_ce_backward_rows<Dtype::f32>(a, sums, begin, end);
    case Dtype::bf16: return plif_ce_backward_rows<Dtype::bf16>(a, sums, begin, end);
    case Dtype::f16: return plif_ce_backward_rows<Dtype::f16>(a, sums, begin, end);
    case Dtype::f64: return plif_ce_backward_rows<Dtype::f64>(a, sums, begin, end);
  }
}
