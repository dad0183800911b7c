// plif in CUDA C++, what is made of K or of N numbers: slopes and offsets, the scale of the fixed point, and the gradient of
// the slopes. The contract stands in python/sparse_ce/schema.py.
//
// Sums over the cells are of integers in fixed point, and maxima of the bits of floats without a sign, among which NaN is the
// largest: neither has an order, so that the bits are those of the tensor operations, in every run. The logarithm and the
// exponential of the softplus are not: they are a unit of float64 off.
//
// A block has a part of the cells, and reads what all parts have found in the launch before. One part begins at the middle,
// where the offset is 0.
//
//   tables   3 launches: slopes, and the largest step of the offsets; sums of steps; offsets
//   scale    1 launch, beyond kScaleAlone numbers 2
//   dslopes  2 launches: sums of gradients; the gradients of the slopes
#pragma once

#include "group.cuh"
#include "order.cuh"
#include "plif.h"
#include "rows.cuh"

namespace sparse_ce::cuda {

constexpr int kCellThreads = 256;
constexpr int kCellTurn = 2 * kCellThreads;
constexpr int kCellParts = 1024;  // at most
constexpr int kScaleThreads = 1024;
constexpr int kScaleParts = 128;  // at most
constexpr int64_t kScaleAlone = 16 * kScaleThreads;

struct CellParts {
  int cells;
  int turns;   // of a part
  int middle;  // the part that begins at the middle
  int count;
  double unit;  // half the width of a cell

  CellParts(int64_t cells_, double bound)
      : cells(static_cast<int>(cells_)),
        turns((cells - 1) / (kCellTurn * (kCellParts - 2)) + 1),
        unit(bound / static_cast<double>(cells_)) {
    const int size = turns * kCellTurn;
    middle = (cells / 2 + size - 1) / size;
    count = middle + (cells - cells / 2 + size - 1) / size;
  }

  __device__ __forceinline__ bool has(int cell) const { return 0 <= cell && cell < cells; }
  // Of a turn of this block.
  __device__ __forceinline__ int first_cell(int turn) const {
    return cells / 2 + ((static_cast<int>(blockIdx.x) - middle) * turns + turn) * kCellTurn;
  }
  // The offset of the cell after this one, less its own.
  __device__ __forceinline__ double step(double slope, double following, int cell) const {
    return (slope - following) * (static_cast<double>(2 * cell + 2 - cells) * unit);
  }
};

// What the parts of the tables leave for each other. Sums have no sign, that they may wrap around: of a NaN they are garbage.
__device__ __forceinline__ int64_t* maxima_of(const PlifTables& a) {
  return static_cast<int64_t*>(a.scratch);
}
__device__ __forceinline__ uint64_t* sums_of(const PlifTables& a, const CellParts& parts) {
  return static_cast<uint64_t*>(a.scratch) + parts.count;
}

// Of NaN too: what CUDA's fabs leaves of its sign is not said.
__device__ __forceinline__ int64_t magnitude(double x) {
  return bit_cast<int64_t>(x) & 0x7FFFFFFFFFFFFFFF;
}

__device__ __forceinline__ int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }

// schema.fixed_point of a sum of `count` numbers, of which `largest` is the magnitude.
__device__ __forceinline__ double fixed_point(int64_t largest, int64_t count) {
  constexpr uint64_t kLeast = uint64_t{123} << 52;  // 2^-900
  const double total = bit_cast<double>(largest) * static_cast<double>(count);
  const auto bits = bit_cast<uint64_t>(total);
  const uint64_t exponent = ((bits > kLeast ? bits : kLeast) + 0xFFFFFFFFFFFFF) >> 52;
  return bit_cast<double>((2 * 1023 + 60 - exponent) << 52) + 0 * total;
}

// Numbers of a dtype that is known at run time: that of w, which need not be that of the tables.
__device__ __forceinline__ double number_at(const void* data, Dtype dtype, int i) {
  switch (dtype) {
    case Dtype::f32: return static_cast<const float*>(data)[i];
    case Dtype::bf16: return number_of(static_cast<const bfloat16*>(data)[i]);
    case Dtype::f16: return number_of(static_cast<const float16*>(data)[i]);
    default: return static_cast<const double*>(data)[i];
  }
}

__device__ __forceinline__ double rounded_to(Dtype dtype, double x) {
  switch (dtype) {
    case Dtype::f32: return static_cast<float>(x);
    case Dtype::bf16: return number_of(to_bfloat16(static_cast<float>(x)));
    case Dtype::f16: return number_of(to_float16(static_cast<float>(x)));
    default: return x;
  }
}

template <class S> __device__ __forceinline__ S slope_of(const PlifTables& a, int cell) {
  const double w = number_at(a.w, a.w_dtype, cell);
  const double softplus = w > 20 ? w : std::log1p(std::exp(w));
  // that of the start, which is rounded too, is then 1 and not next to it; none is 0
  return static_cast<S>(rounded_to(a.w_dtype, softplus)) + kSmallest<S>;
}

template <class S> __global__ void __launch_bounds__(kCellThreads)
    plif_slopes_kernel(const PlifTables a, const CellParts parts) {
  GROUP_MEMORY(kCellThreads, group);
  SHARED_ARRAY(S, turn_slopes, kCellTurn + 1);
  int64_t largest = 0;
#pragma unroll 1
  for (int turn = 0; turn < parts.turns; ++turn) {
    const int first = parts.first_cell(turn);
    // the first of the next turn too
    for (int i = group.rank; i <= kCellTurn; i += kCellThreads) {
      if (!parts.has(first + i)) continue;
      const S slope = slope_of<S>(a, first + i);
      turn_slopes[i] = slope;
      if (i < kCellTurn) static_cast<S*>(a.slopes)[first + i] = slope;
    }
    group.sync();
    for (int i = group.rank; i < kCellTurn; i += kCellThreads) {
      if (!parts.has(first + i) || !parts.has(first + i + 1)) continue;
      const int64_t step =
          magnitude(parts.step(S{turn_slopes[i]}, S{turn_slopes[i + 1]}, first + i));
      largest = greater(largest, step);
    }
    group.sync();
  }
  largest = group.greatest(largest);
  if (group.rank == 0) maxima_of(a)[blockIdx.x] = largest;
}

// The scale of the sums, of what all parts have found.
__device__ __forceinline__ double common_scale(Group<kCellThreads>& group, const PlifTables& a,
                                               const CellParts& parts) {
  int64_t largest = 0;
  for (int part = group.rank; part < parts.count; part += kCellThreads)
    largest = greater(largest, maxima_of(a)[part]);
  return fixed_point(group.greatest(largest), a.cells);
}

__device__ __forceinline__ double number_of_sum(uint64_t sum) {
  return static_cast<double>(static_cast<int64_t>(sum));
}

// In fixed point; 0 of the last cell, and where there is none.
template <class S> __device__ __forceinline__ uint64_t fixed_step(const PlifTables& a,
                                                                  const CellParts& parts, int cell,
                                                                  double scale) {
  if (!parts.has(cell) || !parts.has(cell + 1)) return 0;
  const S* slopes = static_cast<const S*>(a.slopes);
  const double step = parts.step(slopes[cell], slopes[cell + 1], cell) * scale;
  return static_cast<uint64_t>(static_cast<int64_t>(step));
}

template <class S> __global__ void __launch_bounds__(kCellThreads)
    plif_steps_kernel(const PlifTables a, const CellParts parts) {
  GROUP_MEMORY(kCellThreads, group);
  const double scale = common_scale(group, a, parts);
  uint64_t sum = 0;
#pragma unroll 1
  for (int turn = 0; turn < parts.turns; ++turn) {
    const int first = parts.first_cell(turn);
    for (int i = group.rank; i < kCellTurn; i += kCellThreads)
      sum += fixed_step<S>(a, parts, first + i, scale);
  }
  sum = group.sum(sum);
  if (group.rank == 0) sums_of(a, parts)[blockIdx.x] = sum;
}

// Of the threads of a block before this one; and of all.
__device__ __forceinline__ uint64_t sum_before(const Group<kCellThreads>& group,
                                               Shared<uint64_t> warps, uint64_t x, uint64_t& all) {
  const int warp = group.rank / 32, lane = group.rank % 32;
  uint64_t before = sum_of_lanes_before(x, lane, all);
  if (lane == 0) warps[warp] = all;
  group.sync();
  all = 0;
  for (int other = 0; other < kCellThreads / 32; ++other) {
    const uint64_t of_warp = warps[other];
    before += other < warp ? of_warp : 0;
    all += of_warp;
  }
  group.sync();
  return before;
}

template <class S> __global__ void __launch_bounds__(kCellThreads)
    plif_offsets_kernel(const PlifTables a, const CellParts parts) {
  GROUP_MEMORY(kCellThreads, group);
  SHARED_ARRAY(uint64_t, warps, kCellThreads / 32);
  const double scale = common_scale(group, a, parts);
  // from the middle to here, or back
  uint64_t passed = 0;
  for (int part = group.rank; part < parts.count; part += kCellThreads) {
    if (part < static_cast<int>(blockIdx.x)) passed += sums_of(a, parts)[part];
    if (part < parts.middle) passed -= sums_of(a, parts)[part];
  }
  passed = group.sum(passed);
#pragma unroll 1
  for (int turn = 0; turn < parts.turns; ++turn) {
    const int cell = parts.first_cell(turn) + 2 * group.rank;
    const uint64_t step = fixed_step<S>(a, parts, cell, scale);
    const uint64_t steps = step + fixed_step<S>(a, parts, cell + 1, scale);
    uint64_t all;
    const uint64_t here = passed + sum_before(group, warps, steps, all);
    S* offsets = static_cast<S*>(a.offsets);
    if (parts.has(cell)) offsets[cell] = static_cast<S>(number_of_sum(here) / scale);
    if (parts.has(cell + 1)) offsets[cell + 1] = static_cast<S>(number_of_sum(here + step) / scale);
    passed += all;
  }
}

// The formula stands in python/sparse_ce/ops.py.
template <int THREADS> __global__ void __launch_bounds__(THREADS)
    plif_masses_kernel(const PlifDslopes a, const CellParts parts) {
  GROUP_MEMORY(THREADS, group);
  uint64_t sum = 0;
#pragma unroll 1
  for (int turn = 0; turn < parts.turns; ++turn) {
    const int first = parts.first_cell(turn);
    for (int i = group.rank; i < kCellTurn; i += THREADS)
      if (parts.has(first + i)) sum += static_cast<uint64_t>(a.sums[2 * (first + i)]);
  }
  sum = group.sum(sum);
  if (group.rank == 0) static_cast<uint64_t*>(a.scratch)[blockIdx.x] = sum;
}

template <class S> __global__ void __launch_bounds__(kCellThreads)
    plif_dslopes_kernel(const PlifDslopes a, const CellParts parts) {
  GROUP_MEMORY(kCellThreads, group);
  SHARED_ARRAY(uint64_t, warps, kCellThreads / 32);
  const auto found = static_cast<const uint64_t*>(a.scratch);
  uint64_t passed = 0, total = 0;
  for (int part = group.rank; part < parts.count; part += kCellThreads) {
    if (part < static_cast<int>(blockIdx.x)) passed += found[part];
    total += found[part];
  }
  passed = group.sum(passed);
  total = group.sum(total);
  const auto sums = reinterpret_cast<const uint64_t*>(a.sums);
  const int middle = parts.cells / 2;
  const double width = 2 * parts.unit / *a.scale;
#pragma unroll 1
  for (int turn = 0; turn < parts.turns; ++turn) {
    const int first = parts.first_cell(turn) + 2 * group.rank;
    uint64_t mass[2] = {}, moment[2] = {}, all;
    for (int e = 0; e < 2; ++e) {
      if (!parts.has(first + e)) continue;
      mass[e] = sums[2 * (first + e)];
      moment[e] = sums[2 * (first + e) + 1];
    }
    uint64_t through = passed + sum_before(group, warps, mass[0] + mass[1], all);
    for (int e = 0; e < 2; ++e) {
      const int cell = first + e;
      through += mass[e];
      double sum = number_of_sum(moment[e] - through + (cell < middle ? 0 : total));
      // the cell around 0
      if (cell == middle && parts.cells % 2 != 0) sum -= number_of_sum(total) / 2;
      sum = product(sum, width);
      if (cell == 0) sum += a.outside[0];
      if (cell == parts.cells - 1) sum += a.outside[1];
      if (parts.has(cell)) static_cast<S*>(a.dslopes)[cell] = static_cast<S>(sum);
    }
    passed += all;
  }
}

// LANES threads share a row: a warp where its probabilities have gradients.
template <class S, int LANES> __global__ void __launch_bounds__(kScaleThreads, 1)
    plif_scale_kernel(const PlifScale a) {
  GROUP_MEMORY(kScaleThreads, group);
  constexpr int kRows = kScaleThreads / LANES;
  const double at_most = a.at_most ? static_cast<double>(*static_cast<const S*>(a.at_most)) : 1;
  int64_t largest = 0;
#pragma unroll 4
  for (int64_t n = int64_t{blockIdx.x} * kRows + group.rank / LANES; n < a.rows;
       n += int64_t{gridDim.x} * kRows) {
    double above = a.dlse ? std::fabs(double{static_cast<const S*>(a.dlse)[n]}) : 0;
    if constexpr (LANES > 1) {
      const S* dprobs = static_cast<const S*>(a.dprobs) + n * a.k;
      int64_t most = 0;
      for (int64_t i = group.rank % LANES; i < a.k; i += LANES)
        most = greater(most, magnitude(dprobs[i]));
      most = reduce_lanes(most, [](int64_t x, int64_t y) { return greater(x, y); });
      above += 2 * bit_cast<double>(most);
    }
    // a loss moves its weights to the target, or away from it: twice their sum
    if (a.dloss) {
      const double dloss = std::fabs(double{static_cast<const S*>(a.dloss)[n]});
      if (is_class(a.target[n], a.classes)) above += product(2 * at_most, dloss);
    }
    // the gradient of a row whose log-sum-exp is not finite is NaN
    const S lse = static_cast<const S*>(a.lse)[n * a.lse_stride];
    if (above != 0 && !(lse - lse == 0)) above = kNan<double>;
    largest = greater(largest, magnitude(above));
  }
  largest = group.greatest(largest);
  if (group.rank != 0) return;
  if (gridDim.x == 1)
    *a.scale = fixed_point(largest, a.rows);
  else
    static_cast<int64_t*>(a.scratch)[blockIdx.x] = largest;
}

template <int THREADS> __global__ void __launch_bounds__(THREADS)
    plif_scale_join_kernel(const PlifScale a, int parts) {
  GROUP_MEMORY(THREADS, group);
  const auto found = static_cast<const int64_t*>(a.scratch);
  const int64_t largest = group.greatest(group.rank < parts ? found[group.rank] : 0);
  if (group.rank == 0) *a.scale = fixed_point(largest, a.rows);
}

inline int64_t parts_of(const PlifScale& a) {
  if (a.rows * (a.dprobs ? a.k : 1) <= kScaleAlone) return 1;
  const int64_t turns = (a.rows * (a.dprobs ? 32 : 1) - 1) / kScaleThreads + 1;
  return turns < kScaleParts ? turns : kScaleParts;
}

template <class S> cudaError_t tables_of(const PlifTables& a, cudaStream_t stream) {
  const CellParts parts(a.cells, a.bound);
  const dim3 grid(static_cast<unsigned>(parts.count));
  launch(plif_slopes_kernel<S>, grid, kCellThreads, stream, a, parts);
  launch(plif_steps_kernel<S>, grid, kCellThreads, stream, a, parts);
  launch(plif_offsets_kernel<S>, grid, kCellThreads, stream, a, parts);
  return cudaGetLastError();
}

template <class S> cudaError_t scale_of(const PlifScale& a, cudaStream_t stream) {
  const auto parts = static_cast<int>(parts_of(a));
  const dim3 grid(static_cast<unsigned>(parts));
  if (a.dprobs)
    launch(plif_scale_kernel<S, 32>, grid, kScaleThreads, stream, a);
  else
    launch(plif_scale_kernel<S, 1>, grid, kScaleThreads, stream, a);
  if (parts > 1)
    launch(plif_scale_join_kernel<kScaleParts>, dim3(1), kScaleParts, stream, a, parts);
  return cudaGetLastError();
}

template <class S> cudaError_t dslopes_of(const PlifDslopes& a, cudaStream_t stream) {
  const CellParts parts(a.cells, a.bound);
  const dim3 grid(static_cast<unsigned>(parts.count));
  launch(plif_masses_kernel<kCellThreads>, grid, kCellThreads, stream, a, parts);
  launch(plif_dslopes_kernel<S>, grid, kCellThreads, stream, a, parts);
  return cudaGetLastError();
}

}  // namespace sparse_ce::cuda
