// The CUDA kernels of plif on raw pointers and a stream. No torch headers, and none of CUDA's kernel language: what the
// glue, a C++ program or an IDE sees.
#pragma once

#include "topk_ce.h"

namespace sparse_ce::cuda {

// f(x) = slope x + offset in each of the cells that share [-bound, bound]. S is float, or double for f64 data.
struct Plif {
  const void* lines;  // (cells, 2) S: slope, offset; 16-byte aligned
  int64_t cells;      // at most 2^24
  double bound;
};

// The same in columns, where few look-ups are not worth an array of their own.
struct PlifColumns {
  const void* slopes;   // (cells) S
  const void* offsets;  // (cells) S
  int64_t cells;        // at most 2^24
  double bound;
};

// What the gradient of the slopes is made of.
struct PlifSums {
  const double* scale;  // () or null, where nobody needs them
  int64_t* cells;       // (cells, 2), added to
  double* outside;      // (outside_parts, 2), of each part left of -bound and right of bound
};

// f, element by element.
struct PlifForward {
  Plif f;
  const void* x;
  Dtype dtype;
  int64_t elements;
  void* y;  // as x
};

struct PlifBackward {
  Plif f;
  const void* dy;  // as x
  const void* x;
  Dtype dtype;
  int64_t elements;
  void* dx;  // as x
  PlifSums sums;
};

// The dense softmax of f(logits). Statistics are float, or double for f64 logits.
struct PlifCeForward {
  Plif f;
  Rows logits;
  Dtype dtype;
  const int64_t* target;  // (N)
  const void* weight;     // (classes) or null
  const void* weights;    // (), the sum of weight; or null, without weight or label smoothing
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
  Dtype dtype;
  const int64_t* target;  // (N)
  const void* row_max;    // (N)
  const void* log_sum;    // (N)
  const void* weight;     // (classes) or null
  const void* weights;    // (), the sum of weight; or null, without weight or label smoothing
  double label_smoothing;
  void* dlogits;  // (N, classes) of the dtype of the logits
  PlifSums sums;
};

// The k largest logits and the target's.
struct PlifTopkForward {
  Forward list;
  PlifColumns f;
  void* values;  // (N, k + 1)
};

struct PlifTopkBackward {
  Backward list;       // dlogits hold zeros
  PlifColumns f;       // without offsets
  const void* values;  // (N, k + 1)
  PlifSums sums;
};

// Slopes and offsets from what is learnt.
struct PlifTables {
  const void* w;  // (cells)
  Dtype w_dtype;
  int64_t cells;  // at most 2^24
  double bound;
  Dtype dtype;    // f32 or f64, of slopes and offsets
  void* scratch;  // scratch_bytes, 8-byte aligned
  void* slopes;   // (cells)
  void* offsets;  // (cells)
};

// The scale of PlifSums from the gradients of loss, lse and probs.
struct PlifScale {
  const void* dloss;      // (N) or null
  const void* dlse;       // (N) or null
  const void* dprobs;     // (N, k) or null
  Dtype dtype;            // f32 or f64, of all but targets and scale
  const int64_t* target;  // (N)
  const void* at_most;    // (), the largest |weight|; or null, without weight
  const void* lse;        // (N), lse_stride apart
  int64_t lse_stride;
  int64_t rows;
  int64_t k;
  int64_t classes;
  void* scratch;  // scratch_bytes, 8-byte aligned
  double* scale;  // ()
};

// The gradient of the slopes from what backward has summed.
struct PlifDslopes {
  const int64_t* sums;    // (cells, 2)
  const double* outside;  // (2)
  const double* scale;    // ()
  int64_t cells;          // at most 2^24
  double bound;
  Dtype dtype;    // f32 or f64
  void* scratch;  // scratch_bytes, 8-byte aligned
  void* dslopes;  // (cells)
};

// Of the arguments, all but the pointers are looked at.
int64_t outside_parts(const PlifBackward& arguments);
int64_t outside_parts(const PlifCeBackward& arguments);
int64_t outside_parts(const PlifTopkBackward& arguments);
int64_t scratch_bytes(const PlifTables& arguments);
int64_t scratch_bytes(const PlifScale& arguments);  // and whether there are dprobs
int64_t scratch_bytes(const PlifDslopes& arguments);

// All return before the kernels have run; what they return is the error of the launch, cudaErrorInvalidValue for sizes that
// are out of range.
cudaError_t forward(const PlifForward& arguments, cudaStream_t stream);
cudaError_t backward(const PlifBackward& arguments, cudaStream_t stream);
cudaError_t forward(const PlifCeForward& arguments, cudaStream_t stream);
cudaError_t backward(const PlifCeBackward& arguments, cudaStream_t stream);
cudaError_t forward(const PlifTopkForward& arguments, cudaStream_t stream);
cudaError_t backward(const PlifTopkBackward& arguments, cudaStream_t stream);
cudaError_t make_tables(const PlifTables& arguments, cudaStream_t stream);
cudaError_t find_scale(const PlifScale& arguments, cudaStream_t stream);
cudaError_t make_dslopes(const PlifDslopes& arguments, cudaStream_t stream);

}  // namespace sparse_ce::cuda
