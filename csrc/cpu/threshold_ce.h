// What the CPU kernels of threshold_ce take. Statistics are float, or double for f64 logits.
#pragma once

#include "rows.h"

namespace sparse_ce::cpu {

struct ThresholdForward {
  Rows logits;
  int64_t k;
  double delta;           // 1 where k or nothing cuts
  const int64_t* target;  // (N)
  const void* weight;     // (classes) or null
  double label_smoothing;
  void* loss;          // (N)
  void* lse;           // (N)
  void* row_max;       // (N)
  void* log_sum;       // (N)
  void* cut;           // (N)
  int32_t* cut_index;  // (N)
  int32_t* kept;       // (N)
};

struct ThresholdBackward {
  const void* dloss;  // (N) or null
  const void* dlse;   // (N) or null
  Rows logits;
  const int64_t* target;     // (N)
  const void* row_max;       // (N)
  const void* log_sum;       // (N)
  const void* cut;           // (N)
  const int32_t* cut_index;  // (N)
  const int32_t* kept;       // (N)
  const void* weight;        // (classes) or null
  double label_smoothing;
  void* dlogits;  // (N, classes) of the dtype of the logits
};

}  // namespace sparse_ce::cpu
