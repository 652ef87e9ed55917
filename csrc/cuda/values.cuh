// csrc/cuda/values.cuh: eight values at a time between memory and f32 registers, and sums over a warp or a block.
//
// A chunk is always eight values, whether it is moved in 16-byte words or one by one, so alignment never changes which thread
// holds which value: the order of additions depends on a row's width alone.
#pragma once
#include "common/args_cuda.h"
#include "cuda/rt.cuh"

namespace ramify::gpu {
namespace {

constexpr int kChunk = 8;

RT_FN float to_float(float x) { return x; }
RT_FN float to_float(bf16 x) { return __bfloat162float(x); }
RT_FN float to_float(f16 x) { return __half2float(x); }
template <class T>
RT_FN T from_float(float x);
template <>
RT_FN float from_float<float>(float x) {
  return x;
}
template <>
RT_FN bf16 from_float<bf16>(float x) {
  return __float2bfloat16(x);
}
template <>
RT_FN f16 from_float<f16>(float x) {
  return __float2half(x);
}

RT_FN float not_a_number() { return __int_as_float(0x7FFFFFFF); }

// Whether every chunk of rows at this stride can be moved in 16-byte words.
template <class T>
RT_FN bool wide(const T* p, int64_t stride) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride * int64_t(sizeof(T)) % 16 == 0;
}

template <class T>
struct alignas(16) Words {
  T value[16 / sizeof(T)];
};

// The chunk at p, of which `left` values exist; the others become `fill`.
template <class T>
RT_FN void load_chunk(const T* p, int64_t left, bool in_words, float fill, float (&x)[kChunk]) {
  constexpr int kWord = 16 / sizeof(T);
  if (in_words && left >= kChunk) {
#pragma unroll
    for (int w = 0; w < kChunk / kWord; ++w) {
      const Words<T> word = reinterpret_cast<const Words<T>*>(p)[w];
#pragma unroll
      for (int i = 0; i < kWord; ++i) x[w * kWord + i] = to_float(word.value[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) x[i] = i < left ? to_float(p[i]) : fill;
  }
}

template <class T>
RT_FN void store_chunk(T* p, int64_t left, bool in_words, const float (&x)[kChunk]) {
  constexpr int kWord = 16 / sizeof(T);
  if (in_words && left >= kChunk) {
#pragma unroll
    for (int w = 0; w < kChunk / kWord; ++w) {
      Words<T> word;
#pragma unroll
      for (int i = 0; i < kWord; ++i) word.value[i] = from_float<T>(x[w * kWord + i]);
      reinterpret_cast<Words<T>*>(p)[w] = word;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      if (i < left) p[i] = from_float<T>(x[i]);
  }
}

// One value of an array whose type is known at run time only: weights and tables, the same for a whole launch.
RT_FN float value_at(const void* p, int64_t type, int64_t i) {
  return type == kF32    ? static_cast<const float*>(p)[i]
         : type == kBf16 ? to_float(static_cast<const bf16*>(p)[i])
                         : to_float(static_cast<const f16*>(p)[i]);
}

// Sums in one fixed order; every lane, or thread, gets the result.
template <class T>
RT_FN T warp_sum(T x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(rt::kAll, x, step);
  return x;
}

RT_FN float warp_max(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(rt::kAll, x, step));
  return x;
}

// `part` is shared, one place a warp, and free again when the call returns.
template <class T>
RT_FN T block_sum(T x, T* part) {
  const int warps = blockDim.x / 32;
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
  __syncthreads();
  T sum = part[0];
  for (int w = 1; w < warps; ++w) sum += part[w];
  __syncthreads();
  return sum;
}

// A value and its column as one integer, unequal for all columns: the larger value first, NaN above all, then the lower column. 0 is
// nothing.
using Key = unsigned long long;

RT_FN Key key_of(float x, int64_t column) {
  const uint32_t bits = x == x ? __float_as_uint(x + 0.f) : 0x7FFFFFFFu;  // -0 becomes 0: they are equal, and so are all NaN
  const uint32_t ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
  return Key(ordered) << 32 | (0xFFFFFFFFu - uint32_t(column));
}
RT_FN float value_of(Key key) {
  const uint32_t ordered = uint32_t(key >> 32);
  return __uint_as_float(ordered >> 31 ? ordered & 0x7FFFFFFFu : ~ordered);
}
RT_FN int32_t column_of(Key key) { return int32_t(0xFFFFFFFFu - uint32_t(key)); }

// The largest key of a warp; every lane gets it.
RT_FN Key warp_best(Key key) {
  const unsigned high = __reduce_max_sync(rt::kAll, unsigned(key >> 32));
  const unsigned low = __reduce_max_sync(rt::kAll, unsigned(key >> 32) == high ? unsigned(key) : 0u);
  return Key(high) << 32 | low;
}

// The largest key of a block; `part` as for block_sum.
RT_FN Key block_best(Key key, Key* part) {
  key = warp_best(key);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = key;
  __syncthreads();
  Key best = part[0];
  for (int w = 1; w < int(blockDim.x / 32); ++w) best = max(best, part[w]);
  __syncthreads();
  return best;
}

// The rows that count in this step.
RT_FN int64_t live_rows(const int32_t* live, int64_t rows) { return live && *live < rows ? *live : rows; }

// `call` gets a null pointer of the C++ type that `type` names.
template <class Call>
int with_type(int64_t type, Call call) {
  if (type == kF32) return call(static_cast<float*>(nullptr));
  if (type == kBf16) return call(static_cast<bf16*>(nullptr));
  if (type == kF16) return call(static_cast<f16*>(nullptr));
  return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace ramify::gpu
