// csrc/common/tree_bits.h: ancestor words and depths of a tree from its parents, as pyext/tree/token_tree.py builds them.
//
// Row i sees row j of its own sequence when bit j & 63 of word j >> 6 of row i is set; the self bit is always set. Rows are in
// topological order (a parent stands before its child, row 0 is the root with parent -1), so one pass suffices.
#pragma once
#include <stdint.h>

#if defined(__CUDACC__)
#define RAMIFY_TREE __host__ __device__ static inline
#else
#define RAMIFY_TREE static inline
#endif

namespace ramify {

constexpr int kMaxRows = 256;  // MAX_ROWS of token_tree.py

// Words that a tree of so many rows needs.
RAMIFY_TREE int64_t tree_words(int64_t rows) { return (rows + 63) >> 6; }

RAMIFY_TREE bool sees(const int64_t* words, int64_t j) { return static_cast<uint64_t>(words[j >> 6]) >> (j & 63) & 1; }

// Fills ancestors[rows, stride] (the first `words` of every row) and depth[rows]. Returns the first row whose parent does not
// stand before it, or -1 when all is well.
RAMIFY_TREE int64_t tree_bits(const int32_t* parent, int64_t rows, int64_t words, int64_t stride, int64_t* ancestors, int32_t* depth) {
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t p = parent[i];
    if (p >= i || p < (i ? 0 : -1)) return i;
    for (int64_t w = 0; w < words; ++w) ancestors[i * stride + w] = i ? ancestors[p * stride + w] : 0;
    const uint64_t self = static_cast<uint64_t>(1) << (i & 63);
    ancestors[i * stride + (i >> 6)] = static_cast<int64_t>(static_cast<uint64_t>(ancestors[i * stride + (i >> 6)]) | self);
    depth[i] = i ? depth[p] + 1 : 0;
  }
  return -1;
}

// Checks the words of a batch, ancestors[B, T, words] with used[b] rows in use (all of them when null), and fills depth[B, T]
// where it is given: how many rows each row sees besides itself. Returns b * T + i of the first row that does not see itself or sees a
// later row, or -1.
RAMIFY_TREE int64_t check_words(const int64_t* ancestors, int64_t B, int64_t T, int64_t words, const int32_t* used, int32_t* depth) {
  for (int64_t row = 0; row < B * T; ++row) {
    const int64_t i = row % T, own = i >> 6;
    if (depth) depth[row] = 0;
    if (used && i >= used[row / T]) continue;
    int seen = 0;
    for (int64_t w = 0; w < words; ++w) {
      const uint64_t word = static_cast<uint64_t>(ancestors[row * words + w]);
      const uint64_t below = w < own ? ~uint64_t(0) : w > own ? 0 : (uint64_t(2) << (i & 63)) - 1;
      if ((word & ~below) != 0 || (w == own && (word >> (i & 63) & 1) == 0)) return row;
      for (uint64_t rest = word; rest; rest &= rest - 1) ++seen;
    }
    if (depth) depth[row] = seen - 1;
  }
  return -1;
}

}  // namespace ramify
