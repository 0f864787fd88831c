// Vectors of floats for the attention of this folder: reading and writing.
//
// Vectors are GCC's and clang's vector extension, of the width that the processor has. Half precision is bfloat16: read
// as the upper half of a float, computed in float, rounded once to nearest even where a comment does not say otherwise.
// Every number of a result is summed in one order, whatever the number of threads is.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#ifndef __AVX2__
#error "the processor has no AVX2, and nothing was measured without"
#endif
#include <immintrin.h>

namespace {

using i64 = int64_t;
#ifdef __AVX512F__
constexpr i64 W = 16;  // floats of a vector
#else
constexpr i64 W = 8;
#endif
typedef float vf __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));

template <class T>
T load(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <class T>
void store(void* to, const T& value) {
  std::memcpy(to, &value, sizeof value);
}

inline vf widened(vh value) {
#ifdef __AVX512F__
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)value), 16);
#else
  return (vf)(__builtin_convertvector(value, vu) << 16);
#endif
}

// To nearest even; what is no number stays none.
inline vh rounded(vf value) {
#ifdef __AVX512BF16__
  return (vh)_mm512_cvtneps_pbh((__m512)value);  // numbers below 1.2e-38 become 0
#else
  const vu bits = (vu)value;
  const vu number = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const vu wrong = (vu)((bits & 0x7fffffffu) > 0x7f800000u);  // not a number
  return __builtin_convertvector((number & ~wrong) | (((bits >> 16) | 0x40) & wrong), vh);
#endif
}

// The two dtypes, by how numbers are read and written.
struct Full {
  using number = float;
  static vf get(const number* from) { return load<vf>(from); }
  static void put(number* to, vf value) { store(to, value); }
};

struct Half {
  using number = uint16_t;
  static vf get(const number* from) { return widened(load<vh>(from)); }
  static void put(number* to, vf value) { store(to, rounded(value)); }
};

// The first `count` numbers, one or more; zeros behind them.
template <class P>
inline vf get(const typename P::number* from, i64 count) {
  if (count >= W) return P::get(from);
  typename P::number some[W] = {};
  std::memcpy(some, from, count * sizeof some[0]);
  return P::get(some);
}

template <class P>
inline void put(typename P::number* to, vf value, i64 count) {
  if (count >= W) return P::put(to, value);
  typename P::number some[W];
  P::put(some, value);
  std::memcpy(to, some, count * sizeof some[0]);
}

inline vf spread(float value) {
#ifdef __AVX512F__
  return (vf)_mm512_set1_ps(value);
#else
  return (vf)_mm256_set1_ps(value);
#endif
}

inline float sum(vf v) {
  for (i64 step = W / 2; step; step /= 2)
    for (i64 i = 0; i < step; ++i) v[i] += v[i + step];
  return v[0];
}

}  // namespace
