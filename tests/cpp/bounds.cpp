// The kernels of all stems on buffers of their exact size, in every dtype and with every option, for the sanitizers: what each
// promises to write is written, and nothing beside it. What the numbers are consumer.cpp and the tests in Python ask.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <random>

#include "cpu/isa.h"
#include "values.h"

namespace cpu = sparse_ce::cpu;

namespace {

constexpr unsigned char kUnwritten = 0x5A;
int failures = 0;

// Of an exact size on the heap, so that a sanitizer sees the first access beyond it.
template <class T> class Buffer {
 public:
  explicit Buffer(int64_t size) : size_(size), data_(new T[static_cast<size_t>(size)]) {
    std::memset(static_cast<void*>(data_.get()), kUnwritten, bytes());
  }
  operator T*() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_[i]; }

  void expect_written(const char* what) const {
    T unwritten;
    std::memset(static_cast<void*>(&unwritten), kUnwritten, sizeof(T));
    for (int64_t i = 0; i < size_; ++i)
      if (std::memcmp(&data_[i], &unwritten, sizeof(T)) == 0) {
        std::printf("%s: element %ld was not written\n", what, static_cast<long>(i));
        ++failures;
        return;
      }
  }
  void expect_in(int64_t low, int64_t high, const char* what) const {
    for (int64_t i = 0; i < size_; ++i)
      if (data_[i] < low || data_[i] >= high) {
        std::printf("%s: expected [%ld, %ld), got %ld\n", what, static_cast<long>(low),
                    static_cast<long>(high), static_cast<long>(data_[i]));
        ++failures;
        return;
      }
  }

 private:
  size_t bytes() const { return static_cast<size_t>(size_) * sizeof(T); }
  int64_t size_;
  std::unique_ptr<T[]> data_;
};

template <class T> constexpr cpu::Dtype kDtype = cpu::Dtype::f32;
template <> constexpr cpu::Dtype kDtype<double> = cpu::Dtype::f64;
template <> constexpr cpu::Dtype kDtype<Bfloat16> = cpu::Dtype::bf16;
template <> constexpr cpu::Dtype kDtype<_Float16> = cpu::Dtype::f16;

// Some rows of logits in T, statistics in S.
template <class T, class S>
void run(const cpu::Isa& isa, int64_t rows, int64_t classes, int64_t k, int kind, unsigned seed) {
  std::mt19937 random(seed);
  const auto below = [&](int64_t end) {
    return static_cast<int64_t>(random() % static_cast<unsigned>(end));
  };
  const int64_t stride = classes + below(3);  // the last row ends the buffer
  const Buffer<T> logits((rows - 1) * stride + classes);
  for (int64_t i = 0; i < (rows - 1) * stride + classes; ++i)
    logits[i] = static_cast<T>(3 * value(random, kind));
  const cpu::Rows z{static_cast<T*>(logits), kDtype<T>, classes, rows, 0, stride};
  const Buffer<int64_t> target(rows);  // hits and none
  for (int64_t n = 0; n < rows; ++n) target[n] = below(classes + 2) - 1;
  const Buffer<S> weights(classes), dloss(rows), dlse(rows), dprobs(rows * k), uniform(rows);
  for (int64_t i = 0; i < classes; ++i) weights[i] = static_cast<S>(below(100)) / 50;
  for (int64_t n = 0; n < rows; ++n) {
    dloss[n] = static_cast<S>(below(3)) - 1;
    dlse[n] = static_cast<S>(below(3)) - 1;
    uniform[n] = static_cast<S>(below(1000)) / 1000;
  }
  for (int64_t i = 0; i < rows * k; ++i) dprobs[i] = static_cast<S>(below(5)) - 2;
  const S* weight = below(2) ? static_cast<S*>(weights) : nullptr;
  const double smoothing = below(2) ? 0.1 : 0;

  const Buffer<S> loss(rows), lse(rows), probs(rows * k);
  const Buffer<int32_t> indices(rows * k);
  const cpu::Forward list{z,
                          k,
                          target,
                          weight,
                          smoothing,
                          static_cast<S*>(loss),
                          static_cast<S*>(lse),
                          indices,
                          static_cast<S*>(probs)};
  isa.forward(list, 0, rows);
  loss.expect_written("topk_ce loss");
  lse.expect_written("topk_ce lse");
  probs.expect_written("topk_ce probs");
  indices.expect_in(0, classes, "topk_ce indices");
  const Buffer<T> dlogits(rows * classes);
  const cpu::Backward above{static_cast<S*>(dloss),
                            static_cast<S*>(dlse),
                            below(2) ? static_cast<S*>(dprobs) : nullptr,
                            target,
                            indices,
                            static_cast<S*>(probs),
                            weight,
                            smoothing,
                            k,
                            classes,
                            static_cast<T*>(dlogits),
                            kDtype<T>};
  isa.backward(above, 0, rows);
  dlogits.expect_written("topk_ce gradient");

  const Buffer<S> row_max(rows), log_sum(rows);
  const auto threshold = [&](int64_t kept_classes, double delta) {
    const Buffer<S> of_row(rows), lse_of_row(rows), cut(rows);
    const Buffer<int32_t> cut_index(rows), kept(rows);
    isa.threshold_forward(
        {z, kept_classes, delta, target, weight, smoothing, static_cast<S*>(of_row),
         static_cast<S*>(lse_of_row), static_cast<S*>(row_max), static_cast<S*>(log_sum),
         static_cast<S*>(cut), cut_index, kept},
        0, rows);
    of_row.expect_written("threshold_ce loss");
    kept.expect_in(0, classes + 1, "threshold_ce kept");
    const Buffer<T> gradient(rows * classes);
    isa.threshold_backward(
        {static_cast<S*>(dloss), static_cast<S*>(dlse), z, target, static_cast<S*>(row_max),
         static_cast<S*>(log_sum), static_cast<S*>(cut), cut_index, kept, weight, smoothing,
         static_cast<T*>(gradient)},
        0, rows);
    gradient.expect_written("threshold_ce gradient");
  };
  threshold(k, 1);
  threshold(classes, 0);
  threshold(classes, 0.1);
  threshold(classes, 1);

  if (k < classes) {
    const int64_t samples = 1 + below(40);
    const Buffer<S> mass(rows);
    const Buffer<int32_t> draws(rows * samples);
    isa.tail({z, target, indices, k, static_cast<S*>(uniform), samples, static_cast<S*>(row_max),
              static_cast<S*>(log_sum), static_cast<S*>(mass), draws},
             0, rows);
    mass.expect_written("tail mass");
    draws.expect_in(-1, classes, "tail draws");
  }

  const Buffer<bool> labels(rows * classes);
  const int64_t share = below(5);
  for (int64_t i = 0; i < rows * classes; ++i) labels[i] = below(4) < share;
  for (const double delta : {0.0, 0.1, 1.0}) {
    const Buffer<S> of_row(rows), negative(rows), positive(rows), least(rows), largest(rows);
    isa.labels_forward(
        {z, labels, delta, static_cast<S*>(of_row), static_cast<S*>(negative),
         static_cast<S*>(positive), static_cast<S*>(least), static_cast<S*>(largest)},
        0, rows);
    of_row.expect_written("labels_ce loss");
    const Buffer<T> gradient(rows * classes);
    isa.labels_backward(
        {static_cast<S*>(dloss), z, labels, static_cast<S*>(negative), static_cast<S*>(positive),
         static_cast<S*>(least), static_cast<S*>(largest), static_cast<T*>(gradient)},
        0, rows);
    gradient.expect_written("labels_ce gradient");
  }

  // slopes of any size; the line through 0
  const int64_t cells = 1 + below(below(2) ? 5 : 300);
  const double bound = 5;
  const Buffer<T> w(cells);
  for (int64_t i = 0; i < cells; ++i) w[i] = static_cast<T>(value(random, 0));
  const Buffer<S> slopes(cells), offsets(cells), lines(2 * cells);
  isa.plif_slopes({static_cast<T*>(w), kDtype<T>, static_cast<S*>(slopes), sizeof(S) == 8}, 0,
                  cells);
  slopes.expect_written("plif slopes");
  for (int64_t i = 0; i < cells; ++i) {
    lines[2 * i] = slopes[i];
    lines[2 * i + 1] = offsets[i] = 0;
  }
  const cpu::Plif f{static_cast<S*>(lines), cells, bound};
  const cpu::PlifColumns columns{static_cast<S*>(slopes), static_cast<S*>(offsets), cells, bound};
  const double scale = 1e-30;  // no sum overflows
  const Buffer<double> outside(2 * rows);
  const Buffer<int64_t> sums(2 * cells);
  for (int64_t i = 0; i < 2 * cells; ++i) sums[i] = 0;
  // the sum of a row that is NaN is no number; what scales it makes it NaN, and integers may overflow before
  int64_t* counted = kind < 4 ? static_cast<int64_t*>(sums) : nullptr;

  const Buffer<S> values(rows * (k + 1));
  isa.plif_topk_forward({list, columns, static_cast<S*>(values)}, 0, rows);
  values.expect_written("plif values");
  const int64_t room = rows * (k + 1) + 16;
  const Buffer<int32_t> cell(room);
  const Buffer<int64_t> masses(room), moments(room);
  cpu::PlifAddends addends{cell, masses, moments, 0};
  const cpu::PlifTopkBackward linked{above, columns, static_cast<S*>(values), outside, scale};
  isa.plif_topk_backward(linked, &addends, 0, rows);
  dlogits.expect_written("plif gradient of a list");
  if (addends.count > rows * (k + 1)) ++failures;
  for (int64_t i = 0; i < addends.count; ++i)
    if (cell[i] < 0 || cell[i] >= cells) ++failures;
  isa.plif_topk_backward(linked, nullptr, 0, rows);

  isa.plif_ce_forward({f, z, target, weight, smoothing, static_cast<S*>(loss), static_cast<S*>(lse),
                       static_cast<S*>(row_max), static_cast<S*>(log_sum)},
                      0, rows);
  const Buffer<T> of_all(rows * classes);
  isa.plif_ce_backward(
      {f, static_cast<S*>(dloss), static_cast<S*>(dlse), z, target, static_cast<S*>(row_max),
       static_cast<S*>(log_sum), weight, smoothing, static_cast<T*>(of_all)},
      {counted, outside, scale}, 0, rows);
  of_all.expect_written("plif gradient of all");

  const int64_t elements = (rows - 1) * stride + classes,
                pieces = (elements - 1) / cpu::kPlifPiece + 1;
  const Buffer<T> y(elements), dx(elements);
  const Buffer<double> of_pieces(2 * pieces);
  isa.plif_forward({f, static_cast<T*>(logits), kDtype<T>, elements, static_cast<T*>(y)}, 0,
                   elements);
  y.expect_written("plif");
  isa.plif_backward(
      {f, static_cast<T*>(y), static_cast<T*>(logits), kDtype<T>, elements, static_cast<T*>(dx)},
      {counted, of_pieces, scale}, 0, pieces);
  dx.expect_written("plif gradient");
}

}  // namespace

int main() {
  int cases = 0;
  for (const cpu::Isa* isa : {&cpu::avx512, &cpu::avx2, &cpu::neon, &cpu::portable}) {
    if (!isa->supported()) continue;
    unsigned seed = 0;
    for (int64_t classes : {1, 2, 16, 17, 64, 65, 128, 129, 257, 1023, 4097})
      for (int64_t k :
           {int64_t{1}, int64_t{3}, int64_t{17}, int64_t{33}, int64_t{129}, classes - 1, classes})
        for (int kind = 0; kind < 6 && 1 <= k && k <= classes; ++kind) {
          const int64_t rows = classes < 300 ? 1 + seed % 37 : 1 + seed % 3;
          ++seed;
          run<float, float>(*isa, rows, classes, k, kind, seed);
          run<double, double>(*isa, rows, classes, k, kind, seed);
          run<Bfloat16, float>(*isa, rows, classes, k, kind, seed);
          run<_Float16, float>(*isa, rows, classes, k, kind, seed);
          cases += 4;
        }
  }
  std::printf("%d cases, %d failures\n", cases, failures);
  return failures != 0;
}
