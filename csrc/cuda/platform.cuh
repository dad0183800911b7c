// Where the kernels meet their machine: CUDA, or its emulation on a processor in the tests (tests/cuda/emulation.h). What the
// emulation cannot take, inline PTX, has its plain twin here and nowhere else.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// Kernels name shared memory through these, so that the emulation can check every access; what is moved by chunks begins where
// one may.
#define SHARED_ARRAY(T, name, count) __shared__ T name[count]
#define SHARED_CHUNKS(T, name, count) __shared__ alignas(16) T name[count]
template <class T> using Shared = T*;

#define PTX(...) __VA_ARGS__
#define TWIN(...)
#if __CUDA_ARCH__ >= 900
#define COMPARES_BFLOAT16
#endif
#else
#include <emulation.h>

#define SHARED_CHUNKS SHARED_ARRAY
#define PTX(...)
#define TWIN(...) __VA_ARGS__
#endif

namespace sparse_ce::cuda {

// 16-bit floats are their bits: the kernels compare integers and compute in float32.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <class To, class From> __device__ __forceinline__ To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

__device__ __forceinline__ float to_float(bfloat16 x) {
  return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}

__device__ __forceinline__ float to_float(float16 x) {
  PTX(return __half2float(__ushort_as_half(x.bits));)
  TWIN(return static_cast<float>(bit_cast<_Float16>(x.bits));)
}

// Whether an instruction compares pairs of bfloat16. Where none does, one of float16 will: the order of bits is the same, from
// the negative of the bits kInfinityOfHalf to these. What lies above is NaN to it, and so not below either.
#ifdef COMPARES_BFLOAT16
constexpr bool kComparesBfloat16 = true;
#else
constexpr bool kComparesBfloat16 = false;
#endif
constexpr uint16_t kInfinityOfHalf = 0x7C00;

// Rounded to the nearest, ties to even.
__device__ __forceinline__ bfloat16 to_bfloat16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if (x != x) return {0x7FC0};
  return {static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)};
}
__device__ __forceinline__ float16 to_float16(float x) {
  PTX(return {__half_as_ushort(__float2half_rn(x))};)
  TWIN(return {bit_cast<uint16_t>(static_cast<_Float16>(x))};)
}

// The larger of each pair of floats in two registers, NaN where either is NaN: one instruction from sm_80 on; the smaller, NaN
// where both are. All bits of each float that is not below the other's, or where either is NaN; of bfloat16 see kComparesBfloat16.
// Of the 16-bit floats also a pair, rounded to the nearest; and the pair as it is, but that zeros and NaNs have lost their signs,
// and NaNs are one: the sum sees to the zeros, the maximum, whose NaN is documented, to those.
template <class T> struct Packed;

TWIN(inline unsigned plain_bits(unsigned bits, unsigned infinity) {
  const unsigned magnitude = bits & 0x7FFF;
  return magnitude == 0 ? 0 : magnitude > infinity ? 0x7FFF : bits;
})

template <> struct Packed<float> {
  using Unit = uint32_t;
  static __device__ __forceinline__ Unit max(Unit a, Unit b) {
    PTX(float d;
        asm("max.NaN.f32 %0, %1, %2;" : "=f"(d) : "f"(__uint_as_float(a)), "f"(__uint_as_float(b)));
        return __float_as_uint(d);)
    TWIN(const float x = bit_cast<float>(a), y = bit_cast<float>(b); return x != x || y != y
                                                                                ? 0x7FFFFFFF
                                                                            : x > y ? a
                                                                                    : b;)
  }
  static __device__ __forceinline__ Unit min(Unit a, Unit b) {
    const float x = bit_cast<float>(a), y = bit_cast<float>(b);
    PTX(return bit_cast<Unit>(fminf(x, y));)
    TWIN(return x < y || y != y ? a : b;)
  }
  static __device__ __forceinline__ Unit not_below(Unit a, Unit b) {
    return bit_cast<float>(a) < bit_cast<float>(b) ? 0 : ~Unit{0};
  }
};

TWIN(inline unsigned pairs_not_below(unsigned a, unsigned b) {
  const auto bits = [](unsigned x) {
    return bit_cast<unsigned>(to_float(float16{static_cast<uint16_t>(x)}));
  };
  return Packed<float>::not_below(bits(a >> 16), bits(b >> 16)) << 16 |
         Packed<float>::not_below(bits(a & 0xFFFF), bits(b & 0xFFFF)) >> 16;
})

template <> struct Packed<bfloat16> {
  using Unit = uint32_t;
  static __device__ __forceinline__ Unit of(float low, float high) {
    PTX(Unit d; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low)); return d;)
    TWIN(return Unit{to_bfloat16(high).bits} << 16 | to_bfloat16(low).bits;)
  }
  static __device__ __forceinline__ Unit plain(Unit a) {
    PTX(Unit d; asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(0x3F803F80), "r"(0));
        return max(d, d);)
    TWIN(return Unit{plain_bits(a >> 16, 0x7F80)} << 16 | plain_bits(a & 0xFFFF, 0x7F80);)
  }
  static __device__ __forceinline__ Unit max(Unit a, Unit b) {
    PTX(Unit d; asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b)); return d;)
    TWIN(return (Packed<float>::max(a & 0xFFFF0000, b & 0xFFFF0000) & 0xFFFF0000) |
                    Packed<float>::max(a << 16, b << 16) >> 16;)
  }
  static __device__ __forceinline__ Unit min(Unit a, Unit b) {
    PTX(Unit d; asm("min.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b)); return d;)
    TWIN(return (Packed<float>::min(a & 0xFFFF0000, b & 0xFFFF0000) & 0xFFFF0000) |
                    Packed<float>::min(a << 16, b << 16) >> 16;)
  }
  static __device__ __forceinline__ Unit not_below(Unit a, Unit b) {
    PTX(if constexpr (kComparesBfloat16) return __hgeu2_mask(bit_cast<__nv_bfloat162>(a),
                                                             bit_cast<__nv_bfloat162>(b));
        else return __hgeu2_mask(bit_cast<__half2>(a), bit_cast<__half2>(b));)
    TWIN(if constexpr (kComparesBfloat16) return (
             Packed<float>::not_below(a & 0xFFFF0000, b & 0xFFFF0000) & 0xFFFF0000) |
             Packed<float>::not_below(a << 16, b << 16) >> 16;
         else return pairs_not_below(a, b);)
  }
};

template <> struct Packed<float16> {
  using Unit = uint32_t;
  static __device__ __forceinline__ Unit of(float low, float high) {
    PTX(Unit d; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low)); return d;)
    TWIN(return Unit{to_float16(high).bits} << 16 | to_float16(low).bits;)
  }
  static __device__ __forceinline__ Unit plain(Unit a) {
    PTX(Unit d; asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(0)); return max(d, d);)
    TWIN(return Unit{plain_bits(a >> 16, 0x7C00)} << 16 | plain_bits(a & 0xFFFF, 0x7C00);)
  }
  static __device__ __forceinline__ Unit max(Unit a, Unit b) {
    PTX(Unit d; asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b)); return d;)
    TWIN(return half_max(a >> 16, b >> 16) << 16 | half_max(a & 0xFFFF, b & 0xFFFF);)
  }
  static __device__ __forceinline__ Unit min(Unit a, Unit b) {
    PTX(Unit d; asm("min.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b)); return d;)
    TWIN(return half_min(a >> 16, b >> 16) << 16 | half_min(a & 0xFFFF, b & 0xFFFF);)
  }
  static __device__ __forceinline__ Unit not_below(Unit a, Unit b) {
    PTX(return __hgeu2_mask(bit_cast<__half2>(a), bit_cast<__half2>(b));)
    TWIN(return pairs_not_below(a, b);)
  }
  TWIN(static Unit half_max(Unit a, Unit b) {
    const float x = to_float(float16{static_cast<uint16_t>(a)});
    const float y = to_float(float16{static_cast<uint16_t>(b)});
    return x != x || y != y ? 0x7FFF : x > y ? a : b;
  })
  TWIN(static Unit half_min(Unit a, Unit b) {
    const float x = to_float(float16{static_cast<uint16_t>(a)});
    const float y = to_float(float16{static_cast<uint16_t>(b)});
    return x < y || y != y ? a : b;
  })
};

template <> struct Packed<double> {
  using Unit = uint64_t;
  // no such instruction
  static __device__ __forceinline__ Unit max(Unit a, Unit b) {
    const double x = bit_cast<double>(a), y = bit_cast<double>(b);
    return x > y || x != x ? a : b;
  }
  static __device__ __forceinline__ Unit min(Unit a, Unit b) {
    const double x = bit_cast<double>(a), y = bit_cast<double>(b);
    return x < y || y != y ? a : b;
  }
  static __device__ __forceinline__ Unit not_below(Unit a, Unit b) {
    return bit_cast<double>(a) < bit_cast<double>(b) ? 0 : ~Unit{0};
  }
};

// How many floats of all units are not below those of the limit, or are NaN.
template <class T, int COUNT>
__device__ __forceinline__ int number_not_below(const typename Packed<T>::Unit (&units)[COUNT],
                                                typename Packed<T>::Unit limit) {
  uint32_t sum = 0;
#pragma unroll
  for (const auto unit : units) sum += static_cast<uint32_t>(Packed<T>::not_below(unit, limit));
  // all bits are -1; of a pair, what is carried from the lower half to the upper is taken back
  if (sizeof(T) != 2) return -static_cast<int>(sum);
  const int low = static_cast<int>(-sum & 0xFFFF);
  return 2 * low - (static_cast<int>(sum + static_cast<uint32_t>(low)) >> 16);
}

template <class S> __device__ __forceinline__ S larger(S a, S b) {
  using Unit = typename Packed<S>::Unit;
  return bit_cast<S>(Packed<S>::max(bit_cast<Unit>(a), bit_cast<Unit>(b)));
}

// exp(x) to two units in the last place and one of the rounded x * log2(e): a product and one instruction. Zero in place of
// what is not normal.
__device__ __forceinline__ float exp_nonpositive(float x) {
  const float exponent = x * 1.4426950408889634f;
  PTX(float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(exponent)); return y;)
  TWIN(return std::exp2(exponent);)
}
__device__ __forceinline__ double exp_nonpositive(double x) { return std::exp(x); }

// 16 bytes, the widest load and store; or ELEMENTS in a row, in as many of these as it takes.
template <class T, int ELEMENTS = 16 / sizeof(T)>
struct alignas(ELEMENTS * sizeof(T) < 16 ? ELEMENTS * sizeof(T) : 16) Chunk {
  using Unit = typename Packed<T>::Unit;
  static constexpr int kElements = ELEMENTS;
  static constexpr int kUnits = ELEMENTS * sizeof(T) / sizeof(Unit);
  Unit unit[kUnits];
};

template <class T, int N> __device__ __forceinline__ Chunk<T, N> packed(const T (&elements)[N]) {
  Chunk<T, N> chunk;
  memcpy(&chunk, elements, sizeof(chunk));
  return chunk;
}

// 2 to 16 bytes that no kernel writes to: such loads need not wait for stores and atomics before them.
template <class V> __device__ __forceinline__ V load_constant(const V* from) {
  PTX(using Narrow = std::conditional_t<sizeof(V) == 4, unsigned, unsigned short>;
      using Wide = std::conditional_t<sizeof(V) == 16, uint4, uint2>;
      using Raw = std::conditional_t<sizeof(V) < 8, Narrow, Wide>;
      return bit_cast<V>(__ldg(reinterpret_cast<const Raw*>(from)));)
  TWIN(return *from;)
}

// Chunks of SHARED_CHUNKS.
template <class T> __device__ __forceinline__ Chunk<T> load_chunk(Shared<T> from) {
  PTX(return *reinterpret_cast<const Chunk<T>*>(from);)
  TWIN(T x[Chunk<T>::kElements]; for (int e = 0; e < Chunk<T>::kElements; ++e) x[e] = from[e];
       return packed(x);)
}
template <class T>
__device__ __forceinline__ void store_chunk(Shared<T> to, const Chunk<T>& chunk) {
  PTX(*reinterpret_cast<Chunk<T>*>(to) = chunk;)
  TWIN(T x[Chunk<T>::kElements]; memcpy(x, &chunk, sizeof(chunk));
       for (int e = 0; e < Chunk<T>::kElements; ++e) to[e] = x[e];)
}

// Rounded by itself, whatever is added to it.
__device__ __forceinline__ double product(double a, double b) {
  PTX(return __dmul_rn(a, b);)
  TWIN(return a * b;)
}

// By 64 or more nothing is left, which C++ does not promise.
__device__ __forceinline__ unsigned long long shifted_right(unsigned long long x, unsigned by) {
  PTX(asm("shr.u64 %0, %1, %2;" : "=l"(x) : "l"(x), "r"(by)); return x;)
  TWIN(return by < 64 ? x >> by : 0;)
}

// CUDA adds 64 bits without a sign only; the sum has the same bits.
__device__ __forceinline__ void add_atomically(int64_t* to, int64_t x) {
  using Bits = unsigned long long;
  atomicAdd(reinterpret_cast<Bits*>(to), static_cast<Bits>(x));
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int block, cudaStream_t stream,
            Arguments... arguments) {
  PTX(kernel<<<grid, block, 0, stream>>>(arguments...);)
  TWIN(emulation::launch(kernel, grid, dim3(block), 0, stream, arguments...);)
}

}  // namespace sparse_ce::cuda
