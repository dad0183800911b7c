// topk_ce in CUDA C++: the k largest logits of a row, their softmax, its loss and its gradient. The formulas and what is saved
// for backward stand in triton_kernels/topk_ce.py; the contract in python/sparse_ce/schema.py.
//
// Up to k = 128 a row of up to 16 KB belongs to some lanes of a warp, or to all of them (held.cuh; few.cuh where classes are so
// few that all are sorted), up to k = 32 one of up to 48 KB; else to a block of 128 (k <= 128) or 512 threads (k <= 1024; long
// rows from k = 33 on). Forward of a block goes through these steps, and reads V * itemsize bytes per row from memory:
//
//   bound    a key that at least k classes reach, and few more. A short row lies in the registers of its block, and the bound
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

#include "bound.cuh"
#include "gradient.cuh"
#include "held.cuh"
#include "select.cuh"

namespace sparse_ce::cuda {

// Beyond it lists would leave shared memory.
constexpr int kMaxListK = 1024;
// Of all parts of a row together.
constexpr int kMaxCandidates = 2048;

// What a block works on: rows are on x of the grid, the parts of a row on y.
struct Part {
  int64_t row;
  int32_t first;  // class
  int32_t size;   // classes

  // Number of this part among all parts of all rows.
  __device__ int64_t job() const { return row * gridDim.y + blockIdx.y; }
};

inline __device__ Part part_of(const Forward& a, int part_size) {
  const int first = static_cast<int>(blockIdx.y) * part_size;
  const int left = static_cast<int>(a.logits.classes) - first;
  return {blockIdx.x, first, left < part_size ? left : part_size};
}

// Of the bound: keys that a list may hold beyond k.
__device__ __forceinline__ int slack_of(int k) { return 4 + k / 8; }

// The place of each item in the descending order is the number of greater ones.
constexpr int kShortSort = 256;

template <class T, class Item, int THREADS>
__device__ void sort_short(Group<THREADS>& group, Shared<Item> list, int n) {
  constexpr int kMine = THREADS < kShortSort ? kShortSort / THREADS : 1;
  constexpr int kStep = 8;
  const int padded = (n + kStep - 1) / kStep * kStep;
  if (n + group.rank < padded) list[n + group.rank] = last_item<T, Item>();
  group.sync();
  Item mine[kMine];
  int place[kMine];
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    const int at = i * THREADS + group.rank;
    place[i] = at < n ? 0 : n;
    if (i * THREADS >= n) continue;
    mine[i] = list[at < n ? at : 0];
#pragma unroll 1
    for (int j = 0; j < padded; j += kStep)
#pragma unroll
      for (int e = 0; e < kStep; ++e) place[i] += Item(list[j + e]) > mine[i];
  }
  group.sync();
#pragma unroll
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
template <class T, class Item, int THREADS>
__device__ void sort(Group<THREADS>& group, Shared<Item> list, int n) {
  if (n <= kShortSort) return sort_short<T>(group, list, n);
  int size = 2 * kShortSort;
  while (size < n) size *= 2;
  for (int i = n + group.rank; i < size; i += THREADS) list[i] = last_item<T, Item>();
  group.sync();
  sort_bitonic<Item>(group, list, size);
}

// The classes from the bound on, in the order of the index, for a row whose ties overflow the list. Once k are listed only
// better ones enter. Returns the length of the list.
template <class T, int LIST, class Item, int THREADS>
__device__ int collect_exactly(Group<THREADS>& group, Shared<Item> list, const T* row, int first,
                               int size, KeyOf<T> bound, int k) {
  Item last = Item::of(bound, kNoIndex);
  int length = 0;
  group.set_length(0);
  for (int begin = 0; begin < size; begin += THREADS) {
    const int i = begin + group.rank;
    const Item candidate =
        Item::of(i < size ? Order<T>::key(row[first + i]) : KeyOf<T>{}, first + i);
    bool keep = i < size && candidate > last;
    if (length + group.count(keep) > LIST) {
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

// From the filled list to the end: of the row, or of its part.
template <class T, int LIST, class Item, int THREADS>
__device__ void finish_part(Group<THREADS>& group, Shared<Item> list, int length, KeyOf<T> bound,
                            const Forward& a, const Part& part, const Target<T>& target) {
  const int k = static_cast<int>(a.k);
  if (length > LIST)
    length = collect_exactly<T, LIST>(group, list, row_of<T>(a.logits, part.row), part.first,
                                      part.size, bound, k);
  sort<T>(group, list, length);
  if (gridDim.y == 1) return finish_list<T, Item>(group, list, a, part.row, target);
  Item* best = static_cast<Item*>(a.scratch) + part.job() * a.k;
  for (int rank = group.rank; rank < k; rank += THREADS) best[rank] = list[rank];
}

// A row that lies in registers, COUNT keys per thread.
template <class T, int THREADS, int COUNT, int LIST>
__global__ void __launch_bounds__(Group<THREADS>::kBlock, resident<T>(Group<THREADS>::kBlock))
    forward_short_kernel(const Forward a, int part_size) {
  using Item = ItemOf<T>;
  GROUP_MEMORY(THREADS, group);
  SHARED_ARRAY(Item, list, LIST);
  const Part part = part_of(a, part_size);
  const T* row = row_of<T>(a.logits, part.row);
  Target<T> target;
  target.load_index(a, part.row);

  KeyOf<T> keys[COUNT];
  for (int i = 0; i < COUNT; ++i) {
    const int at = i * THREADS + group.rank;
    keys[i] = at < part.size ? Order<T>::key(row[at]) : -Order<T>::kInfinity;
  }
  target.load_logit(a, row);
  const KeyOf<T> bound =
      bound_of(group, keys, static_cast<int>(a.k), slack_of(static_cast<int>(a.k)));
  group.set_length(0);
  for (int i = 0; i < COUNT; ++i) {
    const int at = i * THREADS + group.rank;
    group.append(list, LIST, at < part.size && keys[i] >= bound, Item::of(keys[i], at));
  }
  finish_part<T, LIST>(group, list, group.length(), bound, a, part, target);
}

// The maxima of the pieces of a thread's segments, in registers, as the row streams past. A piece is a segment's chunk, or one
// of its units.
template <class T, int THREADS, int CHUNKS>
__device__ __forceinline__ void stream(const Group<THREADS>& group, const Chunk<T>* chunks,
                                       int count, Chunk<T> (&best)[CHUNKS]) {
  constexpr int kSegments = THREADS * CHUNKS;
  const auto keep_larger = [](Chunk<T>& x, const Chunk<T>& y) {
    for (int u = 0; u < Chunk<T>::kUnits; ++u) x.unit[u] = Packed<T>::max(x.unit[u], y.unit[u]);
  };
  const auto chunk_at = [&](int at) { return at < count ? chunks[at] : lowest_chunk<T>(); };
  // the first tile, which may be all of the row
#pragma unroll
  for (int s = 0; s < CHUNKS; ++s) best[s] = chunk_at(s * THREADS + group.rank);
  int begin = kSegments;
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
    for (int s = 0; s < CHUNKS; ++s) x[s] = chunk_at(begin + s * THREADS + group.rank);
#pragma unroll
    for (int s = 0; s < CHUNKS; ++s) keep_larger(best[s], x[s]);
  }
}

// Lists what reaches the bound of a chunk, whose first class is `first`; where the bound is NaN, more.
template <class T, class Item, int THREADS, int N>
__device__ __forceinline__ void append_reaching(Group<THREADS>& group, Shared<Item> list,
                                                int capacity, const Chunk<T, N>& chunk, bool valid,
                                                StatisticOf<T> bound, int first) {
  unsigned reaching = 0;
  // by the values: a comparison costs less than a key, and holds for NaN
#pragma unroll
  for (int e = 0; e < N; ++e)
    if (!(number_of(element_of(chunk, e)) < bound)) reaching |= 1u << e;
  if (!valid) reaching = 0;
  // hardly any has more than one
  while (__any_sync(kAllLanes, reaching != 0)) {
    const int e = __ffs(static_cast<int>(reaching | 1u << (N - 1))) - 1;
    group.append(list, capacity, reaching != 0,
                 Item::of(Order<T>::key(element_at(chunk, e)), first + e));
    reaching &= reaching - 1;
  }
}

// A row that streams past: CHUNKS segments per thread, PIECES to a chunk.
template <class T, int THREADS, int CHUNKS, int PIECES, int LIST>
__global__ void __launch_bounds__(Group<THREADS>::kBlock, resident<T>(Group<THREADS>::kBlock))
    forward_long_kernel(const Forward a, int part_size) {
  using Item = ItemOf<T>;
  using Key = KeyOf<T>;
  constexpr int kSegments = THREADS * CHUNKS, kUnits = Chunk<T>::kUnits;
  constexpr int kElements = Chunk<T>::kElements / PIECES;  // of a piece
  constexpr int kMaxPieces = LIST < 2048 ? LIST : 2048;
  GROUP_MEMORY(THREADS, group);
  SHARED_ARRAY(Item, list, LIST);
  SHARED_ARRAY(int, pieces, kMaxPieces);
  const Part part = part_of(a, part_size);
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
  Target<T> target;
  target.load_index(a, part.row);
  const Key bound = bound_of(group, keys, k, slack_of(k));
  target.load_logit(a, row - part.first);

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
    // chunks that a thread loads before it looks at the first
    constexpr int kBatch = 4;
    for (int begin = 0; begin < width * tiles; begin += kBatch * THREADS) {
      Chunk<T, kElements> x[kBatch] = {};
      int first[kBatch];
      bool valid[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int piece = pieces[slot];
        const int at = tile * kSegments + piece / PIECES;
        valid[b] = tile < tiles && at < count;
        first[b] = part.first + head + at * Chunk<T>::kElements + piece % PIECES * kElements;
        if constexpr (PIECES == 1) {
          if (valid[b]) x[b] = chunks[at];
        } else {
          if (valid[b]) x[b].unit[0] = chunks[at].unit[piece % PIECES];
        }
        tile += tile_step;
        slot += slot_step;
        if (slot >= width) {
          slot -= width;
          ++tile;
        }
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b)
        append_reaching<T>(group, list, LIST, x[b], valid[b], Order<T>::value(bound), first[b]);
    }
    // the classes before the first and after the last whole chunk
    if (head > 0 || head + count * Chunk<T>::kElements < part.size) {
      for (int begin = 0; begin < 2 * Chunk<T>::kElements; begin += THREADS) {
        const int i = begin + group.rank, e = i - Chunk<T>::kElements;
        const int at = e < 0 ? i : head + count * Chunk<T>::kElements + e;
        const bool valid = e < 0 ? at < head : e < Chunk<T>::kElements && at < part.size;
        const Key key = valid ? Order<T>::key(row[at]) : Key{};
        group.append(list, LIST, valid && key >= bound, Item::of(key, part.first + at));
      }
    }
  }
  const int length = width <= kMaxPieces ? group.length() : LIST + 1;
  finish_part<T, LIST>(group, list, length, bound, a, part, target);
}

// The parts of a row, each sorted and cut to k.
template <class T, int THREADS, int LIST>
__global__ void __launch_bounds__(THREADS, resident<T>(THREADS))
    forward_merge_kernel(const Forward a, int candidates) {
  GROUP_MEMORY(THREADS, group);
  SHARED_ARRAY(ItemOf<T>, list, LIST);
  const int64_t row = blockIdx.x;
  const ItemOf<T>* best = static_cast<const ItemOf<T>*>(a.scratch) + row * candidates;
  Target<T> target;
  target.load_index(a, row);
  for (int i = group.rank; i < candidates; i += THREADS) list[i] = best[i];
  group.sync();
  target.load_logit(a, row_of<T>(a.logits, row));
  sort<T>(group, list, candidates);
  finish_list<T, ItemOf<T>>(group, list, a, row, target);
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
    group.append(best, capacity, keep, ItemOf<T>::of(key, i));
    ties += group.count(tie);
  }
  for (int i = k + group.rank; i < capacity; i += THREADS) best[i] = last_item<T, ItemOf<T>>();
  group.sync();
  sort_bitonic<ItemOf<T>>(group, best, capacity);
  Target<T> target;
  target.load_index(a, n);
  target.load_logit(a, row);
  finish_list<T, ItemOf<T>>(group, best, a, n, target);
}

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

template <class T> void launch_rows(void (*kernel)(Forward, int), int threads, const Forward& a,
                                    Split split, cudaStream_t stream) {
  const auto rows = static_cast<unsigned>(a.logits.count);
  launch(kernel, dim3(rows, static_cast<unsigned>(split.parts)), threads, stream, a, split.size);
  if (split.parts > 1)
    launch(forward_merge_kernel<T, 512, kMaxCandidates>, dim3(rows), 512, stream, a,
           static_cast<int>(split.parts * a.k));
}

// The tuning table: of rows that blocks have an H200 chose it up to k = 128, in bfloat16, of shorter ones counts of instructions.
// These, registers and spills of every row are in tests/cuda_resources.json.
template <class T> cudaError_t forward_rows(const Forward& a, cudaStream_t stream) {
  constexpr int kUnits = Chunk<T>::kUnits, kLongList = sizeof(ItemOf<T>) == 8 ? 4096 : 2048;
  const int64_t classes = a.logits.classes, chunks = classes / Chunk<T>::kElements;
  if (a.k > kMaxListK) {
    launch(forward_radix_kernel<T, 1024>, dim3(static_cast<unsigned>(a.logits.count)), 1024, stream,
           a, radix_capacity(a.k));
    return cudaGetLastError();
  }
  if (a.k <= 32 && classes <= kMaxFew) return forward_few<T>(a, stream);
  if (a.k <= kMaxHeldK && chunks <= (a.k <= kMaxStreamedK ? kMaxStreamedChunks : kMaxHeldChunks))
    return forward_held<T>(a, stream);
  const Split split = split_of(a);
  if (a.k <= 32 || (a.k <= 128 && chunks <= 8192))
    launch_rows<T>(forward_long_kernel<T, 128, 8, 1, 1024>, 128, a, split, stream);
  else if (a.k <= 128)
    launch_rows<T>(forward_long_kernel<T, 512, 4, 1, 1024>, 512, a, split, stream);
  else if (classes <= 4096)
    launch_rows<T>(forward_short_kernel<T, 512, 8, kLongList>, 512, a, split, stream);
  else
    launch_rows<T>(forward_long_kernel<T, 512, 4, kUnits, kLongList>, 512, a, split, stream);
  return cudaGetLastError();
}

}  // namespace sparse_ce::cuda
