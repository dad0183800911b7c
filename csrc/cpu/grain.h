// How many rows make a task: long against its start, and short enough that rows spread over the threads.
#pragma once

#include <algorithm>
#include <cstdint>

namespace sparse_ce::cpu {

// Of rows that are read or written once, about 64 Ki elements.
inline int64_t rows_to_stream(int64_t classes) { return std::max<int64_t>(1, 65536 / classes); }

// Of rows of exponentials, about 16 Ki.
inline int64_t rows_of_exponentials(int64_t classes) {
  return std::max<int64_t>(1, 16384 / classes);
}

}  // namespace sparse_ce::cpu
