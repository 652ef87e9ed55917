// csrc/cpu/verify.cpp: row statistics of logits that are already in memory. Meaning: reference/verify.py.
//
// What     arg-max, maximum, log-sum-exp and the k largest of each row, f32 or bf16 logits; the same blocks in the same
//          order as the last layer's own statistics (stats.h), so both give the same bits.
// Traffic  V * sizeof(logits) bytes a row in, one pass a block from memory.
#include "cpu/stats.h"

namespace ramify::RAMIFY_ISA {
namespace {

int64_t blocks_of(const RowStatsArgs& a) { return (a.V + kStatsBlock - 1) / kStatsBlock; }

void row_stats(const void* p, Team& team) {
  const RowStatsArgs& a = *static_cast<const RowStatsArgs*>(p);
  const int64_t blocks = blocks_of(a), rows = *a.rows;
  BlockStats* const stats = static_cast<BlockStats*>(a.scratch);
  for (int64_t i = take(team); i < rows * blocks; i = take(team)) {
    const int64_t m = i / blocks, begin = i % blocks * kStatsBlock, n = a.V - begin < kStatsBlock ? a.V - begin : kStatsBlock;
    const int64_t at = m * a.stride + begin;
    if (a.dtype == kF32)
      block_stats(static_cast<const float*>(a.logits) + at, n, int32_t(begin), int(a.topk), stats[i]);
    else
      block_stats(static_cast<const bf16*>(a.logits) + at, n, int32_t(begin), int(a.topk), stats[i]);
  }
  wait(team);
  const Range mine = share(team, rows);
  for (int64_t m = mine.begin; m < mine.end; ++m)
    join_stats(stats + m * blocks, blocks, int(a.topk), a.argmax + m, a.top + m, a.lse + m, a.topk_ids + m * a.topk,
               a.topk_values + m * a.topk);
}

int64_t row_stats_scratch(const void* p, int) {
  const RowStatsArgs& a = *static_cast<const RowStatsArgs*>(p);
  return *a.rows * blocks_of(a) * int64_t(sizeof(BlockStats));
}

}  // namespace

extern const KernelRow verify_kernels[];
const KernelRow verify_kernels[] = {{kRowStats, row_stats, row_stats_scratch}, {-1, nullptr, nullptr}};

}  // namespace ramify::RAMIFY_ISA
