// topk_ce forward for up to 32 classes of at most 8 KB of logits, which a warp holds in its registers from the only look at them to
// the end. Such a row is bound by instructions, not by memory.
//
//   bound    is found among 64 maxima, two of each lane.
//   collect  a bit for each class that reaches it; then a list of these in shared memory, of each lane one at a time.
//   sort     between registers, 32 at a time: first 32, and with them, as long as more are listed, the next 32 merged.
//   finish   each lane has the class of its rank.
//
// A row with so many ties that the list overflows is read again in the order of the index, 32 classes at a time.
#pragma once

#include "list.cuh"
#include "select.cuh"

namespace sparse_ce::cuda {

constexpr int kMaxHeldK = 32, kMaxHeldChunks = 1024;
constexpr int kHeldList = 128;

// One step of bitonic sorting: the greater of two items goes to the lower lane.
template <class Item> __device__ __forceinline__ Item step(Item mine, int lane, int distance) {
  const Item other = across(mine, distance);
  return ((lane & distance) == 0) == (other > mine) ? other : mine;
}

// Descending over the lanes. Where a run of `width` lanes has to rise, its items are turned round as long.
template <class Item> __device__ __forceinline__ Item sort_lanes(Item mine, int lane) {
#pragma unroll
  for (int width = 2, log2 = 1; width <= 32; width *= 2, ++log2) {
    // the bit of this width, which no lane has at the last, and of the one before, which none has at the first
    const int rises = (width < 32 ? lane : 0) >> log2, rose = (width > 2 ? lane : 0) >> (log2 - 1);
    mine = mine.turned_if((rises ^ rose) & 1);
#pragma unroll
    for (int distance = width / 2; distance > 0; distance /= 2) mine = step(mine, lane, distance);
  }
  return mine;
}

// The best 32 of twice 32 that descend over the lanes.
template <class Item> __device__ __forceinline__ Item merge_lanes(Item mine, Item more, int lane) {
  more = across(more, 31);
  mine = more > mine ? more : mine;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) mine = step(mine, lane, distance);
  return mine;
}

// The best 32 of a row, whatever its ties.
template <class T, class Item> __device__ Item best_of_row(const T* row, int classes, int lane) {
  Item best = last_item<T, Item>();
#pragma unroll 1
  for (int begin = 0; begin < classes; begin += 32) {
    const int i = begin + lane;
    const Item more = i < classes ? Item::of(Order<T>::key(row[i]), i) : last_item<T, Item>();
    if (__any_sync(kAllLanes, more > of_lane(best, 31)))
      best = merge_lanes(best, sort_lanes(more, lane), lane);
  }
  return best;
}

// CHUNKS per lane.
template <class T, int CHUNKS>
__global__ void __launch_bounds__(Group<32>::kBlock,
                                  CHUNKS < 32 ? resident<T>(Group<32>::kBlock) : 3)
    forward_held_kernel(const Forward a) {
  using G = Group<32>;
  using Item = std::conditional_t<sizeof(T) == 2, Item16, ItemOf<T>>;
  constexpr int kUnits = Chunk<T>::kUnits, kElements = Chunk<T>::kElements;
  constexpr int kPerUnit = kElements / kUnits;
  GROUP_MEMORY(32, group);
  SHARED_ARRAY(int, lists, G::kPerBlock* kHeldList);
  const int64_t n = static_cast<int64_t>(blockIdx.x) * G::kPerBlock + group.number;
  if (n >= a.logits.count) return;
  const Shared<int> list = lists + group.number * kHeldList;
  const int lane = group.rank, k = static_cast<int>(a.k);
  const int classes = static_cast<int>(a.logits.classes);
  const T* row = row_of<T>(a.logits, n);
  const Whole whole = whole_chunks(row, classes);
  const int head = whole.head, count = whole.count;
  const auto chunks = reinterpret_cast<const Chunk<T>*>(row + head);
  Target<T> target;
  target.load_index(a, n);

  // of a shorter row the lanes hold fewer chunks, so half of them are there
  const auto exists = [&](int s) { return s < CHUNKS / 2 || s * 32 + lane < count; };
  Chunk<T> x[CHUNKS];
#pragma unroll
  for (int s = 0; s < CHUNKS; ++s) x[s] = exists(s) ? chunks[s * 32 + lane] : lowest_chunk<T>();

  KeyOf<T> bound = -Order<T>::kInfinity;
  if (2 * count >= k) {
    Chunk<T, 2> best;
#pragma unroll
    for (int i = 0; i < CHUNKS * kUnits; ++i) {
      auto& larger = best.unit[i % best.kUnits];
      const auto unit = x[i / kUnits].unit[i % kUnits];
      larger = i < best.kUnits ? unit : Packed<T>::max(larger, unit);
    }
    const KeyOf<T> keys[] = {Order<T>::key(element_of(best, 0)),
                             Order<T>::key(element_of(best, 1))};
    bound = bound_of(group, keys, k, 2, exists(0));
  }
  target.load_logit(a, row);

  T limits[kPerUnit];
  for (T& limit : limits) limit = Order<T>::element_of_key(bound);
  const auto limit = packed(limits).unit[0];
  // a bit for each class of the lane: of a word's units, and where they are pairs, of their upper halves
  constexpr int kWords = (CHUNKS * kElements + 31) / 32, kUnitsOfWord = 32 / kPerUnit;
  uint32_t reaching[kWords] = {};
#pragma unroll
  for (int s = 0; s < CHUNKS; ++s) {
    uint32_t bits = 0;
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      constexpr uint32_t kFirst = kPerUnit == 2 ? 0x10001 : 1;
      bits |= static_cast<uint32_t>(Packed<T>::not_below(x[s].unit[u], limit)) &
              kFirst << (s * kUnits + u) % kUnitsOfWord;
    }
    if (exists(s)) reaching[s * kUnits / kUnitsOfWord] |= bits;
  }
  int mine = 0;
  for (uint32_t word : reaching) mine += __popc(word);
  int length;
  int place = sum_of_lanes_before(mine, lane, length);
  // the classes before the first and after the last whole chunk
  const int left = classes - count * kElements;
  const int edge = lane < head ? lane : lane + count * kElements;
  uint32_t edges = 0;
  if (left > 0)
    edges = __ballot_sync(kAllLanes,
                          lane < left && Order<T>::key(row[lane < left ? edge : 0]) >= bound);

  Item best = last_item<T, Item>();
  if (length + __popc(edges) <= kHeldList) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      for (uint32_t word = reaching[w]; word != 0; word &= word - 1) {
        const unsigned bit = __ffs(static_cast<int>(word)) - 1;
        const unsigned unit = w * kUnitsOfWord + bit % kUnitsOfWord;
        const unsigned chunk = unit / kUnits * 32 + lane;
        list[place++] = head + static_cast<int>(chunk * kElements + unit % kUnits * kPerUnit +
                                                bit / kUnitsOfWord);
      }
    }
    if (edges >> lane & 1) list[length + __popc(edges & ((1u << lane) - 1))] = edge;
    length += __popc(edges);
    group.sync();
    const auto sorted = [&](int begin) {
      Item item = last_item<T, Item>();
      if (begin + lane < length) {
        const int i = list[begin + lane];
        item = Item::of(Order<T>::key(row[i]), i);
      }
      return sort_lanes(item, lane);
    };
    best = sorted(0);
#pragma unroll 1
    for (int begin = 32; begin < length; begin += 32) best = merge_lanes(best, sorted(begin), lane);
  } else {
    best = best_of_row<T, Item>(row, classes, lane);
  }

  if (lane < k) a.indices[n * a.k + lane] = best.index();
  const auto own = Order<T>::value(best.key());
  list_softmax<StatisticOf<T>, true>(
      group, a, n, [&](int) { return own; }, of_lane(own, 0), target.index,
      number_of(target.logit));
}

template <class T> cudaError_t forward_held(const Forward& a, cudaStream_t stream) {
  const int64_t chunks = a.logits.classes / Chunk<T>::kElements;
  const auto kernel = chunks <= 32    ? forward_held_kernel<T, 1>
                      : chunks <= 64  ? forward_held_kernel<T, 2>
                      : chunks <= 128 ? forward_held_kernel<T, 4>
                      : chunks <= 256 ? forward_held_kernel<T, 8>
                      : chunks <= 512 ? forward_held_kernel<T, 16>
                                      : forward_held_kernel<T, 32>;
  constexpr int kPerBlock = Group<32>::kPerBlock;
  const auto blocks = static_cast<unsigned>((a.logits.count + kPerBlock - 1) / kPerBlock);
  launch(kernel, dim3(blocks), Group<32>::kBlock, stream, a);
  return cudaGetLastError();
}

}  // namespace sparse_ce::cuda
