// csrc/cpu/order.cpp: whether the chip adds a pair of bf16 products as its manual says: the high halves' to the sum, rounded, then the low
// halves'. Attention's sums over slots stand on it (multiply_slots in gemm.h), so a level that does otherwise is not taken.
#include "cpu/gemm.h"

namespace ramify::RAMIFY_ISA {

bool adds_in_order();

bool adds_in_order() {
#if RAMIFY_BF16_DOT
  const auto sum = [](float start, float high, float low) {
    const uint32_t one = narrow(1.f) | uint32_t(narrow(1.f)) << 16, pair = narrow(low) | uint32_t(narrow(high)) << 16;
    const __m512 all =
        _mm512_dpbf16_ps(_mm512_set1_ps(start), (__m512bh)_mm512_set1_epi32(int(pair)), (__m512bh)_mm512_set1_epi32(int(one)));
    return _mm512_cvtss_f32(all);
  };
  constexpr float kMany = 16777216.f;  // 2^24: one more is lost, two more are not
  return sum(kMany, -kMany, 1.f) == 1.f && sum(kMany, 1.f, -kMany) == 0.f && sum(kMany, 1.f, 1.f) == kMany;
#else
  return true;
#endif
}

}  // namespace ramify::RAMIFY_ISA
