// Eight fp32 lanes in the compilers' vector extension: every instruction set does the same arithmetic in the
// same order, only the registers differ. For use in D2V_INLINE functions only.
#pragma once

#include <type_traits>

#ifdef __SSE__
#include <xmmintrin.h>
#endif

#include "common.h"

namespace d2v {

constexpr int64_t kLanes = 8;
typedef float Lanes __attribute__((vector_size(4 * kLanes)));
// everything here is inlined, so no vector is passed between functions
#pragma GCC diagnostic ignored "-Wpsabi"

typedef uint16_t Narrow __attribute__((vector_size(2 * kLanes)));
typedef uint32_t Wide __attribute__((vector_size(4 * kLanes)));

// Converts fp16 to fp32, exactly, with integer operations: not every instruction set has the conversion.
D2V_INLINE Lanes from_half(Narrow half) {
  const Wide bits = __builtin_convertvector(half, Wide);
  const Wide shifted = (bits & 0x7fffu) << 13, exponent = shifted & 0x0f800000u;
  const Wide normal = shifted + (112u << 23);
  const Wide special = shifted + (224u << 23);
  // subnormal: reads the exponent as that of 2^-14 and subtracts the implicit leading 1
  const Lanes small = reinterpret_cast<Lanes>(shifted + (113u << 23)) - 0x1p-14f;
  const Wide magnitude = exponent == 0x0f800000u ? special : normal;
  return reinterpret_cast<Lanes>((exponent == 0u ? reinterpret_cast<Wide>(small) : magnitude) |
                                 (bits & 0x8000u) << 16);
}

// Converts fp32 to fp16, rounded to nearest, ties to even.
D2V_INLINE Narrow to_half(Lanes v) {
  const Wide bits = reinterpret_cast<Wide>(v), size = bits & 0x7fffffffu;
  const Wide normal = (size - (112u << 23) + 0xfffu + ((size >> 13) & 1u)) >> 13;
  // adding 1/2 rounds to multiples of 2^-24 and leaves them in the low bits
  const Wide small = reinterpret_cast<Wide>(reinterpret_cast<Lanes>(size) + 0.5f) - 0x3f000000u;
  const Wide infinite = Wide{} + 0x7c00u, nan = Wide{} + 0x7e00u;
  Wide half = size < (113u << 23) ? small : normal;
  half = size >= (143u << 23) ? infinite : half;
  half = size > 0x7f800000u ? nan : half;
  return __builtin_convertvector(half | (bits & 0x80000000u) >> 16, Narrow);
}

// V is Lanes, or float for the elements left over after whole vectors.
template <typename V>
D2V_INLINE V load(const float* x) {
  V v;
  __builtin_memcpy(&v, x, sizeof v);
  return v;
}

// Loads from any storage type and converts to fp32.
template <typename V, typename T>
D2V_INLINE V load_as(const T* x) {
  if constexpr (std::is_same_v<T, float>) {
    return load<V>(x);
  } else if constexpr (std::is_same_v<V, float>) {
    return static_cast<float>(*x);
  } else {
    Narrow bits;
    __builtin_memcpy(&bits, x, sizeof bits);
    if constexpr (std::is_same_v<T, Half>) return from_half(bits);
    return reinterpret_cast<V>(__builtin_convertvector(bits, Wide) << 16);
  }
}

template <typename V>
D2V_INLINE void store(float* x, V v) {
  __builtin_memcpy(x, &v, sizeof v);
}

// Stores to any storage type, rounded to nearest, ties to even.
template <typename V, typename T>
D2V_INLINE void store_as(T* x, V v) {
  if constexpr (std::is_same_v<T, float>) {
    store<V>(x, v);
  } else if constexpr (std::is_same_v<V, float>) {
    *x = static_cast<T>(v);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    const Wide bits = reinterpret_cast<Wide>(v), nan = Wide{} + 0x7fc0u;
    const Wide rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Narrow narrow = __builtin_convertvector(v == v ? rounded : nan, Narrow);
    __builtin_memcpy(x, &narrow, sizeof narrow);
  } else {
    const Narrow narrow = to_half(v);
    __builtin_memcpy(x, &narrow, sizeof narrow);
  }
}

// Results larger than this bypass the caches.
constexpr int64_t kStreamBytes = 8 << 20;

// Stores past the caches, for results larger than they are. `x` must be aligned to 16 bytes. Call
// `finish_streams` before another thread reads the result.
template <typename V>
D2V_INLINE void stream(float* x, V v) {
#ifdef __SSE__
  if constexpr (sizeof(V) == 4 * kLanes) {
    __m128 halves[2];
    __builtin_memcpy(halves, &v, sizeof v);
    _mm_stream_ps(x, halves[0]);
    _mm_stream_ps(x + 4, halves[1]);
    return;
  }
#endif
  store<V>(x, v);
}

// Copies `bytes`, a multiple of 16, past the caches; both addresses must be aligned to 16 bytes.
D2V_INLINE void stream_copy(void* to, const void* from, int64_t bytes) {
#ifdef __SSE__
  for (int64_t i = 0; i < bytes; i += 16) {
    __m128 v;
    __builtin_memcpy(&v, static_cast<const char*>(from) + i, 16);
    _mm_stream_ps(reinterpret_cast<float*>(static_cast<char*>(to) + i), v);
  }
#else
  __builtin_memcpy(to, from, bytes);
#endif
}

D2V_INLINE void finish_streams() {
#ifdef __SSE__
  _mm_sfence();
#endif
}

template <typename V>
D2V_INLINE void add_to(float* x, V v) {
  store<V>(x, load<V>(x) + v);
}

}  // namespace d2v
