// The operators on CUDA tensors: tensors in, pointers and the current stream out. Contract: python/sparse_ce/schema.py. Of
// torch only what knows no CUDA: this file compiles and links against a CPU build too.
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <tuple>

#include "cosine.h"
#include "glue.h"
#include "labels_ce.h"
#include "plif.h"
#include "reduce.h"
#include "sparse_linear.h"
#include "tail.h"
#include "threshold_ce.h"
#include "topk_ce.h"

// What the kernels were compiled for, sm_90,compute_90: machine code and PTX.
#ifndef SPARSE_CE_CUDA_ARCHITECTURES
#error "SPARSE_CE_CUDA_ARCHITECTURES: expected a list, sm_90,compute_90"
#endif
#define SPARSE_CE_TEXT(...) #__VA_ARGS__
#define SPARSE_CE_TEXT_OF(...) SPARSE_CE_TEXT(__VA_ARGS__)

namespace sparse_ce {
namespace {

std::string architectures() { return SPARSE_CE_TEXT_OF(SPARSE_CE_CUDA_ARCHITECTURES); }

cudaStream_t current_stream(at::Device device) {
  // the device guard speaks to the runtime of torch; the kernels are launched by one of their own
  const cudaError_t error = cudaSetDevice(device.index());
  TORCH_CHECK(error == cudaSuccess, "sparse_ce: ", cudaGetErrorString(error));
  const c10::impl::VirtualGuardImpl guard(device.type());
  return static_cast<cudaStream_t>(guard.getStream(device).native_handle());
}

template <class... Sizes> void check_launch(cudaError_t error, const Sizes&... sizes) {
  if (error == cudaSuccess) return;
  // else the next launch would report it again
  cudaGetLastError();
  TORCH_CHECK(false, "sparse_ce: the CUDA kernels were not launched, for ", sizes..., ": ",
              cudaGetErrorString(error));
}

// Freed before the kernels have run, which is right: the allocator hands it on in the order of the stream.
Tensor scratch_of(int64_t bytes, const Tensor& like) {
  return at::empty({bytes}, like.options().dtype(at::kByte));
}

Outputs topk_ce_fwd(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight,
                    int64_t k, double label_smoothing) {
  const c10::DeviceGuard guard(logits.device());
  const Outputs outputs = empty_outputs(logits, k);
  auto arguments =
      forward_arguments<cuda::Forward>(logits, target, weight, k, label_smoothing, outputs);
  arguments.dtype = dtype_of<cuda::Dtype>(logits.scalar_type());
  arguments.logits.count = target.numel();
  const Tensor scratch = scratch_of(cuda::scratch_bytes(arguments), logits);
  arguments.scratch = scratch.data_ptr();
  check_launch(cuda::forward(arguments, current_stream(logits.device())), target.numel(),
               " rows of ", logits.size(-1), " classes and k = ", k);
  return outputs;
}

Tensor topk_ce_bwd(const std::optional<Tensor>& dloss, const std::optional<Tensor>& dlse,
                   const std::optional<Tensor>& dprobs, const Tensor& target, const Tensor& indices,
                   const Tensor& probs, const std::optional<Tensor>& weight, double label_smoothing,
                   int64_t num_classes, at::ScalarType dtype) {
  const c10::DeviceGuard guard(probs.device());
  auto shape = probs.sizes().vec();
  shape.back() = num_classes;
  const Tensor dlogits = at::empty(shape, probs.options().dtype(dtype));
  const auto dloss_rows = contiguous(dloss), dlse_rows = contiguous(dlse),
             dprobs_rows = contiguous(dprobs);
  auto arguments = backward_arguments<cuda::Backward>(
      dloss_rows, dlse_rows, dprobs_rows, target, indices, probs, weight, label_smoothing, dlogits);
  arguments.count = target.numel();
  check_launch(cuda::backward(arguments, current_stream(probs.device())), target.numel(),
               " rows of ", num_classes, " classes and k = ", probs.size(-1));
  return dlogits;
}

ThresholdOutputs threshold_ce_fwd(const Tensor& logits, const Tensor& target,
                                  const std::optional<Tensor>& weight, int64_t k, double delta,
                                  double label_smoothing) {
  const c10::DeviceGuard guard(logits.device());
  const ThresholdOutputs outputs = empty_threshold_outputs(logits, k);
  auto arguments = threshold_forward_arguments<cuda::ThresholdForward>(
      logits, target, weight, k, delta, label_smoothing, outputs);
  arguments.dtype = dtype_of<cuda::Dtype>(logits.scalar_type());
  arguments.logits.count = target.numel();
  check_launch(cuda::forward(arguments, current_stream(logits.device())), target.numel(),
               " rows of ", logits.size(-1), " classes and k = ", k);
  return outputs;
}

Tensor threshold_ce_bwd(const std::optional<Tensor>& dloss, const std::optional<Tensor>& dlse,
                        const Tensor& logits, const Tensor& target, const Tensor& row_max,
                        const Tensor& log_sum, const Tensor& cut, const Tensor& cut_index,
                        const Tensor& kept, const std::optional<Tensor>& weight,
                        double label_smoothing) {
  const c10::DeviceGuard guard(logits.device());
  const Tensor dlogits = at::empty(logits.sizes(), logits.options());
  const auto dloss_rows = contiguous(dloss), dlse_rows = contiguous(dlse);
  auto arguments = threshold_backward_arguments<cuda::ThresholdBackward>(
      dloss_rows, dlse_rows, logits, target, row_max, log_sum, cut, cut_index, kept, weight,
      label_smoothing, dlogits);
  arguments.dtype = dtype_of<cuda::Dtype>(logits.scalar_type());
  arguments.logits.count = target.numel();
  check_launch(cuda::backward(arguments, current_stream(logits.device())), target.numel(),
               " rows of ", logits.size(-1), " classes");
  return dlogits;
}

TailOutputs tail_fwd(const Tensor& logits, const Tensor& target, const Tensor& indices,
                     const std::optional<Tensor>& uniform, int64_t samples) {
  const c10::DeviceGuard guard(logits.device());
  const TailOutputs outputs = empty_tail_outputs(logits, samples);
  auto arguments = tail_arguments<cuda::Tail>(logits, target, indices, uniform, samples, outputs);
  arguments.dtype = dtype_of<cuda::Dtype>(logits.scalar_type());
  arguments.logits.count = target.numel();
  check_launch(cuda::forward(arguments, current_stream(logits.device())), target.numel(),
               " rows of ", logits.size(-1), " classes, k = ", indices.size(-1), " and ", samples,
               " samples");
  return outputs;
}

LabelsOutputs labels_ce_fwd(const Tensor& logits, const Tensor& labels, double delta) {
  const c10::DeviceGuard guard(logits.device());
  const LabelsOutputs outputs = empty_labels_outputs(logits);
  auto arguments = labels_forward_arguments<cuda::LabelsForward>(logits, labels, delta, outputs);
  arguments.dtype = dtype_of<cuda::Dtype>(logits.scalar_type());
  arguments.logits.count = std::get<0>(outputs).numel();
  check_launch(cuda::forward(arguments, current_stream(logits.device())), arguments.logits.count,
               " rows of ", logits.size(-1), " classes");
  return outputs;
}

Tensor labels_ce_bwd(const Tensor& dloss, const Tensor& logits, const Tensor& labels,
                     const Tensor& negative, const Tensor& positive, const Tensor& cut_negative,
                     const Tensor& cut_positive) {
  const c10::DeviceGuard guard(logits.device());
  const Tensor dlogits = at::empty(logits.sizes(), logits.options());
  const Tensor dloss_rows = dloss.contiguous();
  auto arguments = labels_backward_arguments<cuda::LabelsBackward>(
      dloss_rows, logits, labels, negative, positive, cut_negative, cut_positive, dlogits);
  arguments.dtype = dtype_of<cuda::Dtype>(logits.scalar_type());
  arguments.logits.count = negative.numel();
  check_launch(cuda::backward(arguments, current_stream(logits.device())), negative.numel(),
               " rows of ", logits.size(-1), " classes");
  return dlogits;
}

Tensor sparse_linear_buffer(const Tensor& like, int64_t rows, int64_t num_classes) {
  return at::empty({rows, num_classes}, like.options());
}

Tensor sparse_linear_dhidden(const Tensor& coefficients, const Tensor& classes,
                             const Tensor& weight, at::ScalarType dtype) {
  check_weighted_rows(coefficients, classes, weight, dtype);
  const c10::DeviceGuard guard(weight.device());
  const int64_t tokens = classes.size(0), m = classes.size(1), width = weight.size(1);
  const Tensor dhidden = at::empty({tokens, width}, weight.options().dtype(dtype));
  cuda::Gather arguments{};
  arguments.coefficients = coefficients.const_data_ptr();
  arguments.classes = classes.const_data_ptr<int32_t>();
  arguments.source = weight.const_data_ptr();
  arguments.source_dtype = dtype_of<cuda::Dtype>(weight.scalar_type());
  arguments.tokens = tokens;
  arguments.m = m;
  arguments.width = width;
  arguments.out = dhidden.data_ptr();
  arguments.out_dtype = dtype_of<cuda::Dtype>(dtype);
  check_launch(cuda::gather(arguments, current_stream(weight.device())), tokens, " tokens of ", m,
               " classes and ", width, " features");
  return dhidden;
}

Tensor sparse_linear_dweight(const Tensor& coefficients, const Tensor& classes,
                             const Tensor& hidden, int64_t num_classes, at::ScalarType dtype) {
  check_weighted_rows(coefficients, classes, hidden, dtype);
  const c10::DeviceGuard guard(hidden.device());
  const int64_t width = hidden.size(1);
  const Tensor dweight = at::empty({num_classes, width}, hidden.options().dtype(dtype));
  // stable: the sum of a class then has one order. Nothing here waits for the GPU
  const auto [sorted, order] =
      at::sort(classes.view(-1), /*stable=*/std::optional<bool>(true), 0, false);
  const Tensor starts = at::searchsorted(sorted, at::arange(num_classes + 1, classes.options()));
  cuda::Segments arguments{};
  arguments.coefficients = coefficients.const_data_ptr();
  arguments.sorted = sorted.const_data_ptr<int32_t>();
  arguments.order = order.const_data_ptr<int64_t>();
  arguments.starts = starts.const_data_ptr<int64_t>();
  arguments.source = hidden.const_data_ptr();
  arguments.source_dtype = dtype_of<cuda::Dtype>(hidden.scalar_type());
  arguments.pairs = classes.numel();
  arguments.m = classes.size(1);
  arguments.classes = num_classes;
  arguments.width = width;
  arguments.out = dweight.data_ptr();
  arguments.out_dtype = dtype_of<cuda::Dtype>(dtype);
  const Tensor scratch = scratch_of(cuda::scratch_bytes(arguments), hidden);
  arguments.scratch = scratch.data_ptr();
  check_launch(cuda::add_segments(arguments, current_stream(hidden.device())), classes.numel(),
               " pairs, ", num_classes, " classes and ", width, " features");
  return dweight;
}

// The sum of the class weights, where a kernel wants it.
std::optional<Tensor> sum_of(const std::optional<Tensor>& weight, double label_smoothing) {
  if (!weight || label_smoothing == 0) return std::nullopt;
  return at::sum(*weight);
}

// Zeros for the cells; what lies outside, by parts, is not filled yet.
template <class Backward> std::tuple<Tensor, Tensor> add_sums(Backward& arguments,
                                                              const std::optional<Tensor>& scale,
                                                              const Tensor& slopes) {
  const Tensor cells =
      at::zeros({scale ? slopes.size(0) : 0, 2}, slopes.options().dtype(at::kLong));
  const Tensor outside = at::empty({scale ? cuda::outside_parts(arguments) : 0, 2},
                                   slopes.options().dtype(at::kDouble));
  if (scale)
    arguments.sums = {scale->const_data_ptr<double>(), cells.mutable_data_ptr<int64_t>(),
                      outside.mutable_data_ptr<double>()};
  return {cells, outside};
}

std::tuple<Tensor, Tensor> plif_tables(const Tensor& w, double bound, at::ScalarType dtype) {
  const c10::DeviceGuard guard(w.device());
  const Tensor learnt = w.contiguous(), slopes = at::empty(w.sizes(), w.options().dtype(dtype)),
               offsets = at::empty(w.sizes(), slopes.options());
  cuda::PlifTables arguments{};
  arguments.w = learnt.const_data_ptr();
  arguments.w_dtype = dtype_of<cuda::Dtype>(w.scalar_type());
  arguments.cells = w.numel();
  arguments.bound = bound;
  arguments.dtype = dtype_of<cuda::Dtype>(dtype);
  arguments.slopes = slopes.data_ptr();
  arguments.offsets = offsets.data_ptr();
  const Tensor scratch = scratch_of(cuda::scratch_bytes(arguments), w);
  arguments.scratch = scratch.data_ptr();
  check_launch(cuda::make_tables(arguments, current_stream(w.device())), w.numel(), " cells");
  return {slopes, offsets};
}

Tensor plif_scale(const std::optional<Tensor>& dloss, const std::optional<Tensor>& dlse,
                  const std::optional<Tensor>& dprobs, const Tensor& target,
                  const std::optional<Tensor>& weight, const Tensor& lse, int64_t num_classes) {
  const c10::DeviceGuard guard(lse.device());
  const auto dloss_rows = contiguous(dloss), dlse_rows = contiguous(dlse),
             dprobs_rows = contiguous(dprobs);
  const Tensor rows = lse.reshape({-1}), scale = at::empty({}, lse.options().dtype(at::kDouble));
  std::optional<Tensor> at_most;
  if (weight) at_most = at::linalg_vector_norm(*weight, std::numeric_limits<double>::infinity());
  cuda::PlifScale arguments{};
  arguments.dloss = pointer(dloss_rows);
  arguments.dlse = pointer(dlse_rows);
  arguments.dprobs = pointer(dprobs_rows);
  arguments.dtype = dtype_of<cuda::Dtype>(lse.scalar_type());
  arguments.target = target.const_data_ptr<int64_t>();
  arguments.at_most = pointer(at_most);
  arguments.lse = rows.const_data_ptr();
  arguments.lse_stride = rows.stride(0);
  arguments.rows = target.numel();
  arguments.k = dprobs ? dprobs->size(-1) : 0;
  arguments.classes = num_classes;
  arguments.scale = scale.mutable_data_ptr<double>();
  const Tensor scratch = scratch_of(cuda::scratch_bytes(arguments), lse);
  arguments.scratch = scratch.data_ptr();
  check_launch(cuda::find_scale(arguments, current_stream(lse.device())), target.numel(), " rows");
  return scale;
}

Tensor plif_dslopes(const Tensor& cells, const Tensor& outside, const Tensor& scale, double bound,
                    at::ScalarType dtype) {
  const c10::DeviceGuard guard(cells.device());
  const Tensor dslopes = at::empty({cells.size(0)}, cells.options().dtype(dtype));
  cuda::PlifDslopes arguments{};
  arguments.sums = cells.const_data_ptr<int64_t>();
  arguments.outside = outside.const_data_ptr<double>();
  arguments.scale = scale.const_data_ptr<double>();
  arguments.cells = cells.size(0);
  arguments.bound = bound;
  arguments.dtype = dtype_of<cuda::Dtype>(dtype);
  arguments.dslopes = dslopes.data_ptr();
  const Tensor scratch = scratch_of(cuda::scratch_bytes(arguments), cells);
  arguments.scratch = scratch.data_ptr();
  check_launch(cuda::make_dslopes(arguments, current_stream(cells.device())), cells.size(0),
               " cells");
  return dslopes;
}

Tensor plif_fwd(const Tensor& x, const Tensor& slopes, const Tensor& offsets, double bound) {
  const c10::DeviceGuard guard(x.device());
  const Tensor lines = lines_of(slopes, offsets, x), y = at::empty_like(x);
  const auto arguments = plif_forward_arguments<cuda::PlifForward>(lines, bound, x, y);
  check_launch(cuda::forward(arguments, current_stream(x.device())), x.numel(), " elements and ",
               slopes.size(0), " cells");
  return y;
}

PlifGradients plif_bwd(const Tensor& dy, const Tensor& x, const Tensor& slopes, double bound,
                       const std::optional<Tensor>& scale) {
  const c10::DeviceGuard guard(x.device());
  const Tensor lines = lines_of(slopes, slopes, x), dx = at::empty_like(x);
  auto arguments = plif_backward_arguments<cuda::PlifBackward>(lines, bound, dy, x, dx);
  const auto [cells, outside] = add_sums(arguments, scale, slopes);
  check_launch(cuda::backward(arguments, current_stream(x.device())), x.numel(), " elements and ",
               slopes.size(0), " cells");
  return {dx, cells, outside.sum(0)};
}

Outputs plif_ce_fwd(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight,
                    const Tensor& slopes, const Tensor& offsets, double bound,
                    double label_smoothing) {
  const c10::DeviceGuard guard(logits.device());
  const Tensor lines = lines_of(slopes, offsets, logits);
  const Outputs outputs = empty_plif_ce_outputs(logits);
  const auto weights = sum_of(weight, label_smoothing);
  auto arguments = plif_ce_forward_arguments<cuda::PlifCeForward>(lines, bound, logits, target,
                                                                  weight, label_smoothing, outputs);
  arguments.dtype = dtype_of<cuda::Dtype>(logits.scalar_type());
  arguments.logits.count = target.numel();
  arguments.weights = pointer(weights);
  check_launch(cuda::forward(arguments, current_stream(logits.device())), target.numel(),
               " rows of ", logits.size(-1), " classes and ", slopes.size(0), " cells");
  return outputs;
}

PlifGradients plif_ce_bwd(const std::optional<Tensor>& dloss, const std::optional<Tensor>& dlse,
                          const Tensor& logits, const Tensor& target, const Tensor& row_max,
                          const Tensor& log_sum, const std::optional<Tensor>& weight,
                          const Tensor& slopes, const Tensor& offsets, double bound,
                          double label_smoothing, const std::optional<Tensor>& scale) {
  const c10::DeviceGuard guard(logits.device());
  const Tensor lines = lines_of(slopes, offsets, logits),
               dlogits = at::empty(logits.sizes(), logits.options());
  const auto dloss_rows = contiguous(dloss), dlse_rows = contiguous(dlse),
             weights = sum_of(weight, label_smoothing);
  auto arguments = plif_ce_backward_arguments<cuda::PlifCeBackward>(
      lines, bound, dloss_rows, dlse_rows, logits, target, row_max, log_sum, weight,
      label_smoothing, dlogits);
  arguments.dtype = dtype_of<cuda::Dtype>(logits.scalar_type());
  arguments.logits.count = target.numel();
  arguments.weights = pointer(weights);
  const auto [cells, outside] = add_sums(arguments, scale, slopes);
  check_launch(cuda::backward(arguments, current_stream(logits.device())), target.numel(),
               " rows of ", logits.size(-1), " classes and ", slopes.size(0), " cells");
  return {dlogits, cells, outside.sum(0)};
}

cuda::PlifColumns columns_of(const Tensor& slopes, const Tensor& offsets, double bound) {
  return {slopes.const_data_ptr(), offsets.const_data_ptr(), slopes.size(0), bound};
}

PlifTopkOutputs plif_topk_ce_fwd(const Tensor& logits, const Tensor& target,
                                 const std::optional<Tensor>& weight, const Tensor& slopes,
                                 const Tensor& offsets, double bound, int64_t k,
                                 double label_smoothing) {
  const c10::DeviceGuard guard(logits.device());
  check_lines(slopes, offsets, logits);
  const Outputs outputs = empty_outputs(logits, k);
  const Tensor values = empty_values(logits, k);
  cuda::PlifTopkForward arguments{
      forward_arguments<cuda::Forward>(logits, target, weight, k, label_smoothing, outputs),
      columns_of(slopes, offsets, bound), values.data_ptr()};
  arguments.list.dtype = dtype_of<cuda::Dtype>(logits.scalar_type());
  arguments.list.logits.count = target.numel();
  const Tensor scratch = scratch_of(cuda::scratch_bytes(arguments.list), logits);
  arguments.list.scratch = scratch.data_ptr();
  check_launch(cuda::forward(arguments, current_stream(logits.device())), target.numel(),
               " rows of ", logits.size(-1), " classes, k = ", k, " and ", slopes.size(0),
               " cells");
  return std::tuple_cat(outputs, std::tuple(values));
}

PlifGradients plif_topk_ce_bwd(const std::optional<Tensor>& dloss,
                               const std::optional<Tensor>& dlse,
                               const std::optional<Tensor>& dprobs, const Tensor& target,
                               const Tensor& indices, const Tensor& probs, const Tensor& values,
                               const std::optional<Tensor>& weight, const Tensor& slopes,
                               double bound, double label_smoothing, int64_t num_classes,
                               at::ScalarType dtype, const std::optional<Tensor>& scale) {
  const c10::DeviceGuard guard(probs.device());
  check_lines(slopes, slopes, values);
  auto shape = probs.sizes().vec();
  shape.back() = num_classes;
  const Tensor dlogits = at::zeros(shape, probs.options().dtype(dtype));
  const auto dloss_rows = contiguous(dloss), dlse_rows = contiguous(dlse),
             dprobs_rows = contiguous(dprobs);
  cuda::PlifTopkBackward arguments{
      backward_arguments<cuda::Backward>(dloss_rows, dlse_rows, dprobs_rows, target, indices, probs,
                                         weight, label_smoothing, dlogits),
      columns_of(slopes, slopes, bound),
      values.const_data_ptr(),
      {}};
  arguments.list.count = target.numel();
  const auto [cells, outside] = add_sums(arguments, scale, slopes);
  check_launch(cuda::backward(arguments, current_stream(probs.device())), target.numel(),
               " rows of ", num_classes, " classes, k = ", probs.size(-1), " and ", slopes.size(0),
               " cells");
  return {dlogits, cells, outside.sum(0)};
}

CosineOutputs cosine_fwd(const Tensor& output, const Tensor& target, const Tensor& embedding,
                         bool normalize) {
  const c10::DeviceGuard guard(output.device());
  const CosineOutputs outputs = empty_cosine_outputs(output, target);
  auto arguments =
      cosine_forward_arguments<cuda::CosineForward>(output, target, embedding, normalize, outputs);
  arguments.dtype = dtype_of<cuda::Dtype>(output.scalar_type());
  arguments.output.count = target.numel();
  check_launch(cuda::forward(arguments, current_stream(output.device())), target.numel(),
               " rows of ", output.size(-1), " features");
  return outputs;
}

Tensor cosine_bwd(const Tensor& dloss, const Tensor& output, const Tensor& target,
                  const Tensor& embedding, const Tensor& by_output, const Tensor& by_target) {
  const c10::DeviceGuard guard(output.device());
  const Tensor doutput = at::empty(output.sizes(), output.options());
  const Tensor dloss_rows = dloss.contiguous();
  auto arguments = cosine_backward_arguments<cuda::CosineBackward>(
      dloss_rows, output, target, embedding, by_output, by_target, doutput);
  arguments.dtype = dtype_of<cuda::Dtype>(output.scalar_type());
  arguments.output.count = target.numel();
  check_launch(cuda::backward(arguments, current_stream(output.device())), target.numel(),
               " rows of ", output.size(-1), " features");
  return doutput;
}

std::tuple<Tensor, Tensor> reduce_fwd(const Tensor& loss, const Tensor& target,
                                      const std::optional<Tensor>& weight, int64_t ignore_index,
                                      bool mean) {
  const c10::DeviceGuard guard(loss.device());
  const Tensor losses = loss.contiguous();
  const Tensor reduced = at::empty({}, loss.options()), divisor = at::empty({}, loss.options());
  cuda::ReduceForward arguments{};
  arguments.loss = losses.const_data_ptr();
  arguments.dtype = dtype_of<cuda::Dtype>(loss.scalar_type());
  arguments.target = target.const_data_ptr<int64_t>();
  arguments.weight = pointer(weight);
  arguments.rows = target.numel();
  arguments.classes = weight ? weight->numel() : 0;
  arguments.ignore_index = ignore_index;
  arguments.mean = mean;
  const Tensor scratch = scratch_of(cuda::scratch_bytes(arguments), loss);
  arguments.scratch = scratch.data_ptr();
  arguments.reduced = reduced.data_ptr();
  arguments.divisor = divisor.data_ptr();
  check_launch(cuda::forward(arguments, current_stream(loss.device())), target.numel(), " rows");
  return {reduced, divisor};
}

Tensor reduce_bwd(const Tensor& dreduced, const Tensor& target, const Tensor& divisor,
                  int64_t ignore_index) {
  const c10::DeviceGuard guard(target.device());
  const Tensor dloss = at::empty(target.sizes(), dreduced.options());
  cuda::ReduceBackward arguments{};
  arguments.dreduced = dreduced.const_data_ptr();
  arguments.dtype = dtype_of<cuda::Dtype>(dreduced.scalar_type());
  arguments.target = target.const_data_ptr<int64_t>();
  arguments.divisor = divisor.const_data_ptr();
  arguments.rows = target.numel();
  arguments.ignore_index = ignore_index;
  arguments.dloss = dloss.data_ptr();
  check_launch(cuda::backward(arguments, current_stream(target.device())), target.numel(), " rows");
  return dloss;
}

}  // namespace
}  // namespace sparse_ce

TORCH_LIBRARY_IMPL(sparse_ce_native, CUDA, m) {
  m.impl("topk_ce_fwd", sparse_ce::topk_ce_fwd);
  m.impl("topk_ce_bwd", sparse_ce::topk_ce_bwd);
  m.impl("threshold_ce_fwd", sparse_ce::threshold_ce_fwd);
  m.impl("threshold_ce_bwd", sparse_ce::threshold_ce_bwd);
  m.impl("tail_fwd", sparse_ce::tail_fwd);
  m.impl("labels_ce_fwd", sparse_ce::labels_ce_fwd);
  m.impl("labels_ce_bwd", sparse_ce::labels_ce_bwd);
  m.impl("plif_tables", sparse_ce::plif_tables);
  m.impl("plif_scale", sparse_ce::plif_scale);
  m.impl("plif_dslopes", sparse_ce::plif_dslopes);
  m.impl("plif_fwd", sparse_ce::plif_fwd);
  m.impl("plif_bwd", sparse_ce::plif_bwd);
  m.impl("plif_ce_fwd", sparse_ce::plif_ce_fwd);
  m.impl("plif_ce_bwd", sparse_ce::plif_ce_bwd);
  m.impl("plif_topk_ce_fwd", sparse_ce::plif_topk_ce_fwd);
  m.impl("plif_topk_ce_bwd", sparse_ce::plif_topk_ce_bwd);
  m.impl("sparse_linear_buffer", sparse_ce::sparse_linear_buffer);
  m.impl("sparse_linear_dhidden", sparse_ce::sparse_linear_dhidden);
  m.impl("sparse_linear_dweight", sparse_ce::sparse_linear_dweight);
  m.impl("cosine_fwd", sparse_ce::cosine_fwd);
  m.impl("cosine_bwd", sparse_ce::cosine_bwd);
  m.impl("reduce_fwd", sparse_ce::reduce_fwd);
  m.impl("reduce_bwd", sparse_ce::reduce_bwd);
}

TORCH_LIBRARY_IMPL(sparse_ce_native, CompositeExplicitAutograd, m) {
  m.impl("cuda_architectures", sparse_ce::architectures);
}
