// What the torch glue of every device shares: the checks and outputs of a forward, and arguments packed out of tensors. The structs
// of arguments are those of cpu/<stem>.h or cuda/<stem>.h, which name alike what they hold alike.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>

#include <algorithm>
#include <optional>
#include <tuple>

namespace sparse_ce {

using at::Tensor;

// loss, lse, indices, probs; of other stems others
using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <class Dtype> Dtype dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return Dtype::f32;
    case at::kBFloat16: return Dtype::bf16;
    case at::kHalf: return Dtype::f16;
    case at::kDouble: return Dtype::f64;
    default:
      TORCH_CHECK(false, "logits: expected float32, bfloat16, float16 or float64, got ", type);
  }
}

inline const void* pointer(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}

inline void check_logits(const Tensor& logits) {
  const int64_t dims = logits.dim();
  TORCH_CHECK(dims == 2 || dims == 3, "logits: expected (N, V) or (B, T, V), got ", dims,
              " dimensions");
  TORCH_CHECK(logits.stride(-1) == 1 || logits.size(-1) == 1,
              "logits: expected unit stride in the classes, got ", logits.stride(-1));
}

// Rows are those of cpu/rows.h or cuda/rows.h.
template <class Rows> Rows rows_of(const Tensor& logits) {
  Rows rows{};
  rows.data = logits.const_data_ptr();
  rows.classes = logits.size(-1);
  rows.inner = std::max<int64_t>(1, logits.size(-2));
  rows.outer_stride = logits.dim() == 3 ? logits.stride(0) : 0;
  rows.inner_stride = logits.stride(-2);
  return rows;
}

inline at::TensorOptions statistics_of(const Tensor& logits) {
  return logits.options().dtype(logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

inline void check_forward(const Tensor& logits, int64_t k) {
  check_logits(logits);
  TORCH_CHECK(1 <= k && k <= logits.size(-1), "k: expected 1 <= k <= ", logits.size(-1), ", got ",
              k);
}

// Not filled yet.
inline Outputs empty_outputs(const Tensor& logits, int64_t k) {
  check_forward(logits, k);
  auto shape = logits.sizes().slice(0, logits.dim() - 1).vec();
  const auto statistics = statistics_of(logits);
  Tensor loss = at::empty(shape, statistics), lse = at::empty(shape, statistics);
  shape.push_back(k);
  return {loss, lse, at::empty(shape, logits.options().dtype(at::kInt)),
          at::empty(shape, statistics)};
}

template <class Forward> Forward forward_arguments(const Tensor& logits, const Tensor& target,
                                                   const std::optional<Tensor>& weight, int64_t k,
                                                   double label_smoothing, const Outputs& outputs) {
  const auto& [loss, lse, indices, probs] = outputs;
  Forward arguments{};
  arguments.logits = rows_of<decltype(arguments.logits)>(logits);
  arguments.k = k;
  arguments.target = target.const_data_ptr<int64_t>();
  arguments.weight = pointer(weight);
  arguments.label_smoothing = label_smoothing;
  arguments.loss = loss.data_ptr();
  arguments.lse = lse.data_ptr();
  arguments.indices = indices.template data_ptr<int32_t>();
  arguments.probs = probs.data_ptr();
  return arguments;
}

// An upstream gradient may be expanded from a scalar; it has to outlive the arguments that point into it.
inline std::optional<Tensor> contiguous(const std::optional<Tensor>& upstream) {
  return upstream ? std::optional(upstream->contiguous()) : std::nullopt;
}

template <class Backward>
Backward backward_arguments(const std::optional<Tensor>& dloss, const std::optional<Tensor>& dlse,
                            const std::optional<Tensor>& dprobs, const Tensor& target,
                            const Tensor& indices, const Tensor& probs,
                            const std::optional<Tensor>& weight, double label_smoothing,
                            const Tensor& dlogits) {
  Backward arguments{};
  arguments.dloss = pointer(dloss);
  arguments.dlse = pointer(dlse);
  arguments.dprobs = pointer(dprobs);
  arguments.target = target.const_data_ptr<int64_t>();
  arguments.indices = indices.const_data_ptr<int32_t>();
  arguments.probs = probs.const_data_ptr();
  arguments.weight = pointer(weight);
  arguments.label_smoothing = label_smoothing;
  arguments.k = indices.size(-1);
  arguments.classes = dlogits.size(-1);
  arguments.dlogits = dlogits.data_ptr();
  arguments.dtype = dtype_of<decltype(arguments.dtype)>(dlogits.scalar_type());
  return arguments;
}

// loss, lse, row_max, log_sum, cut, cut_index, kept
using ThresholdOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Not filled yet.
inline ThresholdOutputs empty_threshold_outputs(const Tensor& logits, int64_t k) {
  check_forward(logits, k);
  const auto shape = logits.sizes().slice(0, logits.dim() - 1);
  const auto statistic = [&] { return at::empty(shape, statistics_of(logits)); };
  const auto count = [&] { return at::empty(shape, logits.options().dtype(at::kInt)); };
  return {statistic(), statistic(), statistic(), statistic(), statistic(), count(), count()};
}

template <class ThresholdForward>
ThresholdForward threshold_forward_arguments(const Tensor& logits, const Tensor& target,
                                             const std::optional<Tensor>& weight, int64_t k,
                                             double delta, double label_smoothing,
                                             const ThresholdOutputs& outputs) {
  const auto& [loss, lse, row_max, log_sum, cut, cut_index, kept] = outputs;
  ThresholdForward arguments{};
  arguments.logits = rows_of<decltype(arguments.logits)>(logits);
  arguments.k = k;
  arguments.delta = delta;
  arguments.target = target.const_data_ptr<int64_t>();
  arguments.weight = pointer(weight);
  arguments.label_smoothing = label_smoothing;
  arguments.loss = loss.data_ptr();
  arguments.lse = lse.data_ptr();
  arguments.row_max = row_max.data_ptr();
  arguments.log_sum = log_sum.data_ptr();
  arguments.cut = cut.data_ptr();
  arguments.cut_index = cut_index.template data_ptr<int32_t>();
  arguments.kept = kept.template data_ptr<int32_t>();
  return arguments;
}

template <class ThresholdBackward> ThresholdBackward threshold_backward_arguments(
    const std::optional<Tensor>& dloss, const std::optional<Tensor>& dlse, const Tensor& logits,
    const Tensor& target, const Tensor& row_max, const Tensor& log_sum, const Tensor& cut,
    const Tensor& cut_index, const Tensor& kept, const std::optional<Tensor>& weight,
    double label_smoothing, const Tensor& dlogits) {
  check_logits(logits);
  ThresholdBackward arguments{};
  arguments.dloss = pointer(dloss);
  arguments.dlse = pointer(dlse);
  arguments.logits = rows_of<decltype(arguments.logits)>(logits);
  arguments.target = target.const_data_ptr<int64_t>();
  arguments.row_max = row_max.const_data_ptr();
  arguments.log_sum = log_sum.const_data_ptr();
  arguments.cut = cut.const_data_ptr();
  arguments.cut_index = cut_index.const_data_ptr<int32_t>();
  arguments.kept = kept.const_data_ptr<int32_t>();
  arguments.weight = pointer(weight);
  arguments.label_smoothing = label_smoothing;
  arguments.dlogits = dlogits.data_ptr();
  return arguments;
}

// row_max, log_sum, mass, draws
using TailOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Not filled yet.
inline TailOutputs empty_tail_outputs(const Tensor& logits, int64_t samples) {
  check_logits(logits);
  TORCH_CHECK(samples >= 0, "samples: expected 0 <= samples, got ", samples);
  auto shape = logits.sizes().slice(0, logits.dim() - 1).vec();
  const auto statistic = [&] { return at::empty(shape, statistics_of(logits)); };
  const Tensor row_max = statistic(), log_sum = statistic(), mass = statistic();
  shape.push_back(samples);
  return {row_max, log_sum, mass, at::empty(shape, logits.options().dtype(at::kInt))};
}

template <class Tail> Tail tail_arguments(const Tensor& logits, const Tensor& target,
                                          const Tensor& indices,
                                          const std::optional<Tensor>& uniform, int64_t samples,
                                          const TailOutputs& outputs) {
  TORCH_CHECK(indices.is_contiguous() && indices.scalar_type() == at::kInt &&
                  indices.size(-1) < logits.size(-1),
              "indices: expected contiguous int32 of fewer classes than logits have, got ",
              indices.scalar_type(), indices.sizes());
  TORCH_CHECK(
      !uniform || (uniform->is_contiguous() && samples > 0 &&
                   uniform->scalar_type() == statistics_of(logits).dtype()),
      "uniform: expected contiguous numbers of the dtype of the statistics, and samples, got ",
      uniform->scalar_type(), " and samples = ", samples);
  const auto& [row_max, log_sum, mass, draws] = outputs;
  Tail arguments{};
  arguments.logits = rows_of<decltype(arguments.logits)>(logits);
  arguments.target = target.const_data_ptr<int64_t>();
  arguments.indices = indices.const_data_ptr<int32_t>();
  arguments.k = indices.size(-1);
  arguments.uniform = pointer(uniform);
  arguments.samples = samples;
  arguments.row_max = row_max.data_ptr();
  arguments.log_sum = log_sum.data_ptr();
  arguments.mass = mass.data_ptr();
  arguments.draws = draws.template data_ptr<int32_t>();
  return arguments;
}

// loss, negative, positive, cut_negative, cut_positive
using LabelsOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// Not filled yet.
inline LabelsOutputs empty_labels_outputs(const Tensor& logits) {
  check_logits(logits);
  const auto shape = logits.sizes().slice(0, logits.dim() - 1);
  const auto statistic = [&] { return at::empty(shape, statistics_of(logits)); };
  return {statistic(), statistic(), statistic(), statistic(), statistic()};
}

// What forward and backward are given alike.
template <class Arguments> Arguments labels_arguments(const Tensor& logits, const Tensor& labels) {
  check_logits(logits);
  TORCH_CHECK(labels.scalar_type() == at::kBool && labels.is_contiguous() &&
                  labels.sizes() == logits.sizes(),
              "labels: expected a contiguous bool tensor of the shape of logits, got ",
              labels.scalar_type(), labels.sizes(), " beside ", logits.sizes());
  Arguments arguments{};
  arguments.logits = rows_of<decltype(arguments.logits)>(logits);
  arguments.labels = labels.const_data_ptr<bool>();
  return arguments;
}

template <class LabelsForward>
LabelsForward labels_forward_arguments(const Tensor& logits, const Tensor& labels, double delta,
                                       const LabelsOutputs& outputs) {
  const auto& [loss, negative, positive, cut_negative, cut_positive] = outputs;
  auto arguments = labels_arguments<LabelsForward>(logits, labels);
  arguments.delta = delta;
  arguments.loss = loss.data_ptr();
  arguments.negative = negative.data_ptr();
  arguments.positive = positive.data_ptr();
  arguments.cut_negative = cut_negative.data_ptr();
  arguments.cut_positive = cut_positive.data_ptr();
  return arguments;
}

template <class LabelsBackward>
LabelsBackward labels_backward_arguments(const Tensor& dloss, const Tensor& logits,
                                         const Tensor& labels, const Tensor& negative,
                                         const Tensor& positive, const Tensor& cut_negative,
                                         const Tensor& cut_positive, const Tensor& dlogits) {
  auto arguments = labels_arguments<LabelsBackward>(logits, labels);
  arguments.dloss = dloss.const_data_ptr();
  arguments.negative = negative.const_data_ptr();
  arguments.positive = positive.const_data_ptr();
  arguments.cut_negative = cut_negative.const_data_ptr();
  arguments.cut_positive = cut_positive.const_data_ptr();
  arguments.dlogits = dlogits.data_ptr();
  return arguments;
}

// Of sparse_linear; `rows` are those that are summed, of the weight or of hidden.
inline void check_weighted_rows(const Tensor& coefficients, const Tensor& classes,
                                const Tensor& rows, at::ScalarType dtype) {
  const bool wide = rows.scalar_type() == at::kDouble;
  TORCH_CHECK(coefficients.scalar_type() == (wide ? at::kDouble : at::kFloat) &&
                  classes.scalar_type() == at::kInt && (dtype == at::kDouble) == wide,
              "sparse_linear: expected float coefficients and int32 classes, and double only "
              "beside double, got ",
              coefficients.scalar_type(), ", ", classes.scalar_type(), ", ", rows.scalar_type(),
              ", ", dtype);
  TORCH_CHECK(coefficients.dim() == 2 && coefficients.sizes() == classes.sizes() &&
                  rows.dim() == 2 && coefficients.is_contiguous() && classes.is_contiguous() &&
                  rows.is_contiguous(),
              "sparse_linear: expected contiguous (N, m) coefficients and classes, and two "
              "dimensions of rows, got ",
              coefficients.sizes(), ", ", classes.sizes(), ", ", rows.sizes());
}

// Of cosine.
template <class Table> Table table_of(const Tensor& embedding, const Tensor& output) {
  TORCH_CHECK(embedding.dim() == 2 && embedding.size(1) == output.size(-1) &&
                  (embedding.stride(1) == 1 || embedding.size(1) == 1),
              "embedding: expected (V, ", output.size(-1),
              ") with unit stride in the last dimension, got ", embedding.sizes());
  TORCH_CHECK((embedding.scalar_type() == at::kDouble) == (output.scalar_type() == at::kDouble),
              "embedding: expected double beside double and nowhere else, got ",
              embedding.scalar_type(), " beside ", output.scalar_type());
  Table table{};
  table.data = embedding.const_data_ptr();
  table.dtype = dtype_of<decltype(table.dtype)>(embedding.scalar_type());
  table.vectors = embedding.size(0);
  table.stride = embedding.stride(0);
  return table;
}

// What forward and backward are given alike.
template <class Arguments>
Arguments cosine_arguments(const Tensor& output, const Tensor& target, const Tensor& embedding) {
  const int64_t dims = output.dim();
  TORCH_CHECK((dims == 2 || dims == 3) && (output.stride(-1) == 1 || output.size(-1) == 1),
              "output: expected (N, D) or (B, T, D) with unit stride in the last dimension, got ",
              dims, " dimensions and stride ", output.stride(-1));
  Arguments arguments{};
  arguments.output = rows_of<decltype(arguments.output)>(output);
  arguments.target = target.const_data_ptr<int64_t>();
  arguments.table = table_of<decltype(arguments.table)>(embedding, output);
  return arguments;
}

// loss, by_output, by_target
using CosineOutputs = std::tuple<Tensor, Tensor, Tensor>;

// Not filled yet.
inline CosineOutputs empty_cosine_outputs(const Tensor& output, const Tensor& target) {
  const auto statistic = [&] { return at::empty(target.sizes(), statistics_of(output)); };
  return {statistic(), statistic(), statistic()};
}

template <class CosineForward>
CosineForward cosine_forward_arguments(const Tensor& output, const Tensor& target,
                                       const Tensor& embedding, bool normalize,
                                       const CosineOutputs& outputs) {
  const auto& [loss, by_output, by_target] = outputs;
  auto arguments = cosine_arguments<CosineForward>(output, target, embedding);
  arguments.normalize = normalize;
  arguments.loss = loss.data_ptr();
  arguments.by_output = by_output.data_ptr();
  arguments.by_target = by_target.data_ptr();
  return arguments;
}

template <class CosineBackward>
CosineBackward cosine_backward_arguments(const Tensor& dloss, const Tensor& output,
                                         const Tensor& target, const Tensor& embedding,
                                         const Tensor& by_output, const Tensor& by_target,
                                         const Tensor& doutput) {
  auto arguments = cosine_arguments<CosineBackward>(output, target, embedding);
  arguments.dloss = dloss.const_data_ptr();
  arguments.by_output = by_output.const_data_ptr();
  arguments.by_target = by_target.const_data_ptr();
  arguments.doutput = doutput.data_ptr();
  return arguments;
}

// Of plif.
inline void check_lines(const Tensor& slopes, const Tensor& offsets, const Tensor& x) {
  TORCH_CHECK(slopes.dim() == 1 && slopes.size(0) > 0 && slopes.sizes() == offsets.sizes(),
              "slopes: expected (K,) beside offsets of the same shape, got ", slopes.sizes(),
              " and ", offsets.sizes());
  TORCH_CHECK((slopes.scalar_type() == at::kDouble) == (x.scalar_type() == at::kDouble) &&
                  (slopes.scalar_type() == at::kDouble || slopes.scalar_type() == at::kFloat),
              "slopes: expected float32, float64 beside float64 alone, got ", slopes.scalar_type(),
              " beside ", x.scalar_type());
}

// A line lies in one place of the cache: slope beside offset.
inline Tensor lines_of(const Tensor& slopes, const Tensor& offsets, const Tensor& x) {
  check_lines(slopes, offsets, x);
  return at::stack({slopes, offsets}, -1);
}

// loss, lse, indices, probs, values
using PlifTopkOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// Not filled yet; beside the first four, the logits of the list and the target's.
inline Tensor empty_values(const Tensor& logits, int64_t k) {
  auto shape = logits.sizes().slice(0, logits.dim() - 1).vec();
  shape.push_back(k + 1);
  return at::empty(shape, statistics_of(logits));
}

template <class Arguments>
Arguments plif_arguments(const Tensor& lines, double bound, const Tensor& x) {
  TORCH_CHECK(x.is_contiguous(), "x: expected a contiguous tensor");
  Arguments arguments{};
  arguments.f = {lines.const_data_ptr(), lines.size(0), bound};
  arguments.x = x.const_data_ptr();
  arguments.dtype = dtype_of<decltype(arguments.dtype)>(x.scalar_type());
  arguments.elements = x.numel();
  return arguments;
}

template <class PlifForward> PlifForward plif_forward_arguments(const Tensor& lines, double bound,
                                                                const Tensor& x, const Tensor& y) {
  auto arguments = plif_arguments<PlifForward>(lines, bound, x);
  arguments.y = y.data_ptr();
  return arguments;
}

template <class PlifBackward>
PlifBackward plif_backward_arguments(const Tensor& lines, double bound, const Tensor& dy,
                                     const Tensor& x, const Tensor& dx) {
  TORCH_CHECK(dy.is_contiguous() && dy.sizes() == x.sizes() && dy.scalar_type() == x.scalar_type(),
              "dy: expected a contiguous tensor as x, got ", dy.scalar_type(), dy.sizes(),
              " beside ", x.scalar_type(), x.sizes());
  auto arguments = plif_arguments<PlifBackward>(lines, bound, x);
  arguments.dy = dy.const_data_ptr();
  arguments.dx = dx.data_ptr();
  return arguments;
}

// What forward and backward before the softmax are given alike.
template <class Arguments> Arguments plif_ce_arguments(const Tensor& lines, double bound,
                                                       const Tensor& logits, const Tensor& target,
                                                       const std::optional<Tensor>& weight,
                                                       double label_smoothing) {
  check_logits(logits);
  Arguments arguments{};
  arguments.f = {lines.const_data_ptr(), lines.size(0), bound};
  arguments.logits = rows_of<decltype(arguments.logits)>(logits);
  arguments.target = target.const_data_ptr<int64_t>();
  arguments.weight = pointer(weight);
  arguments.label_smoothing = label_smoothing;
  return arguments;
}

// Not filled yet: loss, lse, row_max, log_sum.
inline Outputs empty_plif_ce_outputs(const Tensor& logits) {
  const auto shape = logits.sizes().slice(0, logits.dim() - 1);
  const auto statistic = [&] { return at::empty(shape, statistics_of(logits)); };
  return {statistic(), statistic(), statistic(), statistic()};
}

template <class PlifCeForward>
PlifCeForward plif_ce_forward_arguments(const Tensor& lines, double bound, const Tensor& logits,
                                        const Tensor& target, const std::optional<Tensor>& weight,
                                        double label_smoothing, const Outputs& outputs) {
  const auto& [loss, lse, row_max, log_sum] = outputs;
  auto arguments =
      plif_ce_arguments<PlifCeForward>(lines, bound, logits, target, weight, label_smoothing);
  arguments.loss = loss.data_ptr();
  arguments.lse = lse.data_ptr();
  arguments.row_max = row_max.data_ptr();
  arguments.log_sum = log_sum.data_ptr();
  return arguments;
}

template <class PlifCeBackward> PlifCeBackward plif_ce_backward_arguments(
    const Tensor& lines, double bound, const std::optional<Tensor>& dloss,
    const std::optional<Tensor>& dlse, const Tensor& logits, const Tensor& target,
    const Tensor& row_max, const Tensor& log_sum, const std::optional<Tensor>& weight,
    double label_smoothing, const Tensor& dlogits) {
  auto arguments =
      plif_ce_arguments<PlifCeBackward>(lines, bound, logits, target, weight, label_smoothing);
  arguments.dloss = pointer(dloss);
  arguments.dlse = pointer(dlse);
  arguments.row_max = row_max.const_data_ptr();
  arguments.log_sum = log_sum.const_data_ptr();
  arguments.dlogits = dlogits.data_ptr();
  return arguments;
}

// dx or dlogits, cells, outside
using PlifGradients = std::tuple<Tensor, Tensor, Tensor>;

}  // namespace sparse_ce
