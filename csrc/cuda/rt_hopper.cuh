// csrc/cuda/rt_hopper.cuh: what sm_90a adds to rt.cuh: mbarriers, bulk copies, named barriers, wgmma. All asm of those is here.
//
//   RT_HOPPER                                        1 where this compilation may use wgmma and setmaxnreg: keep a kernel's body in it
//   RT_SHARED(rt::Mbarrier, full, [kStages]);        rt::mbar_init, mbar_arrive, mbar_expect, mbar_wait, mbar_arrive_copies
//   rt::copy_bulk(to, from, bytes, bar)              16 n contiguous bytes to shared memory; they count on the barrier
//   rt::fence_async()                                what this thread stored to shared memory, or saw stored: now visible to wgmma
//   rt::bar_sync(id, n), bar_arrive, bar_or          a barrier of n threads, id 1 to 15
//   rt::registers_up<N>(), registers_down<N>()       setmaxnreg, in all four warps of a warpgroup
//   rt::tile_memory(p)                               the first place at or behind p where a swizzled tile may begin
//   rt::descriptor(p, leading, stride)               a tile for wgmma; rt::swizzled(byte) is where its bytes lie
//   rt::wgmma<T, TransA, TransB>(d, a, b, add)       D[64, N] (+)= A[64, 16] B[16, N]; d[N / 2] picks N; a is a descriptor
//   rt::wgmma_registers<T, TransB>(d, a, b, add)     the same with A in registers, in the order of rt::mma
//   rt::wgmma_fence(d...), wgmma_commit(), wgmma_wait<N>(d...)
//
// A tile is rows of 128 bytes, eight of them a group of 1024, with 16-byte words swizzled inside a row. "K-major": a row is one m or n,
// its bytes run along k; leading is unused, stride is from a group of 8 rows to the next, and k + 16 is 32 bytes further.
// "MN-major" (Trans): a row is one k, its bytes run along 64 m or n; leading is from 64 m or n to the next 64, stride from 8 k to the
// next 8, and k + 16 is two strides further. Thread 32 w + 4 g + t of a warpgroup holds of D the rows 16 w + g + 8 i and the columns
// 8 j + 2 t + e in d[4 j + 2 i + e]. (PTX ISA, wgmma.)
#pragma once
#include <type_traits>

#include "cuda/rt.cuh"

#if defined(__CUDACC__)
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define RT_HOPPER 1
#else
#define RT_HOPPER 0
#endif
#else
#include "emulate/hopper.h"
#define RT_HOPPER 1
#endif

namespace rt {

struct alignas(8) Mbarrier {
  uint64_t word;
};

enum SwizzleMode : uint64_t { kNoSwizzle = 0, kSwizzle128 = 1, kSwizzle64 = 2, kSwizzle32 = 3 };

// The place, inside a tile that begins at a multiple of 1024 bytes, of the byte that would lie at `byte` without the swizzle.
RT_FN unsigned swizzled(unsigned byte) { return byte ^ (byte >> 3 & 0x70); }

#if defined(__CUDACC__)

RT_FN unsigned shared_address(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }

RT_FN void mbar_init(Mbarrier* bar, unsigned count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(count) : "memory");
}
RT_FN void mbar_arrive(Mbarrier* bar) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory"); }
// An arrival that also says how many bytes of bulk copies the phase waits for.
RT_FN void mbar_expect(Mbarrier* bar, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)), "r"(bytes) : "memory");
}
// Arrives once all of this thread's cp16 so far have landed; one of the arrivals that the barrier was made for.
RT_FN void mbar_arrive_copies(Mbarrier* bar) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(bar)) : "memory");
}
// Returns once the phase of this parity is over: 0 for the first, third, ... phase of a barrier.
RT_FN void mbar_wait(Mbarrier* bar, unsigned parity) {
  unsigned over;
  do {
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(over)
                 : "r"(shared_address(bar)), "r"(parity)
                 : "memory");
  } while (!over);
}
RT_FN void copy_bulk(void* to, const void* from, unsigned bytes, Mbarrier* bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(bar))
               : "memory");
}
RT_FN void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

RT_FN void bar_sync(int id, int threads) { asm volatile("barrier.cta.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
RT_FN void bar_arrive(int id, int threads) { asm volatile("barrier.cta.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
// Whether any of the threads brought true.
RT_FN bool bar_or(int id, int threads, bool own) {
  unsigned any;
  asm volatile("{ .reg .pred p, q; setp.ne.u32 p, %1, 0; barrier.cta.red.or.pred q, %2, %3, p; selp.u32 %0, 1, 0, q; }"
               : "=r"(any)
               : "r"(unsigned(own)), "r"(id), "r"(threads)
               : "memory");
  return any;
}
template <int N>
RT_FN void registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
RT_FN void registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// The compiler moves no use of these registers across this point.
RT_FN void settle(float& x) { asm volatile("" : "+f"(x)::"memory"); }
RT_FN void settle(uint32_t& x) { asm volatile("" : "+r"(x)::"memory"); }
template <class X, int N>
RT_FN void settle(X (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) settle(x[i]);
}
// Before the first wgmma that reads registers which the thread has written: its accumulators, or A.
template <class... X>
RT_FN void wgmma_fence(X&... registers) {
  (settle(registers), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
RT_FN void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits for all committed groups but the last N; `registers`: what those products wrote.
template <int N, class... X>
RT_FN void wgmma_wait(X&... registers) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
  (settle(registers), ...);
}

// clang-format off
#define RT_TEN(t) ",%" t "0,%" t "1,%" t "2,%" t "3,%" t "4,%" t "5,%" t "6,%" t "7,%" t "8,%" t "9"
#define RT_D4 "%0,%1,%2,%3"
#define RT_D8 RT_D4 ",%4,%5,%6,%7"
#define RT_D16 RT_D8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define RT_D20 RT_D8 ",%8,%9" RT_TEN("1")
#define RT_D32 RT_D20 RT_TEN("2") ",%30,%31"
#define RT_D40 RT_D20 RT_TEN("2") RT_TEN("3")
#define RT_D48 RT_D40 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define RT_D60 RT_D40 RT_TEN("4") RT_TEN("5")
#define RT_D64 RT_D60 ",%60,%61,%62,%63"
#define RT_D128 RT_D60 RT_TEN("6") RT_TEN("7") RT_TEN("8") RT_TEN("9") RT_TEN("10") RT_TEN("11") ",%120,%121,%122,%123,%124,%125,%126,%127"
#define RT_R4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define RT_R8(i) RT_R4(i), RT_R4(i + 4)
#define RT_R16(i) RT_R8(i), RT_R8(i + 8)
#define RT_R32(i) RT_R16(i), RT_R16(i + 16)
#define RT_R48(i) RT_R32(i), RT_R16(i + 32)
#define RT_R64(i) RT_R32(i), RT_R32(i + 32)
#define RT_R128(i) RT_R64(i), RT_R64(i + 64)
#define RT_SHARED_A(N, D, R, type, i0, i1, i2, i3, i4)                                                              \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %" i2 ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type \
               " {" D "}, %" i0 ", %" i1 ", p, 1, 1, %" i3 ", %" i4 "; }" : R : "l"(a), "l"(b), "r"(add), "n"(TransA), "n"(TransB))
#define RT_REGISTER_A(N, D, R, type, i0, i1, i2, i3, i4, i5, i6)                                                    \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %" i5 ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type \
               " {" D "}, {%" i0 ",%" i1 ",%" i2 ",%" i3 "}, %" i4 ", p, 1, 1, %" i6 "; }"                                \
               : R : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(TransB))
#define RT_WGMMA(N, n, i0, i1, i2, i3, i4, i5, i6)                                                \
  template <class T, int TransA, int TransB>                                                      \
  RT_FN void wgmma(float (&d)[n], uint64_t a, uint64_t b, int add) {                              \
    if constexpr (std::is_same<T, bf16>::value)                                                   \
      RT_SHARED_A(N, RT_D##n, RT_R##n(0), "bf16", i0, i1, i2, i3, i4);                            \
    else                                                                                          \
      RT_SHARED_A(N, RT_D##n, RT_R##n(0), "f16", i0, i1, i2, i3, i4);                             \
  }                                                                                               \
  template <class T, int TransB>                                                                  \
  RT_FN void wgmma_registers(float (&d)[n], const uint32_t (&a)[4], uint64_t b, int add) {        \
    if constexpr (std::is_same<T, bf16>::value)                                                   \
      RT_REGISTER_A(N, RT_D##n, RT_R##n(0), "bf16", i0, i1, i2, i3, i4, i5, i6);                  \
    else                                                                                          \
      RT_REGISTER_A(N, RT_D##n, RT_R##n(0), "f16", i0, i1, i2, i3, i4, i5, i6);                   \
  }
RT_WGMMA(8, 4, "4", "5", "6", "7", "8", "9", "10")
RT_WGMMA(16, 8, "8", "9", "10", "11", "12", "13", "14")
RT_WGMMA(32, 16, "16", "17", "18", "19", "20", "21", "22")
RT_WGMMA(64, 32, "32", "33", "34", "35", "36", "37", "38")
RT_WGMMA(96, 48, "48", "49", "50", "51", "52", "53", "54")
RT_WGMMA(128, 64, "64", "65", "66", "67", "68", "69", "70")
RT_WGMMA(256, 128, "128", "129", "130", "131", "132", "133", "134")
// clang-format on

#else

RT_FN unsigned shared_address(const void* p) { return emulate::shared_address(p); }
RT_FN void mbar_init(Mbarrier* bar, unsigned count, EMULATE_SITE) { emulate::mbar_init(bar, count, site); }
RT_FN void mbar_arrive(Mbarrier* bar, EMULATE_SITE) { emulate::mbar_arrive(bar, 0, site); }
RT_FN void mbar_expect(Mbarrier* bar, unsigned bytes, EMULATE_SITE) { emulate::mbar_arrive(bar, bytes, site); }
RT_FN void mbar_arrive_copies(Mbarrier* bar, EMULATE_SITE) { emulate::mbar_arrive_copies(bar, site); }
RT_FN void mbar_wait(Mbarrier* bar, unsigned parity, EMULATE_SITE) { emulate::mbar_wait(bar, parity, site); }
RT_FN void copy_bulk(void* to, const void* from, unsigned bytes, Mbarrier* bar, EMULATE_SITE) {
  emulate::copy_bulk(to, from, bytes, bar, site);
}
RT_FN void fence_async() { emulate::fence_async(); }
RT_FN void bar_sync(int id, int threads, EMULATE_SITE) { emulate::named_barrier(id, threads, false, true, site); }
RT_FN void bar_arrive(int id, int threads, EMULATE_SITE) { emulate::named_barrier(id, threads, false, false, site); }
RT_FN bool bar_or(int id, int threads, bool own, EMULATE_SITE) { return emulate::named_barrier(id, threads, own, true, site); }
template <int N>
RT_FN void registers_up(EMULATE_SITE) {
  emulate::set_registers(N, true, site);
}
template <int N>
RT_FN void registers_down(EMULATE_SITE) {
  emulate::set_registers(N, false, site);
}
template <class... X>
RT_FN void wgmma_fence(X&...) {
  emulate::wgmma_fence();
}
RT_FN void wgmma_commit() { emulate::wgmma_commit(); }
template <int N, class... X>
RT_FN void wgmma_wait(X&...) {
  emulate::wgmma_wait(N);
}
template <class T, int TransA, int TransB, int n>
RT_FN void wgmma(float (&d)[n], uint64_t a, uint64_t b, int add, EMULATE_SITE) {
  emulate::wgmma({d, nullptr, a, b, 2 * n, std::is_same<T, f16>::value, TransA != 0, TransB != 0, add != 0, site});
}
template <class T, int TransB, int n>
RT_FN void wgmma_registers(float (&d)[n], const uint32_t (&a)[4], uint64_t b, int add, EMULATE_SITE) {
  emulate::wgmma({d, a, 0, b, 2 * n, std::is_same<T, f16>::value, false, TransB != 0, add != 0, site});
}

#endif

// Swizzled tiles begin at multiples of 1024 bytes; ask the launch for 1024 bytes more than they take.
template <class X>
RT_FN X* tile_memory(X* p) {
  return reinterpret_cast<X*>(reinterpret_cast<unsigned char*>(p) + (-shared_address(p) & 1023u));
}

RT_FN uint64_t descriptor(const void* p, unsigned leading, unsigned stride, SwizzleMode mode = kSwizzle128) {
  return uint64_t((shared_address(p) & 0x3FFFF) >> 4) | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 | uint64_t(mode) << 62;
}

}  // namespace rt
