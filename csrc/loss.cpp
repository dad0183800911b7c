// A loss and its reduction as one node of autograd, on any device of the library. ops.py calls it where nobody but autograd listens:
// of few rows two nodes in Python take longer than their kernels. It composes operators, and computes nothing itself. Contract:
// python/sparse_ce/schema.py.
#include <ATen/TensorOperators.h>
#include <ATen/ops/add.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <tuple>

namespace sparse_ce {
namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

template <class Signature> c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// An operator of the library, and that of ops.py of the same name, which has a derivative.
template <class Result, class... Inputs> class Operator {
 public:
  Operator(const std::string& name)
      : plain_(find<Result(Inputs...)>(("sparse_ce_native::" + name).c_str())),
        differentiable_(find<Result(Inputs..., std::string_view)>(("sparse_ce::" + name).c_str())) {
  }

  Result operator()(Inputs... inputs) const { return plain_.call(inputs...); }

  // In a backward pass, which may be recorded itself.
  Result recorded(const std::string& backend, Inputs... inputs) const {
    return at::GradMode::is_enabled() ? differentiable_.call(inputs..., backend)
                                      : plain_.call(inputs...);
  }

 private:
  c10::TypedOperatorHandle<Result(Inputs...)> plain_;
  c10::TypedOperatorHandle<Result(Inputs..., std::string_view)> differentiable_;
};

Optional given(const Tensor& tensor) { return tensor.defined() ? Optional(tensor) : std::nullopt; }

struct Reduction {
  int64_t ignore_index;
  bool mean;
  std::string backend;

  std::tuple<Tensor, Tensor> forward(const Tensor& loss, const Tensor& target,
                                     const Optional& weight) const {
    static const Operator<std::tuple<Tensor, Tensor>, const Tensor&, const Tensor&, const Optional&,
                          int64_t, bool>
        reduce("reduce_fwd");
    return reduce(loss, target, weight, ignore_index, mean);
  }

  void save(AutogradContext* context) const {
    context->saved_data["ignore_index"] = ignore_index;
    context->saved_data["backend"] = backend;
  }
};

// The gradient of the losses of rows, of their reduction and of their own.
Optional of_rows(AutogradContext* context, const Tensor& dreduced, const Tensor& dloss,
                 const Tensor& target, const Tensor& divisor) {
  static const Operator<Tensor, const Tensor&, const Tensor&, const Tensor&, int64_t> reduce(
      "reduce_bwd");
  if (!dreduced.defined()) return given(dloss);
  const Tensor found =
      reduce.recorded(context->saved_data["backend"].toStringRef(), dreduced, target, divisor,
                      context->saved_data["ignore_index"].toInt());
  return dloss.defined() ? dloss + found : found;
}

struct TopkLoss : torch::autograd::Function<TopkLoss> {
  static variable_list forward(AutogradContext* context, const Tensor& logits, const Tensor& target,
                               const Optional& weight, int64_t k, double label_smoothing,
                               const Reduction& reduction) {
    static const Operator<std::tuple<Tensor, Tensor, Tensor, Tensor>, const Tensor&, const Tensor&,
                          const Optional&, c10::SymInt, double>
        topk_ce("topk_ce_fwd");
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto [loss, lse, indices, probs] = topk_ce(logits, target, weight, k, label_smoothing);
    const auto [reduced, divisor] = reduction.forward(loss, target, weight);
    reduction.save(context);
    context->saved_data["label_smoothing"] = label_smoothing;
    context->saved_data["classes"] = logits.size(-1);
    context->saved_data["dtype"] = logits.scalar_type();
    context->set_materialize_grads(false);
    context->save_for_backward(
        {target, indices, probs, weight.value_or(Tensor()), target, divisor});
    return {reduced, loss, lse, indices, probs};
  }

  static variable_list backward(AutogradContext* context, const variable_list& above) {
    static const Operator<Tensor, const Optional&, const Optional&, const Optional&, const Tensor&,
                          const Tensor&, const Tensor&, const Optional&, double, c10::SymInt,
                          at::ScalarType>
        topk_ce("topk_ce_bwd");
    auto& of = context->saved_data;
    const auto saved = context->get_saved_variables();
    const Tensor &target = saved[0], &indices = saved[1], &probs = saved[2];
    const Optional dloss = of_rows(context, above[0], above[1], saved[4], saved[5]);
    variable_list gradients(6);
    if (dloss || above[2].defined() || above[4].defined())
      gradients[0] = topk_ce.recorded(of["backend"].toStringRef(), dloss, given(above[2]),
                                      given(above[4]), target, indices, probs, given(saved[3]),
                                      of["label_smoothing"].toDouble(), of["classes"].toInt(),
                                      of["dtype"].toScalarType());
    return gradients;
  }
};

struct ThresholdLoss : torch::autograd::Function<ThresholdLoss> {
  static variable_list forward(AutogradContext* context, const Tensor& logits, const Tensor& target,
                               const Optional& weight, int64_t k, double delta,
                               double label_smoothing, const Reduction& reduction) {
    static const Operator<std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>,
                          const Tensor&, const Tensor&, const Optional&, c10::SymInt, double,
                          double>
        threshold_ce("threshold_ce_fwd");
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto [loss, lse, row_max, log_sum, cut, cut_index, kept] =
        threshold_ce(logits, target, weight, k, delta, label_smoothing);
    const auto [reduced, divisor] = reduction.forward(loss, target, weight);
    reduction.save(context);
    context->saved_data["label_smoothing"] = label_smoothing;
    context->set_materialize_grads(false);
    context->save_for_backward({logits, target, weight.value_or(Tensor()), row_max, log_sum, cut,
                                cut_index, kept, target, divisor});
    return {reduced, loss, lse, kept};
  }

  static variable_list backward(AutogradContext* context, const variable_list& above) {
    static const Operator<Tensor, const Optional&, const Optional&, const Tensor&, const Tensor&,
                          const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                          const Optional&, double>
        threshold_ce("threshold_ce_bwd");
    auto& of = context->saved_data;
    const auto saved = context->get_saved_variables();
    const Optional dloss = of_rows(context, above[0], above[1], saved[8], saved[9]);
    variable_list gradients(7);
    if (dloss || above[2].defined())
      gradients[0] =
          threshold_ce.recorded(of["backend"].toStringRef(), dloss, given(above[2]), saved[0],
                                saved[1], saved[3], saved[4], saved[5], saved[6], saved[7],
                                given(saved[2]), of["label_smoothing"].toDouble());
    return gradients;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> topk_ce_loss(
    const Tensor& logits, const Tensor& target, const Optional& weight, int64_t k,
    double label_smoothing, int64_t ignore_index, bool mean, c10::string_view backend) {
  const auto found = TopkLoss::apply(logits, target, weight, k, label_smoothing,
                                     Reduction{ignore_index, mean, std::string(backend)});
  return {found[0], found[1], found[2], found[3], found[4]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> threshold_ce_loss(
    const Tensor& logits, const Tensor& target, const Optional& weight, int64_t k, double delta,
    double label_smoothing, int64_t ignore_index, bool mean, c10::string_view backend) {
  const auto found = ThresholdLoss::apply(logits, target, weight, k, delta, label_smoothing,
                                          Reduction{ignore_index, mean, std::string(backend)});
  return {found[0], found[1], found[2], found[3]};
}

}  // namespace
}  // namespace sparse_ce

TORCH_LIBRARY_IMPL(sparse_ce_native, CompositeImplicitAutograd, m) {
  m.impl("topk_ce_loss", sparse_ce::topk_ce_loss);
  m.impl("threshold_ce_loss", sparse_ce::threshold_ce_loss);
}
