// The kernels of plif, included by each simd_*.cpp. They share the sums of threshold_ce: with f(x) = x the results are the same to
// the last bit. A logit is looked up, in the first or second cache, each time that it is read; its cell and f(x) are
// never stored.
#include "threshold_ce_rows.inl"

template <class T> struct Link {
  const T* lines;
  int64_t cells;
  T bound, rate, last;
  double wide_bound, wide_rate;

  explicit Link(const Plif& f)
      : lines(static_cast<const T*>(f.lines)),
        cells(f.cells),
        bound(static_cast<T>(f.bound)),
        rate(static_cast<T>(static_cast<double>(f.cells) / (2 * f.bound))),
        last(static_cast<T>(f.cells - 1)),
        wide_bound(f.bound),
        wide_rate(static_cast<double>(f.cells) / (2 * f.bound)) {}

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
      const T* line = lines + 2 * static_cast<int64_t>(cell[i]);
      x[i] = line[0] * x[i] + line[1];
    }
  }
  // g becomes f'(x) g.
  void differentiate(const int32_t* cell, T* g, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) g[i] *= lines[2 * static_cast<int64_t>(cell[i])];
  }

  // Adds up to kBlock gradients of f(x).
  void add(const T* g, const T* x, const int32_t* cell, int64_t count, const PlifSums& sums,
           double* outside) const {
    int64_t mass[kBlock], moment[kBlock];
    int32_t beyond = 0;
    for (int64_t i = 0; i < count; ++i) {
      const double scaled = static_cast<double>(g[i]) * sums.scale;
      double share = (static_cast<double>(x[i]) + wide_bound) * wide_rate - cell[i];
      share = share > 0 ? share : 0;
      share = share < 1 ? share : 1;
      mass[i] = static_cast<int64_t>(scaled);
      moment[i] = static_cast<int64_t>(scaled * share);
    }
    for (int64_t i = 0; i < count; ++i)
      beyond += !(x[i] >= -bound) | static_cast<int32_t>(x[i] > bound);
    for (int64_t i = 0; i < count; ++i) {
      int64_t* sum = sums.cells + 2 * static_cast<int64_t>(cell[i]);
      sum[0] += mass[i];
      sum[1] += moment[i];
    }
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
  const Link<T> f(a.f);
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
  const Link<T> f(a.f);
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

template <Dtype D> void plif_ce_forward_rows(const PlifCeForward& a, int64_t begin, int64_t end) {
  using F = Format<D>;
  using Key = typename F::Key;
  using T = typename F::Statistic;
  const Link<T> f(a.f);
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
  const Link<T> f(a.f);
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
      const T spread = static_cast<T>(dloss * a.label_smoothing / static_cast<double>(classes));
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
