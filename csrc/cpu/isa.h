// The CPU kernels behind one table per instruction set. No torch headers: an IDE, a sanitizer or a C++ program can build
// these files alone.
#pragma once

#include "cosine.h"
#include "labels_ce.h"
#include "plif.h"
#include "sparse_linear.h"
#include "tail.h"
#include "threshold_ce.h"
#include "topk_ce.h"

namespace sparse_ce::cpu {

struct Isa {
  const char* name;
  bool (*supported)();
  void (*forward)(const Forward&, int64_t begin, int64_t end);  // rows [begin, end)
  void (*backward)(const Backward&, int64_t begin, int64_t end);
  void (*threshold_forward)(const ThresholdForward&, int64_t begin, int64_t end);
  void (*threshold_backward)(const ThresholdBackward&, int64_t begin, int64_t end);
  void (*tail)(const Tail&, int64_t begin, int64_t end);
  void (*labels_forward)(const LabelsForward&, int64_t begin, int64_t end);
  void (*labels_backward)(const LabelsBackward&, int64_t begin, int64_t end);
  void (*plif_slopes)(const PlifSlopes&, int64_t begin, int64_t end);  // cells
  void (*plif_topk_forward)(const PlifTopkForward&, int64_t begin, int64_t end);
  // null where nobody needs them; room for k + 1 addends per row and 16 more
  void (*plif_topk_backward)(const PlifTopkBackward&, PlifAddends*, int64_t begin, int64_t end);
  void (*plif_forward)(const PlifForward&, int64_t begin, int64_t end);  // elements
  void (*plif_backward)(const PlifBackward&, const PlifSums&, int64_t begin, int64_t end);
  void (*plif_ce_forward)(const PlifCeForward&, int64_t begin, int64_t end);
  void (*plif_ce_backward)(const PlifCeBackward&, const PlifSums&, int64_t begin, int64_t end);
  void (*weighted_rows)(const WeightedRows&, int64_t begin, int64_t end);
  void (*cosine_forward)(const CosineForward&, int64_t begin, int64_t end);
  void (*cosine_backward)(const CosineBackward&, int64_t begin, int64_t end);
};

// What the processors of this build never have.
constexpr Isa absent(const char* name) {
  Isa none{};
  none.name = name;
  none.supported = [] { return false; };
  return none;
}

// Best first; the last runs everywhere.
extern const Isa avx512;
extern const Isa avx2;
extern const Isa neon;
extern const Isa portable;

// The best of this processor, or the one that SPARSE_CE_CPU_ISA names. In isa.cpp, which knows torch's errors.
const Isa& isa();

}  // namespace sparse_ce::cpu
