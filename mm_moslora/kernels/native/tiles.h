// Tiles of matrix products; their sums stay in registers. Products are of 32-bit units: a float, or two neighbours in
// bfloat16 where the processor multiplies such pairs.

#pragma once

#include "vectors.h"

namespace {

struct Singles {
  using unit = float;
  static constexpr i64 PER = 1;
  static vf add_product(vf total, const unit* factor, vf values) { return total + spread(*factor) * values; }
};

#ifdef __AVX512BF16__
struct Pairs {
  using unit = uint32_t;
  static constexpr i64 PER = 2;
  static vf add_product(vf total, const unit* factor, vf values) {
    return (vf)_mm512_dpbf16_ps((__m512)total, (__m512bh)_mm512_set1_epi32((int)*factor), (__m512bh)values);
  }
};
using HalfUnits = Pairs;
#else
using HalfUnits = Singles;
#endif

// c = (c +) sum over k of a(row, k) b(k, column), for M rows and V vectors of columns; `row` and `step` are the strides
// of a, `line` is that of b. The loops are unrolled for their sums to stay in registers.
template <class U, i64 M, i64 V>
void tile(const typename U::unit* a, i64 row, i64 step, const typename U::unit* b, i64 line, i64 depth, float* c,
          i64 pitch, bool add) {
  vf total[M][V];
#pragma GCC unroll 8
  for (i64 m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (i64 n = 0; n < V; ++n) total[m][n] = vf{};
  for (i64 k = 0; k < depth; ++k, a += step, b += line) {
    vf values[V];
#pragma GCC unroll 4
    for (i64 n = 0; n < V; ++n) values[n] = load<vf>(b + n * W);
#pragma GCC unroll 8
    for (i64 m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (i64 n = 0; n < V; ++n) total[m][n] = U::add_product(total[m][n], a + m * row, values[n]);
  }
#pragma GCC unroll 8
  for (i64 m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (i64 n = 0; n < V; ++n) {
      float* to = c + m * pitch + n * W;
      store(to, add ? load<vf>(to) + total[m][n] : total[m][n]);
    }
}

}  // namespace
