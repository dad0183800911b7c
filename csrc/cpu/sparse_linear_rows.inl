// The kernel of sparse_linear, included by each simd_*.cpp after formats.inl. The loops run over whole rows without a branch, so
// that the compiler turns them into the instructions of the set.

template <Dtype D> using StatisticOf = typename Format<D>::Statistic;

template <Dtype D> void add_weighted(StatisticOf<D>* sum, const StatisticOf<D>* g,
                                     const typename Format<D>::Key* const* rows, int64_t count,
                                     int64_t width) {
  using F = Format<D>;
  int64_t i = 0;
  // four rows at a time: four streams from memory, and a quarter of the passes over the sums
  for (; i + 4 <= count; i += 4) {
    const auto *a = rows[i], *b = rows[i + 1], *c = rows[i + 2], *d = rows[i + 3];
    const auto ga = g[i], gb = g[i + 1], gc = g[i + 2], gd = g[i + 3];
    for (int64_t j = 0; j < width; ++j)
      sum[j] = sum[j] + ga * F::value(a[j]) + gb * F::value(b[j]) + gc * F::value(c[j]) +
               gd * F::value(d[j]);
  }
  for (; i < count; ++i)
    for (int64_t j = 0; j < width; ++j) sum[j] += g[i] * F::value(rows[i][j]);
}

template <Dtype D> void weighted_rows_of(const WeightedRows& a, int64_t begin, int64_t end) {
  using Key = typename Format<D>::Key;
  using T = StatisticOf<D>;
  const T* coefficients = static_cast<const T*>(a.coefficients);
  const Key* source = static_cast<const Key*>(a.source);
  constexpr int64_t batch = 256;
  std::vector<T> sum(a.width);
  T g[batch];
  const Key* rows[batch];
  const int64_t row_bytes = a.width * (D == Dtype::f64 ? 8 : a.out_dtype == Dtype::f32 ? 4 : 2);
  for (int64_t r = begin; r < end; ++r) {
    if (a.starts[r] == a.ends[r]) {
      std::memset(static_cast<char*>(a.out) + r * row_bytes, 0, row_bytes);
      continue;
    }
    std::fill(sum.begin(), sum.end(), T{0});
    for (int64_t p = a.starts[r]; p < a.ends[r];) {
      int64_t count = 0;
      for (; p < a.ends[r] && count < batch; ++p) {
        g[count] = coefficients[p];
        rows[count] = source + a.indices[p] * a.width;
        count += coefficients[p] != 0;
      }
      add_weighted<D>(sum.data(), g, rows, count, a.width);
    }
    round_row(sum.data(), a.out, a.out_dtype, r * a.width, a.width);
  }
}

inline void weighted_rows(const WeightedRows& a, int64_t begin, int64_t end) {
  switch (a.source_dtype) {
    case Dtype::f32: return weighted_rows_of<Dtype::f32>(a, begin, end);
    case Dtype::bf16: return weighted_rows_of<Dtype::bf16>(a, begin, end);
    case Dtype::f16: return weighted_rows_of<Dtype::f16>(a, begin, end);
    case Dtype::f64: return weighted_rows_of<Dtype::f64>(a, begin, end);
  }
}
