// What runs between the matrix products of a lean decoder layer on a CPU; mm_moslora.models.elementwise says what each
// function computes.

#include "vectors.h"

namespace {

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
