// csrc/cpu/place.cpp: rows of keys or values into slots of a user's own cache. Meaning: reference/kv.py (kv_append, kv_commit).
//
// What     copies rows to the slots behind each sequence's length, through a page table where there is one, all layers in one
//          call; rounds where the cache is narrower. Slots of nobody are not touched.
// Traffic  Hkv * D * (sizeof(x) + sizeof(cache)) bytes a row. Threads share (layer, sequence, step).
#include "cpu/isa.h"

namespace ramify::RAMIFY_ISA {
namespace {

RAMIFY_INLINE void copy_row(const float* x, float* to, int64_t n) { __builtin_memcpy(to, x, size_t(n) * sizeof(float)); }
RAMIFY_INLINE void copy_row(const bf16* x, bf16* to, int64_t n) { __builtin_memcpy(to, x, size_t(n) * sizeof(bf16)); }
RAMIFY_INLINE void copy_row(const float* x, bf16* to, int64_t n) { narrow_row(x, to, n); }
RAMIFY_INLINE void copy_row(const bf16* x, float* to, int64_t n) {
  for (int64_t d = 0; d < n; ++d) to[d] = widen(x[d]);
}

template <class From, class To>
void place(const PlaceArgs& a, Team& team) {
  const Range mine = share(team, a.L * a.B * a.A);
  for (int64_t item = mine.begin; item < mine.end; ++item) {
    const int64_t layer = item / (a.B * a.A), b = item / a.A % a.B, i = item % a.A;
    if (i >= a.count[b]) continue;
    const int64_t row = a.path ? a.path[b * a.A + i] : i;
    int64_t slot = a.length[b] + i, page = b;
    if (a.page_table) page = a.page_table[b * a.table_stride + slot / a.page], slot %= a.page;
    const From* x = static_cast<const From*>(a.x) + layer * a.x_stride_l + b * a.x_stride_b + row * a.x_stride_t;
    To* to = static_cast<To*>(a.cache) + layer * a.cache_stride_l + page * a.cache_stride_b + slot * a.cache_stride_s;
    for (int64_t h = 0; h < a.Hkv; ++h) copy_row(x + h * a.x_stride_h, to + h * a.cache_stride_h, a.D);
  }
}

void place_rows(const void* p, Team& team) {
  const PlaceArgs& a = *static_cast<const PlaceArgs*>(p);
  if (a.dtype == kF32)
    a.cache_dtype == kF32 ? place<float, float>(a, team) : place<float, bf16>(a, team);
  else
    a.cache_dtype == kF32 ? place<bf16, float>(a, team) : place<bf16, bf16>(a, team);
}

}  // namespace

extern const KernelRow place_kernels[];
const KernelRow place_kernels[] = {{kPlace, place_rows, nullptr}, {-1, nullptr, nullptr}};

}  // namespace ramify::RAMIFY_ISA
