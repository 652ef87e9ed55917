// csrc/cpu/merge.cpp: one attention from two over disjoint keys. Meaning: reference/attention.py.
//
// What     o = (e^l1 o1 + e^l2 o2) / (e^l1 + e^l2), l = log(e^l1 + e^l2), row by row; a side that saw nothing is not read.
// Traffic  3 * D * sizeof(o) bytes a row. Threads share rows; a row is one thread's work.
#include "cpu/isa.h"

namespace ramify::RAMIFY_ISA {
namespace {

template <class T>
void merge(const MergeArgs& a, Team& team) {
  constexpr float kNone = -__builtin_inff();
  const Range mine = share(team, a.rows);
  for (int64_t r = mine.begin; r < mine.end; ++r) {
    const float l1 = a.lse1[r], l2 = a.lse2[r], top = l1 > l2 || l1 != l1 ? l1 : l2;
    const float w1 = l1 == kNone ? 0.f : l1 == top ? 1.f : exp_of(l1 - top), w2 = l2 == kNone ? 0.f : l2 == top ? 1.f : exp_of(l2 - top);
    const float sum = w1 + w2;
    a.lse[r] = sum == 0.f ? kNone : top + log_of(sum);
    const T *x = static_cast<const T*>(a.o1) + r * a.o1_stride, *y = static_cast<const T*>(a.o2) + r * a.o2_stride;
    T* const out = static_cast<T*>(a.out) + r * a.out_stride;
    const Vec zero = Vec::set(0.f), v1 = Vec::set(w1), v2 = Vec::set(w2), total = Vec::set(sum == 0.f ? 1.f : sum);
    for (int64_t d = 0; d < a.D; d += L) {
      const Vec one = w1 == 0.f ? zero : load_part(x + d, a.D - d, 0.f) * v1;
      const Vec other = w2 == 0.f ? zero : load_part(y + d, a.D - d, 0.f) * v2;
      store_part(out + d, (one + other) / total, a.D - d);
    }
  }
}

void merge_states(const void* p, Team& team) {
  const MergeArgs& a = *static_cast<const MergeArgs*>(p);
  a.dtype == kF32 ? merge<float>(a, team) : merge<bf16>(a, team);
}

}  // namespace

extern const KernelRow merge_kernels[];
const KernelRow merge_kernels[] = {{kMerge, merge_states, nullptr}, {-1, nullptr, nullptr}};

}  // namespace ramify::RAMIFY_ISA
