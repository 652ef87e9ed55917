// csrc/cpu/isa.h: the vector of this ISA level, and the few operations that kernels are written in.
//
// Every kernel source is compiled once per level with -DRAMIFY_ISA=<level> and that level's flags. Everything here has
// internal linkage: an inline function that two levels shared could be merged by the linker and run on the wrong chip.
// Within a level every operation rounds in one fixed way, whatever the caller's tile (row_invariance).
#pragma once
#include <stdint.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/args.h"
#include "common/layouts.h"
#include "cpu/team.h"

#ifndef RAMIFY_ISA
#error "compile with -DRAMIFY_ISA=<level>"
#endif

namespace ramify::RAMIFY_ISA {
namespace {

#define RAMIFY_INLINE inline __attribute__((always_inline))

using bf16 = uint16_t;

RAMIFY_INLINE float widen(bf16 x) {
  const uint32_t u = uint32_t(x) << 16;
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}

RAMIFY_INLINE bf16 narrow(float f) {  // to nearest, ties to even; NaN stays NaN
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  if ((u & 0x7fffffff) > 0x7f800000) return bf16((u >> 16) | 0x40);
  return bf16((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

#if defined(__AVX512F__)

struct Vec {
  static constexpr int lanes = 16;
  __m512 v;
  static RAMIFY_INLINE Vec set(float x) { return {_mm512_set1_ps(x)}; }
  static RAMIFY_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static RAMIFY_INLINE Vec load(const bf16* p) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))};
  }
  RAMIFY_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  RAMIFY_INLINE void store(bf16* p) const {  // as narrow()
    const __m512i u = _mm512_castps_si512(v), high = _mm512_srli_epi32(u, 16), odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    const __m512i near = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    const __m512i r = _mm512_mask_or_epi32(near, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), high, _mm512_set1_epi32(0x40));
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(r));
  }
};
RAMIFY_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
RAMIFY_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
RAMIFY_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
RAMIFY_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
RAMIFY_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
RAMIFY_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
RAMIFY_INLINE Vec floor(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)}; }
RAMIFY_INLINE Vec power2(Vec i) {  // 2^i for integral i <= 127; 0 below -126
  const __m512i e = _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(i.v), _mm512_set1_epi32(127)), 23);
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(i.v, _mm512_set1_ps(-126.f), _CMP_GE_OQ), _mm512_castsi512_ps(e))};
}
// Lane n takes `yes` where bit n is set.
RAMIFY_INLINE Vec select(uint32_t bits, Vec yes, Vec no) { return {_mm512_mask_mov_ps(no.v, __mmask16(bits), yes.v)}; }
RAMIFY_INLINE bool any_above(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_NLE_UQ) != 0; }  // NaN is above
RAMIFY_INLINE float hmax(Vec a) { return _mm512_reduce_max_ps(a.v); }
RAMIFY_INLINE Vec load_half(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }

struct Pairs {  // 16 lanes of (even, odd) bf16 values
  __m512i v;
  static RAMIFY_INLINE Pairs load(const bf16* p) { return {_mm512_loadu_si512(p)}; }
  RAMIFY_INLINE Vec even() const { return {_mm512_castsi512_ps(_mm512_slli_epi32(v, 16))}; }
  RAMIFY_INLINE Vec odd() const { return {_mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(int(0xffff0000))))}; }
};

#elif defined(__AVX2__)

struct Vec {
  static constexpr int lanes = 8;
  __m256 v;
  static RAMIFY_INLINE Vec set(float x) { return {_mm256_set1_ps(x)}; }
  static RAMIFY_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static RAMIFY_INLINE Vec load(const bf16* p) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16))};
  }
  RAMIFY_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  RAMIFY_INLINE void store(bf16* p) const {  // as narrow()
    const __m256i u = _mm256_castps_si256(v), high = _mm256_srli_epi32(u, 16), odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
    const __m256i near = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40)), nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i r = _mm256_blendv_epi8(near, quiet, nan), halves = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0xd8);
    _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(halves));
  }
};
RAMIFY_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
RAMIFY_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
RAMIFY_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
RAMIFY_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
RAMIFY_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
RAMIFY_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
RAMIFY_INLINE Vec floor(Vec a) { return {_mm256_floor_ps(a.v)}; }
RAMIFY_INLINE Vec power2(Vec i) {
  const __m256i e = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(i.v), _mm256_set1_epi32(127)), 23);
  return {_mm256_and_ps(_mm256_castsi256_ps(e), _mm256_cmp_ps(i.v, _mm256_set1_ps(-126.f), _CMP_GE_OQ))};
}
RAMIFY_INLINE Vec select(uint32_t bits, Vec yes, Vec no) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i on = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(bits)), lane), lane);
  return {_mm256_blendv_ps(no.v, yes.v, _mm256_castsi256_ps(on))};
}
RAMIFY_INLINE bool any_above(Vec a, Vec b) { return _mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_NLE_UQ)) != 0; }
RAMIFY_INLINE float hmax(Vec a) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_shuffle_ps(m, m, 1)));
}
RAMIFY_INLINE Vec load_half(const uint16_t* p) { return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))}; }

struct Pairs {
  __m256i v;
  static RAMIFY_INLINE Pairs load(const bf16* p) { return {_mm256_loadu_si256((const __m256i*)p)}; }
  RAMIFY_INLINE Vec even() const { return {_mm256_castsi256_ps(_mm256_slli_epi32(v, 16))}; }
  RAMIFY_INLINE Vec odd() const { return {_mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(int(0xffff0000))))}; }
};

#else  // portable: four lanes of the compiler's own vectors; a product and a sum round apart, on every chip alike

typedef float f32x4 __attribute__((vector_size(16)));
typedef int32_t i32x4 __attribute__((vector_size(16)));

struct Vec {
  static constexpr int lanes = 4;
  f32x4 v;
  static RAMIFY_INLINE Vec set(float x) { return {f32x4{x, x, x, x}}; }
  static RAMIFY_INLINE Vec load(const float* p) {
    Vec r;
    __builtin_memcpy(&r.v, p, 16);
    return r;
  }
  static RAMIFY_INLINE Vec load(const bf16* p) { return {f32x4{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])}}; }
  RAMIFY_INLINE void store(float* p) const { __builtin_memcpy(p, &v, 16); }
  RAMIFY_INLINE void store(bf16* p) const {
    for (int i = 0; i < lanes; ++i) p[i] = narrow(v[i]);
  }
};
RAMIFY_INLINE Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
RAMIFY_INLINE Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
RAMIFY_INLINE Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
RAMIFY_INLINE Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
RAMIFY_INLINE Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
RAMIFY_INLINE Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
RAMIFY_INLINE Vec floor(Vec a) {
  return {f32x4{__builtin_floorf(a.v[0]), __builtin_floorf(a.v[1]), __builtin_floorf(a.v[2]), __builtin_floorf(a.v[3])}};
}
RAMIFY_INLINE Vec power2(Vec i) {
  Vec r = Vec::set(0);
  for (int n = 0; n < 4; ++n) {
    if (!(i.v[n] >= -126.f)) continue;
    const uint32_t e = uint32_t(int32_t(i.v[n]) + 127) << 23;
    float f;
    __builtin_memcpy(&f, &e, 4);
    r.v[n] = f;
  }
  return r;
}
RAMIFY_INLINE Vec select(uint32_t bits, Vec yes, Vec no) {
  const i32x4 lane = {1, 2, 4, 8}, all = {int32_t(bits), int32_t(bits), int32_t(bits), int32_t(bits)};
  return {(all & lane) != 0 ? yes.v : no.v};
}
RAMIFY_INLINE bool any_above(Vec a, Vec b) {
  const i32x4 m = a.v <= b.v;
  return (m[0] & m[1] & m[2] & m[3]) == 0;
}
RAMIFY_INLINE float hmax(Vec a) {
  const float x = a.v[0] > a.v[1] ? a.v[0] : a.v[1], y = a.v[2] > a.v[3] ? a.v[2] : a.v[3];
  return x > y ? x : y;
}
RAMIFY_INLINE float widen_half(uint16_t h) {
  const float f = float(h & 0x3ff) + (h & 0x7c00 ? 1024.f : 0.f), sign = h & 0x8000 ? -1.f : 1.f;
  const int e = h >> 10 & 31;
  if (e == 31) return h & 0x3ff ? __builtin_nanf("") : sign * __builtin_inff();
  uint32_t u = uint32_t((e ? e : 1) - 25 + 127) << 23;
  float scale;
  __builtin_memcpy(&scale, &u, 4);
  return sign * f * scale;
}
RAMIFY_INLINE Vec load_half(const uint16_t* p) { return {f32x4{widen_half(p[0]), widen_half(p[1]), widen_half(p[2]), widen_half(p[3])}}; }

struct Pairs {
  i32x4 v;
  static RAMIFY_INLINE Pairs load(const bf16* p) {
    Pairs r;
    __builtin_memcpy(&r.v, p, 16);
    return r;
  }
  RAMIFY_INLINE Vec even() const {
    const i32x4 u = v << 16;
    Vec r;
    __builtin_memcpy(&r.v, &u, 16);
    return r;
  }
  RAMIFY_INLINE Vec odd() const {
    const i32x4 u = v & int32_t(0xffff0000);
    Vec r;
    __builtin_memcpy(&r.v, &u, 16);
    return r;
  }
};

#endif

constexpr int L = Vec::lanes;
static_assert(kPanel % L == 0 && 16 % L == 0, "panels and head sizes are whole vectors");

// The first n lanes from p, the rest `fill`: for rows whose width is not a multiple of the vector.
RAMIFY_INLINE Vec load_part(const float* p, int64_t n, float fill) {
  if (n >= L) return Vec::load(p);
  float t[L];
  for (int i = 0; i < L; ++i) t[i] = i < n ? p[i] : fill;
  return Vec::load(t);
}
RAMIFY_INLINE Vec load_part(const bf16* p, int64_t n, float fill) {
  if (n >= L) return Vec::load(p);
  float t[L];
  for (int i = 0; i < L; ++i) t[i] = i < n ? widen(p[i]) : fill;
  return Vec::load(t);
}
RAMIFY_INLINE void store_part(float* p, Vec a, int64_t n) {
  if (n >= L) return a.store(p);
  float t[L];
  a.store(t);
  for (int i = 0; i < n; ++i) p[i] = t[i];
}

RAMIFY_INLINE void store_part(bf16* p, Vec a, int64_t n) {
  if (n >= L) return a.store(p);
  float t[L];
  a.store(t);
  for (int i = 0; i < n; ++i) p[i] = narrow(t[i]);
}

// n values rounded to bf16.
inline void narrow_row(const bf16* x, bf16* out, int64_t n) { __builtin_memcpy(out, x, size_t(n) * sizeof(bf16)); }
inline void narrow_row(const float* x, bf16* out, int64_t n) {
  for (int64_t j = 0; j < n; j += L) store_part(out + j, load_part(x + j, n - j, 0.f), n - j);
}

// Sum of all lanes in one fixed tree.
RAMIFY_INLINE float hsum(Vec a) {
  float t[L];
  a.store(t);
  for (int width = L / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) t[i] += t[i + width];
  return t[0];
}

// 2^f on [0, 1]: relative error below 2e-8 before rounding (degree 6, fitted with p(0) = 1).
RAMIFY_INLINE Vec exp2_fraction(Vec f) {
  Vec p = Vec::set(2.1612916316e-04f);
  p = fma(p, f, Vec::set(1.2467845809e-03f));
  p = fma(p, f, Vec::set(9.6754515544e-03f));
  p = fma(p, f, Vec::set(5.5485282093e-02f));
  p = fma(p, f, Vec::set(2.4022930861e-01f));
  p = fma(p, f, Vec::set(6.9314706326e-01f));
  return fma(p, f, Vec::set(1.f));
}

// e^x for x <= 88; 0 below about -87, minus infinity included. NaN stays NaN: max returns its second operand then.
RAMIFY_INLINE Vec exp(Vec x) {
  const Vec s = max(Vec::set(-300.f), x * Vec::set(1.44269504f)), i = floor(s);
  return exp2_fraction(s - i) * power2(i);
}

// x / (1 + e^-x); e^-x is held below overflow, where the quotient is already 0.
RAMIFY_INLINE Vec silu(Vec x) { return x / (Vec::set(1.f) + exp(Vec::set(0.f) - max(Vec::set(-87.f), x))); }

// Logarithm and exponential of one float, used once or twice a row.
RAMIFY_INLINE float log_of(float x) { return __builtin_logf(x); }
RAMIFY_INLINE float exp_of(float x) {
  float t[L];
  exp(Vec::set(x)).store(t);
  return t[0];
}

}  // namespace
}  // namespace ramify::RAMIFY_ISA
