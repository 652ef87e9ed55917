// csrc/cuda/colsum.cu: how much attention each slot received (mma.sync). Meaning: reference/attention.py (attention_colsum).
// Status: compiled and emulated, not yet run on hardware.
//
// What     c[b, h, s] = sum over rows, and the query heads of group h, of exp(scale q k - lse), for the committed slots a row sees. bf16
//          and f16, head sizes 64, 96, 128 and 256, contiguous or paged.
// Shape    a block owns 64 slots of a sequence and KV head, a warp 16 of them as the rows of m16n8k16; their keys stay in registers,
//          and the T * Hq/Hkv packed rows pass eight at a time. No shared memory, no atomics.
// Bits     a slot's sum is four chains of rows, joined in one order: a function of T and the group alone.
// Traffic  2 D bytes a slot, once; the rows from L1 and L2. Slots that nobody sees are not read.
#include <string.h>

#include "cuda/entries.h"
#include "cuda/values.cuh"

namespace ramify::gpu {
namespace {

constexpr float kLog2e = 1.44269504f;
constexpr int kThreads = 128, kSlots = 64;

// Eight values of a row as they lie in memory, or zeros where there is no row.
template <class T>
RT_FN void load_words(const T* p, bool words, uint32_t (&x)[4]) {
  if (!p) {
    x[0] = x[1] = x[2] = x[3] = 0;
  } else if (words) {
    const uint4 all = *reinterpret_cast<const uint4*>(p);
    x[0] = all.x, x[1] = all.y, x[2] = all.z, x[3] = all.w;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) memcpy(&x[i], p + 2 * i, 2), memcpy(reinterpret_cast<char*>(&x[i]) + 2, p + 2 * i + 1, 2);
  }
}

RT_FN int depth_of(const ColsumArgs& a, int64_t b, int row) {
  if (!a.ancestors) return row;
  const int64_t* const words = a.ancestors + (b * a.T + row) * a.words;
  int seen = 0;
  for (int w = 0; w <= row / 64; ++w) seen += __popcll(static_cast<unsigned long long>(words[w]));
  return seen - 1;
}

// A dot product may be taken in any order of its features as long as both sides agree: lane t of four takes the 16 bytes at
// 32 step + 8 t, which two instructions use up.
template <class T, int D>
__global__ void __launch_bounds__(kThreads) colsum_kernel(const ColsumArgs a) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, group = int(a.Hq / a.Hkv);
  const int64_t b = blockIdx.z, h = blockIdx.y, first = blockIdx.x * int64_t(kSlots) + threadIdx.x / 32 * 16;
  const int64_t slots = a.page_table ? a.table_width * a.page : a.page, n = min(int64_t(max(a.prefix_len[b], 0)), slots);
  const int rows = (a.tail_rows ? int(min(int64_t(max(a.tail_rows[b], 0)), a.T)) : int(a.T)) * group;
  const bool q_words = wide(static_cast<const T*>(a.q), a.q_stride_b | a.q_stride_t | a.q_stride_h);
  const bool k_words = wide(static_cast<const T*>(a.k), a.k_stride_b | a.k_stride_s | a.k_stride_h);
  uint32_t key[D / 32][2][4];
  bool live[2], any = false;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int64_t slot = first + g + 8 * half, place = b;
    live[half] = slot < n && (a.window == 0 || slot > n - a.window || slot < a.sink);  // no row stands before n
    if (live[half] && a.page_table) {
      place = a.page_table[b * a.table_stride + slot / a.page], slot %= a.page;
      live[half] = place >= 0 && place < a.pages;
    }
    any |= live[half];
    const T* const from = live[half] ? static_cast<const T*>(a.k) + place * a.k_stride_b + slot * a.k_stride_s + h * a.k_stride_h : nullptr;
#pragma unroll
    for (int step = 0; step < D / 32; ++step) load_words<T>(from ? from + 32 * step + 8 * t : nullptr, k_words, key[step][half]);
  }
  float sum[2] = {0.f, 0.f};
  const float scale = float(a.scale) * kLog2e;
  any = __any_sync(rt::kAll, any);
  for (int r = 0; any && r < rows; r += 8) {
    const T* const q = r + g < rows ? static_cast<const T*>(a.q) + b * a.q_stride_b + (r + g) / group * a.q_stride_t +
                                          (h * group + (r + g) % group) * a.q_stride_h
                                    : nullptr;
    float s[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int step = 0; step < D / 32; ++step) {
      uint32_t x[4];
      load_words<T>(q ? q + 32 * step + 8 * t : nullptr, q_words, x);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t slots_of[4] = {key[step][0][2 * i], key[step][1][2 * i], key[step][0][2 * i + 1], key[step][1][2 * i + 1]};
        const uint32_t row_of[2] = {x[2 * i], x[2 * i + 1]};
        rt::mma<T>(s, slots_of, row_of);
      }
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int at = r + 2 * t + e;
      if (at >= rows) continue;
      const int row = at / group;
      const float lse = a.lse[b * a.lse_stride_b + row * a.lse_stride_t + h * group + at % group];
      const int64_t low = a.window > 0 ? n + depth_of(a, b, row) - a.window : -1;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t slot = first + g + 8 * half;
        if (!live[half] || lse == -INFINITY || !(slot > low || slot < a.sink)) continue;
        const float x = s[2 * half + e] * scale - lse * kLog2e;
        sum[half] += exp2f(x) + (x - x);  // what is not finite makes the sum NaN
      }
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    sum[half] += __shfl_xor_sync(rt::kAll, sum[half], 1);
    sum[half] += __shfl_xor_sync(rt::kAll, sum[half], 2);
    const int64_t slot = first + g + 8 * half;
    if (t == 0 && slot < slots) a.out[b * a.out_stride_b + h * a.out_stride_h + slot] = sum[half];
  }
}

template <class T>
int start_of_type(const ColsumArgs& a, cudaStream_t stream) {
  const int64_t slots = a.page_table ? a.table_width * a.page : a.page;
  const dim3 grid(unsigned((slots + kSlots - 1) / kSlots), unsigned(a.Hkv), unsigned(a.B));
  const auto run = [&](auto* kernel) {
    RT_LAUNCH(kernel, grid, dim3(kThreads), 0, stream, a);
    return int(cudaGetLastError());
  };
  if (a.D == 64) return run(colsum_kernel<T, 64>);
  if (a.D == 96) return run(colsum_kernel<T, 96>);
  if (a.D == 128) return run(colsum_kernel<T, 128>);
  if (a.D == 256) return run(colsum_kernel<T, 256>);
  return cudaErrorInvalidValue;
}

}  // namespace

int colsum(const ColsumArgs& a, void* stream) {
  if (a.T > INT32_MAX / (a.Hq / a.Hkv) - 8) return cudaErrorInvalidValue;
  if (a.type == kBf16) return start_of_type<bf16>(a, cudaStream_t(stream));
  if (a.type == kF16) return start_of_type<f16>(a, cudaStream_t(stream));
  return cudaErrorInvalidValue;
}

}  // namespace ramify::gpu
