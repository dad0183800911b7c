// What the CPU kernel of sparse_linear takes: sums of weighted rows. A gradient of hidden gathers rows of the weight, one of the
// weight rows of hidden.
#pragma once

#include "rows.h"

namespace sparse_ce::cpu {

// out[r] = sum of coefficients[p] * source[indices[p]] over p from starts[r] to ends[r], added in that order in float (in double for
// f64). A coefficient of 0 adds nothing, not even NaN.
struct WeightedRows {
  const void* coefficients;  // float, or double for f64 sources
  const int32_t* indices;
  const int64_t* starts;
  const int64_t* ends;
  const void* source;  // (., width)
  Dtype source_dtype;
  int64_t width;
  void* out;        // (., width)
  Dtype out_dtype;  // f64 if and only if the source is
};

}  // namespace sparse_ce::cpu
