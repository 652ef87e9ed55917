// csrc/cpu/linear.cpp: dense linear layers, f32 and bf16 weights. Meaning: reference/linear.py.
//
// What     out = activation(prologue(x) W^T + bias) + residual for M rows; as the last layer also arg-max, log-sum-exp and
//          the k largest of every row, taken while a block of its columns is still in cache (linear.h).
// Tiling   weights in panels of 32 features; a thread owns a run of panels and takes each once from memory, past it the
//          rows go in groups of kRows. The input is packed once, group by group, so a step of k reads one line of it.
// Traffic  N * K * sizeof(weight) bytes, paid once for all rows.
// Bits     every output is one chain of K products, its input row prepared from that row alone (row_invariance).
#include "cpu/linear.h"

namespace ramify::RAMIFY_ISA {
namespace {

template <int M, int N>
RAMIFY_INLINE void dense_tile(const LinearArgs& a, const Part& part, int64_t column) {
  const bool pairs = a.dtype == kBf16;
  const int64_t size = panel_size(a.K, pairs), lane = column % kPanel, start = column / kPanel * size + part.begin * kPanel;
  if (pairs) {
    const int64_t width = 2 * N * L, next = N * L >= kPanel ? 0 : lane + N * L < kPanel ? width : width - 2 * kPanel + size;
    tile<M, N>(a, part, column, Bf16Panels{static_cast<const bf16*>(a.weight) + start + 2 * lane, size}, next);
  } else {
    tile<M, N>(a, part, column, F32Panels{static_cast<const float*>(a.weight) + start + lane, size});
  }
}

constexpr int kDepth = 512;  // inputs of a panel that stay in L1 while every row group passes

struct Dense {
  static int64_t packed_bytes(const LinearArgs& a, int64_t M) { return M * pad_to(a.K, 16) * 4; }
  static int64_t work_bytes(const LinearArgs&, int64_t M) { return M * kPanel * 4; }
  static int64_t group(const LinearArgs&, int64_t) { return kRows; }

  static void pack(const LinearArgs& a, const float* x, int64_t M, int64_t m, void* packed) {
    const int64_t first = m / kRows * kRows, rows = M - first < kRows ? M - first : kRows;
    pack_row(a, x, a.K, static_cast<char*>(packed) + packed_bytes(a, first), int(rows), int(m - first));
  }

  static const void* pack_one(const LinearArgs& a, const float* x, void* packed) {
    if (!uses_dot(a)) return x;
    pack_row(a, x, a.K, packed, 1, 0);
    return packed;
  }

  static void block(const LinearArgs& a, const void* packed, int64_t M, int64_t begin, int64_t end, void* work) {
    float* const sums = static_cast<float*>(work);
    if (M <= kRows && tile_vectors(int(M)) >= kPanelVecs) {  // few rows: several panels at once, each read once
      with_rows(int(M), [&]<int R>() {
        if constexpr (tile_vectors(R) >= kPanelVecs) {
          constexpr int kWide = tile_vectors(R);
          const Part whole{packed, 0, 0, a.K, sums};
          int64_t col = begin;
          for (; col + kWide * L <= end; col += kWide * L) dense_tile<R, kWide>(a, whole, col);
          for (; col < end; col += kPanel) dense_tile<R, kPanelVecs>(a, whole, col);
        }
      });
      return;
    }
    for (int64_t panel = begin; panel < end; panel += kPanel)
      for (int64_t k = 0; k < a.K; k += kDepth)
        for (int64_t first = 0; first < M; first += kRows) {
          const int rows = int(M - first < kRows ? M - first : kRows);
          const int64_t stop = k + kDepth < a.K ? k + kDepth : a.K;
          const char* const x = static_cast<const char*>(packed) + packed_bytes(a, first) + k * rows * value_bytes(a);
          const Part part{x, first, k, stop, sums};
          with_rows(rows, [&]<int R>() {
            constexpr int N = tile_vectors(R) < kPanelVecs ? tile_vectors(R) : kPanelVecs;
            for (int64_t col = panel; col < panel + kPanel; col += N * L) dense_tile<R, N>(a, part, col);
          });
        }
  }
};

void linear(const void* p, Team& team) { run_layer<Dense>(*static_cast<const LinearArgs*>(p), team); }

int64_t linear_scratch(const void* p, int threads) { return layer_scratch<Dense>(*static_cast<const LinearArgs*>(p), threads); }

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
