// csrc/cpu/dot.h: sums of products of bytes, in the best instructions of this ISA level. Integers: exact, in any order.
//
// A lane is one feature; a weight vector holds four codes of each of L features, an activation word the four int8 values that
// they meet. Codes are either small (0..15) or signed bytes; activations lie in -127..127.
//
//   small    vpdpbusd; avx2: vpmaddubsw, whose pair sums (at most 3810) are added up eight times in 16 bits before one vpmaddwd
//   signed   vpdpbusd of code + 128 (kSignedOffset says so: the caller takes 128 * sum(x) off); avx2: vpmaddubsw of |code| and
//            sign(x, code), at most 32512: no saturation, nor room to add in 16 bits
#pragma once
#include "cpu/isa.h"

namespace ramify::RAMIFY_ISA {
namespace {

typedef int32_t Ints __attribute__((vector_size(4 * L)));
typedef float Floats __attribute__((vector_size(4 * L)));

RAMIFY_INLINE Ints ints(int32_t x) { return x - Ints{}; }
RAMIFY_INLINE Ints load_ints(const void* p) {
  Ints r;
  __builtin_memcpy(&r, p, sizeof(r));
  return r;
}
RAMIFY_INLINE Ints shift_right(Ints x, int bits) {  // zeros come in
  typedef uint32_t Words __attribute__((vector_size(4 * L)));
  return (Ints)((Words)x >> bits);
}
RAMIFY_INLINE Vec to_float(Ints x) { return {(decltype(Vec::v))__builtin_convertvector(x, Floats)}; }
RAMIFY_INLINE Vec as_float(Ints x) { return {(decltype(Vec::v))x}; }
RAMIFY_INLINE Ints as_ints(Vec x) { return (Ints)x.v; }
// L values of -128..127 as bytes.
RAMIFY_INLINE void store_bytes(int8_t* p, Ints x) {
#if defined(__AVX512F__)
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)x));
#elif defined(__AVX2__)
  const __m128i half = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
  _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(half, half));
#else
  for (int i = 0; i < L; ++i) p[i] = int8_t(x[i]);
#endif
}
#if defined(__AVX512F__)
RAMIFY_INLINE int32_t hsum(Ints x) { return _mm512_reduce_add_epi32((__m512i)x); }
RAMIFY_INLINE int32_t hmax(Ints x) { return _mm512_reduce_max_epi32((__m512i)x); }
#else
RAMIFY_INLINE int32_t hsum(Ints x) {
  int32_t sum = x[0];
  for (int i = 1; i < L; ++i) sum += x[i];
  return sum;
}
RAMIFY_INLINE int32_t hmax(Ints x) {
  int32_t most = x[0];
  for (int i = 1; i < L; ++i) most = x[i] > most ? x[i] : most;
  return most;
}
#endif
RAMIFY_INLINE int32_t word_at(const int8_t* x) {
  int32_t w;
  __builtin_memcpy(&w, x, 4);
  return w;
}

#if defined(__AVX512VNNI__)
constexpr int kDotVecs = 2;
constexpr int most_tokens(bool small) { return small ? 12 : 8; }  // 24 accumulators of 32 registers; signed codes take two more
RAMIFY_INLINE Ints dot_bytes(Ints sum, Ints w, Ints x) { return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x); }
#elif defined(__AVXVNNI__)
constexpr int kDotVecs = 2;
constexpr int most_tokens(bool) { return 6; }  // 12 accumulators of 16 registers
RAMIFY_INLINE Ints dot_bytes(Ints sum, Ints w, Ints x) { return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)w, (__m256i)x); }
#elif defined(__AVX2__)
constexpr int kDotVecs = 2;
constexpr int most_tokens(bool small) { return small ? 6 : 4; }  // |code| takes registers of its own
#else
constexpr int kDotVecs = 4;
constexpr int most_tokens(bool) { return 4; }
#endif
// Vectors and rows of a tile.
static_assert(kDotVecs * L % kLowBitPanel == 0 && kPanel % (kDotVecs * L) == 0, "a tile of many rows is one or two whole panels");

// sum[v][t] += the products of `steps` words, eight at a time; w(v, s, i, T) is weight vector v of step s + i, x[(s * T + t) * 4] the
// activations.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)

constexpr int kSignedOffset = 128;

template <bool kSmall, int T, int N, class W>
RAMIFY_INLINE void dot(Ints (&sum)[N][T], const W& w, const int8_t* x, int64_t steps) {
  for (int64_t s = 0; s < steps; s += 2)
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      Ints code[N];
      for (int v = 0; v < N; ++v) code[v] = kSmall ? w(v, s, i, T) : w(v, s, i, T) ^ ints(int32_t(0x80808080));
      for (int t = 0; t < T; ++t) {
        const Ints word = ints(word_at(x + ((s + i) * T + t) * 4));
        for (int v = 0; v < N; ++v) sum[v][t] = dot_bytes(sum[v][t], code[v], word);
      }
    }
}

#elif defined(__AVX2__)

constexpr int kSignedOffset = 0;

// Sums in place. Left to itself gcc adds up a chain as a tree, whose leaves do not fit the registers.
RAMIFY_INLINE void add_words(__m256i& sum, __m256i x) { asm("vpaddw %1, %0, %0" : "+x"(sum) : "x"(x)); }
RAMIFY_INLINE void add_ints(Ints& sum, __m256i x) { asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(x)); }

template <bool kSmall, int T, int N, class W>
RAMIFY_INLINE void dot(Ints (&sum)[N][T], const W& w, const int8_t* x, int64_t steps) {
  const __m256i ones = _mm256_set1_epi16(1);
  if constexpr (kSmall) {
    for (int64_t s = 0; s < steps; s += 8) {
      __m256i part[N][T];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        Ints code[N];
        for (int v = 0; v < N; ++v) code[v] = w(v, s, i, T);
        for (int t = 0; t < T; ++t) {
          const __m256i word = _mm256_set1_epi32(word_at(x + ((s + i) * T + t) * 4));
          for (int v = 0; v < N; ++v) {
            const __m256i pairs = _mm256_maddubs_epi16((__m256i)code[v], word);
            if (i == 0)
              part[v][t] = pairs;
            else
              add_words(part[v][t], pairs);
          }
        }
      }
      for (int v = 0; v < N; ++v)
        for (int t = 0; t < T; ++t) add_ints(sum[v][t], _mm256_madd_epi16(part[v][t], ones));
    }
  } else {
    for (int64_t s = 0; s < steps; s += 2)
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        Ints code[N];
        for (int v = 0; v < N; ++v) code[v] = w(v, s, i, T);
        for (int t = 0; t < T; ++t) {
          const __m256i word = _mm256_set1_epi32(word_at(x + ((s + i) * T + t) * 4));
          for (int v = 0; v < N; ++v) {
            const __m256i c = (__m256i)code[v];
            const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(c), _mm256_sign_epi8(word, c));
            add_ints(sum[v][t], _mm256_madd_epi16(pairs, ones));
          }
        }
      }
  }
}

#else

constexpr int kSignedOffset = 0;

template <bool kSmall, int T, int N, class W>
RAMIFY_INLINE void dot(Ints (&sum)[N][T], const W& w, const int8_t* x, int64_t steps) {
  for (int64_t s = 0; s < steps; s += 2)
    for (int i = 0; i < 2; ++i)
      for (int v = 0; v < N; ++v) {
        const Ints code = w(v, s, i, T);
        for (int b = 0; b < 4; ++b) {
          const Ints c = kSmall ? (code >> 8 * b) & 15 : code << (24 - 8 * b) >> 24;
          for (int t = 0; t < T; ++t) sum[v][t] += c * int32_t(x[((s + i) * T + t) * 4 + b]);
        }
      }
}

#endif

}  // namespace
}  // namespace ramify::RAMIFY_ISA
