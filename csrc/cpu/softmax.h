// csrc/cpu/softmax.h: the running softmax of attention, and the scratch that it lives in.
//
// A row keeps o = sum of 2^(s - m) v and l = sum of 2^(s - m) with an integral reference m, so moving the reference is exact
// and neither tiles nor chunks leave a trace in the result (row_invariance). The largest weight is at least a half, so l is 0
// exactly when no slot was seen. A score of NaN or infinity makes l and o NaN.
#pragma once
#include "cpu/isa.h"

namespace ramify::RAMIFY_ISA {
namespace {

constexpr float kNothing = -__builtin_inff();  // the softmax reference of a row that has seen no slot yet
constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;

// Bits of a tile's slots at or above n.
RAMIFY_INLINE uint64_t above(int64_t n) { return n <= 0 ? ~uint64_t(0) : n >= kTile ? 0 : ~uint64_t(0) << n; }

// Running softmax of kRowBlock rows: o = sum of 2^(s - m) v, l = sum of 2^(s - m).
struct State {
  float *m, *l, *o;
};

struct Buffers {  // one thread's scratch
  float *q, *s, *pieces;
  State chunk, total;
  void *keys, *values;  // a page of either, gathered from rows that lie elsewhere
  static int64_t state_floats(int64_t D, int64_t rows = kRowBlock) { return rows * (D + 2); }
  static int64_t bytes(int64_t D) { return 4 * (kRowBlock * D + kRowBlock * kTile + 2 * state_floats(D) + 2 * kTile * D); }
  static State state_at(float* p, int64_t rows = kRowBlock) { return {p, p + rows, p + 2 * rows}; }
  Buffers(char* base, int64_t D) {
    q = reinterpret_cast<float*>(base);
    s = q + kRowBlock * D;
    chunk = state_at(s + kRowBlock * kTile);
    total = state_at(chunk.m + state_floats(D));
    keys = total.m + state_floats(D);
    values = total.m + state_floats(D) + kTile * D;
  }
};

inline void reset(const State& s, int64_t rows, int64_t D) {
  for (int64_t r = 0; r < rows; ++r) s.m[r] = kNothing, s.l[r] = 0.f;
  for (int64_t i = 0; i < rows * D; ++i) s.o[i] = 0.f;
}

RAMIFY_INLINE float power2_of(float i) {
  float t[L];
  power2(Vec::set(i)).store(t);
  return t[0];
}

// total += part, each scaled to the larger reference: exact but for the one addition.
inline void join(const State& total, const State& part, int64_t rows, int64_t D) {
  for (int64_t r = 0; r < rows; ++r) {
    if (part.l[r] == 0.f) continue;
    const float m = total.m[r] > part.m[r] ? total.m[r] : part.m[r];
    const float ft = power2_of(total.m[r] - m), fp = power2_of(part.m[r] - m);
    total.m[r] = m, total.l[r] = total.l[r] * ft + part.l[r] * fp;
    const Vec vt = Vec::set(ft), vp = Vec::set(fp);
    for (int64_t d = r * D; d < (r + 1) * D; d += L) (Vec::load(total.o + d) * vt + Vec::load(part.o + d) * vp).store(total.o + d);
  }
}

// 64 rows of 32-bit units (f32 values or bf16 pairs) at any addresses -> two panels of 32 lanes. `units` is a multiple of 8.
inline void transpose(const uint32_t* const* rows, int64_t units, uint32_t* out) {
  for (int64_t lane = 0; lane < kTile; lane += 8)
    for (int64_t u = 0; u < units; u += 8) {
      uint32_t* to = out + lane / kPanel * units * kPanel + u * kPanel + lane % kPanel;
#if defined(__AVX2__)
      __m256 r[8], t[8];
      for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(reinterpret_cast<const float*>(rows[lane + i] + u));
      for (int i = 0; i < 8; i += 2) t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]), t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
      for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; ++j) {
          r[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
          r[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0xee);
        }
      for (int i = 0; i < 4; ++i) {
        _mm256_storeu_ps(reinterpret_cast<float*>(to + i * kPanel), _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
        _mm256_storeu_ps(reinterpret_cast<float*>(to + (i + 4) * kPanel), _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
      }
#else
      for (int i = 0; i < 8; ++i)
        for (int j = 0; j < 8; ++j) to[j * kPanel + i] = rows[lane + i][u + j];
#endif
    }
}

// 64 rows of D values at any addresses -> a value page (common/layouts.h). Rows a whole number of pages apart would share a few
// lines of L1, were they read where they lie.
inline void interleave(const float* const* rows, int64_t D, float* out) {
  for (int64_t slot = 0; slot < kTile; ++slot) __builtin_memcpy(out + slot * D, rows[slot], size_t(D) * 4);
}
inline void interleave(const bf16* const* rows, int64_t D, bf16* out) {
  for (int64_t slot = 0; slot < kTile; slot += 2, out += 2 * D)
    for (int64_t d = 0; d < D; d += 16) {
#if defined(__AVX2__)
      const __m256i even = _mm256_loadu_si256((const __m256i*)(rows[slot] + d)),
                    odd = _mm256_loadu_si256((const __m256i*)(rows[slot + 1] + d));
      const __m256i low = _mm256_unpacklo_epi16(even, odd), high = _mm256_unpackhi_epi16(even, odd);
      _mm256_storeu_si256((__m256i*)(out + 2 * d), _mm256_permute2x128_si256(low, high, 0x20));
      _mm256_storeu_si256((__m256i*)(out + 2 * d + 16), _mm256_permute2x128_si256(low, high, 0x31));
#else
      for (int64_t i = d; i < d + 16; ++i) out[2 * i] = rows[slot][i], out[2 * i + 1] = rows[slot + 1][i];
#endif
    }
}

}  // namespace
}  // namespace ramify::RAMIFY_ISA
