// csrc/cpu/linear.h: what every linear layer does around its product: prologue, epilogue, statistics, scratch, shares of threads.
//
// What     run_layer<Layer> drives a kernel that says how it packs a row of input and how it fills a block of columns:
//            int64_t packed_bytes(a, M)                      the packed input of M rows
//            int64_t work_bytes(a, M)                        what a thread's block() needs beside it
//            int64_t group(a, M)                             rows that the packed input interleaves
//            void pack(a, x, M, m, packed)                   row m of M, prepared f32 [K], into the packed input
//            const void* pack_one(a, x, packed)              the same for a single row, which may stay where it is
//            void block(a, packed, M, begin, end, work)      columns [begin, end) of all rows, both multiples of kPanel
// SiLU*up  is the prologue of the layer behind it: gate and up are the halves of one product, which different threads finish.
// Bits     a row is prepared from that row alone; who computes which columns does not show (row_invariance).
#pragma once
#include "cpu/gemm.h"
#include "cpu/rows.h"
#include "cpu/stats.h"

namespace ramify::RAMIFY_ISA {
namespace {

constexpr int kPanelVecs = kPanel / L;
constexpr int kAhead = 4096;  // bytes: how far before its use a panel is asked for

// The same where a tile reads N panels of `size` bytes side by side: what follows the end of one lies behind the others. Four are asked
// for nearer, or they would push each other out of L1; eight are streams that a core finds by itself.
template <int N>
struct Ahead {
  static constexpr bool kAsks = N < 8;
  static constexpr int64_t kNear = N < 4 ? kAhead : kAhead / 4;
  const uint8_t* turn;  // where the first panel's last kNear bytes begin
  int64_t past;
  Ahead(const uint8_t* first, int64_t size) : turn(first + (size > kNear ? size - kNear : 0)), past(kNear + (N - 1) * size) {}
  RAMIFY_INLINE int64_t operator()(const uint8_t* at) const { return at < turn ? kNear : past; }  // at: a place in the first panel
};

inline int64_t lines(int64_t bytes) { return pad_to(bytes, 64); }

// Both operands of the product are pairs of bf16.
inline bool uses_dot(const LinearArgs& a) { return RAMIFY_BF16_DOT && a.dtype == kBf16; }
inline int64_t value_bytes(const LinearArgs& a) { return uses_dot(a) ? 2 : 4; }

// One input row, prepared: f32 [K]. `row` and `other` have room for one each.
inline const float* prepare(const LinearArgs& a, const float* x, float* row, float* other) {
  if (a.prologue == kRmsNorm) {
    rms_norm_row(x, a.norm_weight, a.eps, row, a.K);
    x = row;
  } else if (a.prologue == kSiluMul) {
    silu_mul_row(x, row, a.K);
    x = row;
  }
  if (!a.perm) return x;
  for (int64_t k = 0; k < a.K; ++k) other[k] = x[a.perm[k]];
  return other;
}

// K values of row m of a group of `rows`: [k * rows + m], or pairs of bf16 when both operands of the product are.
inline void pack_row(const LinearArgs& a, const float* x, int64_t K, void* group, int rows, int m) {
  if (!uses_dot(a)) {
    float* out = static_cast<float*>(group) + m;
    for (int64_t k = 0; k < K; ++k) out[k * rows] = x[k];
    return;
  }
  uint32_t* out = static_cast<uint32_t*>(group) + m;
  int64_t k = 0;
#if RAMIFY_BF16_DOT
  for (uint32_t pairs[L]; k + 2 * L <= K; k += 2 * L) {  // one value at a time, this takes a third of the product of eight rows
    _mm512_storeu_si512(pairs, (__m512i)_mm512_cvtne2ps_pbh(Vec::load(x + k + L).v, Vec::load(x + k).v));
    for (int i = 0; i < L; ++i) out[((k >> 1) + i) * rows] = pairs[i];
  }
#endif
  for (; k < K; k += 2) out[(k >> 1) * rows] = narrow(x[k]) | uint32_t(k + 1 < K ? narrow(x[k + 1]) : 0) << 16;
}

// One vector of results: bias, activation, residual, store. Columns past N are left out.
RAMIFY_INLINE void finish(const LinearArgs& a, Vec y, int64_t row, int64_t column) {
  const int64_t left = a.N - column;
  if (left <= 0) return;
  if (a.bias) y = y + load_part(a.bias + column, left, 0.f);
  if (a.activation == kSilu) y = silu(y);
  if (a.residual) y = y + load_part(a.residual + row * a.residual_stride + column, left, 0.f);
  store_part(a.out + row * a.out_stride + column, y, left);
}

// Part of one panel's product: inputs [begin, end) of K for one group of rows. Sums wait in `sums` [rows][kPanel] between
// parts; storing and reloading an f32 changes nothing.
struct Part {
  const void* x;  // packed values of input `begin`
  int64_t first_row, begin, end;
  float* sums;
};

// M rows x N vectors from `column` on. `w` is where the panel's values of that column and of input `begin` lie.
template <int M, int N, class W>
RAMIFY_INLINE void tile(const LinearArgs& a, const Part& part, int64_t column, const W& w, int64_t ahead = 0) {
  const int64_t K = part.end - part.begin;
  float* const sums = part.sums + part.first_row * kPanel + column % kPanel;
  Vec acc[M][N];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) acc[m][n] = part.begin == 0 ? Vec::set(0.f) : Vec::load(sums + m * kPanel + n * L);
#if RAMIFY_BF16_DOT
  if constexpr (W::kPairs)
    multiply_bf16<(N * L > kPanel ? 0 : kAhead)>(acc, static_cast<const uint32_t*>(part.x), w, (K + 1) / 2);
  else
#endif
    multiply<M, 1, (N * L > kPanel ? 0 : kAhead)>(acc, static_cast<const float*>(part.x), w, K, ahead);
  const bool last = part.end == a.K;
  for (int n = 0; n < N; ++n)
    for (int m = 0; m < M; ++m) {
      if (last)
        finish(a, acc[m][n], part.first_row + m, column + n * L);
      else
        acc[m][n].store(sums + m * kPanel + n * L);
    }
}

// Columns are dealt out by panels, or in the blocks of which each has its statistics.
inline int64_t dealt(const LinearArgs& a) { return a.argmax ? kStatsBlock : kPanel; }
inline Range share_of(const LinearArgs& a, const Team& team) { return share(team, pad_to(a.N, dealt(a)) / dealt(a)); }

// Rows that every thread packs for itself. A meeting costs more, and so do cores that write the interleaved rows of one line in turns.
// What is repeated, norm and rounding of 8 K values, is small beside a thread's 8 K N / threads products, on dozens of cores too.
constexpr int64_t kOwnRows = 8;

// Bytes: shared by the team the packed input of many rows and the statistics of each (row, block); for each thread two rows to prepare
// an input row in, the packed input of few rows, and what its block() works in.
struct Scratch {
  int64_t shared, stats, row, own_packed, work;
  template <class Layer>
  static Scratch of(const LinearArgs& a, int64_t M) {
    const int64_t blocks = pad_to(a.N, kStatsBlock) / kStatsBlock, packed = lines(Layer::packed_bytes(a, M));
    return {M > kOwnRows ? packed : 0, a.argmax ? lines(M * blocks * int64_t(sizeof(BlockStats))) : 0, lines(pad_to(a.K, 16) * 4),
            M > kOwnRows ? 0 : packed, lines(Layer::work_bytes(a, M))};
  }
  int64_t own() const { return 2 * row + own_packed + work; }
};

template <class Layer>
void run_layer(const LinearArgs& a, Team& team) {
  const int64_t M = *a.rows;
  if (M == 0) return;
  const Scratch s = Scratch::of<Layer>(a, M);
  char* const base = static_cast<char*>(a.scratch);
  BlockStats* const stats = reinterpret_cast<BlockStats*>(base + s.shared);
  char* const own = base + s.shared + s.stats + team.id * s.own();
  float* const row = reinterpret_cast<float*>(own);
  float* const other = reinterpret_cast<float*>(own + s.row);
  void* const work = own + 2 * s.row + s.own_packed;

  char* const to = M > kOwnRows ? base : own + 2 * s.row;
  const void* packed = to;
  if (M == 1) {
    packed = Layer::pack_one(a, prepare(a, a.x, row, other), to);
  } else {
    const int64_t group = Layer::group(a, M);
    const Range groups = M > kOwnRows ? share(team, (M + group - 1) / group) : Range{0, M};
    for (int64_t m = groups.begin * group; m < groups.end * group && m < M; ++m)
      Layer::pack(a, prepare(a, a.x + m * a.x_stride, row, other), M, m, to);
    if (M > kOwnRows) wait(team);
  }

  const Range mine = share_of(a, team);
  if (!a.argmax) return Layer::block(a, packed, M, mine.begin * kPanel, mine.end * kPanel, work);
  const int64_t width = pad_to(a.N, kPanel), blocks = pad_to(a.N, kStatsBlock) / kStatsBlock;
  for (int64_t b = mine.begin; b < mine.end; ++b) {
    const int64_t begin = b * kStatsBlock, end = begin + kStatsBlock < width ? begin + kStatsBlock : width;
    Layer::block(a, packed, M, begin, end, work);
    const int64_t real = (end < a.N ? end : a.N) - begin;
    for (int64_t m = 0; m < M; ++m) block_stats(a.out + m * a.out_stride + begin, real, int32_t(begin), int(a.topk), stats[m * blocks + b]);
  }
  wait(team);
  const Range rows = share(team, M);
  for (int64_t m = rows.begin; m < rows.end; ++m)
    join_stats(stats + m * blocks, blocks, int(a.topk), a.argmax + m, a.top + m, a.lse + m, a.topk_ids + m * a.topk,
               a.topk_values + m * a.topk);
}

// For a.rows rows or fewer: a captured step has room for its bucket and runs what it is given.
template <class Layer>
int64_t layer_scratch(const LinearArgs& a, int threads) {
  const auto bytes = [&](int64_t M) {
    const Scratch s = Scratch::of<Layer>(a, M);
    return s.shared + s.stats + threads * s.own();
  };
  const int64_t M = *a.rows, all = bytes(M), few = bytes(M < kOwnRows ? M : kOwnRows);
  return all > few ? all : few;
}

}  // namespace
}  // namespace ramify::RAMIFY_ISA
