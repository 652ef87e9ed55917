// csrc/cuda/verify.cu: row statistics, the k largest, weights to draw by, and the greedy walk. Meaning: reference/verify.py.
// Status: compiled and emulated, not yet run on hardware.
//
// What     arg-max, log-sum-exp, maximum, the k largest and the weights of the tiles of each row of logits in one pass; the path that
//          arg-maxes accept.
// Shape    row_stats: a block a (slice of 4096 columns, row), 16 values a thread in registers; the last block of a row joins its
//          slices in column order. verify_greedy: a warp a sequence.
// Largest  a value and its column are one 64-bit key, unequal for all columns, so order and ties are those of integers. The k-th
//          largest of the threads' maxima bounds the k largest of the slice: k threads alone hold anything above it.
// Bits     slices and orders depend on V alone: a row has the same bits alone and among others.
// Traffic  V * sizeof(logits) bytes a row in; 8 (1 + k) bytes a slice out and in; with weights also V exponentials in
//          double, and 32 bytes a slice out.
#include "cuda/entries.h"
#include "cuda/values.cuh"

namespace ramify::gpu {
namespace {

constexpr int kThreads = 256, kPart = kThreads * kChunk, kParts = kStatsSlice / kPart;
constexpr int kHeld = kParts * kChunk;  // values a thread holds
constexpr int kLists = 8;               // slices a lane joins: V up to 32 * 8 * 4096
static_assert(kPart == kSampleTile, "a part's weights are one sum");

// Takes the largest key of a warp's N * 32 out of them.
template <int N>
RT_FN Key take_best(Key (&keys)[N]) {
  Key own = keys[0];
#pragma unroll
  for (int i = 1; i < N; ++i) own = max(own, keys[i]);
  const Key best = warp_best(own);
#pragma unroll
  for (int i = 0; i < N; ++i) keys[i] = keys[i] == best ? 0 : keys[i];
  return best;
}

// The `k` largest of `count` keys in shared memory, descending, to `out` where it is given; returns the last of them. One warp.
template <int N>
RT_FN Key select(const Key* keys, int count, int k, Key* out) {
  const int lane = threadIdx.x % 32;
  Key held[N], last = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) held[i] = lane + 32 * i < count ? keys[lane + 32 * i] : 0;
  for (int n = 0; n < k; ++n) {
    last = take_best(held);
    if (out && lane == 0) out[n] = last;
  }
  return last;
}

// Joins a row's slices in column order. One warp.
template <class T>
RT_FN void join_slices(const RowStatsArgs& a, int64_t row, const Key* slices, int count, int kept) {
  const int lane = threadIdx.x % 32;
  Key best = 0;
  for (int s = lane; s < count; s += 32) best = max(best, slices[s * (kept + 1) + 1]);
  best = warp_best(best);
  const float top = value_of(best);
  float sum = 0;
  for (int s = lane; s < count; s += 32) {
    const float here = value_of(slices[s * (kept + 1) + 1]);
    sum += __uint_as_float(unsigned(slices[s * (kept + 1)])) * (here == top ? 1.f : expf(here - top));
  }
  sum = warp_sum(sum);
  if (lane == 0) {
    if (a.argmax) a.argmax[row] = column_of(best);
    if (a.top) a.top[row] = top;
    if (a.lse) a.lse[row] = top + logf(sum);
  }
  int cursor[kLists] = {};
  for (int n = 0; n < int(a.topk); ++n) {
    Key own = 0;
#pragma unroll
    for (int i = 0; i < kLists; ++i) {
      const int s = lane + 32 * i;
      if (s < count && cursor[i] < kept) own = max(own, slices[s * (kept + 1) + 1 + cursor[i]]);
    }
    best = warp_best(own);
#pragma unroll
    for (int i = 0; i < kLists; ++i) {
      const int s = lane + 32 * i;
      if (best && s < count && cursor[i] < kept && slices[s * (kept + 1) + 1 + cursor[i]] == best) ++cursor[i];
    }
    if (lane == 0) {
      const bool found = best && value_of(best) != -INFINITY;
      a.ids[row * a.topk + n] = found ? column_of(best) : -1;
      static_cast<T*>(a.values)[row * a.topk + n] = from_float<T>(found ? value_of(best) : -INFINITY);
    }
  }
}

// A slice's weights at the sequence's temperature, tile by tile, over its largest logit.
RT_FN void weigh(const RowStatsArgs& a, int64_t row, float heat, float top, const float (&v)[kHeld], double* part) {
  const double tempered = double(top / heat), base = top == -INFINITY ? 0.0 : tempered;
  const int64_t tiles = (a.V + kPart - 1) / kPart;
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
    double sum = 0;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) sum += exp(double(v[p * kChunk + i] / heat) - base);
    sum = block_sum(sum, part);
    const int64_t tile = int64_t(blockIdx.y) * kParts + p;
    if (threadIdx.x == 0 && tile < tiles) {
      double* const to = a.weights + 2 * (row * tiles + tile);
      to[0] = tempered, to[1] = sum;
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 3) row_stats_kernel(const RowStatsArgs a) {
  RT_SHARED(Key, maxima, [kThreads]);
  RT_SHARED(Key, listed, [kMaxTopK * kHeld]);
  RT_SHARED(Key, bound, [1]);
  RT_SHARED(float, part, [kThreads / 32]);
  RT_SHARED(double, wide_part, [kThreads / 32]);
  RT_SHARED(int, shared_count, [1]);
  RT_SHARED(int, last, [1]);
  const unsigned rows = unsigned(a.T);
  const int64_t row = blockIdx.x, b = blockIdx.x / rows, t = blockIdx.x % rows;
  if (a.n_rows && t >= a.n_rows[b]) return;
  const int thread = threadIdx.x, warp = thread / 32, k = int(a.topk), kept = k > 1 ? k : 1;
  const T* const x = static_cast<const T*>(a.logits) + b * a.stride_b + t * a.stride_t;
  const bool words = wide(x, 0);
  const int64_t first = int64_t(blockIdx.y) * kStatsSlice;
  float v[kHeld];
  Key own = 0;
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
    const int64_t at = first + p * kPart + thread * kChunk;
    float chunk[kChunk];
    load_chunk(x + at, a.V - at, words, -INFINITY, chunk);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      v[p * kChunk + i] = chunk[i];
      if (at + i < a.V) own = max(own, key_of(chunk[i], at + i));
    }
  }
  maxima[thread] = own;
  if (thread == 0) shared_count[0] = 0;
  __syncthreads();
  Key* const slice = static_cast<Key*>(a.scratch) + (row * gridDim.y + blockIdx.y) * (kept + 1);
  if (warp == 0) {  // every warp needs the first, one place needs the k-th of the maxima
    const Key best = select<kThreads / 32>(maxima, kThreads, 1, nullptr);
    const Key kth = k > 1 ? select<kThreads / 32>(maxima, kThreads, k, nullptr) : best;
    if (thread == 0) listed[0] = best, bound[0] = kth;
  }
  __syncthreads();
  const Key best = listed[0], kth = bound[0];
  const float top = value_of(best), base = top == -INFINITY ? 0.f : top;
  float sum = 0;  // infinity less itself is NaN, so what equals the base counts 1
#pragma unroll
  for (int i = 0; i < kHeld; ++i) sum += v[i] == base ? 1.f : expf(v[i] - base);
  sum = block_sum(sum, part);  // its barrier also ends the reading of listed[0]
  const float heat = a.weights ? a.temperature[b] : 0.f;
  if (heat > 0) weigh(a, row, heat, top, v, wide_part);
  if (k > 1) {
    if (own >= kth && own) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const int64_t column = first + (i / kChunk) * kPart + thread * kChunk + i % kChunk;
        const Key key = key_of(v[i], column);
        if (column < a.V && key >= kth) listed[atomicAdd(shared_count, 1)] = key;
      }
    }
    __syncthreads();
    if (warp == 0) select<kMaxTopK * kHeld / 32>(listed, shared_count[0], k, slice + 1);
  } else if (thread == 0) {
    slice[1] = best;
  }
  __syncthreads();
  if (thread == 0) {
    slice[0] = __float_as_uint(sum);
    __threadfence();
    last[0] = atomicAdd(a.tickets + row, 1u) == gridDim.y - 1;
    __threadfence();
    if (last[0]) atomicExch(a.tickets + row, 0u);
  }
  __syncthreads();
  if (last[0] && warp == 0) join_slices<T>(a, row, static_cast<const Key*>(a.scratch) + row * gridDim.y * (kept + 1), int(gridDim.y), kept);
}

__global__ void __launch_bounds__(32) verify_greedy_kernel(const VerifyGreedyArgs a) {
  const int64_t b = blockIdx.x;
  const int lane = threadIdx.x;
  const int32_t *const tokens = a.tokens + b * a.T, *const parents = a.parents + b * a.T, *const argmax = a.argmax + b * a.T;
  int32_t* const path = a.path + b * a.T;
  const int T = int(a.T), n = min(max(a.n_rows[b], 1), T);
  int row = 0, steps = 0, token = 0;
  while (row >= 0) {
    token = argmax[row];
    if (lane == 0) path[steps] = row;
    ++steps;
    int child = -1;
    for (int first = (row + 1) / 32 * 32; child < 0 && first < n; first += 32) {
      const int r = first + lane;
      const unsigned found = __ballot_sync(rt::kAll, r > row && r < n && parents[r] == row && tokens[r] == token);
      if (found) child = first + __ffs(int(found)) - 1;
    }
    row = child;
  }
  for (int i = steps + lane; i < T; i += 32) path[i] = -1;
  if (lane == 0) a.count[b] = steps, a.bonus[b] = token;
}

}  // namespace

int row_stats(const RowStatsArgs& a, void* stream) {
  const int64_t rows = a.B * a.T, slices = (a.V + kStatsSlice - 1) / kStatsSlice;
  if (rows == 0) return cudaSuccess;
  if (a.topk > kMaxTopK || slices > 32 * kLists || slices < 1) return cudaErrorInvalidValue;
  return with_type(a.type, [&](auto* type) {
    auto* const kernel = row_stats_kernel<std::remove_pointer_t<decltype(type)>>;
    RT_LAUNCH(kernel, dim3(unsigned(rows), unsigned(slices)), dim3(kThreads), 0, cudaStream_t(stream), a);
    return cudaGetLastError();
  });
}

int verify_greedy(const VerifyGreedyArgs& a, void* stream) {
  if (a.B == 0) return cudaSuccess;
  RT_LAUNCH(verify_greedy_kernel, dim3(unsigned(a.B)), dim3(32), 0, cudaStream_t(stream), a);
  return cudaGetLastError();
}

}  // namespace ramify::gpu
