// cosine in CUDA C++: the distance of an output from the vector of its target, gathered on the way. The formulas and what is
// saved for backward stand in triton_kernels/cosine.py; the contract in python/sparse_ce/schema.py.
//
// A row belongs to a warp. Forward and backward read two rows of D numbers, and backward writes one. Every thread takes some
// numbers at a time of both, and loads kLoads times before it uses the first. Pre-trained vectors have odd widths, 300 above
// all: the numbers are 16 bytes, 8 or one of them, the most in whose units all rows lie. 300 floats move by 16 bytes, 300
// 16-bit numbers by 8.
#pragma once

#include <type_traits>

#include "cosine.h"
#include "group.cuh"
#include "order.cuh"
#include "rows.cuh"

namespace sparse_ce::cuda {

constexpr int kLoads = 2;

template <Dtype D> struct TypeOf;
template <> struct TypeOf<Dtype::f32> {
  using Type = float;
};
template <> struct TypeOf<Dtype::bf16> {
  using Type = bfloat16;
};
template <> struct TypeOf<Dtype::f16> {
  using Type = float16;
};
template <> struct TypeOf<Dtype::f64> {
  using Type = double;
};
template <Dtype D> using ElementOf = typename TypeOf<D>::Type;

// In `BYTES` of the narrower of outputs T and vectors.
template <class T, Dtype TABLE, int BYTES> constexpr int kNumbers =
    BYTES /
    static_cast<int>(sizeof(T) < sizeof(ElementOf<TABLE>) ? sizeof(T) : sizeof(ElementOf<TABLE>));

template <int N, class T>
__device__ __forceinline__ void read(const T* from, StatisticOf<T> (&x)[N]) {
  if constexpr (N == 1) {
    x[0] = number_of(*from);
  } else {
    const auto chunk = *reinterpret_cast<const Chunk<T, N>*>(from);
    for (int i = 0; i < N; ++i) x[i] = number_of(element_of(chunk, i));
  }
}

template <int N, class T>
__device__ __forceinline__ void write(T* to, const StatisticOf<T> (&x)[N]) {
  if constexpr (N == 1)
    *to = Order<T>::element(x[0]);
  else
    *reinterpret_cast<Chunk<T, N>*>(to) = chunk_of<T>(x);
}

template <Dtype TABLE> __device__ auto vector_of(const Table& table, int64_t target) {
  return static_cast<const ElementOf<TABLE>*>(table.data) + target * table.stride;
}

// f(N numbers of the output, N of the vector, their column) along the row; beyond its end once more, with zeros.
template <int N, class T, class E, class F>
__device__ __forceinline__ void for_each_pair(int lane, const T* output, const E* vector, int width,
                                              F f) {
  using S = StatisticOf<T>;
  constexpr int kStep = 32 * N;
#pragma unroll 1
  for (int first = lane * N; first < width; first += kLoads * kStep) {
    S c[kLoads][N] = {}, e[kLoads][N] = {};
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int column = first + i * kStep;
      if (column < width) {
        read(output + column, c[i]);
        read(vector + column, e[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) f(c[i], e[i], first + i * kStep);
  }
}

template <class T, Dtype TABLE, int BYTES>
__global__ void __launch_bounds__(Group<32>::kBlock, resident<T>(Group<32>::kBlock))
    cosine_forward_kernel(const CosineForward a) {
  using S = StatisticOf<T>;
  constexpr int N = kNumbers<T, TABLE, BYTES>;
  GROUP_MEMORY(32, group);
  const int64_t n = group.job();
  if (n >= a.output.count) return;
  const int64_t target = a.target[n];
  const bool hit = is_class(target, a.table.vectors);

  S cc = 0, ee = 0, ce = 0;
  if (hit)
    for_each_pair<N>(group.rank, row_of<T>(a.output, n), vector_of<TABLE>(a.table, target),
                     static_cast<int>(a.output.classes), [&](auto& c, auto& e, int) {
                       for (int i = 0; i < N; ++i) {
                         const S d = c[i] - e[i];
                         cc += c[i] * c[i];
                         ee += e[i] * e[i];
                         ce += a.normalize ? c[i] * e[i] : d * d;
                       }
                     });
  cc = group.sum(cc);
  ee = group.sum(ee);
  ce = group.sum(ce);
  if (group.rank != 0) return;

  S loss = kNan<S>, by_output = 0, by_target = 0;
  if (hit && a.normalize) {
    S similarity = 0;
    if (!(cc < kSmallest<S> || ee < kSmallest<S>)) {
      // |c| / |c|^2 and not 1 / |c|: a sum of squares that overflows gives NaN, not 0
      by_target = -(std::sqrt(cc) / cc) * (std::sqrt(ee) / ee);
      similarity = -ce * by_target;
      by_output = similarity / cc;
    }
    loss = 1 - similarity;
  } else if (hit) {
    loss = ce / 2;
    by_output = 1;
    by_target = -1;
  }
  static_cast<S*>(a.loss)[n] = loss;
  static_cast<S*>(a.by_output)[n] = by_output;
  static_cast<S*>(a.by_target)[n] = by_target;
}

template <class T, Dtype TABLE, int BYTES>
__global__ void __launch_bounds__(Group<32>::kBlock, resident<T>(Group<32>::kBlock))
    cosine_backward_kernel(const CosineBackward a) {
  using S = StatisticOf<T>;
  constexpr int N = kNumbers<T, TABLE, BYTES>;
  GROUP_MEMORY(32, group);
  const int64_t n = group.job();
  if (n >= a.output.count) return;
  const int width = static_cast<int>(a.output.classes);
  const int64_t target = a.target[n];
  const S dloss = static_cast<const S*>(a.dloss)[n];
  const S by_output = static_cast<const S*>(a.by_output)[n];
  const S by_target = static_cast<const S*>(a.by_target)[n];
  T* out = static_cast<T*>(a.doutput) + n * a.output.classes;

  // what is not counted stays 0 where the output is NaN
  if (dloss == 0 || by_target == 0 || !is_class(target, a.table.vectors)) {
    const S zeros[N] = {};
    for (int column = group.rank * N; column < width; column += 32 * N) write(out + column, zeros);
    return;
  }
  for_each_pair<N>(group.rank, row_of<T>(a.output, n), vector_of<TABLE>(a.table, target), width,
                   [&](auto& c, auto& e, int column) {
                     S g[N];
                     for (int i = 0; i < N; ++i)
                       g[i] = dloss * (by_output * c[i] + by_target * e[i]);
                     if (column < width) write(out + column, g);
                   });
}

// start(dtype of the table, bytes), both as types.
template <class T, Dtype TABLE, class Start>
void start_for(const Rows& output, const Table& table, Start start) {
  constexpr int kOne = 16 / kNumbers<T, TABLE, 16>;
  const auto lie_in_units = [&](int bytes) {
    const int64_t n = bytes / kOne;
    const auto begins = [&](const void* data, int64_t size) {
      return reinterpret_cast<uintptr_t>(data) % (n * size < 16 ? n * size : 16) == 0;
    };
    return begins(output.data, sizeof(T)) && begins(table.data, sizeof(ElementOf<TABLE>)) &&
           output.classes % n == 0 && output.outer_stride % n == 0 &&
           output.inner_stride % n == 0 && table.stride % n == 0;
  };
  using D = std::integral_constant<Dtype, TABLE>;
  if (lie_in_units(16))
    start(D{}, std::integral_constant<int, 16>{});
  else if (lie_in_units(8))
    start(D{}, std::integral_constant<int, 8>{});
  else
    start(D{}, std::integral_constant<int, kOne>{});
}

template <class T, class Start>
cudaError_t start_for(const Rows& output, const Table& table, Start start) {
  if constexpr (sizeof(T) == 8) {
    start_for<T, Dtype::f64>(output, table, start);
  } else {
    switch (table.dtype) {
      case Dtype::bf16: start_for<T, Dtype::bf16>(output, table, start); break;
      case Dtype::f16: start_for<T, Dtype::f16>(output, table, start); break;
      default: start_for<T, Dtype::f32>(output, table, start);
    }
  }
  return cudaGetLastError();
}

template <class T> cudaError_t forward_rows(const CosineForward& a, cudaStream_t stream) {
  return start_for<T>(a.output, a.table, [&](auto table, auto bytes) {
    launch(cosine_forward_kernel<T, decltype(table)::value, decltype(bytes)::value>,
           blocks_for(a.output.count), Group<32>::kBlock, stream, a);
  });
}

template <class T> cudaError_t backward_rows(const CosineBackward& a, cudaStream_t stream) {
  return start_for<T>(a.output, a.table, [&](auto table, auto bytes) {
    launch(cosine_backward_kernel<T, decltype(table)::value, decltype(bytes)::value>,
           blocks_for(a.output.count), Group<32>::kBlock, stream, a);
  });
}

}  // namespace sparse_ce::cuda
