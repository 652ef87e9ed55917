// csrc/cuda/attention.cu: tree and interval attention for sm_80 and newer (mma.sync). Meaning: reference/attention.py.
// Status: compiled and emulated, not yet run on hardware.
//
// What     o[B, T, Hq, D] and lse over the committed slots, unmasked but for the window, and a tail of at most 256 rows masked by
//          ancestor words; or over the slots between each row's start and end, with any number of rows and no tail. bf16 and f16,
//          head sizes 64, 96, 128 and 256, contiguous or paged.
// Tiling   an item is (sequence, KV head, 64 packed rows of T * Hq/Hkv, chunk of slots). 16 rows a warp, Q in registers (D 256: in
//          shared memory); K and V arrive in tiles of kKeys through a ring of two stages. Warps without rows only copy.
// Schedule a fixed grid; blocks take items by their number, which they work out from the lengths on the device. No host plan. Slots
//          before the first start and behind the last end of an item's rows are not read.
// Bits     chunks end at multiples of `chunk` slots, never by T, B or load; weights are 2^(s - m) with an integral m, so rescaling
//          is exact; parts are joined in chunk order, without atomics: the same bits for any grid (row_invariance).
//          Not row-invariant in a tree: the tail's keys are summed in tiles of their own, not at their positions (attention_invariant.cu).
// Traffic  4 D bytes a slot and KV head, paid once for 64 rows; 4 (D + 2) bytes out and in a packed row and chunk where there are
//          several. Two stages are at most 70 KiB: three blocks an SM at D 64 and 96, two at 128 and 256 (one below sm_90).
#include <algorithm>

#include "cuda/attention_mma.cuh"

namespace ramify::gpu {
namespace {

template <class S>
__global__ void __launch_bounds__(S::kThreads, 2) attention_kernel(const AttentionArgs a) {
  using T = typename S::Type;
  RT_DYN(T, ring);  // [stage][keys, values][kKeys][kPitch], and the staged queries
  T* const staged = ring + S::kStages * 2 * S::kKeys * S::kPitch;
  const auto keys = [&](int stage) { return ring + stage * 2 * S::kKeys * S::kPitch; };
  const bool words = in_words<T>(a);
  for (int64_t index = blockIdx.x;; index += gridDim.x) {
    Item it;
    if (!item_at(a, index, it)) return;
    __syncthreads();  // the item before is done with shared memory
    Rows<S> rows;
    rows.m[0] = rows.m[1] = kNothing, rows.l[0] = rows.l[1] = 0;
#pragma unroll
    for (int n = 0; n < S::D / 8; ++n) rows.o[n][0] = rows.o[n][1] = rows.o[n][2] = rows.o[n][3] = 0;
    load_queries<S>(a, it, rows, staged);
    __syncthreads();
    const Tiling tiles = tiling(a, it, S::kKeys);
    int tile = tiles.after(-1);
    if (tile < tiles.count) fetch<S>(a, it, tiles, tile, words, keys(0), keys(0) + S::kKeys * S::kPitch);
    rt::cp_commit();
    for (int stage = 0; tile < tiles.count; stage ^= 1) {
      const int ahead = tiles.after(tile);
      if (ahead < tiles.count) fetch<S>(a, it, tiles, ahead, words, keys(stage ^ 1), keys(stage ^ 1) + S::kKeys * S::kPitch);
      rt::cp_commit();
      rt::cp_wait<1>();
      __syncthreads();
      if (int(threadIdx.x / 32) * 16 < it.rows) {
        float s[S::kKeys / 8][4];
        uint64_t seen[2];
#pragma unroll
        for (int half = 0; half < 2; ++half)
          seen[half] = visible(a, it, tiles, tile, int(threadIdx.x / 32) * 16 + int(threadIdx.x % 32 / 4) + 8 * half);
        scores<S, S::kKeys>(rows, staged, keys(stage), float(a.scale) * kLog2e, s);
        softmax<S, S::kKeys>(rows, seen, s);
        add_values<S, S::kKeys>(rows, s, keys(stage) + S::kKeys * S::kPitch);
      }
      __syncthreads();  // or the next copy would overwrite what a warp still reads
      tile = ahead;
    }
    rt::cp_wait<0>();
    finish<S>(a, it, rows);
  }
}

// The parts of one packed row, in chunk order. Threads share the head's features.
template <class T>
__global__ void __launch_bounds__(256) join_kernel(const AttentionArgs a) {
  Item it;
  if (!row_item(a, blockIdx.z, blockIdx.y, blockIdx.x / kRowBlock, it) || it.chunks == 1) return;
  const int r = int(blockIdx.x % kRowBlock), D = int(a.D), d = threadIdx.x;
  if (r >= it.rows) return;
  float m = kNothing, o = 0, l = 0;
  for (int c = 0; c < it.chunks; ++c) m = fmaxf(m, part_at(a, it, c)[r * (D + 2) + D]);
  for (int c = 0; c < it.chunks; ++c) {
    const float* const part = part_at(a, it, c) + r * (D + 2);
    const float share = power2(part[D] - m);
    o += part[d] * share, l += part[D + 1] * share;
  }
  output<T>(a, it, r)[d] = from_float<T>(l != 0 ? o * (1.f / l) : 0.f);
  if (d == 0) *lse_at(a, it, r) = l != 0 ? (m + log2f(l)) * kLn2 : -INFINITY;
}

struct MmaKernel {
  template <class S>
  static constexpr auto of = attention_kernel<S>;
};

}  // namespace

int join_attention(const AttentionArgs& a, void* stream) {
  if (chunks_of(a) > 1) {
    auto* const join = a.type == kBf16 ? join_kernel<bf16> : join_kernel<f16>;
    const dim3 grid(unsigned(a.T * (a.Hq / a.Hkv)), unsigned(a.Hkv), unsigned(a.B));
    RT_LAUNCH(join, grid, dim3(unsigned(a.D)), 0, cudaStream_t(stream), a);
  }
  return cudaGetLastError();
}

int attention(const AttentionArgs& given, void* stream) {
  AttentionArgs a = given;  // kernels count positions in 32 bits: a window beyond them is none, and slots beyond them are not there
  a.window = std::min(a.window, int64_t(INT32_MAX)), a.page = std::min(a.page, int64_t(INT32_MAX));
  if (a.page_table) a.table_width = std::min(a.table_width, INT32_MAX / a.page);
  if (a.B == 0 || a.T == 0) return cudaSuccess;
  if (a.chunk < 64 || a.chunk % 64 || a.T * (a.Hq / a.Hkv) > INT32_MAX - kRowBlock) return cudaErrorInvalidValue;
  if (a.start ? a.window > 0 || a.variant == kInvariant : a.T > kMaxRows) return cudaErrorInvalidValue;
  if (a.variant == kInvariant) return attention_invariant(a, stream);
  if (attention_variant(a) != kMma) return attention_wgmma(a, stream);
  return start_mma<MmaKernel>(a, cudaStream_t(stream));
}

}  // namespace ramify::gpu
