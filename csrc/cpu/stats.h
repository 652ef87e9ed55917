// csrc/cpu/stats.h: arg-max, maximum, log-sum-exp and the k largest of a row of logits.
//
// Bits     blocks of kStatsBlock columns, each summed in one fixed order and joined in column order: the result does not
//          depend on who computed which block, nor on the number of rows. The lowest column wins a tie.
// Masked   a column of minus infinity adds nothing and is never among the largest; an id of -1 marks a place not filled.
// NaN      is larger than every number, as in torch: maximum and log-sum-exp of its row are NaN, the arg-max is its column.
#pragma once
#include "cpu/isa.h"

namespace ramify::RAMIFY_ISA {
namespace {

struct BlockStats {
  float top, sum;
  int32_t arg, count;  // `count` of the block's largest values are kept
  float value[kMaxTopK];
  int32_t id[kMaxTopK];
};

RAMIFY_INLINE bool above(float a, float b) { return a != a ? b == b : a > b; }

// Keep (value, id) if it is above the smallest kept one. Strictly: ids arrive in ascending order, so the lower id stays.
RAMIFY_INLINE void keep(BlockStats& s, int k, float value, int32_t id) {
  if (s.count == k && !above(value, s.value[k - 1])) return;
  int place = s.count < k ? s.count++ : k - 1;
  for (; place > 0 && above(value, s.value[place - 1]); --place) s.value[place] = s.value[place - 1], s.id[place] = s.id[place - 1];
  s.value[place] = value, s.id[place] = id;
}

// A block whose sum came out as NaN: it holds a NaN, or infinity, whose exponential is not asked for again.
template <class T>
void strange_block(const T* x, int64_t n, int32_t first, BlockStats& s) {
  s.sum = 1.f;
  for (int64_t j = 0; j < n; ++j) {
    float t[L];
    load_part(x + j, 1, 0.f).store(t);
    if (t[0] == t[0]) continue;
    s.top = s.sum = t[0], s.arg = first + int32_t(j);
    return;
  }
}

template <class T>
void block_stats(const T* x, int64_t n, int32_t first, int k, BlockStats& s) {
  constexpr float kLowest = -__builtin_inff();
  Vec m = Vec::set(kLowest), sum = Vec::set(0.f);
  for (int64_t j = 0; j < n; j += L) m = max(load_part(x + j, n - j, kLowest), m);
  s.top = hmax(m), s.sum = 0.f, s.arg = -1, s.count = 0;
  const Vec top = Vec::set(s.top == kLowest ? 0.f : s.top);  // a masked block adds 0, not e^(inf - inf)
  for (int64_t j = 0; j < n; j += L) sum = sum + exp(load_part(x + j, n - j, kLowest) - top);
  s.sum = hsum(sum);
  if (s.sum != s.sum) strange_block(x, n, first, s);
  for (int64_t j = 0; s.arg < 0 && j < n; j += L) {
    const Vec v = load_part(x + j, n - j, kLowest);
    if (hmax(v) != s.top) continue;
    float t[L];
    v.store(t);
    for (int i = 0; s.arg < 0 && i < L && j + i < n; ++i)
      if (t[i] == s.top) s.arg = first + int32_t(j) + i;
  }
  for (int64_t j = 0; k > 0 && j < n; j += L) {
    const Vec v = load_part(x + j, n - j, kLowest);
    if (!any_above(v, Vec::set(s.count < k ? kLowest : s.value[k - 1]))) continue;
    float t[L];
    v.store(t);
    for (int i = 0; i < L && j + i < n; ++i)
      if (t[i] != kLowest) keep(s, k, t[i], first + int32_t(j) + i);
  }
}

// Join the blocks of one row in column order.
inline void join_stats(const BlockStats* blocks, int64_t n, int k, int32_t* arg, float* top, float* lse, int32_t* ids, float* values) {
  BlockStats all;
  all.top = blocks[0].top, all.arg = blocks[0].arg, all.count = 0;
  for (int64_t b = 1; b < n; ++b)
    if (above(blocks[b].top, all.top)) all.top = blocks[b].top, all.arg = blocks[b].arg;
  float sum = 0.f;
  for (int64_t b = 0; b < n; ++b) sum += blocks[b].sum * (blocks[b].top == all.top ? 1.f : exp_of(blocks[b].top - all.top));
  *arg = all.arg < 0 ? 0 : all.arg, *top = all.top, *lse = all.top + log_of(sum);
  if (k == 0) return;
  for (int64_t b = 0; b < n; ++b)
    for (int i = 0; i < blocks[b].count; ++i) keep(all, k, blocks[b].value[i], blocks[b].id[i]);
  for (int i = 0; i < k; ++i) {
    ids[i] = i < all.count ? all.id[i] : -1;
    values[i] = i < all.count ? all.value[i] : -__builtin_inff();
  }
}

}  // namespace
}  // namespace ramify::RAMIFY_ISA
