// csrc/cpu/rows.h: what is done to one row of activations, shared by the standalone kernels and by fused prologues.
//
// One fixed order of additions a row: a fused layer and a separate call give the same bits.
#pragma once
#include "cpu/isa.h"

namespace ramify::RAMIFY_ISA {
namespace {

// out = x / sqrt(mean(x^2) + eps) * weight
inline void rms_norm_row(const float* x, const float* weight, double eps, float* out, int64_t n) {
  Vec s0 = Vec::set(0.f), s1 = s0;
  int64_t j = 0;
  for (; j + 2 * L <= n; j += 2 * L) {
    const Vec a = Vec::load(x + j), b = Vec::load(x + j + L);
    s0 = fma(a, a, s0), s1 = fma(b, b, s1);
  }
  for (; j < n; j += L) {
    const Vec a = load_part(x + j, n - j, 0.f);
    s0 = fma(a, a, s0);
  }
  const Vec scale = Vec::set(1.f / __builtin_sqrtf(hsum(s0 + s1) / float(n) + float(eps)));
  for (j = 0; j < n; j += L) store_part(out + j, load_part(x + j, n - j, 0.f) * scale * load_part(weight + j, n - j, 0.f), n - j);
}

// x holds gate[n], up[n]; out = silu(gate) * up
inline void silu_mul_row(const float* x, float* out, int64_t n) {
  for (int64_t j = 0; j < n; j += L) store_part(out + j, silu(load_part(x + j, n - j, 0.f)) * load_part(x + n + j, n - j, 0.f), n - j);
}

// Half-rotation: (x[i], x[i + D/2]) turns by the angle of (cos[i], sin[i]).
inline void rope_row(const float* x, const float* cos, const float* sin, float* out, int64_t D) {
  const int64_t half = D / 2;
  for (int64_t i = 0; i < half; i += L) {
    const int64_t left = half - i;
    const Vec a = load_part(x + i, left, 0.f), b = load_part(x + half + i, left, 0.f);
    const Vec c = load_part(cos + i, left, 0.f), s = load_part(sin + i, left, 0.f);
    store_part(out + i, a * c - b * s, left);
    store_part(out + half + i, b * c + a * s, left);
  }
}

}  // namespace
}  // namespace ramify::RAMIFY_ISA
