// What the CPU kernels of topk_ce take.
#pragma once

#include "rows.h"

namespace sparse_ce::cpu {

// Statistics (weight, loss, lse, probs and their gradients) are float, or double for f64 logits.
struct Forward {
  Rows logits;
  int64_t k;
  const int64_t* target;  // (N)
  const void* weight;     // (classes) or null
  double label_smoothing;
  void* loss;        // (N)
  void* lse;         // (N)
  int32_t* indices;  // (N, k)
  void* probs;       // (N, k)
};

struct Backward {
  const void* dloss;       // (N) or null
  const void* dlse;        // (N) or null
  const void* dprobs;      // (N, k) or null
  const int64_t* target;   // (N)
  const int32_t* indices;  // (N, k)
  const void* probs;       // (N, k)
  const void* weight;      // (classes) or null
  double label_smoothing;
  int64_t k;
  int64_t classes;
  void* dlogits;  // (N, classes) of dtype
  Dtype dtype;
};

}  // namespace sparse_ce::cpu
