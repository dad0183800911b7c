// The kernel of tail, included by each simd_*.cpp. The list begins with the row's maximum. A look at the row finds the exponentials,
// as threshold_ce does where all classes are kept, and keeps them: a number of four bytes per class, or of eight, in the second
// cache. The classes that are no part of the tail become 0 there. Another look turns the others into units of 2^-52 and adds them
// up, by groups. A unit is an integer that the exponential's own format holds, and a sum of them one that a double holds, so that
// no order of additions matters. Draws ascend: one walk over the groups finds them all, and only groups in which there is a draw
// are looked into.
#pragma once

#include "threshold_ce_rows.inl"

constexpr int64_t kGroup = 32, kGroups = kBlock / kGroup;

// Of the numbers of a block the sums of each group: eight per group, then pairs of them, so that every step is a loop over lanes.
template <class Units> void sums_by_group(Units units, double* sums) {
  constexpr int64_t kParts = kGroup / 4;
  double parts[kGroups * kParts], pairs[kGroups * kParts / 2];
  for (int64_t g = 0; g < kGroups; ++g)
    for (int64_t j = 0; j < kParts; ++j) {
      const int64_t i = g * kGroup + j;
      parts[g * kParts + j] =
          (units(i) + units(i + kParts)) + (units(i + 2 * kParts) + units(i + 3 * kParts));
    }
  for (int64_t i = 0; i < kGroups * 4; ++i) pairs[i] = parts[2 * i] + parts[2 * i + 1];
  for (int64_t i = 0; i < kGroups * 2; ++i) parts[i] = pairs[2 * i] + pairs[2 * i + 1];
  for (int64_t i = 0; i < kGroups; ++i) sums[i] = parts[2 * i] + parts[2 * i + 1];
}

// The sums up to and with each of some numbers, by runs: a row of additions as short as that goes beside others.
template <int64_t kCount, class Numbers>
void running_sums(Numbers numbers, double before, double* sums) {
  constexpr int64_t kRuns = 4, kRun = kCount / kRuns;
  for (int64_t i = 0; i < kCount; ++i) sums[i] = numbers(i);
  for (int64_t i = 1; i < kRun; ++i)
    for (int64_t run = 0; run < kCount; run += kRun) sums[run + i] += sums[run + i - 1];
  for (int64_t run = 0; run < kCount; run += kRun) {
    for (int64_t i = 0; i < kRun; ++i) sums[run + i] += before;
    before = sums[run + kRun - 1];
  }
}

template <Dtype D> void tail_rows(const Tail& a, int64_t begin, int64_t end) {
  using F = Format<D>;
  using Key = typename F::Key;
  using T = typename F::Statistic;
  const int64_t classes = a.logits.classes, blocks = (classes + kBlock - 1) / kBlock,
                groups = blocks * kGroups;
  const T* uniform = static_cast<const T*>(a.uniform);
  // whole blocks: what follows the last class stays 0
  std::vector<T> exponentials(uniform ? blocks * kBlock : 0);
  std::vector<double> sums(uniform ? groups : 0);  // up to and with a group
  T* e = uniform ? exponentials.data() : nullptr;
  for (int64_t n = begin; n < end; ++n) {
    const Key* x = static_cast<const Key*>(a.logits.data) + a.logits.start(n);
    const T row_max = F::value(x[a.indices[n * a.k]]);
    const Sums all = sums_of<D>(x, classes, row_max, nullptr, false, MarkAll{}, e);
    const T log_sum = static_cast<T>(std::log(all.exponentials));
    int32_t* draws = a.draws + n * a.samples;
    T* mass = static_cast<T*>(a.mass) + n;
    static_cast<T*>(a.row_max)[n] = row_max;
    static_cast<T*>(a.log_sum)[n] = log_sum;
    *mass = 0;
    std::fill_n(draws, a.samples, -1);
    if (!uniform) continue;
    if (!std::isfinite(log_sum)) {
      *mass = std::numeric_limits<T>::quiet_NaN();
      continue;
    }
    for (int64_t i = 0; i < a.k; ++i) e[a.indices[n * a.k + i]] = 0;
    const int64_t y = a.target[n];
    if (y >= 0 && y < classes) e[y] = 0;

    // at most 2^52: the sum of exponentials has that of the maximum, 1, among them
    const T scale = static_cast<T>(0x1p52 * std::exp(-static_cast<double>(log_sum)));
    const auto units = [=](int64_t i) { return static_cast<double>(std::trunc(e[i] * scale)); };
    double total = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      double of_groups[kGroups], *of_block = sums.data() + b * kGroups;
      sums_by_group([&](int64_t i) { return units(b * kBlock + i); }, of_groups);
      running_sums<kGroups>([&](int64_t i) { return of_groups[i]; }, total, of_block);
      total = of_block[kGroups - 1];
    }
    // the quotient is no integer by rounding alone: it would be nearer to one than 1 / samples, of less than 2^53 in all
    const double stride = std::floor(total / static_cast<double>(a.samples));
    if (!(stride > 0)) continue;
    *mass = static_cast<T>(total * 0x1p-52);
    const double first = std::floor(static_cast<double>(uniform[n]) * stride);
    int64_t g = -1;
    double last = 0, within[kGroup];  // the sum up to and with group g, and those of its classes
    for (int64_t j = 0; j < a.samples; ++j) {
      const double place = first + static_cast<double>(j) * stride;
      if (last <= place) {
        while (g + kGroups < groups && sums[g + kGroups] <= place) g += kGroups;
        do last = sums[++g];
        while (last <= place);
        running_sums<kGroup>([&](int64_t i) { return units(g * kGroup + i); },
                             g == 0 ? 0 : sums[g - 1], within);
      }
      int32_t before = 0;
      for (int64_t i = 0; i < kGroup; ++i) before += within[i] <= place;
      draws[j] = static_cast<int32_t>(g * kGroup) + before;
    }
  }
}

inline void tail(const Tail& a, int64_t begin, int64_t end) {
  switch (a.logits.dtype) {
    case Dtype::f32: return tail_rows<Dtype::f32>(a, begin, end);
    case Dtype::bf16: return tail_rows<Dtype::bf16>(a, begin, end);
    case Dtype::f16: return tail_rows<Dtype::f16>(a, begin, end);
    case Dtype::f64: return tail_rows<Dtype::f64>(a, begin, end);
  }
}
