// What the CPU kernels of tail take. Statistics are float, or double for f64 logits.
#pragma once

#include "rows.h"

namespace sparse_ce::cpu {

struct Tail {
  Rows logits;
  const int64_t* target;   // (N)
  const int32_t* indices;  // (N, k), in the order of the list
  int64_t k;               // 1 <= k < classes
  const void* uniform;     // (N) in [0, 1), or null: without draws
  int64_t samples;
  void* row_max;   // (N)
  void* log_sum;   // (N)
  void* mass;      // (N)
  int32_t* draws;  // (N, samples)
};

}  // namespace sparse_ce::cpu
