// csrc/cuda/attention.cu: tree and interval attention for sm_80 and newer (mma.sync). Meaning: reference/attention.py.
// Status: compiled and emulated, not yet run on hardware.
//
// What     o[B, T, Hq, D] and lse over the committed slots, unmasked but for the window, and a tail of at most 256 rows masked by
//          ancestor words; or over the slots between each row's start and end, with any number of rows and no tail. bf16 and f16,
//          head sizes 64, 96, 128 and 256, contiguous or paged.
// Tiling   an item is (sequence, KV head, 64 packed rows of T * Hq/Hkv, chunk of slots). 16 rows a warp, Q in registers (D 256: in
//          shared memory); K and V arrive in tiles of kKeys through a ring of two stages. Warps without rows only copy.
// Schedule a fixed grid; blocks take items by their number, which they work out from the lengths on the device. No host plan. Slots
//          before the first start and behind the last end of an item's rows are not read; intervals are not split over keys.
// Bits     chunks end at multiples of `chunk` slots, never by T, B or load; weights are 2^(s - m) with an integral m, so rescaling
//          is exact; parts are joined in chunk order, without atomics: the same bits for any grid (row_invariance).
//          Not yet row-invariant: the tail's keys are summed in tiles of their own, not at their positions.
// Traffic  4 D bytes a slot and KV head, paid once for 64 rows; 4 (D + 2) bytes out and in a packed row and chunk where there are
//          several. Two stages are at most 70 KiB: three blocks an SM at D 64 and 96, two at 128 and 256 (one below sm_90).
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
template <class S>
RT_FN void scores(const Rows<S>& rows, const typename S::Type* staged, const typename S::Type* keys, float scale,
                  float (&s)[S::kKeys / 8][4]) {
  const int lane = threadIdx.x % 32, i = lane / 8, j = lane % 8;
#pragma unroll
  for (int n = 0; n < S::kKeys / 8; ++n) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0;
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
    for (int n = 0; n < S::kKeys / 16; ++n) {
      uint32_t k[4];
      rt::ldmatrix_x4(k, keys + (n * 16 + (i >> 1) * 8 + j) * S::kPitch + step * 16 + (i & 1) * 8);
      const uint32_t first[2] = {k[0], k[1]}, second[2] = {k[2], k[3]};
      rt::mma<typename S::Type>(s[2 * n], q, first);
      rt::mma<typename S::Type>(s[2 * n + 1], q, second);
    }
  }
#pragma unroll
  for (int n = 0; n < S::kKeys / 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) s[n][e] *= scale;
}

// Scores become weights, rounded as the product with the values needs them; moves the rows' references where it has to. The largest
// weight is at least a half, so a sum is 0 exactly when its row saw no key; a score that is NaN or infinite makes it NaN for good.
template <class S>
RT_FN void softmax(Rows<S>& rows, const uint64_t (&seen)[2], float (&s)[S::kKeys / 8][4]) {
  using T = typename S::Type;
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint64_t own = seen[half] >> (2 * t);
    float top = kNothing;
#pragma unroll
    for (int n = 0; n < S::kKeys / 8; ++n)
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
    for (int n = 0; n < S::kKeys / 8; ++n)
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

template <class S>
RT_FN void add_values(Rows<S>& rows, const float (&s)[S::kKeys / 8][4], const typename S::Type* values) {
  using T = typename S::Type;
  const int lane = threadIdx.x % 32, i = lane / 8, j = lane % 8;
#pragma unroll
  for (int step = 0; step < S::kKeys / 16; ++step) {
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
        scores<S>(rows, staged, keys(stage), float(a.scale) * kLog2e, s);
        softmax<S>(rows, seen, s);
        add_values<S>(rows, s, keys(stage) + S::kKeys * S::kPitch);
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

template <class S>
int start(const AttentionArgs& a, cudaStream_t stream) {
  auto* const kernel = attention_kernel<S>;
  if (const int error = rt::allow_shared(kernel, S::kBytes)) return error;
  int device = 0, processors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  const int64_t most = a.B * a.Hkv * row_blocks_of(a) * chunks_of(a), blocks = most < 2 * processors ? most : 2 * processors;
  RT_LAUNCH(kernel, dim3(unsigned(blocks)), dim3(S::kThreads), S::kBytes, stream, a);
  return join_attention(a, stream);
}

template <class T>
int start_of_type(const AttentionArgs& a, cudaStream_t stream) {
  if (a.D == 64) return start<Shape<T, 64>>(a, stream);
  if (a.D == 96) return start<Shape<T, 96>>(a, stream);
  if (a.D == 128) return start<Shape<T, 128>>(a, stream);
  if (a.D == 256) return start<Shape<T, 256>>(a, stream);
  return cudaErrorInvalidValue;
}

}  // namespace

int join_attention(const AttentionArgs& a, void* stream) {
  if (chunks_of(a) > 1) {
    auto* const join = a.type == kBf16 ? join_kernel<bf16> : join_kernel<f16>;
    const dim3 grid(unsigned(a.T * (a.Hq / a.Hkv)), unsigned(a.Hkv), unsigned(a.B));
    RT_LAUNCH(join, grid, dim3(unsigned(a.D)), 0, cudaStream_t(stream), a);
  }
  return cudaGetLastError();
}

int attention(const AttentionArgs& a, void* stream) {
  if (a.B == 0 || a.T == 0) return cudaSuccess;
  if (a.chunk < 64 || a.chunk % 64 || a.T * (a.Hq / a.Hkv) > INT32_MAX - kRowBlock) return cudaErrorInvalidValue;
  if (a.start ? chunks_of(a) > 1 || a.window > 0 : a.T > kMaxRows) return cudaErrorInvalidValue;
  if (attention_variant(a) != kMma) return attention_wgmma(a, stream);
  if (a.type == kBf16) return start_of_type<bf16>(a, cudaStream_t(stream));
  if (a.type == kF16) return start_of_type<f16>(a, cudaStream_t(stream));
  return cudaErrorInvalidValue;
}

}  // namespace ramify::gpu
