// What the CPU kernels of cosine take. Statistics are float, or double where the output is f64; the table is f64 where the output is,
// and nowhere else.
#pragma once

#include "rows.h"

namespace sparse_ce::cpu {

// The vectors that targets name.
struct Table {
  const void* data;
  Dtype dtype;
  int64_t vectors;
  int64_t stride;  // elements from one vector to the next
};

struct CosineForward {
  Rows output;
  const int64_t* target;  // (N)
  Table table;
  bool normalize;
  void* loss;       // (N)
  void* by_output;  // (N)
  void* by_target;  // (N)
};

struct CosineBackward {
  const void* dloss;  // (N)
  Rows output;
  const int64_t* target;  // (N)
  Table table;
  const void* by_output;  // (N)
  const void* by_target;  // (N)
  void* doutput;          // (N, D) of the dtype of the output
};

}  // namespace sparse_ce::cpu
