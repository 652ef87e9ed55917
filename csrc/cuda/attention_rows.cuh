// csrc/cuda/attention_rows.cuh: attention with 64 packed query rows as the rows of wgmma, keys, then features, as its columns.
//
// scores[row, key] = Q K^T with Q in shared memory; weights stay in registers, as A; o[row, feature] += weights V. Two warpgroups of a
// block have 64 rows each and read the same tiles.
#pragma once
#include "cuda/attention_wgmma.cuh"

namespace ramify::gpu {
namespace {

// One warpgroup's share. Thread 32 w + 4 g + t: rows 16 w + g + 8 i; keys or features 8 j + 2 t + e in element 4 j + 2 i + e.
template <class S>
struct RowShare {
  float m[2], l[2];
  float o[32 * S::Panels];
};

// Scores become weights, rounded and in the order of A; moves the rows' references where it has to. The largest weight is at least a
// half, so a sum is 0 exactly when its row saw no key; a score that is NaN or infinite makes it NaN for good.
template <class S>
RT_FN void softmax_rows(RowShare<S>& own, const uint64_t (&seen)[2], const float (&s)[32], uint32_t (&weights)[4][4]) {
  using T = typename S::Type;
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint64_t bits = seen[i] >> (2 * t);
    float top = kNothing;
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (bits >> (8 * j + e) & 1) top = fmaxf(top, s[4 * j + 2 * i + e]);
    top = fmaxf(top, __shfl_xor_sync(rt::kAll, top, 1));
    top = fmaxf(top, __shfl_xor_sync(rt::kAll, top, 2));
    const float next = floorf(top) + 1;  // nothing + 1 is nothing
    if (next > own.m[i]) {
      const float shrink = power2(own.m[i] - next);
      own.m[i] = next, own.l[i] *= shrink;
#pragma unroll
      for (int n = 0; n < 8 * S::Panels; ++n) own.o[4 * n + 2 * i] *= shrink, own.o[4 * n + 2 * i + 1] *= shrink;
    }
    float sum = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      T pair[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float x = s[4 * j + 2 * i + e], whole = floorf(x);
        pair[e] = from_float<T>(bits >> (8 * j + e) & 1 ? exp2f(x - whole) * power2(whole - own.m[i]) : 0.f);
        sum += to_float(pair[e]);
      }
      memcpy(&weights[j / 2][j % 2 * 2 + i], pair, 4);
    }
    own.l[i] += sum;
  }
}

template <class S>
RT_FN void take_tile_rows(const AttentionArgs& a, const Item& it, const Tiling& tiles, int tile, RowShare<S>& own,
                          const unsigned char* queries, const unsigned char* keys) {
  using T = typename S::Type;
  const int first = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
  uint64_t seen[2] = {~uint64_t(0), ~uint64_t(0)};
  if (partly_seen(a, tiles, tile)) {
#pragma unroll
    for (int i = 0; i < 2; ++i) seen[i] = visible(a, it, tiles, tile, first + 8 * i);
  }
  float s[32];
  rt::wgmma_fence(s);
#pragma unroll
  for (int step = 0; step < 4 * S::Panels; ++step) {
    const int at = step / 4 * kPanel + step % 4 * 32;
    rt::wgmma<T, 0, 0>(s, rt::descriptor(queries + at, 0, 1024), rt::descriptor(keys + at, 0, 1024), step > 0);
  }
  rt::wgmma_commit();
  rt::wgmma_wait<0>(s);
  const float scale = float(a.scale) * kLog2e;
#pragma unroll
  for (int n = 0; n < 32; ++n) s[n] *= scale;
  uint32_t weights[4][4];
  softmax_rows<S>(own, seen, s, weights);
  rt::wgmma_fence(own.o, weights);
#pragma unroll
  for (int step = 0; step < 4; ++step)
    rt::wgmma_registers<T, 1>(own.o, weights[step], rt::descriptor(keys + S::Panels * kPanel + step * 2048, kPanel, 1024), 1);
  rt::wgmma_commit();
  rt::wgmma_wait<0>(own.o);
}

// The item's result: the output itself where its chunk is the only one, else a part.
template <class S>
RT_FN void finish_rows(const AttentionArgs& a, const Item& it, RowShare<S>& own) {
  using T = typename S::Type;
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float l = own.l[i];
    l += __shfl_xor_sync(rt::kAll, l, 1);
    l += __shfl_xor_sync(rt::kAll, l, 2);
    const int r = int(threadIdx.x % 128 / 32) * 16 + int(threadIdx.x % 32 / 4) + 8 * i;
    if (r >= it.rows) continue;
    const bool seen = it.live(r) && l != 0, whole = it.chunks == 1;
    const float share = seen ? 1.f / l : 0.f;
    T* const out = output<T>(a, it, r);
    float* const part = part_at(a, it, it.chunk) + r * (a.D + 2);
#pragma unroll
    for (int n = 0; n < 8 * S::Panels; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int d = 8 * n + 2 * t + e;
        const float o = seen ? own.o[4 * n + 2 * i + e] : 0.f;
        if (d >= a.D) continue;
        if (whole)
          out[d] = from_float<T>(o * share);
        else
          part[d] = o;
      }
    if (t) continue;
    if (whole)
      *lse_at(a, it, r) = seen ? (own.m[i] + log2f(l)) * kLn2 : -INFINITY;
    else
      part[a.D] = seen ? own.m[i] : kNothing, part[a.D + 1] = seen ? l : 0.f;
  }
}

// One group of a block: all of its items. Tiles that none of its rows see cost it nothing but the hand-over.
template <class S>
RT_FN void consume_rows(const AttentionArgs& a, Barriers& bars, const unsigned char* ring, unsigned char* queries) {
  const int group = threadIdx.x / 128, barrier = 1 + group;
  Turn<S::Stages> turn;
  Item it;
  for (int64_t index = blockIdx.x; group_at<S::Groups>(a, index, it); index += gridDim.x) {
    const Tiling tiles = tiles_of<S::Groups>(a, it);
    it = beside(a, it, group);
    RowShare<S> own;
    own.m[0] = own.m[1] = kNothing, own.l[0] = own.l[1] = 0;
#pragma unroll
    for (int n = 0; n < 32 * S::Panels; ++n) own.o[n] = 0;
    rt::bar_sync(barrier, 128);  // the item before is done with shared memory
    load_queries<S>(a, it, queries, threadIdx.x % 128);
    rt::fence_async();
    rt::bar_sync(barrier, 128);
    for (int tile = tiles.after(-1); tile < tiles.count; tile = tiles.after(tile)) {
      rt::mbar_wait(&bars.full[turn.stage], turn.parity);
      rt::fence_async();
      if (it.live(0)) take_tile_rows<S>(a, it, tiles, tile, own, queries, ring + turn.stage * S::kStage);
      if (threadIdx.x % 32 == 0) rt::mbar_arrive(&bars.empty[turn.stage]);
      turn.next();
    }
    finish_rows<S>(a, it, own);
  }
}

}  // namespace
}  // namespace ramify::gpu
