// csrc/cuda/sample.cu: the random decisions of a step, on the device. Meaning: reference/verify.py; numbers: common/rng.h.
// Status: compiled and emulated, not yet run on hardware.
//
// What     tree_uniforms draws the numbers of a tree; verify_sample walks it; residual_sample draws from norm([p - q]_+).
// Shape    a block a sequence, or a row. After j rejections the target is a recurrence in j scalars, so no distribution is ever
//          stored: each pass recomputes it from p and q.
// Decides  in double, columns in order: equal p, q and u give equal decisions on every backend, up to sums that differ by
//          2^-50 or so and a u that falls between them.
// Traffic  V (p + q) bytes a rejection, twice V p a draw. One block reads a row: this is latency, not bandwidth.
#include "common/rng.h"
#include "cuda/entries.h"
#include "cuda/values.cuh"

namespace ramify::gpu {
namespace {

constexpr int kThreads = 256, kTile = kThreads * kChunk, kMostTiles = 512;  // V up to 2^20

struct Row {  // one row of a Distribution
  const void* x;
  int64_t type;
  bool logits;
  double lse;
};

RT_FN Row row_of(const Distribution& d, int64_t b, int64_t t, int64_t lse_at) {
  const int64_t at = b * d.stride_b + t * d.stride_t, size = d.type == kF64 ? 8 : d.type == kF32 ? 4 : 2;
  return {static_cast<const char*>(d.x) + at * size, d.type, d.lse != nullptr, d.lse ? double(d.lse[lse_at]) : 0.0};
}

// Probabilities of eight columns; 0 behind the end.
RT_FN void probabilities(const Row& row, int64_t at, int64_t left, double (&p)[kChunk]) {
  float x[kChunk];
  if (row.type == kF64) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) p[i] = i < left ? static_cast<const double*>(row.x)[at + i] : 0.0;
    return;
  }
  const float fill = row.logits ? -INFINITY : 0.f;
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
#pragma unroll
  for (int i = 0; i < kChunk; ++i) p[i] = row.logits ? exp(double(x[i]) - row.lse) : double(x[i]);
}

RT_FN double probability(const Row& row, int64_t at) {
  if (row.type == kF64) return static_cast<const double*>(row.x)[at];
  const double x = value_at(row.x, row.type, at);
  return row.logits ? exp(x - row.lse) : x;
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
    probabilities(p, column, V - column, t);
    if (rejected == 0) return;
    double d[kChunk];
    probabilities(q, column, V - column, d);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) t[i] = at(t[i], d[i], column + i, rejected);
  }
};

struct Space {    // shared memory of a draw
  double* part;   // [kThreads / 32]
  double* tiles;  // [kMostTiles]
  int* found;     // [2]
};

// The column where the running sum of the target passes u times its total: never one of weight 0. All threads get it.
RT_FN int32_t draw(const Target& target, double u, const Space& space) {
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int tiles = int((target.V + kTile - 1) / kTile);
  double t[kChunk], total = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    const int64_t column = int64_t(tile) * kTile + thread * kChunk;
    double sum = 0;
    if (column < target.V) {
      target.chunk(column, t);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) sum += t[i];
    }
    total += block_sum(sum, space.part);
    if (thread == 0) space.tiles[tile] = total;
  }
  __syncthreads();
  const double goal = u * total;
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
  const int32_t token = chosen < 0 ? 0 : space.found[0];
  __syncthreads();
  return token;
}

struct Sums {
  double left, mass;
};

// One more test of `target` failed at `token`: what is left of p, and of q without that token.
RT_FN Sums reject(const Target& target, int32_t token, const Space& space) {
  double left = 0, mass = 0, p[kChunk], q[kChunk];
  for (int64_t column = threadIdx.x * kChunk; column < target.V; column += kTile) {
    probabilities(target.p, column, target.V - column, p);
    probabilities(target.q, column, target.V - column, q);
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
    probabilities(row, column, V - column, x);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) sum += x[i];
  }
  return block_sum(sum, space.part);
}

__global__ void __launch_bounds__(kThreads, 1) verify_sample_kernel(const VerifySampleArgs a) {
  RT_SHARED(double, part, [kThreads / 32]);
  RT_SHARED(double, tiles, [kMostTiles]);
  RT_SHARED(int, found, [2]);
  RT_SHARED(double, mass, [kMaxRows + 1]);
  RT_SHARED(double, left, [kMaxRows]);
  RT_SHARED(int32_t, rejected, [kMaxRows]);
  const Space space = {part, tiles, found};
  const int64_t b = blockIdx.x;
  const int32_t *const tokens = a.tokens + b * a.T, *const parents = a.parents + b * a.T;
  const double* const u = a.u + b * a.T * 3;
  int32_t* const path = a.path + b * a.T;
  const int T = int(a.T), n = min(max(a.n_rows[b], 1), T);
  int row = 0, steps = 0;
  int32_t token = 0;
  while (row >= 0) {
    if (threadIdx.x == 0) path[steps] = row;
    ++steps;
    Target target = {row_of(a.p, b, row, b * a.T + row), {}, a.V, a.mode == kWor, 0, mass, left, rejected};
    int child = row + 1;
    while (child < n && parents[child] != row) ++child;
    int next = -1;
    if (a.mode == kDet || child >= n) {
      token = draw(target, u[3 * row], space);
      for (; next < 0 && child < n; ++child)
        if (parents[child] == row && tokens[child] == token) next = child;
      row = next;
      continue;
    }
    target.q = row_of(a.q, b, row, b * a.T + row);
    double q_mass = total_of(target.q, a.V, space);
    for (; child < n; ++child) {
      if (parents[child] != row) continue;
      const int32_t x = tokens[child];
      const bool known = x >= 0 && x < a.V;
      if (threadIdx.x == 0) mass[target.rejected] = q_mass;
      __syncthreads();
      const double q0 = known ? probability(target.q, x) : 0, t = known ? target.at(probability(target.p, x), q0, x, target.rejected) : 0;
      if (u[3 * child + 1] * (target.draft(q0, x, target.rejected) / q_mass) < t) {
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
    if (next < 0) token = draw(target, u[3 * row + 2], space);
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
  Target target = {row_of(a.p, 0, row, row), row_of(a.q, 0, row, row), a.V, false, 0, mass, left, nullptr};
  if (threadIdx.x == 0) mass[0] = 1;  // q is taken as it is
  __syncthreads();
  const Sums sums = reject(target, -1, space);
  if (threadIdx.x == 0) left[0] = sums.left;
  __syncthreads();
  target.rejected = 1;
  const int32_t token = draw(target, a.u[row], space);
  if (threadIdx.x == 0) a.ids[row] = token;
}

__global__ void __launch_bounds__(kThreads) tree_uniforms_kernel(const TreeUniformsArgs a) {
  const int64_t b = blockIdx.x, row = threadIdx.x;
  if (row >= a.T || row >= a.n_rows[b]) return;
  const int32_t* const parents = a.parents + b * a.T;
  const int32_t parent = parents[row];
  int depth = 0, sibling = 0;
  for (int64_t r = row; r > 0 && parents[r] >= 0 && parents[r] < r; r = parents[r]) ++depth;
  for (int64_t r = 1; r < row; ++r) sibling += parents[r] == parent;
  const uint64_t seed = uint64_t(a.seed[b]), position = uint64_t(a.position[b]);
  double* const u = a.u + (b * a.T + row) * 3;
  u[0] = uniform(seed, position + depth, kSample, 0);
  u[1] = row ? uniform(seed, position + depth - 1, kAccept, sibling) : 0;
  u[2] = uniform(seed, position + depth, kResidual, 0);
}

bool fits(int64_t V) { return V >= 1 && V <= int64_t(kMostTiles) * kTile; }

}  // namespace

int verify_sample(const VerifySampleArgs& a, void* stream) {
  if (a.B == 0) return cudaSuccess;
  if (!fits(a.V) || a.T > kMaxRows || (a.mode != kDet && !a.q.x)) return cudaErrorInvalidValue;
  RT_LAUNCH(verify_sample_kernel, dim3(unsigned(a.B)), dim3(kThreads), 0, cudaStream_t(stream), a);
  return cudaGetLastError();
}

int residual_sample(const ResidualSampleArgs& a, void* stream) {
  if (a.rows == 0) return cudaSuccess;
  if (!fits(a.V)) return cudaErrorInvalidValue;
  RT_LAUNCH(residual_sample_kernel, dim3(unsigned(a.rows)), dim3(kThreads), 0, cudaStream_t(stream), a);
  return cudaGetLastError();
}

int tree_uniforms(const TreeUniformsArgs& a, void* stream) {
  if (a.B == 0) return cudaSuccess;
  if (a.T > kMaxRows) return cudaErrorInvalidValue;
  RT_LAUNCH(tree_uniforms_kernel, dim3(unsigned(a.B)), dim3(kThreads), 0, cudaStream_t(stream), a);
  return cudaGetLastError();
}

}  // namespace ramify::gpu
