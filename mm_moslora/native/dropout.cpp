// Dropout of an adapter's input; mm_moslora.adapters.dropout says what is dropped, and draws the same masks without this.
//
// A mask is a bit per entry, row by row: 1 where the entry stays. Bits are drawn in one sequence, and so by one thread;
// eight bytes can be read behind the last.

#include "vectors.h"

#if defined(__AVX512F__) && !defined(__AVX512BW__)
#error "the processor has AVX-512 without AVX512BW, and nothing was measured there"
#endif

namespace {

constexpr int ENTRIES = 32;  // that are compared at once, 8 words
constexpr int WORDS = 256;   // drawn before they are compared: by then they have reached the cache
constexpr int MASKS = 4;     // drawn side by side, in less than twice the time of one

typedef uint64_t words4 __attribute__((vector_size(8 * MASKS)));

// numpy's SFC64 (Chris Doty-Humphrey's), or four of them.
template <class V>
struct Generator {
  V a, b, c, counter;
  V next() {
    const V found = (a + counter) + b;  // b is the last to be ready
    counter += 1;
    a = b ^ (b >> 11);
    b = c + (c << 3);
    c = ((c << 24) | (c >> 40)) + found;
    return found;
  }
};

inline void draw_words(Generator<uint64_t>& generator, uint64_t (*words)[WORDS], i64 count) {
  for (i64 i = 0; i < count; ++i) words[0][i] = generator.next();
}

inline void draw_words(Generator<words4>& generators, uint64_t (*words)[WORDS], i64 count) {
  i64 i = 0;
  for (; i + 4 <= count; i += 4) {
    const __m256i w0 = (__m256i)generators.next(), w1 = (__m256i)generators.next();
    const __m256i w2 = (__m256i)generators.next(), w3 = (__m256i)generators.next();
    const __m256i even0 = _mm256_unpacklo_epi64(w0, w1), odd0 = _mm256_unpackhi_epi64(w0, w1);
    const __m256i even2 = _mm256_unpacklo_epi64(w2, w3), odd2 = _mm256_unpackhi_epi64(w2, w3);
    store(words[0] + i, _mm256_permute2x128_si256(even0, even2, 0x20));
    store(words[1] + i, _mm256_permute2x128_si256(odd0, odd2, 0x20));
    store(words[2] + i, _mm256_permute2x128_si256(even0, even2, 0x31));
    store(words[3] + i, _mm256_permute2x128_si256(odd0, odd2, 0x31));
  }
  for (; i < count; ++i) {
    const words4 word = generators.next();
    for (int mask = 0; mask < MASKS; ++mask) words[mask][i] = word[mask];
  }
}

// A bit for each of 32 numbers of 15 bits (the upper bit of each 16 does not count): whether it is above `limit`.
inline uint32_t above(const uint64_t* words, int limit) {
#ifdef __AVX512F__
  const __m512i number = _mm512_and_si512(load<__m512i>(words), _mm512_set1_epi16(0x7fff));
  return _mm512_cmpgt_epi16_mask(number, _mm512_set1_epi16((short)limit));
#else
  const __m256i number = _mm256_set1_epi16(0x7fff), limits = _mm256_set1_epi16((short)limit);
  const __m256i first = _mm256_cmpgt_epi16(_mm256_and_si256(load<__m256i>(words), number), limits);
  const __m256i second = _mm256_cmpgt_epi16(_mm256_and_si256(load<__m256i>(words + 4), number), limits);
  return (uint32_t)_mm256_movemask_epi8(_mm256_permute4x64_epi64(_mm256_packs_epi16(first, second), 0xd8));
#endif
}

template <class V>
void draw(uint64_t* state, int masks, const int* thresholds, uint8_t* bits, i64 stride, i64 count) {
  auto generator = load<Generator<V>>(state);
  uint64_t words[sizeof(V) / 8][WORDS] = {};
  for (i64 done = 0; done < count; done += 4 * WORDS) {
    const i64 entries = std::min<i64>(4 * WORDS, count - done);
    draw_words(generator, words, (entries + 3) / 4);
    for (int mask = 0; mask < masks; ++mask)
      for (i64 i = 0; i < entries; i += ENTRIES)
        store(bits + mask * stride + (done + i) / 8, above(words[mask] + i / 4, thresholds[mask] - 1));
  }
  store(state, generator);
}

// The two dtypes, a vector of entries as the bits that they are: as many bytes as a vector of floats.
typedef uint16_t vs __attribute__((vector_size(4 * W)));

struct FullEntries {
  using number = float;
  using vector = vu;
  static constexpr i64 count = W;
  static vector sum(vector a, vector b) { return (vector)((vf)a + (vf)b); }

  // Zeros where a bit of `mask` is 0.
  static vector kept(vector entries, uint32_t mask) {
#ifdef __AVX512F__
    return (vector)_mm512_maskz_mov_epi32((__mmask16)mask, (__m512i)entries);
#else
    const vector places = {1, 2, 4, 8, 16, 32, 64, 128};
    return entries & (vector)(((vector{} + mask) & places) != 0);
#endif
  }
};

struct HalfEntries {
  using number = uint16_t;
  using vector = vs;
  static constexpr i64 count = 2 * W;
  static vector sum(vector a, vector b) {
    const vh first = rounded_exactly(widened(half(a, 0)) + widened(half(b, 0)));
    const vh second = rounded_exactly(widened(half(a, 1)) + widened(half(b, 1)));
#ifdef __AVX512F__
    return (vector)_mm512_inserti64x4(_mm512_castsi256_si512((__m256i)first), (__m256i)second, 1);
#else
    return (vector)_mm256_set_m128i((__m128i)second, (__m128i)first);
#endif
  }

  static vh half(vector entries, int place) {
#ifdef __AVX512F__
    return (vh)(place ? _mm512_extracti64x4_epi64((__m512i)entries, 1) : _mm512_castsi512_si256((__m512i)entries));
#else
    return (vh)(place ? _mm256_extracti128_si256((__m256i)entries, 1) : _mm256_castsi256_si128((__m256i)entries));
#endif
  }

  static vector kept(vector entries, uint32_t mask) {
#ifdef __AVX512F__
    return (vector)_mm512_maskz_mov_epi16((__mmask32)mask, (__m512i)entries);
#else
    vector places;
    for (i64 i = 0; i < count; ++i) places[i] = 1u << i;
    return entries & (vector)(((vector{} + (uint16_t)mask) & places) != 0);
#endif
  }
};

// The first `count` entries, one or more; zeros behind them.
template <class P>
typename P::vector get_entries(const typename P::number* from, i64 count) {
  if (count >= P::count) return load<typename P::vector>(from);
  typename P::vector entries = {};
  std::memcpy(&entries, from, count * sizeof *from);
  return entries;
}

template <class P>
void put_entries(typename P::number* to, typename P::vector entries, i64 count) {
  if (count >= P::count) return store(to, entries);
  std::memcpy(to, &entries, count * sizeof *to);
}

// Those that stay by the mask that begins with the bit `at`.
template <class P>
typename P::vector get_kept(const typename P::number* from, const uint8_t* bits, i64 at, i64 count) {
  return P::kept(get_entries<P>(from, count), (uint32_t)(load<uint64_t>(bits + at / 8) >> (at % 8)));
}

template <class P>
void keep_row(const typename P::number* from, const uint8_t* bits, i64 at, typename P::number* to, i64 width) {
  for (i64 i = 0; i < width; i += P::count)
    put_entries<P>(to + i, get_kept<P>(from + i, bits, at + i, width - i), width - i);
}

template <class P>
void add_row(const typename P::number* from, const uint8_t* bits, i64 at, typename P::number* to, i64 width) {
  for (i64 i = 0; i < width; i += P::count) {
    const auto sum = P::sum(get_entries<P>(to + i, width - i), get_kept<P>(from + i, bits, at + i, width - i));
    put_entries<P>(to + i, sum, width - i);
  }
}

template <class P>
void keep(const typename P::number* x, i64 stride, const uint8_t* bits, typename P::number* y, i64 rows, i64 width,
          int threads) {
  by_rows(rows, threads,
          [=](i64 row) { keep_row<P>(x + row * stride, bits, row * width, y + row * width, width); });
}

// y += what the mask keeps of x.
template <class P>
void add_kept(const typename P::number* x, const uint8_t* bits, typename P::number* y, i64 rows, i64 width,
              int threads) {
  by_rows(rows, threads, [=](i64 row) { add_row<P>(x + row * width, bits, row * width, y + row * width, width); });
}

}  // namespace

// What Python calls -------------------------------------------------------------------------------------------------

#define DROPOUT(NAME, P)                                                                                           \
  void keep_##NAME(const P::number* x, i64 stride, const uint8_t* bits, P::number* y, i64 rows, i64 width,         \
                   int threads) {                                                                                  \
    keep<P>(x, stride, bits, y, rows, width, threads);                                                             \
  }                                                                                                                \
  void add_kept_##NAME(const P::number* x, const uint8_t* bits, P::number* y, i64 rows, i64 width, int threads) {  \
    add_kept<P>(x, bits, y, rows, width, threads);                                                                 \
  }

extern "C" {
// The next bits of one mask, or of two to four. The state is that of numpy's generator, [4], or of four side by side,
// [4, 4]; the last four bytes that are written of a mask may hold bits for no entry.
void draw_bits(uint64_t* state, int masks, const int* thresholds, uint8_t* bits, i64 stride, i64 count) {
  (masks == 1 ? draw<uint64_t> : draw<words4>)(state, masks, thresholds, bits, stride, count);
}
DROPOUT(full, FullEntries)
DROPOUT(half, HalfEntries)
}
