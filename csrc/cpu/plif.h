// What the CPU kernels of plif take. T is float, or double for f64 data.
#pragma once

#include "topk_ce.h"

namespace sparse_ce::cpu {

// f(x) = slope x + offset in each of the cells that share [-bound, bound].
struct Plif {
  const void* lines;  // (cells, 2) T: slope, offset
  int64_t cells;
  double bound;
};

// The same in columns, where few look-ups are not worth an array of their own.
struct PlifColumns {
  const void* slopes;   // (cells) T
  const void* offsets;  // (cells) T
  int64_t cells;
  double bound;
};

// What the gradient of the slopes is made of. Integers: threads add to theirs in any order.
struct PlifSums {
  int64_t* cells;   // (cells, 2), added to; or null, where nobody needs them
  double* outside;  // (N, 2), of a row left of -bound and right of bound
  double scale;
};

// The addends of cells, where they are too few for a thread to bring sums of its own.
struct PlifAddends {
  int32_t* cell;
  int64_t *mass, *moment;
  int64_t count;
};

// Slopes from what is learnt.
struct PlifSlopes {
  const void* w;  // (cells)
  Dtype dtype;
  void* slopes;  // (cells)
  bool wide;     // double, else float
};

// f, element by element.
struct PlifForward {
  Plif f;
  const void* x;
  Dtype dtype;
  int64_t elements;
  void* y;  // as x
};

// A "row" is a piece of kPlifPiece elements, the last of what is left.
constexpr int64_t kPlifPiece = 4096;

struct PlifBackward {
  Plif f;
  const void* dy;  // as x
  const void* x;
  Dtype dtype;
  int64_t elements;
  void* dx;  // as x
};

// The k largest logits and the target's.
struct PlifTopkForward {
  Forward list;
  PlifColumns f;
  void* values;  // (N, k + 1)
};

struct PlifTopkBackward {
  Backward list;
  PlifColumns f;       // without offsets
  const void* values;  // (N, k + 1)
  double* outside;     // (N, 2)
  double scale;
};

// The dense softmax of f(logits).
struct PlifCeForward {
  Plif f;
  Rows logits;
  const int64_t* target;  // (N)
  const void* weight;     // (classes) or null
  double label_smoothing;
  void* loss;     // (N)
  void* lse;      // (N)
  void* row_max;  // (N)
  void* log_sum;  // (N)
};

struct PlifCeBackward {
  Plif f;
  const void* dloss;  // (N) or null
  const void* dlse;   // (N) or null
  Rows logits;
  const int64_t* target;  // (N)
  const void* row_max;    // (N)
  const void* log_sum;    // (N)
  const void* weight;     // (classes) or null
  double label_smoothing;
  void* dlogits;  // (N, classes) of the dtype of the logits
};

}  // namespace sparse_ce::cpu
