// csrc/cuda/attention_columns.cuh: attention with keys, then features, as the 64 rows of wgmma and packed query rows as its columns.
//
// scores[key, row] = K Q^T; weights[key, row] in shared memory; o[feature, row] += V^T weights. Nothing is padded to 64 rows but keys.
#pragma once
#include "cuda/attention_wgmma.cuh"

namespace ramify::gpu {
namespace {

// How far a row's scores may climb above its reference before everything is scaled anew: weights stay below 2^kLag, exact in any type.
constexpr float kLag = 8;

// One warpgroup's share. Thread 32 w + 4 g + t: keys or features 16 w + g and that + 8; columns 8 j + 2 t + e as c = 2 j + e.
template <class S>
struct Columns {
  static constexpr int kOwn = S::Rows / 4;
  float l[kOwn];
  float o[S::Panels][S::Rows / 2];
};

struct ColumnsShared {
  float m[64];        // the rows' references
  uint64_t seen[64];  // which keys of the tile a row sees
  float sum[64];      // of a row's weights; and where its result goes, or 0
  uint64_t place[64];
  float part[4][64];  // of each warp
};

RT_FN int column(int c) { return c / 2 * 8 + int(threadIdx.x % 4) * 2 + c % 2; }

#define RAMIFY_SCORE(c, i) s[(c) / 2 * 4 + 2 * (i) + (c) % 2]

// The largest seen score of each of a warp's columns, over all warps of the group.
template <class S>
RT_FN void move_references(Columns<S>& own, ColumnsShared& shared, const float (&s)[S::Rows / 2], uint32_t seen, int barrier) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
#pragma unroll
  for (int c = 0; c < S::Rows / 4; ++c) {
    float top = kNothing;
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (seen >> (2 * c + i) & 1) top = fmaxf(top, RAMIFY_SCORE(c, i));
#pragma unroll
    for (int step = 4; step < 32; step *= 2) top = fmaxf(top, __shfl_xor_sync(rt::kAll, top, step));
    if (lane < 4) shared.part[warp][column(c)] = top;
  }
  rt::bar_sync(barrier, 128);
#pragma unroll
  for (int c = 0; c < S::Rows / 4; ++c) {
    const int r = column(c);
    const float top = fmaxf(fmaxf(shared.part[0][r], shared.part[1][r]), fmaxf(shared.part[2][r], shared.part[3][r]));
    const float m = shared.m[r], next = floorf(top) + 1;
    if (next > m + kLag) {
      const float shrink = power2(m - next);
      own.l[c] *= shrink;
#pragma unroll
      for (int p = 0; p < S::Panels; ++p)
#pragma unroll
        for (int i = 0; i < 2; ++i) own.o[p][c / 2 * 4 + 2 * i + c % 2] *= shrink;
    }
  }
  rt::bar_sync(barrier, 128);
  if (int(threadIdx.x) < S::Rows) {
    const int r = threadIdx.x;
    const float top = fmaxf(fmaxf(shared.part[0][r], shared.part[1][r]), fmaxf(shared.part[2][r], shared.part[3][r]));
    if (floorf(top) + 1 > shared.m[r] + kLag) shared.m[r] = floorf(top) + 1;
  }
  rt::bar_sync(barrier, 128);
}

// Scores become weights in shared memory, rounded as the product with the values needs them. A row's reference moves by its own scores
// alone; its largest weight is at least a half, so a sum is 0 exactly when the row saw no key, and NaN for good after a score that is NaN
// or infinite.
template <class S>
RT_FN void softmax_columns(Columns<S>& own, ColumnsShared& shared, float (&s)[S::Rows / 2], uint32_t seen, unsigned char* weights,
                           int barrier) {
  using T = typename S::Type;
  const int lane = threadIdx.x % 32, key = int(threadIdx.x / 32 % 4) * 16 + lane / 4, t = lane % 4;
  bool above_reach = false;
#pragma unroll
  for (int c = 0; c < S::Rows / 4; ++c) {
    const float reach = shared.m[column(c)] + kLag;
#pragma unroll
    for (int i = 0; i < 2; ++i) above_reach |= (seen >> (2 * c + i) & 1) && floorf(RAMIFY_SCORE(c, i)) + 1 > reach;
  }
  if (rt::bar_or(barrier, 128, above_reach)) move_references<S>(own, shared, s, seen, barrier);
#pragma unroll
  for (int j = 0; j < S::Rows / 8; ++j) {
    const float m[2] = {shared.m[column(2 * j)], shared.m[column(2 * j + 1)]};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      T pair[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int c = 2 * j + e;
        const float x = RAMIFY_SCORE(c, i), whole = floorf(x);
        const float weight = seen >> (2 * c + i) & 1 ? exp2f(x - whole) * power2(whole - m[e]) : 0.f;
        pair[e] = from_float<T>(weight);
        own.l[c] += to_float(pair[e]);
      }
      memcpy(weights + rt::swizzled((key + 8 * i) * 128 + (8 * j + 2 * t) * 2), pair, 4);
    }
  }
}

// One tile. `barrier` is the group's own.
template <class S>
RT_FN void take_tile(const AttentionArgs& a, const Item& it, const Tiling& tiles, int tile, Columns<S>& own, ColumnsShared& shared,
                     const unsigned char* queries, const unsigned char* keys, unsigned char* weights, int barrier) {
  using T = typename S::Type;
  const int thread = threadIdx.x % 128, key = thread / 32 * 16 + thread % 32 / 4;
  uint32_t seen = ~0u;
  if (partly_seen(a, tiles, tile)) {
    if (thread < S::Rows) shared.seen[thread] = visible(a, it, tiles, tile, thread);
    rt::bar_sync(barrier, 128);
    seen = 0;
#pragma unroll
    for (int c = 0; c < S::Rows / 4; ++c) {
      const uint64_t word = shared.seen[column(c)] >> key;
      seen |= uint32_t(word & 1) << (2 * c) | uint32_t(word >> 8 & 1) << (2 * c + 1);
    }
  }
  float s[S::Rows / 2];
  rt::wgmma_fence(s);
#pragma unroll
  for (int step = 0; step < 4 * S::Panels; ++step) {
    const int panel = step / 4, k = step % 4 * 32;
    rt::wgmma<T, 0, 0>(s, rt::descriptor(keys + panel * kPanel + k, 0, 1024), rt::descriptor(queries + panel * S::Rows * 128 + k, 0, 1024),
                       step > 0);
  }
  rt::wgmma_commit();
  rt::wgmma_wait<0>(s);
  const float scale = float(a.scale) * kLog2e;
#pragma unroll
  for (int n = 0; n < S::Rows / 2; ++n) s[n] *= scale;
  softmax_columns<S>(own, shared, s, seen, weights, barrier);
  rt::fence_async();
  rt::bar_sync(barrier, 128);
  const unsigned char* const values = keys + S::Panels * kPanel;
  rt::wgmma_fence(own.o);
#pragma unroll
  for (int p = 0; p < S::Panels; ++p)
#pragma unroll
    for (int step = 0; step < 4; ++step)
      rt::wgmma<T, 1, 1>(own.o[p], rt::descriptor(values + p * kPanel + step * 2048, kPanel, 1024),
                         rt::descriptor(weights + step * 2048, kPanel, 1024), 1);
  rt::wgmma_commit();
  rt::wgmma_wait<0>(own.o);
}

// The item's result: the output itself where its chunk is the only one, else a part.
template <class S>
RT_FN void finish_columns(const AttentionArgs& a, const Item& it, Columns<S>& own, ColumnsShared& shared, int barrier) {
  using T = typename S::Type;
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32, first = warp * 16 + lane / 4;
#pragma unroll
  for (int c = 0; c < S::Rows / 4; ++c) {
    float l = own.l[c];
#pragma unroll
    for (int step = 4; step < 32; step *= 2) l += __shfl_xor_sync(rt::kAll, l, step);
    if (lane < 4) shared.part[warp][column(c)] = l;
  }
  rt::bar_sync(barrier, 128);
  const bool whole = it.chunks == 1;
  if (thread < S::Rows) {
    const int r = thread;
    const float l = it.live(r) ? shared.part[0][r] + shared.part[1][r] + shared.part[2][r] + shared.part[3][r] : 0.f;
    const float m = l != 0 ? shared.m[r] : kNothing;
    shared.sum[r] = l, shared.place[r] = 0;
    if (r < it.rows && whole) {
      shared.place[r] = reinterpret_cast<uintptr_t>(output<T>(a, it, r));
      *lse_at(a, it, r) = l != 0 ? (m + log2f(l)) * kLn2 : -INFINITY;
    } else if (r < it.rows) {
      float* const part = part_at(a, it, it.chunk) + r * (a.D + 2);
      shared.place[r] = reinterpret_cast<uintptr_t>(part);
      part[a.D] = m, part[a.D + 1] = l;
    }
  }
  rt::bar_sync(barrier, 128);
#pragma unroll
  for (int c = 0; c < S::Rows / 4; ++c) {
    const int r = column(c);
    const float l = shared.sum[r], share = l != 0 ? 1.f / l : 0.f;
    const uint64_t place = shared.place[r];
#pragma unroll
    for (int p = 0; p < S::Panels; ++p)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int d = p * 64 + first + 8 * i;
        const float o = l != 0 ? own.o[p][c / 2 * 4 + 2 * i + c % 2] : 0.f;
        if (!place || d >= a.D) continue;
        if (whole)
          reinterpret_cast<T*>(place)[d] = from_float<T>(o * share);
        else
          reinterpret_cast<float*>(place)[d] = o;
      }
  }
}

// One group of a block: all of its items.
template <class S>
RT_FN void consume_columns(const AttentionArgs& a, Barriers& bars, const unsigned char* ring, unsigned char* queries,
                           unsigned char* weights, ColumnsShared& shared) {
  constexpr int barrier = 1;  // of the consumers
  Turn<S::Stages> turn;
  Item it;
  for (int64_t index = blockIdx.x; group_at<S::Groups>(a, index, it); index += gridDim.x) {
    const Tiling tiles = tiles_of<S::Groups>(a, it);
    Columns<S> own;
#pragma unroll
    for (int c = 0; c < S::Rows / 4; ++c) own.l[c] = 0;
#pragma unroll
    for (int q = 0; q < S::Panels; ++q)
#pragma unroll
      for (int n = 0; n < S::Rows / 2; ++n) own.o[q][n] = 0;
    rt::bar_sync(barrier, 128);  // the item before is done with shared memory
    load_queries<S>(a, it, queries, threadIdx.x % 128);
    if (threadIdx.x < 64) shared.m[threadIdx.x] = kNothing;
    rt::fence_async();
    rt::bar_sync(barrier, 128);
    for (int tile = tiles.after(-1); tile < tiles.count; tile = tiles.after(tile)) {
      rt::mbar_wait(&bars.full[turn.stage], turn.parity);
      rt::fence_async();
      take_tile<S>(a, it, tiles, tile, own, shared, queries, ring + turn.stage * S::kStage, weights, barrier);
      if (threadIdx.x % 32 == 0) rt::mbar_arrive(&bars.empty[turn.stage]);
      turn.next();
    }
    finish_columns<S>(a, it, own, shared, barrier);
  }
}

#undef RAMIFY_SCORE

}  // namespace
}  // namespace ramify::gpu
