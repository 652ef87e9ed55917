// csrc/cpu/probe.cpp: what this machine can do at most, in this level's instructions. Every floor in benchmarks/ stands on it.
//
// read     each thread streams its share of a block of memory, `streams` places at once, and adds up what it finds
// fp32     independent fused multiply-adds (a product and a sum where the level has no fused form)
// bf16     vdpbf16ps: absent below avx512_bf16
// int8     vpdpbusd, or maddubs + madd + add at avx2: absent below
// Counted  an operation is a product or a sum; `*done` is what one thread did (bytes for read), 0 where the level has no such
//          instruction. The caller owns the clock.
#include "cpu/isa.h"

namespace ramify::RAMIFY_ISA {
namespace {

constexpr int kChains = 12;  // independent accumulators: latency 4 at two a cycle needs 8

// The compiler's own vectors: 64 bytes whatever the level, split into what it has.
typedef uint64_t Line __attribute__((vector_size(64), aligned(64)));

RAMIFY_INLINE void hide() { __asm__ volatile("" ::: "memory"); }

uint64_t read_lines(const Line* p, int64_t count, int64_t streams) {
  Line s0 = {}, s1 = {}, s2 = {}, s3 = {};
  const int64_t each = count / streams;
  for (int64_t i = 0; i + 4 <= each; i += 4) {
    for (int64_t s = 0; s < streams; ++s) {
      const Line* const x = p + s * each + i;
      s0 += x[0], s1 += x[1], s2 += x[2], s3 += x[3];
    }
  }
  s0 += s1 + s2 + s3;
  uint64_t sum = 0;
  for (int i = 0; i < 8; ++i) sum += s0[i];
  return sum;
}

double multiply_add(int64_t repeat) {
  Vec acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = Vec::set(float(i));
  const Vec x = Vec::set(0.99f), y = Vec::set(0.01f);
  for (int64_t n = 0; n < repeat; ++n)
    for (int i = 0; i < kChains; ++i) acc[i] = fma(acc[i], x, y);
  double sum = 0;
  for (int i = 0; i < kChains; ++i) sum += hsum(acc[i]);
  return sum;
}

#if defined(__AVX512BF16__)
constexpr int64_t kBf16Operations = 64;
double dot_bf16(int64_t repeat) {
  __m512 acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = _mm512_set1_ps(float(i));
  const __m512bh one = (__m512bh)_mm512_set1_epi16(0x3f80);
  for (int64_t n = 0; n < repeat; ++n)
    for (int i = 0; i < kChains; ++i) acc[i] = _mm512_dpbf16_ps(acc[i], one, one);
  double sum = 0;
  for (int i = 0; i < kChains; ++i) sum += hsum(Vec{acc[i]});
  return sum;
}
#else
constexpr int64_t kBf16Operations = 0;
double dot_bf16(int64_t) { return 0; }
#endif

#if defined(__AVX512VNNI__)
constexpr int64_t kInt8Operations = 128;
double dot_int8(int64_t repeat) {
  __m512i acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = _mm512_set1_epi32(i);
  const __m512i one = _mm512_set1_epi8(1);
  for (int64_t n = 0; n < repeat; ++n)
    for (int i = 0; i < kChains; ++i) acc[i] = _mm512_dpbusd_epi32(acc[i], one, one);
  double sum = 0;
  for (int i = 0; i < kChains; ++i) {
    int32_t lane[16];
    _mm512_storeu_si512(lane, acc[i]);
    sum += lane[0];
  }
  return sum;
}
#elif defined(__AVX2__)
constexpr int64_t kInt8Operations = 64;
double dot_int8(int64_t repeat) {
  __m256i acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = _mm256_set1_epi32(i);
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i x = _mm256_set1_epi8(1);
  for (int64_t n = 0; n < repeat; ++n) {
    for (int i = 0; i < kChains; ++i) {
      __asm__ volatile("" : "+x"(x));  // a product of constants would leave the loop
      acc[i] = _mm256_add_epi32(acc[i], _mm256_madd_epi16(_mm256_maddubs_epi16(x, x), ones));
    }
  }
  double sum = 0;
  for (int i = 0; i < kChains; ++i) sum += _mm_cvtsi128_si32(_mm256_castsi256_si128(acc[i]));
  return sum;
}
#else
constexpr int64_t kInt8Operations = 0;
double dot_int8(int64_t) { return 0; }
#endif

void probe(const void* p, Team& team) {
  const ProbeArgs& a = *static_cast<const ProbeArgs*>(p);
  double sum = 0;
  int64_t done = 0;
  if (a.kind == kProbeRead) {
    const int64_t lines = a.bytes / 64 / team.size;
    const Line* const mine = static_cast<const Line*>(a.data) + lines * team.id;
    for (int64_t n = 0; n < a.repeat; ++n) {
      sum += double(read_lines(mine, lines, a.streams));
      hide();  // or the compiler reads once and multiplies
    }
    done = a.repeat * (lines / a.streams / 4 * 4) * a.streams * 64;
  } else if (a.kind == kProbeFp32) {
    sum = multiply_add(a.repeat);
    done = a.repeat * kChains * 2 * L;
  } else if (a.kind == kProbeBf16) {
    sum = dot_bf16(a.repeat);
    done = a.repeat * kChains * kBf16Operations;
  } else {
    sum = dot_int8(a.repeat);
    done = a.repeat * kChains * kInt8Operations;
  }
  if (team.id == 0) *a.done = done, *a.sink = sum;
}

}  // namespace

extern const KernelRow probe_kernels[];
const KernelRow probe_kernels[] = {{kProbe, probe, nullptr}, {-1, nullptr, nullptr}};

}  // namespace ramify::RAMIFY_ISA
