// csrc/common/layouts.h: where an element lies in a packed weight, a key page and a value page.
//
// weight   f32: [N/32][K][32]           bf16: [N/32][K/2][32][2]     features in lanes, one broadcast per input value
// key page f32: [2][D][32]              bf16: [2][D/2][32][2]        the same panel with slots as features
// value page f32: [64][D]               bf16: [32][D][2]             head dimension in lanes, slots in pairs
//
// low bit  [N/32][2] panels of 16 features. A panel is a run of groups, in each the codes, then 16 scales (f32, f16 or bf16), then
//          16 zeros (f16) if the weight has any:
//          int4       group G: [G/8][16][4] bytes; byte b of (j, feature) holds input 4j + b low and G/2 + 4j + b high
//          int8, fp8  [K/4][16][4] bytes, K padded to 16; one set of scales at the panel's end, or one behind each 128 inputs
//          Panels begin at multiples of 32 bytes. A 64-byte line is 16 features x 4 inputs: what an integer dot instruction takes.
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

// Where a panel of a low-bit weight keeps what; bytes, from the panel's first.
struct LowBitLayout {
  int64_t K, group, groups;  // padded inputs; those of one group (the last may hold fewer), and how many groups
  bool small;                // two codes a byte
  int64_t step, panel;       // from group to group, from panel to panel
  int64_t row_scale;         // where the one set of scales lies, or 0: one in each group

  LowBitLayout(int64_t dtype, int64_t inputs, int64_t weight_group, int64_t scale_dtype, bool zeros) {
    const int64_t scales = kLowBitPanel * (scale_dtype == kF32 ? 4 : 2) + (zeros ? kLowBitPanel * 2 : 0);
    small = dtype == kInt4;
    K = small ? inputs : pad_to(inputs, 16);
    group = small ? weight_group : kLowBitGroup;
    groups = (K + group - 1) / group;
    const bool whole = weight_group == 0;
    step = group * kLowBitPanel / (small ? 2 : 1) + (whole ? 0 : scales);
    panel = K * kLowBitPanel / (small ? 2 : 1) + (whole ? 1 : groups) * scales;
    row_scale = whole ? panel - scales : 0;
  }
  int64_t inputs(int64_t g) const { return g + 1 < groups ? group : K - g * group; }
  int64_t scales(int64_t g) const { return row_scale ? row_scale : g * step + inputs(g) * kLowBitPanel / (small ? 2 : 1); }
};

}  // namespace
}  // namespace ramify
