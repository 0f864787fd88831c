// What runs between the matrix products of a lean decoder layer on a CPU; mm_moslora.models.elementwise says what each
// function computes.
//
// Compiled once per machine by mm_moslora.native, with the machine's own instructions. Vectors are GCC's and clang's
// vector extension, of the width that the processor has. Half precision is bfloat16: read as the upper half of a
// float, computed in float, rounded once to nearest even where a comment does not say otherwise. Every number of a
// result is summed in one order, whatever the number of threads is.

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
  static vf as_stored(vf value) { return value; }
};

struct Half {
  using number = uint16_t;
  static vf get(const number* from) { return widened(load<vh>(from)); }
  static void put(number* to, vf value) { store(to, rounded(value)); }
  static vf as_stored(vf value) { return widened(rounded(value)); }
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

inline float sum(vf v) {
  for (i64 step = W / 2; step; step /= 2)
    for (i64 i = 0; i < step; ++i) v[i] += v[i + step];
  return v[0];
}

// 1 / (1 + e^-x) to about one unit in the last place; 0 below -87, where it is less than 2e-38.
inline vf logistic(vf x) {
  const vf limit = vf{} + 87.0f;
  vf y = -x;
  y = y < limit ? y : limit;
  y = y > -limit ? y : -limit;
  // e^y = 2^n e^r with a whole n: adding 1.5 * 2^23 rounds to one.
  const vf magic = vf{} + 12582912.0f, shifted = y * 1.44269504f + magic, whole = shifted - magic;
  const vf r = (y - whole * 0.693359375f) - whole * -2.12194440e-4f;
  vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
  const vf found = 1.0f / (1.0f + (vf)((vi)p + ((vi)shifted << 23)));  // the last bits of `shifted` are n
  return x < -limit ? vf{} : found;
}

// The passes, by rows ------------------------------------------------------------------------------------------------

template <class F>
void by_rows(i64 rows, int threads, F body) {
  if (threads > 1) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 row = 0; row < rows; ++row) body(row);
  } else {
    for (i64 row = 0; row < rows; ++row) body(row);
  }
}

template <class P>
void normalise_row(const typename P::number* x, const typename P::number* weight, float inverse,
                   typename P::number* y, i64 width) {
  // Rounded before the weight and after it, as transformers does.
  for (i64 i = 0; i < width; i += W)
    put<P>(y + i, P::as_stored(get<P>(x + i, width - i) * inverse) * get<P>(weight + i, width - i), width - i);
}

template <class P>
void normalise(const typename P::number* x, i64 stride, const typename P::number* weight, float eps,
               typename P::number* y, float* inverse, i64 rows, i64 width, int threads) {
  by_rows(rows, threads, [=](i64 row) {
    const auto* from = x + row * stride;
    vf squares[2] = {vf{}, vf{}};
    for (i64 i = 0; i < width; i += W) {
      const vf value = get<P>(from + i, width - i);
      squares[i / W % 2] += value * value;
    }
    inverse[row] = 1.0f / std::sqrt(sum(squares[0] + squares[1]) / width + eps);
    normalise_row<P>(from, weight, inverse[row], y + row * width, width);
  });
}

template <class P>
void normalised(const typename P::number* x, i64 stride, const typename P::number* weight, const float* inverse,
                typename P::number* y, i64 rows, i64 width, int threads) {
  by_rows(rows, threads,
          [=](i64 row) { normalise_row<P>(x + row * stride, weight, inverse[row], y + row * width, width); });
}

// dx = inverse * (grad * weight - n * mean(grad * weight * n)) with n = x * inverse.
template <class P>
void normalise_backward(const typename P::number* grad, i64 grad_stride, const typename P::number* x, i64 stride,
                        const typename P::number* weight, const float* inverse, typename P::number* dx, i64 rows,
                        i64 width, int threads) {
  by_rows(rows, threads, [=](i64 row) {
    const auto *g = grad + row * grad_stride, *from = x + row * stride;
    auto* to = dx + row * width;
    const float scale = inverse[row];
    vf along[2] = {vf{}, vf{}};
    for (i64 i = 0; i < width; i += W) {
      const i64 n = width - i;
      along[i / W % 2] += get<P>(g + i, n) * get<P>(weight + i, n) * (get<P>(from + i, n) * scale);
    }
    const float mean = sum(along[0] + along[1]) / width;
    for (i64 i = 0; i < width; i += W) {
      const i64 n = width - i;
      const vf pull = get<P>(g + i, n) * get<P>(weight + i, n), direction = get<P>(from + i, n) * scale;
      put<P>(to + i, (pull - direction * mean) * scale, n);
    }
  });
}

constexpr i64 CHUNK = 4096;  // numbers that one thread takes at a time

// Calls `body(place, how many are left)` for every vector of numbers.
template <class F>
void by_numbers(i64 count, int threads, F body) {
  by_rows((count + CHUNK - 1) / CHUNK, threads, [=](i64 chunk) {
    const i64 end = std::min((chunk + 1) * CHUNK, count);
    for (i64 i = chunk * CHUNK; i < end; i += W) body(i, end - i);
  });
}

template <class P>
void gated(const typename P::number* e, const typename P::number* g, typename P::number* h, i64 count, int threads) {
  by_numbers(count, threads, [=](i64 i, i64 n) {
    const vf value = get<P>(e + i, n);
    put<P>(h + i, value * logistic(value) * get<P>(g + i, n), n);
  });
}

// `grad` becomes the gradient of e.
template <class P>
void gated_backward(typename P::number* grad, const typename P::number* e, const typename P::number* g,
                    typename P::number* dg, i64 count, int threads) {
  by_numbers(count, threads, [=](i64 i, i64 n) {
    const vf value = get<P>(e + i, n), pull = get<P>(grad + i, n), s = logistic(value);
    const vf other = get<P>(g + i, n);
    put<P>(dg + i, pull * value * s, n);
    put<P>(grad + i, pull * other * s * (1.0f + value * (1.0f - s)), n);
  });
}

template <class P>
void rotated(const typename P::number* x, i64 token_stride, i64 head_stride, const typename P::number* cos,
             i64 cos_stride, const typename P::number* sin, i64 sin_stride, typename P::number* y, i64 tokens,
             i64 heads, i64 width, int threads) {
  const i64 half = width / 2;
  by_rows(tokens, threads, [=](i64 token) {
    const auto *c = cos + token * cos_stride, *s = sin + token * sin_stride + half;
    for (i64 head = 0; head < heads; ++head) {
      const auto* from = x + token * token_stride + head * head_stride;
      auto* to = y + (token * heads + head) * width;
      for (i64 i = 0; i < half; i += W) {
        const i64 n = half - i;
        const vf first = get<P>(from + i, n), second = get<P>(from + half + i, n);
        const vf turn = get<P>(c + i, n), across = get<P>(s + i, n);
        put<P>(to + i, first * turn - second * across, n);
        put<P>(to + half + i, second * turn + first * across, n);
      }
    }
  });
}

}  // namespace

// What Python calls: every function once for each dtype -------------------------------------------------------------

#define PASSES(NAME, P)                                                                                               \
  void normalise_##NAME(const P::number* x, i64 stride, const P::number* weight, float eps, P::number* y,             \
                        float* inverse, i64 rows, i64 width, int threads) {                                           \
    normalise<P>(x, stride, weight, eps, y, inverse, rows, width, threads);                                           \
  }                                                                                                                   \
  void normalised_##NAME(const P::number* x, i64 stride, const P::number* weight, const float* inverse, P::number* y, \
                         i64 rows, i64 width, int threads) {                                                          \
    normalised<P>(x, stride, weight, inverse, y, rows, width, threads);                                               \
  }                                                                                                                   \
  void normalise_backward_##NAME(const P::number* grad, i64 grad_stride, const P::number* x, i64 stride,              \
                                 const P::number* weight, const float* inverse, P::number* dx, i64 rows, i64 width,   \
                                 int threads) {                                                                       \
    normalise_backward<P>(grad, grad_stride, x, stride, weight, inverse, dx, rows, width, threads);                   \
  }                                                                                                                   \
  void gated_##NAME(const P::number* e, const P::number* g, P::number* h, i64 count, int threads) {                   \
    gated<P>(e, g, h, count, threads);                                                                                \
  }                                                                                                                   \
  void gated_backward_##NAME(P::number* grad, const P::number* e, const P::number* g, P::number* dg, i64 count,       \
                             int threads) {                                                                           \
    gated_backward<P>(grad, e, g, dg, count, threads);                                                                \
  }                                                                                                                   \
  void rotated_##NAME(const P::number* x, i64 token_stride, i64 head_stride, const P::number* cos, i64 cos_stride,    \
                      const P::number* sin, i64 sin_stride, P::number* y, i64 tokens, i64 heads, i64 width,           \
                      int threads) {                                                                                  \
    rotated<P>(x, token_stride, head_stride, cos, cos_stride, sin, sin_stride, y, tokens, heads, width, threads);     \
  }

extern "C" {
PASSES(full, Full)
PASSES(half, Half)
}
