// Attention of the segments of a row on a CPU, forward and backward; mm_moslora.kernels.attention.native_cpu_attention says what the
// functions compute.
//
// A block of queries meets a block of keys at a time, so that scores stay near the core. Forward, the softmax runs
// along (what was summed is scaled where a larger score comes); backward, probabilities are computed again, from the
// logarithms of the sums. What no query of a tile sees is not multiplied. Sums are of floats.
//
// A thread takes a head of keys and all its heads of queries, in one segment: no two threads add to one gradient.

#include <cstdlib>
#include <memory>

#include "tiles.h"

namespace {

constexpr i64 M = 6, N = W == 16 ? 4 : 2;  // rows and vectors of a tile: what the registers hold
constexpr i64 PANEL = N * W;
constexpr i64 QUERIES = 96, KEYS = 192;  // of a block, multiples of M and PANEL
constexpr i64 PITCH = KEYS + PANEL;      // of the rows of a block
constexpr i64 WIDEST = 256;              // head

inline i64 up(i64 count, i64 to) { return (count + to - 1) / to * to; }

// Products -----------------------------------------------------------------------------------------------------------

template <class U>
struct Left {  // factors; strides of rows and of the sum
  const typename U::unit* first;
  i64 row, step;
};

template <class U>
struct Right {  // panels of columns, each [of the sum][PANEL]
  const typename U::unit* first;
  i64 panel;  // stride
};

struct Extent {
  i64 from, to;  // of the sum, in units
  i64 columns;
};

// Tiles of rows up to `rows`; `extent` takes the first row of a tile and returns what is to be computed of it.
template <class U, class F>
void product(Left<U> a, Right<U> b, i64 rows, i64 columns, float* c, i64 pitch, bool add, F extent) {
  for (i64 start = 0; start < columns; start += PANEL, b.first += b.panel)
    for (i64 r = 0; r < rows; r += M) {
      const Extent e = extent(r);
      const auto *left = a.first + r * a.row + e.from * a.step, *right = b.first + e.from * PANEL;
      const i64 depth = e.to - e.from;
      float* to = c + r * pitch + start;
      switch (std::min((e.columns - start + W - 1) / W, N)) {
        case 1: tile<U, M, 1>(left, a.row, a.step, right, PANEL, depth, to, pitch, add); break;
        case 2: tile<U, M, 2>(left, a.row, a.step, right, PANEL, depth, to, pitch, add); break;
#ifdef __AVX512F__
        case 3: tile<U, M, 3>(left, a.row, a.step, right, PANEL, depth, to, pitch, add); break;
        case 4: tile<U, M, 4>(left, a.row, a.step, right, PANEL, depth, to, pitch, add); break;
#endif
      }
    }
}

// Tokens as operands -------------------------------------------------------------------------------------------------

template <class T>
struct Heads {  // [token][head][width], the width contiguous
  T* first;
  i64 token, head;  // strides
  T* at(i64 t, i64 h) const { return first + t * token + h * head; }
};

inline float as_float(const float* from) { return *from; }
[[maybe_unused]] inline float as_float(const uint16_t* from) {
  const uint32_t bits = (uint32_t)*from << 16;
  return load<float>(&bits);
}

template <class U>
i64 units_of(i64 width) {
  return (width + U::PER - 1) / U::PER;
}

template <class U, class T>
void copy_row(const T* from, i64 width, typename U::unit* to) {
  if constexpr (sizeof(T) * U::PER == sizeof(typename U::unit)) {
    if (width % U::PER) to[width / U::PER] = {};
    std::memcpy(to, from, width * sizeof(T));
  } else {
    for (i64 e = 0; e < width; ++e) to[e] = as_float(from + e);
  }
}

// Tokens as rows of factors: [up(count, M)][units of width].
template <class U, class T>
void as_rows(const T* x, i64 token, i64 count, i64 width, typename U::unit* to) {
  const i64 units = units_of<U>(width);
  for (i64 i = 0; i < count; ++i) copy_row<U>(x + i * token, width, to + i * units);
  std::fill_n(to + count * units, (up(count, M) - count) * units, typename U::unit{});
}

// Tokens as columns: panels of [units of width][PANEL].
template <class U, class T>
void as_columns(const T* x, i64 token, i64 count, i64 width, typename U::unit* to) {
  using unit = typename U::unit;
  constexpr bool alike = sizeof(T) * U::PER == sizeof(unit);
  const i64 units = units_of<U>(width);
  unit copies[W * WIDEST];
  for (i64 start = 0; start < up(count, PANEL); start += W) {
    const char* rows[W];
    for (i64 n = 0; n < W; ++n) {
      const T* from = x + (start + n) * token;
      unit* copy = copies + n * units;
      rows[n] = (const char*)copy;
      if (start + n >= count)
        std::fill_n(copy, units, unit{});
      else if (alike && width % U::PER == 0)
        rows[n] = (const char*)from;
      else
        copy_row<U>(from, width, copy);
    }
    unit* column = to + start / PANEL * units * PANEL + start % PANEL;
    for (i64 k = 0; k < units; ++k, column += PANEL)
      for (i64 n = 0; n < W; ++n) column[n] = load<unit>(rows[n] + k * sizeof(unit));
  }
}

// Places of the head as columns, summed over tokens: panels of [units of tokens, `pitch` of them][PANEL].
template <class U, class T>
void as_sums(const T* x, i64 token, i64 count, i64 width, i64 pitch, typename U::unit* to) {
  for (i64 start = 0; start < width; start += PANEL, to += pitch * PANEL) {
    const i64 some = std::min(PANEL, width - start);
    for (i64 i = 0; i < count; i += U::PER) {
      auto* line = to + i / U::PER * PANEL;
      const T* from = x + i * token + start;
      if constexpr (U::PER == 1) {
        for (i64 n = 0; n < some; ++n) line[n] = as_float(from + n);
      } else if (i + 1 < count) {
        for (i64 n = 0; n < some; ++n) line[n] = from[n] | (uint32_t)from[n + token] << 16;
      } else {
        for (i64 n = 0; n < some; ++n) line[n] = from[n];
      }
      std::fill_n(line + some, PANEL - some, typename U::unit{});
    }
  }
}

template <class T>
class Room {  // a thread keeps it from call to call
 public:
  T* of(i64 count) {
    if (count > size) {
      size = up(count, 1024);
      memory.reset(static_cast<T*>(std::aligned_alloc(64, size * sizeof(T))));
    }
    return memory.get();
  }

 private:
  std::unique_ptr<T, void (*)(void*)> memory{nullptr, std::free};
  i64 size = 0;
};

// Softmax ------------------------------------------------------------------------------------------------------------

struct Problem {
  i64 heads, key_heads, width;
  float scale;
  bool causal;

  // How many of `keys` keys from `key` on a query sees; both are places in the segment.
  i64 seen(i64 query, i64 key, i64 keys) const {
    return causal ? std::max<i64>(0, std::min(keys, query + 1 - key)) : keys;
  }
};

inline vi places(i64 from) {
  vi index;
  for (i64 i = 0; i < W; ++i) index[i] = (int32_t)(from + i);
  return index;
}

// 2^x to about one unit in the last place; 2^-126 below.
inline vf power_of_two(vf x) {
  const vf least = vf{} - 126.0f;
  x = x < least ? least : x;  // NaN stays
#ifdef __AVX512F__
  const vf whole = (vf)_mm512_roundscale_ps((__m512)x, 8);
#else
  const vf whole = (vf)_mm256_round_ps((__m256)x, 8);
#endif
  const vf f = x - whole;
  vf p = f * 1.53533620e-4f + 1.33988750e-3f;
  p = p * f + 9.61843692e-3f;
  p = p * f + 5.55033237e-2f;
  p = p * f + 2.40226477e-1f;
  p = p * f + 6.93147182e-1f;
  p = p * f + 1.0f;
#ifdef __AVX512F__
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)whole);
#else
  return p * (vf)((__builtin_convertvector(whole, vi) + 127) << 23);
#endif
}

inline float largest_of(vf v) {
  for (i64 step = W / 2; step; step /= 2)
    for (i64 i = 0; i < step; ++i) v[i] = v[i + step] > v[i] ? v[i + step] : v[i];
  return v[0];
}

inline void put_factors(float* row, i64 place, vf value) { store(row + place, value); }
#ifdef __AVX512BF16__
inline void put_factors(uint32_t* row, i64 place, vf value) { store((uint16_t*)row + place, rounded(value)); }

// Two rows of factors of a sum that runs down the rows.
inline void put_pairs(uint32_t* to, vf upper, vf lower) {
  const vu first = __builtin_convertvector(rounded(upper), vu), second = __builtin_convertvector(rounded(lower), vu);
  store(to, first | second << 16);
}
#endif

constexpr float LOG2_E = 1.44269504f;

struct Sums {
  float largest, total;
};

// Scores become 2^(score * scale - largest), zeros behind the `seen` first and up to `ends` at least. Returns by what
// to multiply what was summed before.
template <class unit>
float exponentials(const float* scores, unit* to, i64 seen, i64 ends, float scale, Sums& sums) {
  const i64 whole = seen / W * W;
  const vi last = places(whole) < (vi)(vu{} + (uint32_t)seen);
  vf most = spread(sums.largest), total = {};
  const auto include = [&](vf value) { most = value > most ? value : most; };
  for (i64 n = 0; n < whole; n += W) include(load<vf>(scores + n) * scale);
  if (whole < seen) include(last ? load<vf>(scores + whole) * scale : most);
  const float largest = largest_of(most), shrinks = std::exp2(sums.largest - largest);
  i64 n = 0;
  for (; n < whole; n += W) {
    const vf value = power_of_two(load<vf>(scores + n) * scale - largest);
    total += value;
    put_factors(to, n, value);
  }
  if (n < ends) {
    const vf value = last ? power_of_two(load<vf>(scores + n) * scale - largest) : vf{};
    total += value;
    put_factors(to, n, value);
  }
  for (n += W; n < ends; n += W) put_factors(to, n, vf{});
  sums = {largest, sums.total * shrinks + sum(total)};
  return shrinks;
}

template <class P>
struct Forward {
  using number = typename P::number;
  Problem problem;
  Heads<const number> q, k, v;
  Heads<number> output;
  float* logarithms;  // [head][token]
  i64 tokens;

  template <class U>
  void segment(i64 first, i64 count, i64 key_head) const {
    using unit = typename U::unit;
    static thread_local Room<unit> room;
    static thread_local Room<float> floats;
    const i64 width = problem.width, units = units_of<U>(width), wide = up(width, PANEL);
    const i64 depth = units_of<U>(count), groups = problem.heads / problem.key_heads;
    unit* keys = room.of(up(count, PANEL) * units + depth * wide + QUERIES * (units + PITCH));
    unit *values = keys + up(count, PANEL) * units, *queries = values + depth * wide;
    float *scores = floats.of(QUERIES * (PITCH + wide)), *result = scores + QUERIES * PITCH;
    unit* factors;
    if constexpr (U::PER == 1)
      factors = scores;
    else
      factors = queries + QUERIES * units;
    constexpr i64 pitch = PITCH / U::PER;
    as_columns<U>(k.at(first, key_head), k.token, count, width, keys);
    as_sums<U>(v.at(first, key_head), v.token, count, width, depth, values);
    for (i64 head = key_head * groups; head < (key_head + 1) * groups; ++head)
      for (i64 i = 0; i < count; i += QUERIES) {
        const i64 rows = std::min(QUERIES, count - i);
        Sums sums[QUERIES];
        std::fill_n(sums, rows, Sums{-HUGE_VALF, 0.0f});
        as_rows<U>(q.at(first + i, head), q.token, rows, width, queries);
        for (i64 j = 0; j < (problem.causal ? i + rows : count); j += KEYS) {
          const i64 some = std::min(KEYS, count - j);
          const auto ends = [&](i64 r) { return problem.seen(i + r + M - 1, j, some); };
          product<U>({queries, units, 1}, {keys + j * units, units * PANEL}, rows, some, scores, PITCH, false,
                     [&](i64 r) { return Extent{0, units, ends(r)}; });
          for (i64 r = 0; r < rows; ++r) {
            const i64 until = up(ends(r / M * M), U::PER), seen = problem.seen(i + r, j, some);
            const float shrinks =
                exponentials(scores + r * PITCH, factors + r * pitch, seen, until, problem.scale * LOG2_E, sums[r]);
            if (j > 0 && shrinks != 1)
              for (i64 e = 0; e < wide; e += W) store(result + r * wide + e, load<vf>(result + r * wide + e) * shrinks);
          }
          product<U>({factors, pitch, 1}, {values + j / U::PER * PANEL, depth * PANEL}, rows, width, result, wide,
                     j > 0, [&](i64 r) { return Extent{0, units_of<U>(ends(r)), width}; });
        }
        for (i64 r = 0; r < rows; ++r) {
          number* to = output.at(first + i + r, head);
          const float inverse = 1 / sums[r].total;
          for (i64 e = 0; e < width; e += W) put<P>(to + e, load<vf>(result + r * wide + e) * inverse, width - e);
          logarithms[head * tokens + first + i + r] = sums[r].largest + std::log2(sums[r].total);
        }
      }
  }
};

// P and the gradients of the scores, of one row or of two that are summed together: zeros behind the `seen` first, up
// to `until`.
template <i64 PER, class unit>
void gradients(const float* scores, const float* dP, const float* logarithms, const float* along, const i64* seen,
               i64 until, float scale, unit* P_down, unit* dS_down, unit* dS_along) {
  for (i64 n = 0; n < until; n += W) {
    vf p[2], d[2];
    for (i64 r = 0; r < PER; ++r) {
      const vi shown = places(n) < (vi)(vu{} + (uint32_t)seen[r]);
      const vf found = power_of_two(load<vf>(scores + r * PITCH + n) * scale - logarithms[r]);
      p[r] = shown ? found : vf{};
      d[r] = shown ? found * (load<vf>(dP + r * PITCH + n) - along[r]) : vf{};
    }
    if constexpr (PER == 1) {
      store(P_down + n, p[0]);
      store(dS_down + n, d[0]);
    }
#ifdef __AVX512BF16__
    else {
      put_pairs(P_down + n, p[0], p[1]);
      put_pairs(dS_down + n, d[0], d[1]);
      put_factors(dS_along, n, d[0]);
      put_factors(dS_along + PITCH / 2, n, d[1]);
    }
#endif
  }
}

template <class P>
struct Backward {
  using number = typename P::number;
  Problem problem;
  Heads<const number> grad, q, k, v, output;
  const float* logarithms;  // [head][token]
  Heads<number> dq, dk, dv;
  i64 tokens;

  template <class U>
  void segment(i64 first, i64 count, i64 key_head) const {
    using unit = typename U::unit;
    static thread_local Room<unit> room;
    static thread_local Room<float> floats;
    const i64 width = problem.width, units = units_of<U>(width), wide = up(width, PANEL), all = up(count, PANEL);
    const i64 depth = units_of<U>(count), groups = problem.heads / problem.key_heads;
    constexpr i64 down = QUERIES / U::PER, pitch = PITCH / U::PER;
    unit* keys = room.of(2 * all * units + depth * wide + QUERIES * (2 * units + pitch) + 2 * down * (wide + PITCH));
    unit *values = keys + all * units, *key_sums = values + all * units, *queries = key_sums + depth * wide;
    unit *pulls = queries + QUERIES * units, *query_sums = pulls + QUERIES * units;
    unit *pull_sums = query_sums + down * wide, *P_down = pull_sums + down * wide, *dS_down = P_down + down * PITCH;
    unit* dS_along = dS_down + down * PITCH;
    float *scores = floats.of(QUERIES * (2 * PITCH + wide) + 2 * up(count, M) * wide);
    float *dP = scores + QUERIES * PITCH, *of_q = dP + QUERIES * PITCH, *of_k = of_q + QUERIES * wide;
    float* of_v = of_k + up(count, M) * wide;
    if constexpr (U::PER == 1) P_down = scores, dS_down = dS_along = dP;
    as_columns<U>(k.at(first, key_head), k.token, count, width, keys);
    as_columns<U>(v.at(first, key_head), v.token, count, width, values);
    as_sums<U>(k.at(first, key_head), k.token, count, width, depth, key_sums);
    std::fill_n(of_k, 2 * up(count, M) * wide, 0.0f);
    for (i64 head = key_head * groups; head < (key_head + 1) * groups; ++head)
      for (i64 i = 0; i < count; i += QUERIES) {
        const i64 rows = std::min(QUERIES, count - i);
        const number *own = q.at(first + i, head), *pull = grad.at(first + i, head);
        as_rows<U>(own, q.token, rows, width, queries);
        as_rows<U>(pull, grad.token, rows, width, pulls);
        as_sums<U>(own, q.token, rows, width, down, query_sums);
        as_sums<U>(pull, grad.token, rows, width, down, pull_sums);
        float along[QUERIES + 1], known[QUERIES + 1];
        along[rows] = known[rows] = 0;
        for (i64 r = 0; r < rows; ++r) {
          along[r] = inner(pull + r * grad.token, output.at(first + i + r, head));
          known[r] = logarithms[head * tokens + first + i + r];
        }
        for (i64 j = 0; j < (problem.causal ? i + rows : count); j += KEYS) {
          const i64 some = std::min(KEYS, count - j);
          const auto ends = [&](i64 r) { return problem.seen(i + r + M - 1, j, some); };
          const auto scored = [&](i64 r) { return Extent{0, units, ends(r)}; };
          product<U>({queries, units, 1}, {keys + j * units, units * PANEL}, rows, some, scores, PITCH, false, scored);
          product<U>({pulls, units, 1}, {values + j * units, units * PANEL}, rows, some, dP, PITCH, false, scored);
          for (i64 r = 0; r < rows; r += U::PER) {
            i64 seen[2] = {};
            for (i64 at = r; at < std::min(r + U::PER, rows); ++at) seen[at - r] = problem.seen(i + at, j, some);
            const i64 until = std::min(up(std::max(ends(r / M * M), seen[0] + 2 * M), W), PITCH);
            const i64 down_to = r / U::PER * PITCH;
            gradients<U::PER>(scores + r * PITCH, dP + r * PITCH, known + r, along + r, seen, until,
                              problem.scale * LOG2_E, P_down + down_to, dS_down + down_to, dS_along + r * pitch);
          }
          // A key is summed over the queries that see it.
          const auto summed = [&](i64 r) {
            const i64 from = problem.causal ? std::max<i64>(0, j + r - i) : 0;
            return Extent{from / U::PER, units_of<U>(rows), width};
          };
          product<U>({P_down, 1, PITCH}, {pull_sums, down * PANEL}, some, width, of_v + j * wide, wide, true, summed);
          product<U>({dS_down, 1, PITCH}, {query_sums, down * PANEL}, some, width, of_k + j * wide, wide, true, summed);
          product<U>({dS_along, pitch, 1}, {key_sums + j / U::PER * PANEL, depth * PANEL}, rows, width, of_q, wide,
                     j > 0, [&](i64 r) { return Extent{0, units_of<U>(ends(r)), width}; });
        }
        write(of_q, rows, wide, dq.at(first + i, head), dq.token, problem.scale);
      }
    write(of_k, count, wide, dk.at(first, key_head), dk.token, problem.scale);
    write(of_v, count, wide, dv.at(first, key_head), dv.token, 1);
  }

  float inner(const number* a, const number* b) const {
    vf total = {};
    for (i64 e = 0; e < problem.width; e += W)
      total += get<P>(a + e, problem.width - e) * get<P>(b + e, problem.width - e);
    return sum(total);
  }

  void write(const float* from, i64 count, i64 pitch, number* to, i64 token, float factor) const {
    for (i64 i = 0; i < count; ++i)
      for (i64 e = 0; e < problem.width; e += W)
        put<P>(to + i * token + e, load<vf>(from + i * pitch + e) * factor, problem.width - e);
  }
};

// Every segment and head of keys.
template <class U, class Pass>
void by_segments(const Pass& pass, const i64* ends, i64 segments, int threads) {
  const i64 heads = pass.problem.key_heads;
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
  for (i64 task = 0; task < segments * heads; ++task) {
    const i64 first = ends[task / heads], end = ends[task / heads + 1];
    pass.template segment<U>(first, end - first, task % heads);
  }
}

}  // namespace

#define HEADS(P, NAME) P::number *NAME, i64 NAME##_token, i64 NAME##_head
#define GIVEN(P, NAME) const P::number *NAME, i64 NAME##_token, i64 NAME##_head
#define STRIDED(NAME) \
  { NAME, NAME##_token, NAME##_head }

#define ATTENTION(NAME, P, UNITS)                                                                                     \
  void attend_##NAME(GIVEN(P, q), GIVEN(P, k), GIVEN(P, v), HEADS(P, output), float* logarithms, const i64* ends,     \
                     i64 segments, i64 heads, i64 key_heads, i64 width, float scale, int causal, int threads) {       \
    const Forward<P> pass = {{heads, key_heads, width, scale, causal != 0}, STRIDED(q), STRIDED(k), STRIDED(v),       \
                             STRIDED(output), logarithms, ends[segments]};                                            \
    by_segments<UNITS>(pass, ends, segments, threads);                                                                \
  }                                                                                                                   \
  void attend_backward_##NAME(GIVEN(P, grad), GIVEN(P, q), GIVEN(P, k), GIVEN(P, v), GIVEN(P, output),                \
                              const float* logarithms, HEADS(P, dq), HEADS(P, dk), HEADS(P, dv), const i64* ends,     \
                              i64 segments, i64 heads, i64 key_heads, i64 width, float scale, int causal,             \
                              int threads) {                                                                          \
    const Backward<P> pass = {{heads, key_heads, width, scale, causal != 0}, STRIDED(grad), STRIDED(q), STRIDED(k),   \
                              STRIDED(v), STRIDED(output), logarithms, STRIDED(dq), STRIDED(dk), STRIDED(dv),         \
                              ends[segments]};                                                                        \
    by_segments<UNITS>(pass, ends, segments, threads);                                                                \
  }

extern "C" {
ATTENTION(full, Full, Singles)
ATTENTION(half, Half, HalfUnits)
}
