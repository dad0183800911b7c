// topk_ce forward for up to 128 classes of short rows, whose logits lie in the registers of some lanes of a warp while their
// largest are looked for. Such rows are bound by instructions, not by memory: eight, four or two of them share a warp, up to 1, 2
// and 4 KB, so that what a row needs once costs a part of what it costs a warp. For up to 32 classes of up to 48 KB a warp takes
// a row tile by tile.
//
//   bound    of the first tile: found among maxima, of which each lane has some. From then on, the k-th of the tiles before.
//   collect  a bit for each class that reaches it; then a list of these classes in shared memory.
//   sort     those of the list, read again, between registers, TOP at a time: first TOP, and with them, as long as more are
//            listed, the next TOP merged.
//   finish   each lane has the classes of its ranks.
//
// Where more reach the bound than a list holds, the maxima of that tile raise it. What are still too many then are ties: in
// place of the list all classes of the tile are looked at, in the order of the index.
#pragma once

#include "few.cuh"

namespace sparse_ce::cuda {

// Up to 16 KB a row is a tile. Of longer ones no GPU was asked: the limit is an estimate.
constexpr int kMaxHeldK = 128, kMaxHeldChunks = 1024;
constexpr int kMaxStreamedK = 32, kMaxStreamedChunks = 3072;

// What a lane holds of a tile of a row, every LANES-th chunk, and a bit for each of these classes. Those of the chunks lie side by
// side, up to 16 chunks; then follow other units, and where units are pairs, their upper halves. So few instructions make a class
// of a bit.
template <class T, int LANES, int CHUNKS, int TOP> struct Held {
  using Key = KeyOf<T>;
  using Unit = typename Chunk<T>::Unit;
  static constexpr int kUnits = Chunk<T>::kUnits, kElements = Chunk<T>::kElements;
  static constexpr int kPerUnit = kElements / kUnits, kUnitsOfWord = 32 / kPerUnit;
  static constexpr int kSide = CHUNKS < 16 ? CHUNKS : 16;
  static constexpr int kWords = (CHUNKS * kUnits + kUnitsOfWord - 1) / kUnitsOfWord;
  // Units of maxima of a lane: of all lanes twice or four times TOP, as far as there are two classes to each.
  static constexpr int kWanted = (TOP == 32 ? 2 : 4) * TOP / (LANES * kPerUnit);
  static constexpr int kMost = CHUNKS * kUnits / 2;
  static constexpr int kPlaces = kWanted < 1 ? 1 : kWanted < kMost ? kWanted : kMost;
  // How many maxima of different classes a row has: so many of each chunk, up to all. By the chunks that a row has at least,
  // as all rows of a warp must decide alike.
  static constexpr int kMaxima = kPlaces * kPerUnit * LANES;
  static constexpr int kMaximaOfChunk = kPerUnit * (kPlaces < kUnits ? kPlaces : kUnits);
  Chunk<T> chunks[CHUNKS];
  uint32_t reaching[kWords];

  static __device__ __forceinline__ Unit unit_of(Key key) {
    T both[kPerUnit];
    for (T& element : both) element = Order<T>::element_of_key(key);
    return packed(both).unit[0];
  }
  static __device__ __forceinline__ Key key_of(Unit unit, int place) {
    return Order<T>::key(element_of(Chunk<T, kPerUnit>{{unit}}, place));
  }

  // Once all are loaded: what lies too low to be compared is as low as can be. Only this struct sees it.
  __device__ __forceinline__ void raise() {
    if constexpr (kReach<T> != Order<T>::kInfinity) {
#pragma unroll
      for (auto& chunk : chunks)
#pragma unroll
        for (Unit& unit : chunk.unit) unit = Packed<T>::max(unit, unit_of(-kReach<T>));
    }
  }

  // See bound_of: among the maxima of all lanes, for all rows of the warp at once. What is reached by numbers that are not
  // compared is reached by more.
  __device__ __forceinline__ Key bound(Group<LANES>& group, int k, int slack) const {
    Unit largest[kPlaces];
#pragma unroll
    for (int i = 0; i < CHUNKS * kUnits; ++i) {
      const Unit unit = chunks[i / kUnits].unit[i % kUnits];
      Unit& larger = largest[i % kPlaces];
      larger = i < kPlaces ? unit : Packed<T>::max(larger, unit);
    }
    Unit least = largest[0], greatest = largest[0];
#pragma unroll
    for (int i = 1; i < kPlaces; ++i) {
      least = Packed<T>::min(least, largest[i]);
      greatest = Packed<T>::max(greatest, largest[i]);
    }
    Key low = key_of(least, 0), high = Order<T>::unit_key(greatest);
    if (kPerUnit == 2 && key_of(least, 1) < low) low = key_of(least, 1);
    low = group.least(low < kReach<T> ? low : kReach<T>);
    high = group.greatest(high < kReach<T> ? high : kReach<T>);
    // Half of the distance is too far where it is many octaves: between a large logit and one next to zero. Of a row that is
    // done the middle is the bound itself.
    using Distance = typename std::make_unsigned<Key>::type;
    Distance octaves = Order<T>::kInfinity & -Order<T>::kInfinity;
    while (group.any_of_warp(low < high)) {
      const Distance half = (static_cast<Distance>(high) - static_cast<Distance>(low)) / 2;
      const Key middle = high - static_cast<Key>(half < octaves ? half : octaves);
      octaves = 2 * octaves > octaves ? 2 * octaves : octaves;
      const int reached = group.sum(number_not_below<T>(largest, unit_of(middle)));
      if (reached >= k) {
        low = middle;
        if (reached <= k + slack) high = low;
      } else {
        high = middle - 1;
      }
    }
    return low == -kReach<T> ? -Order<T>::kInfinity : low;
  }

  // How many of the first chunks' classes reach the bound; where it is no number that is compared, all.
  __device__ __forceinline__ int look_for(Key bound, int first_chunks) {
    const Unit limit = unit_of(bound);
#pragma unroll
    for (uint32_t& word : reaching) word = 0;
#pragma unroll
    for (int s = 0; s < CHUNKS; ++s) {
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        constexpr uint32_t kFirst = kPerUnit == 2 ? 0x10001 : 1;
        const int unit = (s / kSide * kUnits + u) * kSide + s % kSide;
        reaching[unit / kUnitsOfWord] |=
            static_cast<uint32_t>(Packed<T>::not_below(chunks[s].unit[u], limit)) &
            kFirst << unit % kUnitsOfWord;
      }
    }
    int count = 0;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const int left = first_chunks - w * kUnitsOfWord / (kSide * kUnits) * kSide;
      constexpr uint32_t kEach = 0xFFFFFFFF / ((1u << kSide) - 1);
      const uint32_t exist = left >= kSide ? 0xFFFFFFFF
                             : left <= 0   ? 0
                                           : ((1u << left) - 1) * kEach;
      reaching[w] &= exist;
      count += __popc(reaching[w]);
    }
    return count;
  }

  // Their indices, `first` being that of the lane's first class.
  template <class List>
  __device__ __forceinline__ int write_to(List list, int place, int first) const {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
#pragma unroll 1
      for (uint32_t word = reaching[w]; word != 0;) {
        const unsigned bit = 31 - __clz(static_cast<int>(word));
        word ^= 1u << bit;
        const unsigned unit = w * kUnitsOfWord + bit % kUnitsOfWord, of_chunk = unit / kSide;
        const unsigned chunk = of_chunk / kUnits * kSide + unit % kSide;
        list[place++] = static_cast<uint16_t>(first + chunk * (LANES * kElements) +
                                              of_chunk % kUnits * kPerUnit + bit / kUnitsOfWord);
      }
    }
    return place;
  }
};

// Blocks that shall find room on a multiprocessor: up to 96 registers per thread, 128 or 168 where tiles or lists need more, and
// more for float64, which is not to be fast.
template <class T, int LANES, int CHUNKS, int TOP, bool STREAMS> constexpr int kHeldBlocks =
    sizeof(T) == 8                                          ? (CHUNKS == 32 && TOP > 32 ? 2 : 3)
    : CHUNKS == 32 || (sizeof(T) == 4 && TOP > 64)          ? 3
    : STREAMS || TOP > 32 || (sizeof(T) == 4 && LANES == 4) ? 4
                                                            : 5;

// CHUNKS of a tile per lane; STREAMS if there may be more than one tile.
template <class T, int LANES, int CHUNKS, int TOP, bool STREAMS>
__global__ void __launch_bounds__(Group<LANES>::kBlock, kHeldBlocks<T, LANES, CHUNKS, TOP, STREAMS>)
    forward_held_kernel(const Forward a) {
  using G = Group<LANES>;
  using Item = ShortItem<T>;
  using Best = Sorted<Item, LANES, TOP>;
  using Lanes = Held<T, LANES, CHUNKS, TOP>;
  constexpr int kTile = LANES * CHUNKS, kElements = Chunk<T>::kElements;
  constexpr int kList = TOP == 32 ? 128 : 256;
  // lists of a warp begin in different banks
  constexpr int kApart = LANES == 32 ? kList : kList + LANES;
  // a row of at most half as many chunks has a smaller tile, but from the smallest on
  constexpr bool kHasHalf = !STREAMS && kTile > 16;
  GROUP_MEMORY(LANES, group);
  SHARED_ARRAY(uint16_t, lists, G::kPerBlock* kApart);
  SHARED_ARRAY(Item, sorted, G::kPerBlock * Best::kApart + 1);
  const int64_t n = group.row(a.logits.count);
  const Shared<uint16_t> list = lists + group.number * kApart;
  const int lane = group.rank, k = static_cast<int>(a.k);
  const int classes = static_cast<int>(a.logits.classes);
  const T* row = row_of<T>(a.logits, n);
  const Whole whole = whole_chunks(row, classes);
  const int head = whole.head, count = whole.count, tail = head + count * kElements;
  // wherever the row begins
  const int least_count = (classes - kElements + 1) / kElements;
  Target<T> target;

  Best best;
#pragma unroll
  for (Item& item : best.items) item = last_item<T, Item>();
  KeyOf<T> bound = -Order<T>::kInfinity;
  const int tiles = STREAMS ? (count + kTile - 1) / kTile : 1;
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    const int begin = tile * kTile;
    const auto chunks = reinterpret_cast<const Chunk<T>*>(row + head) + begin + lane;
    const int left = count - begin - lane;  // number s of a lane is there if s * LANES is less
    Lanes held;
#pragma unroll
    for (int s = 0; s < CHUNKS; ++s)
      held.chunks[s] =
          (kHasHalf && s < CHUNKS / 2) || s * LANES < left ? chunks[s * LANES] : lowest_chunk<T>();
    held.raise();

    // the classes before the first whole chunk, and those after the last: a bit for each of a lane
    const int before = tile == 0 ? head : 0;
    const int edges = before + (tile == tiles - 1 ? classes - tail : 0);
    const auto edge = [&](int i) { return i < before ? i : tail + i - before; };
    unsigned reaching_edges;
    int place, length;
    // the bound of the tiles before will do, unless more reach it than a list holds
    for (bool is_raised = tile == 0;; is_raised = true) {
      if (is_raised && k <= Lanes::kMaxima && k <= least_count * Lanes::kMaximaOfChunk) {
        const KeyOf<T> of_tile = held.bound(group, k, TOP < 128 ? TOP / 16 : 16);
        bound = tile == 0 || of_tile > bound ? of_tile : bound;
      }
      reaching_edges = 0;
#pragma unroll 1
      for (int i = lane; i < edges; i += LANES)
        if (Order<T>::key(row[edge(i)]) >= bound) reaching_edges |= 1u << i / LANES;
      const int reached =
          held.look_for(bound, static_cast<int>(static_cast<unsigned>(left + LANES - 1) / LANES)) +
          __popc(reaching_edges);
      place = sum_of_lanes_before<LANES>(reached, lane, length);
      if (!STREAMS || is_raised || length <= kList) break;
    }

    // only now, as registers are needed no more
    if (tile == 0) target.load_index(a, n);
    const bool is_listed = length <= kList;
    if (is_listed) {
      place = held.write_to(list, place, head + (begin + lane) * kElements);
      for (int i = lane; reaching_edges != 0; i += LANES, reaching_edges >>= 1)
        if (reaching_edges & 1) list[place++] = static_cast<uint16_t>(edge(i));
    }
    group.sync();
    if (tile == 0) target.load_logit(a, row);
    const int first = tile == 0 ? 0 : head + begin * kElements;
    const int last = tile == tiles - 1 ? classes : head + (begin + kTile) * kElements;
    const int size = is_listed ? length : last - first;
#pragma unroll 1
    for (int from = 0; group.any_of_warp(from < size); from += TOP) {
      // all are on their way before the first is looked at
      int index[Best::kEach];
      T x[Best::kEach];
#pragma unroll
      for (int e = 0; e < Best::kEach; ++e) {
        const int at = from + e * LANES + lane;
        index[e] = first + at;
        if (is_listed && at < size) index[e] = list[at];
      }
#pragma unroll
      for (int e = 0; e < Best::kEach; ++e) {
        x[e] = lowest_element<T>();
        if (from + e * LANES + lane < size)
          x[e] = row[index[e]];
        else
          index[e] = kNoClass<Item>;
      }
      const Item worst = of_lane(best.items[Best::kEach - 1], group.last_lane());
      bool is_better = false;
      Best more;
#pragma unroll
      for (int e = 0; e < Best::kEach; ++e) {
        more.items[e] = item_of<Item>(x[e], index[e]);
        is_better = is_better || more.items[e] > worst;
      }
      if (!__any_sync(kAllLanes, is_better)) continue;
      more.sort(lane);
      if (tile == 0 && from == 0)
        best = more;
      else
        best.merge(more, lane);
    }
    if constexpr (STREAMS) {
      static_assert(Best::kEach == 1);
      group.sync();
      // of later classes only greater ones; there are none where k are NaN
      bound = of_lane(best.items[0], k - 1).key() + 1;
      if (bound > Order<T>::kInfinity + 1) break;
    }
  }
  finish_sorted<T>(group, a, n, target, best, sorted);
}

// Rows of up to TILE chunks, dealt to at least LANES lanes: a long list of float64 needs more.
template <class T, int LANES, int TILE, int TOP, bool STREAMS = false>
cudaError_t launch_held(const Forward& a, cudaStream_t stream) {
  constexpr int kLanes = sizeof(T) < 8 ? LANES : TOP > 32 ? 32 : LANES < 8 ? 8 : LANES;
  constexpr int kChunks = TILE < kLanes ? 1 : TILE / kLanes;
  launch(forward_held_kernel<T, kLanes, kChunks, TOP, STREAMS>, blocks_for<kLanes>(a.logits.count),
         Group<kLanes>::kBlock, stream, a);
  return cudaGetLastError();
}

template <class T, int TOP> cudaError_t forward_held_list(const Forward& a, cudaStream_t stream) {
  constexpr int kFewest = TOP == 32 ? 4 : 8;
  const int64_t chunks = a.logits.classes / Chunk<T>::kElements;
  return chunks <= 16    ? launch_held<T, kFewest, 16, TOP>(a, stream)
         : chunks <= 32  ? launch_held<T, kFewest, 32, TOP>(a, stream)
         : chunks <= 64  ? launch_held<T, kFewest, 64, TOP>(a, stream)
         : chunks <= 128 ? launch_held<T, 8, 128, TOP>(a, stream)
         : chunks <= 256 ? launch_held<T, 16, 256, TOP>(a, stream)
         : chunks <= 512 ? launch_held<T, 32, 512, TOP>(a, stream)
                         : launch_held<T, 32, 1024, TOP>(a, stream);
}

template <class T> cudaError_t forward_held(const Forward& a, cudaStream_t stream) {
  static_assert((kMaxStreamedChunks + 1) * Chunk<T>::kElements <= 1 << 16,
                "an Item16 numbers them");
  if (a.logits.classes / Chunk<T>::kElements > kMaxHeldChunks)
    return launch_held<T, 32, 512, kMaxStreamedK, true>(a, stream);
  return a.k <= 32   ? forward_held_list<T, 32>(a, stream)
         : a.k <= 64 ? forward_held_list<T, 64>(a, stream)
                     : forward_held_list<T, kMaxHeldK>(a, stream);
}

}  // namespace sparse_ce::cuda
