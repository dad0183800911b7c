// A C++ program that uses the kernels without torch, and their test under sanitizers: every instruction set of this processor
// against a plain sort, on rows of all lengths, with ties, NaN and infinities. Buffers have their exact size, so that a
// sanitizer sees every access beyond them.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <type_traits>
#include <vector>

#include "cpu/isa.h"
#include "values.h"

namespace cpu = sparse_ce::cpu;

namespace {

// (value desc, index asc), NaN first
std::vector<int32_t> order_of(const std::vector<double>& row) {
  std::vector<int32_t> order(row.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    if (std::isnan(row[a]) || std::isnan(row[b])) return std::isnan(row[a]) && !std::isnan(row[b]);
    return row[a] > row[b];
  });
  return order;
}

bool close(double a, double b, double tolerance) {
  return (std::isnan(a) && std::isnan(b)) || a == b ||
         std::abs(a - b) <= tolerance * std::max(1.0, std::abs(b));
}

template <class T> int check(const cpu::Isa& isa, int64_t classes, int64_t k, int kind) {
  // of few classes a vector's lanes of rows go together, and what is left by themselves
  const int64_t rows = classes <= 128 ? 35 : 3;
  constexpr bool is_double = sizeof(T) == 8, is_narrow = sizeof(T) == 2;
  using S = std::conditional_t<is_double, double, float>;
  const double tolerance = is_double ? 1e-13 : 4e-7;
  const double of_gradient = is_narrow ? 0x1p-8 : 2 * tolerance;
  const cpu::Dtype dtype = is_double   ? cpu::Dtype::f64
                           : is_narrow ? cpu::Dtype::bf16
                                       : cpu::Dtype::f32;
  std::mt19937 random(static_cast<unsigned>(classes * 131 + k * 7 + kind));
  const std::unique_ptr<T[]> logits(new T[rows * classes]);
  for (int64_t i = 0; i < rows * classes; ++i) logits[i] = static_cast<T>(value(random, kind));
  std::vector<int64_t> target(rows);
  for (auto& y : target) y = static_cast<int64_t>(random() % static_cast<unsigned>(classes));
  std::vector<S> loss(rows), lse(rows), probs(rows * k), dloss(rows, S{2});
  std::vector<T> dlogits(rows * classes, T(7.0));
  std::vector<int32_t> indices(rows * k, -1);
  const cpu::Forward forward{{logits.get(), dtype, classes, rows, 0, classes},
                             k,
                             target.data(),
                             nullptr,
                             0.0,
                             loss.data(),
                             lse.data(),
                             indices.data(),
                             probs.data()};
  isa.forward(forward, 0, rows);
  const cpu::Backward backward{
      dloss.data(), nullptr, nullptr, target.data(), indices.data(), probs.data(),
      nullptr,      0.0,     k,       classes,       dlogits.data(), dtype};
  isa.backward(backward, 0, rows);

  int wrong = 0;
  for (int64_t n = 0; n < rows; ++n) {
    const std::vector<double> row(logits.get() + n * classes, logits.get() + (n + 1) * classes);
    const auto order = order_of(row);
    double sum = 0;
    for (int64_t i = 0; i < k; ++i) sum += std::exp(row[order[i]] - row[order[0]]);
    std::vector<double> gradient(classes, 0.0);
    for (int64_t i = 0; i < k; ++i) {
      const double p = std::exp(row[order[i]] - row[order[0]]) / sum;
      wrong += indices[n * k + i] != order[i];
      wrong += !close(probs[n * k + i], p, tolerance);
      gradient[order[i]] += 2 * p;
    }
    gradient[target[n]] -= 2;
    wrong += !close(loss[n], std::log(sum) - (row[target[n]] - row[order[0]]), tolerance);
    wrong += !close(lse[n], std::log(sum) + row[order[0]], tolerance);
    for (int64_t i = 0; i < classes; ++i)
      wrong += !close(dlogits[n * classes + i], gradient[i], of_gradient);
  }
  if (wrong)
    std::printf("%s %s: classes %ld, k %ld, kind %d: %d differences\n", isa.name,
                is_double   ? "f64"
                : is_narrow ? "bf16"
                            : "f32",
                static_cast<long>(classes), static_cast<long>(k), kind, wrong);
  return wrong != 0;
}

// The threshold regime against the list regime's order, and sums of weighted rows against plain loops.
template <class T> int check_threshold(const cpu::Isa& isa, int64_t classes, int64_t k, int kind) {
  constexpr bool is_double = sizeof(T) == 8;
  const double tolerance = is_double ? 1e-13 : 2e-6;
  std::mt19937 random(static_cast<unsigned>(classes * 17 + k * 5 + kind));
  const std::unique_ptr<T[]> logits(new T[classes]);
  for (int64_t i = 0; i < classes; ++i) logits[i] = static_cast<T>(value(random, kind));
  const int64_t target = static_cast<int64_t>(random() % static_cast<unsigned>(classes));
  T loss, lse, row_max, log_sum, cut, dloss = 2;
  int32_t cut_index, kept;
  std::vector<T> dlogits(classes, T{7});
  const cpu::Rows rows{logits.get(), is_double ? cpu::Dtype::f64 : cpu::Dtype::f32, classes, 1, 0,
                       classes};
  isa.threshold_forward({rows, k, 1.0, &target, nullptr, 0.0, &loss, &lse, &row_max, &log_sum, &cut,
                         &cut_index, &kept},
                        0, 1);
  isa.threshold_backward({&dloss, nullptr, rows, &target, &row_max, &log_sum, &cut, &cut_index,
                          &kept, nullptr, 0.0, dlogits.data()},
                         0, 1);
  const std::vector<double> row(logits.get(), logits.get() + classes);
  const auto order = order_of(row);
  double sum = 0;
  for (int64_t i = 0; i < k; ++i) sum += std::exp(row[order[i]] - row[order[0]]);
  std::vector<double> gradient(classes, 0.0);
  for (int64_t i = 0; i < k; ++i)
    gradient[order[i]] += 2 * std::exp(row[order[i]] - row[order[0]]) / sum;
  gradient[target] -= 2;
  int wrong = !close(loss, std::log(sum) - (row[target] - row[order[0]]), tolerance);
  wrong += (k < classes && cut_index != order[k - 1]) + (kept != k);
  for (int64_t i = 0; i < classes; ++i) wrong += !close(dlogits[i], gradient[i], 2 * tolerance);
  if (wrong)
    std::printf("%s threshold: classes %ld, k %ld, kind %d: %d differences\n", isa.name,
                static_cast<long>(classes), static_cast<long>(k), kind, wrong);
  return wrong != 0;
}

// Draws against cumulative sums of the softmax in double, up to its error in T.
template <class T> int check_tail(const cpu::Isa& isa, int64_t classes, int64_t k, int kind) {
  constexpr bool is_double = sizeof(T) == 8;
  constexpr int64_t samples = 7;
  // rounding down takes up to 2^-52 per class
  const double slack = is_double ? 1e-11 : 4e-6;
  std::mt19937 random(static_cast<unsigned>(classes * 29 + k * 3 + kind));
  const std::unique_ptr<T[]> logits(new T[classes]);
  for (int64_t i = 0; i < classes; ++i) logits[i] = static_cast<T>(value(random, kind));
  const int64_t target = static_cast<int64_t>(random() % static_cast<unsigned>(classes + 1));
  const T uniform = static_cast<T>(static_cast<double>(random() % 1024) / 1024);
  const std::vector<double> row(logits.get(), logits.get() + classes);
  const auto order = order_of(row);
  const std::unique_ptr<int32_t[]> indices(new int32_t[k]), draws(new int32_t[samples]);
  std::copy_n(order.begin(), k, indices.get());
  T row_max, log_sum, mass;
  isa.tail({{logits.get(), is_double ? cpu::Dtype::f64 : cpu::Dtype::f32, classes, 1, 0, classes},
            &target,
            indices.get(),
            k,
            &uniform,
            samples,
            &row_max,
            &log_sum,
            &mass,
            draws.get()},
           0, 1);
  double sum = 0;
  for (const double z : row) sum += std::exp(z - row[order[0]]);
  std::vector<double> p(classes, 0.0), after(classes);
  for (int64_t i = k; i < classes; ++i) {
    const int32_t c = order[i];
    if (c != target) p[c] = std::exp(row[c] - row[order[0]]) / sum;
  }
  std::partial_sum(p.begin(), p.end(), after.begin());
  const double in_tail = after.back();
  const bool drawn = in_tail > samples * 0x1p-52;
  int wrong = !close(log_sum, std::log(sum), slack) + !close(mass, in_tail, slack);
  for (int64_t j = 0; j < samples; ++j) {
    const int32_t c = draws[j];
    if (!drawn || c < 0 || c >= classes) {
      wrong += drawn || c != -1;
      continue;
    }
    const double place =
        (static_cast<double>(uniform) + static_cast<double>(j)) * in_tail / samples;
    wrong += p[c] == 0 || (j > 0 && draws[j - 1] > c);
    wrong += after[c] - p[c] > place + slack || place > after[c] + slack;
  }
  if (wrong)
    std::printf("%s tail %s: classes %ld, k %ld, kind %d: %d differences\n", isa.name,
                is_double ? "f64" : "f32", static_cast<long>(classes), static_cast<long>(k), kind,
                wrong);
  return wrong != 0;
}

int check_weighted_rows(const cpu::Isa& isa, int64_t width, int64_t count) {
  std::mt19937 random(static_cast<unsigned>(width * 3 + count));
  std::normal_distribution<float> normal;
  const std::unique_ptr<float[]> source(new float[5 * width]);
  for (int64_t i = 0; i < 5 * width; ++i) source[i] = normal(random);
  std::vector<float> g(count), out(width, 7.0f);
  std::vector<int32_t> index(count);
  for (int64_t p = 0; p < count; ++p) {
    g[p] = p % 7 ? normal(random) : 0.0f;
    index[p] = static_cast<int32_t>(random() % 5);
  }
  const int64_t start = 0;
  isa.weighted_rows({g.data(), index.data(), &start, &count, source.get(), cpu::Dtype::f32, width,
                     out.data(), cpu::Dtype::f32},
                    0, 1);
  int wrong = 0;
  for (int64_t i = 0; i < width; ++i) {
    double sum = 0, size = 0;
    for (int64_t p = 0; p < count; ++p) {
      sum += static_cast<double>(g[p]) * source[index[p] * width + i];
      size += std::abs(static_cast<double>(g[p]) * source[index[p] * width + i]);
    }
    wrong += !(std::abs(out[i] - sum) <= 6e-8 * static_cast<double>(count + 1) * size);
  }
  if (wrong)
    std::printf("%s weighted rows: width %ld, count %ld: %d differences\n", isa.name,
                static_cast<long>(width), static_cast<long>(count), wrong);
  return wrong != 0;
}

template <class T> int check_cosine(const cpu::Isa& isa, int64_t width, bool normalize) {
  constexpr bool is_double = sizeof(T) == 8;
  constexpr cpu::Dtype dtype = is_double ? cpu::Dtype::f64 : cpu::Dtype::f32;
  const double tolerance = is_double ? 1e-13 : 2e-6;
  std::mt19937 random(static_cast<unsigned>(width));
  std::normal_distribution<double> normal;
  // an element of padding after each vector of the table, two outputs: the second has no target
  const std::unique_ptr<T[]> output(new T[2 * width]), table(new T[3 * (width + 1)]);
  for (int64_t i = 0; i < 2 * width; ++i) output[i] = static_cast<T>(normal(random));
  for (int64_t i = 0; i < 3 * (width + 1); ++i) table[i] = static_cast<T>(normal(random));
  const int64_t target[2] = {2, 3};
  const cpu::Rows rows{output.get(), dtype, width, 2, 0, width};
  const cpu::Table vectors{table.get(), dtype, 3, width + 1};
  T loss[2], by_output[2], by_target[2];
  const T dloss[2] = {2, 2};
  std::vector<T> doutput(2 * width, T{7});
  isa.cosine_forward({rows, target, vectors, normalize, loss, by_output, by_target}, 0, 2);
  isa.cosine_backward({dloss, rows, target, vectors, by_output, by_target, doutput.data()}, 0, 2);
  const T *c = output.get(), *e = table.get() + 2 * (width + 1);
  double cc = 0, ee = 0, ce = 0, squares = 0;
  for (int64_t j = 0; j < width; ++j) {
    const double x = c[j], y = e[j];
    cc += x * x;
    ee += y * y;
    ce += x * y;
    squares += (x - y) * (x - y);
  }
  const double cosine = ce / std::sqrt(cc * ee);
  int wrong = !close(loss[0], normalize ? 1 - cosine : squares / 2, tolerance);
  wrong += !std::isnan(loss[1]);
  for (int64_t j = 0; j < width; ++j) {
    const double x = c[j], y = e[j];
    const double gradient = normalize ? cosine * x / cc - y / std::sqrt(cc * ee) : x - y;
    wrong += !close(doutput[j], 2 * gradient, 4 * tolerance) + (doutput[width + j] != 0);
  }
  if (wrong)
    std::printf("%s cosine: width %ld, normalize %d: %d differences\n", isa.name,
                static_cast<long>(width), normalize, wrong);
  return wrong != 0;
}

}  // namespace

int main() {
  int cases = 0, failures = 0;
  for (const cpu::Isa* isa : {&cpu::avx512, &cpu::avx2, &cpu::neon, &cpu::portable}) {
    if (!isa->supported()) {
      std::printf("%s: not on this processor\n", isa->name);
      continue;
    }
    for (int64_t classes : {1, 2, 7, 16, 31, 64, 100, 128, 257, 1000, 2049, 9001})
      for (int64_t k :
           {int64_t{1}, int64_t{2}, int64_t{11}, int64_t{20}, int64_t{100}, int64_t{700}, classes})
        for (int kind = 0; kind < 6 && k <= classes; ++kind) {
          failures += check<float>(*isa, classes, k, kind) + check<double>(*isa, classes, k, kind) +
                      check<Bfloat16>(*isa, classes, k, kind);
          failures += check_threshold<float>(*isa, classes, k, kind) +
                      check_threshold<double>(*isa, classes, k, kind);
          cases += 5;
          if (k == classes) continue;
          failures += check_tail<float>(*isa, classes, k, kind) +
                      check_tail<double>(*isa, classes, k, kind);
          cases += 2;
        }
    for (int64_t width : {1, 3, 16, 33, 100})
      for (int64_t count : {0, 1, 3, 4, 9, 300}) {
        failures += check_weighted_rows(*isa, width, count);
        ++cases;
      }
    for (int64_t width : {1, 3, 31, 32, 33, 300})
      for (bool normalize : {false, true}) {
        failures += check_cosine<float>(*isa, width, normalize) +
                    check_cosine<double>(*isa, width, normalize);
        cases += 2;
      }
  }
  std::printf("%d passed, %d failed\n", cases - failures, failures);
  return failures != 0;
}
