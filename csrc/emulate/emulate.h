// csrc/emulate/emulate.h: what a CUDA source sees when g++ compiles it. csrc/cuda/rt.cuh includes this file, kernels include that.
//
// Types and conversions come from the toolkit's own headers (cuda_fp16.h, cuda_bf16.h), which have host versions. Everything
// that needs more than one thread is a call into the emulator and carries its file and line, so that a message can name them.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <functional>
#include <tuple>

#undef __launch_bounds__
#define __launch_bounds__(...)

namespace emulate {

struct Thread {
  uint3 thread, block;
  dim3 block_size, grid_size;
};
extern Thread* current;

struct Site {
  const char* file;
  int line;
};
#define EMULATE_SITE ::emulate::Site site = {__builtin_FILE(), __builtin_LINE()}

// Warp-wide steps. Every lane of `mask` leaves `bytes` in its slot; the last one to arrive runs `finish` over all of them; then
// every lane reads the slot of lane `from` (its own when negative). Only a step that fences orders memory.
enum Step : int { kSyncWarp, kShuffle, kBallot, kReduce, kMma, kLoadMatrix, kWgmma, kSetRegisters };
constexpr int kSlotBytes = 64;
struct alignas(16) Slot {
  unsigned char bytes[kSlotBytes];
};
using Finish = void (*)(unsigned mask, Slot* slots);
void warp_step(unsigned mask, Step step, void* io, size_t bytes, Finish finish, int from, bool fence, Site site);
int lane();

void barrier(Site site);
void fence();
void before_atomic(void* address);
void after_atomic(void* address);
void pause(Site site);

void* shared(const void* key, size_t bytes);
void* dynamic();

void copy_async(void* to, const void* from, int bytes, int filled, Site site);
void copy_commit();
void copy_wait(int groups_left);

void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool half, Site site);
void load_matrix(uint32_t* r, int count, const void* row, bool transposed, Site site);
uint32_t reduce(unsigned mask, uint32_t value, int operation, Site site);  // 0 max, 1 min, 2 add, 3 or, 4 signed max

struct Launch {
  const char* name;
  const void* kernel;
  dim3 grid, block;
  size_t dynamic_bytes;
};
void launch(const Launch& how, const std::function<void()>& body);

// Every thread gets its own copy of the arguments, as on a GPU.
template <class... P, class... A>
void start(void (*kernel)(P...), const char* name, dim3 grid, dim3 block, size_t dynamic_bytes, A... arguments) {
  const std::tuple<P...> all(arguments...);
  launch({name, reinterpret_cast<const void*>(kernel), grid, block, dynamic_bytes}, [&] { std::apply(kernel, all); });
}

}  // namespace emulate

#define threadIdx (::emulate::current->thread)
#define blockIdx (::emulate::current->block)
#define blockDim (::emulate::current->block_size)
#define gridDim (::emulate::current->grid_size)

using std::max;
using std::min;

inline void __syncthreads(EMULATE_SITE) { emulate::barrier(site); }
inline void __syncwarp(unsigned mask = ~0u, EMULATE_SITE) {
  emulate::warp_step(mask, emulate::kSyncWarp, nullptr, 0, nullptr, -1, true, site);
}
inline void __threadfence() { emulate::fence(); }
inline void __nanosleep(unsigned, EMULATE_SITE) { emulate::pause(site); }

namespace emulate {
template <class T>
T shuffle(unsigned mask, T value, int from, Site site) {
  static_assert(sizeof(T) <= kSlotBytes && std::is_trivially_copyable<T>::value, "a shuffle moves plain values");
  warp_step(mask, kShuffle, &value, sizeof(T), nullptr, from, false, site);
  return value;
}
inline int segment(int width) { return lane() & ~(width - 1); }
}  // namespace emulate

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32, EMULATE_SITE) {
  return emulate::shuffle(mask, value, emulate::segment(width) | (from & (width - 1)), site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, EMULATE_SITE) {
  const int from = emulate::lane() ^ bits;
  return emulate::shuffle(mask, value, from < emulate::segment(width) + width ? from : -1, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, EMULATE_SITE) {
  const int from = emulate::lane() - int(by);
  return emulate::shuffle(mask, value, from >= emulate::segment(width) ? from : -1, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, EMULATE_SITE) {
  const int from = emulate::lane() + int(by);
  return emulate::shuffle(mask, value, from < emulate::segment(width) + width ? from : -1, site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATE_SITE) {
  return emulate::reduce(mask, predicate ? 1u << emulate::lane() : 0u, 3, site);
}
inline int __any_sync(unsigned mask, int predicate, EMULATE_SITE) { return __ballot_sync(mask, predicate, site) != 0; }
inline int __all_sync(unsigned mask, int predicate, EMULATE_SITE) { return __ballot_sync(mask, predicate, site) == mask; }
inline unsigned __reduce_max_sync(unsigned mask, unsigned value, EMULATE_SITE) { return emulate::reduce(mask, value, 0, site); }
inline unsigned __reduce_min_sync(unsigned mask, unsigned value, EMULATE_SITE) { return emulate::reduce(mask, value, 1, site); }
inline unsigned __reduce_add_sync(unsigned mask, unsigned value, EMULATE_SITE) { return emulate::reduce(mask, value, 2, site); }
inline unsigned __reduce_or_sync(unsigned mask, unsigned value, EMULATE_SITE) { return emulate::reduce(mask, value, 3, site); }
inline int __reduce_max_sync(unsigned mask, int value, EMULATE_SITE) { return int(emulate::reduce(mask, unsigned(value), 4, site)); }

template <class T>
T atomicAdd(T* p, T value) {
  emulate::before_atomic(p);
  T old;
  if constexpr (std::is_integral<T>::value) {
    old = __atomic_fetch_add(p, value, __ATOMIC_RELAXED);
  } else {
    __atomic_load(p, &old, __ATOMIC_RELAXED);
    for (T next = old + value; !__atomic_compare_exchange(p, &old, &next, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);) next = old + value;
  }
  emulate::after_atomic(p);
  return old;
}
template <class T>
T atomicMax(T* p, T value) {
  emulate::before_atomic(p);
  T old = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (old < value && !__atomic_compare_exchange_n(p, &old, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  emulate::after_atomic(p);
  return old;
}
template <class T>
T atomicMin(T* p, T value) {
  emulate::before_atomic(p);
  T old = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (value < old && !__atomic_compare_exchange_n(p, &old, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  emulate::after_atomic(p);
  return old;
}
template <class T>
T atomicExch(T* p, T value) {
  emulate::before_atomic(p);
  const T old = __atomic_exchange_n(p, value, __ATOMIC_RELAXED);
  emulate::after_atomic(p);
  return old;
}
template <class T>
T atomicCAS(T* p, T expected, T value) {
  emulate::before_atomic(p);
  __atomic_compare_exchange_n(p, &expected, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  emulate::after_atomic(p);
  return expected;
}

inline float __uint_as_float(unsigned x) {
  float y;
  return memcpy(&y, &x, 4), y;
}
inline unsigned __float_as_uint(float x) {
  unsigned y;
  return memcpy(&y, &x, 4), y;
}
inline float __int_as_float(int x) { return __uint_as_float(unsigned(x)); }
inline int __float_as_int(float x) { return int(__float_as_uint(x)); }
inline int __ffs(unsigned x) { return __builtin_ffs(int(x)); }
inline int __ffsll(unsigned long long x) { return __builtin_ffsll((long long)(x)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
template <class T>
T __ldg(const T* p) {
  return *p;
}
