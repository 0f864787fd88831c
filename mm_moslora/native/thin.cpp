// Two thin products of an adapter on a CPU, in float: tokens by a factor of a small rank, and tokens by tokens. Ranks,
// and the columns of the second, are multiples of a vector.

#include <type_traits>
#include <vector>

#include "tiles.h"

namespace {

constexpr i64 ROWS = 8, PANEL = (W == 16 ? 3 : 1) * W;  // of a tile

// Calls `body(V)` with the vectors of some columns.
template <class F>
void by_width(i64 columns, F body) {
  switch (columns / W) {
    case 1: body(std::integral_constant<i64, 1>()); break;
#ifdef __AVX512F__
    case 2: body(std::integral_constant<i64, 2>()); break;
    case 3: body(std::integral_constant<i64, 3>()); break;
#endif
  }
}

// Calls `body(row, M)` for tiles of rows.
template <class F>
void by_tiles(i64 from, i64 to, F body) {
  for (; to - from >= ROWS; from += ROWS) body(from, std::integral_constant<i64, ROWS>());
  for (; from < to; ++from) body(from, std::integral_constant<i64, 1>());
}

// z [tokens, rank] = x [tokens, width] f, f [width, rank] in any layout.
void inner(const float* x, i64 x_row, const float* f, i64 f_line, i64 f_column, float* z, i64 tokens, i64 width,
           i64 rank, int threads) {
  std::vector<float> factors(width * rank);  // in panels of columns
  for (i64 start = 0; start < rank; start += PANEL) {
    const i64 some = std::min(PANEL, rank - start);
    float* panel = factors.data() + start * width;
    for (i64 n = 0; n < some; ++n)
      for (i64 k = 0; k < width; ++k) panel[k * some + n] = f[k * f_line + (start + n) * f_column];
  }
  constexpr i64 BLOCK = 64;
  by_rows((tokens + BLOCK - 1) / BLOCK, threads, [&](i64 block) {
    for (i64 start = 0; start < rank; start += PANEL)
      by_width(std::min(PANEL, rank - start), [&](auto V) {
        by_tiles(block * BLOCK, std::min((block + 1) * BLOCK, tokens), [&](i64 t, auto M) {
          tile<Singles, M, V>(x + t * x_row, x_row, 1, factors.data() + start * width, V * W, width,
                              z + t * rank + start, rank, false);
        });
      });
  });
}

// g [rank, columns] = u^T y, u [tokens, rank], y [tokens, columns]. Every thread takes columns of its own.
void summed(const float* u, i64 u_row, const float* y, i64 y_row, float* g, i64 tokens, i64 rank, i64 columns,
            int threads) {
  constexpr i64 BLOCK = 32;
  const i64 panels = (columns + PANEL - 1) / PANEL, parts = std::min<i64>(threads, panels);
  by_rows(parts, threads, [&](i64 part) {
    const i64 from = panels * part / parts * PANEL, to = std::min(panels * (part + 1) / parts * PANEL, columns);
    for (i64 t = 0; t < tokens; t += BLOCK)
      for (i64 n = from; n < to; n += PANEL)
        by_width(std::min(PANEL, to - n), [&](auto V) {
          by_tiles(0, rank, [&](i64 r, auto M) {
            tile<Singles, M, V>(u + t * u_row + r, 1, u_row, y + t * y_row + n, y_row, std::min(BLOCK, tokens - t),
                                g + r * columns + n, columns, t > 0);
          });
        });
  });
}

}  // namespace

extern "C" {
void inner_full(const float* x, i64 x_row, const float* f, i64 f_line, i64 f_column, float* z, i64 tokens, i64 width,
                i64 rank, int threads) {
  inner(x, x_row, f, f_line, f_column, z, tokens, width, rank, threads);
}

void summed_full(const float* u, i64 u_row, const float* y, i64 y_row, float* g, i64 tokens, i64 rank, i64 columns,
                 int threads) {
  summed(u, u_row, y, y_row, g, tokens, rank, columns, threads);
}
}
