// csrc/cuda/merge.cu: merge_states: one attention from the attentions over two sets of keys. Meaning: reference/attention.py.
// Status: compiled and emulated, not yet run on hardware.
//
// What     o = (e^lse1 o1 + e^lse2 o2) / (e^lse1 + e^lse2) and lse = log of the sum, over the larger of both. f32, bf16, f16.
// Shape    a warp a row; lanes share its chunks of eight values. A side that saw no key is not read.
// Traffic  3 D sizeof(o) + 12 bytes a row.
#include "cuda/entries.h"
#include "cuda/values.cuh"

namespace ramify::gpu {
namespace {

constexpr int kWarps = 4;

template <class T>
__global__ void __launch_bounds__(kWarps * 32) merge_states_kernel(const MergeStatesArgs a) {
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= a.rows) return;
  const float first = a.lse1[row], second = a.lse2[row];
  const bool nothing = first == -INFINITY && second == -INFINITY;
  const float base = nothing ? 0.f : fmaxf(first, second);
  const float p = expf(first - base), q = expf(second - base), share = nothing ? 0.f : 1.f / (p + q);
  const T *const o1 = static_cast<const T*>(a.o1) + row * a.o1_stride, *const o2 = static_cast<const T*>(a.o2) + row * a.o2_stride;
  T* const out = static_cast<T*>(a.out) + row * a.out_stride;
  for (int64_t d = threadIdx.x % 32 * kChunk; d < a.D; d += 32 * kChunk) {
    float x[kChunk] = {}, y[kChunk] = {};
    if (p != 0) load_chunk(o1 + d, a.D - d, wide(o1, a.o1_stride), 0.f, x);
    if (q != 0) load_chunk(o2 + d, a.D - d, wide(o2, a.o2_stride), 0.f, y);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) x[i] = (p * x[i] + q * y[i]) * share;
    store_chunk(out + d, a.D - d, wide(out, a.out_stride), x);
  }
  if (threadIdx.x % 32 == 0) a.lse[row] = nothing ? -INFINITY : base + logf(p + q);
}

}  // namespace

int merge_states(const MergeStatesArgs& a, void* stream) {
  if (a.rows == 0) return cudaSuccess;
  return with_type(a.type, [&](auto* type) {
    auto* const kernel = merge_states_kernel<std::remove_pointer_t<decltype(type)>>;
    RT_LAUNCH(kernel, dim3(unsigned((a.rows + kWarps - 1) / kWarps)), dim3(kWarps * 32), 0, cudaStream_t(stream), a);
    return cudaGetLastError();
  });
}

}  // namespace ramify::gpu
