// csrc/common/args_draft.h: the argument structs of the draft table, which CPU and CUDA kernels take alike. As in args.h and args_cuda.h,
// whose enums number their kernels, every field is 8 bytes wide.
#pragma once
#include <stdint.h>

namespace ramify {

// Trees filled from a table of likely successors: row t of a sequence follows the token of row parents[t], as rank ranks[t] of its
// successors.
struct TableDraftArgs {
  int64_t B, T, V, W;    // T: as many rows as a tree may have
  const int32_t* table;  // [V, W]
  int64_t table_stride;
  const int32_t *roots, *parents, *ranks;  // [B], [T], [T]
  int32_t* out;                            // [B, T]; -1: not known
  int64_t out_stride;
};

// Row tokens[m] of the table becomes the first W of row m; of rows with one token the last counts.
struct TableLearnArgs {
  int64_t M, V, W;
  int32_t* table;
  int64_t table_stride;
  const int32_t *tokens, *likely;  // [M], [M, W or more]
  int64_t likely_stride;
};

}  // namespace ramify
