// csrc/cuda/sample.cu: the random decisions of a step, on the device. Meaning: reference/verify.py; numbers: common/rng.h.
// Status: compiled and emulated, not yet run on hardware.
//
// What     verify_sample draws a token at every row of a tree and walks it, or tests its drawn children on the way; residual_sample draws
//          from norm([p - q]_+).
// Shape    row_stats (verify.cu) weighs tiles of 2048 columns. draw_rows: a block a row, which joins its tiles and reads one of them again.
//          Then the greedy walk over what was drawn (verify.cu), or judge: a block a sequence. After j rejections the target is a
//          recurrence in j scalars, so no distribution is ever stored: each pass recomputes it from logits and q.
// Decides  in double, columns in order: equal logits, q and seeds give equal decisions on every backend, up to sums that differ by
//          2^-50 or so and a number that falls between them.
// Traffic  row_stats' read of the logits, and a tile of each row again; judge adds V (p + q) bytes a rejection, and twice that where all
//          children are rejected. There one block reads a row: this is latency, not bandwidth.
#include "common/rng.h"
#include "cuda/entries.h"
#include "cuda/values.cuh"

namespace ramify::gpu {
namespace {

constexpr int kThreads = 256, kTile = kThreads * kChunk, kMostTiles = 512;  // V up to 2^20
static_assert(kTile == kSampleTile, "row_stats weighs the tiles");

struct Row {  // weights of V columns: as they lie there, or with a heat above 0 exp(x / heat - top) * over of logits
  const void* x;
  int64_t type;
  float heat;
  double top, over;
};

RT_FN const void* row_at(const void* x, int64_t type, int64_t at) {
  return static_cast<const char*>(x) + at * (type == kF64 ? 8 : type == kF32 ? 4 : 2);
}

// Eight columns of any type but double; `fill` behind the end.
RT_FN void load(const Row& row, int64_t at, int64_t left, float fill, float (&x)[kChunk]) {
  if (row.type == kF32) {
    const float* const from = static_cast<const float*>(row.x);
    load_chunk(from + at, left, wide(from, 0), fill, x);
  } else if (row.type == kBf16) {
    const bf16* const from = static_cast<const bf16*>(row.x);
    load_chunk(from + at, left, wide(from, 0), fill, x);
  } else {
    const f16* const from = static_cast<const f16*>(row.x);
    load_chunk(from + at, left, wide(from, 0), fill, x);
  }
}

// Weights of eight columns; 0 behind the end.
RT_FN void weights(const Row& row, int64_t at, int64_t left, double (&p)[kChunk]) {
  if (row.type == kF64) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) p[i] = i < left ? static_cast<const double*>(row.x)[at + i] : 0.0;
    return;
  }
  float x[kChunk];
  load(row, at, left, row.heat > 0 ? -INFINITY : 0.f, x);
#pragma unroll
  for (int i = 0; i < kChunk; ++i) p[i] = row.heat > 0 ? exp(double(x[i] / row.heat) - row.top) * row.over : double(x[i]);
}

RT_FN double weight(const Row& row, int64_t at) {
  if (row.type == kF64) return static_cast<const double*>(row.x)[at];
  const float x = value_at(row.x, row.type, at);
  return row.heat > 0 ? exp(double(x / row.heat) - row.top) * row.over : double(x);
}

// What `rejected` tests left of p: t -> max(t - q / mass, 0) / left, once for each; q loses the tokens rejected before it if
// `without`. left 0: nothing was left, and t stays.
struct Target {
  Row p, q;
  int64_t V;
  bool without;
  int rejected;
  const double *mass, *left;
  const int32_t* tokens;

  RT_FN double draft(double q0, int64_t column, int tests) const {
    for (int i = 0; without && i < tests; ++i)
      if (tokens[i] == column) return 0;
    return q0;
  }
  RT_FN double at(double p0, double q0, int64_t column, int tests) const {
    for (int i = 0; i < tests; ++i) {
      const double rest = p0 - draft(q0, column, i) / mass[i];
      if (left[i] > 0) p0 = (rest > 0 ? rest : 0) / left[i];
    }
    return p0;
  }
  RT_FN void chunk(int64_t column, double (&t)[kChunk]) const {
    weights(p, column, V - column, t);
    if (rejected == 0) return;
    double d[kChunk];
    weights(q, column, V - column, d);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) t[i] = at(t[i], d[i], column + i, rejected);
  }
};

struct Space {    // shared memory of a draw
  double* part;   // [kThreads / 32]
  double* tiles;  // [kMostTiles]
  int* found;     // [2]
};

RT_FN int tiles_of(int64_t V) { return int((V + kTile - 1) / kTile); }

// The column where the running sum of the target passes u times its total: never one of weight 0. space.tiles holds the running sum at
// the end of each tile. The last column where there is no total. All threads get it.
RT_FN int32_t locate(const Target& target, double u, const Space& space) {
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, tiles = tiles_of(target.V);
  const double total = space.tiles[tiles - 1], goal = u * total;
  if (!(total > 0)) return int32_t(target.V - 1);
  double t[kChunk];
  int tile = 0;  // the first whose end lies above the goal; where rounding leaves none, the last that adds anything
  while (tile < tiles - 1 && !(space.tiles[tile] > goal)) ++tile;
  while (tile > 0 && !(space.tiles[tile] > space.tiles[tile - 1])) --tile;
  const int64_t column = int64_t(tile) * kTile + thread * kChunk;
  double sum = 0;
  if (column < target.V) {
    target.chunk(column, t);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) sum += t[i];
  }
  double end = sum;  // of this thread's chunk, inside the tile
  for (int step = 1; step < 32; step *= 2) {
    const double before = __shfl_up_sync(rt::kAll, end, step);
    if (lane >= step) end += before;
  }
  if (lane == 31) space.part[warp] = end;
  if (thread == 0) space.found[0] = kThreads, space.found[1] = -1;
  __syncthreads();
  double start = tile ? space.tiles[tile - 1] : 0;
  for (int w = 0; w < warp; ++w) start += space.part[w];
  double own = __shfl_up_sync(rt::kAll, end, 1);
  own = start + (lane ? own : 0);
  if (sum > 0) {
    if (start + end > goal) atomicMin(space.found, thread);
    atomicMax(space.found + 1, thread);
  }
  __syncthreads();
  const int chosen = space.found[0] < kThreads ? space.found[0] : space.found[1];
  __syncthreads();
  if (thread == chosen) {
    int best = -1;
    bool passed = false;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      own += t[i];
      if (!passed && t[i] > 0) best = i, passed = own > goal;
    }
    space.found[0] = int(column) + best;
  }
  __syncthreads();
  const int32_t token = chosen < 0 ? int32_t(target.V - 1) : space.found[0];
  __syncthreads();
  return token;
}

RT_FN int32_t draw(const Target& target, double u, const Space& space) {
  double t[kChunk], total = 0;
  for (int tile = 0; tile < tiles_of(target.V); ++tile) {
    const int64_t column = int64_t(tile) * kTile + threadIdx.x * kChunk;
    double sum = 0;
    if (column < target.V) {
      target.chunk(column, t);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) sum += t[i];
    }
    total += block_sum(sum, space.part);
    if (threadIdx.x == 0) space.tiles[tile] = total;
  }
  __syncthreads();
  return locate(target, u, space);
}

struct Sums {
  double left, mass;
};

// One more test of `target` failed at `token`: what is left of p, and of q without that token.
RT_FN Sums reject(const Target& target, int32_t token, const Space& space) {
  double left = 0, mass = 0, p[kChunk], q[kChunk];
  for (int64_t column = threadIdx.x * kChunk; column < target.V; column += kTile) {
    weights(target.p, column, target.V - column, p);
    weights(target.q, column, target.V - column, q);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const double d = target.draft(q[i], column + i, target.rejected);
      const double rest = target.at(p[i], q[i], column + i, target.rejected) - d / target.mass[target.rejected];
      if (rest > 0) left += rest;
      if (column + i != token) mass += d;
    }
  }
  left = block_sum(left, space.part);
  return {left, block_sum(mass, space.part)};
}

RT_FN double total_of(const Row& row, int64_t V, const Space& space) {
  double sum = 0, x[kChunk];
  for (int64_t column = threadIdx.x * kChunk; column < V; column += kTile) {
    weights(row, column, V - column, x);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) sum += x[i];
  }
  return block_sum(sum, space.part);
}

RT_FN Row logits_of(const VerifySampleArgs& a, int64_t b, int64_t t) {
  return {row_at(a.logits, a.type, b * a.stride_b + t * a.stride_t), a.type, a.temperature[b], 0, 1};
}

RT_FN double uniform_of(const VerifySampleArgs& a, int64_t b, int depth, uint32_t purpose, uint32_t lane) {
  return uniform(uint64_t(a.seed[b]), uint64_t(a.position[b] + depth), purpose, lane);
}

// What plain decoding would emit after each row, and what makes its logits probabilities.
__global__ void __launch_bounds__(kThreads, 1) draw_rows_kernel(const VerifySampleArgs a) {
  RT_SHARED(double, part, [kThreads / 32]);
  RT_SHARED(double, tiles, [kMostTiles]);
  RT_SHARED(int, found, [2]);
  const unsigned rows = unsigned(a.T);
  const int64_t b = blockIdx.x / rows, t = blockIdx.x % rows;
  if (a.n_rows && t >= a.n_rows[b]) return;
  const int count = tiles_of(a.V);
  Row row = logits_of(a, b, t);
  int32_t token = a.argmax[blockIdx.x];
  if (row.heat > 0) {
    const double* const each = a.weights + 2 * (blockIdx.x * int64_t(count));
    row.top = double(a.top[blockIdx.x] / row.heat);
    for (int i = threadIdx.x; i < count; i += kThreads) tiles[i] = each[2 * i + 1] * exp(each[2 * i] - row.top);
    __syncthreads();
    if (threadIdx.x == 0)
      for (int i = 1; i < count; ++i) tiles[i] += tiles[i - 1];
    __syncthreads();
    int depth = 0;
    for (int64_t r = t, up; r > 0 && (up = a.parents[b * a.T + r]) >= 0 && up < r; r = up) ++depth;
    const Target target = {row, {}, a.V, false, 0, nullptr, nullptr, nullptr};
    token = locate(target, uniform_of(a, b, depth, kSample, 0), {part, tiles, found});
    if (a.scale && threadIdx.x == 0) a.scale[2 * blockIdx.x] = row.top, a.scale[2 * blockIdx.x + 1] = 1 / tiles[count - 1];
  }
  if (threadIdx.x == 0) a.drawn[blockIdx.x] = token;
}

__global__ void __launch_bounds__(kThreads, 1) judge_kernel(const VerifySampleArgs a) {
  RT_SHARED(double, part, [kThreads / 32]);
  RT_SHARED(double, tiles, [kMostTiles]);
  RT_SHARED(int, found, [2]);
  RT_SHARED(double, mass, [kMaxRows + 1]);
  RT_SHARED(double, left, [kMaxRows]);
  RT_SHARED(int32_t, rejected, [kMaxRows]);
  const Space space = {part, tiles, found};
  const int64_t b = blockIdx.x;
  const int32_t *const tokens = a.tokens + b * a.T, *const parents = a.parents + b * a.T;
  int32_t* const path = a.path + b * a.T;
  const int T = int(a.T), n = min(max(a.n_rows[b], 1), T);
  int row = 0, steps = 0;
  int32_t token = 0;
  while (row >= 0) {
    if (threadIdx.x == 0) path[steps] = row;
    const int depth = steps++;
    int child = row + 1, next = -1;
    while (child < n && parents[child] != row) ++child;
    Target target = {logits_of(a, b, row), {}, a.V, a.mode == kWor, 0, mass, left, rejected};
    if (child >= n || !(target.p.heat > 0)) {
      token = a.drawn[b * a.T + row];
      for (; next < 0 && child < n; ++child)
        if (parents[child] == row && tokens[child] == token) next = child;
      row = next;
      continue;
    }
    target.p.top = a.scale[2 * (b * a.T + row)], target.p.over = a.scale[2 * (b * a.T + row) + 1];
    target.q = {a.q + b * a.q_stride_b + row * a.q_stride_t, kF32, 0, 0, 1};
    double q_mass = total_of(target.q, a.V, space);
    for (uint32_t sibling = 0; child < n; ++child) {
      if (parents[child] != row) continue;
      const int32_t x = tokens[child];
      const bool known = x >= 0 && x < a.V;
      if (threadIdx.x == 0) mass[target.rejected] = q_mass;
      __syncthreads();
      const double q0 = known ? weight(target.q, x) : 0, t = known ? target.at(weight(target.p, x), q0, x, target.rejected) : 0;
      if (uniform_of(a, b, depth, kAccept, sibling++) * (target.draft(q0, x, target.rejected) / q_mass) < t) {
        token = x, next = child;
        break;
      }
      const Sums sums = reject(target, x, space);
      if (threadIdx.x == 0) left[target.rejected] = sums.left, rejected[target.rejected] = x;
      __syncthreads();
      ++target.rejected;
      if (a.mode == kWor) {
        q_mass = sums.mass;
        if (!(q_mass > 0)) break;  // no further child can have been drawn from it
      }
    }
    if (next < 0) token = draw(target, uniform_of(a, b, depth, kResidual, 0), space);
    __syncthreads();
    row = next;
  }
  for (int i = steps + int(threadIdx.x); i < T; i += kThreads) path[i] = -1;
  if (threadIdx.x == 0) a.count[b] = steps, a.bonus[b] = token;
}

__global__ void __launch_bounds__(kThreads, 1) residual_sample_kernel(const ResidualSampleArgs a) {
  RT_SHARED(double, part, [kThreads / 32]);
  RT_SHARED(double, tiles, [kMostTiles]);
  RT_SHARED(int, found, [2]);
  RT_SHARED(double, mass, [1]);
  RT_SHARED(double, left, [1]);
  const Space space = {part, tiles, found};
  const int64_t row = blockIdx.x;
  const Row p = {row_at(a.p, a.type, row * a.p_stride), a.type, 0, 0, 1}, q = {row_at(a.q, a.type, row * a.q_stride), a.type, 0, 0, 1};
  Target target = {p, q, a.V, false, 0, mass, left, nullptr};
  if (threadIdx.x == 0) mass[0] = 1;  // q is taken as it is
  __syncthreads();
  const Sums sums = reject(target, -1, space);
  if (threadIdx.x == 0) left[0] = sums.left;
  __syncthreads();
  target.rejected = 1;
  const int32_t token = draw(target, a.u[row], space);
  if (threadIdx.x == 0) a.ids[row] = token;
}

bool fits(int64_t V) { return V >= 1 && V <= int64_t(kMostTiles) * kTile; }

}  // namespace

int verify_sample(const VerifySampleArgs& a, void* stream) {
  if (a.B == 0) return cudaSuccess;
  if (!fits(a.V) || a.T < 1 || a.T > kMaxRows || (a.mode != kDet && !(a.q && a.scale))) return cudaErrorInvalidValue;
  RT_LAUNCH(draw_rows_kernel, dim3(unsigned(a.B * a.T)), dim3(kThreads), 0, cudaStream_t(stream), a);
  if (!a.path) return cudaGetLastError();
  if (a.mode == kDet) return verify_greedy({a.B, a.T, a.tokens, a.parents, a.drawn, a.n_rows, a.path, a.count, a.bonus}, stream);
  RT_LAUNCH(judge_kernel, dim3(unsigned(a.B)), dim3(kThreads), 0, cudaStream_t(stream), a);
  return cudaGetLastError();
}

int residual_sample(const ResidualSampleArgs& a, void* stream) {
  if (a.rows == 0) return cudaSuccess;
  if (!fits(a.V)) return cudaErrorInvalidValue;
  RT_LAUNCH(residual_sample_kernel, dim3(unsigned(a.rows)), dim3(kThreads), 0, cudaStream_t(stream), a);
  return cudaGetLastError();
}

}  // namespace ramify::gpu
