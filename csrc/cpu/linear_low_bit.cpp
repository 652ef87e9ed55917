// csrc/cpu/linear_low_bit.cpp: linear layers over int8, int4 and fp8 weights. Meaning: reference/linear.py.
//
// What     the same layer as linear.cpp does (linear.h), the weight packed as layouts.h says. The input is rounded to int8 with one
//          scale a row or one a group (Rounded), or stays a float (low_bit_floats.h).
// Rounded  y = x_scale * sum over groups of w_scale * (codes . x_codes - zero * sum(x_codes)): integer dots inside a group (dot.h),
//          then one f32 multiply-add a group, groups in ascending order. A constant zero is taken off by the dot's first value.
// Tiling   16 features (32 with AVX-512, where few rows take 64 or 128) x most_tokens rows, nibbles unpacked in registers. Several tiles
//          share 512 inputs of the panel in L1. A panel is read from memory once.
// Traffic  the packed bytes, once for all rows.
// Bits     an integer sum is exact, and the f32 sum of a (row, feature) is one chain over groups whatever the tile (row_invariance).
#include "cpu/dot.h"
#include "cpu/low_bit_floats.h"

namespace ramify::RAMIFY_ISA {
namespace {

constexpr int64_t kTogether = 512;   // inputs of a panel that stay in L1 while every tile passes
constexpr int64_t kRowsAtOnce = 96;  // rows whose sums and inputs stay in L1 while a panel passes

// Vectors of features beside each other in a tile of few rows, so that more panels come from memory side by side, and the most rows of a
// tile with N of them: as many as it has accumulators for, less a row where nibbles and their words take the registers of one. Panels of
// bytes may lie a power of two apart: eight would meet in one set of L1. AVX2 has no registers to spare.
constexpr int most_vecs(bool small) { return L < kLowBitPanel ? kDotVecs : small ? 8 : 4; }
constexpr int rows_of(int N, bool small) { return kDotVecs * most_tokens(small) / N - (small && N > kDotVecs); }
static_assert(most_tokens(true) >= most_tokens(false), "work_bytes has room for the sums of every tile of few rows");

// ---- Rounded: integer dots

// The packed input: codes [group][tile][word][row of the tile][4], then for each (group, row) what to take off, then the scales.
struct Codes {
  int64_t M, tile;  // rows, and rows of a tile: as even as they come, so that no tile is left with one or two
  int8_t* codes;
  union Offset {
    int32_t whole;  // -zero * sum of the group's codes, for a constant zero
    float sum;      // the sum itself, for zeros that differ
  }* offsets;       // [groups][M]
  float* scales;    // [M], or [groups][M]

  Codes(const LowBitLayout& w, int64_t rows, void* packed) : M(rows) {
    tile = tile_of(w, M);
    codes = static_cast<int8_t*>(packed);
    offsets = reinterpret_cast<Offset*>(codes + lines(M * w.K));
    scales = reinterpret_cast<float*>(offsets + w.groups * M);
  }
  static int64_t tile_of(const LowBitLayout& w, int64_t M) {
    const int64_t most = most_tokens(w.small), tiles = (M + most - 1) / most;
    return (M + tiles - 1) / tiles;
  }
  static int64_t bytes(const LowBitLayout& w, int64_t M) { return lines(M * w.K) + 2 * w.groups * M * 4; }
  int8_t* at(const LowBitLayout& w, int64_t g, int64_t first) const { return codes + g * w.group * M + first * w.inputs(g); }
};

// The step between codes of x[0..n): its largest magnitude / 127; NaN if any value is not finite. Compared as integers, where
// NaN and infinity stand above every number.
float code_scale(const float* x, int64_t n) {
  Ints tops = ints(0);
  for (int64_t k = 0; k < n; k += L) {
    const Ints size = as_ints(load_part(x + k, n - k, 0.f)) & 0x7fffffff;
    tops = size > tops ? size : tops;
  }
  const int32_t top = hmax(tops);
  if (top >= 0x7f800000) return __builtin_nanf("");
  float amax;
  __builtin_memcpy(&amax, &top, 4);
  return amax / 127.f;
}

// Codes of x[0..real), then zeros up to n, to nearest, ties to even: adding 1.5 * 2^23 leaves the rounded value in the low bits, and a
// scale is not so far from amax / 127, be it subnormal, that a quotient would not fit. Returns their sum. n is a multiple of 16.
RAMIFY_INLINE int32_t round_codes(const float* x, int64_t real, int64_t n, float scale, int8_t* codes) {
  const bool any = scale > 0.f;
  const Vec step = Vec::set(any ? scale : 1.f);
  Ints sums = ints(0);
  for (int64_t k = 0; k < n; k += L) {
    Ints code = as_ints((any ? load_part(x + k, real - k, 0.f) : Vec::set(0.f)) / step + Vec::set(12582912.f)) - 0x4b400000;
    code = code > 127 ? ints(127) : code;
    code = code < -127 ? ints(-127) : code;
    store_bytes(codes + k, code);
    sums += code;
  }
  return hsum(sums);
}

// Words of four codes, `step` bytes from one to the next.
RAMIFY_INLINE void spread(const int8_t* codes, int64_t words, int8_t* to, int64_t step) {
#pragma GCC unroll 4
  for (int64_t i = 0; i < words; ++i, to += step) __builtin_memcpy(to, codes + 4 * i, 4);
}

// Where weight vector v of N lies at step s + i; s is even, i known when compiled. Bytes are asked for if a tile has rows enough to wait.
template <bool kSmall, int N>
struct Words {
  const uint8_t* base;
  int64_t panel;  // bytes from one panel of 16 features to the next
  Ahead<N * L / kLowBitPanel> ahead;
  RAMIFY_INLINE const uint8_t* at(int v, int64_t line) const {
    return base + v * L / kLowBitPanel * panel + v * L % kLowBitPanel * 4 + line * 4 * kLowBitPanel;
  }
  RAMIFY_INLINE void ask(int v, int64_t line) const {
    if (ahead.kAsks && v * L % kLowBitPanel == 0) __builtin_prefetch(at(v, line) + ahead(at(0, line)));
  }
  RAMIFY_INLINE Ints operator()(int v, int64_t s, int i, int rows) const {
    if constexpr (!kSmall) {
      if (rows > 4) ask(v, s + i);
      return load_ints(at(v, s + i));
    }
    const Ints word = load_ints(at(v, s / 2 + i / 2));
    if (i % 2 == 0) ask(v, s / 2 + i / 2);
    return (i & 1 ? shift_right(word, 4) : word) & 0x0f0f0f0f;
  }
};

constexpr float kNoSums[kDotVecs * most_tokens(true) * L] = {};

// Groups [g, stop) of T rows from `first` on: integer sums, scaled, onto `sums` [row][N * L], which group 0 finds empty. `codes` is at
// group g.
template <bool kSmall, int T, int N>
RAMIFY_INLINE void add_groups(const LinearArgs& a, const LowBitLayout& w, const Codes& x, const uint8_t* panel, Words<kSmall, N> codes,
                              int64_t g, int64_t stop, int64_t first, float* sums) {
  const bool zeros = kSmall && a.zeros, constant = kSmall ? !zeros : kSignedOffset != 0, grouped = a.activations == kInt8Group;
  const int64_t M = x.M, scale_dtype = a.scale_dtype, next = w.row_scale ? 0 : w.step, whole = w.group, last = w.groups - 1;
  const uint8_t* scales = panel + w.scales(g);
  const Codes::Offset* offset = x.offsets + g * M + first;
  const float* scale_of = grouped ? x.scales + g * M + first : nullptr;
  const int8_t* word = x.at(w, g, first);
  sums += first * N * L;
  for (; g < stop; ++g, codes.base += w.step, scales += next, offset += M, word += whole * M) {
    const int64_t inputs = g < last ? whole : w.inputs(g);
    if (g == last) word = x.at(w, g, first);
    Ints sum[N][T];  // in registers: every loop over them is unrolled, or a store costs two cycles a vector
#pragma GCC unroll 12
    for (int t = 0; t < T; ++t) {
      const Ints start = ints(constant ? offset[t].whole : 0);
#pragma GCC unroll 8
      for (int v = 0; v < N; ++v) sum[v][t] = start;
    }
    dot<kSmall>(sum, codes, word, inputs / 4);
    asm volatile("" ::: "memory");  // or the sums are loaded ahead of the dot, right behind the last group's stores, and wait for them
    const float* const before = g == 0 ? kNoSums : sums;
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) {
      const auto add = [&](int t, Vec y, Vec scale) {
        const int64_t at = t * N * L + v * L;
        fma(y, scale, Vec::load(before + at)).store(sums + at);
      };
      const uint8_t* const here = scales + v * L / kLowBitPanel * w.panel;
      const int64_t feature = v * L % kLowBitPanel;
      const Vec scale = load_scale(here, scale_dtype, feature);
      if (zeros) {
        const Vec zero = load_half(reinterpret_cast<const uint16_t*>(here + zeros_after(scale_dtype)) + feature);
#pragma GCC unroll 12
        for (int t = 0; t < T; ++t) {
          const Vec y = to_float(sum[v][t]) - zero * Vec::set(offset[t].sum);
          add(t, grouped ? y * Vec::set(scale_of[t]) : y, scale);
        }
      } else if (grouped) {
#pragma GCC unroll 12
        for (int t = 0; t < T; ++t) add(t, to_float(sum[v][t]) * Vec::set(scale_of[t]), scale);
      } else {
#pragma GCC unroll 12
        for (int t = 0; t < T; ++t) add(t, to_float(sum[v][t]), scale);
      }
    }
    if (grouped) scale_of += M;
  }
}

struct Rounded {
  static int64_t packed_bytes(const LinearArgs& a, int64_t M) { return Codes::bytes(layout_of(a), M); }
  static int64_t work_bytes(const LinearArgs&, int64_t M) {  // the sums of a tile of few rows too: a captured step may have fewer
    const int64_t few = most_tokens(true);
    return (M > few ? M : few) * kDotVecs * L * 4;
  }
  static int64_t group(const LinearArgs& a, int64_t M) { return Codes::tile_of(layout_of(a), M); }

  static void pack(const LinearArgs& a, const float* x, int64_t M, int64_t m, void* packed) {
    const LowBitLayout w = layout_of(a);
    const Codes to(w, M, packed);
    const int64_t first = m / to.tile * to.tile, rows = M - first < to.tile ? M - first : to.tile;
    const bool grouped = a.activations == kInt8Group;
    float scale = 0.f;
    if (!grouped) to.scales[m] = scale = code_scale(x, a.K);
    for (int64_t g = 0; g < w.groups; ++g) {
      const int64_t k = g * w.group, n = w.inputs(g), real = a.K - k < n ? a.K - k : n;
      if (grouped) to.scales[g * M + m] = scale = code_scale(x + k, real);
      int8_t codes[kLowBitGroup];
      const int32_t sum = round_codes(x + k, real, n, scale, codes);
      if (a.zeros)
        to.offsets[g * M + m].sum = float(sum);
      else
        to.offsets[g * M + m].whole = -(w.small ? 8 : kSignedOffset) * sum;
      // Words in the order in which nibbles are unpacked: one of the group's first half, one of its second, and so on.
      int8_t* const out = to.at(w, g, first) + (m - first) * 4;
      const int64_t step = rows * 4;
      if (w.small) {
        spread(codes, n / 8, out, 2 * step);
        spread(codes + n / 2, n / 8, out + step, 2 * step);
      } else {
        spread(codes, n / 4, out, step);
      }
    }
  }

  static const void* pack_one(const LinearArgs& a, const float* x, void* packed) {
    pack(a, x, 1, 0, packed);
    return packed;
  }

  // All rows of N vectors of features from `column` on. Inlined, the epilogue's constants would take registers that sums need.
  template <bool kSmall, int N>
  __attribute__((noinline)) static void columns(const LinearArgs& a, const LowBitLayout& w, const Codes& x, int64_t column, float* sums) {
    const uint8_t* const panel = static_cast<const uint8_t*>(a.weight) + column / kLowBitPanel * w.panel;
    const int64_t M = x.M, at_once = kRowsAtOnce / x.tile * x.tile, together = M <= x.tile ? w.groups : kTogether / w.group;
    for (int64_t top = 0; top < M; top += at_once) {
      const int64_t bottom = top + at_once < M ? top + at_once : M;
      for (int64_t g = 0; g < w.groups; g += together) {
        const int64_t stop = g + together < w.groups ? g + together : w.groups;
        const Words<kSmall, N> codes{panel + g * w.step, w.panel, {panel, w.panel}};
        for (int64_t first = top; first < bottom; first += x.tile) {
          const int rows = int(M - first < x.tile ? M - first : x.tile);
          with_rows<rows_of(N, kSmall)>(rows, [&]<int T>() { add_groups<kSmall, T, N>(a, w, x, panel, codes, g, stop, first, sums); });
        }
      }
    }
    const float* const row_scales = a.activations == kInt8Row ? x.scales : nullptr;
    const auto each = [&](auto&& put) {
      for (int64_t m = 0; m < M; ++m)
        for (int v = 0; v < N; ++v) {
          const Vec y = Vec::load(sums + (m * N + v) * L);
          put(row_scales ? y * Vec::set(row_scales[m]) : y, m, v * L);
        }
    };
    // What most layers ask for, a store and perhaps a residual: nothing of `a` is read anew behind every store.
    float* const out = a.out + column;
    const int64_t stride = a.out_stride, residual_stride = a.residual_stride;
    if (column + N * L > a.N || a.bias || a.activation == kSilu) {
      each([&](Vec y, int64_t m, int64_t n) { finish(a, y, m, column + n); });
    } else if (const float* const residual = a.residual) {
      each([&](Vec y, int64_t m, int64_t n) { (y + Vec::load(residual + m * residual_stride + column + n)).store(out + m * stride + n); });
    } else {
      each([&](Vec y, int64_t m, int64_t n) { y.store(out + m * stride + n); });
    }
  }

  template <bool kSmall, int N = most_vecs(kSmall)>
  static void columns_from(const LinearArgs& a, const LowBitLayout& w, const Codes& x, int64_t column, int64_t end, float* sums) {
    if (x.tile <= rows_of(N, kSmall))
      for (; column + N * L <= end; column += N * L) columns<kSmall, N>(a, w, x, column, sums);
    if constexpr (N > kDotVecs) columns_from<kSmall, N / 2>(a, w, x, column, end, sums);
  }

  static void block(const LinearArgs& a, const void* packed, int64_t M, int64_t begin, int64_t end, void* work) {
    const LowBitLayout w = layout_of(a);
    const Codes x(w, M, const_cast<void*>(packed));
    float* const sums = static_cast<float*>(work);
    w.small ? columns_from<true>(a, w, x, begin, end, sums) : columns_from<false>(a, w, x, begin, end, sums);
  }
};

// Calls f<Layer>() with the layer that takes the input as `a` asks.
template <class F>
auto with_layer(const LinearArgs& a, F&& f) {
  if (a.activations != kExact && a.activations != kToBf16) return f.template operator()<Rounded>();
#if RAMIFY_BF16_DOT
  if (a.activations == kToBf16 && a.dtype == kInt4) return f.template operator()<Halves>();
#endif
  return f.template operator()<Exact>();
}

void low_bit(const void* p, Team& team) {
  const LinearArgs& a = *static_cast<const LinearArgs*>(p);
  with_layer(a, [&]<class Layer>() { run_layer<Layer>(a, team); });
}

int64_t low_bit_scratch(const void* p, int threads) {
  const LinearArgs& a = *static_cast<const LinearArgs*>(p);
  return with_layer(a, [&]<class Layer>() { return layer_scratch<Layer>(a, threads); });
}

// The beginnings of a thread's first panels, as many as a tile of many rows reads side by side: to ask for those of wider tiles as well
// gained nothing.
void low_bit_ask(const void* p, Team& team) {
  const LinearArgs& a = *static_cast<const LinearArgs*>(p);
  const LowBitLayout w = layout_of(a);
  const Range mine = share_of(a, team);
  if (mine.begin == mine.end) return;
  const uint8_t* const first = static_cast<const uint8_t*>(a.weight) + mine.begin * dealt(a) / kLowBitPanel * w.panel;
  for (int64_t at = 0; at < w.panel && at < kAhead; at += 64)
    for (int64_t n = 0; n < kDotVecs * L / kLowBitPanel; ++n) __builtin_prefetch(first + n * w.panel + at);
}

}  // namespace

extern const KernelRow low_bit_kernels[];
const KernelRow low_bit_kernels[] = {{kLinearLowBit, low_bit, low_bit_scratch, low_bit_ask}, {-1, nullptr, nullptr}};

}  // namespace ramify::RAMIFY_ISA
