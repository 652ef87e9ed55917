// csrc/cuda/attention_mma.cuh: attention of a warp's 16 packed rows through mma.sync m16n8k16: tiles of keys in a ring, scores, weights,
// sums. Functions with a number of Keys work on that many rows of a tile.
#pragma once
#include "cuda/attention_item.cuh"

namespace ramify::gpu {
namespace {

// Copies a tile of the ring: rows of keys and of values, 16 bytes a thread at a time. What nobody sees becomes 0.
template <class S>
RT_FN void fetch(const AttentionArgs& a, const Item& it, const Tiling& tiles, int tile, bool words, typename S::Type* keys,
                 typename S::Type* values) {
  using T = typename S::Type;
  constexpr int kPieces = S::D / 8;
  const uint64_t wanted = wanted_keys(a, it, tiles, tile);
  for (int n = threadIdx.x; n < S::kKeys * kPieces; n += S::kThreads) {
    const int row = n / kPieces, d = n % kPieces * 8;
    const Source<T> from = wanted >> row & 1 ? source<T>(a, it, tiles, tile, row) : Source<T>{nullptr, nullptr};
    T *const k = keys + row * S::kPitch + d, *const v = values + row * S::kPitch + d;
    if (words) {
      rt::cp16(k, from.k ? from.k + d : static_cast<const T*>(a.k), from.k ? 16 : 0);
      rt::cp16(v, from.k ? from.v + d : static_cast<const T*>(a.v), from.k ? 16 : 0);
    } else {
      for (int i = 0; i < 8; ++i) {
        k[i] = from.k ? from.k[d + i] : from_float<T>(0.f);
        v[i] = from.k ? from.v[d + i] : from_float<T>(0.f);
      }
    }
  }
}

template <class T>
RT_FN uint32_t pair_of(T low, T high) {
  uint16_t x[2];
  memcpy(&x[0], &low, 2), memcpy(&x[1], &high, 2);
  return uint32_t(x[1]) << 16 | x[0];
}

// A warp's 16 rows: running reference and sum of two of them (g and g + 8), and their outputs.
template <class S>
struct Rows {
  float m[2], l[2];
  float o[S::D / 8][4];
  uint32_t q[S::kHoldQ ? S::D / 16 : 1][4];
};

template <class S>
RT_FN void load_queries(const AttentionArgs& a, const Item& it, Rows<S>& rows, typename S::Type* staged) {
  using T = typename S::Type;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  if constexpr (S::kHoldQ) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = int(threadIdx.x / 32) * 16 + g + 8 * half;
      const T* const q = r < it.rows ? query<T>(a, it, r) : nullptr;
#pragma unroll
      for (int step = 0; step < S::D / 16; ++step)
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          const int d = step * 16 + side * 8 + 2 * t;
          rows.q[step][2 * side + half] = q ? pair_of(q[d], q[d + 1]) : 0u;
        }
    }
  } else {
    for (int n = threadIdx.x; n < kRowBlock * S::D; n += S::kThreads) {
      const int r = n / S::D, d = n % S::D;
      staged[r * S::kPitch + d] = r < it.rows ? query<T>(a, it, r)[d] : from_float<T>(0.f);
    }
  }
}

// Scores of the warp's rows against a tile, in log2 units.
template <class S, int Keys>
RT_FN void scores(const Rows<S>& rows, const typename S::Type* staged, const typename S::Type* keys, float scale, float (&s)[Keys / 8][4]) {
  const int lane = threadIdx.x % 32, i = lane / 8, j = lane % 8;
#pragma unroll
  for (int n = 0; n < Keys / 8; ++n) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0;
#pragma unroll
  for (int step = 0; step < S::D / 16; ++step) {
    uint32_t q[4];
    if constexpr (S::kHoldQ) {
#pragma unroll
      for (int r = 0; r < 4; ++r) q[r] = rows.q[step][r];
    } else {
      rt::ldmatrix_x4(q, staged + (int(threadIdx.x / 32) * 16 + (i & 1) * 8 + j) * S::kPitch + step * 16 + (i >> 1) * 8);
    }
#pragma unroll
    for (int n = 0; n < Keys / 16; ++n) {
      uint32_t k[4];
      rt::ldmatrix_x4(k, keys + (n * 16 + (i >> 1) * 8 + j) * S::kPitch + step * 16 + (i & 1) * 8);
      const uint32_t first[2] = {k[0], k[1]}, second[2] = {k[2], k[3]};
      rt::mma<typename S::Type>(s[2 * n], q, first);
      rt::mma<typename S::Type>(s[2 * n + 1], q, second);
    }
  }
#pragma unroll
  for (int n = 0; n < Keys / 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) s[n][e] = __fmul_rn(s[n][e], scale);  // rounded before anything is taken off it, wherever this is inlined
}

// Scores become weights, rounded as the product with the values needs them; moves the rows' references where it has to. The largest
// weight is at least a half, so a sum is 0 exactly when its row saw no key; a score that is NaN or infinite makes it NaN for good.
template <class S, int Keys>
RT_FN void softmax(Rows<S>& rows, const uint64_t (&seen)[2], float (&s)[Keys / 8][4]) {
  using T = typename S::Type;
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint64_t own = seen[half] >> (2 * t);
    float top = kNothing;
#pragma unroll
    for (int n = 0; n < Keys / 8; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (own >> (8 * n + e) & 1) top = fmaxf(top, s[n][2 * half + e]);
      }
    top = fmaxf(top, __shfl_xor_sync(rt::kAll, top, 1));
    top = fmaxf(top, __shfl_xor_sync(rt::kAll, top, 2));
    const float next = floorf(top) + 1;  // nothing + 1 is nothing
    if (next > rows.m[half]) {
      const float shrink = power2(rows.m[half] - next);
      rows.m[half] = next, rows.l[half] *= shrink;
#pragma unroll
      for (int n = 0; n < S::D / 8; ++n) rows.o[n][2 * half] *= shrink, rows.o[n][2 * half + 1] *= shrink;
    }
    float sum = 0;
#pragma unroll
    for (int n = 0; n < Keys / 8; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = s[n][2 * half + e];
        const float whole = floorf(x);
        const float weight = own >> (8 * n + e) & 1 ? exp2f(x - whole) * power2(whole - rows.m[half]) : 0.f;
        x = to_float(from_float<T>(weight));
        sum += x;
      }
    rows.l[half] += sum;
  }
}

template <class S, int Keys>
RT_FN void add_values(Rows<S>& rows, const float (&s)[Keys / 8][4], const typename S::Type* values) {
  using T = typename S::Type;
  const int lane = threadIdx.x % 32, i = lane / 8, j = lane % 8;
#pragma unroll
  for (int step = 0; step < Keys / 16; ++step) {
    uint32_t p[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const float* const pair = &s[2 * step + (r >> 1)][2 * (r & 1)];
      p[r] = pair_of(from_float<T>(pair[0]), from_float<T>(pair[1]));
    }
#pragma unroll
    for (int n = 0; n < S::D / 16; ++n) {
      uint32_t v[4];
      rt::ldmatrix_x4_trans(v, values + (step * 16 + (i & 1) * 8 + j) * S::kPitch + n * 16 + (i >> 1) * 8);
      const uint32_t first[2] = {v[0], v[1]}, second[2] = {v[2], v[3]};
      rt::mma<T>(rows.o[2 * n], p, first);
      rt::mma<T>(rows.o[2 * n + 1], p, second);
    }
  }
}

// The item's result: the output itself where its chunk is the only one, else a part for join_kernel.
template <class S>
RT_FN void finish(const AttentionArgs& a, const Item& it, Rows<S>& rows) {
  using T = typename S::Type;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float l = rows.l[half];
    l += __shfl_xor_sync(rt::kAll, l, 1);
    l += __shfl_xor_sync(rt::kAll, l, 2);
    const int r = int(threadIdx.x / 32) * 16 + g + 8 * half;
    if (r >= it.rows) continue;
    const bool seen = l != 0;
    if (it.chunks == 1) {
      T* const out = output<T>(a, it, r);
      const float share = seen ? 1.f / l : 0.f;
#pragma unroll
      for (int n = 0; n < S::D / 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) out[8 * n + 2 * t + e] = from_float<T>(seen ? rows.o[n][2 * half + e] * share : 0.f);
      if (t == 0) *lse_at(a, it, r) = seen ? (rows.m[half] + log2f(l)) * kLn2 : -INFINITY;
    } else {
      float* const part = part_at(a, it, it.chunk) + r * (S::D + 2);
#pragma unroll
      for (int n = 0; n < S::D / 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) part[8 * n + 2 * t + e] = rows.o[n][2 * half + e];
      if (t == 0) part[S::D] = rows.m[half], part[S::D + 1] = l;
    }
  }
}

// Starts a kernel on a grid of at most two blocks a processor, then joins the parts.
template <class S>
int start_shape(void (*kernel)(AttentionArgs), const AttentionArgs& a, cudaStream_t stream) {
  if (const int error = rt::allow_shared(kernel, S::kBytes)) return error;
  int device = 0, processors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  const int64_t most = a.B * a.Hkv * row_blocks_of(a) * chunks_of(a), blocks = most < 2 * processors ? most : 2 * processors;
  RT_LAUNCH(kernel, dim3(unsigned(blocks)), dim3(S::kThreads), S::kBytes, stream, a);
  return join_attention(a, stream);
}

// Starts Kernel::of<S>, S the shape of this type and head size.
template <class Kernel, class T>
int start_type(const AttentionArgs& a, cudaStream_t stream) {
  if (a.D == 64) return start_shape<Shape<T, 64>>(Kernel::template of<Shape<T, 64>>, a, stream);
  if (a.D == 96) return start_shape<Shape<T, 96>>(Kernel::template of<Shape<T, 96>>, a, stream);
  if (a.D == 128) return start_shape<Shape<T, 128>>(Kernel::template of<Shape<T, 128>>, a, stream);
  if (a.D == 256) return start_shape<Shape<T, 256>>(Kernel::template of<Shape<T, 256>>, a, stream);
  return cudaErrorInvalidValue;
}

template <class Kernel>
int start_mma(const AttentionArgs& a, cudaStream_t stream) {
  if (a.type == kBf16) return start_type<Kernel, bf16>(a, stream);
  if (a.type == kF16) return start_type<Kernel, f16>(a, stream);
  return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace ramify::gpu
