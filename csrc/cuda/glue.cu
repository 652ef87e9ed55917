// csrc/cuda/glue.cu: what stands between the products of a transformer layer. Meaning: reference/glue.py.
// Status: compiled and emulated, not yet run on hardware.
//
// What     rms_norm (+ residual), silu_mul, embed, rope, and rope + append: f32, bf16 or f16 rows, arithmetic in f32.
// Shape    a block a row; rope_append a warp a head. Threads depend on a row's width alone, and so do its bits.
// Traffic  every value once in and once out; rms_norm reads its row twice, the second time from L1.
// Outside  an id or a position outside its table makes the row NaN: no read leaves a table, and nothing goes unseen.
#include "cuda/entries.h"
#include "cuda/values.cuh"

namespace ramify::gpu {
namespace {

constexpr int kMostThreads = 256, kMostPairs = 4;  // a lane's pairs of a head: D up to 256

int threads_for(int64_t width) {  // whole warps, at most one chunk a thread
  const int64_t chunks = (width + kChunk - 1) / kChunk, warps = (chunks + 31) / 32;
  return int(warps * 32 < kMostThreads ? warps * 32 : kMostThreads);
}

template <class T>
__global__ void __launch_bounds__(kMostThreads) rms_norm_kernel(const RmsNormArgs a) {
  RT_SHARED(float, part, [kMostThreads / 32]);
  const int64_t row = blockIdx.x;
  if (row >= live_rows(a.live, a.rows)) return;
  const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
  const T* const residual = a.residual ? static_cast<const T*>(a.residual) + row * a.residual_stride : nullptr;
  T* const sum = static_cast<T*>(a.sum) + row * a.sum_stride;
  T* const out = static_cast<T*>(a.out) + row * a.out_stride;
  const bool words =
      wide(x, a.x_stride) && wide(out, a.out_stride) && (!residual || (wide(residual, a.residual_stride) && wide(sum, a.sum_stride)));
  float squares = 0;
  for (int64_t j = threadIdx.x * kChunk; j < a.hidden; j += blockDim.x * kChunk) {
    float v[kChunk];
    load_chunk(x + j, a.hidden - j, words, 0.f, v);
    if (residual) {
      float r[kChunk];
      load_chunk(residual + j, a.hidden - j, words, 0.f, r);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) v[i] = to_float(from_float<T>(v[i] + r[i]));
      store_chunk(sum + j, a.hidden - j, words, v);
    }
#pragma unroll
    for (int i = 0; i < kChunk; ++i) squares = fmaf(v[i], v[i], squares);
  }
  const float scale = 1.f / sqrtf(block_sum(squares, part) / float(a.hidden) + float(a.eps));
  if (residual) x = sum;  // a thread reads back what it has written itself
  for (int64_t j = threadIdx.x * kChunk; j < a.hidden; j += blockDim.x * kChunk) {
    float v[kChunk];
    load_chunk(x + j, a.hidden - j, words, 0.f, v);
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      if (j + i < a.hidden) v[i] = v[i] * scale * value_at(a.weight, a.weight_type, j + i);
    store_chunk(out + j, a.hidden - j, words, v);
  }
}

template <class T>
__global__ void __launch_bounds__(kMostThreads) silu_mul_kernel(const SiluMulArgs a) {
  const int64_t row = blockIdx.x, j = (blockIdx.y * int64_t(blockDim.x) + threadIdx.x) * kChunk;
  if (row >= live_rows(a.live, a.rows) || j >= a.K) return;
  const T *const gate = static_cast<const T*>(a.x) + row * a.x_stride, *const up = gate + a.K;
  T* const out = static_cast<T*>(a.out) + row * a.out_stride;
  const bool words = wide(gate, a.x_stride) && wide(up, a.x_stride) && wide(out, a.out_stride);
  float g[kChunk], u[kChunk];
  load_chunk(gate + j, a.K - j, words, 0.f, g);
  load_chunk(up + j, a.K - j, words, 0.f, u);
#pragma unroll
  for (int i = 0; i < kChunk; ++i) g[i] = g[i] / (1.f + expf(-g[i])) * u[i];
  store_chunk(out + j, a.K - j, words, g);
}

template <class T, class In>
RT_FN void embed_row(const EmbedArgs& a, int64_t row, int64_t id) {
  const In* const from = static_cast<const In*>(a.table) + id * a.table_stride;
  T* const out = static_cast<T*>(a.out) + row * a.out_stride;
  const bool words = wide(from, a.table_stride) && wide(out, a.out_stride);
  for (int64_t j = threadIdx.x * kChunk; j < a.hidden; j += blockDim.x * kChunk) {
    float v[kChunk];
    load_chunk(from + j, a.hidden - j, words, 0.f, v);
    store_chunk(out + j, a.hidden - j, words, v);
  }
}

template <class T>
__global__ void __launch_bounds__(kMostThreads) embed_kernel(const EmbedArgs a) {
  const int64_t row = blockIdx.x;
  if (row >= live_rows(a.live, a.rows)) return;
  const int64_t id = a.ids[row];
  if (id < 0 || id >= a.V) {
    for (int64_t j = threadIdx.x; j < a.hidden; j += blockDim.x)
      static_cast<T*>(a.out)[row * a.out_stride + j] = from_float<T>(not_a_number());
  } else if (a.table_type == kF32) {
    embed_row<T, float>(a, row, id);
  } else if (a.table_type == kBf16) {
    embed_row<T, bf16>(a, row, id);
  } else {
    embed_row<T, f16>(a, row, id);
  }
}

template <class T>
__global__ void __launch_bounds__(kMostThreads) rope_kernel(const RopeArgs a) {
  const int64_t row = blockIdx.x;
  if (row >= live_rows(a.live, a.rows)) return;
  const int64_t at = a.position[row];
  const bool known = at >= 0 && at < a.positions;
  const int64_t each = a.D - a.half;  // pairs of a head, and then what passes unchanged
  for (int64_t i = threadIdx.x; i < a.H * each; i += blockDim.x) {
    const int64_t head = i / each, d = i % each;
    const T* const x = static_cast<const T*>(a.x) + row * a.x_stride_t + head * a.x_stride_h;
    T* const out = static_cast<T*>(a.out) + row * a.out_stride_t + head * a.out_stride_h;
    if (d < a.half) {
      const float c = known ? a.cos[at * a.half + d] : not_a_number(), s = known ? a.sin[at * a.half + d] : not_a_number();
      const float first = to_float(x[d]), second = to_float(x[d + a.half]);
      out[d] = from_float<T>(first * c - second * s);
      out[d + a.half] = from_float<T>(second * c + first * s);
    } else {
      out[d + a.half] = x[d + a.half];
    }
  }
}

template <class T>
RT_FN void put(void* p, int64_t type, int64_t i, T x) {
  if (type == kF32)
    static_cast<float*>(p)[i] = to_float(x);
  else if (type == kBf16)
    static_cast<bf16*>(p)[i] = from_float<bf16>(to_float(x));
  else
    static_cast<f16*>(p)[i] = from_float<f16>(to_float(x));
}

template <class T>
__global__ void __launch_bounds__(128, 8) rope_append_kernel(const RopeAppendArgs a) {
  const int64_t row = blockIdx.x, head = blockIdx.y * int64_t(4) + threadIdx.x / 32;
  if (row >= live_rows(a.live, a.rows) || head >= a.Hq + 2 * a.Hkv) return;
  const int lane = threadIdx.x % 32;
  const T* const x = static_cast<const T*>(a.qkv) + row * a.qkv_stride + head * a.D;
  const int64_t slot = a.slot[row];
  const bool stored = slot >= 0 && slot < a.slots;
  if (head >= a.Hq + a.Hkv) {
    const int64_t to = slot * a.v_stride_s + (head - a.Hq - a.Hkv) * a.v_stride_h;
    for (int64_t d = lane; stored && d < a.D; d += 32) put(a.v, a.cache_type, to + d, x[d]);
    return;
  }
  const bool query = head < a.Hq;
  const void* const norm = query ? a.q_norm : a.k_norm;
  float first[kMostPairs], second[kMostPairs], squares = 0;  // pairs of features; an unpaired rest stands alone
#pragma unroll
  for (int j = 0; j < kMostPairs; ++j) {
    const int64_t d = lane + 32 * j;
    first[j] = d < a.half ? to_float(x[d]) : 0.f;
    second[j] = d + a.half < a.D ? to_float(x[d + a.half]) : 0.f;
    squares = fmaf(first[j], first[j], squares), squares = fmaf(second[j], second[j], squares);
  }
  if (norm) {
    for (int64_t d = lane + 32 * kMostPairs + a.half; d < a.D; d += 32) squares = fmaf(to_float(x[d]), to_float(x[d]), squares);
  }
  const float scale = norm ? 1.f / sqrtf(warp_sum(squares) / float(a.D) + float(a.eps)) : 1.f;
  const int64_t at = a.position[row];
  const bool known = at >= 0 && at < a.positions;
  const int64_t to = query ? row * a.q_stride_t + head * a.q_stride_h : slot * a.k_stride_s + (head - a.Hq) * a.k_stride_h;
  void* const out = query ? a.q : a.k;
  const int64_t type = query ? a.type : a.cache_type;
  if (!query && !stored) return;
#pragma unroll
  for (int j = 0; j < kMostPairs; ++j) {
    const int64_t d = lane + 32 * j, e = d + a.half;
    if (e >= a.D) continue;
    float f = first[j] * scale, g = second[j] * scale;
    if (norm) f *= d < a.half ? value_at(norm, a.norm_type, d) : 1.f, g *= value_at(norm, a.norm_type, e);
    if (d < a.half) {
      const float c = known ? a.cos[at * a.half + d] : not_a_number(), s = known ? a.sin[at * a.half + d] : not_a_number();
      put(out, type, to + d, f * c - g * s);
      put(out, type, to + e, g * c + f * s);
    } else {
      put(out, type, to + e, g);
    }
  }
  for (int64_t e = lane + 32 * kMostPairs + a.half; e < a.D; e += 32)
    put(out, type, to + e, to_float(x[e]) * scale * (norm ? value_at(norm, a.norm_type, e) : 1.f));
}

}  // namespace

int rms_norm(const RmsNormArgs& a, void* stream) {
  return with_type(a.type, [&](auto* type) {
    auto* const kernel = rms_norm_kernel<std::remove_pointer_t<decltype(type)>>;
    RT_LAUNCH(kernel, dim3(unsigned(a.rows)), dim3(threads_for(a.hidden)), 0, cudaStream_t(stream), a);
    return cudaGetLastError();
  });
}

int silu_mul(const SiluMulArgs& a, void* stream) {
  return with_type(a.type, [&](auto* type) {
    auto* const kernel = silu_mul_kernel<std::remove_pointer_t<decltype(type)>>;
    const int threads = threads_for(a.K);
    const dim3 grid(unsigned(a.rows), unsigned((a.K + threads * kChunk - 1) / (threads * kChunk)));
    RT_LAUNCH(kernel, grid, dim3(threads), 0, cudaStream_t(stream), a);
    return cudaGetLastError();
  });
}

int embed(const EmbedArgs& a, void* stream) {
  return with_type(a.type, [&](auto* type) {
    auto* const kernel = embed_kernel<std::remove_pointer_t<decltype(type)>>;
    RT_LAUNCH(kernel, dim3(unsigned(a.rows)), dim3(threads_for(a.hidden)), 0, cudaStream_t(stream), a);
    return cudaGetLastError();
  });
}

int rope(const RopeArgs& a, void* stream) {
  return with_type(a.type, [&](auto* type) {
    auto* const kernel = rope_kernel<std::remove_pointer_t<decltype(type)>>;
    RT_LAUNCH(kernel, dim3(unsigned(a.rows)), dim3(threads_for(a.H * a.D)), 0, cudaStream_t(stream), a);
    return cudaGetLastError();
  });
}

int rope_append(const RopeAppendArgs& a, void* stream) {
  return with_type(a.type, [&](auto* type) {
    auto* const kernel = rope_append_kernel<std::remove_pointer_t<decltype(type)>>;
    const dim3 grid(unsigned(a.rows), unsigned((a.Hq + 2 * a.Hkv + 3) / 4));
    RT_LAUNCH(kernel, grid, dim3(128), 0, cudaStream_t(stream), a);
    return cudaGetLastError();
  });
}

}  // namespace ramify::gpu
