// csrc/cpu/linear.cpp: dense linear layers, f32 and bf16 weights. Meaning: reference/linear.py.
//
// What     out = activation(prologue(x) W^T + bias) + residual for M rows; as the last layer also arg-max, log-sum-exp and
//          the k largest of every row, taken while a block of its columns is still in cache.
// Tiling   weights in panels of 32 features; a thread owns a run of panels and takes each once from memory, past it the
//          rows go in groups of kRows. The input is packed once, group by group, so a step of k reads one line of it.
// Traffic  N * K * sizeof(weight) bytes, paid once for all rows.
// Bits     every output is one chain of K products, its input row prepared from that row alone (row_invariance).
#include "cpu/gemm.h"
#include "cpu/rows.h"
#include "cpu/stats.h"

namespace ramify::RAMIFY_ISA {
namespace {

bool uses_dot(const LinearArgs& a) { return RAMIFY_BF16_DOT && a.dtype == kBf16; }

// The shared packed input; for each thread two rows to work in and the sums of a panel; the statistics of each (row, block).
struct Scratch {
  int64_t packed, row, sums, stats;  // bytes
  Scratch(const LinearArgs& a, int64_t M) {
    const int64_t K = pad_to(a.K, 16);
    packed = M * K * 4, row = K * 4, sums = M * kPanel * 4;
    stats = a.argmax ? M * (pad_to(a.N, kStatsBlock) / kStatsBlock) * int64_t(sizeof(BlockStats)) : 0;
  }
};

// One input row, prepared: f32 [K].
const float* prepare(const LinearArgs& a, const float* x, float* row) {
  const int64_t K = a.K;
  if (a.prologue == kRmsNorm) {
    rms_norm_row(x, a.norm_weight, a.eps, row, K);
    return row;
  }
  if (a.prologue == kSiluMul) {
    silu_mul_row(x, row, K);
    return row;
  }
  return x;
}

// Row m of a group of `rows`: values [k * rows + m], or pairs of bf16 when both operands of the product are.
void pack_row(const LinearArgs& a, const float* x, void* group, int rows, int m) {
  if (!uses_dot(a)) {
    float* out = static_cast<float*>(group) + m;
    for (int64_t k = 0; k < a.K; ++k) out[k * rows] = x[k];
    return;
  }
  uint32_t* out = static_cast<uint32_t*>(group) + m;
  for (int64_t k = 0; k < a.K; k += 2) out[(k >> 1) * rows] = narrow(x[k]) | uint32_t(k + 1 < a.K ? narrow(x[k + 1]) : 0) << 16;
}

// Part of one panel's product: inputs [begin, end) of K for one group of rows. Sums wait in `sums` [rows][kPanel] between
// parts; storing and reloading an f32 changes nothing.
struct Part {
  const void* group;
  int64_t first_row, begin, end;
  float* sums;
};

template <int M, int N>
RAMIFY_INLINE void tile(const LinearArgs& a, const Part& part, int64_t column) {
  const bool pairs = a.dtype == kBf16;
  const int64_t size = panel_size(a.K, pairs), lane = column % kPanel, K = part.end - part.begin;
  float* const sums = part.sums + part.first_row * kPanel + lane;
  Vec acc[M][N];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) acc[m][n] = part.begin == 0 ? Vec::set(0.f) : Vec::load(sums + m * kPanel + n * L);
  const int64_t start = column / kPanel * size + part.begin * kPanel;
  const float* const x = static_cast<const float*>(part.group) + part.begin * M;
  if (pairs) {
    const Bf16Panels w{static_cast<const bf16*>(a.weight) + start + 2 * lane, size};
#if RAMIFY_BF16_DOT
    multiply_bf16<M, N>(acc, static_cast<const uint32_t*>(part.group) + part.begin / 2 * M, w, (K + 1) / 2);
#else
    const int64_t width = 2 * N * L;
    const bool whole = N * L >= kPanel;
    multiply<M, 1>(acc, x, w, K, whole ? 0 : lane + N * L < kPanel ? width : width - 2 * kPanel + size);
#endif
  } else {
    multiply<M, 1>(acc, x, F32Panels{static_cast<const float*>(a.weight) + start + lane, size}, K);
  }
  if (part.end < a.K) {
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) acc[m][n].store(sums + m * kPanel + n * L);
    return;
  }
  for (int n = 0; n < N; ++n) {
    const int64_t col = column + n * L, left = a.N - col;
    if (left <= 0) break;
    const Vec bias = a.bias ? load_part(a.bias + col, left, 0.f) : Vec::set(0.f);
    for (int m = 0; m < M; ++m) {
      const int64_t row = part.first_row + m;
      Vec y = a.bias ? acc[m][n] + bias : acc[m][n];
      if (a.activation == kSilu) y = silu(y);
      if (a.residual) y = y + load_part(a.residual + row * a.residual_stride + col, left, 0.f);
      store_part(a.out + row * a.out_stride + col, y, left);
    }
  }
}

constexpr int kPanelVecs = kPanel / L;
constexpr int kDepth = 512;  // inputs of a panel that stay in L1 while every row group passes

// Columns [begin, end) of all M rows; both ends are multiples of kPanel.
void block(const LinearArgs& a, const void* packed, int64_t M, int64_t begin, int64_t end, float* sums) {
  const int64_t stride = pad_to(a.K, 16);
  if (M <= kRows && tile_vectors(int(M)) >= kPanelVecs) {  // few rows: several panels at once, each read once
    with_rows(int(M), [&]<int R>() {
      if constexpr (tile_vectors(R) >= kPanelVecs) {
        constexpr int kWide = tile_vectors(R);
        const Part whole{packed, 0, 0, a.K, sums};
        int64_t col = begin;
        for (; col + kWide * L <= end; col += kWide * L) tile<R, kWide>(a, whole, col);
        for (; col < end; col += kPanel) tile<R, kPanelVecs>(a, whole, col);
      }
    });
    return;
  }
  for (int64_t panel = begin; panel < end; panel += kPanel)
    for (int64_t k = 0; k < a.K; k += kDepth)
      for (int64_t first = 0; first < M; first += kRows) {
        const int rows = int(M - first < kRows ? M - first : kRows);
        const Part part{static_cast<const char*>(packed) + first * stride * 4, first, k, k + kDepth < a.K ? k + kDepth : a.K, sums};
        with_rows(rows, [&]<int R>() {
          constexpr int N = tile_vectors(R) < kPanelVecs ? tile_vectors(R) : kPanelVecs;
          for (int64_t col = panel; col < panel + kPanel; col += N * L) tile<R, N>(a, part, col);
        });
      }
}

void linear(const void* p, Team& team) {
  const LinearArgs& a = *static_cast<const LinearArgs*>(p);
  const int64_t M = *a.rows, stride = pad_to(a.K, 16);
  if (M == 0) return;
  const Scratch s(a, M);
  char* const base = static_cast<char*>(a.scratch);
  float* const row = reinterpret_cast<float*>(base + s.packed + team.id * s.row);
  float* const sums = reinterpret_cast<float*>(base + s.packed + team.size * 2 * s.row + team.id * s.sums);
  BlockStats* const stats = reinterpret_cast<BlockStats*>(base + s.packed + team.size * (2 * s.row + s.sums));

  const void* packed = base;
  if (M == 1) {  // every thread prepares the one row for itself: cheaper than a meeting
    const float* x = prepare(a, a.x, row);
    packed = x;
    if (uses_dot(a)) {
      void* own = base + s.packed + (team.size + team.id) * s.row;
      pack_row(a, x, own, 1, 0);
      packed = own;
    }
  } else {
    const Range mine = share(team, M);
    for (int64_t m = mine.begin; m < mine.end; ++m) {
      const int64_t first = m / kRows * kRows, rows = M - first < kRows ? M - first : kRows;
      pack_row(a, prepare(a, a.x + m * a.x_stride, row), base + first * stride * 4, int(rows), int(m - first));
    }
    wait(team);
  }

  const int64_t width = pad_to(a.N, kPanel);
  if (!a.argmax) {
    const Range mine = share(team, width / kPanel);
    return block(a, packed, M, mine.begin * kPanel, mine.end * kPanel, sums);
  }
  const int64_t blocks = pad_to(a.N, kStatsBlock) / kStatsBlock;
  const Range mine = share(team, blocks);
  for (int64_t b = mine.begin; b < mine.end; ++b) {
    const int64_t begin = b * kStatsBlock, end = begin + kStatsBlock < width ? begin + kStatsBlock : width;
    block(a, packed, M, begin, end, sums);
    const int64_t real = (end < a.N ? end : a.N) - begin;
    for (int64_t m = 0; m < M; ++m) block_stats(a.out + m * a.out_stride + begin, real, int32_t(begin), int(a.topk), stats[m * blocks + b]);
  }
  wait(team);
  const Range rows = share(team, M);
  for (int64_t m = rows.begin; m < rows.end; ++m)
    join_stats(stats + m * blocks, blocks, int(a.topk), a.argmax + m, a.top + m, a.lse + m, a.topk_ids + m * a.topk,
               a.topk_values + m * a.topk);
}

int64_t linear_scratch(const void* p, int threads) {
  const LinearArgs& a = *static_cast<const LinearArgs*>(p);
  const Scratch s(a, *a.rows);
  return s.packed + threads * (2 * s.row + s.sums) + s.stats;
}

void pack(const void* p, Team& team) {
  const PackArgs& a = *static_cast<const PackArgs*>(p);
  const bool pairs = a.dtype == kBf16;
  const int64_t size = panel_size(a.K, pairs), K = pairs ? pad_to(a.K, 2) : a.K;
  const Range mine = share(team, pad_to(a.N, kPanel) / kPanel);
  for (int64_t panel = mine.begin; panel < mine.end; ++panel)
    for (int64_t lane = 0; lane < kPanel; ++lane) {
      const int64_t n = panel * kPanel + lane;
      for (int64_t k = 0; k < K; ++k) {
        const bool real = n < a.N && k < a.K;
        const int64_t to = panel * size + panel_index(k, lane, pairs), from = n * a.stride + k;
        if (pairs)
          static_cast<bf16*>(a.out)[to] = real ? static_cast<const bf16*>(a.weight)[from] : bf16(0);
        else
          static_cast<float*>(a.out)[to] = real ? static_cast<const float*>(a.weight)[from] : 0.f;
      }
    }
}

}  // namespace

extern const KernelRow linear_kernels[];
const KernelRow linear_kernels[] = {{kLinear, linear, linear_scratch}, {kPack, pack, nullptr}, {-1, nullptr, nullptr}};

}  // namespace ramify::RAMIFY_ISA
