// What the CPU kernels of labels_ce take. Statistics are float, or double for f64 logits.
#pragma once

#include "rows.h"

namespace sparse_ce::cpu {

struct LabelsForward {
  Rows logits;
  const bool* labels;  // (N, classes)
  double delta;
  void* loss;          // (N)
  void* negative;      // (N)
  void* positive;      // (N)
  void* cut_negative;  // (N)
  void* cut_positive;  // (N)
};

struct LabelsBackward {
  const void* dloss;  // (N)
  Rows logits;
  const bool* labels;        // (N, classes)
  const void* negative;      // (N)
  const void* positive;      // (N)
  const void* cut_negative;  // (N)
  const void* cut_positive;  // (N)
  void* dlogits;             // (N, classes) of the dtype of the logits
};

}  // namespace sparse_ce::cpu
