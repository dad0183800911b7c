// topk_ce forward for up to 32 classes of at most 48 KB of logits, which a warp holds in its registers, tile by tile, from the
// only look at them to the end. Short rows are bound by instructions, not by memory; a row up to 16 KB is one tile.
//
//   bound    of the first tile: found among 64 maxima, two of each lane. From then on, the k-th of the tiles before.
//   collect  a bit for each class that reaches it; then a list of these in shared memory.
//   sort     between registers, 32 at a time: first 32, and with them, as long as more are listed, the next 32 merged.
//   finish   each lane has the class of its rank.
//
// Where more reach the bound than a list holds, the maxima of that tile raise it. What are still too many then are ties: the
// tile is read again in the order of the index, 32 classes at a time.
#pragma once

#include "bound.cuh"
#include "few.cuh"

namespace sparse_ce::cuda {

// Up to 16 KB an H200 was faster so than by a block. Beyond, where a row streams, it was not timed: the limit is an estimate.
constexpr int kMaxHeldK = 32, kMaxHeldChunks = 3072;
constexpr int kHeldList = 128;

// The classes from first to last, whatever ties there are.
template <class T, class Item>
__device__ void add_classes(Sorted<Item, 32>& best, const T* row, int first, int last, int lane) {
#pragma unroll 1
  for (int begin = first; begin < last; begin += 32) {
    const int i = begin + lane;
    Sorted<Item, 32> more = {
        {i < last ? Item::of(Order<T>::key(row[i]), i) : last_item<T, Item>()}};
    if (__any_sync(kAllLanes, more.items[0] > of_lane(best.items[0], 31))) {
      more.sort(lane);
      best.merge(more, lane);
    }
  }
}

// Everything that forward returns, each lane having the class of its rank.
template <class T, class Item>
__device__ __forceinline__ void finish_lanes(Group<32>& group, const Forward& a, int64_t n,
                                             const T* row, Target<T> target, Item best) {
  target.load_logit(a, row);
  if (group.rank < a.k) a.indices[n * a.k + group.rank] = best.index();
  const auto own = Order<T>::value(best.key());
  list_softmax<StatisticOf<T>, true>(
      group, a, n, [&](int) { return own; }, of_lane(own, 0), target.index,
      number_of(target.logit));
}

// What a lane holds of a tile of a row, every 32nd chunk, and a bit for each of these classes: of the units of a word, and
// where they are pairs, of their upper halves.
template <class T, int CHUNKS> struct Held {
  using Key = KeyOf<T>;
  static constexpr int kUnits = Chunk<T>::kUnits, kElements = Chunk<T>::kElements;
  static constexpr int kPerUnit = kElements / kUnits, kUnitsOfWord = 32 / kPerUnit;
  static constexpr int kChunksOfWord = kUnitsOfWord / kUnits;
  static constexpr int kWords = (CHUNKS + kChunksOfWord - 1) / kChunksOfWord;
  Chunk<T> chunks[CHUNKS];
  uint32_t reaching[kWords];

  // See bound_of: among the two largest of each lane, of different places.
  __device__ __forceinline__ Key bound(Group<32>& group, int k, bool has_keys) const {
    Chunk<T, 2> largest;
#pragma unroll
    for (int i = 0; i < CHUNKS * kUnits; ++i) {
      auto& larger = largest.unit[i % largest.kUnits];
      const auto unit = chunks[i / kUnits].unit[i % kUnits];
      larger = i < largest.kUnits ? unit : Packed<T>::max(larger, unit);
    }
    const Key keys[] = {Order<T>::key(element_of(largest, 0)),
                        Order<T>::key(element_of(largest, 1))};
    return bound_of(group, keys, k, 2, has_keys);
  }

  // How many of those that exist reach the bound; where it is NaN, all.
  template <class Exists> __device__ __forceinline__ int look_for(Key bound, Exists exists) {
    T limits[kPerUnit];
    for (T& limit : limits) limit = Order<T>::element_of_key(bound);
    const auto limit = packed(limits).unit[0];
    int count = 0;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      reaching[w] = 0;
#pragma unroll
      for (int s = w * kChunksOfWord; s < CHUNKS && s < (w + 1) * kChunksOfWord; ++s) {
        uint32_t bits = 0;
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
          constexpr uint32_t kFirst = kPerUnit == 2 ? 0x10001 : 1;
          bits |= static_cast<uint32_t>(Packed<T>::not_below(chunks[s].unit[u], limit)) &
                  kFirst << (s * kUnits + u) % kUnitsOfWord;
        }
        if (exists(s)) reaching[w] |= bits;
      }
      count += __popc(reaching[w]);
    }
    return count;
  }

  // Their indices, `first` being that of the lane's first class.
  __device__ __forceinline__ void write_to(Shared<int> list, int place, int first) const {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      for (uint32_t word = reaching[w]; word != 0; word &= word - 1) {
        const unsigned bit = __ffs(static_cast<int>(word)) - 1;
        const unsigned unit = w * kUnitsOfWord + bit % kUnitsOfWord;
        list[place++] = first + static_cast<int>(unit / kUnits * (32 * kElements) +
                                                 unit % kUnits * kPerUnit + bit / kUnitsOfWord);
      }
    }
  }
};

// Blocks that shall find room on a multiprocessor: up to 96 registers per thread, and 128 or 168 where the row takes 64 or 128
// of them.
template <class T, int CHUNKS, bool STREAMS> constexpr int kHeldBlocks =
    CHUNKS == 32 || (STREAMS && sizeof(T) == 8) ? 3
    : STREAMS                                   ? 4
                                                : 5;

// CHUNKS of a tile per lane; STREAMS if there may be more than one tile.
template <class T, int CHUNKS, bool STREAMS>
__global__ void __launch_bounds__(Group<32>::kBlock, kHeldBlocks<T, CHUNKS, STREAMS>)
    forward_held_kernel(const Forward a) {
  using G = Group<32>;
  using Item = ShortItem<T>;
  constexpr int kTile = 32 * CHUNKS, kElements = Chunk<T>::kElements;
  GROUP_MEMORY(32, group);
  SHARED_ARRAY(int, lists, G::kPerBlock* kHeldList);
  const int64_t n = group.job();
  if (n >= a.logits.count) return;
  const Shared<int> list = lists + group.number * kHeldList;
  const int lane = group.rank, k = static_cast<int>(a.k);
  const int classes = static_cast<int>(a.logits.classes);
  const T* row = row_of<T>(a.logits, n);
  const Whole whole = whole_chunks(row, classes);
  const int head = whole.head, count = whole.count, tail = head + count * kElements;
  Target<T> target;

  Sorted<Item, 32> best = {{last_item<T, Item>()}};
  KeyOf<T> bound = -Order<T>::kInfinity;
  const int tiles = STREAMS ? (count + kTile - 1) / kTile : 1;
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    const int begin = tile * kTile;
    const auto chunks = reinterpret_cast<const Chunk<T>*>(row + head) + begin;
    // of a row that is all of a tile half the chunks are there, or else the lanes would hold fewer
    const auto exists = [&](int s) {
      return (!STREAMS && s < CHUNKS / 2) || s * 32 + lane < count - begin;
    };
    Held<T, CHUNKS> held;
#pragma unroll
    for (int s = 0; s < CHUNKS; ++s)
      held.chunks[s] = exists(s) ? chunks[s * 32 + lane] : lowest_chunk<T>();

    // the classes before the first whole chunk, and those after the last
    const int before = tile == 0 ? head : 0;
    const int edges = before + (tile == tiles - 1 ? classes - tail : 0);
    const int edge = lane < before ? lane : tail + lane - before;
    uint32_t reaching_edges;
    int place, length;
    // the bound of the tiles before will do, unless more reach it than a list holds
    for (bool is_raised = tile == 0;; is_raised = true) {
      // the first tile has k maxima where the row has; a later one has more classes than a list, so that it has them too
      static_assert(((kMaxHeldK + 1) / 2 - 1) * kElements + kElements - 1 <= kHeldList,
                    "the chunks that have fewer than k maxima, and the classes after them");
      if (is_raised && 2 * count >= k) {
        const KeyOf<T> of_tile = held.bound(group, k, exists(0));
        bound = tile == 0 || of_tile > bound ? of_tile : bound;
      }
      place = sum_of_lanes_before(held.look_for(bound, exists), lane, length);
      reaching_edges = 0;
      if (edges > 0) {
        const auto key = Order<T>::key(row[lane < edges ? edge : 0]);
        reaching_edges = __ballot_sync(kAllLanes, lane < edges && key >= bound);
      }
      if (is_raised || length + __popc(reaching_edges) <= kHeldList) break;
    }

    // only now, as registers are needed no more
    if (tile == 0) target.load_index(a, n);
    if (length + __popc(reaching_edges) <= kHeldList) {
      held.write_to(list, place, head + (begin + lane) * kElements);
      if (reaching_edges >> lane & 1)
        list[length + __popc(reaching_edges & ((1u << lane) - 1))] = edge;
      length += __popc(reaching_edges);
      group.sync();
      const auto sorted = [&](int from) {
        Sorted<Item, 32> some = {{last_item<T, Item>()}};
        if (from + lane < length) {
          const int i = list[from + lane];
          some.items[0] = Item::of(Order<T>::key(row[i]), i);
        }
        some.sort(lane);
        return some;
      };
      if (tile == 0) best = sorted(0);
#pragma unroll 1
      for (int from = tile == 0 ? 32 : 0; from < length; from += 32) best.merge(sorted(from), lane);
      if (STREAMS) group.sync();
    } else {
      const int first = tile == 0 ? 0 : head + begin * kElements;
      const int last = tile == tiles - 1 ? classes : head + (begin + kTile) * kElements;
      add_classes(best, row, first, last, lane);
    }
    // of later classes only greater ones
    if (STREAMS) bound = of_lane(best.items[0], k - 1).key() + 1;
  }

  finish_lanes(group, a, n, row, target, best.items[0]);
}

template <class T> cudaError_t forward_held(const Forward& a, cudaStream_t stream) {
  static_assert((kMaxHeldChunks + 1) * Chunk<T>::kElements <= 1 << 16, "an Item16 numbers them");
  const int64_t chunks = a.logits.classes / Chunk<T>::kElements;
  const auto kernel = chunks <= 32     ? forward_held_kernel<T, 1, false>
                      : chunks <= 64   ? forward_held_kernel<T, 2, false>
                      : chunks <= 128  ? forward_held_kernel<T, 4, false>
                      : chunks <= 256  ? forward_held_kernel<T, 8, false>
                      : chunks <= 512  ? forward_held_kernel<T, 16, false>
                      : chunks <= 1024 ? forward_held_kernel<T, 32, false>
                                       : forward_held_kernel<T, 16, true>;
  launch(kernel, warps_for(a.logits.count), Group<32>::kBlock, stream, a);
  return cudaGetLastError();
}

}  // namespace sparse_ce::cuda
