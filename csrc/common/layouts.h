// csrc/common/layouts.h: where an element lies in a packed weight, a key page and a value page.
//
// weight   f32: [N/32][K][32]           bf16: [N/32][K/2][32][2]     features in lanes, one broadcast per input value
// key page f32: [2][D][32]              bf16: [2][D/2][32][2]        the same panel with slots as features
// value page f32: [64][D]               bf16: [32][D][2]             head dimension in lanes, slots in pairs
//
// One layout serves every ISA level: a 32-bit lane of a bf16 pair widens to two f32 values with a shift and a mask, and is
// exactly what a bf16 dot instruction takes.
#pragma once
#include <stdint.h>

#include "common/args.h"

namespace ramify {
namespace {

inline int64_t pad_to(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Elements of one panel of `K` inputs.
inline int64_t panel_size(int64_t K, bool pairs) { return (pairs ? pad_to(K, 2) : K) * kPanel; }

inline int64_t panel_index(int64_t k, int64_t lane, bool pairs) {
  return pairs ? ((k >> 1) * kPanel + lane) * 2 + (k & 1) : k * kPanel + lane;
}

// Offset of (slot, d) inside the 64*D elements of one head's page.
inline int64_t key_index(int64_t slot, int64_t d, int64_t D, bool pairs) {
  return (slot / kPanel) * (kPanel * D) + panel_index(d, slot % kPanel, pairs);
}

inline int64_t value_index(int64_t slot, int64_t d, int64_t D, bool pairs) {
  return pairs ? ((slot >> 1) * D + d) * 2 + (slot & 1) : slot * D + d;
}

}  // namespace
}  // namespace ramify
