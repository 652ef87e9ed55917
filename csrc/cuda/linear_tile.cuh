// csrc/cuda/linear_tile.cuh: one tile of a linear layer over weights as they are stored, for sm_80 and newer (mma.sync).
//
// Operands  weights are the 16 rows of m16n8k16 and rows of x its 8 columns: nothing is padded to 16 rows of x, and what a row comes out
//           as depends on no other. Any group of 32 inputs is two products, and a scale multiplies their f32 sum.
// Block     panels of 128 outputs, one after the other, and up to 32 rows of x. A warp takes 32 outputs and every other piece of 64 bytes
//           of their weights, which it copies for itself through a ring of 3 or 4 stages: inside a window of 512 inputs there is no
//           barrier. A window of x, gathered and reordered on the way, its scales and zeros are shared by the block.
// Zeros     sum((code - zero) x) is sum(code x) - zero sum(x): a fractional zero is not rounded either.
// Shares    a block has an equal share of all panels' windows, which may end one panel and begin the next: all blocks run at a time, and
//           the ring runs on into the next panel while the sums of the last, which take the place of x, are joined. Shares end by N, K
//           and a constant alone: the same bits for 1 and for 256 rows, in any order of blocks.
// Shared    swizzled by 16 bytes: copies, weight loads of 4, 8 or 16 bytes and loads of x all meet 32 different banks.
#pragma once
#include "cuda/linear_parts.cuh"

namespace ramify::gpu {
namespace {

constexpr int kLinearThreads = 256, kWarps = kLinearThreads / 32;
constexpr int kStripes = kLinearPanel / 32, kWays = kWarps / kStripes;  // warps over the outputs, warps over the inputs
constexpr int kStageBytes = 32 * kPiece;                                // of a warp
constexpr int kChunks = kLinearWindow / kChunk;                         // of one row of x
constexpr int kWindowBits = 9;
static_assert(1 << kWindowBits == kLinearWindow, "its logarithm");
constexpr int kScalePitch = kLinearPanel + 4;

template <class W, int kTiles>
struct Tile {
  using T = typename W::Type;
  static constexpr int kTokens = 8 * kTiles, kStages = kTiles == 4 ? 3 : 4;
  static constexpr int kStep = kPiece * 8 / W::kBits, kTurns = kStep / 32;  // inputs of a stage, 32 at a time
  static constexpr int kWords = W::kBits / 4;                               // of eight codes
  static constexpr int kSteps = kLinearWindow / (kWays * kStep);            // of one warp in a window
  static constexpr int kRing = kStages * kWarps * kStageBytes, kX = kTokens * kLinearWindow * 2;
  static_assert(kWays * kTokens * kLinearPanel * 4 <= kX, "the sums take the place of x");
  static constexpr int kMostGroups = kLinearWindow / 32;
  static_assert(kRing + kX + kMostGroups * (2 * kScalePitch + kTokens) * 4 + 128 <= 99 * 1024, "what a block of sm_86 and sm_120 may have");
};

inline int groups_of(const LinearArgs& a) { return a.group ? int(kLinearWindow / a.group) : 1; }

template <class W, int kTiles>
int shared_bytes(const LinearArgs& a) {
  using S = Tile<W, kTiles>;
  const int each = groups_of(a) * kScalePitch * 4;
  return S::kRing + S::kX + (W::kGroups ? each : 0) + (a.zero ? each + groups_of(a) * S::kTokens * 4 : 0);
}

// What a block works on.
struct Work {
  int panel, K, first, rows;  // first row of x, how many there are
  int group;                  // logarithm of the inputs that share a scale: at most of a window
  Quad* x;                    // [kTokens][kChunks], places of odd rows swapped by fours
  float *scale, *zero, *total;
};

RT_FN int chunk_place(int token, int chunk) { return token * kChunks + (chunk ^ (token & 1) << 2); }
// A window of x, from input k on, and where there are zeros the sums of its groups: of eight, then of neighbours by two and two.
template <class W, int kTiles>
RT_FN void stage_inputs(const LinearArgs& a, const Work& work, int k) {
  using S = Tile<W, kTiles>;
  const bool words = !a.perm && wide(static_cast<const uint16_t*>(a.x), a.x_stride);
  for (int n = threadIdx.x; n < S::kTokens * kChunks; n += kLinearThreads) {
    const int token = n / kChunks, chunk = n % kChunks;
    Quad quad = {};
    if (token < work.rows)
      quad = inputs_at<W>(a, static_cast<const uint16_t*>(a.x) + int64_t(work.first + token) * a.x_stride, k + chunk * kChunk, words);
    work.x[chunk_place(token, chunk)] = quad;
    if (a.zero) {
      float sum = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) sum += number<typename S::T>(quad.word[i]) + number<typename S::T>(quad.word[i] >> 16);
      const int mine = chunk * kChunk;
      for (int step = 1; step * kChunk < 1 << work.group; step *= 2) sum += __shfl_xor_sync(rt::kAll, sum, step);
      if ((mine & ((1 << work.group) - 1)) == 0) work.total[(mine >> work.group) * S::kTokens + token] = sum;
    }
  }
}

// The scales and zeros of a window, f32 [group][output].
template <class W>
RT_FN void stage_scales(const LinearArgs& a, const Work& work, int k) {
  const int groups = kLinearWindow >> work.group;
  for (int n = threadIdx.x; n < groups * kLinearPanel; n += kLinearThreads) {
    const int group = n & (groups - 1), row = n >> (kWindowBits - work.group), output = work.panel * kLinearPanel + row;
    const int at = a.group ? (k >> work.group) + group : 0;
    const bool there = output < a.N && at << work.group < work.K;
    work.scale[group * kScalePitch + row] = there ? value_at(a.scale, a.scale_type, output / int(a.lines) * a.scale_stride + at) : 0.f;
    if (a.zero) work.zero[group * kScalePitch + row] = there ? number<f16>(a.zero[output * a.zero_stride + at]) : 0.f;
  }
}

// A warp's sums: outputs g and g + 8 of two blocks of 16, rows 2t and 2t + 1 of every tile.
template <int kTiles>
struct Sums {
  float y[2][kTiles][4];
  uint32_t nan[2][2];
};

template <int kTiles>
RT_FN void clear(float (&y)[2][kTiles][4]) {
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int n = 0; n < kTiles; ++n) y[i][n][0] = y[i][n][1] = y[i][n][2] = y[i][n][3] = 0;
}

// y += products of 32 inputs: turn `turn` of a stage, chunks `chunk` and the three behind it of the window.
template <class W, int kTiles>
RT_FN void multiply(const Work& work, const unsigned char* stage, int turn, int chunk, uint32_t minus, float (&y)[2][kTiles][4],
                    uint32_t (&nan)[2][2]) {
  using S = Tile<W, kTiles>;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  constexpr int kBytes = S::kWords * 4;  // of a lane's eight codes
  const int byte = (4 * turn + t) * kBytes;
  Quad x[kTiles];
#pragma unroll
  for (int n = 0; n < kTiles; ++n) x[n] = work.x[chunk_place(8 * n + g, chunk + t)];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    uint32_t first[4], second[4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t codes[S::kWords], pair[4];
      memcpy(codes, __builtin_assume_aligned(stage + piece_place(16 * i + 8 * half + g, byte / 16) + byte % 16, kBytes), kBytes);
      W::decode(codes, minus, pair, nan[i][half]);
      first[half] = pair[0], first[2 + half] = pair[1], second[half] = pair[2], second[2 + half] = pair[3];
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const uint32_t low[2] = {x[n].word[0], x[n].word[1]}, high[2] = {x[n].word[2], x[n].word[3]};
      rt::mma<typename S::T>(y[i][n], first, low);
      rt::mma<typename S::T>(y[i][n], second, high);
    }
  }
}

// Sums of a group of inputs, under its scale, to those of the row.
template <int kTiles>
RT_FN void add_group(const Work& work, int group, bool zeros, const float (&part)[2][kTiles][4], float (&y)[2][kTiles][4]) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int at = group * kScalePitch + int(threadIdx.x / 32 % kStripes) * 32 + g;
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float scale = work.scale[at + 16 * i + 8 * half], zero = zeros ? work.zero[at + 16 * i + 8 * half] : 0.f;
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float sum = part[i][n][2 * half + e];
          if (zeros) sum -= zero * work.total[group * 8 * kTiles + 8 * n + 2 * t + e];
          y[i][n][2 * half + e] += scale * sum;
        }
    }
}

// A stage of the ring, inputs of the window from chunk `chunk` on.
template <class W, int kTiles>
RT_FN void add_stage(const LinearArgs& a, const Work& work, const unsigned char* stage, int chunk, Sums<kTiles>& sums) {
  using S = Tile<W, kTiles>;
  using N = Numbers<typename S::T>;
  const uint32_t minus = a.zero ? N::kMinusBase : N::kMinusBase8;
  if constexpr (!W::kGroups) {
#pragma unroll
    for (int turn = 0; turn < S::kTurns; ++turn) multiply<W, kTiles>(work, stage, turn, chunk + 4 * turn, minus, sums.y, sums.nan);
  } else {
    float part[2][kTiles][4];
    clear<kTiles>(part);
#pragma unroll
    for (int turn = 0; turn < S::kTurns; ++turn) {
      multiply<W, kTiles>(work, stage, turn, chunk + 4 * turn, minus, part, sums.nan);
      const int ends = (chunk + 4 * turn + 4) * kChunk;  // in the window
      if (turn == S::kTurns - 1 || (ends & ((1 << work.group) - 1)) == 0) {
        add_group<kTiles>(work, (ends - 1) >> work.group, a.zero, part, sums.y);
        clear<kTiles>(part);
      }
    }
  }
}

// Where the sum of an output lies: the outputs of row 2t are moved by 8t, so that the lanes of a warp store to 32 different banks.
RT_FN int sum_place(int token, int output) { return token * kLinearPanel + (output ^ (token & 6) << 2); }

// Both ways' sums of the block, one after the other; then those of the panel's parts.
template <class W, int kTiles>
RT_FN void store(const LinearArgs& a, const Work& work, const Shares& shares, Sums<kTiles>& sums) {
  using S = Tile<W, kTiles>;
  RT_SHARED(Part, part, [1]);
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp = threadIdx.x / 32;
  float* const all = reinterpret_cast<float*>(work.x);
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool nan = W::kNan && any_nan(sums.nan[i][half]);
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int token = 8 * n + 2 * t + e, output = warp % kStripes * 32 + 16 * i + 8 * half + g;
          all[sum_place(warp / kStripes * S::kTokens + token, output)] = nan ? not_a_number() : sums.y[i][n][2 * half + e];
        }
    }
  if (threadIdx.x == 0) {  // alone, or every thread would keep what this takes in registers
    part[0] = part_of(shares, work.panel);
    part[0].output = work.panel * kLinearPanel, part[0].row = work.first, part[0].rows = work.rows;
  }
  __syncthreads();
  const auto sum = [&](int token, int output) {
    float4 y = *reinterpret_cast<const float4*>(all + sum_place(token, output));
#pragma unroll
    for (int way = 1; way < kWays; ++way) y = plus(y, *reinterpret_cast<const float4*>(all + sum_place(way * S::kTokens + token, output)));
    return y;
  };
  join<W, S::kTokens, kLinearPanel, kLinearThreads>(a, part[0], sum, [] { __syncthreads(); });
}

// Rows of x from `row` on. Blocks of the same weights are neighbours, so that the L2 cache serves all but the first of them.
template <class W, int kTiles>
__global__ void __launch_bounds__(kLinearThreads, kTiles == 1 ? 3 : 2) linear_kernel(const LinearArgs a, const Shares shares, int row) {
  using S = Tile<W, kTiles>;
  RT_DYN(unsigned char, space);
  const int share = int(blockIdx.y), windows = int(shares.pieces);
  Work work;
  work.K = int(a.K);
  work.first = row + int(blockIdx.x) * S::kTokens;
  work.rows = min(S::kTokens, int(live_rows(a.live, a.rows)) - work.first);
  if (work.rows <= 0) return;
  work.x = reinterpret_cast<Quad*>(space + S::kRing);
  work.scale = reinterpret_cast<float*>(space + S::kRing + S::kX);
  work.group = a.group ? __ffs(int(a.group)) - 1 : kWindowBits;
  const int groups = kLinearWindow >> work.group;
  work.zero = work.scale + groups * kScalePitch, work.total = work.zero + groups * kScalePitch;

  const int warp = threadIdx.x / 32, way = warp / kStripes, begin = shares.begin(share);
  int left = shares.begin(share + 1) - begin, k = begin % windows * kLinearWindow;  // windows, from input k of the panel on
  work.panel = begin / windows;
  unsigned char* const ring = space + warp * kStageBytes;
  int ahead = k / S::kStep + way, outputs = work.panel * kLinearPanel + warp % kStripes * 32;  // the next to fetch
  const auto fetch_next = [&](int slot) {
    fetch<W>(a, outputs, ahead, ring + slot * kWarps * kStageBytes);
    ahead += kWays;
    if (ahead >= windows * (kWays * S::kSteps)) ahead = way, outputs += kLinearPanel;
  };
  for (int slot = 0; slot < S::kStages; ++slot) {
    if (slot < left * S::kSteps) fetch_next(slot);
    rt::cp_commit();
  }
  Sums<kTiles> sums;
  for (int slot = 0; left > 0; k = 0, ++work.panel) {
    clear<kTiles>(sums.y);
    sums.nan[0][0] = sums.nan[0][1] = sums.nan[1][0] = sums.nan[1][1] = 0;
    for (; left > 0 && k < work.K; --left, k += kLinearWindow) {
      __syncthreads();  // all are done with the window or the sums before
      stage_inputs<W, kTiles>(a, work, k);
      if constexpr (W::kGroups) stage_scales<W>(a, work, k);
      __syncthreads();
#pragma unroll 1
      for (int j = 0; j < S::kSteps; ++j) {
        const int step = kWays * j + way;
        rt::cp_wait<S::kStages - 1>();
        __syncwarp();
        if (k + step * S::kStep < work.K) add_stage<W, kTiles>(a, work, ring + slot * kWarps * kStageBytes, step * S::kStep / kChunk, sums);
        __syncwarp();
        if (j + S::kStages < left * S::kSteps) fetch_next(slot);
        rt::cp_commit();
        slot = slot + 1 == S::kStages ? 0 : slot + 1;
      }
    }
    __syncthreads();
    store<W, kTiles>(a, work, shares, sums);
  }
}

template <class W, int kTiles>
int start_tiles(const LinearArgs& a, cudaStream_t stream) {
  auto* const kernel = linear_kernel<W, kTiles>;
  const int bytes = shared_bytes<W, kTiles>(a);
  if (const int error = rt::allow_shared(kernel, bytes)) return error;
  const Shares shares = shares_of(a, kLinearPanel, kLinearWindow, a.shares);
  for (int64_t row = 0; row < a.rows; row += kLinearRows) {
    const int64_t rows = a.rows - row < kLinearRows ? a.rows - row : kLinearRows;
    const dim3 grid(unsigned((rows + 8 * kTiles - 1) / (8 * kTiles)), shares.count);
    RT_LAUNCH(kernel, grid, dim3(kLinearThreads), bytes, stream, a, shares, int(row));
    if (const int error = cudaGetLastError()) return error;
  }
  return cudaSuccess;
}

// The number of rows decides how many a block takes, which no result shows.
template <class W>
int start_linear(const LinearArgs& a, void* stream) {
  if (a.rows <= 8) return start_tiles<W, 1>(a, cudaStream_t(stream));
  if (a.rows <= 16) return start_tiles<W, 2>(a, cudaStream_t(stream));
  return start_tiles<W, 4>(a, cudaStream_t(stream));
}

}  // namespace
}  // namespace ramify::gpu
