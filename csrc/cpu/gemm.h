// csrc/cpu/gemm.h: the one inner loop of linear layers and attention.
//
// What     acc[m][n] += a[m][k] * b[k][n], k in ascending order, one accumulator for each (m, n).
// Lanes    n: features of a weight panel, slots of a key page, or the head dimension of a value page.
// Bits     an accumulator's chain of additions depends on k alone, so a row's result is the same in a tile of 1 and of 12
//          rows and beside any neighbours (row_invariance). Latency is hidden by more rows or more vectors, never by
//          cutting k.
// Tiles    kRows rows x 2 vectors fill the registers; fewer rows take more vectors instead.
#pragma once
#include "cpu/isa.h"

namespace ramify::RAMIFY_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kRows = 12;  // 24 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int kRows = 6;  // 12 accumulators of 16 registers
#else
constexpr int kRows = 4;
#endif

// Vectors beside each other in a tile of `rows` rows.
constexpr int tile_vectors([[maybe_unused]] int rows) {
#if defined(__AVX512F__)
  return rows <= 2 ? 8 : rows <= 6 ? 4 : 2;
#elif defined(__AVX2__)
  return rows <= 1 ? 8 : rows <= 3 ? 4 : 2;
#else
  return 2;
#endif
}

// Loaders name where b[k][n] lies. `at(n)` returns a cursor for vector n of the tile; f32 cursors give one k a step, pair
// cursors two.

struct F32Panels {  // weight or key panels, `size` elements from panel to panel
  static constexpr bool kPairs = false;
  const float* base;
  int64_t size;
  RAMIFY_INLINE const float* at(int n) const { return base + n * L / kPanel * size + n * L % kPanel; }
  RAMIFY_INLINE int64_t step() const { return kPanel; }
};

struct Bf16Panels {
  static constexpr bool kPairs = true;
  const bf16* base;
  int64_t size;
  RAMIFY_INLINE const bf16* at(int n) const { return base + n * L / kPanel * size + n * L % kPanel * 2; }
  RAMIFY_INLINE int64_t step() const { return 2 * kPanel; }
};

struct F32Rows {  // a value page, or any rows at one stride
  static constexpr bool kPairs = false;
  const float* base;
  int64_t stride;
  RAMIFY_INLINE const float* at(int n) const { return base + n * L; }
  RAMIFY_INLINE int64_t step() const { return stride; }
};

struct Bf16PairRows {  // a bf16 value page: [32][D][2]
  static constexpr bool kPairs = true;
  const bf16* base;
  int64_t D;
  RAMIFY_INLINE const bf16* at(int n) const { return base + n * L * 2; }
  RAMIFY_INLINE int64_t step() const { return 2 * D; }
};

// acc += x * w, in place. Left to itself gcc also overwrites x instead, moves the sum there, and runs out of AVX2's registers.
RAMIFY_INLINE void accumulate(Vec& acc, Vec x, Vec w) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  __m256 sum = acc.v;
  asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(x.v), "x"(w.v));
  acc.v = sum;
#else
  acc = fma(x, w, acc);
#endif
}

// One value of k for every accumulator. The smaller operand of the two waits in registers: on AVX2 the accumulators leave four.
template <int kStepM, int M, int N, class W>
RAMIFY_INLINE void multiply_one(Vec (&acc)[M][N], const float* a, W&& weight) {
  if constexpr (M < N) {
    Vec x[M];
    for (int m = 0; m < M; ++m) x[m] = Vec::set(a[m * kStepM]);
    for (int n = 0; n < N; ++n) {
      const Vec w = weight(n);
      for (int m = 0; m < M; ++m) accumulate(acc[m][n], x[m], w);
    }
  } else {
    Vec w[N];
    for (int n = 0; n < N; ++n) w[n] = weight(n);
    for (int m = 0; m < M; ++m) {
      const Vec x = Vec::set(a[m * kStepM]);
      for (int n = 0; n < N; ++n) accumulate(acc[m][n], x, w[n]);
    }
  }
}

// Hides from the compiler that two reads are of one address: it would keep the first value in a register that AVX2 lacks.
template <class T>
RAMIFY_INLINE T* reread(T* p) {
  asm volatile("" : "+r"(p));
  return p;
}

// Adds K products to each accumulator; row m's value k is a[k * kStepK + m * kStepM]. kAhead: how far before its use a panel of
// pairs is asked for, in bytes, or 0. `ahead` (elements) is what the next tile reads where this one reads now: a tile narrower
// than a panel skips every other line.
template <int kStepK, int kStepM, int kAhead = 0, int M, int N, class B>
RAMIFY_INLINE void multiply(Vec (&acc)[M][N], const float* a, const B& b, int64_t K, int64_t ahead = 0) {
  const int64_t step = b.step();
  const auto* p = b.at(0);
  const auto at = [&](int n) { return b.at(n) - b.at(0); };  // a constant, or one register
  if constexpr (B::kPairs) {
    for (int64_t k = 0; k + 1 < K; k += 2, p += step, a += 2 * kStepK) {
      if (ahead != 0) __builtin_prefetch(p + ahead);
      for (int n = 0; kAhead != 0 && n < N; n += 16 / L) __builtin_prefetch(p + at(n) + kAhead / 2);  // a line is 16 features
      multiply_one<kStepM>(acc, a, [&](int n) { return Pairs::load(p + at(n)).even(); });
      const auto* again = reread(p);
      multiply_one<kStepM>(acc, a + kStepK, [&](int n) { return Pairs::load(again + at(n)).odd(); });
    }
    if (K & 1) multiply_one<kStepM>(acc, a, [&](int n) { return Pairs::load(p + at(n)).even(); });
  } else {
    for (int64_t k = 0; k < K; ++k, p += step, a += kStepK) multiply_one<kStepM>(acc, a, [&](int n) { return Vec::load(p + at(n)); });
  }
}

#if defined(__AVX512BF16__)
#define RAMIFY_BF16_DOT 1
// Both operands in bf16 pairs: a[(k / 2) * M + m] holds two neighbours of row m. Only for sums along K or D, whose pairs are
// the same for every row; sums along slots never pair, or a row's pairs would depend on where its ancestors lie. kAhead as above.
template <int kAhead, int M, int N>
RAMIFY_INLINE void multiply_bf16(Vec (&acc)[M][N], const uint32_t* a, const Bf16Panels& b, int64_t pairs) {
  const int64_t step = b.step();
  for (int64_t k = 0, offset = 0; k < pairs; ++k, offset += step, a += M) {
    __m512i w[N];
    for (int n = 0; n < N; ++n) {
      if (kAhead != 0) __builtin_prefetch(b.at(n) + offset + kAhead / 2);
      w[n] = _mm512_loadu_si512(b.at(n) + offset);
    }
    for (int m = 0; m < M; ++m) {
      const __m512bh x = (__m512bh)_mm512_set1_epi32(int(a[m]));
      for (int n = 0; n < N; ++n) acc[m][n].v = _mm512_dpbf16_ps(acc[m][n].v, (__m512bh)w[n], x);
    }
  }
}

// Sums along slots: pair k of row m's weights is a[k + m * kStepM], b a value page, `slots` of it live. The instruction adds the product of
// the high halves, rounds, then adds that of the low halves. So the earlier slot goes into the high half, and an accumulator is one chain
// over slots in their order, whichever of them share a pair; a weight of zero leaves no trace in it.
template <int kStepM, int M, int N>
RAMIFY_INLINE void multiply_slots(Vec (&acc)[M][N], const uint32_t* a, const Bf16PairRows& b, int64_t slots) {
  const int64_t step = b.step();
  const bf16* p = b.base;
  const auto add = [&](auto&& turned) {
    __m512i v[N];
    for (int n = 0; n < N; ++n) v[n] = turned(_mm512_loadu_si512(p + n * L * 2));
    for (int m = 0; m < M; ++m) {
      const __m512bh x = (__m512bh)_mm512_set1_epi32(int(a[m * kStepM]));
      for (int n = 0; n < N; ++n) acc[m][n].v = _mm512_dpbf16_ps(acc[m][n].v, (__m512bh)v[n], x);
    }
  };
  for (int64_t k = 0; k + 1 < slots; k += 2, p += step, ++a) add([](__m512i v) { return _mm512_rol_epi32(v, 16); });
  if (slots & 1) add([](__m512i v) { return _mm512_slli_epi32(v, 16); });  // nobody has written the slot beside the last one
}

// The weights of `slots` slots, f32, as pairs for multiply_slots, in place; whole vectors are read and written.
RAMIFY_INLINE void pair_slots(float* p, int64_t slots) {
  for (int64_t k = 0; k < slots; k += L) {
    const __m256i pairs = (__m256i)_mm512_cvtneps_pbh(Vec::load(p + k).v);
    _mm256_storeu_si256((__m256i*)(p + k / 2), _mm256_rol_epi32(pairs, 16));
  }
}
#else
#define RAMIFY_BF16_DOT 0
#endif

// Calls f<M>() with M = rows, for 1 <= rows <= kRows.
template <int M = kRows, class F>
RAMIFY_INLINE void with_rows(int rows, F&& f) {
  if constexpr (M == 1) {
    f.template operator()<1>();
  } else {
    if (rows == M)
      f.template operator()<M>();
    else
      with_rows<M - 1>(rows, static_cast<F&&>(f));
  }
}

}  // namespace
}  // namespace ramify::RAMIFY_ISA
