// Rows of logits in chunks of 16 bytes. A row begins at any class's address: the whole chunks in it are moved 16 bytes at a
// time, the classes before the first and after the last one by one.
#pragma once

#include "group.cuh"
#include "order.cuh"
#include "rows.h"

namespace sparse_ce::cuda {

template <class T> __device__ const T* row_of(const Rows& rows, int64_t row) {
  int64_t offset = row * rows.inner_stride;
  if (row >= rows.inner) {
    // both fit 32 bits: a division of 64 costs a short row a tenth of its time
    const auto number = static_cast<uint32_t>(row), inner = static_cast<uint32_t>(rows.inner);
    offset = number / inner * rows.outer_stride + number % inner * rows.inner_stride;
  }
  // in bytes, or else the compiler adds the offset anew to every index
  return reinterpret_cast<const T*>(static_cast<const char*>(rows.data) +
                                    offset * int64_t{sizeof(T)});
}

// Whether rows are made of vectors of so many classes.
template <class T> bool rows_are_of(const Rows& rows, int size) {
  return rows.classes % size == 0 && (rows.inner < 2 || rows.inner_stride % size == 0) &&
         (rows.count <= rows.inner || rows.outer_stride % size == 0) &&
         reinterpret_cast<uintptr_t>(rows.data) % (size * sizeof(T)) == 0;
}

// A target that is ignored is no class.
__device__ __forceinline__ bool is_class(int64_t target, int64_t classes) {
  return static_cast<uint64_t>(target) < static_cast<uint64_t>(classes);
}

// The classes before the first whole chunk, and how many of those there are.
struct Whole {
  int head;
  int count;
};

template <class T> __device__ __forceinline__ Whole whole_chunks(const T* row, int classes) {
  const int misaligned = static_cast<int>(bit_cast<uintptr_t>(row) % 16 / sizeof(T));
  const int to_aligned = misaligned == 0 ? 0 : Chunk<T>::kElements - misaligned;
  const int head = to_aligned < classes ? to_aligned : classes;
  // unsigned, or else the division rounds towards zero
  return {head, static_cast<int>(static_cast<unsigned>(classes - head) / Chunk<T>::kElements)};
}

// f(class) of the classes outside of the whole chunks, fewer than 2 chunks.
template <class T, int THREADS, class F>
__device__ __forceinline__ void for_each_edge(const Group<THREADS>& group, const Whole& whole,
                                              int classes, F f) {
  const int left = classes - whole.count * Chunk<T>::kElements;
  for (int i = group.rank; i < left; i += THREADS)
    f(i < whole.head ? i : i + whole.count * Chunk<T>::kElements);
}

// f(element, class) of all classes of a row, in any order.
template <class T, int THREADS, class F>
__device__ __forceinline__ void for_each_class(const Group<THREADS>& group, const T* row,
                                               int classes, F f) {
  // float64 takes twice the registers
  constexpr int kAtOnce = sizeof(T) == 8 ? 1 : 2;
  const Whole whole = whole_chunks(row, classes);
  const auto chunks = reinterpret_cast<const Chunk<T>*>(row + whole.head);
#pragma unroll 1
  for (int begin = group.rank; begin < whole.count; begin += kAtOnce * THREADS) {
    Chunk<T> x[kAtOnce];
#pragma unroll
    for (int c = 0; c < kAtOnce; ++c)
      if (begin + c * THREADS < whole.count) x[c] = chunks[begin + c * THREADS];
#pragma unroll
    for (int c = 0; c < kAtOnce; ++c) {
      const int first = whole.head + (begin + c * THREADS) * Chunk<T>::kElements;
      if (begin + c * THREADS < whole.count)
#pragma unroll
        for (int e = 0; e < Chunk<T>::kElements; ++e) f(element_of(x[c], e), first + e);
    }
  }
  for_each_edge<T>(group, whole, classes, [&](int i) { f(row[i], i); });
}

// What a group writes of a row of a gradient: the parts of a row meet between chunks.
struct Slice {
  Whole whole;     // of the row
  int begin, end;  // its whole chunks
  int low, high;   // its classes
};

template <class T>
__device__ __forceinline__ Slice slice_of(const T* row, int classes, int part, int parts) {
  const Whole whole = whole_chunks(row, classes);
  const int size = (whole.count + parts - 1) / parts;
  const int begin = part * size < whole.count ? part * size : whole.count;
  const int end = begin + size < whole.count ? begin + size : whole.count;
  const int low = part == 0 ? 0 : whole.head + begin * Chunk<T>::kElements;
  const int high = part == parts - 1 ? classes : whole.head + end * Chunk<T>::kElements;
  return {whole, begin, end, low, high};
}

// Where the parts of a row are on y of the grid.
template <class T> __device__ __forceinline__ Slice slice_of(const T* row, int classes) {
  return slice_of(row, classes, static_cast<int>(blockIdx.y), static_cast<int>(gridDim.y));
}

// f(class) of the slice's classes outside of its chunks.
template <class T, int THREADS, class F>
__device__ __forceinline__ void for_each_edge(const Group<THREADS>& group, const Slice& slice,
                                              F f) {
  const int first = slice.whole.head + slice.begin * Chunk<T>::kElements;
  const int last = slice.whole.head + slice.end * Chunk<T>::kElements;
  for (int i = slice.low + group.rank; i < first; i += THREADS) f(i);
  for (int i = last + group.rank; i < slice.high; i += THREADS) f(i);
}

template <class T, int THREADS>
__device__ __forceinline__ void fill_zeros(const Group<THREADS>& group, T* row,
                                           const Slice& slice) {
  const auto chunks = reinterpret_cast<Chunk<T>*>(row + slice.whole.head);
  const Chunk<T> zeros = {};
  for (int i = slice.begin + group.rank; i < slice.end; i += THREADS) chunks[i] = zeros;
  for_each_edge<T>(group, slice, [&](int i) { row[i] = T{}; });
}

// Rows that a warp has for itself, where longer ones have a block.
template <class T> bool is_short(int64_t classes) {
  return classes * static_cast<int64_t>(sizeof(T)) <= 8192;
}

// run(threads of a row), where the shortest share a warp: what a row costs once is then paid for eight or four of them. None of
// up to 8 KB takes a thread more than four turns of four chunks.
template <class T, class Run> void by_threads(int64_t classes, Run run) {
  const int64_t bytes = classes * static_cast<int64_t>(sizeof(T));
  if (bytes <= 512)
    run(std::integral_constant<int, 4>{});
  else if (bytes <= 2048)
    run(std::integral_constant<int, 8>{});
  else if (is_short<T>(classes))
    run(std::integral_constant<int, 32>{});
  else
    run(std::integral_constant<int, 256>{});
}

// Blocks that share a row of a gradient: one, unless a GPU would idle.
template <class T> unsigned parts_of_gradient(int64_t rows, int64_t classes) {
  const int64_t chunks = classes * static_cast<int64_t>(sizeof(T)) / 16;
  const int64_t parts = 1024 / rows < chunks / 1024 ? 1024 / rows : chunks / 1024;
  return parts < 1 ? 1 : static_cast<unsigned>(parts);
}

// Parts on y of the grid, of rows that have blocks to themselves.
template <class T, int THREADS> dim3 blocks_for_gradient(int64_t rows, int64_t classes) {
  dim3 grid = blocks_for<THREADS>(rows);
  if (!Group<THREADS>::kInWarp) grid.y = parts_of_gradient<T>(rows, classes);
  return grid;
}

}  // namespace sparse_ce::cuda
