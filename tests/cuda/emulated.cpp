// The kernels of csrc/cuda as plain functions for ctypes, emulated or over the runtime of runtime.h. Those that launch return null,
// or what went wrong.
#include <exception>
#include <string>

#include "cosine.h"
#include "labels_ce.h"
#include "plif.h"
#include "reduce.h"
#include "sparse_linear.h"
#include "tail.h"
#include "threshold_ce.h"
#include "topk_ce.h"
#ifndef SPARSE_CE_EMULATION
#include "runtime.h"
#endif

namespace {

template <class Launch> const char* error_of(Launch launch) {
  static std::string what;
  try {
    if (launch() == cudaSuccess) return nullptr;
    what = "the launch was refused";
  } catch (const std::exception& error) { what = error.what(); }
  return what.c_str();
}

}  // namespace

using namespace sparse_ce::cuda;

// The kernels launched since the last call, a line each.
extern "C" const char* kernels_launched() {
  static std::string names;
  names.clear();
  for (const std::string& name : emulation::launched) names += name + "\n";
  emulation::launched.clear();
  return names.c_str();
}
extern "C" int64_t topk_ce_scratch_bytes(const Forward* a) { return scratch_bytes(*a); }
extern "C" const char* topk_ce_forward(const Forward* a) {
  return error_of([&] { return forward(*a, nullptr); });
}
extern "C" const char* topk_ce_backward(const Backward* a) {
  return error_of([&] { return backward(*a, nullptr); });
}
extern "C" const char* threshold_ce_forward(const ThresholdForward* a) {
  return error_of([&] { return forward(*a, nullptr); });
}
extern "C" const char* threshold_ce_backward(const ThresholdBackward* a) {
  return error_of([&] { return backward(*a, nullptr); });
}
extern "C" const char* tail_forward(const Tail* a) {
  return error_of([&] { return forward(*a, nullptr); });
}
extern "C" const char* labels_ce_forward(const LabelsForward* a) {
  return error_of([&] { return forward(*a, nullptr); });
}
extern "C" const char* labels_ce_backward(const LabelsBackward* a) {
  return error_of([&] { return backward(*a, nullptr); });
}
extern "C" const char* sparse_linear_gather(const Gather* a) {
  return error_of([&] { return gather(*a, nullptr); });
}
extern "C" int64_t sparse_linear_scratch_bytes(const Segments* a) { return scratch_bytes(*a); }
extern "C" const char* sparse_linear_segments(const Segments* a) {
  return error_of([&] { return add_segments(*a, nullptr); });
}
extern "C" const char* cosine_forward(const CosineForward* a) {
  return error_of([&] { return forward(*a, nullptr); });
}
extern "C" const char* cosine_backward(const CosineBackward* a) {
  return error_of([&] { return backward(*a, nullptr); });
}
extern "C" int64_t plif_outside_parts(const PlifBackward* a) { return outside_parts(*a); }
extern "C" int64_t plif_ce_outside_parts(const PlifCeBackward* a) { return outside_parts(*a); }
extern "C" const char* plif_forward(const PlifForward* a) {
  return error_of([&] { return forward(*a, nullptr); });
}
extern "C" const char* plif_backward(const PlifBackward* a) {
  return error_of([&] { return backward(*a, nullptr); });
}
extern "C" const char* plif_ce_forward(const PlifCeForward* a) {
  return error_of([&] { return forward(*a, nullptr); });
}
extern "C" const char* plif_ce_backward(const PlifCeBackward* a) {
  return error_of([&] { return backward(*a, nullptr); });
}
extern "C" int64_t plif_topk_ce_outside_parts(const PlifTopkBackward* a) {
  return outside_parts(*a);
}
extern "C" const char* plif_topk_ce_forward(const PlifTopkForward* a) {
  return error_of([&] { return forward(*a, nullptr); });
}
extern "C" const char* plif_topk_ce_backward(const PlifTopkBackward* a) {
  return error_of([&] { return backward(*a, nullptr); });
}
extern "C" int64_t plif_tables_scratch_bytes(const PlifTables* a) { return scratch_bytes(*a); }
extern "C" const char* plif_tables(const PlifTables* a) {
  return error_of([&] { return make_tables(*a, nullptr); });
}
extern "C" int64_t plif_scale_scratch_bytes(const PlifScale* a) { return scratch_bytes(*a); }
extern "C" const char* plif_scale(const PlifScale* a) {
  return error_of([&] { return find_scale(*a, nullptr); });
}
extern "C" int64_t plif_dslopes_scratch_bytes(const PlifDslopes* a) { return scratch_bytes(*a); }
extern "C" const char* plif_dslopes(const PlifDslopes* a) {
  return error_of([&] { return make_dslopes(*a, nullptr); });
}
extern "C" int64_t reduce_scratch_bytes(const ReduceForward* a) { return scratch_bytes(*a); }
extern "C" const char* reduce_forward(const ReduceForward* a) {
  return error_of([&] { return forward(*a, nullptr); });
}
extern "C" const char* reduce_backward(const ReduceBackward* a) {
  return error_of([&] { return backward(*a, nullptr); });
}
