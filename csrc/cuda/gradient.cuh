// topk_ce backward: the dense gradient of the logits, zeros but for the k + 1 numbers of a row.
//
// A row has some lanes of a warp, a warp, or blocks, which write zeros and then, over them, the numbers. Of short rows these are
// written nearly as often as the zeros, memory taking 32 bytes at a time: the rows of a block are put together in shared memory,
// and written once.
#pragma once

#include "list.cuh"

namespace sparse_ce::cuda {

// write(class, number) of the list and of the target, when zeros() has written those.
template <class S, int THREADS, class Zeros, class Write>
__device__ __forceinline__ void place_list(Group<THREADS>& group, const Backward& a, int64_t n,
                                           Zeros zeros, Write write) {
  const int k = static_cast<int>(a.k);
  // on their way while the zeros are written
  ListGradient<S> gradient(a, n);
  const bool listed = group.rank < k;
  const int first_index = listed ? gradient.indices[group.rank] : 0;
  const S first_prob = listed ? gradient.probs[group.rank] : S{0};
  zeros();

  gradient.prepare(group, a);
  bool in_support = listed && gradient.is_target(first_index);
  // without a branch, that they need not wait for each other
  for (int rank = group.rank + THREADS; rank < k; rank += THREADS)
    in_support |= gradient.is_target(gradient.indices[rank]);
  const int found = group.count(in_support);
  // the zeros lie before the numbers: a warp has met no barrier yet
  if constexpr (Group<THREADS>::kInWarp) group.sync();
  if (listed) write(first_index, gradient(group.rank, first_index, first_prob));
  for (int rank = group.rank + THREADS; rank < k; rank += THREADS) {
    const int index = gradient.indices[rank];
    write(index, gradient(rank, index, gradient.probs[rank]));
  }
  if (group.rank == 0 && gradient.hit && found == 0)
    write(static_cast<int>(gradient.target), 0 - gradient.at_target);
}

// Groups follow each other as their parts of the rows lie in memory, which it takes faster than as many rows at a time.
template <class T, int THREADS>
__global__ void __launch_bounds__(Group<THREADS>::kBlock, resident<T>(Group<THREADS>::kBlock))
    backward_kernel(const Backward a, int parts) {
  using G = Group<THREADS>;
  GROUP_MEMORY(THREADS, group);
  const uint32_t job = blockIdx.x * G::kPerBlock + group.number;
  const bool exists = job / parts < a.count;
  if (G::kLanes == 32 && !exists) return;
  const int64_t n = exists ? job / parts : a.count - 1;

  // the classes of this part: full chunks, but at the ends of the row
  T* row = static_cast<T*>(a.dlogits) + n * a.classes;
  const int classes = static_cast<int>(a.classes);
  const Slice slice =
      exists ? slice_of(row, classes, static_cast<int>(job % parts), parts) : Slice{};
  place_list<StatisticOf<T>>(
      group, a, n, [&] { fill_zeros(group, row, slice); },
      [&](int index, StatisticOf<T> g) {
        if (index >= slice.low && index < slice.high) row[index] = Order<T>::element(g);
      });
}

// Lanes of a row that is put together with the others of its block, BYTES of each at most.
constexpr int kTogetherLanes = 8;

template <class T, int BYTES>
__global__ void __launch_bounds__(Group<kTogetherLanes>::kBlock, sizeof(T) == 8 ? 6 : 8)
    backward_together_kernel(const Backward a) {
  using G = Group<kTogetherLanes>;
  constexpr int kElements = Chunk<T>::kElements;
  GROUP_MEMORY(kTogetherLanes, group);
  SHARED_CHUNKS(T, rows, G::kPerBlock * BYTES / sizeof(T));
  const int classes = static_cast<int>(a.classes);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * G::kPerBlock;
  const int count =
      a.count - first < G::kPerBlock ? static_cast<int>(a.count - first) : G::kPerBlock;
  const int size = count * classes;

  const auto zeros = [&] {
    // of groups without a row too
    for (int i = threadIdx.x; i < G::kPerBlock * classes / kElements; i += G::kBlock)
      store_chunk(rows + i * kElements, Chunk<T>{});
    __syncthreads();
  };
  const Shared<T> row = rows + group.number * classes;
  place_list<StatisticOf<T>>(group, a, group.row(a.count), zeros, [&](int index, StatisticOf<T> g) {
    row[index] = Order<T>::element(g);
  });
  __syncthreads();

  // they lie in memory as they do here, and begin at a whole chunk
  T* to = static_cast<T*>(a.dlogits) + first * a.classes;
  for (int i = threadIdx.x; i < size / kElements; i += G::kBlock)
    reinterpret_cast<Chunk<T>*>(to)[i] = load_chunk(rows + i * kElements);
  for (int i = size / kElements * kElements + threadIdx.x; i < size; i += G::kBlock)
    to[i] = rows[i];
}

template <class T> cudaError_t backward_rows(const Backward& a, cudaStream_t stream) {
  // Chunks of a part, 8 KB. A shorter row has a warp, or a quarter of one; where the list would be much of a part, parts are
  // longer.
  constexpr int64_t kPart = 512, kQuarter = 128;
  const int64_t bytes = a.classes * static_cast<int64_t>(sizeof(T)), chunks = bytes / 16;
  if (bytes <= 1024 && a.k <= 128) {
    const auto kernel =
        bytes <= 512 ? backward_together_kernel<T, 512> : backward_together_kernel<T, 1024>;
    launch(kernel, blocks_for<kTogetherLanes>(a.count), 128, stream, a);
    return cudaGetLastError();
  }
  if (chunks < kPart) {
    if (chunks < kQuarter && a.k <= 128)
      launch(backward_kernel<T, 8>, blocks_for<8>(a.count), 128, stream, a, 1);
    else
      launch(backward_kernel<T, 32>, blocks_for(a.count), 128, stream, a, 1);
    return cudaGetLastError();
  }
  const int64_t size = a.k * 4 > kPart ? a.k * 4 : kPart;
  const int parts = chunks < size ? 1 : static_cast<int>(chunks / size);
  launch(backward_kernel<T, 128>, dim3(static_cast<unsigned>(a.count * parts)), 128, stream, a,
         parts);
  return cudaGetLastError();
}

}  // namespace sparse_ce::cuda
