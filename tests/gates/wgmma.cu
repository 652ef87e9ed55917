// tests/gates/wgmma.cu: every form of rt::wgmma against plain sums, with operands brought by bulk copies and by cp.async. It runs under the
// emulator, and built by nvcc on a Hopper GPU: there it shows that chip and emulator read descriptors, swizzles and fragments alike.
//
//     wgmma [ORDER SEED LATE]        exit 0: all right; 1: what is wrong, on stderr; 2: a launch failed
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda/rt_hopper.cuh"

#if defined(__CUDACC__)
void* memory_of(size_t bytes) {
  void* p = nullptr;
  if (cudaMallocManaged(&p, bytes) != cudaSuccess) exit(2);
  return p;
}
void release(void* p) { cudaFree(p); }
int finished() { return cudaDeviceSynchronize(); }
#else
extern "C" void ramify_emulate(int order, uint64_t seed, int late);
void* memory_of(size_t bytes) { return aligned_alloc(128, (bytes + 127) / 128 * 128); }
void release(void* p) { free(p); }
int finished() { return cudaGetLastError(); }
#endif

namespace {

constexpr int kM = 64, kK = 64, kTileA = kM * 128;  // one swizzled panel of A
constexpr int tile_b(int N, bool transposed) { return transposed ? (N + 63) / 64 * kK * 128 : N * 128; }

// out[64, N] = a[64, 64] b[N, 64]^T, twice: the second time on top of the first. Operands come as they shall lie in shared memory.
template <class T, int N, int TransA, int TransB, bool Registers>
__global__ void __launch_bounds__(128) product(const unsigned char* a, const unsigned char* b, const T* plain_a, float* out) {
#if RT_HOPPER
  RT_DYN(unsigned char, memory);
  RT_SHARED(rt::Mbarrier, bars, [2]);
  constexpr int kStepA = TransA ? 2048 : 32, kStepB = TransB ? 2048 : 32;
  unsigned char *const at_a = rt::tile_memory(memory), *const at_b = at_a + kTileA;
  const int thread = threadIdx.x, warp = thread / 32, g = thread % 32 / 4, t = thread % 4;
  if (thread == 0) {
    rt::mbar_init(&bars[0], 1), rt::mbar_init(&bars[1], 128);
    rt::fence_async();
  }
  __syncthreads();
  if (thread == 0) {
    rt::mbar_expect(&bars[0], kTileA);
    rt::copy_bulk(at_a, a, kTileA, &bars[0]);
  }
  for (int at = thread * 16; at < tile_b(N, TransB); at += 128 * 16) rt::cp16(at_b + at, b + at);
  rt::mbar_arrive_copies(&bars[1]);
  uint32_t held[4][4] = {};
  if (Registers) {
#pragma unroll
    for (int step = 0; step < 4; ++step)
#pragma unroll
      for (int r = 0; r < 4; ++r)
        memcpy(&held[step][r], plain_a + (warp * 16 + g + 8 * (r & 1)) * kK + step * 16 + 2 * t + 8 * (r >> 1), 4);
  }
  float d[N / 2];
  rt::mbar_wait(&bars[0], 0);
  rt::mbar_wait(&bars[1], 0);
  rt::fence_async();
  rt::wgmma_fence(d, held);
#pragma unroll
  for (int step = 0; step < 8; ++step) {
    const int k = step % 4;
    const uint64_t from_b = rt::descriptor(at_b + k * kStepB, kK * 128, 1024);
    if constexpr (Registers)
      rt::wgmma_registers<T, TransB>(d, held[k], from_b, step > 0);
    else
      rt::wgmma<T, TransA, TransB>(d, rt::descriptor(at_a + k * kStepA, kK * 128, 1024), from_b, step > 0);
  }
  rt::wgmma_commit();
  rt::wgmma_wait<0>(d);
  const bool any = rt::bar_or(1, 128, thread == 77), none = rt::bar_or(2, 128, false);
#pragma unroll
  for (int n = 0; n < N / 2; ++n) out[(warp * 16 + g + 8 * (n >> 1 & 1)) * N + n / 4 * 8 + 2 * t + (n & 1)] = any && !none ? d[n] : -1.f;
#endif
}

template <class T>
T narrow(float x);
template <>
bf16 narrow<bf16>(float x) {
  return __float2bfloat16(x);
}
template <>
f16 narrow<f16>(float x) {
  return __float2half(x);
}

// Lays x [rows, 64] out as one tile: rows along k, or transposed along rows in panels of 64.
template <class T>
void lay(const T* x, int rows, bool transposed, unsigned char* to) {
  for (int r = 0; r < rows; ++r)
    for (int k = 0; k < kK; ++k) {
      const unsigned line = transposed ? k : r, across = 2 * (transposed ? r % 64 : k);
      const unsigned word = across / 16 ^ line % 8;  // the swizzle, said once more
      memcpy(to + (transposed ? r / 64 * kK * 128 : 0) + line * 128 + word * 16 + across % 16, &x[r * kK + k], 2);
    }
}

template <class T, int N, int TransA, int TransB, bool Registers>
int check(const char* type) {
  T* const a = static_cast<T*>(memory_of(2 * kM * kK));
  unsigned char *const laid_a = static_cast<unsigned char*>(memory_of(kTileA)), *const laid_b = static_cast<unsigned char*>(
                                                                                    memory_of(tile_b(N, TransB)));
  float* const out = static_cast<float*>(memory_of(4 * kM * N));
  std::vector<float> wide_a(kM * kK), wide_b(N * kK);
  std::vector<T> b(N * kK);
  for (int i = 0; i < kM * kK; ++i) wide_a[i] = float(i * 7 % 11 - 5), a[i] = narrow<T>(wide_a[i]);
  for (int i = 0; i < N * kK; ++i) wide_b[i] = float(i * 5 % 13 - 6), b[i] = narrow<T>(wide_b[i]);
  memset(laid_b, 0xFF, tile_b(N, TransB));
  lay(a, kM, TransA, laid_a), lay(b.data(), N, TransB, laid_b);
  for (int i = 0; i < kM * N; ++i) out[i] = NAN;
  auto* const kernel = product<T, N, TransA, TransB, Registers>;
  const int bytes = 1024 + kTileA + tile_b(N, TransB);
  int result = rt::allow_shared(kernel, bytes);
  RT_LAUNCH(kernel, dim3(1), dim3(128), bytes, nullptr, laid_a, laid_b, a, out);
  result = result ? result : finished();
  if (result) return fprintf(stderr, "%s\n", cudaGetErrorString(cudaError_t(result))), 2;
  for (int m = 0; m < kM && !result; ++m)
    for (int n = 0; n < N && !result; ++n) {
      float want = 0;
      for (int k = 0; k < kK; ++k) want += 2 * wide_a[m * kK + k] * wide_b[n * kK + k];  // small whole numbers: every sum is exact
      if (out[m * N + n] == want) continue;
      fprintf(stderr, "%s, N %d, A %s, B %s: [%d, %d] is %g, not %g\n", type, N,
              Registers ? "in registers"
              : TransA  ? "m-major"
                        : "k-major",
              TransB ? "n-major" : "k-major", m, n, double(out[m * N + n]), double(want));
      result = 1;
    }
  release(a), release(laid_a), release(laid_b), release(out);
  return result;
}

template <class T, int N>
int check_all(const char* type) {
  const int results[] = {check<T, N, 0, 0, false>(type), check<T, N, 0, 1, false>(type), check<T, N, 1, 0, false>(type),
                         check<T, N, 1, 1, false>(type), check<T, N, 0, 0, true>(type),  check<T, N, 0, 1, true>(type)};
  int worst = 0;
  for (const int result : results) worst = result > worst ? result : worst;
  return worst;
}

}  // namespace

int main(int count, char** words) {
#if defined(__CUDACC__)
  (void)count, (void)words;
#else
  if (count > 3) ramify_emulate(atoi(words[1]), strtoull(words[2], nullptr, 10), atoi(words[3]));
#endif
  const int results[] = {check_all<bf16, 8>("bf16"),   check_all<bf16, 16>("bf16"), check_all<bf16, 32>("bf16"),
                         check_all<bf16, 64>("bf16"),  check_all<bf16, 96>("bf16"), check_all<bf16, 128>("bf16"),
                         check_all<bf16, 256>("bf16"), check_all<f16, 64>("f16")};
  int worst = 0;
  for (const int result : results) worst = result > worst ? result : worst;
  return worst;
}
