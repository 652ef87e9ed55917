// csrc/cpu/low_bit_floats.h: low-bit layers whose input stays a float: as it is (Exact), or rounded to bf16 (Exact, Halves).
//
// Exact    128 inputs of a panel at a time become f32 in L1, and go through the loop that dense f32 layers use: a level that
//          multiplies bf16 pairs would round both factors.
// Halves   int4 on a level that multiplies bf16 pairs: a code is a small whole number, which bf16 holds. A look-up in one register
//          turns half of a word's nibbles into pairs: bytes 0 and 2, or 1 and 3, lie where the two halves of a pair do. Sums of a group
//          meet its scale in f32, as Rounded's do; a zero that is not constant is taken off by the sum of the group's inputs.
// Bits     the sum of a (row, feature) is one chain over inputs (Exact), or over groups of chains over pairs, whatever the tile.
#pragma once
#include "cpu/linear.h"

namespace ramify::RAMIFY_ISA {
namespace {

LowBitLayout layout_of(const LinearArgs& a) { return {a.dtype, a.K, a.group, a.scale_dtype, a.zeros != 0}; }

RAMIFY_INLINE Vec load_scale(const uint8_t* p, int64_t dtype, int64_t feature) {
  if (dtype == kF32) return Vec::load(reinterpret_cast<const float*>(p) + feature);
  const uint16_t* const half = reinterpret_cast<const uint16_t*>(p) + feature;
  return dtype == kF16 ? load_half(half) : Vec::load(half);
}
RAMIFY_INLINE int64_t zeros_after(int64_t scale_dtype) { return kLowBitPanel * (scale_dtype == kF32 ? 4 : 2); }

// ---- Exact: the weight's values, 128 inputs of 32 features at a time

// e4m3 -> f32. A magnitude is the smaller of 2^(e-7) (1 + m/8), right from e = 1 on, and of twice that less 2^-6, right for e = 0.
// No subnormal f32 comes up on the way: those are slow. NaN codes never come here: packing puts the NaN into their scale.
RAMIFY_INLINE Vec fp8_value(Ints code) {
  const Ints size = (code & 0x7f) << 20;
  const Vec minus = max(Vec::set(0.015625f) - as_float(size + (121 << 23)), as_float((size + (120 << 23)) | int32_t(0x80000000)));
  return as_float(as_ints(minus) ^ ((code & 0x80) ^ 0x80) << 24);
}

// One group of the weight: f32 [inputs][32].
template <int64_t kCode>
void dequantize_group(const LinearArgs& a, const LowBitLayout& w, const uint8_t* panel, int64_t g, float* slab) {
  const uint8_t *const codes = panel + g * w.step, *const scales = panel + w.scales(g);
  for (int64_t f = 0; f < kLowBitPanel; f += L) {
    const Vec scale = load_scale(scales, a.scale_dtype, f);
    const Vec zero = a.zeros ? load_half(reinterpret_cast<const uint16_t*>(scales + zeros_after(a.scale_dtype)) + f) : Vec::set(8.f);
    const uint8_t* p = codes + f * 4;
    const int64_t n = w.inputs(g), count = kCode == kInt4 ? n / 8 : n / 4;
    for (int64_t j = 0; j < count; ++j, p += 4 * kLowBitPanel) {
      const Ints word = load_ints(p);
      const auto value = [&](int bit) {
        if constexpr (kCode == kInt4) return (to_float(shift_right(word, bit) & 15) - zero) * scale;
        if constexpr (kCode == kInt8) return to_float(word << (24 - bit) >> 24) * scale;
        return fp8_value(shift_right(word, bit) & 255) * scale;
      };
      for (int b = 0; b < 4; ++b) {
        value(8 * b).store(slab + (4 * j + b) * kPanel + f);
        if constexpr (kCode == kInt4) value(8 * b + 4).store(slab + (n / 2 + 4 * j + b) * kPanel + f);
      }
    }
  }
}

struct Exact {
  static int64_t packed_bytes(const LinearArgs& a, int64_t M) { return M * pad_to(a.K, 16) * 4; }
  static int64_t work_bytes(const LinearArgs&, int64_t M) { return (kLowBitGroup + M) * kPanel * 4; }
  static int64_t group(const LinearArgs&, int64_t) { return kRows; }

  // The packed input: [128 inputs][rows in groups of kRows], so that what meets one slab of weights lies together.
  static int64_t offset(const LinearArgs& a, int64_t M, int64_t first, int64_t k) {
    const int64_t left = pad_to(a.K, 16) - k;
    return (k * M + (left < kLowBitGroup ? left : kLowBitGroup) * first) * int64_t(sizeof(float));
  }

  static void pack(const LinearArgs& a, const float* x, int64_t M, int64_t m, void* packed) {
    const int64_t first = m / kRows * kRows, rows = M - first < kRows ? M - first : kRows;
    for (int64_t k = 0; k < a.K; k += kLowBitGroup) {
      const int64_t count = a.K - k < kLowBitGroup ? a.K - k : kLowBitGroup;
      const float* part = x + k;
      float rounded[kLowBitGroup];
      if (a.activations == kToBf16) {
        for (int64_t i = 0; i < count; ++i) rounded[i] = widen(narrow(part[i]));
        part = rounded;
      }
      pack_row(a, part, count, static_cast<char*>(packed) + offset(a, M, first, k), int(rows), int(m - first));
    }
  }

  static const void* pack_one(const LinearArgs& a, const float* x, void* packed) {
    if (a.activations == kExact) return x;
    pack(a, x, 1, 0, packed);
    return packed;
  }

  // Inputs [k, stop) of the 32 features from `column` on. Inlined, its constants would take a register that the product needs.
  __attribute__((noinline)) static void dequantize(const LinearArgs& a, const LowBitLayout& w, int64_t column, int64_t k, int64_t stop,
                                                   float* slab) {
    for (int64_t half = 0; half < kPanel; half += kLowBitPanel) {
      const uint8_t* const panel = static_cast<const uint8_t*>(a.weight) + (column + half) / kLowBitPanel * w.panel;
      for (int64_t g = k / w.group; g * w.group < stop; ++g) {
        float* const to = slab + (g * w.group - k) * kPanel + half;
        if (a.dtype == kInt4)
          dequantize_group<kInt4>(a, w, panel, g, to);
        else if (a.dtype == kInt8)
          dequantize_group<kInt8>(a, w, panel, g, to);
        else
          dequantize_group<kFp8>(a, w, panel, g, to);
      }
    }
  }

  static void block(const LinearArgs& a, const void* packed, int64_t M, int64_t begin, int64_t end, void* work) {
    const LowBitLayout w = layout_of(a);
    float* const slab = static_cast<float*>(work);
    float* const sums = slab + kLowBitGroup * kPanel;
    for (int64_t panel = begin; panel < end; panel += kPanel)
      for (int64_t k = 0; k < a.K; k += kLowBitGroup) {
        const int64_t stop = k + kLowBitGroup < a.K ? k + kLowBitGroup : a.K;
        dequantize(a, w, panel, k, stop, slab);
        for (int64_t first = 0; first < M; first += kRows) {
          const Part part{static_cast<const char*>(packed) + offset(a, M, first, k), first, k, stop, sums};
          with_rows(int(M - first < kRows ? M - first : kRows), [&]<int R>() {
            constexpr int N = tile_vectors(R) < kPanelVecs ? tile_vectors(R) : kPanelVecs;
            for (int64_t lane = 0; lane < kPanel; lane += N * L) {
              tile<R, N>(a, part, panel + lane, F32Panels{slab + lane, 0});
            }
          });
        }
      }
  }
};

#if RAMIFY_BF16_DOT
// ---- Halves: codes in bf16 pairs

// What the 16 codes stand for but for a scale, twice: the look-up reads five bits of which the fifth belongs to another code.
struct Values {
  bf16 of[32];
  constexpr explicit Values(int zero) : of() {
    for (int i = 0; i < 32; ++i) of[i] = bf16(__builtin_bit_cast(uint32_t, float((i & 15) - zero)) >> 16);
  }
};
alignas(64) constexpr Values kSignedValues{8}, kPlainValues{0};

struct Halves {
  static_assert(L == kLowBitPanel, "a vector is a panel");
  static int64_t packed_bytes(const LinearArgs& a, int64_t M) { return M * a.K * 2 + M * layout_of(a).groups * 4; }
  static int64_t work_bytes(const LinearArgs&, int64_t) { return 0; }
  static int64_t group(const LinearArgs&, int64_t M) {  // rows of a tile: as even as they come
    const int64_t tiles = (M + kRows - 1) / kRows;
    return (M + tiles - 1) / tiles;
  }

  static uint32_t* pairs_of(const LinearArgs& a, void* packed, int64_t row) { return static_cast<uint32_t*>(packed) + row * a.K / 2; }
  static float* sums_of(const LinearArgs& a, void* packed, int64_t M) { return reinterpret_cast<float*>(pairs_of(a, packed, M)); }

  // [pair in the order in which nibbles are unpacked][row of the tile]; behind all rows the sums of their groups [M][groups].
  static void pack(const LinearArgs& a, const float* x, int64_t M, int64_t m, void* packed) {
    const LowBitLayout w = layout_of(a);
    const int64_t most = group(a, M), first = m / most * most, rows = M - first < most ? M - first : most;
    uint32_t* out = pairs_of(a, packed, first) + (m - first);
    float* const sums = sums_of(a, packed, M) + m * w.groups;
    for (int64_t g = 0; g < w.groups; ++g) {
      bf16 r[kLowBitGroup];
      narrow_row(x + g * w.group, r, w.group);
      Vec sum = Vec::set(0.f);
      for (int64_t k = 0; k < w.group; k += L) sum = sum + Vec::load(r + k);
      sums[g] = hsum(sum);
      for (int64_t k = 0; k < w.group / 2; ++k, out += rows) {
        const bf16* const from = r + k / 4 * 4 + k % 4 / 2 + k % 2 * w.group / 2;
        *out = from[0] | uint32_t(from[2]) << 16;
      }
    }
  }

  static const void* pack_one(const LinearArgs& a, const float* x, void* packed) {
    pack(a, x, 1, 0, packed);
    return packed;
  }

  // T rows from `first` on x N panels from `column` on.
  template <int T, int N>
  RAMIFY_INLINE static void tile(const LinearArgs& a, const LowBitLayout& w, void* packed, int64_t M, int64_t first, int64_t column) {
    const uint8_t* const panel = static_cast<const uint8_t*>(a.weight) + column / L * w.panel;
    const Ahead<N> ahead(panel, w.panel);
    const uint32_t* x = pairs_of(a, packed, first);
    const float* const sums = sums_of(a, packed, M) + first * w.groups;
    const __m512i values = _mm512_load_si512(a.zeros ? kPlainValues.of : kSignedValues.of);
    float total[T][N * L] = {};
    for (int64_t g = 0; g < w.groups; ++g) {
      const uint8_t* const codes = panel + g * w.step;
      Vec acc[T][N];
      for (int t = 0; t < T; ++t)
        for (int n = 0; n < N; ++n) acc[t][n] = Vec::set(0.f);
      for (int64_t at = 0; at < w.group * kLowBitPanel / 2; at += 64) {
        __m512i word[N];
        for (int n = 0; n < N; ++n) {
          word[n] = _mm512_loadu_si512(codes + n * w.panel + at);
          if (ahead.kAsks) __builtin_prefetch(codes + n * w.panel + at + ahead(codes + at));
        }
#pragma GCC unroll 4
        for (int s = 0; s < 4; ++s, x += T) {
          __m512bh pair[N];
          for (int n = 0; n < N; ++n) pair[n] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi32(word[n], 4 * s), values);
          for (int t = 0; t < T; ++t) {
            const __m512bh input = (__m512bh)_mm512_set1_epi32(int(x[t]));
            for (int n = 0; n < N; ++n) acc[t][n].v = _mm512_dpbf16_ps(acc[t][n].v, pair[n], input);
          }
        }
      }
      for (int n = 0; n < N; ++n) {
        const uint8_t* const scales = panel + n * w.panel + w.scales(g);
        const Vec scale = load_scale(scales, a.scale_dtype, 0);
        const uint16_t* const zeros = reinterpret_cast<const uint16_t*>(scales + zeros_after(a.scale_dtype));
        for (int t = 0; t < T; ++t) {
          const Vec y = a.zeros ? acc[t][n] - load_half(zeros) * Vec::set(sums[t * w.groups + g]) : acc[t][n];
          fma(y, scale, Vec::load(total[t] + n * L)).store(total[t] + n * L);
        }
      }
    }
    for (int t = 0; t < T; ++t)
      for (int n = 0; n < N; ++n) finish(a, Vec::load(total[t] + n * L), first + t, column + n * L);
  }

  static void block(const LinearArgs& a, const void* packed, int64_t M, int64_t begin, int64_t end, void*) {
    const LowBitLayout w = layout_of(a);
    const int64_t most = group(a, M);
    void* const x = const_cast<void*>(packed);
    with_rows(int(most), [&]<int R>() {
      constexpr int N = tile_vectors(R);
      for (int64_t column = begin; column < end;) {
        const bool wide = column + N * L <= end;
        for (int64_t first = 0; first < M; first += most)
          with_rows<R>(int(M - first < most ? M - first : most),
                       [&]<int T>() { wide ? tile<T, N>(a, w, x, M, first, column) : tile<T, 2>(a, w, x, M, first, column); });
        column += wide ? N * L : 2 * L;
      }
    });
  }
};
#endif

}  // namespace
}  // namespace ramify::RAMIFY_ISA
