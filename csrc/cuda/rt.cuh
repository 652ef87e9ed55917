// csrc/cuda/rt.cuh: the only header a kernel includes for its device. nvcc sees CUDA, g++ sees the emulator (csrc/emulate).
//
//   RT_SHARED(float, part, [32]);                          a shared array
//   RT_DYN(bf16, tile);                                    dynamic shared memory, as large as the launch says
//   RT_LAUNCH(kernel, grid, block, bytes, stream, args...) a launch; cudaGetLastError() tells what became of it
//   rt::cp16, cp_commit, cp_wait<N>                        cp.async of 16 bytes
//   rt::mma<T>, ldmatrix_x4, ldmatrix_x4_trans             one warp's matrix product, m16n8k16 into f32
//   rt::and_or, rt::fma2<T>                                bits of codes, and two 16-bit numbers of a word at a time
// All asm of this folder is here. Requires sm_80.
#pragma once
#include <stdint.h>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define RT_SHARED(type, name, dims) __shared__ type name dims
#define RT_DYN(type, name)                                     \
  extern __shared__ __align__(128) unsigned char rt_dynamic[]; \
  type* const name = reinterpret_cast<type*>(rt_dynamic)
#define RT_LAUNCH(kernel, grid, block, bytes, stream, ...) (kernel)<<<(grid), (block), (bytes), (stream)>>>(__VA_ARGS__)
#define RT_FN __device__ __forceinline__
#define RT_ANY_FN __host__ __device__ __forceinline__  // the host asks it too

#else
#include "emulate/emulate.h"

#define RT_SHARED(type, name, dims) \
  using name##_type = type dims;    \
  static const char name##_key = 0; \
  name##_type& name = *static_cast<name##_type*>(emulate::shared(&name##_key, sizeof(name##_type)))
#define RT_DYN(type, name) type* const name = static_cast<type*>(emulate::dynamic())
#define RT_LAUNCH(kernel, grid, block, bytes, stream, ...) \
  ((void)(stream), emulate::start((kernel), #kernel, (grid), (block), size_t(bytes), __VA_ARGS__))
#define RT_FN inline
#define RT_ANY_FN inline
#endif

using bf16 = __nv_bfloat16;
using f16 = __half;

namespace rt {

constexpr unsigned kAll = ~0u;

// Lets `kernel` have so much dynamic shared memory; once a kernel and device, before its first launch above 48 KiB.
template <class K>
int allow_shared(K* kernel, int bytes) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

#if defined(__CUDACC__)

// 16 bytes to shared memory; the first `bytes` of them from `from`, the rest zero.
RT_FN void cp16(void* to, const void* from, int bytes = 16) {
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(bytes) : "memory");
}
RT_FN void cp_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for this thread's copies, but for the last N committed groups of them.
template <int N>
RT_FN void cp_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

template <class T>
RT_FN void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
RT_FN void mma<bf16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
RT_FN void mma<f16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// (x & mask) | bits, in one instruction: two immediates keep the compiler from it.
RT_FN uint32_t and_or(uint32_t x, uint32_t mask, uint32_t bits) {
  uint32_t y;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(y) : "r"(x), "r"(mask), "r"(bits));
  return y;
}

// a * b + c, rounded once, of both halves; subnormal numbers count.
template <class T>
RT_FN uint32_t fma2(uint32_t a, uint32_t b, uint32_t c);
template <>
RT_FN uint32_t fma2<bf16>(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t y;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
  return y;
}
template <>
RT_FN uint32_t fma2<f16>(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t y;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
  return y;
}

// Four 8x8 matrices of 16-bit values; lane 8i + j names row j of matrix i in shared memory.
RT_FN void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}
RT_FN void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}

#else

RT_FN void cp16(void* to, const void* from, int bytes = 16, EMULATE_SITE) { emulate::copy_async(to, from, bytes, 16, site); }
RT_FN void cp_commit() { emulate::copy_commit(); }
template <int N>
RT_FN void cp_wait() {
  emulate::copy_wait(N);
}
template <class T>
RT_FN void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], EMULATE_SITE) {
  emulate::mma(c, a, b, std::is_same<T, f16>::value, site);
}
RT_FN uint32_t and_or(uint32_t x, uint32_t mask, uint32_t bits) { return (x & mask) | bits; }
template <class T>
RT_FN uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
  const auto value = [](uint32_t word, int half) {
    const uint16_t bits = uint16_t(word >> (16 * half));
    T x;
    memcpy(static_cast<void*>(&x), &bits, 2);
    return double(float(x));
  };
  uint32_t y = 0;
  for (int half = 0; half < 2; ++half) {
    const T x(float(value(a, half) * value(b, half) + value(c, half)));
    uint16_t bits;
    memcpy(&bits, &x, 2);
    y |= uint32_t(bits) << (16 * half);
  }
  return y;
}
RT_FN void ldmatrix_x4(uint32_t (&r)[4], const void* row, EMULATE_SITE) { emulate::load_matrix(r, 4, row, false, site); }
RT_FN void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, EMULATE_SITE) { emulate::load_matrix(r, 4, row, true, site); }

#endif

}  // namespace rt
