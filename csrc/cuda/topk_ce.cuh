// topk_ce in CUDA C++: the k largest logits of a row, their softmax, its loss and its gradient. The formulas and what is saved
// for backward stand in triton_kernels/topk_ce.py; the contract in python/sparse_ce/schema.py.
//
// A row belongs to a group: a warp (k <= 32, V <= 4096), or a block of 128 (k <= 128) or 512 threads (k <= 1024). Forward goes
// through these steps, and reads V * itemsize bytes per row from memory:
//
//   bound    a key that at least k classes reach, and few more. A short row lies in the registers of its group, and the bound
//            is found among all its keys. A longer one streams past: chunk q of 16 bytes belongs to segment q mod NSEG, a
//            thread keeps the maximum of each place of its segments in registers, one packed maximum per 4 bytes, and the
//            bound is found among the maxima. Interleaving spreads neighbours over the segments.
//   collect  the classes that reach the bound, listed in shared memory as integers (key, index) whose order is that of the
//            classes. Of a long row only the segments whose maximum reaches the bound are looked at again, from the cache.
//   sort     the list of k plus a few. The order in which atomics filled it does not matter.
//   finish   everything that forward returns, in a fixed order of additions.
//
// A list has an end and ties have none: a row that overflows it is read again in the order of the index, with the list sorted
// and cut to k when it is full. The bound then excludes all further ties, so that a constant row costs one more reading.
//
// Few rows: several blocks share one, each lists the best of its part, and a second kernel merges. k > 1024: radix select.
#pragma once

#include "group.cuh"
#include "list.cuh"
#include "order.cuh"
#include "rows.cuh"
#include "select.cuh"
#include "topk_ce.h"

namespace sparse_ce::cuda {

// Beyond it lists would leave shared memory.
constexpr int kMaxListK = 1024;
// Of all parts of a row together.
constexpr int kMaxCandidates = 2048;

// What a group works on: rows are on x of the grid, the parts of a row on y.
struct Part {
  int64_t row;
  int32_t first;  // class
  int32_t size;   // classes
  int64_t job;    // number of this part among all parts of all rows
};

template <int THREADS> __device__ Part part_of(const Forward& a, int part_size, int group) {
  using G = Group<THREADS>;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * G::kPerBlock + group;
  const int first = static_cast<int>(blockIdx.y) * part_size;
  const int left = static_cast<int>(a.logits.classes) - first;
  return {row, first, left < part_size ? left : part_size, row * gridDim.y + blockIdx.y};
}

// A key that at least k of the group's keys reach: at most k + k / 8 of them, or else the k-th largest itself. By bisection,
// with the keys in registers.
template <class Key, int COUNT, int THREADS>
__device__ Key bound_of(Group<THREADS>& group, const Key (&keys)[COUNT], int k) {
  Key low = keys[0], high = keys[0];
  for (int i = 1; i < COUNT; ++i) {
    low = keys[i] < low ? keys[i] : low;
    high = keys[i] > high ? keys[i] : high;
  }
  low = group.reduce(low, [](Key a, Key b) { return a < b ? a : b; });
  high = group.reduce(high, [](Key a, Key b) { return a > b ? a : b; });
  while (low < high) {
    // the mean rounded up, without overflow
    const Key middle = (low | high) - ((low ^ high) >> 1);
    int reached = 0;
    for (int i = 0; i < COUNT; ++i) reached += keys[i] >= middle;
    reached = group.sum(reached);
    if (reached >= k) {
      low = middle;
      if (reached <= k + k / 8) break;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// The place of each item in the descending order is the number of greater ones. Reads n * n / THREADS items, without a barrier.
constexpr int kShortSort = 256;

template <class Item, int THREADS>
__device__ void sort_short(Group<THREADS>& group, Shared<Item> list, int n) {
  constexpr int kMine = THREADS < kShortSort ? kShortSort / THREADS : 1;
  Item mine[kMine];
  int place[kMine];
  for (int i = 0; i < kMine; ++i) {
    const int at = i * THREADS + group.rank;
    mine[i] = list[at < n ? at : 0];
    place[i] = at < n ? 0 : n;
  }
  for (int j = 0; j < n; ++j) {
    const Item other = list[j];
    for (int i = 0; i < kMine; ++i)
      if (i * THREADS < n) place[i] += other > mine[i];
  }
  group.sync();
  for (int i = 0; i < kMine; ++i)
    if (place[i] < n) list[place[i]] = mine[i];
  group.sync();
}

// Bitonic, in place, of a power of two of items: in shared memory or in global memory.
template <class Item, class List, int THREADS>
__device__ void sort_bitonic(Group<THREADS>& group, List list, int size) {
  for (int width = 2; width <= size; width *= 2) {
    for (int distance = width / 2; distance > 0; distance /= 2) {
      for (int i = group.rank; i < size / 2; i += THREADS) {
        const int low = 2 * i - (i & (distance - 1)), high = low + distance;
        const Item a = list[low], b = list[high];
        const bool descending = (low & width) == 0;
        if ((b > a) == descending) {
          list[low] = b;
          list[high] = a;
        }
      }
      group.sync();
    }
  }
}

// Descending. The list is whole before and after.
template <class T, int THREADS>
__device__ void sort(Group<THREADS>& group, Shared<ItemOf<T>> list, int n) {
  if (n <= kShortSort) return sort_short<ItemOf<T>>(group, list, n);
  int size = 2 * kShortSort;
  while (size < n) size *= 2;
  for (int i = n + group.rank; i < size; i += THREADS) list[i] = last_item<T>();
  group.sync();
  sort_bitonic<ItemOf<T>>(group, list, size);
}

// The classes from the bound on, in the order of the index, for a row whose ties overflow the list. Once k are listed only
// better ones enter. Returns the length of the list.
template <class T, int LIST, int THREADS>
__device__ int collect_exactly(Group<THREADS>& group, Shared<ItemOf<T>> list, const T* row,
                               int first, int size, KeyOf<T> bound, int k) {
  ItemOf<T> last = item(bound, kNoIndex);
  int length = 0;
  group.set_length(0);
  for (int begin = 0; begin < size; begin += THREADS) {
    const int i = begin + group.rank;
    const ItemOf<T> candidate =
        item(i < size ? Order<T>::key(row[first + i]) : KeyOf<T>{}, first + i);
    bool keep = i < size && candidate > last;
    if (length + group.sum(keep) > LIST) {
      sort<T>(group, list, length);
      last = list[k - 1];
      length = k;
      keep = keep && candidate > last;
      group.set_length(k);
    }
    group.append(list, LIST, keep, candidate);
    length = group.length();
    group.sync();
  }
  return length;
}

// Everything that forward returns, from the k first classes of the row in their order.
template <class T, int THREADS, class List>
__device__ void finish(Group<THREADS>& group, List list, const Forward& a, int64_t n) {
  using Statistic = StatisticOf<T>;
  for (int rank = group.rank; rank < static_cast<int>(a.k); rank += THREADS)
    a.indices[n * a.k + rank] = ItemOf<T>(list[rank]).index();
  const int64_t target = a.target[n];
  Statistic at_target = 0;
  if (target >= 0 && target < a.logits.classes)
    at_target = Order<T>::value(Order<T>::key(row_of<T>(a.logits, n)[target]));
  list_softmax<Statistic>(
      group, a, n, [&](int rank) { return Order<T>::value(ItemOf<T>(list[rank]).key()); },
      at_target);
}

// From the filled list to the end: of the row, or of its part.
template <class T, int LIST, int THREADS>
__device__ void settle(Group<THREADS>& group, Shared<ItemOf<T>> list, int length, KeyOf<T> bound,
                       const Forward& a, const Part& part) {
  const int k = static_cast<int>(a.k);
  if (length > LIST)
    length = collect_exactly<T, LIST>(group, list, row_of<T>(a.logits, part.row), part.first,
                                      part.size, bound, k);
  sort<T>(group, list, length);
  if (gridDim.y == 1) return finish<T>(group, list, a, part.row);
  ItemOf<T>* best = static_cast<ItemOf<T>*>(a.scratch) + part.job * a.k;
  for (int rank = group.rank; rank < k; rank += THREADS) best[rank] = list[rank];
}

// A row that lies in registers, COUNT keys per thread.
template <class T, int THREADS, int COUNT, int LIST>
__global__ void __launch_bounds__(Group<THREADS>::kBlock, resident<T>(Group<THREADS>::kBlock))
    forward_short_kernel(const Forward a, int part_size) {
  using G = Group<THREADS>;
  GROUP_MEMORY(THREADS, group);
  SHARED_ARRAY(ItemOf<T>, lists, G::kPerBlock * LIST);
  const Part part = part_of<THREADS>(a, part_size, group.number);
  if (part.row >= a.logits.count) return;
  const Shared<ItemOf<T>> list = lists + group.number * LIST;
  const T* row = row_of<T>(a.logits, part.row);

  KeyOf<T> keys[COUNT];
  for (int i = 0; i < COUNT; ++i) {
    const int at = i * THREADS + group.rank;
    keys[i] = at < part.size ? Order<T>::key(row[at]) : -Order<T>::kInfinity;
  }
  const KeyOf<T> bound = bound_of(group, keys, static_cast<int>(a.k));
  group.set_length(0);
  for (int i = 0; i < COUNT; ++i) {
    const int at = i * THREADS + group.rank;
    group.append(list, LIST, at < part.size && keys[i] >= bound, item(keys[i], at));
  }
  settle<T, LIST>(group, list, group.length(), bound, a, part);
}

// The maxima of the pieces of a thread's segments, in registers, as the row streams past. A piece is a segment's chunk, or one
// of its units.
template <class T, int THREADS, int CHUNKS>
__device__ __forceinline__ void stream(const Group<THREADS>& group, const Chunk<T>* chunks,
                                       int count, Chunk<T> (&best)[CHUNKS]) {
  constexpr int kSegments = THREADS * CHUNKS;
  for (int s = 0; s < CHUNKS; ++s) best[s] = lowest_chunk<T>();
  const auto keep_larger = [](Chunk<T>& x, const Chunk<T>& y) {
    for (int u = 0; u < Chunk<T>::kUnits; ++u) x.unit[u] = Packed<T>::max(x.unit[u], y.unit[u]);
  };
  int begin = 0;
#pragma unroll 1
  for (; begin + kSegments <= count; begin += kSegments) {
    // all loads before the first maximum: that many are in flight
    Chunk<T> x[CHUNKS];
#pragma unroll
    for (int s = 0; s < CHUNKS; ++s) x[s] = chunks[begin + s * THREADS + group.rank];
#pragma unroll
    for (int s = 0; s < CHUNKS; ++s) keep_larger(best[s], x[s]);
  }
  if (begin < count) {
    Chunk<T> x[CHUNKS];
#pragma unroll
    for (int s = 0; s < CHUNKS; ++s) {
      const int at = begin + s * THREADS + group.rank;
      x[s] = at < count ? chunks[at] : lowest_chunk<T>();
    }
#pragma unroll
    for (int s = 0; s < CHUNKS; ++s) keep_larger(best[s], x[s]);
  }
}

// A row that streams past: CHUNKS segments per thread, PIECES to a chunk.
template <class T, int THREADS, int CHUNKS, int PIECES, int LIST>
__global__ void __launch_bounds__(Group<THREADS>::kBlock, resident<T>(Group<THREADS>::kBlock))
    forward_long_kernel(const Forward a, int part_size) {
  using G = Group<THREADS>;
  using Key = KeyOf<T>;
  constexpr int kSegments = THREADS * CHUNKS, kUnits = Chunk<T>::kUnits;
  constexpr int kElements = Chunk<T>::kElements / PIECES;  // of a piece
  constexpr int kMaxPieces = LIST < 2048 ? LIST : 2048;
  GROUP_MEMORY(THREADS, group);
  SHARED_ARRAY(ItemOf<T>, lists, G::kPerBlock * LIST);
  SHARED_ARRAY(int, all_pieces, G::kPerBlock* kMaxPieces);
  const Part part = part_of<THREADS>(a, part_size, group.number);
  if (part.row >= a.logits.count) return;
  const Shared<ItemOf<T>> list = lists + group.number * LIST;
  const Shared<int> pieces = all_pieces + group.number * kMaxPieces;
  const int k = static_cast<int>(a.k);

  // whole chunks begin `head` classes into the part
  const T* row = row_of<T>(a.logits, part.row) + part.first;
  const auto [head, count] = whole_chunks(row, part.size);
  const auto chunks = reinterpret_cast<const Chunk<T>*>(row + head);

  Key keys[CHUNKS * PIECES];
  {
    Chunk<T> best[CHUNKS];
    stream(group, chunks, count, best);
#pragma unroll
    for (int s = 0; s < CHUNKS; ++s) {
      if constexpr (PIECES == 1) {
        auto unit = best[s].unit[0];
        for (int u = 1; u < kUnits; ++u) unit = Packed<T>::max(unit, best[s].unit[u]);
        keys[s] = Order<T>::unit_key(unit);
      } else {
        static_assert(PIECES == kUnits);
        for (int u = 0; u < kUnits; ++u) keys[s * PIECES + u] = Order<T>::unit_key(best[s].unit[u]);
      }
    }
  }
  const Key bound = bound_of(group, keys, k);

  group.set_length(0);
#pragma unroll
  for (int s = 0; s < CHUNKS; ++s)
    for (int p = 0; p < PIECES; ++p)
      group.append(pieces, kMaxPieces, keys[s * PIECES + p] >= bound,
                   (s * THREADS + group.rank) * PIECES + p);
  const int width = group.length();
  const int tiles = (count + kSegments - 1) / kSegments;

  group.set_length(0);
  if (width <= kMaxPieces) {
    // piece `slot` of the list in tile `tile`, side by side
    int tile = group.rank / width, slot = group.rank % width;
    const int tile_step = THREADS / width, slot_step = THREADS % width;
    for (int begin = 0; begin < width * tiles; begin += THREADS) {
      const int piece = pieces[slot];
      const int at = tile * kSegments + piece / PIECES;
      const bool valid = tile < tiles && at < count;
      Chunk<T> chunk;
      if constexpr (PIECES == 1) {
        if (valid) chunk = chunks[at];
      } else {
        if (valid) chunk.unit[0] = chunks[at].unit[piece % PIECES];
      }
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        const Key key = valid ? element_key(chunk, e) : Key{};
        const int index =
            part.first + head + at * Chunk<T>::kElements + piece % PIECES * kElements + e;
        group.append(list, LIST, valid && key >= bound, item(key, index));
      }
      tile += tile_step;
      slot += slot_step;
      if (slot >= width) {
        slot -= width;
        ++tile;
      }
    }
    // the classes before the first and after the last whole chunk
    if (head > 0 || head + count * Chunk<T>::kElements < part.size) {
      for (int begin = 0; begin < 2 * Chunk<T>::kElements; begin += THREADS) {
        const int i = begin + group.rank, e = i - Chunk<T>::kElements;
        const int at = e < 0 ? i : head + count * Chunk<T>::kElements + e;
        const bool valid = e < 0 ? at < head : e < Chunk<T>::kElements && at < part.size;
        const Key key = valid ? Order<T>::key(row[at]) : Key{};
        group.append(list, LIST, valid && key >= bound, item(key, part.first + at));
      }
    }
  }
  const int length = width <= kMaxPieces ? group.length() : LIST + 1;
  settle<T, LIST>(group, list, length, bound, a, part);
}

// The parts of a row, each sorted and cut to k.
template <class T, int THREADS, int LIST>
__global__ void __launch_bounds__(THREADS, resident<T>(THREADS))
    forward_merge_kernel(const Forward a, int candidates) {
  GROUP_MEMORY(THREADS, group);
  SHARED_ARRAY(ItemOf<T>, list, LIST);
  const int64_t row = blockIdx.x;
  const ItemOf<T>* best = static_cast<const ItemOf<T>*>(a.scratch) + row * candidates;
  for (int i = group.rank; i < candidates; i += THREADS) list[i] = best[i];
  group.sync();
  sort<T>(group, list, candidates);
  finish<T>(group, list, a, row);
}

// k beyond the lists: the k-th key, then every class that precedes it and as many ties as are missing, lowest index first;
// sorted in scratch memory.
template <class T, int THREADS> __global__ void __launch_bounds__(THREADS, resident<T>(THREADS))
    forward_radix_kernel(const Forward a, int capacity) {
  GROUP_MEMORY(THREADS, group);
  const int64_t n = blockIdx.x;
  const T* row = row_of<T>(a.logits, n);
  const int classes = static_cast<int>(a.logits.classes), k = static_cast<int>(a.k);
  const Kth<KeyOf<T>> kth = kth_largest(group, row, classes, k);

  ItemOf<T>* best = static_cast<ItemOf<T>*>(a.scratch) + n * capacity;
  group.set_length(0);
  int ties = 0;  // before this block of classes
  for (int begin = 0; begin < classes; begin += THREADS) {
    const int i = begin + group.rank;
    const KeyOf<T> key = i < classes ? Order<T>::key(row[i]) : KeyOf<T>{};
    const bool tie = i < classes && key == kth.key;
    const int tie_rank = ties + group.count_before(tie);
    const bool keep = i < classes && (key > kth.key || (tie && tie_rank < kth.missing));
    group.append(best, capacity, keep, item(key, i));
    ties += group.sum(tie);
  }
  for (int i = k + group.rank; i < capacity; i += THREADS) best[i] = last_item<T>();
  group.sync();
  sort_bitonic<ItemOf<T>>(group, best, capacity);
  finish<T>(group, best, a, n);
}

// dlogits: zeros, and then the k + 1 numbers.
template <class T, int THREADS>
__global__ void __launch_bounds__(Group<THREADS>::kBlock, resident<T>(Group<THREADS>::kBlock))
    backward_kernel(const Backward a) {
  using G = Group<THREADS>;
  using Statistic = StatisticOf<T>;
  GROUP_MEMORY(THREADS, group);
  const int64_t n = static_cast<int64_t>(blockIdx.x) * G::kPerBlock + group.number;
  if (n >= a.count) return;
  const int classes = static_cast<int>(a.classes), k = static_cast<int>(a.k);
  // the classes of this part: full chunks, but at the ends of the row
  T* row = static_cast<T*>(a.dlogits) + n * a.classes;
  const Slice slice = slice_of(row, classes);
  fill_zeros(group, row, slice);

  const ListGradient<Statistic> gradient(group, a, n);
  // the zeros lie before the numbers
  group.sync();
  bool in_support = false;
  for (int rank = group.rank; rank < k; rank += THREADS) {
    const int index = gradient.indices[rank];
    in_support = in_support || gradient.is_target(index);
    if (index >= slice.low && index < slice.high) row[index] = Order<T>::element(gradient(rank));
  }
  const int found = group.sum(in_support);
  const int64_t target = gradient.target;
  if (group.rank == 0 && gradient.hit && found == 0 && target >= slice.low && target < slice.high)
    row[target] = Order<T>::element(0 - gradient.at_target);
}

template <class T> cudaError_t forward_rows(const Forward& arguments, cudaStream_t stream);
template <class T> cudaError_t backward_rows(const Backward& arguments, cudaStream_t stream);

// How many blocks share a row, and the classes of each: one, unless a GPU would idle.
struct Split {
  int parts;
  int size;
};

inline Split split_of(const Forward& a) {
  const auto smaller = [](int64_t x, int64_t y) { return x < y ? x : y; };
  const int64_t rows = a.logits.count > 0 ? a.logits.count : 1;
  const int64_t parts =
      smaller(smaller(a.logits.classes / 16384, kMaxCandidates / a.k), 256 / rows);
  if (parts < 2) return {1, static_cast<int>(a.logits.classes)};
  // parts begin at whole chunks of any dtype
  const int64_t size = ((a.logits.classes + parts - 1) / parts + 15) / 16 * 16;
  return {static_cast<int>((a.logits.classes + size - 1) / size), static_cast<int>(size)};
}

inline int radix_capacity(int64_t k) {
  int capacity = 1;
  while (capacity < k) capacity *= 2;
  return capacity;
}

template <int THREADS, class T>
void launch_rows(void (*kernel)(Forward, int), const Forward& a, Split split, cudaStream_t stream) {
  constexpr int kPerBlock = Group<THREADS>::kPerBlock;
  const auto blocks = static_cast<unsigned>((a.logits.count + kPerBlock - 1) / kPerBlock);
  launch(kernel, dim3(blocks, static_cast<unsigned>(split.parts)), Group<THREADS>::kBlock, stream,
         a, split.size);
  if (split.parts > 1)
    launch(forward_merge_kernel<T, 512, kMaxCandidates>,
           dim3(static_cast<unsigned>(a.logits.count)), 512, stream, a,
           static_cast<int>(split.parts * a.k));
}

// The tuning table. No GPU has chosen it; registers and spills of every row are in tests/cuda/resources.json.
template <class T> cudaError_t forward_rows(const Forward& a, cudaStream_t stream) {
  constexpr int kUnits = Chunk<T>::kUnits, kLongList = sizeof(ItemOf<T>) == 8 ? 4096 : 2048;
  const int64_t classes = a.logits.classes;
  if (a.k > kMaxListK) {
    launch(forward_radix_kernel<T, 1024>, dim3(static_cast<unsigned>(a.logits.count)), 1024, stream,
           a, radix_capacity(a.k));
    return cudaGetLastError();
  }
  const Split split = split_of(a);
  if (a.k <= 32 && classes <= 128)
    launch_rows<32, T>(forward_short_kernel<T, 32, 4, 128>, a, split, stream);
  else if (a.k <= 32 && classes <= 256)
    launch_rows<32, T>(forward_short_kernel<T, 32, 8, 256>, a, split, stream);
  else if (a.k <= 32 && classes <= 128 * Chunk<T>::kElements)
    launch_rows<32, T>(forward_long_kernel<T, 32, 4, 1, 256>, a, split, stream);
  else if (a.k <= 32 && classes <= 4096)
    launch_rows<32, T>(forward_long_kernel<T, 32, 8, 1, 256>, a, split, stream);
  else if (a.k <= 128 && classes <= 2048)
    launch_rows<128, T>(forward_short_kernel<T, 128, 16, 1024>, a, split, stream);
  else if (a.k <= 128)
    launch_rows<128, T>(forward_long_kernel<T, 128, 8, 1, 1024>, a, split, stream);
  else if (classes <= 4096)
    launch_rows<512, T>(forward_short_kernel<T, 512, 8, kLongList>, a, split, stream);
  else
    launch_rows<512, T>(forward_long_kernel<T, 512, 4, kUnits, kLongList>, a, split, stream);
  return cudaGetLastError();
}

template <class T> cudaError_t backward_rows(const Backward& a, cudaStream_t stream) {
  const auto rows = static_cast<unsigned>(a.count);
  if (is_short<T>(a.classes)) {
    launch(backward_kernel<T, 32>, dim3((rows + 3) / 4), 128, stream, a);
    return cudaGetLastError();
  }
  launch(backward_kernel<T, 256>, dim3(rows, parts_of_gradient<T>(a.count, a.classes)), 256, stream,
         a);
  return cudaGetLastError();
}

}  // namespace sparse_ce::cuda
